"""Names beside points, so that none covers another."""
import math
from typing import List, NamedTuple, Sequence, Tuple

__all__ = ['add_labels']

_ANGLES = (0, 180, 90, 270, 25, 155, 205, 335, 45, 135, 225, 315, 65, 115, 245,
           295)
_RADII = (6, 11, 18, 27, 38, 51, 66)  # points
_TRIES = 4  # rounds in which every name may find a better place
_MARK = 4.5


class Box(NamedTuple):
    """In pixels."""
    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def center(self) -> Tuple[float, float]:
        """Middle of the box."""
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def shared(self, other: 'Box') -> float:
        """Area that both cover."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(width, 0.) * max(height, 0.)


def _beside(x: float, y: float, size: Tuple[float, float], angle: float,
            radius: float) -> Box:
    """The box that begins ``radius`` away from a point, in a direction."""
    dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    cx = x + dx * (radius + size[0] / 2)
    cy = y + dy * (radius + size[1] / 2)
    return Box(cx - size[0] / 2, cy - size[1] / 2, cx + size[0] / 2,
               cy + size[1] / 2)


def _crossings(box: Box, x: float, y: float, others: Sequence[Box]) -> int:
    """Steps of the line from the point to its name that lie in others."""
    cx, cy = box.center
    steps = [(x + (cx - x) * t / 12, y + (cy - y) * t / 12)
             for t in range(1, 10)]
    return sum(b.x0 <= px <= b.x1 and b.y0 <= py <= b.y1 for px, py in steps
               for b in others)


def _distance(box: Box, x: float, y: float) -> float:
    """From a point to a box."""
    return math.hypot(
        max(box.x0 - x, 0., x - box.x1), max(box.y0 - y, 0., y - box.y1))


def add_labels(axes,
               points: Sequence[Tuple[float, float]],
               names: Sequence[str],
               spreads: Sequence[float],
               lines: Sequence[float] = (),
               size: float = 8.5) -> None:
    """Writes each name near its point, with a thin line where it is far.

    Call it when the limits of the axes are final.

    Args:
        axes (matplotlib.axes.Axes): Where the points are.
        points (Sequence[tuple[float, float]]): In data coordinates.
        names (Sequence[str]): Their names.
        spreads (Sequence[float]): Half the height of their error bars.
        lines (Sequence[float]): Heights of horizontal lines that names
            should not lie on. Defaults to none.
        size (float): Of the font, in points. Defaults to 8.5.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    unit = figure.dpi / 72
    frame = axes.get_window_extent()
    pixels = [tuple(p) for p in axes.transData.transform(points)]
    obstacles = []
    for (x, y), (px, py), spread in zip(points, pixels, spreads):
        mark = _MARK * unit
        obstacles.append(Box(px - mark, py - mark, px + mark, py + mark))
        low = axes.transData.transform((x, y - spread))[1]
        high = axes.transData.transform((x, y + spread))[1]
        obstacles.append(Box(px - unit, low, px + unit, high))
    for height in lines:
        y = axes.transData.transform((points[0][0], height))[1]
        obstacles.append(Box(frame.x0, y - unit, frame.x1, y + unit))
    sizes = []
    for name in names:
        text = axes.text(0, 0, name, fontsize=size)
        extent = text.get_window_extent()
        text.remove()
        sizes.append((extent.width + 2 * unit, extent.height))

    def fixed_cost(index: int, box: Box) -> float:
        x, y = pixels[index]
        outside = (
            box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0
            or box.y1 > frame.y1)
        # a name that is nearer to another point seems to be that point's
        own = _distance(box, x, y)
        wrong = sum(
            max(own + 4 * unit - _distance(box, *other), 0.)
            for i, other in enumerate(pixels) if i != index)
        return (3 * sum(box.shared(o) for o in obstacles) + 1e6 * outside +
                12 * unit * wrong)

    choices: List[List[Tuple[Box, int, float]]] = []
    for index, ((x, y), extent) in enumerate(zip(pixels, sizes)):
        choices.append([])
        for radius in _RADII:
            for turn, angle in enumerate(_ANGLES):
                box = _beside(x, y, extent, angle, radius * unit)
                cost = unit**2 * (1.5 * radius + turn / 2)
                choices[-1].append(
                    (box, radius, cost + fixed_cost(index, box)))
    found = [boxes[0] for boxes in choices]
    for _ in range(_TRIES):
        for index, boxes in enumerate(choices):
            taken = [f[0] for i, f in enumerate(found) if i != index]
            found[index] = min(
                boxes,
                key=lambda c: c[2] + 4 * sum(c[0].shared(t) for t in taken) +
                60 * unit**2 * _crossings(c[0], *pixels[index], taken))
    for name, point, (box, radius, _) in zip(names, points, found):
        axes.annotate(
            name,
            point,
            axes.transData.inverted().transform(box.center),
            fontsize=size,
            ha='center',
            va='center',
            zorder=5,
            arrowprops=dict(
                arrowstyle='-', color='.6', lw=.6, shrinkA=0, shrinkB=4)
            if radius > _RADII[1] else None)
