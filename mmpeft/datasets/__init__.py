from .shapes import ShapesDataset, ShapesMetric, ensure_shapes

__all__ = ['ShapesDataset', 'ShapesMetric', 'ensure_shapes']
