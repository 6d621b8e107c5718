"""A CUDA device that is the host, for the part of the package that only a GPU runs.

device.cpp has its tensors. Here are torch.cuda, CUDA graphs, and NCCL by gloo. Triton's interpreter
computes the kernels, and all streams are one.
"""

import contextlib
import ctypes
import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from device import library

INDEX = int(os.environ.get("LOCAL_RANK", "0"))
DEVICES = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
MEMORY = 8 << 30


def constant(value: object) -> Any:
    def function(*_: object, **__: object) -> object:
        return value

    return function


class Stream:
    cuda_stream = 0
    wait_stream = wait_event = synchronize = constant(None)
    query = constant(True)

    def __init__(self, *_: object, **__: object) -> None:
        self.device = torch.device("cuda", INDEX)

    def record_event(self, event: object = None) -> object:
        return event or Event()


class Event:
    record = wait = synchronize = constant(None)
    query = constant(True)
    elapsed_time = constant(1.0)

    def __init__(self, **_: object) -> None:
        pass


class CUDAGraph:
    """What was called while it was captured, to be called again on the same memory."""

    def __init__(self, **_: object) -> None:
        self.handle = ctypes.c_void_p(library.graph_new())
        self.kernels: list[Any] = []

    def __del__(self) -> None:
        library.graph_delete(self.handle)

    def replay(self) -> None:
        position = ctypes.c_int(0)
        while (kernel := library.graph_replay(self.handle, ctypes.byref(position))) >= 0:
            self.kernels[kernel]()


class Capture:
    """torch.cuda.graph."""

    graph: CUDAGraph | None = None  # that is captured now

    def __init__(self, cuda_graph: CUDAGraph, **_: object) -> None:
        self.own = cuda_graph

    def __enter__(self) -> None:
        Capture.graph = self.own
        library.graph_resume(self.own.handle)

    def __exit__(self, *_: object) -> None:
        Capture.graph = None
        library.graph_end(self.own.handle)


VALUES = {
    "_lazy_init _check_capability set_device synchronize empty_cache reset_peak_memory_stats": None,
    "is_initialized is_available _is_compiled is_bf16_supported": True,
    "device_count": DEVICES,
    "current_device _exchange_device _maybe_exchange_device": INDEX,
    "memory_allocated max_memory_allocated": 1 << 20,
    "get_device_capability": (9, 0),
    "get_device_properties": SimpleNamespace(
        multi_processor_count=132, total_memory=MEMORY, major=9, minor=0
    ),
    "get_device_name": "host",
    "mem_get_info": (MEMORY, MEMORY),
    "current_stream default_stream": Stream(),
    "stream": contextlib.nullcontext(),
}


def install() -> None:
    """Makes this process have the device."""
    install_functions()
    install_storages()
    if dist.is_available():
        install_nccl()
    if importlib.util.find_spec("triton"):
        install_kernels()


def install_functions() -> None:
    cuda: Any = torch.cuda
    cuda._initialized = True
    for names, value in VALUES.items():
        for name in names.split():
            setattr(cuda, name, constant(value))
    cuda.Stream, cuda.Event, cuda.CUDAGraph, cuda.graph = Stream, Event, CUDAGraph, Capture
    cuda.default_generators = (torch.Generator(f"cuda:{INDEX}"),) * DEVICES
    c: Any = torch._C
    c._cuda_getCurrentRawStream = constant(0)
    c._cuda_getDeviceCount, c._cuda_getDevice = constant(DEVICES), constant(INDEX)


def install_storages() -> None:
    """What PyTorch computes of a storage only where it is built for its device."""
    storage: Any = torch.UntypedStorage
    resize, clone = storage.resize_, storage.clone

    def resized(self: Any, size: int) -> Any:
        if self.device.type != "cuda":
            return resize(self, size)
        library.storage_resize(ctypes.c_void_p(self._cdata), ctypes.c_size_t(size))
        return self

    def copied(self: Any) -> Any:
        made = torch.empty(self.nbytes(), dtype=torch.uint8, device="cuda").untyped_storage()
        return made.copy_(self)

    storage.resize_ = resized
    storage.clone = lambda self: (copied if self.device.type == "cuda" else clone)(self)
    torch.serialization.register_package(  # for torch.load
        5,
        lambda self: f"cuda:{INDEX}" if self.device.type == "cuda" else None,
        lambda self, location: copied(self) if location.startswith("cuda") else None,
    )


def install_nccl() -> None:
    """NCCL by gloo, which device.cpp calls with the same memory."""
    module: Any = dist.distributed_c10d

    class ProcessGroupNCCL(dist.ProcessGroupGloo):
        class Options:
            is_high_priority_stream = False

        def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
            super().__init__(store, rank, size, options._timeout)

    module._NCCL_AVAILABLE, module.ProcessGroupNCCL = True, ProcessGroupNCCL


def install_kernels() -> None:
    """Interpreted kernels become parts of a captured graph."""
    from cases.interpreter import repair_interpreter
    from triton.runtime import interpreter

    repair_interpreter()
    run: Any = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        graph = Capture.graph
        if graph is None:
            run(self, *args, **kwargs)
            return
        library.graph_pause()  # the interpreter's own operators
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Tensor):
                memory, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
                library.graph_keep(graph.handle, ctypes.c_void_p(memory), ctypes.c_size_t(size))
        library.graph_kernel(graph.handle, len(graph.kernels))
        graph.kernels.append(lambda: run(self, *args, **kwargs))
        run(self, *args, **kwargs)
        library.graph_resume(graph.handle)

    interpreter.GridExecutor.__call__ = call  # type: ignore[method-assign]
