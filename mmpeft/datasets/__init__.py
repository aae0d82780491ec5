from .shapes import ShapesDataset, ensure_shapes

__all__ = ['ShapesDataset', 'ensure_shapes']
