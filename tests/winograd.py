"""Winograd's convolution in plain torch: what the C++ kernels' rounding errors are compared with."""

from fractions import Fraction
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

POINTS = {  # by the size of an input tile
    4: (0, 1, -1),
    6: (0, Fraction(2, 3), -Fraction(2, 3), Fraction(3, 2), -Fraction(3, 2)),
    7: (Fraction(1, 4), -Fraction(1, 4), Fraction(7, 8), -Fraction(7, 8), Fraction(7, 4), -Fraction(7, 4)),
}
# Of convolution in float32 over the layers of ResNets, RMS: what F(tile, 3) may lose, and F(3, 4) of the stem.
LARGEST_ERROR = {2: 1e-6, 3: 1.5e-6, 4: 2e-6, 5: 5e-6}


def _coefficients(roots: list) -> list[Fraction]:
    """Of the polynomial with these roots, from the constant on."""
    c = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *c]
        c = [a - root * b for a, b in zip(shifted, [*c, Fraction(0)], strict=True)]
    return c


def matrices(tile: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A^T, G, B^T) of F(tile, taps) in float64, by Toom and Cook's construction with infinity as the last point."""
    points = POINTS[tile + taps - 1]
    others = [[q for q in points if q != p] for p in points]
    divisors = [prod((p - q for q in o), start=Fraction(1)) for p, o in zip(points, others, strict=True)]
    at = [[Fraction(p) ** i for p in points] + [Fraction(int(i == tile - 1))] for i in range(tile)]
    g = [[Fraction(p) ** i / d for i in range(taps)] for p, d in zip(points, divisors, strict=True)]
    g.append([0] * (taps - 1) + [1])
    bt = [_coefficients(o) + [Fraction(0)] for o in others] + [_coefficients(points)]
    return tuple(torch.tensor([[float(v) for v in row] for row in m], dtype=torch.float64) for m in (at, g, bt))


def winograd(x: Tensor, weight: Tensor, tile: int, padding: int) -> Tensor:
    """conv2d(x [N, C, H, W], weight [K, C, R, R]) in x's dtype; the weight is transformed in float64."""
    taps = weight.shape[3]
    at, g, bt = matrices(tile, taps)
    size, overlap = tile + taps - 1, taps - 1
    u = (g @ weight.double() @ g.T).to(x.dtype)
    at, bt = at.to(x.dtype), bt.to(x.dtype)
    n, _, h, w = x.shape
    p, q = h + 2 * padding - overlap, w + 2 * padding - overlap
    down, across = -(-p // tile), -(-q // tile)
    x = F.pad(x, (padding, across * tile + overlap - w - padding, padding, down * tile + overlap - h - padding))
    v = bt @ x.unfold(2, size, tile).unfold(3, size, tile) @ bt.T  # [N, C, down, across, size, size]
    y = at @ torch.einsum("kcij,ncabij->nkabij", u, v) @ at.T
    return y.permute(0, 1, 2, 4, 3, 5).reshape(n, len(weight), down * tile, across * tile)[:, :, :p, :q]


def winograd_stem(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """conv2d(x [N, C, H, W], weight [K, C, 7, 7], stride 2) in x's dtype, as F(3, 4) on the phases of x."""
    odd = (x.shape[2] % 2, x.shape[3] % 2)
    x = F.pad(x, (padding, padding + odd[1], padding, padding + odd[0]))
    phases = F.pixel_unshuffle(x, 2), F.pixel_unshuffle(F.pad(weight, (0, 1, 0, 1)), 2)
    return winograd(*phases, tile=3, padding=0)


def winograd_weight_gradient(grad: Tensor, x: Tensor, padding: int) -> Tensor:
    """The gradient of conv2d's weight [K, C, 3, 3] for grad [N, K, P, Q] and x [N, C, H, W], in x's dtype, as F(3, 4) of
    tiles of 4 x 4 values of the gradient."""
    at, g, bt = (m.to(x.dtype) for m in matrices(3, 4))
    p, q = grad.shape[2:]
    down, across = -(-p // 4), -(-q // 4)
    h, w = x.shape[2:]
    x = F.pad(x, (padding, across * 4 + 2 - w - padding, padding, down * 4 + 2 - h - padding))
    tiles = F.pad(grad, (0, across * 4 - q, 0, down * 4 - p)).unfold(2, 4, 4).unfold(3, 4, 4)
    v, y = bt @ x.unfold(2, 6, 4).unfold(3, 6, 4) @ bt.T, g @ tiles @ g.T
    return at @ torch.einsum("nkabij,ncabij->kcij", y, v) @ at.T
