"""Drawing of the embedded data: shapes, textures and scenes in plain numpy.

Only ``RandomState`` (its stream is frozen), :mod:`math` on scalars, and
``+ - * /`` with comparisons on arrays are used, so that every numpy and
OpenCV draws the same pixels.
"""
import math
from dataclasses import dataclass
from typing import Dict, List, Tuple

import numpy as np

IMAGE_SIZE = 128


@dataclass(frozen=True)
class Domain:
    """What the scenes of one domain look like.

    Args:
        classes (tuple[str]): Names of the shapes.
        radius (tuple[int]): Smallest and largest circumscribed radius, pixels.
        objects (tuple[int]): Smallest and largest number tried per image.
        backgrounds (tuple[str]): Textures behind the shapes.
        fills (tuple[str]): Textures inside the shapes.
        background_range (tuple[int]): Range of a background's channels.
        fill_range (tuple[int]): Range of a fill's channels.
        contrast (int): Smallest sum of channel differences, fill to ground.
        noise (int): Half-width of the uniform noise per channel.
    """
    classes: Tuple[str, ...]
    radius: Tuple[int, int]
    objects: Tuple[int, int]
    backgrounds: Tuple[str, ...]
    fills: Tuple[str, ...]
    background_range: Tuple[int, int]
    fill_range: Tuple[int, int]
    contrast: int
    noise: int


# Fixed before any method was run on it; a change needs a new VERSION in
# shapes.py, so that numbers of different data are never compared.
DOMAINS: Dict[str, Domain] = dict(
    source=Domain(
        classes=('disc', 'square', 'triangle', 'bar'),
        radius=(12, 24),
        objects=(2, 5),
        backgrounds=('plain', 'gradient'),
        fills=('plain', ),
        background_range=(0, 110),
        fill_range=(70, 255),
        contrast=200,
        noise=4),
    target=Domain(
        classes=('ring', 'cross', 'star', 'crescent', 'arrow'),
        radius=(9, 19),
        objects=(3, 6),
        backgrounds=('patches', 'stripes', 'checker'),
        fills=('plain', 'stripes', 'dots'),
        background_range=(90, 230),
        fill_range=(0, 255),
        contrast=160,
        noise=20))


def _polygon(points: List[Tuple[float, float]], u: np.ndarray,
             v: np.ndarray) -> np.ndarray:
    """Even-odd test of the points ``(u, v)`` against a closed outline."""
    inside = np.zeros(u.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
        if y0 == y1:
            continue
        crosses = (y0 > v) != (y1 > v)
        inside ^= crosses & (u < (x1 - x0) * (v - y0) / (y1 - y0) + x0)
    return inside


def _regular(corners: int, inner: float = 0.) -> List[Tuple[float, float]]:
    """Corners of a regular polygon, or of a star if ``inner`` is given."""
    count = corners * 2 if inner else corners
    radii = [inner if inner and i % 2 else 1. for i in range(count)]
    return [(r * math.cos(2 * math.pi * i / count),
             r * math.sin(2 * math.pi * i / count))
            for i, r in enumerate(radii)]


_ARROW = [(1., 0.), (.1, .8), (.1, .3), (-.9, .3), (-.9, -.3), (.1, -.3),
          (.1, -.8)]
_SHAPES = dict(
    disc=lambda u, v: u * u + v * v <= 1,
    square=lambda u, v: (abs(u) <= .71) & (abs(v) <= .71),
    triangle=lambda u, v: _polygon(_regular(3), u, v),
    bar=lambda u, v: (abs(u) <= .95) & (abs(v) <= .3),
    ring=lambda u, v: (u * u + v * v <= 1) & (u * u + v * v >= .3),
    cross=lambda u, v:
    ((abs(u) <= .3) & (abs(v) <= .95)) | ((abs(v) <= .3) & (abs(u) <= .95)),
    star=lambda u, v: _polygon(_regular(5, .42), u, v),
    crescent=lambda u, v: (u * u + v * v <= 1) & ((u - .5) *
                                                  (u - .5) + v * v >= .64),
    arrow=lambda u, v: _polygon(_ARROW, u, v))


def draw_shape(name: str, centre: Tuple[int, int], radius: float,
               angle: float) -> np.ndarray:
    """Mask of one shape, a boolean array of ``(IMAGE_SIZE, IMAGE_SIZE)``."""
    grid = np.arange(IMAGE_SIZE, dtype=np.float64)
    dx = (grid - centre[0])[None, :] / radius
    dy = (grid - centre[1])[:, None] / radius
    cos, sin = math.cos(angle), math.sin(angle)
    return _SHAPES[name](cos * dx + sin * dy, cos * dy - sin * dx)


def _colour(rng: np.random.RandomState, low: int, high: int) -> np.ndarray:
    return rng.randint(low, high + 1, 3).astype(np.float64)


def _texture(rng: np.random.RandomState, kind: str,
             colours: Tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """A texture of two colours, ``(IMAGE_SIZE, IMAGE_SIZE, 3)``."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].astype(np.float64)
    angle = rng.random_sample() * math.pi
    period = float(rng.randint(6, 15))
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    if kind == 'plain':
        weight = np.zeros_like(x)
    elif kind == 'gradient':
        weight = (along / (2 * IMAGE_SIZE) + .5)
    elif kind == 'stripes':
        weight = along % period < period / 2
    elif kind == 'checker':
        weight = (along % period < period / 2) != (
            across % period < period / 2)
    elif kind == 'dots':
        du, dv = along % period - period / 2, across % period - period / 2
        weight = du * du + dv * dv < period * period / 9
    else:  # 'patches': coarse random values, bilinear in between
        coarse = rng.random_sample((10, 10))
        i, j = (y // 16).astype(int), (x // 16).astype(int)
        fy, fx = y / 16 - i, x / 16 - j
        weight = ((1 - fy) *
                  ((1 - fx) * coarse[i, j] + fx * coarse[i, j + 1]) + fy *
                  ((1 - fx) * coarse[i + 1, j] + fx * coarse[i + 1, j + 1]))
    weight = np.asarray(weight, dtype=np.float64)[..., None]
    return colours[0] * (1 - weight) + colours[1] * weight


def draw_scene(rng: np.random.RandomState,
               domain: Domain) -> Tuple[np.ndarray, List[tuple]]:
    """Draws one scene.

    Args:
        rng (np.random.RandomState): Source of every choice.
        domain (Domain): What the scene looks like.

    Returns:
        tuple: The image, ``(IMAGE_SIZE, IMAGE_SIZE, 3)`` uint8, and a list of
        ``(class index, visible mask)``.
    """
    base = _colour(rng, *domain.background_range)
    shift = rng.randint(-45, 46, 3)
    kind = domain.backgrounds[rng.randint(len(domain.backgrounds))]
    image = _texture(rng, kind, (base, base + shift))

    placed, masks = [], []
    for _ in range(rng.randint(domain.objects[0], domain.objects[1] + 1)):
        label = rng.randint(len(domain.classes))
        angle = rng.random_sample() * 2 * math.pi
        radius = rng.randint(domain.radius[0], domain.radius[1] + 1)
        for _ in range(20):
            x, y = rng.randint(radius // 2, IMAGE_SIZE - radius // 2, 2)
            # Neighbours may touch and overlap a little, never bury.
            if all((x - px) * (x - px) + (y - py) *
                   (y - py) >= (.75 * (radius + pr)) * (.75 * (radius + pr))
                   for px, py, pr in placed):
                break
        else:
            continue
        colour = _colour(rng, *domain.fill_range)
        while np.abs(colour - base - shift / 2).sum() < domain.contrast:
            colour = _colour(rng, *domain.fill_range)
        kind = domain.fills[rng.randint(len(domain.fills))]
        fill = _texture(rng, kind, (colour, colour * .65))
        mask = draw_shape(domain.classes[label], (x, y), radius, angle)
        image[mask] = fill[mask]
        masks = [(other, seen & ~mask) for other, seen in masks]
        masks.append((label, mask))
        placed.append((x, y, radius))

    image = image + rng.randint(-domain.noise, domain.noise + 1, image.shape)
    image = np.floor(np.clip(image, 0, 255) + .5).astype(np.uint8)
    return image, [(label, mask) for label, mask in masks if mask.sum() >= 16]
