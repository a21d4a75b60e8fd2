"""Every instruction of csrc/cuda/ptx.cuh: the emulator against NumPy models of what the PTX ISA says, and a GPU against
the emulator (gpu). What must not be done is named by the emulator."""

import ctypes
import subprocess
from functools import cache

import numpy as np
import pytest
import torch
from checkout import load_setup

from . import build

SOURCES = build.HERE / "primitives.cu", build.HERE / "kernels" / "misuse.cu"

SM80 = [
    *("shuffles", "votes", "cp_async", "ldmatrix", "ldmatrix_trans", "mma bf16", "mma fp16", "mma tf32"),
    *("round_to_tf32", "barrier_sync"),
]
# As in primitives.cu.
SM90 = [
    *("mbarrier", "stmatrix", "setmaxnreg"),
    *("tma_load 1 0 0 2", "tma_load 2 0 0 2", "tma_load 2 32 0 2", "tma_load 2 64 0 2", "tma_load 2 128 0 2"),
    *("tma_load 2 128 384 2", "tma_load 2 128 0 4", "tma_load 3 128 640 2", "tma_load 4 64 128 2"),
    *("tma_load 5 32 128 2", "tma_load 5 0 0 2"),
    *("tma_store 1 0", "tma_store 2 128", "tma_store 3 64", "tma_store 4 32", "tma_store 5 128"),
    *("tma_im2col 3 128 0", "tma_im2col 4 128 0", "tma_im2col 4 64 384", "tma_im2col 4 0 0", "tma_im2col 5 128 0"),
    *(
        f"wgmma {dtype} {n} {a}"
        for n in (8, 16, 32, 64, 96, 128, 192, 256)
        for a in ("128 shared", "32 registers")
        for dtype in ("bf16", "fp16", "tf32")
    ),
    *("wgmma bf16 64 64 shared", "wgmma fp16 64 32 shared", "wgmma tf32 64 64 shared", "wgmma bf16 64 0 shared"),
    *("wgmma bf16 64 0 shared columns_apart", "wgmma bf16 64 128 shared overwrite"),
]


class Primitives:
    """The kernels of a library, by name."""

    def __init__(self, library):
        self.library = library
        for function in ("primitive_name", "misuse_name", "emulator_error_message"):
            if hasattr(library, function):
                getattr(library, function).restype = ctypes.c_char_p
        count, name = library.primitive_count(), library.primitive_name
        self.numbers = {name(i).decode(): i for i in range(count)}

    def in_bytes(self, name):
        return self.library.primitive_in_bytes(self.numbers[name])

    def run(self, name, data, device="cpu"):
        """What the kernel makes of ``data`` and of an output of the bytes 1, 2, 3, ... 100, 1, ..."""
        out = torch.from_numpy(initial(self.library.primitive_out_bytes(self.numbers[name]))).to(device)
        data = torch.from_numpy(data).to(device)
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (data, out))
        result = self.library.run_primitive(self.numbers[name], *pointers)
        if device != "cpu":
            torch.cuda.synchronize()
        assert result == 0, self.library.emulator_error_message() if device == "cpu" else result
        return out.cpu().numpy()


def initial(n):
    return (np.arange(n) % 100 + 1).astype(np.uint8)


@cache
def emulated():
    return Primitives(ctypes.CDLL(str(build.build("primitives", SOURCES))))


@pytest.fixture(params=("forward late", "reverse early", "random random"))
def options(request):
    schedule, landing = request.param.split()
    library = emulated().library
    numbers = ("forward", "reverse", "random").index(schedule), ("late", "early", "random").index(landing)
    library.emulator_configure(*numbers, ctypes.c_uint64(1))
    yield
    library.emulator_configure(0, 0, ctypes.c_uint64(1))


# --- what the kernels read ---


def encode(values, dtype):
    """The bytes of float32 values in a type of matrices; TF32's low bits are random, and to be ignored."""
    if dtype == "tf32":
        words = values.astype(np.float32).view(np.uint32)
        low = np.random.default_rng(1).integers(0, 1 << 13, words.shape, np.uint32)
        return (words & 0xFFFFE000 | low).view(np.uint8)
    if dtype == "fp16":
        return values.astype(np.float16).view(np.uint8)
    return torch.from_numpy(values.astype(np.float32)).bfloat16().view(torch.uint8).numpy()


def decode(data, dtype):
    """float64 values of bytes, whose last dimension they take."""
    if dtype == "tf32":
        return (np.ascontiguousarray(data).view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)
    if dtype == "fp16":
        return np.ascontiguousarray(data).view(np.float16).astype(np.float64)
    return (np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def make_input(name, n):
    random = np.random.default_rng(sum(name.encode()))
    family, *arguments = name.split()
    if family == "round_to_tf32":  # with many that lie in the middle
        words = random.integers(0, 2**32, n // 4, np.uint32)
        words[::2] = words[::2] & 0xFFFFE000 | 0x1000
        return words.view(np.uint8)
    if family not in ("mma", "wgmma"):
        return random.integers(0, 256, n).astype(np.uint8)
    dtype = arguments[0]
    accumulators = 32 * 4 if family == "mma" else 64 * int(arguments[1])
    values = (n - accumulators * 4) // (4 if dtype == "tf32" else 2)
    c = random.standard_normal(accumulators).astype(np.float32)
    return np.concatenate([encode(random.standard_normal(values), dtype).reshape(-1), c.view(np.uint8)])


# --- models ---

LANE = np.arange(32)


def shuffles(data):
    words = data.view(np.uint32)
    down, up = np.where(LANE + 3 < 32, LANE + 3, LANE), np.where(LANE >= 2, LANE - 2, LANE)
    return words[np.concatenate([(LANE * 7 + 3) % 32, LANE ^ 5, down, up])]


def votes(data):
    words = data.view(np.uint32)
    ballot = sum(int(word & 1) << lane for lane, word in enumerate(words))
    found = (words % 64 == 0).any()
    return np.repeat(np.array([ballot, found, not found], np.uint32), 32)


def cp_async(data):
    copies = data.reshape(3, 64, 16).copy()
    copies[:, ::5] = 0
    return np.roll(copies, -1, axis=1)


def named_matrices(data):
    """The four matrices whose rows are those that lanes name in primitives.cu."""
    return data.reshape(32, 16)[LANE * 5 % 32].reshape(4, 8, 16)


def ldmatrix(data, transposed=False):
    matrices = named_matrices(data).view(np.uint16)
    if transposed:
        matrices = np.ascontiguousarray(matrices.swapaxes(1, 2))
    # A lane has a word of each: that of row lane / 4 and column 2 (lane % 4).
    return np.ascontiguousarray(matrices.view(np.uint32).reshape(4, 32).T)


def stmatrix(data):
    rows = np.ascontiguousarray(data.view(np.uint32).reshape(32, 4).T).reshape(32, 4)
    out = np.empty_like(rows)
    out[LANE * 5 % 32] = rows
    return out


def fragment(registers, dtype, operand):
    """The matrix [16, depth] or [depth, 8] of which every lane has some registers: mma.m16n8k16 (TF32: m16n8k8)."""
    values = decode(registers.reshape(32, -1), dtype)
    group, within = LANE[:, None] // 4, LANE[:, None] % 4
    i = np.arange(values.shape[1])[None, :]
    if dtype == "tf32":
        if operand == "a":
            row, column = group + i % 2 * 8, within + i // 2 * 4
        else:
            row, column = within + i * 4, group + i * 0
    elif operand == "a":
        row, column = group + ((i >= 2) & (i < 4) | (i >= 6)) * 8, within * 2 + i % 2 + (i >= 4) * 8
    else:
        row, column = within * 2 + i % 2 + (i >= 2) * 8, group + i * 0
    depth = 8 if dtype == "tf32" else 16
    out = np.full((16, depth) if operand == "a" else (depth, 8), np.nan)
    out[row, column] = values
    return out


def mma(data, dtype):
    a, b, c = np.split(data, [512, 768])
    i = np.arange(4)[None, :]
    place = LANE[:, None] // 4 + i // 2 * 8, LANE[:, None] % 4 * 2 + i % 2
    a, b = fragment(a, dtype, "a"), fragment(b, dtype, "b")
    c = c.view(np.float32).reshape(32, 4)
    return (a @ b)[place] + c, (abs(a) @ abs(b))[place] + abs(c)


def round_to_tf32(data):
    with np.errstate(invalid="ignore", over="ignore"):
        x = data.view(np.float32).astype(np.float64)
        exponent = np.maximum(np.floor(np.log2(abs(np.where(np.isfinite(x) & (x != 0), x, 1)))), -126)
        step = np.exp2(exponent - 10)
        rounded = np.copysign(np.floor(abs(x) / step + 0.5) * step, x)
        return np.where(np.isfinite(x), rounded, x).astype(np.float32)


def barrier_sync(data):
    return data.view(np.uint32)[np.arange(128) ^ 37] + np.uint32(2)


def mbarrier(data):
    return data.view(np.uint32).reshape(6, 32)[:, ::-1]


SIZES, BOX, FIRST = (72, 13, 4, 3, 2), (0, 11, 3, 2, 2), (0, -1, 2, -1, 1)


def swizzled(shared, span, shift):
    """Rows of bytes in shared memory from ``shift`` on: 16-byte units exchanged by bits 7 and up of their address."""
    address = np.arange(shared.size) + shift
    to = address if span == 0 else address ^ ((address >> 7) % (span // 16) << 4)
    out = np.empty_like(shared.reshape(-1))
    out[to - shift] = shared.reshape(-1)
    return out


def box_of(rank, span, element):
    """The tensor's shape, and an index of it and the mask of what is inside it, for each element of the box."""
    row = (span or 64) // element
    first = (SIZES[0] - row // 2 - 4 // element, *FIRST[1:rank])
    extents = (row, *BOX[1:rank])
    at = np.meshgrid(*(f + np.arange(n) for f, n in zip(first[::-1], extents[::-1], strict=True)), indexing="ij")
    shape = SIZES[:rank][::-1]
    inside = np.logical_and.reduce([(i >= 0) & (i < n) for i, n in zip(at, shape, strict=True)])
    return shape, tuple(np.where(inside, i, 0) for i in at), inside


def tma_load(data, rank, span, shift, element):
    shape, at, inside = box_of(rank, span, element)
    tensor = data.view(np.uint32 if element == 4 else np.uint16).reshape(shape)
    return swizzled(np.where(inside, tensor[at], 0).astype(tensor.dtype).view(np.uint8), span, shift)


def tma_store(data, rank, span):
    shape, at, inside = box_of(rank, span, 2)
    # To swizzle twice is not to.
    values = swizzled(data, span, 0).view(np.uint16).reshape(inside.shape)
    out = initial(2 * int(np.prod(shape))).view(np.uint16).reshape(shape)
    out[tuple(i[inside] for i in at)] = values[inside]
    return out


def tma_im2col(data, rank, span, shift):
    shape = SIZES[:rank][::-1]
    tensor = data.view(np.uint16).reshape(shape)
    row = (span or 64) // 2
    channel = SIZES[0] - row // 2 - 2
    # All pixels of all images, and of some that do not exist, in the order that they are gone through.
    x = np.arange(-1, SIZES[1] - 1, 2)
    others = [np.arange(-1, size - 1) for size in SIZES[2 : rank - 1]]
    grid = np.meshgrid(np.arange(99), *others[::-1], x, indexing="ij")
    pixels = np.stack(grid, axis=-1).reshape(-1, rank - 1)
    start = {3: (0, 1), 4: (0, 0, 1), 5: (1, -1, 0, 1)}[rank]
    begin = int(np.flatnonzero((pixels == start).all(axis=1))[0])
    offset = {3: (0, 2), 4: (0, 1, 2), 5: (0, 0, 1, 2)}[rank]
    out = np.zeros(({3: 16, 4: 64, 5: 80}[rank], row), np.uint16)
    for to, at in zip(out, pixels[begin:] + offset, strict=False):
        if all(0 <= i < n for i, n in zip(at, shape[:-1], strict=True)):
            to[: SIZES[0] - channel] = tensor[(*at, slice(channel, channel + row))]
    return swizzled(out.view(np.uint8), span, shift)


def k_major(shared, rows, span, columns_apart):
    """The [rows, span] bytes of a wgmma operand of which shared memory has these."""
    if span:
        units = shared.reshape(rows, span // 16, 16)
        by = np.arange(rows) // (128 // span) % (span // 16)
        return np.stack([units[r, np.arange(span // 16) ^ by[r]] for r in range(rows)]).reshape(rows, span)
    if columns_apart:
        return shared.reshape(2, rows, 16).swapaxes(0, 1).reshape(rows, 32)
    return shared.reshape(rows // 8, 2, 8, 16).swapaxes(1, 2).reshape(rows, 32)


def wgmma(data, dtype, n, span, a_in, *variant):
    n, span = int(n), int(span)
    depth = span or 32
    a_bytes = 2048 if a_in == "registers" else 64 * depth
    a, b, d = np.split(data, [a_bytes, a_bytes + n * depth])
    if a_in == "registers":
        a = np.concatenate([fragment(warp, dtype, "a") for warp in a.reshape(4, 512)])
    else:
        a = decode(k_major(a, 64, span, "columns_apart" in variant), dtype)
    b = decode(k_major(b, n, span, "columns_apart" in variant), dtype).T
    thread, i = np.arange(128)[:, None], np.arange(n // 2)[None, :]
    place = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2
    d = 0 if "overwrite" in variant else d.view(np.float32).reshape(128, n // 2)
    return (a @ b)[place] + d, (abs(a) @ abs(b))[place] + abs(d)


def model(name, data):
    """The expected output, or the expected matrix and the sum of its terms' magnitudes."""
    family, *arguments = name.split()
    if family == "ldmatrix_trans":
        return ldmatrix(data, transposed=True)
    if family == "setmaxnreg":
        return data
    if family.startswith("tma"):
        arguments = map(int, arguments)
    return globals()[family](data, *arguments)


def compare(name, out, expected):
    if isinstance(expected, tuple):
        values, magnitude = expected
        assert (abs(out.view(np.float32).reshape(values.shape) - values) <= 1e-5 * magnitude).all()
    elif name == "round_to_tf32":  # which NaN is not said
        np.testing.assert_array_equal(out.view(np.float32), np.ascontiguousarray(expected).view(np.float32))
    else:
        np.testing.assert_array_equal(out, np.ascontiguousarray(expected).view(np.uint8).reshape(-1))


# --- tests ---


def test_names():
    assert list(emulated().numbers) == SM80 + sorted(SM90, key=list(emulated().numbers).index)
    assert len(emulated().numbers) == len(SM80) + len(SM90)


@pytest.mark.parametrize("name", SM80 + SM90)
def test_emulated(name, options):
    data = make_input(name, emulated().in_bytes(name))
    compare(name, emulated().run(name, data), model(name, data))


def _is_sm90():
    return torch.cuda.get_device_capability() == (9, 0)


def for_gpu(source, folder):
    """The library made of a .cu file for the GPU that is there."""
    toolkit = load_setup().find_cuda_home()
    if toolkit is None:
        pytest.skip("no CUDA toolkit to compile the instructions with")
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' if _is_sm90() else ''}"
    library = folder / f"{source.stem}.so"
    command = [f"{toolkit}/bin/nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-shared"]
    command += ["-Xcompiler", "-fPIC", f"-I{build.KERNELS}", str(source), "-o", str(library)]
    if _is_sm90():
        command.append("-DPRIMITIVES_SM90")
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)  # for cuTensorMapEncode*, which the library leaves open
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="session")
def on_gpu(tmp_path_factory):
    return Primitives(for_gpu(SOURCES[0], tmp_path_factory.mktemp("primitives")))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SM80 + SM90)
def test_gpu(name, on_gpu):
    if name not in on_gpu.numbers:
        pytest.skip("needs sm_90a")
    data = make_input(name, on_gpu.in_bytes(name))
    out = on_gpu.run(name, data, "cuda")
    expected = model(name, data)
    compare(name, out, expected if isinstance(expected, tuple) else emulated().run(name, data))


@pytest.mark.gpu
def test_gpu_hopper_conv(tmp_path):
    if not _is_sm90():
        pytest.skip("needs sm_90a")
    library = for_gpu(build.HERE / "kernels" / "hopper_conv.cu", tmp_path)
    for images, size, channels, filters, taps, stride, padding in (
        (3, 19, 128, 200, 3, 1, 1),
        (2, 14, 64, 64, 1, 2, 0),
    ):
        x = torch.randint(-2, 3, (images, channels, size, size)).bfloat16().to(memory_format=torch.channels_last)
        w = torch.randint(-2, 3, (filters, channels, taps, taps)).bfloat16().to(memory_format=torch.channels_last)
        expected = torch.nn.functional.conv2d(x.float(), w.float(), stride=stride, padding=padding).relu().bfloat16()
        y = torch.full_like(expected, float("nan"), device="cuda", memory_format=torch.channels_last)
        on_device = x.cuda(), w.cuda(), y
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in on_device)
        shape = images, size, size, channels, filters, taps, stride, padding
        assert library.hopper_conv(*pointers, *shape, 4) == 0
        torch.cuda.synchronize()
        assert torch.equal(y.cpu(), expected)


# What the emulator says; thread numbers and addresses differ.
MISUSE = {
    "mbarrier_without_init": "used before its init",
    "mbarrier_initialised_twice": "initialised twice",
    "mbarrier_misaligned": "at 4, which is no multiple of 8",
    "mbarrier_overwritten": "has been overwritten",
    "mbarrier_arrived_too_often": "more arrivals .* than the 1 of its init",
    "mbarrier_never_complete": "deadlock: thread .* waits for an mbarrier",
    "mbarrier_of_too_many_bytes": "expect 1048576 bytes, 1048575 at most",
    "tma_misaligned": "a TMA load at 64, which is no multiple of 128",
    "tma_beyond_shared_memory": "a TMA load of bytes 7936 to 8448 of 8192",
    "tma_without_init_fence": "not made visible by fence.mbarrier_init",
    "tma_of_more_bytes_than_expected": "256 more bytes arrive",
    "tma_of_fewer_bytes_than_expected": "deadlock: thread .* waits for an mbarrier",
    "tma_of_another_rank": "3 coordinates and a tensor map of 2 dimensions",
    "tma_without_map": "a tensor map that nobody has encoded",
    "tma_map_for_im2col": "a tiled TMA load with a tensor map for im2col",
    "tma_im2col_outside_its_box": "begins at 7, outside the bounding box",
    "tma_load_over_pending_store": "a TMA load writes byte 0 .* still to read",
    "tma_store_without_fence": "a TMA store reads byte 0 .* without a fence.proxy.async",
    "tma_store_not_waited_for": "returns while its TMA stores have still to read",
    "tma_store_overwritten": "a thread writes byte 0 .* still to read",
    "cp_async_overwritten": "a thread writes byte .* still to write",
    "cp_async_not_waited_for": "returns with a cp.async in flight",
    "cp_async_misaligned": "cp.async at 8 is misaligned",
    "stmatrix_misaligned": "stmatrix at 8, which is no multiple of 16",
    "address_beyond_shared_memory": "8192 bytes from the start of 8192 bytes",
    "barrier_in_divergent_code": "threads wait at different barriers: .*misuse.cu",
    "barrier_missed_by_some": "deadlock: thread .* waits for a named barrier",
    "barrier_of_half_warps": "64 threads of 4 warps; a warp counts whole",
    "barrier_zero": "bar.sync 0 is __syncthreads",
    "shuffle_of_half_a_warp": "__shfl_xor_sync, which not all lanes of its warp have reached",
    "shuffle_and_vote_in_one_warp": "lanes of one warp are in __shfl_xor_sync and in a vote",
    "wgmma_of_different_operands": "pass different operands",
    "wgmma_accumulators_written": "has written to the accumulators of a wgmma in flight",
    "wgmma_without_fence": "no wgmma.fence",
    "wgmma_without_proxy_fence": "wgmma's a reads byte 0 .* without a fence.proxy.async",
    "wgmma_operand_overwritten": "a thread writes byte 720 .* still to read",
    "wgmma_not_waited_for": "returns while a wgmma of it is in flight",
    "wgmma_by_one_warp": "deadlock: .* the other threads of the warpgroup",
    "wgmma_off_the_pattern": "a at 128, which is not in the first row of the swizzle's pattern",
    "wgmma_of_a_base_offset": "a base offset in the descriptor of a",
}


def test_all_misuse_is_tested():
    library = emulated().library
    assert [library.misuse_name(i).decode() for i in range(library.misuse_count())] == list(MISUSE)


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name):
    library = emulated().library
    assert library.run_misuse(list(MISUSE).index(name)) != 0
    with pytest.raises(RuntimeError, match=MISUSE[name]):
        raise RuntimeError(library.emulator_error_message().decode())


def test_launch_after_a_failure():
    library = emulated().library
    assert library.run_misuse(0) != 0
    data = make_input("mbarrier", emulated().in_bytes("mbarrier"))
    compare("mbarrier", emulated().run("mbarrier", data), model("mbarrier", data))
    assert library.emulator_error_message() == b""


# --- tensor maps ---

BF16, FLOAT32, NO_SWIZZLE, SWIZZLE_128B, INTERLEAVE_16B = 9, 7, 0, 3, 1
INVALID, UNSUPPORTED = 1, 801
MEMORY = np.zeros(65536 + 64, np.uint8)
ADDRESS = (MEMORY.ctypes.data + 63) // 64 * 64


def _array(values, kind):
    return (kind * 5)(*values)


def encode_tiled(
    *, dtype=BF16, rank=None, address=ADDRESS, sizes=(64, 8, 4), strides=(128, 1024), box=(64, 4, 2), steps=(1, 1, 1),
    interleave=0, swizzle=SWIZZLE_128B,
):  # fmt: skip
    return emulated().library.cuTensorMapEncodeTiled(
        ctypes.create_string_buffer(128), dtype, len(sizes) if rank is None else rank, ctypes.c_void_p(address),
        _array(sizes, ctypes.c_uint64), _array(strides, ctypes.c_uint64), _array(box, ctypes.c_uint32),
        _array(steps, ctypes.c_uint32), interleave, swizzle, 0, 0,
    )  # fmt: skip


def encode_im2col(
    *, rank=None, sizes=(64, 8, 4, 2), strides=(128, 1024, 4096), lower=(-1, -1), upper=(-1, -1), channels=64,
    pixels=128, steps=(1, 1, 1, 1), swizzle=SWIZZLE_128B,
):  # fmt: skip
    return emulated().library.cuTensorMapEncodeIm2col(
        ctypes.create_string_buffer(128), BF16, len(sizes) if rank is None else rank, ctypes.c_void_p(ADDRESS),
        _array(sizes, ctypes.c_uint64), _array(strides, ctypes.c_uint64), _array(lower, ctypes.c_int),
        _array(upper, ctypes.c_int), channels, pixels, _array(steps, ctypes.c_uint32), 0, swizzle, 0, 0,
    )  # fmt: skip


def test_tensor_maps():
    assert encode_tiled() == 0
    assert encode_tiled(steps=(1, 8, 2)) == 0
    assert encode_tiled(box=(256, 256, 256), swizzle=NO_SWIZZLE) == 0
    assert encode_im2col() == 0
    assert encode_im2col(lower=(-3, 0), upper=(-4, 127), pixels=1024, steps=(1, 2, 2, 1)) == 0


@pytest.mark.parametrize(
    "wrong",
    (
        *(dict(rank=0), dict(rank=6), dict(address=0), dict(address=8)),
        *(dict(sizes=(64, 0, 4)), dict(sizes=(64, 2**32 + 1, 4))),
        *(dict(strides=(120, 1024)), dict(strides=(128, 2**40))),
        *(dict(box=(64, 0, 2)), dict(box=(64, 257, 2)), dict(box=(264, 4, 2), swizzle=NO_SWIZZLE)),
        *(dict(box=(12, 4, 2)), dict(box=(72, 4, 2)), dict(box=(64, 4, 2), dtype=FLOAT32)),
        *(dict(steps=(1, 0, 1)), dict(steps=(1, 9, 1))),
    ),
    ids=str,
)
def test_wrong_tensor_map(wrong):
    assert encode_tiled(**wrong) == INVALID


@pytest.mark.parametrize(
    "wrong",
    (
        *(dict(rank=2), dict(rank=6), dict(channels=0), dict(channels=257), dict(channels=72), dict(channels=12)),
        *(dict(pixels=0), dict(pixels=1025), dict(steps=(1, 2, 9, 1)), dict(strides=(128, 1000, 4096))),
        *(dict(lower=(-129, -1)), dict(upper=(-1, 128)), dict(lower=(2, -1), upper=(-6, -1))),
    ),
    ids=str,
)
def test_wrong_im2col_map(wrong):
    assert encode_im2col(**wrong) == INVALID


def test_tensor_maps_that_are_not_emulated():
    assert encode_tiled(interleave=INTERLEAVE_16B) == UNSUPPORTED
    assert encode_tiled(swizzle=5) == UNSUPPORTED
    assert encode_tiled(dtype=8) == UNSUPPORTED  # float64
