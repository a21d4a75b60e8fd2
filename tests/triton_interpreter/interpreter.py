"""What Triton's interpreter lacks before a pass in it means much: right bfloat16, and an eye on memory.

Both parts replace methods of the interpreter for the whole process, which runs nothing but these tests.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, interpreter_builder
from triton.tools.tensor_descriptor import TensorDescriptor


def float_of(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as the interpreter holds it (uint16), in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bfloat16_of(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, as uint16."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    # Adding just under half of the last kept bit carries into it where rounding goes up; plus that bit itself for ties.
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)  # the carry would turn some NaNs into infinity


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def repair_bfloat16() -> None:
    """Makes casts and products of bfloat16 right, and every other arithmetic on it an error.

    The interpreter keeps bfloat16 as uint16 and computes with those integers, without a word; its casts from float32
    cut off. Kernels here compute in float32, so arithmetic needs no repair.
    """
    builder = InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, source, target_type):
        source_type, target = source.dtype.scalar, target_type.scalar
        if source_type == target or tl.bfloat16 not in (source_type, target):
            return cast(self, source, target_type)
        if source_type == tl.bfloat16:
            return TensorHandle(float_of(source.data).astype(interpreter._get_np_dtype(target)), target)
        return TensorHandle(bfloat16_of(source.data), target)

    def create_dot(self, a, b, acc, *options):
        def as_float(handle):
            data = float_of(handle.data) if _is_bfloat16(handle) else handle.data.astype(np.float32)
            return TensorHandle(data, tl.float32)

        # float16 too: numpy would otherwise multiply it in slow scalar code.
        if a.dtype.scalar in (tl.bfloat16, tl.float16):
            a, b = as_float(a), as_float(b)
        return dot(self, a, b, acc, *options)

    def refuse(method: Callable) -> Callable:
        def refusing(self, *arguments):
            *handles, op = arguments
            if op is not np.where and any(_is_bfloat16(h) for h in handles):
                raise TypeError(
                    "arithmetic on bfloat16: cast to float32 first, as the interpreter computes on its bits"
                )
            return method(self, *arguments)

        return refusing

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, name, refuse(getattr(builder, name)))

    # The interpreter multiplies tiles of any size; a GPU wants this depth, and refuses less when it compiles.
    def min_dot_size(a, b):
        return (1, 1, {8: 32, 16: 16, 32: 8, 64: 4}[a.scalar.primitive_bitwidth])

    interpreter_builder.codegen_fns["min_dot_size"] = min_dot_size


class _Memory:
    """The tensors of the running launch: which bytes belong to them, and which program wrote each."""

    def __init__(self, tensors):
        extents = []
        for t in tensors:
            if t.numel():
                # Of the view, not of its storage: a kernel must not read beside a slice.
                reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
                extents.append((t.data_ptr(), t.data_ptr() + reach * t.element_size()))
        merged: list[list[int]] = []
        for start, end in sorted(extents):
            if merged and start < merged[-1][1]:  # tensors that share memory
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        self.start = np.array([s for s, _ in merged], dtype=np.uint64)
        self.end = np.array([e for _, e in merged], dtype=np.uint64)
        self.writer = [np.full(e - s, -1, dtype=np.int32) for s, e in merged]

    def locate(self, pointers: TensorHandle, mask: TensorHandle, access: str) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of the lanes that are on, and in which extent each lies; raises IndexError for one in none."""
        on = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        if on.size == 0:
            return on, on.astype(np.int64)
        where = np.searchsorted(self.start, on, side="right").astype(np.int64) - 1
        outside = where < 0
        if len(self.end):
            outside |= on + size > self.end[where]
        if outside.any():
            raise IndexError(f"{access} out of bounds: {int(outside.sum())} of {on.size} lanes")
        return on, where

    def write(self, addresses: np.ndarray, where: np.ndarray, program: int) -> None:
        """Notes a store; raises RuntimeError where another program, or another lane of this store, has the address."""
        if np.unique(addresses).size != addresses.size:
            raise RuntimeError("store race: two lanes write one address")
        for i in np.unique(where):
            offsets = (addresses[where == i] - self.start[i]).astype(np.int64)
            before = self.writer[i][offsets]
            if ((before >= 0) & (before != program)).any():
                raise RuntimeError("store race: two programs write one address")
            self.writer[i][offsets] = program


def _tensors(arguments):
    """Those of a launch; behind a descriptor lies the whole tensor that it was made of."""
    for a in arguments:
        if isinstance(a, TensorDescriptor):
            a = a.base
        if hasattr(a, "data_ptr"):
            yield a


def check_memory() -> None:
    """Every load and store of a kernel is checked from now on.

    A lane that is on and lies in no tensor of the launch raises, and so does an address that two programs store to.
    Masked lanes of a load without ``other=`` become NaN (all ones for integers): the interpreter gives 0 there, which
    hides the mistake, and a GPU anything.
    """
    init, load, store = (
        GridExecutor._init_args_hst,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )
    memory = _Memory([])

    def init_arguments(self, arguments, keywords):
        nonlocal memory
        arguments, keywords = init(self, arguments, keywords)
        memory = _Memory(_tensors((*arguments, *keywords.values())))
        return arguments, keywords

    def poison(pointers: TensorHandle) -> TensorHandle:
        element = pointers.get_element_ty()
        numpy_type = interpreter._get_np_dtype(element)
        # bfloat16 is uint16 here, and all ones is a NaN of it.
        value = np.nan if numpy_type.kind == "f" else True if numpy_type.kind == "b" else np.iinfo(numpy_type).max
        return TensorHandle(np.full(pointers.data.shape, value, dtype=numpy_type), element)

    def masked_load(self, pointers, mask, other, *options, **keywords):
        memory.locate(pointers, mask, "load")
        return load(self, pointers, mask, poison(pointers) if other is None else other, *options, **keywords)

    def masked_store(self, pointers, value, mask, *options, **keywords):
        x, y, z = self.grid_idx
        _, height, depth = self.grid_dim
        memory.write(*memory.locate(pointers, mask, "store"), (x * height + y) * depth + z)
        return store(self, pointers, value, mask, *options, **keywords)

    GridExecutor._init_args_hst = init_arguments
    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store
