"""What the launchers ask for compiles for sm_80, sm_90 and sm_100 without a spill, into the right instructions."""

from __future__ import annotations

import pytest
import torch
from compiled import ARCHITECTURES, DTYPES, assert_sound, compiled_by
from convolutions import LAYERS, LIMIT_OF_ALL, compile_layer, entries_of, entries_taken
from table import FILE, rows_of

from resnet_fast.kernels import add_relu as add_relu_module
from resnet_fast.kernels import configs

TENSOR_CORES = {
    (80, "16-bit"): r"HMMA\.16816\..*",
    (80, "tf32"): r"HMMA\.1688\.F32\.TF32.*",
    (90, "16-bit"): r"HGMMA\..*(BF16|F32).*",
    (90, "tf32"): r"HGMMA\..*TF32.*",
    (100, "16-bit"): r"UTC.*MMA.*",
    (100, "tf32"): r"UTC.*MMA.*",
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu_moves_128_bits_at_a_time(dtype, arch):
    """In whole blocks for every n: this one is odd."""
    a, b = (torch.empty(2**20 + 1, dtype=dtype, device="meta") for _ in range(2))
    r = compiled_by(lambda: add_relu_module.add_relu_triton(a, b), arch, (add_relu_module, "add_relu_kernel"))
    words = add_relu_module._BLOCK * dtype.itemsize // 16 // (32 * r.warps)  # of a thread, in each tensor
    assert r.spills == 0
    assert r.count(r"LDG\..*128.*") == 2 * words
    assert r.count(r"STG\..*128.*") == words


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_entry_of_the_tables_is_compiled(arch):
    assert entries_taken(arch) == entries_of(arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", LAYERS)
def test_convolution(name, arch):
    layer = LAYERS[name]
    r, (product, shape_class), entry = compile_layer(layer, arch)
    # What no architecture has a table for runs the default's.
    in_default = entry in configs.table_of("").values() or entry in configs.STEMS["default"].values()
    assert_sound(r, arch, LIMIT_OF_ALL if in_default else None)
    if product == "ieee":
        assert r.count(r"(H|HG|UTCH?)MMA.*") == 0 and r.count("FFMA.*") > 0
    else:
        assert r.count(TENSOR_CORES[arch, product]) > 0
    by_descriptors = shape_class.split(" + ")[0] in ("pointwise", "window", "few tiles")
    if by_descriptors:
        assert r.count("UTMALDG.*") > 0 and r.count("UTMASTG.*") > 0 and r.count("LDGSTS.*") == 0
        limits = configs.LIMITS[f"sm_{arch}"]
        assert limits.blocks(r.registers, r.shared, r.warps) >= entry.programs
    if shape_class.startswith("pointers") and product != "ieee":
        # A product of one step is not pipelined: its loads pass through registers.
        assert r.count(r"LDGSTS\..*") == r.count(r"LDGSTS\..*128.*")
        assert r.count(r"(LDG|LDGSTS)\..*128.*") > 0
        assert r.count(r"STG\..*") == r.count(r"STG\..*128.*") > 0
    if shape_class == "stem":  # a pixel at a time: of 4 channels in 16 bits the window ends in the middle of 128
        assert r.count(r"LDGSTS\..*") == r.count(r"LDGSTS\..*(64|128).*") > 0
    if shape_class == "stem with max-pooling":
        assert r.count("UTMALDG.*" if arch >= 90 else r"LDGSTS\..*(64|128).*") > 0


def test_the_table_for_people_has_every_layer():
    """benchmarks/results/triton_tiles.md; `make triton-table` writes it anew."""
    assert rows_of(FILE.read_text()) == {arch: set(LAYERS) for arch in ARCHITECTURES}
