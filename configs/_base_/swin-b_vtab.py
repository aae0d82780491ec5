# Swin-B on a task of VTAB-1k, which the environment variable VTAB_TASK
# names. Learning rate of the recipe: 1e-3 for 64 images.
_base_ = [
    './parts/classifier_swin-b.py', './parts/vtab.py',
    './parts/classification_100e.py'
]

model = dict(
    head=dict(
        num_classes=_base_.num_classes,
        loss=dict(
            _delete_=True,
            type='LabelSmoothLoss',
            label_smooth_val=0.1,
            mode='original')))
