"""The five shapes as sets of points, for drawing them and for recognising them."""

import math
from collections.abc import Callable

import numpy as np

Array = np.ndarray


def _circle(u: Array, v: Array) -> Array:
    return u**2 + v**2 <= 1


def _square(u: Array, v: Array) -> Array:
    return np.maximum(abs(u), abs(v)) <= 0.88


def _triangle(u: Array, v: Array) -> Array:
    return (abs(u) <= (v + 0.95) / 1.9) & (v <= 0.95)


def _cross(u: Array, v: Array) -> Array:
    return (np.minimum(abs(u), abs(v)) <= 0.32) & (np.maximum(abs(u), abs(v)) <= 1)


def _star(u: Array, v: Array) -> Array:
    # A pentagram: the points that at most one of its five lines cuts off from the centre.
    angles = [math.pi / 2 + k * 2 * math.pi / 5 for k in range(5)]
    cut_off = sum((math.cos(a) * u + math.sin(a) * v > 0.4).astype(int) for a in angles)
    return (cut_off <= 1) & (u**2 + v**2 <= 1.2)


INSIDE: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
}


def coverage(shape: str, size: int, x: float, y: float, radius: float, oversample: int = 4) -> Array:
    """How much of each pixel of a (size, size) image the shape at (x, y) covers: float, 0..1."""
    grid = (np.arange(size * oversample) + 0.5) / oversample
    u, v = np.meshgrid((grid - x) / radius, (grid - y) / radius)
    inside = INSIDE[shape](u, v).astype(np.float32)
    return inside.reshape(size, oversample, size, oversample).mean((1, 3))
