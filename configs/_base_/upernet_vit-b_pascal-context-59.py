# The same without the class of the background, which is ignored: the 59
# classes of most papers. The stock data set tells its pipeline so.
_base_ = './upernet_vit-b_pascal-context.py'

train_dataloader = dict(dataset=dict(type='PascalContextDataset59'))
val_dataloader = train_dataloader
test_dataloader = train_dataloader
model = dict(
    decode_head=dict(num_classes=59), auxiliary_head=dict(num_classes=59))
