"""The plan for one shape of the inputs: which kernel runs each step, where each map lies, and the code that runs them.

A map is what a kernel reads or writes. Maps that live at different times share memory; a residual that nothing reads
afterwards is overwritten by the sum. The first steps, whose maps are large and whose weights are small, may run a few
images at a time, so that what one writes is still in the cache when the next one reads it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ..choose import onednn_runs
from . import fuse, memory
from .capture import Captured, is_fresh
from .code import NEEDS_CONTIGUOUS, SAFE_FOR_ANY_STRIDES, fresh, like, literal
from .fuse import FUSED_DTYPES, Conv, Step, value_of
from .items import Code, Kernel, Place, four
from .kernel_choice import Options, choose_kernels, sizes_of
from .program import Segment, run_plan, to_tensor
from .weights import PackedConv, Weights, is_usable

_onednn = torch.ops.resnet_fast._conv_onednn.default


class NotFinite(Exception):
    """A result of Winograd's algorithm is not finite: the plan without it must run."""


@dataclass(frozen=True)
class Layer:
    """What `explain` says of a step beside its time."""

    name: str
    kernel: str
    ours: bool
    size: tuple[int, ...]  # of the result
    flops: int
    reason: str


class Plan:
    """What runs for one shape. ``keys``: of the packed weights that it uses."""

    def __init__(self, captured: Captured, weights: Weights, options: Options) -> None:
        builder = _Builder(captured, weights, options)
        self.out_spec = captured.out_spec
        self.keys = builder.keys
        self.layers = builder.layers
        self.arena_bytes = builder.arena_bytes
        self.views = builder.views
        self.code = builder.code(timed=False)
        self._run = builder.compile(self.code)
        self._builder = builder
        self._idle: list[tuple[Tensor, list[Tensor]]] = []

    def run(self, inputs: tuple[Tensor, ...]) -> list[Any]:
        """The outputs, none of which lies in the arena. Raises NotFinite."""
        with self._buffers() as buffers:
            return self._run(*buffers, None, *inputs)

    @contextmanager
    def _buffers(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """An arena that no other call uses meanwhile, and the views of it."""
        buffers = None
        with suppress(IndexError):
            buffers = self._idle.pop()  # atomic
        buffers = buffers or self._new_buffers()
        try:
            yield buffers
        finally:
            if len(self._idle) < MOST_BUFFERS:
                self._idle.append(buffers)

    def timed(self, inputs: tuple[Tensor, ...]) -> dict[int, float]:
        """Runs once; seconds of each layer, by its number. Raises NotFinite."""
        seconds: dict[int, float] = defaultdict(float)
        if not hasattr(self, "_run_timed"):
            self._run_timed = self._builder.compile(self._builder.code(timed=True))
        segments = self._builder.segments
        times = [torch.zeros(len(segment.rows), dtype=torch.float64) for segment in segments]
        with self._buffers() as buffers:
            self._run_timed(*buffers, (times, seconds), *inputs)
        for segment, time_of in zip(segments, times, strict=True):
            for layer, value in zip(segment.layers, time_of.tolist(), strict=True):
                seconds[layer] += value
        return seconds

    def _new_buffers(self) -> tuple[Tensor, list[Tensor]]:
        arena = torch.empty(max(1, self.arena_bytes), dtype=torch.uint8)
        return arena, [view(arena) for view in self.views]

    def idle_buffers(self) -> int:
        return len(self._idle)


# The others compute the last channels twice where they are no whole vector.
_READS_A_RESIDUAL_ONCE = ("conv_gemm", "conv_winograd")

# Sets of buffers kept for later calls, as many as threads have used at a time.
MOST_BUFFERS = 8


def _rounds_down(pool: fuse.MaxPool) -> bool:
    """Whether the result has the size that it has without ceil_mode."""
    sizes = zip(value_of(pool.inputs[0]).shape[2:], pool.kernel_size, pool.stride, pool.padding, strict=True)
    return list(value_of(pool.output).shape[2:]) == [(n + 2 * p - k) // s + 1 for n, k, s, p in sizes]


class _Builder:
    def __init__(self, captured: Captured, weights: Weights, options: Options) -> None:
        self.captured, self.weights = captured, weights
        self.items: list[Kernel | Code] = []
        self.where: dict[fx.Node, Place] = {}
        self.aliases: dict[fx.Node, set[int]] = {}  # maps, by id, whose memory a variable may share
        self.maps: dict[int, memory.Map] = {}
        self.names: dict[str, Any] = {"run": _run, "empty": torch.empty_strided, "clock": time.perf_counter}
        self.names |= {"fresh": fresh, "like": like}
        self.keys: set[tuple] = set()
        self.layers: list[Layer] = []
        self.layer_of: dict[int, int] = {}  # by id of the step
        self.views: list[Callable[[Tensor], Tensor]] = []
        self.view_of: dict[tuple, str] = {}
        self.allocations: list[str] = []
        self.inputs = [f"x{i}" for i in range(len(captured.inputs))]
        for node, name in zip(captured.inputs, self.inputs, strict=True):
            self.where[node] = Place(four(value_of(node).shape), value_of(node).dtype, variable=name)

        steps = fuse.fuse(captured, is_usable)
        self.chosen = choose_kernels([step for step in steps if isinstance(step, Conv)], captured, weights, options)
        self.outputs = {o for o in captured.outputs if isinstance(o, fx.Node)}
        steps = self._pooled(steps)
        for step in steps:
            self._lower(step)
        self.outside: dict[str, fx.Node] = {}  # variables of results that a kernel writes, and their nodes
        self.returned: set[fx.Node] = set()
        self.results = [self._result(*pair) for pair in zip(captured.outputs, captured.output_values, strict=True)]
        self._place()
        self.segments: list[Segment] = []
        self._lines = self._assemble()

    # From steps to items

    def _pooled(self, steps: list[Step]) -> list[Step]:
        """Max-pooling right behind a first layer becomes a part of it."""
        readers: dict[fx.Node, int] = {}
        for step in steps:
            for node in step.inputs:
                readers[node] = readers.get(node, 0) + 1
        made_by = {step.output: step for step in steps}
        found = []
        for step in steps:
            conv = made_by.get(step.inputs[0]) if isinstance(step, fuse.MaxPool) else None
            alone = isinstance(conv, Conv) and readers[conv.output] == 1 and conv.output not in self.outputs
            if alone and conv.relu and self.chosen[id(conv)].reads_images and _rounds_down(step):
                found.remove(conv)
                pool = (step.kernel_size, step.stride, step.padding)
                found.append(replace(conv, output=step.output, pool=pool))
                self.chosen[id(found[-1])] = self.chosen[id(conv)]
            else:
                found.append(step)
        return found

    def _lower(self, step: Step) -> None:
        self.layer_of[id(step)] = len(self.layers)
        if isinstance(step, Conv):
            self._conv(step)
        elif isinstance(step, fuse.MaxPool):
            self._max_pool(step)
        elif isinstance(step, fuse.AvgPool):
            c = value_of(step.inputs[0]).shape[1]
            self._kernel(step, "avg_pool", self._operand(step.inputs[0]), None, {"p": 1, "q": 1, "k": c})
        elif isinstance(step, fuse.AddRelu):
            a, b = (self._operand(node) for node in step.inputs)
            _, c, h, w = a.size
            self._kernel(step, "add_relu", a, b, {"p": h, "q": w, "k": c})
        elif isinstance(step, fuse.View) and self._in_map(step.inputs[0]):
            before = self.where[step.inputs[0]]
            self.where[step.output] = replace(before, size=four(value_of(step.output).shape))
            return
        else:
            self._torch(step)

    def _in_map(self, node: fx.Node) -> bool:
        return self.where[node].map is not None

    def _say(self, step: Step, kernel: str, ours: bool, flops: int = 0, reason: str = "") -> None:
        value = value_of(step.output)
        size = tuple(value.shape) if isinstance(value, Tensor) else ()
        self.layers.append(Layer(step.name, kernel, ours, size, flops, reason))

    def _kernel(
        self, step: Step, kind: str, input: Place, residual: Place | None, fields: dict[str, int], words: str = "",
        flops: int = 0, packed: PackedConv | None = None,
    ) -> None:  # fmt: skip
        output = self._new_place(value_of(step.output))
        self.where[step.output] = output
        self.items.append(Kernel(step, kind, input, output, fields, residual, packed))
        self._say(step, words or kind.replace("_", " "), True, flops)

    def _new_place(self, value: Tensor, dtype: torch.dtype | None = None) -> Place:
        dtype = dtype or value.dtype
        m = memory.Map(value.numel() * dtype.itemsize, len(self.items), len(self.items))
        self.maps[id(m)] = m
        return Place(four(value.shape), dtype, m)

    def _operand(self, node: fx.Node) -> Place:
        """The value as kernels take it: dense, in channels_last."""
        place = self.where[node]
        if place.map is not None or place.variable.startswith("d_"):
            return place
        name = f"d_{node.name}"
        dense = ".contiguous(memory_format=channels_last)" if value_of(node).dim() == 4 else ".contiguous()"
        self.names["channels_last"] = torch.channels_last
        self.items.append(Code(None, f"{name} = {place.variable}{dense}", self.aliases.get(node, set())))
        self.where[node] = replace(place, variable=name)
        return self.where[node]

    def _conv(self, conv: Conv) -> None:
        size, out = sizes_of(conv)
        n, c, h, w = size
        _, k, p, q = out
        depth = c // conv.groups
        flops = 2 * n * k * p * q * depth * prod(conv.kernel)
        kernel = self.chosen[id(conv)]
        dtype = value_of(conv.output).dtype
        compute = dtype if kernel.name != "onednn" or onednn_runs(dtype) else torch.float32
        key, packed = self.weights.find(conv, self.captured, kernel, size, compute)
        self.keys.add(key)
        if kernel.name == "onednn":
            return self._conv_onednn(conv, packed, flops)

        is_input = conv.inputs[0] in self.captured.inputs
        input = self.where[conv.inputs[0]] if kernel.reads_images and is_input else self._operand(conv.inputs[0])
        if kernel.reads_images and input.map is not None:  # this kernel takes a tensor with strides
            self.aliases[conv.inputs[0]] = {id(input.map)}
            input = Place(input.size, input.dtype, variable=self._text(conv.inputs[0]))
        residual = self._operand(conv.inputs[1]) if len(conv.inputs) > 1 else None
        if kernel.name == "gemm" and prod(conv.kernel) > 1 and dtype != torch.float32 and not kernel.bfloat16:
            wide = self._new_place(value_of(conv.inputs[0]), torch.float32)
            self.items.append(Kernel(conv, "widen", input, wide, {"p": h, "q": w, "k": c}))
            input = wide
        fields = {"k": k, "p": p, "q": q, "r": conv.kernel[0], "s": conv.kernel[1]}
        for name in ("stride", "padding", "dilation"):
            fields[f"{name}_h"], fields[f"{name}_w"] = getattr(conv, name)
        fields |= {"groups": conv.groups, "relu": int(conv.relu), "tile": kernel.tile}
        kind = "conv_" + kernel.name.replace(" ", "_")
        words = str(kernel) + (", max-pooling in the same pass" if conv.pool else "")
        if conv.pool:
            kind += "_max_pool"
            fields |= _pool_fields(*conv.pool)
            fields["pooled_h"], fields["pooled_w"] = value_of(conv.output).shape[2:]
        self._kernel(conv, kind, input, residual, fields, words, flops, packed)

    def _conv_onednn(self, conv: Conv, packed: PackedConv, flops: int) -> None:
        name, i = f"v_{conv.output.name}", len(self.names)
        self.names |= {f"w{i}": packed.weight, f"b{i}": packed.bias, "onednn": _onednn}
        reads = [self._text(node) for node in conv.inputs]
        residual = reads[1] if len(reads) > 1 else None
        geometry = f"{conv.stride}, {conv.padding}, {conv.dilation}, {conv.groups}, {conv.relu}"
        x = f"{reads[0]}[:, :, None, None]" if value_of(conv.inputs[0]).dim() == 2 else reads[0]
        flat = ".flatten(1)" if value_of(conv.output).dim() == 2 else ""  # a linear layer
        self._code(conv, f"{name} = onednn({x}, w{i}, b{i}, {residual}, {geometry}){flat}")
        self.where[conv.output] = Place(four(value_of(conv.output).shape), value_of(conv.output).dtype, variable=name)
        self._say(conv, "oneDNN", False, flops, "faster than ours for this shape")

    def _max_pool(self, step: fuse.MaxPool) -> None:
        _, k, p, q = value_of(step.output).shape
        fields = {"k": k, "p": p, "q": q} | _pool_fields(step.kernel_size, step.stride, step.padding)
        self._kernel(step, "max_pool", self._operand(step.inputs[0]), None, fields)

    def _code(self, step: Step | None, text: str) -> None:
        reads = set()
        for node in step.inputs if step else ():
            place = self.where[node]
            reads |= {id(place.map)} if place.map is not None else self.aliases.get(node, set())
        self.items.append(Code(step, text, reads))

    def _text(self, node: fx.Node) -> str:
        """An expression for the node's value, which may be a view of the arena."""
        if node in self.captured.constants:
            name, value = f"c_{node.name}", self.captured.constants[node]
            wanted = value_of(node)
            self.names[name] = value.to(wanted.dtype) if isinstance(value, Tensor) else value
            return name
        place = self.where[node]
        if place.map is None:
            return place.variable
        key = (id(place.map), node)
        if key not in self.view_of:
            self.view_of[key] = f"views[{len(self.views)}]"
            self.views.append(_view_of(place, value_of(node)))
        return self.view_of[key]

    def _torch(self, step: Step) -> None:
        node = step.node if isinstance(step, fuse.Torch) else step.output
        target = SAFE_FOR_ANY_STRIDES.get(node.target, node.target)
        name, function = f"v_{node.name}", f"f_{node.name}"
        self.names[function] = target
        convert = ".contiguous()" if node.target in NEEDS_CONTIGUOUS else ""
        args = [literal(a, lambda n: self._text(n) + convert) for a in node.args]
        args += [f"{key}={literal(a, self._text)}" for key, a in node.kwargs.items()]
        self._code(step, f"{name} = {function}({', '.join(args)})")
        value = value_of(node)
        size = four(value.shape) if isinstance(value, Tensor) and value.dim() <= 4 else ()
        self.where[node] = Place(size, getattr(value, "dtype", None), variable=name)
        if not is_fresh(node):
            self.aliases[node] = set(self.items[-1].reads)
        words = str(getattr(node.target, "__name__", node.target))
        flops = 0
        if fuse.is_convolution(node):
            flops = 2 * value.numel() * value_of(node.args[1])[0].numel()
        self._say(step, f"torch {words.split('.')[0]}", False, flops, getattr(step, "reason", ""))

    # The result

    def _result(self, output: Any, value: Any) -> str:
        """An expression for an output, as ``value``, that shares no memory with anything kept."""
        if not isinstance(output, fx.Node):
            return repr(output)
        if not isinstance(value, Tensor):
            return self._text(output)
        layout = f"{tuple(value.shape)}, {tuple(value.stride())}"
        if output in self.captured.constants:
            return f"fresh({self._text(output)}, {layout})"
        place = self.where[output]
        if place.map is not None and self._may_write_outside(place, value):
            self._write_outside(place.map, output, value)
            return self.where[output].variable
        if place.map is not None:
            text = f"o{len(self.items)} = fresh({self._text(output)}, {layout})"
            self.items.append(Code(None, text, {id(place.map)}))
            return text.partition(" ")[0]
        if place.variable in self.outside:  # returned already, maybe under another shape
            return f"fresh({place.variable}.reshape({tuple(value.shape)}), {layout})"
        shared = output in self.returned or not is_fresh(output)
        self.returned.add(output)
        # torch's operators follow the strides of their inputs, and those that kernels make are channels_last.
        return f"{'fresh' if shared else 'like'}({place.variable}, {layout})"

    def _may_write_outside(self, place: Place, value: Tensor) -> bool:
        """Whether a kernel can write the result where it stays: nothing else looks at the map but kernels."""
        if any(key == id(place.map) for key, _ in self.view_of) or value.dim() not in (2, 4):
            return False
        _, c, h, w = four(value.shape)
        return h * w == 1 or value.stride() == (c * h * w, 1, w * c, c)

    def _write_outside(self, m: memory.Map, output: fx.Node, value: Tensor) -> None:
        name = f"o_{output.name}"
        self.outside[name] = output
        self.names["dtypes"] = FUSED_DTYPES
        dtype = FUSED_DTYPES.index(value.dtype)
        sizes = f"{tuple(value.shape)}, {tuple(value.stride())}"
        self.allocations.append(f"{name} = empty({sizes}, dtype=dtypes[{dtype}])")
        places = [p for item in self.items if isinstance(item, Kernel) for p in item.places()]
        for p in (*places, *self.where.values()):
            if p.map is m:
                p.map, p.variable = None, name

    # Memory

    def _place(self) -> None:
        self._find_lives()
        self._reuse_residuals()
        self.prefix = self._prefix()
        first, last, images = self.prefix
        maps = {id(p.map): p for item in self.items if isinstance(item, Kernel) for p in item.places() if p.map}
        batch = max((p.size[0] for p in maps.values()), default=1)
        self.whole: set[int] = set()
        viewed = {key for key, _ in self.view_of}
        for key, p in maps.items():
            m = p.map
            if first <= m.first < last and m.last < last and key not in viewed:
                m.size = m.size // batch * min(images, batch)
                continue
            self.whole.add(key)
            if m.first < last:  # its images come one after the other
                m.first = min(m.first, first)
        self.arena_bytes = memory.place([p.map for p in maps.values()])

    def _find_lives(self) -> None:
        for m in self.maps.values():
            m.first, m.last = len(self.items), -1
        for i, item in enumerate(self.items):
            if isinstance(item, Kernel):
                found = [p.map for p in item.places() if p.map is not None]
                for node in item.step.inputs:
                    found += [self.maps[key] for key in self.aliases.get(node, ())]
            else:
                found = [self.maps[key] for key in item.reads if key in self.maps]
            for m in found:
                m.first, m.last = min(m.first, i), max(m.last, i)
        end = len(self.items)
        for output in self.outputs:  # a view that is cloned at the very end
            for key in self.aliases.get(output, ()):
                self.maps[key].last = end

    def _reuse_residuals(self) -> None:
        """A residual that is read for the last time is where the sum goes."""
        for i, item in enumerate(self.items):
            if not isinstance(item, Kernel) or item.residual is None:
                continue
            if item.kind not in _READS_A_RESIDUAL_ONCE:
                continue
            old, new = item.residual.map, item.output.map
            if old is None or new is None or old.last != i or old is item.input.map or old.size != new.size:
                continue
            old.last = new.last
            for other in self.items:
                if isinstance(other, Kernel):
                    for p in other.places():
                        if p.map is new:
                            p.map = old
            for p in self.where.values():
                if p.map is new:
                    p.map = old

    def _prefix(self) -> tuple[int, int, int]:
        """Items [first, last) that run some images at a time, and how many."""
        first = 0
        while first < len(self.items) and isinstance(self.items[first], Code):
            first += 1
        last = first
        while last < len(self.items) and isinstance(self.items[last], Kernel):
            last += 1
        steps, images = images_together(self.items[first:last], torch.get_num_threads())
        return first, first + steps, images

    # The code

    def _assemble(self) -> list[tuple[Step | None, str]]:
        """Lines of code with the step that each belongs to; those of kernels call a segment."""
        lines: list[tuple[Step | None, str]] = []
        first, last, images = self.prefix
        i = 0
        while i < len(self.items):
            item = self.items[i]
            if isinstance(item, Code):
                lines.append((item.step, item.text))
                i += 1
                continue
            segment = Segment(self.whole, self.layer_of)
            if i == first and last > first:
                batch = item.input.size[0]
                for image in range(0, batch, images):
                    for part in self.items[first:last]:
                        segment.add(part, image, min(images, batch - image))
                i = last
            while i < len(self.items) and isinstance(self.items[i], Kernel):
                segment.add(self.items[i], 0, self.items[i].input.size[0])
                i += 1
            s = len(self.segments)
            self.segments.append(segment)
            self.names |= {f"steps{s}": to_tensor(segment.rows), f"constants{s}": segment.constants}
            maps = ", ".join(segment.slots)
            lines.append((None, f"run(steps{s}, constants{s}, [{maps}], seconds and seconds[0][{s}])"))
        return lines

    def code(self, timed: bool) -> str:
        """The function that runs the plan, as text."""
        body = list(self.allocations)
        for step, text in self._lines:
            if timed and step is not None:
                layer = self.layer_of[id(step)]
                body += ["start = clock()", text, f"seconds[1][{layer}] += clock() - start"]
            else:
                body.append(text)
        body.append(f"return [{', '.join(self.results)}]")
        arguments = ", ".join(["arena", "views", "seconds", *self.inputs])
        return "\n    ".join([f"def plan({arguments}):", *body]) + "\n"

    def compile(self, code: str) -> Callable:
        scope = dict(self.names)
        exec(compile(code, "<plan of resnet_fast>", "exec"), scope)
        return scope["plan"]


# The first steps run so many images at a time that no map takes more than this for each thread, as far as the weights,
# which are then read for every few images, take no more than the second: both fit a shared cache of 16 MiB a thread.
# ResNet-50 then took 0.95-0.98 of the time of whole batches by minima, 0.98-0.99 by medians (2 Zen 5 cores; batch 8 and
# 32, float32 and bfloat16), ResNet-18 0.94-1.0 and, on a noisy machine, 1.0-1.07; with one image at a time from first
# to last 1.2 and 1.7 times as long (batch 8).
_MAP_BYTES, _WEIGHT_BYTES = 4 << 20, 6 << 20


def images_together(items: list[Kernel], threads: int) -> tuple[int, int]:
    """How many of the first steps run some images at a time, and how many images."""
    if not items:
        return 0, 1
    batch, steps, largest, widest, weights = items[0].input.size[0], 0, 1, 1, 0
    for i, item in enumerate(items):
        weights += item.packed.weight.nbytes if item.packed else 0
        if item.output.size[0] != batch or weights > _WEIGHT_BYTES * threads:
            break
        image = max(p.image_bytes() for p in item.places())
        widest = max(widest, image)
        if image * batch > _MAP_BYTES * threads:
            steps, largest = i + 1, widest
    images = max(1, _MAP_BYTES * threads // largest)
    images = images // threads * threads or images
    return (steps, images) if images < batch else (0, batch)


def _run(steps: Tensor, constants: list[Tensor], maps: list[Tensor], seconds: Tensor | None) -> None:
    if run_plan(steps, constants, maps, seconds) >= 0:
        raise NotFinite


def _pool_fields(kernel_size: list[int], stride: list[int], padding: list[int]) -> dict[str, int]:
    sizes = {"kernel": kernel_size, "stride": stride, "padding": padding}
    return {f"pool_{name}_{d}": pair[i] for name, pair in sizes.items() for i, d in enumerate("hw")}


def _view_of(place: Place, value: Tensor) -> Callable[[Tensor], Tensor]:
    """A view of the arena, made once for each set of buffers."""
    shape, dtype = tuple(value.shape), place.dtype

    def view(arena: Tensor) -> Tensor:
        n, c, h, w = place.size
        size = n * c * h * w * dtype.itemsize
        flat = arena[place.map.at : place.map.at + size].view(dtype)
        if len(shape) == 4:
            return flat.as_strided(shape, (c * h * w, 1, w * c, c))
        return flat.view(shape)

    return view
