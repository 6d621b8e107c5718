"""The library of device.cpp, loaded before PyTorch has looked for a GPU."""

import ctypes
import importlib.util
import os
from pathlib import Path

spec = importlib.util.find_spec("torch")
assert spec is not None
assert spec.origin is not None
for name in ("libc10.so", "libtorch_cpu.so"):
    ctypes.CDLL(f"{Path(spec.origin).parent / 'lib' / name}", mode=ctypes.RTLD_GLOBAL)
library = ctypes.CDLL(os.environ["HOST_CUDA"], mode=ctypes.RTLD_GLOBAL)
library.graph_new.restype = ctypes.c_void_p
