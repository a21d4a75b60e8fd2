"""kernels/hopper_conv.cu is right in the emulator, in every order and with sanitizers, and faults planted into it are
found: by wrong numbers, by what the emulator reports or as races."""

import pytest

from . import build

KERNEL = build.HERE / "kernels" / "hopper_conv.cu"
MAIN = build.HERE / "kernels" / "hopper_conv_main.cpp"
FAULTY = build.BUILT / "faults"  # kept, for the objects in build.BUILT to be found again

ORDERS = ("forward late", "reverse late", "random random", "forward early")

# Lines of the kernel.
FULL = "      ptx::mbarrier_wait(shared.full(ring.stage), ring.parity);\n"
EMPTY = "      ptx::mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);\n"
WAIT = "      ptx::wgmma_wait<1>();  // the previous step's\n"
LAST_WAIT = "    ptx::wgmma_wait<0>();\n"
RELEASE = "      if (elected && step > 0) ptx::mbarrier_arrive(shared.empty(previous));\n"
WAIT_READ = "    if (thread == 0) ptx::tma_store_wait_read<0>();\n"
LAST_WAIT_READ = "  if (elected) ptx::tma_store_wait_read<0>();\n"
IS_FREE = "    ptx::barrier_sync(1 + consumer, 128);  // the buffer is free\n"
PROXY_FENCE = "    ptx::fence_proxy_async();\n"
IS_FULL = "    ptx::barrier_sync(1 + consumer, 128);  // it is full\n"
WGMMA_FENCE = "      ptx::wgmma_fence();\n"
INIT_FENCE = "    ptx::fence_mbarrier_init();\n"
SYNC = "  __syncthreads();\n"

WRONG = "wrong numbers"
DEADLOCK = "deadlock: thread 256 waits for an mbarrier"
NOT_WRITTEN, NOT_READ = "an asynchronous copy has still to write", "an asynchronous operation has still to read"
UNFENCED = "written without a fence.proxy.async"

# Replacements, and what is said then in one of ORDERS.
FAULTS = {
    "swizzle of a descriptor": (
        [("(a, 0, 8 * row_bytes, ptx::Swizzle::bytes_128)", "(a, 0, 8 * row_bytes, ptx::Swizzle::none)")],
        WRONG,
    ),
    "span of a descriptor's swizzle": (
        [("(a, 0, 8 * row_bytes, ptx::Swizzle::bytes_128)", "(a, 0, 8 * row_bytes, ptx::Swizzle::bytes_64)")],
        "wgmma: a at 64, which is not in the first row",
    ),
    "stride of a descriptor": ([("(b, 0, 8 * row_bytes", "(b, 0, 16 * row_bytes")], NOT_WRITTEN),
    "step in depth": ([("* staging_bytes + k * 32", "* staging_bytes + k * 64")], "ends beyond its row|first row"),
    "swizzle of the weights' map": (
        [("CU_TENSOR_MAP_SWIZZLE_128B,\n                                CU", "CU_TENSOR_MAP_SWIZZLE_NONE,\n CU")],
        WRONG,
    ),
    "swizzle of the staging buffer": ([("(unit ^ row % 8)", "(unit ^ row % 4)")], WRONG),
    "too few bytes expected": ([("full(ring.stage), stage_bytes)", "full(ring.stage), x_bytes)")], NOT_WRITTEN),
    "too many bytes expected": (
        [("full(ring.stage), stage_bytes)", "full(ring.stage), stage_bytes + 16)")],
        DEADLOCK,
    ),
    "slot freed before the wait": ([(WAIT, ""), (RELEASE, RELEASE + WAIT)], NOT_READ),
    "wait for one wgmma too few": ([(WAIT, "      ptx::wgmma_wait<2>();\n")], NOT_READ),
    "no wait for a full slot": ([(FULL, "")], NOT_WRITTEN),
    "no wait for an empty slot": ([(EMPTY, "")], "more arrivals at the mbarrier"),
    "parity of a full slot": ([(FULL, FULL.replace("ring.parity", "ring.parity ^ 1"))], NOT_WRITTEN),
    "parity of an empty slot": ([(EMPTY, EMPTY.replace(" ^ 1", ""))], DEADLOCK),
    "parity is never changed": ([("    parity ^= 1;\n", "")], f"{NOT_WRITTEN}|{DEADLOCK}|more arrivals"),
    "one arrival too few expected": ([("empty(stage), consumers)", "empty(stage), consumers - 1)")], DEADLOCK),
    "no last wait for wgmma": ([(LAST_WAIT, "")], NOT_READ),
    "no fence before wgmma": ([(WGMMA_FENCE, "")], "no wgmma.fence since the accumulators were written"),
    "no fence before a TMA store": ([(PROXY_FENCE, "")], UNFENCED),
    "fence before the writes": ([(PROXY_FENCE, ""), (IS_FREE, IS_FREE + PROXY_FENCE)], UNFENCED),
    "no barrier before a TMA store": ([(IS_FULL, "")], UNFENCED),
    "staging buffer written too early": ([(WAIT_READ, "")], NOT_READ),
    "no barrier before the staging buffer": ([(IS_FREE, "")], NOT_READ),
    "no last wait for a TMA store": ([(LAST_WAIT_READ, "")], "returns while its TMA stores have still to read"),
    "one barrier for both warpgroups": ([(IS_FULL, IS_FULL.replace("1 + consumer", "1"))], "a warp counts whole"),
    "no fence of the mbarriers": ([(INIT_FENCE, "")], "not made visible by fence.mbarrier_init"),
    "no barrier after the mbarriers": ([(SYNC, "")], "used before its init"),
    "im2col offsets exchanged": (
        [("{tap % shape.taps_x, tap / shape.taps_x}", "{tap / shape.taps_x, tap % shape.taps_x}")],
        WRONG,
    ),
    "im2col corner": ([("lower[2] = {-padding, -padding}", "lower[2] = {-padding, 0}")], f"{WRONG}|bounding box"),
    "staging buffers are misaligned": (
        [("consumer * staging_bytes; }", "consumer * staging_bytes + 64; }"), ("8;\n\nstruct", "8 + 64;\n\nstruct")],
        "TMA store at .*, which is no multiple of 128",
    ),
    "more registers than there are": ([("setmaxnreg_inc<232>", "setmaxnreg_inc<240>")], "66560 registers"),
}  # fmt: skip

# Those that ThreadSanitizer is to find where every copy lands at once, so that the numbers are right.
RACES = (
    *("slot freed before the wait", "no wait for a full slot", "no last wait for wgmma"),
    *("staging buffer written too early", "no barrier after the mbarriers"),
)


def program(kernel=KERNEL, sanitizer=None):
    return build.build(f"{kernel.stem.replace(' ', '_')}_main", [kernel, MAIN], program=True, sanitizer=sanitizer)


def run(executable, schedule, landing):
    """The exit status, and what the program and its sanitizer say."""
    result = build.run_program(executable, schedule=schedule, landing=landing)
    return result.returncode, result.stdout + result.stderr


def with_fault(name):
    text = KERNEL.read_text()
    for old, new in FAULTS[name][0]:
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {KERNEL.name}"
        text = text.replace(old, new)
    FAULTY.mkdir(parents=True, exist_ok=True)
    faulty = FAULTY / f"{name.replace(' ', '_')}.cu"
    if not faulty.exists() or faulty.read_text() != text:
        faulty.write_text(text)
    return faulty


@pytest.mark.parametrize("landing", build.LANDINGS)
@pytest.mark.parametrize("schedule", build.SCHEDULES)
def test_right(schedule, landing):
    assert run(program(), schedule, landing) == (0, "")


@pytest.mark.parametrize("sanitizer", ("address", "thread"))
@pytest.mark.parametrize("order", ORDERS)
def test_sanitizer(sanitizer, order):
    assert run(program(sanitizer=sanitizer), *order.split()) == (0, "")


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name):
    executable = program(with_fault(name))
    for order in ORDERS:
        status, text = run(executable, *order.split())
        if status != 0:
            with pytest.raises(RuntimeError, match=FAULTS[name][1]):
                raise RuntimeError(text)
            return
    pytest.fail("not found in any order")


@pytest.mark.parametrize("name", RACES)
def test_race(name):
    status, text = run(program(with_fault(name), "thread"), "forward", "early")
    assert status != 0
    assert "data race" in text
