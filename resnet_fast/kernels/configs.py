"""Tiles of the Triton convolutions, as data: by architecture, kind of product and shape class.

No number is chosen while a program runs, so that a model computes the same bits on every machine of a kind. New entries
come from `benchmarks/gpu_campaign.py --steps tune`; `why_not` says which candidates are not worth a measurement.
tests/triton_aot compiles every entry for its architecture, with Triton 3.6 and 3.8, and refuses spills.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class ConvConfig:
    """A tile: rows (output pixels), columns (filters) and depth of one step, and how a GPU runs it. ``programs``: of a
    persistent kernel, on each multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int = 1


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor: registers, bytes of shared memory, warps; and bytes of shared memory of one block."""

    registers: int
    shared: int
    warps: int
    block_shared: int

    def blocks(self, registers: int, shared: int, warps: int) -> int:
        """How many blocks of so many registers a thread, bytes and warps run at a time."""
        of_a_warp = ceil(registers * 32 / 256) * 256
        return min(self.registers // of_a_warp // warps, self.shared // (shared + 1024), self.warps // warps)


LIMITS = {
    "sm_80": Limits(65536, 167936, 64, 166912),
    "sm_86": Limits(65536, 102400, 48, 101376),
    "sm_89": Limits(65536, 102400, 48, 101376),
    "sm_90": Limits(65536, 233472, 64, 232448),
    "sm_100": Limits(65536, 233472, 64, 232448),
}

# Shape classes. "pointers": the implicit GEMM that computes its addresses (conv_pointers.py), where loads are vectors
# of 16 bytes; "elements": the same kernel for all other tensors, and for 64-bit offsets. "pointwise" (1x1) and
# "window": through descriptors (conv_tma.py). "few tiles": where the tiles of those would not fill the GPU once.
# "+ residual" and "+ projection": what the store adds; without an entry of its own the class without it counts.
_BIG = ConvConfig(256, 128, 64, 1, 1)
_DESCRIPTORS = ("pointwise", "window", "few tiles")
_POINTERS = ("pointers", "elements")

CONFIGS: dict[str, dict[tuple[str, str], ConvConfig]] = {
    # An operation costs 70 us in the interpreter whatever the tile's size, so few programs with big tiles.
    "interpreter": {
        **{(p, c): _BIG for p in ("16-bit", "tf32", "ieee") for c in _POINTERS},
        **{(p, c): _BIG for p in ("16-bit", "tf32") for c in _DESCRIPTORS},
    },
    # For every architecture without a table of its own, and sm_86 and sm_89 with their 99 KB of shared memory.
    "default": {
        ("16-bit", "pointers"): ConvConfig(128, 64, 64, 4, 3),
        ("16-bit", "pointers + projection"): ConvConfig(64, 64, 64, 4, 3),
        ("tf32", "pointers"): ConvConfig(64, 64, 32, 4, 3),
        ("tf32", "pointers + projection"): ConvConfig(64, 64, 32, 8, 3),
        # Every element has an address and a mask of its own in registers: with odd channels the tiles above spill on
        # sm_90 (2.8 KB of stores and loads in bfloat16).
        ("16-bit", "elements"): ConvConfig(128, 64, 32, 8, 2),
        ("tf32", "elements"): ConvConfig(64, 64, 16, 4, 2),
        # No tensor cores: the operands pass through registers.
        ("ieee", "pointers"): ConvConfig(64, 32, 16, 4, 2),
        ("ieee", "elements"): ConvConfig(64, 32, 16, 4, 2),
    },
}
CONFIGS["sm_90"] = CONFIGS["default"] | {
    # Measured on an H100 in bfloat16 at batch 256 on the 1x1 layers of ResNet-50 without a ReLU and those on 64
    # channels into a residual: 1.1-1.4 times the speed of the default's tile. With a residual 128 x 128 would be 1.3
    # times as fast again (0.36 ms instead of 0.46), but spills.
    ("16-bit", "pointers"): ConvConfig(128, 128, 64, 4, 3),
    ("16-bit", "pointers + residual"): ConvConfig(64, 128, 64, 4, 3),
    # Not measured. The largest tiles of which two blocks fit a multiprocessor, so that one computes while the other
    # stores; only the projections, with their second accumulator, leave room for one of 8 warps.
    ("16-bit", "pointwise"): ConvConfig(128, 128, 64, 4, 2, programs=2),
    ("16-bit", "pointwise + residual"): ConvConfig(64, 128, 64, 4, 4, programs=2),
    ("16-bit", "pointwise + projection"): ConvConfig(128, 64, 64, 8, 3),
    ("16-bit", "window"): ConvConfig(128, 128, 64, 4, 3, programs=2),
    ("16-bit", "window + projection"): ConvConfig(128, 64, 64, 8, 3),
    ("16-bit", "few tiles"): ConvConfig(64, 64, 64, 4, 4, programs=2),
    ("16-bit", "few tiles + projection"): ConvConfig(64, 64, 64, 8, 3, programs=2),
    ("tf32", "pointwise"): ConvConfig(128, 64, 32, 8, 3, programs=2),
    ("tf32", "pointwise + residual"): ConvConfig(64, 64, 32, 4, 3, programs=2),
    ("tf32", "pointwise + projection"): ConvConfig(64, 64, 32, 4, 3, programs=2),
    ("tf32", "window"): ConvConfig(128, 64, 32, 8, 3, programs=2),
    ("tf32", "window + residual"): ConvConfig(64, 64, 32, 4, 3, programs=2),
    ("tf32", "window + projection"): ConvConfig(64, 64, 32, 4, 3, programs=2),
    ("tf32", "few tiles"): ConvConfig(64, 64, 32, 4, 3, programs=2),
}
# Not measured. A thread of 4 warps has a whole row of the accumulator, and the four values of BatchNorm for each of its
# columns: 128 columns spill, 64 with 8 warps do not.
CONFIGS["sm_100"] = CONFIGS["default"] | {
    ("16-bit", "elements"): ConvConfig(64, 64, 32, 8, 2),
    ("tf32", "elements"): ConvConfig(64, 64, 16, 8, 2),
    ("16-bit", "pointwise"): ConvConfig(128, 64, 64, 8, 4),
    ("16-bit", "pointwise + projection"): ConvConfig(64, 64, 64, 8, 3),
    ("16-bit", "window"): ConvConfig(128, 64, 64, 8, 4),
    ("16-bit", "window + projection"): ConvConfig(128, 64, 64, 8, 3),
    ("16-bit", "few tiles"): ConvConfig(64, 64, 64, 8, 3, programs=2),
    ("16-bit", "few tiles + projection"): ConvConfig(64, 64, 64, 8, 3),
    ("tf32", "pointwise"): ConvConfig(128, 64, 32, 8, 3),
    ("tf32", "pointwise + projection"): ConvConfig(64, 32, 32, 8, 3),
    ("tf32", "window"): ConvConfig(128, 64, 32, 8, 3),
    ("tf32", "window + projection"): ConvConfig(64, 32, 32, 8, 3),
    ("tf32", "few tiles"): ConvConfig(64, 64, 32, 8, 3),
}


@dataclass(frozen=True)
class StemConfig:
    """Of the kernels for few channels (conv_few_channels.py): rows (output pixels) and at most how many columns
    (filters) of a program, and how a GPU runs it. ``strip``: at most how many rows of the pooled map a program makes,
    where the kernel max-pools; ``block_m`` then counts columns of it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    strip: int = 0


STEMS: dict[str, dict[tuple[str, str], StemConfig]] = {
    "interpreter": {
        (product, stem): StemConfig(256, 128, 1, 1, 5)
        for product in ("16-bit", "tf32")
        for stem in ("stem", "stem with max-pooling")
    },
    "default": {
        # Measured on an H100, before the window's mask: 0.55 ms for the 7x7 stem on 256 images, 0.61 with 128 rows.
        ("16-bit", "stem"): StemConfig(256, 64, 4, 4),
        ("tf32", "stem"): StemConfig(128, 64, 4, 3),
        # Not measured. 64 columns for the 56 of an image of 224 x 224; of 14 rows the first costs one of the
        # convolution more. 64 filters spill where each element of the windows has an address.
        ("16-bit", "stem with max-pooling"): StemConfig(64, 32, 4, 3, 14),
        ("tf32", "stem with max-pooling"): StemConfig(32, 64, 8, 2, 14),
    },
}
STEMS["sm_90"] = STEMS["default"] | {
    ("16-bit", "stem with max-pooling"): StemConfig(64, 64, 4, 3, 14),
    ("tf32", "stem with max-pooling"): StemConfig(64, 64, 8, 2, 14),
}
STEMS["sm_100"] = STEMS["sm_90"] | {
    ("16-bit", "stem"): StemConfig(256, 64, 8, 4),
    ("tf32", "stem"): StemConfig(128, 64, 8, 3),
    ("tf32", "stem with max-pooling"): StemConfig(64, 64, 4, 2, 14),
}


def table_of(target: str) -> dict[tuple[str, str], ConvConfig]:
    """The entries for "interpreter" or an architecture."""
    return CONFIGS.get(target, CONFIGS["default"])


def has_descriptors(target: str) -> bool:
    """Whether the table of an architecture has tiles for kernels with descriptors."""
    return ("16-bit", "pointwise") in table_of(target)


def config_for(target: str, product: str, shape_class: str, adds: str = "") -> ConvConfig:
    """The entry; ``adds``: "residual", "projection" or nothing."""
    table = table_of(target)
    return table.get((product, f"{shape_class} + {adds}"), table[product, shape_class])


def stem_config_for(target: str, product: str, shape_class: str) -> StemConfig:
    return STEMS.get(target, STEMS["default"])[product, shape_class]


def why_not(config: ConvConfig, element_size: int, limits: Limits) -> str | None:
    """Why a tile is not worth compiling for an architecture, or None. Only rejects: what is left must be measured."""
    steps = (config.block_m + config.block_n) * config.block_k * element_size * config.num_stages
    if steps > limits.block_shared:
        return f"{steps} bytes of shared memory, of {limits.block_shared}"
    accumulators = config.block_m * config.block_n // (32 * config.num_warps)
    if accumulators > 192:
        return f"{accumulators} accumulators a thread, of 255 registers"
    if config.block_m * config.block_n < 32 * 32 * config.num_warps:
        return "less than 32 x 32 outputs a warp"
    return None
