"""The convolutions that tests/triton_aot compiles: together they use every entry of kernels/configs.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from compiled import MockDriver, Report, compiled_by, recorded

from resnet_fast.kernels import configs, conv_bn_relu, conv_few_channels, conv_pointers, conv_tma

KERNELS = (
    (conv_few_channels, "pad_kernel"),
    (conv_few_channels, "conv_few_channels_kernel"),
    (conv_few_channels, "conv_few_channels_max_pool_kernel"),
    (conv_pointers, "conv_pointers_kernel"),
    (conv_pointers, "conv_projection_pointers_kernel"),
    (conv_tma, "conv_tma_kernel"),
)
LIMIT_OF_ALL = 101376  # bytes of shared memory: what sm_86 and sm_89 have


@dataclass(frozen=True)
class Layer:
    """A convolution on [batch, channels, size, size] with BatchNorm and ReLU; filters and channels over all groups."""

    channels: int
    filters: int
    kernel: int = 3
    stride: int = 1
    size: int = 56
    batch: int = 256
    groups: int = 1
    bias: bool = False
    residual: bool = False
    projection: int = 0  # channels of the shortcut's input
    projection_stride: int = 1
    max_pool: bool = False
    weight_layout: torch.memory_format = torch.channels_last
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = True

    @property
    def outputs(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def operations(self) -> int:
        depth = self.channels // self.groups * self.kernel**2 + self.projection
        return 2 * self.batch * self.outputs**2 * self.filters * depth

    @property
    def bytes(self) -> int:
        """Of every weight, and of every pixel that is read or written, once."""
        pixels = self.outputs if self.kernel == 1 else self.size
        maps = self.channels * pixels**2 + self.filters * (self.outputs // (2 if self.max_pool else 1)) ** 2
        maps += (self.residual * self.filters + self.projection) * self.outputs**2
        weights = self.filters * (self.channels // self.groups * self.kernel**2 + self.projection)
        return (self.batch * maps + weights) * self.dtype.itemsize

    def _empty(self, *shape, memory_format=torch.channels_last):
        return torch.empty(shape, dtype=self.dtype, device="meta", memory_format=memory_format)

    def _vectors(self):
        bias = torch.empty(self.filters, dtype=self.dtype, device="meta") if self.bias else None
        return (bias, *(torch.empty(self.filters, device="meta") for _ in range(4)))

    def launch(self) -> None:
        k, c, padding = self.filters, self.channels // self.groups, self.kernel // 2
        x = self._empty(self.batch, self.channels, self.size, self.size)
        weight = self._empty(k, c, self.kernel, self.kernel, memory_format=self.weight_layout)
        geometry = ([self.stride] * 2, [padding] * 2, [1, 1], self.groups, 1e-5)
        size = [self.batch, k, self.outputs, self.outputs]
        out = self._empty(*size)
        if self.max_pool:
            pool, pooled = [[3, 3], [2, 2], [1, 1]], (self.outputs - 1) // 2 + 1
            out = self._empty(self.batch, k, pooled, pooled)
            found = conv_bn_relu.conv_bn_relu_max_pool_triton(x, weight, *self._vectors(), *geometry, pool, size, out)
            assert found is not None
        elif self.projection:
            side = self.outputs * self.projection_stride
            shortcut, weight2 = (
                self._empty(self.batch, self.projection, side, side),
                self._empty(k, self.projection, 1, 1),
            )
            geometry2 = ([self.projection_stride] * 2, [0, 0], [1, 1], 1, 1e-5)
            conv_bn_relu.conv_bn_relu_projection_triton(
                x, weight, *self._vectors(), shortcut, weight2, *self._vectors(), *geometry, *geometry2, out
            )
        else:
            residual = self._empty(*size) if self.residual else None
            conv_bn_relu.conv_bn_relu_triton(x, weight, *self._vectors(), residual, *geometry, True, out)


def _past_int32(channels: int) -> int:
    """Images of 56 x 56 that together have more elements than 32 bits count."""
    return 2**31 // (channels * 56 * 56) + 1


_F32, _F16 = torch.float32, torch.float16
_16_BIT = {
    # What ResNets are made of.
    "1x1 64->256": Layer(64, 256, 1),
    "1x1 256->64": Layer(256, 64, 1),
    "1x1 1024->2048 s2": Layer(1024, 2048, 1, 2, size=14),
    "1x1 64->256 + residual": Layer(64, 256, 1, residual=True),
    "1x1 64->256 + residual + bias": Layer(64, 256, 1, residual=True, bias=True),
    "1x1 512->2048 + residual, batch 1": Layer(512, 2048, 1, size=7, batch=1, residual=True),
    "1x1 64->256 + projection": Layer(64, 256, 1, projection=64),
    "1x1 128->512 + projection s2": Layer(128, 512, 1, size=28, projection=256, projection_stride=2),
    "1x1 512->2048 + projection s2, batch 1": Layer(
        512, 2048, 1, size=7, batch=1, projection=1024, projection_stride=2
    ),
    "3x3 64->64": Layer(64, 64),
    "3x3 128->128": Layer(128, 128, size=28),
    "3x3 128->128 s2": Layer(128, 128, stride=2),
    "3x3 128->128 + residual + bias": Layer(128, 128, size=28, residual=True, bias=True),
    "3x3 512->512, batch 1": Layer(512, 512, size=7, batch=1),
    "3x3 512->512 s2, batch 1": Layer(512, 512, size=14, stride=2, batch=1),
    "3x3 128->128 + projection s2": Layer(128, 128, size=28, projection=64, projection_stride=2),
    "3x3 512->512 + projection s2, batch 1": Layer(512, 512, size=7, batch=1, projection=256, projection_stride=2),
    "stem 7x7 3->64": Layer(3, 64, 7, 2, size=224),
    "stem 7x7 3->64 + max-pooling": Layer(3, 64, 7, 2, size=224, max_pool=True),
    "groups of 32": Layer(1024, 1024, size=14, groups=32),
    # What costs the most registers: 64-bit offsets, masked channels, elements that are read one by one.
    "3x3 72->64, 64-bit": Layer(
        72, 64, bias=True, residual=True, batch=_past_int32(72), weight_layout=torch.contiguous_format
    ),
    "3x3 65->65, 64-bit": Layer(
        65, 65, bias=True, residual=True, batch=_past_int32(65), weight_layout=torch.contiguous_format
    ),
    "7x7 3->64, 64-bit": Layer(3, 64, 7, 2, bias=True, residual=True, batch=_past_int32(3)),
    "3x3 72->65 + residual": Layer(72, 65, bias=True, residual=True),
    "3x3 65->65 + projection": Layer(65, 65, projection=33),
    "depthwise 3x3 32": Layer(32, 32, groups=32),
}
_TF32 = [
    "1x1 64->256", "1x1 1024->2048 s2", "1x1 64->256 + residual + bias", "1x1 512->2048 + residual, batch 1",
    "1x1 64->256 + projection", "1x1 128->512 + projection s2", "3x3 128->128", "3x3 128->128 s2",
    "3x3 128->128 + residual + bias", "3x3 512->512, batch 1", "3x3 128->128 + projection s2",
    "3x3 512->512 + projection s2, batch 1", "stem 7x7 3->64", "stem 7x7 3->64 + max-pooling", "groups of 32",
    "3x3 72->64, 64-bit", "3x3 65->65, 64-bit", "3x3 65->65 + projection",
]  # fmt: skip
_IEEE = [
    "1x1 64->256 + projection", "3x3 128->128 + residual + bias", "3x3 72->64, 64-bit", "3x3 65->65, 64-bit",
    "stem 7x7 3->64", "3x3 65->65 + projection",
]  # fmt: skip


def _with(names: list[str], suffix: str, **changes) -> dict[str, Layer]:
    return {f"{name}, {suffix}": Layer(**(vars(_16_BIT[name]) | changes)) for name in names}


LAYERS: dict[str, Layer] = (
    _16_BIT
    | _with(["1x1 64->256 + residual", "3x3 128->128", "stem 7x7 3->64 + max-pooling"], "float16", dtype=_F16)
    | _with(_TF32, "tf32", dtype=_F32)
    | _with(_IEEE, "ieee", dtype=_F32, tf32=False)
)  # fmt: skip


@contextmanager
def _under(layer: Layer) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = layer.tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def compile_layer(layer: Layer, arch: int) -> tuple[Report, tuple, object]:
    """What the launcher compiles for the layer, and the key and the entry of the table that it took."""
    found = []
    with entries_into(found), _under(layer):
        result = compiled_by(layer.launch, arch, *KERNELS)
    return result, *found[-1]


class entries_into:
    """Notes every entry of the tables that a launcher takes, as (key, entry)."""

    def __init__(self, found: list):
        self.patches = []
        for name, tables in (("config_for", configs.table_of), ("stem_config_for", _stems_of)):
            for module in (conv_pointers, conv_tma, conv_few_channels):
                if hasattr(module, name):
                    noting = self._noting(getattr(configs, name), tables, found)
                    self.patches.append(mock.patch.object(module, name, noting))

    @staticmethod
    def _noting(look_up: Callable, tables: Callable, found: list) -> Callable:
        def noting(target: str, *key: str):
            entry = look_up(target, *key)
            product, shape_class, *adds = key
            own = (product, " + ".join([shape_class, *filter(None, adds)]))
            found.append((own if own in tables(target) else (product, shape_class), entry))
            return entry

        return noting

    def __enter__(self):
        conv_tma._plan.cache_clear()
        for patch in self.patches:
            patch.start()

    def __exit__(self, *exception):
        for patch in self.patches:
            patch.stop()
        conv_tma._plan.cache_clear()


def _stems_of(target: str) -> dict:
    return configs.STEMS.get(target, configs.STEMS["default"])


class _Nothing:
    """Stands in for a kernel and launches nothing."""

    def __init__(self, kernel):
        pass

    def __getitem__(self, grid):
        return lambda *args, **options: None


def entries_taken(arch: int) -> set[tuple]:
    """The keys that the launchers look up for all LAYERS; nothing is compiled."""
    triton.runtime.driver.set_active(MockDriver(arch))
    found: list = []
    with mock.patch("compiled.Recorder", _Nothing), recorded(*KERNELS), entries_into(found):
        for layer in LAYERS.values():
            with _under(layer):
                layer.launch()
    return {key for key, _ in found}


def entries_of(arch: int) -> set[tuple]:
    return {*configs.table_of(f"sm_{arch}"), *_stems_of(f"sm_{arch}")}
