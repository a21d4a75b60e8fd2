"""Benchmarks of single blocks: ``OMP_PROC_BIND=true pytest benchmarks --benchmark-only``, about 2 minutes on 2 cores.

Why OMP_PROC_BIND: `resnet-fast bench --help`.
"""

from resnet_fast.measure import environment


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["resnet_fast"] = environment()
