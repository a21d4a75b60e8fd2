"""The rows that csrc/cpu/run_plan.cpp runs: one for each call of a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .items import Kernel, Place

_fields, _kinds = (part.split() for part in torch.ops.resnet_fast._plan_format().split("|"))
_FIELDS = {name: i for i, name in enumerate(_fields)}
_KINDS = {name: i for i, name in enumerate(_kinds)}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Storage in csrc/cpu/levels.h

# Floats behind the zeros that stand for a padded pixel's channels: a vector of the widest level.
_BEHIND_ZEROS = 16

run_plan = torch.ops.resnet_fast._run_plan.default


class Row(dict):
    """The fields of one row by name; those not given are 0, except that there is no residual."""

    def __init__(self, kind: str, **fields: int) -> None:
        super().__init__(kind=_KINDS[kind], residual=-1)
        self.update(fields)

    def update(self, fields: dict[str, int]) -> None:
        unknown = fields.keys() - _FIELDS.keys()
        if unknown:
            raise KeyError(f"no such fields of a step: {sorted(unknown)}")
        super().update(fields)


def type_number(dtype: torch.dtype) -> int:
    return _TYPES[dtype]


def to_tensor(rows: list[Row]) -> Tensor:
    """[rows, fields], int64."""
    steps = torch.zeros(len(rows), len(_FIELDS), dtype=torch.int64)
    for to, row in zip(steps, rows, strict=True):
        for name, value in row.items():
            to[_FIELDS[name]] = value
    return steps


class Segment:
    """Calls of kernels with no Python between them. ``slots``: the tensors that hold maps, by their expressions."""

    def __init__(self, whole: set[int], layer_of: dict[int, int]) -> None:
        self.whole, self.layer_of = whole, layer_of
        self.slots: dict[str, int] = {}
        self.constants: list[Tensor] = [torch.zeros(0, dtype=torch.float32)]
        self.packed_at: dict[int, int] = {}  # by id of the kernel
        self.rows: list[Row] = []
        self.layers: list[int] = []  # of the rows

    def add(self, item: Kernel, image: int, images: int) -> None:
        """Appends the call for images [image, image + images)."""
        _, c, h, w = item.input.size
        row = Row(item.kind, n=images, c=c, h=h, w=w)
        row.update(item.fields)
        row.update({"input_type": type_number(item.input.dtype), "output_type": type_number(item.output.dtype)})
        for name, p in (("input", item.input), ("residual", item.residual), ("output", item.output)):
            if p is not None:
                row.update({name: self._slot(p), f"{name}_at": self._at(p, image)})
        if item.kind.startswith(("conv_few_channels", "conv_winograd_stem")):  # they read the caller's map
            row.update({"image": image, "input_at": 0})
        if item.packed is not None:
            at = self.packed_at.setdefault(id(item), len(self.constants))
            if at == len(self.constants):
                self.constants += item.packed
            row.update({"weight": at, "bias": at + 1})
            self._grow_zeros(c)
        self.rows.append(row)
        self.layers.append(self.layer_of[id(item.step)])

    def _slot(self, p: Place) -> int:
        return self.slots.setdefault(p.variable or "arena", len(self.slots))

    def _at(self, p: Place, image: int) -> int:
        """Bytes into the tensor; a map of the first steps that is not whole holds the images of now alone."""
        if p.map is None:
            return image * p.image_bytes()
        return p.map.at + (image * p.image_bytes() if id(p.map) in self.whole else 0)

    def _grow_zeros(self, channels: int) -> None:
        if len(self.constants[0]) < channels + _BEHIND_ZEROS:
            self.constants[0] = torch.zeros(channels + _BEHIND_ZEROS, dtype=torch.float32)
