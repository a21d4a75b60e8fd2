"""The ways to run a ResNet that this package is measured against, each with the same weights, images and threads.

A peer's ``prepare`` takes a Subject and returns a call without arguments, which runs the model once on the subject's
images and returns the logits. Engines with a thread pool of their own get as many threads as torch has.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from ..choose import onednn_runs

Call = Callable[[], Tensor]
OURS = "resnet_fast"


@dataclass(frozen=True)
class Subject:
    """What all peers run: a model's weights of one dtype, and images [N, 3, H, W] of that dtype on a device."""

    model: str
    state: dict[str, Tensor]
    images: Tensor

    def ours(self) -> nn.Module:
        """This package's model, in eval mode, a new one at every call."""
        from .. import models

        return self._build(models)

    def stock(self) -> nn.Module:
        """torchvision's model, in eval mode, a new one at every call."""
        from torchvision import models

        return self._build(models)

    def _build(self, library: ModuleType) -> nn.Module:
        with torch.device("meta"):  # no random initialisation
            model = getattr(library, self.model)(weights=None)
        model.load_state_dict({k: v.to(self.images.device, copy=True) for k, v in self.state.items()}, assign=True)
        return model.eval()


@dataclass(frozen=True)
class Prepared:
    """A call, and what a reader of its time should know ("computes in float32")."""

    call: Call
    note: str = ""


@dataclass(frozen=True)
class Peer:
    """One way to run a model. ``packages`` are what it needs beside torch; ``compiled`` ones take long to prepare."""

    name: str
    device: str
    prepare: Callable[[Subject], Prepared]
    packages: tuple[str, ...] = ()
    compiled: bool = False

    def absent(self) -> str:
        """Which package is missing; empty if none is."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"absent: {', '.join(missing)} not installed" if missing else ""


# torch


def _channels_last(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    return model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)


def _eager(model: nn.Module, x: Tensor) -> Prepared:
    return Prepared(lambda: model(x))


def _ours(subject: Subject) -> Prepared:
    return _eager(subject.ours(), subject.images)


def _ours_optimized(subject: Subject) -> Prepared:
    from ..inference import optimize_for_inference

    dtype = subject.images.dtype
    return _eager(optimize_for_inference(subject.stock(), subject.images, dtype), subject.images)


def _ours_channels_last(subject: Subject) -> Prepared:
    return _eager(*_channels_last(subject.ours(), subject.images))


def _torch(subject: Subject) -> Prepared:
    return _eager(subject.stock(), subject.images)


def _torch_channels_last(subject: Subject) -> Prepared:
    return _eager(*_channels_last(subject.stock(), subject.images))


def _compiled(mode: str) -> Callable[[Subject], Prepared]:
    def prepare(subject: Subject) -> Prepared:
        model, x = _channels_last(subject.stock(), subject.images)
        return _eager(torch.compile(model, mode=mode), x)

    return prepare


def _frozen(subject: Subject) -> Prepared:
    import torch._inductor.config as inductor

    model, x = _channels_last(subject.stock(), subject.images)
    # Named as an option too, since Dynamo would otherwise take the graph of plain torch.compile for this one's.
    model = torch.compile(model, options={"freezing": True})

    def call() -> Tensor:
        with inductor.patch(freezing=True):
            return model(x)

    return Prepared(call)


def graphed(call: Call) -> Call:
    """The same work as a replayed CUDA graph: no Python and no gaps between launches. The output is overwritten."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def _graphed(prepare: Callable[[Subject], Prepared]) -> Callable[[Subject], Prepared]:
    return lambda subject: Prepared(graphed(prepare(subject).call))


# Engines for the CPU


@contextlib.contextmanager
def _on_all_cores() -> Iterator[None]:
    """With OMP_PROC_BIND this thread sits on one core, and a pool of another engine's would be born onto it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    here = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        yield
    finally:
        os.sched_setaffinity(0, here)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Converters write to the terminal, some of them from C++ or from a process of their own."""
    saved = [os.dup(stream) for stream in (1, 2)]
    with open(os.devnull, "w") as null, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for stream in (1, 2):
            os.dup2(null.fileno(), stream)
        try:
            yield
        finally:
            for stream, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, stream)
                os.close(copy)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _openvino(subject: Subject) -> Prepared:
    import openvino

    # By itself it takes bfloat16 where the CPU has instructions for it; told to, it emulates them, 3 times as slowly as
    # in float32 (2 Cascade Lake cores).
    dtype = subject.images.dtype if onednn_runs(subject.images.dtype) else torch.float32
    hint = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    images = subject.images.float().numpy()
    options = {
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": hint,
    }  # fmt: skip
    with _on_all_cores(), _quiet():
        converted = openvino.convert_model(subject.stock().float(), example_input=subject.images.float())
        request = openvino.Core().compile_model(converted, "CPU", options).create_infer_request()
        request.infer([images])  # starts its threads
    precision = request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT").get_type_name()
    used = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}.get(precision, precision)

    def call() -> Tensor:
        return torch.from_numpy(request.infer([images], share_inputs=True, share_outputs=True)[0])

    return Prepared(call, "" if used == _name(subject.images.dtype) else f"computes in {used}")


def _onnxruntime(subject: Subject) -> Prepared:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with _on_all_cores(), _quiet(), tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        torch.onnx.export(subject.stock(), (subject.images,), dynamo=True, verbose=False).save(path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    # Through a binding, since numpy has no bfloat16.
    tensors = subject.images.contiguous(), torch.empty(len(subject.images), 1000, dtype=subject.images.dtype)
    element = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}[subject.images.dtype]  # as in ONNX's enum
    binding = session.io_binding()
    binds = (binding.bind_input, session.get_inputs()[0]), (binding.bind_output, session.get_outputs()[0])
    for (bind, node), tensor in zip(binds, tensors, strict=True):
        bind(node.name, "cpu", 0, element, tuple(tensor.shape), tensor.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return tensors[1]  # and so the input stays alive too

    return Prepared(call)


def _ncnn(subject: Subject) -> Prepared:
    import ncnn
    import numpy
    import pnnx

    dtype, x = subject.images.dtype, subject.images.float().contiguous()
    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_vulkan_compute = False
    half, brain = dtype == torch.float16, dtype == torch.bfloat16
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = half
    net.opt.use_bf16_packed = net.opt.use_bf16_storage = brain
    with _on_all_cores(), _quiet(), tempfile.TemporaryDirectory() as folder:
        pnnx.export(subject.stock().float(), os.path.join(folder, "m.pt"), (x[:1],), fp16=False)
        net.load_param(os.path.join(folder, "m.ncnn.param"))
        net.load_model(os.path.join(folder, "m.ncnn.bin"))
    images = [ncnn.Mat(image.numpy()).clone() for image in x]  # a Mat only borrows the array's memory

    def one(image: ncnn.Mat) -> numpy.ndarray:
        extractor = net.create_extractor()
        extractor.input("in0", image)
        return numpy.array(extractor.extract("out0")[1])

    def call() -> Tensor:
        return torch.from_numpy(numpy.stack([one(image) for image in images]))

    note = "one image at a time" if len(x) > 1 else ""
    return Prepared(call, note)


# Engines for CUDA


def _tensorrt(subject: Subject) -> Prepared:
    import torch_tensorrt

    model, x = _channels_last(subject.stock(), subject.images)
    compiled = torch_tensorrt.compile(model, ir="dynamo", inputs=[x], enabled_precisions={x.dtype})
    return _eager(compiled, x)


def _jax(subject: Subject) -> Prepared:
    from .jax_resnet import prepare

    return Prepared(prepare(subject.stock(), subject.images))


PEERS = (
    Peer(OURS, "cpu", _ours_optimized),
    Peer(f"{OURS} module", "cpu", _ours),
    Peer("torch", "cpu", _torch),
    Peer("torch channels_last", "cpu", _torch_channels_last),
    Peer("torch.compile", "cpu", _compiled("default"), compiled=True),
    Peer("torch.compile freezing", "cpu", _frozen, compiled=True),
    Peer("openvino", "cpu", _openvino, ("openvino",)),
    Peer("onnxruntime", "cpu", _onnxruntime, ("onnxruntime", "onnx", "onnxscript")),
    Peer("ncnn", "cpu", _ncnn, ("ncnn", "pnnx")),
    Peer(OURS, "cuda", _ours_channels_last),
    Peer(f"{OURS} contiguous", "cuda", _ours),
    Peer(f"{OURS} CUDA graph", "cuda", _graphed(_ours_channels_last)),
    Peer("torch", "cuda", _torch),
    Peer("torch channels_last", "cuda", _torch_channels_last),
    Peer("torch channels_last CUDA graph", "cuda", _graphed(_torch_channels_last)),
    Peer("torch.compile", "cuda", _compiled("default"), compiled=True),
    Peer("torch.compile reduce-overhead", "cuda", _compiled("reduce-overhead"), compiled=True),
    Peer("torch.compile max-autotune", "cuda", _compiled("max-autotune"), compiled=True),
    Peer("tensorrt", "cuda", _tensorrt, ("torch_tensorrt",), compiled=True),
    Peer("jax", "cuda", _jax, ("jax",), compiled=True),
)


def peers(device: str) -> dict[str, Peer]:
    """All peers on a device ("cpu" or "cuda") by name, this package first."""
    return {peer.name: peer for peer in PEERS if peer.device == device}
