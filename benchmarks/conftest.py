"""Benchmarks of single blocks: ``pytest benchmarks --benchmark-only`` (2 to 3 minutes on 2 cores)."""

from resnet_fast.measure import environment


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["resnet_fast"] = environment()
