"""What tests of the training operators share, whichever backend runs them."""

from dataclasses import dataclass, field, replace

import torch
from checks import UNIT_ROUNDOFF
from torch import Tensor

from resnet_fast import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around a vector, a byte of the mask and a panel of four vectors, at every instruction-set level and on a GPU.
CHANNELS = (1, 3, 7, 8, 9, 15, 16, 17, 33, 64, 65, 130)
MODES = ("norm and relu", "norm", "residual", "residual without relu", "projection")


@dataclass
class Case:
    """Arguments of batch_norm_relu or, with a shortcut to be normalised, batch_norm_relu_projection."""

    mode: str
    input: Tensor  # [N, C, H, W]
    grad: Tensor  # of the result
    residual: Tensor | None = None
    vectors: dict[str, Tensor | None] = field(default_factory=dict)  # weight, bias, of the shortcut too
    eps: float = 1e-5
    device: str = "cpu"  # of what does not run on the reference

    def tensors(self) -> dict[str, Tensor]:
        found = {"input": self.input, "residual": self.residual, **self.vectors}
        return {name: t for name, t in found.items() if t is not None}

    def call(self, t: dict[str, Tensor], reference: bool):
        affine = t.get("weight"), t.get("bias")
        if self.mode == "projection":
            function = ops.batch_norm_relu_projection_ref if reference else ops.batch_norm_relu_projection
            shortcut = t["residual"], t.get("shortcut_weight"), t.get("shortcut_bias")
            return function(t["input"], *affine, *shortcut, self.eps, 2 * self.eps)
        function = ops.batch_norm_relu_ref if reference else ops.batch_norm_relu
        relu = self.mode in ("norm and relu", "residual")
        return function(t["input"], *affine, t.get("residual"), self.eps, relu)

    def run(self, dtype=None, reference=True) -> dict[str, Tensor]:
        """The result and the gradient of every tensor, in ``dtype`` (else their own), on the CPU."""
        device = "cpu" if reference else self.device
        leaves = {
            name: t.detach().clone(memory_format=torch.preserve_format).to(device, dtype or t.dtype).requires_grad_()
            for name, t in self.tensors().items()
        }
        out = self.call(leaves, reference)
        out = out if reference else out[0]
        out.backward(self.grad.to(device, out.dtype))
        return {"out": out.detach().cpu(), **{name: t.grad.cpu() for name, t in leaves.items()}}


def random_map(*size, dtype=torch.float32, mean=0.0) -> Tensor:
    return (torch.randn(size) + mean).to(dtype).contiguous(memory_format=torch.channels_last)


def random_case(mode: str, size=(2, 17, 5, 7), dtype=torch.float32, mean=0.0, affine=True) -> Case:
    c = size[1]
    vectors = {"weight": torch.randn(c), "bias": 0.5 * torch.randn(c)} if affine else {}
    residual = None if mode.startswith("norm") else random_map(*size, dtype=dtype)
    if mode == "projection" and affine:
        vectors |= {"shortcut_weight": torch.randn(c), "shortcut_bias": 0.5 * torch.randn(c)}
    maps = random_map(*size, dtype=dtype, mean=mean), random_map(*size, dtype=dtype)
    return Case(mode, *maps, residual, vectors)


def assert_right(case: Case) -> None:
    """Result and gradients are as near to float64 as twice torch's own in either layout, plus one rounding. Of few
    channels torch's error is a matter of luck, since a rounded mean moves a whole channel: four times, then. Through
    batch statistics, and in sums, a few roundings of what is summed up, however small the sum."""
    before = {name: t.clone() for name, t in case.tensors().items()}
    exact, ours = case.run(torch.float64), case.run(reference=False)
    contiguous = replace(case, input=case.input.contiguous())
    stock = case.run(), contiguous.run()
    assert all(torch.equal(t, before[name]) for name, t in case.tensors().items()), "an argument was changed"
    times, units = (2, 1) if case.input.shape[1] >= 16 else (4, 4)
    for name, out in ours.items():
        assert out.dtype == stock[0][name].dtype and out.shape == exact[name].shape
        assert out.isfinite().all() and exact[name].isfinite().all()
        unit = UNIT_ROUNDOFF[case.input.dtype]
        size = _rms(exact[name])
        assert size > 0
        bound = times * max(_rms(s[name] - exact[name]) for s in stock) + units * unit * size
        error, floor = _rms(out - exact[name]), 8 * unit * _summed(case, name)
        assert error <= max(bound, floor), (
            f"{name}: error {error / size:.3g} above {bound / size:.3g}, {floor / size:.3g}"
        )


def _rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item()


def _summed(case: Case, name: str) -> float:
    """RMS of what is summed or subtracted in a gradient: |g gamma invstd| for maps, sqrt(count) |g| for vectors."""
    if name == "out":
        return 0.0
    shortcut = name == "residual" or name.startswith("shortcut")
    if name not in ("input", "residual"):
        return _rms(case.grad) * (case.input.numel() / case.input.shape[1]) ** 0.5
    std = (case.residual if shortcut else case.input).double().var((0, 2, 3), correction=0).add(case.eps).sqrt()
    gamma = case.vectors.get("shortcut_weight" if shortcut else "weight")
    return _rms(case.grad * ((1 if gamma is None else gamma) / std).view(1, -1, 1, 1))


def assert_statistics_are_right(x: Tensor) -> None:
    """Mean and variance against float64 within a few roundings of float32, whatever the mean."""
    mean, var = ops.batch_norm_statistics(x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    unit = UNIT_ROUNDOFF[torch.float32]
    assert mean.dtype == var.dtype == torch.float32
    assert ((mean - exact_mean).abs() <= 2 * unit * (exact_mean.abs() + 2 * exact_var.sqrt())).all()
    assert ((var - exact_var).abs() <= 16 * unit * exact_var).all()


def integer_case(mode: str, size=(2, 17, 4, 4), dtype=torch.float32) -> Case:
    """Every step is exact: maps of +-2 and +-4 in equal parts around an integer mean, so that var + eps is a power of 4
    (16), gradients of small integers, scales of powers of two, a power of two of pixels."""
    n, c, h, w = size
    assert n * h * w >= 4 and (n * h * w) & (n * h * w - 1) == 0

    def balanced(spread):
        half = torch.full((n * h * w // 2, c), float(spread))
        values = torch.cat([half, -half])
        order = torch.rand(values.shape).argsort(0)
        return values.gather(0, order).view(n, h, w, c).permute(0, 3, 1, 2).to(dtype)

    def integers(*size, most=3):
        return torch.randint(-most, most + 1, size).to(dtype)

    powers = 2.0 ** torch.randint(-1, 2, (c,))
    vectors = {"weight": powers, "bias": integers(c).float()}
    residual = None if mode.startswith("norm") else integers(n, c, h, w)
    if mode == "projection":
        residual = balanced(4) + 1
        vectors |= {"shortcut_weight": powers.flip(0), "shortcut_bias": integers(c).float()}
    grad = integers(n, c, h, w).contiguous(memory_format=torch.channels_last)
    return Case(mode, (balanced(2) + 3).contiguous(memory_format=torch.channels_last), grad, residual, vectors, eps=0.0)


def assert_exact(case: Case) -> None:
    """Bit for bit the result of float64."""
    exact, ours = case.run(torch.float64), case.run(reference=False)
    for name, out in ours.items():
        assert torch.equal(out, exact[name].to(out.dtype)), name
