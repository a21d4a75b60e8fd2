"""Benchmarks of single blocks: ``OMP_PROC_BIND=true pytest benchmarks --benchmark-only`` (see `resnet-fast bench -h`)."""

from resnet_fast.measure import environment


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["resnet_fast"] = environment()
