"""The rows that csrc/cpu/run_plan.cpp runs: one for each call of a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

_fields, _kinds = (part.split() for part in torch.ops.resnet_fast._plan_format().split("|"))
_FIELDS = {name: i for i, name in enumerate(_fields)}
_KINDS = {name: i for i, name in enumerate(_kinds)}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Storage in csrc/cpu/levels.h

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
