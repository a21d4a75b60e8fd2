"""Which kernel of the CPU computes a convolution: ours where it was measured to be the faster one, else oneDNN's."""

import pytest
import torch

from resnet_fast import choose

WINNING = {"portable": (), "avx2": (2, 3, 4, 8), "avx512": (2, 3, 4, 8, 16, 32, 64)}
WINNING["avx512_bf16"] = WINNING["avx512"]


@pytest.mark.parametrize(("level", "winning"), WINNING.items())
def test_groups_that_win_run_in_our_kernel(level, winning, monkeypatch):
    monkeypatch.setattr(choose, "cpu_level", lambda: level)

    def chosen(c, groups=32, kernel=3, stride=1, dilation=1, multiplier=1):
        weight = (c * multiplier * groups, c, kernel, kernel)
        pairs = ([stride] * 2, [0, 0], [dilation] * 2)
        sizes = ((1, c * groups, 14, 14), weight, (1, weight[0], 14, 14))
        return choose.choose_conv_on_cpu(*sizes, *pairs, groups, False, torch.float32).name

    for c in (1, 2, 3, 4, 8, 16, 32, 48, 64, 65):
        name = "depthwise" if c == 1 else "grouped" if c in winning else "onednn"
        assert {chosen(c), chosen(c, stride=2)} == {name}
    others = (dict(stride=3), dict(dilation=2), dict(multiplier=2), dict(kernel=1))
    assert {chosen(4, **other) for other in others} == {"onednn"}


def test_groups_that_win_in_16_bits(monkeypatch):
    """Ours multiplies pairs of bfloat16 or computes in float32, oneDNN in bfloat16 where the CPU does."""
    monkeypatch.setattr(choose, "cpu_level", lambda: "avx512_bf16")
    monkeypatch.setattr(choose, "onednn_runs", lambda dtype: dtype != torch.float16)
    monkeypatch.setattr(choose, "multiplies_bfloat16", lambda: True)

    def chosen(c, stride, dtype):
        sizes = ((1, 32 * c, 14, 14), (32 * c, c, 3, 3), (1, 32 * c, 14, 14))
        kernel = choose.choose_conv_on_cpu(*sizes, [stride] * 2, [1, 1], [1, 1], 32, False, dtype)
        return kernel.name, kernel.bfloat16

    for c in (2, 4, 6, 32, 64, 66):
        assert {chosen(c, s, torch.bfloat16) for s in (1, 2)} == {("grouped", True) if c <= 64 else ("onednn", False)}
    for c in (3, 5, 7, 33):
        assert chosen(c, 1, torch.bfloat16)[0] == ("grouped" if c <= 5 else "onednn")
        assert chosen(c, 2, torch.bfloat16)[0] == "onednn"
    for c in (2, 5, 32, 33):
        assert chosen(c, 2, torch.float16)[0] == ("grouped" if c <= 32 else "onednn")


def test_where_onednn_only_emulates_bfloat16_it_is_not_used_for_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    takes = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for has_instructions in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_instructions: has)
        assert choose.onednn_runs.__wrapped__(torch.bfloat16) == (takes and has_instructions)
        assert choose.onednn_runs.__wrapped__(torch.float32)


def test_depthwise_convolutions_that_win_run_in_our_kernel(monkeypatch):
    monkeypatch.setattr(choose, "onednn_runs", lambda dtype: True)
    monkeypatch.setattr(choose, "multiplies_bfloat16", lambda: True)

    def chosen(dtype=torch.float32, n=1, c=64, size=28, kernel=3, stride=1, dilation=1, multiplier=1):
        k = c * multiplier
        sizes = ((n, c, size, size), (k, 1, kernel, kernel), (n, k, size, size))
        return choose.choose_conv_on_cpu(*sizes, [stride] * 2, [1, 1], [dilation] * 2, c, False, dtype).name

    for dtype, most in ((torch.float32, 112), (torch.bfloat16, 28)):
        assert chosen(dtype, size=most) == chosen(dtype, n=4, size=most // 2, stride=2) == "depthwise"
        assert chosen(dtype, size=most + 1) == chosen(dtype, n=5, size=most // 2) == "onednn"
    others = (dict(kernel=5), dict(stride=3), dict(dilation=2), dict(multiplier=2), dict(c=3))
    assert {chosen(**other) for other in others} == {"onednn"}


def test_what_onednn_errs_on_runs_in_our_kernels():
    """Outputs that see padding alone; in 16 bits, one channel."""

    def chosen(c, groups, padding, dtype):
        sizes = ((1, c * groups, 9, 9), (34, c, 3, 1), (1, 34, 9, 9))
        return choose.choose_conv_on_cpu(*sizes, [1, 1], padding, [1, 1], groups, True, dtype).name

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert chosen(17, 2, [3, 0], dtype) == chosen(17, 2, [0, 1], dtype) == chosen(1, 1, [3, 0], dtype) == "gemm"
        assert chosen(17, 2, [2, 0], dtype) == "onednn"
        assert chosen(1, 1, [0, 0], dtype) == ("onednn" if dtype == torch.float32 else "gemm")
