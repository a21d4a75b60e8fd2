"""Winograd's convolution in plain torch: what the C++ kernels' rounding errors are compared with."""

from fractions import Fraction
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

POINTS = {
    2: (0, 1, -1),
    4: (0, Fraction(2, 3), -Fraction(2, 3), Fraction(3, 2), -Fraction(3, 2)),
    5: (Fraction(1, 3), -Fraction(1, 3), Fraction(3, 4), -Fraction(3, 4), 2, -2),
}
# Of convolution in float32 over the layers of ResNets, RMS: what F(tile, 3) may lose.
LARGEST_ERROR = {2: 1e-6, 4: 2e-6, 5: 5e-6}


def _coefficients(roots: list) -> list[Fraction]:
    """Of the polynomial with these roots, from the constant on."""
    c = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *c]
        c = [a - root * b for a, b in zip(shifted, [*c, Fraction(0)], strict=True)]
    return c


def matrices(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A^T, G, B^T) of F(tile, 3) in float64, by Toom and Cook's construction with infinity as the last point."""
    points = POINTS[tile]
    others = [[q for q in points if q != p] for p in points]
    divisors = [prod((p - q for q in o), start=Fraction(1)) for p, o in zip(points, others, strict=True)]
    at = [[Fraction(p) ** i for p in points] + [Fraction(int(i == tile - 1))] for i in range(tile)]
    g = [[Fraction(p) ** i / d for i in range(3)] for p, d in zip(points, divisors, strict=True)] + [[0, 0, 1]]
    bt = [_coefficients(o) + [Fraction(0)] for o in others] + [_coefficients(points)]
    return tuple(torch.tensor([[float(v) for v in row] for row in m], dtype=torch.float64) for m in (at, g, bt))


def winograd(x: Tensor, weight: Tensor, tile: int, padding: int) -> Tensor:
    """conv2d(x [N, C, H, W], weight [K, C, 3, 3]) in x's dtype; the weight is transformed in float64."""
    at, g, bt = matrices(tile)
    u = (g @ weight.double() @ g.T).to(x.dtype)
    at, bt = at.to(x.dtype), bt.to(x.dtype)
    n, _, h, w = x.shape
    p, q = h + 2 * padding - 2, w + 2 * padding - 2
    down, across = -(-p // tile), -(-q // tile)
    x = F.pad(x, (padding, across * tile + 2 - w - padding, padding, down * tile + 2 - h - padding))
    v = bt @ x.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile) @ bt.T  # [N, C, down, across, tile + 2, tile + 2]
    y = at @ torch.einsum("kcij,ncabij->nkabij", u, v) @ at.T
    return y.permute(0, 1, 2, 4, 3, 5).reshape(n, len(weight), down * tile, across * tile)[:, :, :p, :q]
