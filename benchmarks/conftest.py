"""Which benchmarks run: those marked quick, unless -k, -m or a test id says otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_fast.measure import environment

MARKERS = {
    "quick": "of the default selection",
    "op": "one operator",
    "block": "the stem or a residual block",
    "model": "a whole model",
    "forward": "inference: eval mode, no gradients",
    "train": "forward and backward; of a model with its optimizer step",
}
_left_out = pytest.StashKey[int]()


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def _selected_by_user(config) -> bool:
    return bool(config.option.keyword or config.option.markexpr or any("::" in arg for arg in config.args))


def pytest_collection_modifyitems(config, items):
    if _selected_by_user(config):
        return
    here = Path(__file__).parent
    dropped = [item for item in items if here in item.path.parents and "quick" not in item.keywords]
    config.stash[_left_out] = len(dropped)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        gone = set(dropped)
        items[:] = [item for item in items if item not in gone]


def pytest_report_collectionfinish(config):
    if config.stash.get(_left_out, 0):
        return (
            f"benchmarks: the quick selection; {config.stash[_left_out]} more rows by -k, -m or test id "
            '(all of them: -m "quick or not quick")'
        )
    return None


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["resnet_fast"] = environment()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Leaves out what no report needs: every single sample, and the name of the machine."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
    output_json["machine_info"] = {"resnet_fast": output_json["machine_info"]["resnet_fast"]}
    output_json.pop("commit_info", None)
