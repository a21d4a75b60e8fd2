"""Faults planted into the CUDA kernels, each an edit of the real source: every one must be seen."""

import shutil
from typing import NamedTuple

import pytest

from .build import BUILT, KERNELS, run_program
from .test_sanitizers import program


class Fault(NamedTuple):
    file: str
    text: str  # what stands in the source; gone, the fault is an error
    wrong: str
    case: str  # of programs/
    # What sees it: "values" (or the emulator's own complaints) in some order of threads and copies, or a sanitizer.
    seen_by: str = "values"


CONV, HALO = "conv_bn_relu_sm80.cuh", "conv_bn_relu_sm80_halo.cuh"
NORM, STATISTICS = "batch_norm.cuh", "batch_norm_statistics.cu"
FORWARD, BACKWARD = "batch_norm_relu.cu", "batch_norm_relu_backward.cu"
FAULTS = {
    "waits for one group too few": Fault(
        CONV, "if constexpr (aligned) ptx::cp_async_wait<Tile::stages - 2>();",
        "if constexpr (aligned) ptx::cp_async_wait<Tile::stages - 1>();", "deep"),
    "no barrier in the loop": Fault(
        CONV, "    __syncthreads();  // this step is there for all, and all are done with the one", "    // the one", "deep"),
    "copies into the place that is being read": Fault(
        CONV, "loader.copy(ptx::shared_address(stage_a(step)), ptx", "loader.copy(ptx::shared_address(stage_a(step + 1)), ptx",
        "deep"),
    "no group for a step": Fault(
        CONV, "      ptx::cp_async_commit();  // a group for every step", "      // a group for every step", "deep"),
    "stages while operands are read": Fault(
        CONV, "      __syncthreads();  // the rows of the pass before have been read\n", "", "3x3", "thread"),
    "stores before all have staged": Fault(
        CONV, "stage(accumulators);\n      __syncthreads();", "stage(accumulators);", "3x3"),
    "barrier in divergent code": Fault(
        CONV, "      if (part.warp_row == pass) stage(accumulators);\n      __syncthreads();",
        "      if (part.warp_row == pass) {\n        stage(accumulators);\n        __syncthreads();\n      }", "3x3"),
    "beyond the right border": Fault(CONV, " && unsigned(w) < unsigned(conv.w);", ";", "3x3"),
    "above the image": Fault(CONV, "at.r < conv.r && unsigned(h) < unsigned(conv.h)", "at.r < conv.r && h < conv.h", "3x3 stride 2"),
    "filters that do not exist": Fault(
        CONV, "const bool ok = k < conv.filters && place.r < conv.r;", "const bool ok = place.r < conv.r;", "1x1", "address"),
    "pixels that do not exist": Fault(
        CONV, "    if (pixel >= conv.pixels) return {0, -(1 << 30), 0};  // nothing is inside the image\n", "", "1x1", "address"),
    "stores pixels that do not exist": Fault(
        CONV, "return m < conv.pixels && part.n0", "return part.n0", "1x1", "address"),
    "stores filters that do not exist": Fault(
        CONV, "          if (!exists(m, column() + e)) break;\n", "", "odd"),
    "wrong swizzle": Fault(
        CONV, "chunk_at<Tile>(row, chunk); }\n\n  __device__ __forceinline__ bool inside",
        "chunk_at<Tile>(row ^ 2, chunk); }\n\n  __device__ __forceinline__ bool inside", "1x1"),
    "no swizzle": Fault(
        CONV, "return chunk ^ (Tile::chunks == 4 ? row >> 1 & 3 : row & 7);", "return chunk;", "banks"
    ),
    "wrong matrix of B": Fault(CONV, "2 * k + lane / 8 % 2", "2 * k + lane / 16", "1x1"),
    "wrong rows of A": Fault(CONV, "warp_row * Tile::warp_m + threadIdx.x % 16;", "warp_row * Tile::warp_m + threadIdx.x % 8;", "1x1"),
    "wrong tap": Fault(CONV, "(at.r * conv.s + at.s) * conv.channels", "(at.s * conv.r + at.r) * conv.channels", "3x3"),
    "dilation of one direction": Fault(CONV, "corner.w + at.s * conv.dilation_w", "corner.w + at.s", "dilated"),
    "channels of the first group": Fault(
        CONV, "x(static_cast<const T*>(conv.x) + group * conv.channels),", "x(static_cast<const T*>(conv.x)),", "groups"),
    "filters of the first group": Fault(
        CONV, "const int k = group * conv.filters + n0 + i;", "const int k = n0 + i;", "groups"),
    "channels of the next pixel": Fault(
        CONV, "at.c < conv.channels ? address(at) : nullptr", "address(at)", "odd"),
    "a step too few": Fault(
        "conv_bn_relu_sm80_launch.cuh", "(depth + per_step - 1) / per_step", "depth / per_step", "deep"),
    "row of the wrong lane": Fault(
        CONV, "store_shared(to + 8 * Tile::staging_columns", "store_shared(to + 4 * Tile::staging_columns", "1x1"),
    "residual of the pass before": Fault(
        CONV, "load_residual(residual, part.m0 + pass * Tile::warp_m);", "load_residual(residual, part.m0);", "3x3"),
    "halo: waits for one group too few": Fault(
        HALO, "    ptx::cp_async_wait<Tile::stages - 2>();", "    ptx::cp_async_wait<Tile::stages - 1>();", "halo"),
    "halo: no barrier in the loop": Fault(
        HALO, "    __syncthreads();  // this step is there for all, and all are done", "    // done", "halo"),
    "halo: one buffer": Fault(HALO, "slice % 2 * conv.halo_rows", "slice % 1 * conv.halo_rows", "halo"),
    "halo: copied a tap late": Fault(HALO, "if (r == 0 && s == 0 && loader", "if (r == conv.r - 1 && s == conv.s - 1 && loader", "halo"),
    "halo: images without padding between them": Fault(
        HALO, "(rows / conv.p * conv.grid_h + rows % conv.p)", "rows", "halo"),
    "halo: rows behind the last window": Fault(HALO, "- first_position + 1;", "- first_position + 1 + 2 * conv.grid_w;", "halo", "address"),
    "halo: rows of the image": Fault(HALO, "r * conv.dilation_h * conv.grid_w", "r * conv.dilation_h * conv.w", "halo"),
    "add_relu: a tail too long": Fault("add_relu.cu", "blockIdx.x == 0 && tail < n", "blockIdx.x == 0 && tail <= n", "add_relu", "address"),
    "add_relu: elements left out": Fault("add_relu.cu", "base < words; base += step", "base + 1 < words; base += step", "add_relu"),
    "max_pool: beyond the right border": Fault(
        "max_pool.cuh", "if (w >= 0 && w < m.w) largest.take(loaded[s],", "if (w >= 0) largest.take(loaded[s],", "max_pool"),
    "max_pool: above the map": Fault("max_pool.cuh", "if (h < 0 || h >= m.h) continue;", "if (h >= m.h) continue;", "max_pool"),
    "avg_pool: adds before all have summed": Fault(
        "avg_pool_flatten.cu", "    __syncthreads();\n    if (warp == 0", "    if (warp == 0", "avg_pool"),
    "avg_pool: a warp's pixels twice": Fault(
        "avg_pool_flatten.cu", "first += warps * unroll", "first += warps * (unroll - 1)", "avg_pool"),
    "max_pool_with_indices: a place outside the map": Fault(
        "max_pool.cuh", "return h < 0 ? (dilation - 1 - h) / dilation : 0;", "return 0;", "max_pool_with_indices"),
    "max_pool_with_indices: the last of equal values": Fault(
        "max_pool.cuh", "if (value > to_float(best.values[e]) ||", "if (value >= to_float(best.values[e]) ||",
        "max_pool_with_indices"),
    "max_pool_with_indices: an output left out": Fault(
        "max_pool_with_indices.cu", "(before + stride - 1) / stride : 0", "(before + stride) / stride : 0",
        "max_pool_with_indices"),
    "max_pool_with_indices: outputs behind the last": Fault(
        "max_pool_with_indices.cu", "last = min(reach / stride, int(outputs) - 1);", "last = reach / stride;",
        "max_pool_with_indices", "address"),
    "batch_norm: rows combined before all have summed": Fault(
        NORM, "    __syncthreads();\n    if (part.row < half)", "    if (part.row < half)", "statistics"),
    "batch_norm: rows overwritten before all are combined": Fault(
        NORM, "    __syncthreads();  // before the next half", "    // before the next half", "statistics"),
    "batch_norm: pixels that do not exist": Fault(
        NORM, "return word < words && pixel < pixels;", "return word < words;", "forward", "address"),
    "batch_norm: pixels left out": Fault(
        NORM, "pixel - row < pixels; pixel +=", "pixel + rows * (unroll - 1) < pixels; pixel +=", "statistics"),
    "batch_norm: chunks added up before all rows have": Fault(
        NORM, "  __syncthreads();\n  double sum = 0;", "  double sum = 0;", "statistics"),
    "batch_norm: weight of a part": Fault(
        STATISTICS, "const float share = b / (a + b);", "const float share = 0.5f;", "statistics"),
    "batch_norm: counts of another row": Fault(
        STATISTICS, "b = count_of(part.pixels, part.row + half, 2 * half);", "b = count_of(part.pixels, part.row, 2 * half);",
        "statistics"),
    "batch_norm: pixels that are not there have a deviation": Fault(
        STATISTICS, "u < there ? distance[u] - mean : 0.0f", "distance[u] - mean", "statistics"),
    "batch_norm: a chunk's mean forgotten": Fault(
        STATISTICS, "at[0] - origin + at[map.channels]", "at[map.channels] + 0.0", "statistics"),
    "batch_norm: scales read before they are there": Fault(
        FORWARD, "  __syncthreads();\n", "", "forward"),
    "batch_norm: memory for one normalisation": Fault(
        FORWARD, "block_size, 2 * affine, s, m)", "block_size, affine, s, m)", "forward", "address"),
    "batch_norm: bits of the next row's lanes": Fault(
        FORWARD, "gather_bits<part.per_word>(bits[u]) & there", "gather_bits<part.per_word>(bits[u])", "forward"),
    "batch_norm: bits of one lane": Fault(
        FORWARD, "lanes < 8 / per_word; lanes *= 2", "lanes < 4 / per_word; lanes *= 2", "forward"),
    "batch_norm: sign of another value": Fault(
        BACKWARD, "passes(from_float<T>(norm(to_float(x[u].values[e]))))",
        "passes(from_float<T>(to_float(x[u].values[e]) - norm.mean))", "backward"),
    "batch_norm: the first bits of a byte": Fault(
        BACKWARD, " >> (part.channel(0) % 8) : 0", " : 0", "backward"),
    "batch_norm: a mean over a chunk": Fault(
        BACKWARD, "float(m.map.pixels)", "float(m.map.chunk)", "backward"),
    "batch_norm: a chunk left out": Fault(
        BACKWARD, "i < chunks; i += sum_rows)", "i + 1 < chunks; i += sum_rows)", "backward"),
    "batch_norm: slopes read before they are there": Fault(
        BACKWARD, "m.sums[2], c));\n  });\n  __syncthreads();", "m.sums[2], c));\n  });", "backward"),
}  # fmt: skip
PROGRAMS = {
    **dict.fromkeys(("add_relu", "max_pool", "max_pool_with_indices", "avg_pool"), "pooling"),
    **dict.fromkeys(("statistics", "forward", "backward"), "batch_norm"),
}  # but for convolutions


def planted(name: str):
    """A copy of the kernels with that fault."""
    fault = FAULTS[name]
    folder = BUILT / "faults" / "".join(c if c.isalnum() else "_" for c in name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(KERNELS, folder / "cuda")
    shutil.copy(KERNELS.parent / "conv_shape.h", folder)
    path = folder / "cuda" / fault.file
    source = path.read_text()
    assert source.count(fault.text) == 1, f"{fault.file} has {fault.text!r} {source.count(fault.text)} times"
    path.write_text(source.replace(fault.text, fault.wrong))
    return folder / "cuda"


ORDERS = (("forward", "late", 1), ("reverse", "early", 1), *(("random", "random", seed) for seed in range(1, 5)))


@pytest.mark.parametrize("name", FAULTS)
def test_is_seen(name):
    fault = FAULTS[name]
    sanitizer = None if fault.seen_by == "values" else fault.seen_by
    built = program(PROGRAMS.get(fault.case, "convolutions"), sanitizer, kernels=planted(name))
    for schedule, landing, seed in ORDERS if sanitizer is None else ORDERS[:1]:
        result = run_program(built, fault.case, schedule=schedule, landing=landing, seed=seed)
        if result.returncode not in (0, 3):
            break
    else:
        pytest.fail("not seen")
    assert sanitizer is None or f"{sanitizer.title()}Sanitizer" in result.stderr, "seen, but not by that"
