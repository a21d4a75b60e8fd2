"""Peak memory of a peer, from a process in which it is alone."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import tempfile

import torch

from .peers import Peer, Subject, peers

_TIMEOUT = 600.0


def measure(subject: Subject, peer: Peer) -> dict[str, float]:
    """Megabytes of a child process that prepares and runs the peer alone.

    ``peak_rss_mb`` is the largest resident size of its whole life, conversion and compilation included,
    ``running_rss_mb`` the largest during calls afterwards (both with Python and torch), ``device_mb`` the most that
    torch had allocated on a CUDA device.

    Raises:
        RuntimeError: the process failed; with its last line.
        subprocess.TimeoutExpired: it took more than 10 minutes.
    """
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save({"model": subject.model, "state": subject.state, "images": subject.images.cpu()}, file.name)
        command = [sys.executable, "-m", __name__, file.name, subject.images.device.type, peer.name]
        command.append(str(torch.get_num_threads()))
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def _status(field: str) -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _forget_peak() -> None:
    """Gives freed memory back to the system and sets its record of the largest size to the present one."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


@torch.no_grad()
def _child(path: str, device: str, name: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    parts = torch.load(path, mmap=True)
    subject = Subject(parts["model"], parts["state"], parts["images"].to(device))
    call = peers(device)[name].prepare(subject).call
    del parts, subject
    call()
    peak = _status("VmHWM")
    _forget_peak()
    call()
    found = {"peak_rss_mb": max(peak, _status("VmHWM")), "running_rss_mb": _status("VmHWM")}
    if device == "cuda":
        found["device_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return found


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
