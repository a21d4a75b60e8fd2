"""explain: block by block, whether a model runs fused, on which kernel, or why not."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .fused import choice_for


@dataclass(frozen=True)
class BlockReport:
    """One block: its name in the model, its class, whether it is fused, the kernel, and why (not)."""

    name: str
    kind: str
    fused: bool
    kernel: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table."""

    blocks: tuple[BlockReport, ...]

    def __str__(self) -> str:
        if not self.blocks:
            return "No block of resnet_fast in this model: every layer runs as torch does."
        header = ("block", "kind", "runs", "kernel", "why")
        rows = [(b.name, b.kind, "fused" if b.fused else "plain", b.kernel, b.reason) for b in self.blocks]
        widths = [max(len(r[i]) for r in [header, *rows]) for i in range(4)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[4]]) for r in [header, *rows]]
        fused = sum(b.fused for b in self.blocks)
        return "\n".join([*lines, f"{fused} of {len(self.blocks)} blocks fused"])

    def to_dict(self) -> dict:
        return {"blocks": [asdict(b) for b in self.blocks]}


def explain(model: nn.Module) -> Explanation:
    """Says for the stem and every residual block of ``model`` whether it runs fused, on which kernel, or why not.

    Judged as the model stands: its mode (train or eval), device, dtype, hooks, and the backend in force. Under
    torch.func transforms, FX tracing and ONNX export every block is plain.
    """
    blocks = []
    for name, module in model.named_modules():
        if not hasattr(module, "why_plain"):
            continue
        is_model = hasattr(module, "layer4")
        name = ".".join(filter(None, (name, "stem" if is_model else ""))) or "(model)"
        reason = "a global module hook is set" if _has_any_global_hook() else module.why_plain()
        choice = choice_for(module.conv1) if reason is None else None
        fused = choice is not None and choice.backend != "reference"
        blocks.append(
            BlockReport(
                name,
                "Stem" if is_model else type(module).__name__,
                fused,
                choice.kernel if fused else "torch",
                choice.reason if choice is not None else reason,
            )
        )
    return Explanation(tuple(blocks))
