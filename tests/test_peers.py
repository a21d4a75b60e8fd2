"""The engines beside ours compute what torchvision computes, and a cell of the table says what is wrong with one."""

import json
import os

import pytest
import torch

from resnet_fast.bench import cells, compare, memory
from resnet_fast.bench.cells import DTYPES, Cell, Result
from resnet_fast.bench.peers import OURS, PEERS, Peer, Prepared, peers
from resnet_fast.measure import Timing, relative_rms

pytest.importorskip("torchvision")

BFLOAT16_INSTRUCTIONS = torch.ops.resnet_fast._fma_peak(1, True) > 0
CPU_PEERS = peers("cpu")


def needs(absent):
    """Skips where an engine is not installed; `make test-peers`, which installs all of them, lets none be missing."""
    if absent:
        assert not os.environ.get("RESNET_FAST_TEST_PEERS"), absent
        pytest.skip(absent)


@pytest.fixture(scope="module")
def stock():
    return dict(cells.models(["resnet18"]))["resnet18"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, peer in CPU_PEERS.items() if not peer.compiled])
@torch.no_grad()
def test_cpu_peer_is_right(name, dtype, stock):
    peer = CPU_PEERS[name]
    needs(peer.absent())
    subject, reference = cells.subject(Cell("resnet18", 2, dtype, "cpu"), stock)
    if name == "onnxruntime" and dtype == "bfloat16":  # it has no such convolution on a CPU, and says so
        with pytest.raises(Exception, match=r"tensor\(bfloat16\).*Conv"):
            peer.prepare(subject)
        return
    prepared = peer.prepare(subject)
    del subject  # a peer keeps alive what it needs
    first, second = (prepared.call().clone() for _ in range(2))
    assert relative_rms(first, reference) < cells.tolerance("cpu", DTYPES[dtype])
    assert torch.equal(first, second)
    if name == "openvino" and dtype == "bfloat16" and not BFLOAT16_INSTRUCTIONS:
        assert prepared.note == "computes in float32"


@pytest.mark.parametrize("model", ["resnet18", "resnext50_32x4d"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_jax_is_right(model, dtype):
    needs(Peer("jax", "cpu", lambda subject: None, ("jax",)).absent())
    from resnet_fast.bench.jax_resnet import prepare

    stock = dict(cells.models([model]))[model]
    subject, reference = cells.subject(Cell(model, 2, dtype, "cpu"), stock)
    out = prepare(subject.stock(), subject.images)()
    assert out.shape == (2, 1000) and out.dtype == DTYPES[dtype]
    assert relative_rms(out, reference) < cells.tolerance("cpu", DTYPES[dtype])


def test_every_peer_has_one_name_on_its_device_and_ours_is_first():
    for device in ("cpu", "cuda"):
        names = [peer.name for peer in PEERS if peer.device == device]
        assert len(names) == len(set(names)) and names[0] == OURS
        assert list(peers(device)) == names


def test_an_absent_peer_is_named():
    peer = Peer("other", "cpu", lambda subject: None, ("no_such_engine", "json"))
    assert peer.absent() == "absent: no_such_engine not installed"


def fake(name, output):
    """A peer whose call returns output(subject), and counts its calls."""

    def prepare(subject):
        def call():
            calls.append(name)
            return output(subject)

        return Prepared(call)

    calls = []
    return Peer(name, "cpu", prepare), calls


def test_a_cell_refuses_wrong_outputs_in_words_and_times_the_rest(stock):
    def fails(subject):
        raise RuntimeError("no such instruction\nsecond line")

    wrong, wrong_calls = fake("wrong", lambda s: 1.01 * s.stock()(s.images))
    nan, _ = fake("nan", lambda s: s.stock()(s.images) * float("nan"))
    failing, _ = fake("failing", fails)
    missing = Peer("missing", "cpu", lambda subject: None, ("no_such_engine",))
    ticks = []
    cell = Cell("resnet18", 1, "float32", "cpu")
    results = cells.run(cell, stock, [CPU_PEERS[OURS], wrong, nan, failing, missing], 2, False, ticks.append)
    assert sum(ticks) == 10 and len(wrong_calls) == 1
    refused = {name: result.refused for name, result in results.items()}
    assert refused == {
        OURS: "", "wrong": "wrong output: not timed", "nan": "wrong output: not timed",
        "failing": "does not run here (RuntimeError: no such instruction)",
        "missing": "absent: no_such_engine not installed",
    }  # fmt: skip
    text = cells.to_text(cell, results)
    assert "missing: absent: no_such_engine not installed" in text and "wrong: wrong output: not timed (error 1" in text

    found = cells.to_dict(cell, results)
    json.dumps(found)
    ours = found["peers"][OURS]
    assert ours["time_over_ours"] == 1 and 0 < ours["fraction_of_bound"] < 3
    assert ours["images_per_s"] == pytest.approx(1e3 / ours["median_ms"])
    assert found["gflop"] == pytest.approx(3.63, rel=0.01)
    assert found["peers"]["missing"] == {
        "refused": "absent: no_such_engine not installed", "note": None, "relative_rms": None, "prepare_s": None,
        "first_call_s": None,
    }  # fmt: skip


def test_a_peer_that_has_used_up_its_seconds_sits_out(stock):
    other, _ = fake("other", lambda s: s.stock()(s.images))
    cell = Cell("resnet18", 1, "float32", "cpu")
    results = cells.run(cell, stock, [CPU_PEERS[OURS], other], 8, False, lambda n: None, seconds=1e-9)
    timing = results["other"].timing
    assert len(timing.samples) + timing.dropped == 3


def test_adding_a_pass():
    ours, other = CPU_PEERS[OURS], Peer("other", "cpu", lambda subject: None)
    one = {"a": Result(ours, "note", error=1e-6, prepare_s=1.0, timing=Timing((1.0, 2.0), 1), memory={"mb": 2.0})}
    two = {"a": Result(ours, "note", error=2e-6, prepare_s=9.0, timing=Timing((3.0,), 2))}
    assert cells.add(one, two) == {
        "a": Result(ours, "note", error=2e-6, prepare_s=1.0, timing=Timing((1.0, 2.0, 3.0), 3), memory={"mb": 2.0})
    }
    good, bad = {"a": Result(other, error=0.0, timing=Timing((1.0,)))}, {"a": Result(other, refused="wrong output")}
    for sum_ in (cells.add(good, bad), cells.add(bad, good)):
        assert sum_["a"].refused == "wrong output" and sum_["a"].timing is None


def test_a_reference_without_spread_is_an_error(stock):
    import copy

    flat = copy.deepcopy(stock)
    torch.nn.init.zeros_(flat.fc.weight)
    torch.nn.init.zeros_(flat.fc.bias)
    with pytest.raises(RuntimeError, match="not finite or have no spread"):
        cells.subject(Cell("resnet18", 1, "float32", "cpu"), flat)


def test_memory_is_that_of_the_peer_alone(stock):
    subject, _ = cells.subject(Cell("resnet18", 2, "float32", "cpu"), stock)
    found = memory.measure(subject, CPU_PEERS[OURS])
    assert 100 < found["running_rss_mb"] <= found["peak_rss_mb"] < 4000
    with pytest.raises(RuntimeError, match="no such peer"):
        memory.measure(subject, Peer("no such peer", "cpu", lambda s: None))


def test_a_memory_that_cannot_be_measured_is_said(stock):
    stranger, _ = fake("stranger", lambda s: s.stock()(s.images))  # a child process does not know it
    cell = Cell("resnet18", 1, "float32", "cpu")
    results = cells.run(cell, stock, [CPU_PEERS[OURS], stranger], 1, True, lambda n: None)
    assert results["stranger"].note == "memory not measured (RuntimeError: KeyError: 'stranger')"
    assert results["stranger"].timing is not None and results[OURS].memory["running_rss_mb"] > 100


# compare


def results(**medians):
    peers = {name: {"median_ms": ms, "p20_ms": 0.98 * ms, "p80_ms": 1.02 * ms} for name, ms in medians.items()}
    cell = {"model": "resnet18", "batch": 1, "dtype": "float32", "device": "cpu", "peers": peers}
    return {"environment": {"torch": "2.11", "threads": 2}, "cells": [cell]}


@pytest.mark.parametrize(
    ("now", "mark"),
    [
        ({OURS: 20.0, "torch": 30.0, "openvino": 25.0}, ""),
        ({OURS: 22.0, "torch": 30.0, "openvino": 25.0}, "slower"),
        ({OURS: 18.0, "torch": 30.0, "openvino": 25.0}, "faster"),
        ({OURS: 20.5, "torch": 30.0, "openvino": 25.0}, ""),  # within the spread
        ({OURS: 40.0, "torch": 60.0, "openvino": 50.0}, ""),  # the machine is twice as slow
        ({OURS: 40.0, "torch": 30.0, "openvino": 60.0}, ""),  # another moved as far
        ({OURS: 20.0, "torch": 60.0, "openvino": 50.0}, "faster"),
    ],
)
def test_compare_marks_what_moved_more_than_the_machine(now, mark):
    then = {OURS: 20.0, "torch": 30.0, "openvino": 25.0}
    (ours,) = [c for c in compare.changes(results(**then), results(**now)) if c.peer == OURS]
    assert ours.mark == mark
    assert len(compare.rows(results(**then), results(**now))) == 4


def test_compare_leaves_out_what_is_not_in_both_and_tells_other_environments():
    old, new = results(**{OURS: 20.0, "torch": 30.0}), results(**{OURS: 20.0, "ncnn": 10.0})
    assert [c.peer for c in compare.changes(old, new)] == [OURS]
    new["cells"][0]["batch"] = 8
    assert list(compare.changes(old, new)) == []
    new["environment"]["threads"] = 1
    assert compare.differences(old, new) == ["threads: 2 then, 1 now"]
