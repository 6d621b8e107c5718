"""What Triton hands to CUDA in each launch, recorded without a GPU.

Triton compiles for an H100, and binds and launches by its own driver, which calls recorder.c in
place of libcuda.
"""

import ctypes
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import triton
from numpy.typing import NDArray

SOURCE = Path(__file__).with_name("recorder.c")
LAUNCH = np.dtype([
    ("function", "u8"), ("grid", "u4", 3), ("threads", "u4", 3), ("shared", "u4"),
    ("parameters", "u4"), ("values", "u8", 128),
])  # fmt: skip
LAUNCHES = 256


class Recorder:
    """The driver of this process's launches, from now on."""

    def __init__(self) -> None:
        # Triton 3.6 links a launcher of each kernel with the library.
        self._folder = tempfile.TemporaryDirectory()
        # The name by which the driver finds what this process has loaded already.
        library = f"{self._folder.name}/libcuda.so.1"
        include = Path(triton.__file__).parent / "backends/nvidia/include"
        flags = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
        subprocess.run([os.environ.get("CC", "cc"), *flags, SOURCE, "-o", library], check=True)
        self._library = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        os.environ["TRITON_LIBCUDA_PATH"] = self._folder.name
        triton.runtime.driver.set_active(self._driver())
        self._recording = ctypes.c_int.in_dll(self._library, "recording")
        self._launched = ctypes.c_int.in_dll(self._library, "launched")
        memory = (ctypes.c_char * (LAUNCH.itemsize * LAUNCHES)).in_dll(self._library, "launches")
        self._launches: NDArray[Any] = np.frombuffer(memory, LAUNCH)

    def launches(self, call: Callable[[], object]) -> NDArray[Any]:
        """The launches of a call, each as one number of LAUNCH."""
        self._launched.value, self._recording.value = 0, 1
        try:
            call()
        finally:
            self._recording.value = 0
        return self._launches[: self._launched.value].copy()

    def _driver(self) -> Any:
        from triton.backends.nvidia.driver import CudaDriver

        driver: Any = CudaDriver()
        driver.get_current_device = lambda: 0
        driver.get_current_stream = lambda device: 0
        driver.get_device_capability = lambda device: (9, 0)
        load = driver.utils.load_binary

        def load_binary(name: str, image: bytes, *rest: Any) -> Any:
            loaded = load(name, image, *rest)
            sizes = parameter_sizes(image, name)
            array = (ctypes.c_uint32 * len(sizes))(*sizes)
            self._library.declare(ctypes.c_void_p(loaded[1]), len(sizes), array)
            return loaded

        driver.utils.load_binary = load_binary
        return driver


def parameter_sizes(cubin: bytes, name: str) -> list[int]:
    """The bytes of each parameter of the kernel, from the records of its .nv.info section."""
    sizes = {}
    for record in re.finditer(rb"\x04\x17\x0c\x00(.{12})", section(cubin, name), re.DOTALL):
        _, number, _, flags = struct.unpack("<IHHI", record[1])
        sizes[number] = flags >> 18
    assert sorted(sizes) == list(range(len(sizes))), sizes
    return [sizes[i] for i in range(len(sizes))]


def section(elf: bytes, kernel: str) -> bytes:
    """The .nv.info section of a kernel."""
    (headers,) = struct.unpack_from("<Q", elf, 40)
    count, names = struct.unpack_from("<HH", elf, 60)
    found = [struct.unpack_from("<I20xQQ", elf, headers + 64 * i) for i in range(count)]
    for name, offset, size in found:
        start = found[names][1] + name
        if elf[start : elf.index(b"\0", start)].decode() == f".nv.info.{kernel}":
            return elf[offset : offset + size]
    raise ValueError(f"kernel {kernel} is not in the binary")
