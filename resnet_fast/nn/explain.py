"""explain: block by block, whether a model runs fused, on which kernel, or why not; layer by layer for an input."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ..backends import forced
from ..choose import Choice
from ..ops.conv_bn_relu import conv_output_size, conv_pairs, kernel_for
from ..ops.conv_bn_relu_max_pool import kernel_for as kernel_for_max_pool
from ..ops.conv_bn_relu_projection import kernel_for as kernel_for_projection
from ..ops.weight_cache import CacheInfo, cache_info
from .ends import FusedEnds
from .fused import choice_for, fused_backend, uses_batch_statistics


@dataclass(frozen=True)
class BlockReport:
    """One block: its name in the model, its class, whether it is fused, the kernel, and why (not)."""

    name: str
    kind: str
    fused: bool
    kernel: str
    reason: str


@dataclass(frozen=True)
class ConvReport:
    """One convolution that an input met: the module, sizes of input [N, C, H, W] and weight [K, C / groups, R, S],
    multiplications and additions, the kernel, and whether the kernel is this package's."""

    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    flops: int
    kernel: str
    ours: bool


def table_lines(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table, columns aligned."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header) - 1)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[-1]]) for r in [header, *rows]]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table. ``convolutions`` are those that the input met, if one was given, and
    ``cache`` is what the process keeps after it."""

    blocks: tuple[BlockReport, ...]
    convolutions: tuple[ConvReport, ...] = ()
    cache: CacheInfo | None = None

    @property
    def own_share(self) -> float:
        """The share of the convolutions' operations that this package's kernels compute, 0 to 1."""
        total = sum(c.flops for c in self.convolutions)
        return sum(c.flops for c in self.convolutions if c.ours) / total if total else 0.0

    def __str__(self) -> str:
        if not self.blocks:
            return "No block of resnet_fast in this model: every layer runs as torch does."
        rows = [(b.name, b.kind, "fused" if b.fused else "plain", b.kernel, b.reason) for b in self.blocks]
        lines = table_lines(("block", "kind", "runs", "kernel", "why"), rows)
        lines.append(f"{sum(b.fused for b in self.blocks)} of {len(self.blocks)} blocks fused")
        if self.convolutions:
            rows = [
                (c.name, "x".join(map(str, c.input)), "x".join(map(str, c.weight)), f"{c.flops / 1e9:.3f}", c.kernel)
                for c in self.convolutions
            ]
            lines += ["", *table_lines(("convolution", "input", "weight", "GFLOP", "kernel"), rows)]
            lines.append(f"{100 * self.own_share:.1f} % of the convolutions' operations in kernels of resnet_fast")
        if self.cache is not None:
            lines.append(str(self.cache))
        return "\n".join(lines)

    def to_dict(self) -> dict:
        found = {"blocks": [asdict(b) for b in self.blocks]}
        if self.convolutions:
            found |= {"convolutions": [asdict(c) for c in self.convolutions], "own_share": self.own_share}
        if self.cache is not None:
            found["cache"] = self.cache._asdict()
        return found


class _Convolutions(TorchDispatchMode):
    """Notes every convolution that runs, fused or torch's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(p): name.removesuffix(".weight") for name, p in model.named_parameters()}
        self.found: list[ConvReport] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.resnet_fast.conv_bn_relu.default:
            self._note(args[0], args[1], out.numel(), *kernel_for(*args))
        elif func is torch.ops.resnet_fast.conv_bn_relu_max_pool.default:
            size = conv_output_size(args[0], args[1], *conv_pairs(*args[7:10]))
            self._note(args[0], args[1], prod(size), *kernel_for_max_pool(*args))
        elif func is torch.ops.resnet_fast.conv_bn_relu_projection.default:
            last, projection = kernel_for_projection(*args)
            self._note(args[7], args[8], out.numel(), *projection)
            self._note(args[0], args[1], out.numel(), *last)
        elif func is torch.ops.aten.convolution.default:
            self._note(args[0], args[1], out.numel(), "torch", False)
        return out

    def _note(self, x: Tensor, weight: Tensor, outputs: int, kernel: str, ours: bool) -> None:
        flops = 2 * outputs * weight[0].numel()
        name = self.names.get(id(weight), "?")
        self.found.append(ConvReport(name, tuple(x.shape), tuple(weight.shape), flops, kernel, ours))


def _stem_reason(model: nn.Module, choice: Choice) -> str:
    if not hasattr(model, "maxpool"):
        return choice.reason
    why = model.why_plain_max_pool()
    if why is None and fused_backend("conv_bn_relu_max_pool", model.conv1.weight.device.type, model.conv1.weight.dtype):
        return f"{choice.reason}, after maxpool where no gradient is asked for"
    return f"{choice.reason}; maxpool runs torch's operator" + ("" if why is None else f": {why}")


def _block_reason(choice: Choice, training: bool) -> str:
    on_cpu_by_choice = choice.backend == "cpu" and forced() is None
    return choice.reason + ("; where the input is small on torch's operators" if training and on_cpu_by_choice else "")


def explain(model: nn.Module, input: Tensor | None = None) -> Explanation:
    """Says for the stem and every residual block of ``model`` whether it runs fused, on which kernel, or why not.

    Judged as the model stands: its mode (train or eval), device, dtype, hooks, and the backend in force. Under
    torch.func transforms, FX tracing and ONNX export every block is plain.

    Args:
        model: any module; only blocks of this package are looked at.
        input: what the model takes, [N, C, H, W]. If given, the model runs on it once, without gradients, and the
            answer has ``convolutions``: which kernel each was computed by, and ``cache``.
    """
    blocks = []
    for name, module in model.named_modules():
        if not hasattr(module, "why_plain"):
            continue
        is_model = isinstance(module, FusedEnds)
        name = ".".join(filter(None, (name, "stem" if is_model else ""))) or "(model)"
        reason = "a global module hook is set" if _has_any_global_hook() else module.why_plain()
        training = uses_batch_statistics(module.bn1)
        operator = "batch_norm_relu_conv" if training else "conv_bn_relu"
        choice = choice_for(module.conv1, operator) if reason is None else None
        fused = choice is not None and choice.backend != "reference"
        blocks.append(
            BlockReport(
                name,
                "Stem" if is_model else type(module).__name__,
                fused,
                choice.kernel if fused else "torch",
                reason or (_stem_reason(module, choice) if is_model else _block_reason(choice, training)),
            )
        )
    if input is None:
        return Explanation(tuple(blocks))
    with torch.no_grad(), _Convolutions(model) as convolutions:
        model(input)
    return Explanation(tuple(blocks), tuple(convolutions.found), cache_info())
