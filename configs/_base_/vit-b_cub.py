# ViT-B/16 on CUB-200-2011, a task of FGVC, at 224 pixels. Learning rate of the
# recipe: 1e-3 for 64 images.
_base_ = [
    './parts/classifier_vit-b.py', './parts/cub.py',
    './parts/classification_100e.py'
]

model = dict(head=dict(num_classes=200))
