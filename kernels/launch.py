"""Repeated launches of a Triton kernel, without a new binding of its arguments.

Triton looks at all arguments of each launch to find the compiled kernel. That is half of the time
of a short call, and gives the same kernel each time if nothing that Triton looks at has changed.
"""

from typing import Any, NamedTuple

import torch
from triton import knobs, runtime
from triton.tools.tensor_descriptor import TensorDescriptor


class Launch:
    """A kernel with its grid, integers and constants. The signature has them in this order:

        descriptors, pointers and floats, integers, constants (tl.constexpr)

    Pointers of all calls must have the same dtypes and alignment to 16 bytes, or be None.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        device: torch.device,
        integers: tuple[int, ...],
        constants: dict[str, Any],
        warps: int,
        stages: int,
    ) -> None:
        self.kernel, self.grid = kernel, grid
        self.device = device.index if device.type == "cuda" else None
        self.integers, self.constants = integers, constants
        self.options = {"num_warps": warps, "num_stages": stages}
        self.last = (*integers, *constants.values())
        self.compiled: Any = None

    def __call__(self, *pointers_and_floats: Any) -> None:
        if self.device is not None and self.device != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self._launch(pointers_and_floats)
        else:
            self._launch(pointers_and_floats)

    def _launch(self, first: tuple[Any, ...]) -> None:
        compiled = self.compiled
        if compiled is None:  # the interpreter returns None each time
            self.compiled = self.kernel[self.grid](
                *first, *self.integers, **self.constants, **self.options
            )
        elif hooked(knobs.runtime.launch_enter_hook) or hooked(knobs.runtime.launch_exit_hook):
            compiled[self.grid](*first, *self.last)
        else:
            driver = runtime.driver.active
            stream = driver.get_current_stream(driver.get_current_device())
            compiled.run(
                *self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *first, *self.last,
            )  # fmt: skip


def hooked(hook: Any) -> bool:
    """True if a profiler wants to see each launch: hook is a chain of functions, or one."""
    return bool(getattr(hook, "calls", hook))


def aligned(*tensors: torch.Tensor | None) -> tuple[bool, ...]:
    """Returns the part of tensors that Triton compiles for and that shapes and strides lack."""
    return tuple([x is None or x.data_ptr() % 16 == 0 for x in tensors])


class Layout(NamedTuple):
    """Shape, strides and dtype of a tensor: what a launch needs of it besides its address."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def models(self) -> tuple[int, int, int]:
        """Returns the shape of a matrix with the axis of models."""
        E, rows, columns = self.shape if len(self.shape) == 3 else (1, *self.shape)
        return E, rows, columns

    @property
    def strides(self) -> tuple[int, ...]:
        """Returns the strides of a matrix with the axis of models."""
        return self.stride if len(self.stride) == 3 else (0, *self.stride)

    @property
    def aligned(self) -> bool:
        """True if 16-byte loads can read the rows, as Triton's specialization has it."""
        return self.stride[-1] == 1 and all(s % 16 == 0 for s in self.stride[:-1])

    @property
    def apart(self) -> bool:
        """True if no rows overlap, as descriptors need."""
        return self.stride[-2] >= self.shape[-1]

    def expanded(self, *shape: int) -> tuple[int, ...]:
        """Returns the strides of a tensor expanded to this shape."""
        own = (1,) * (len(shape) - len(self.shape)) + tuple(self.shape)
        assert all(a in (1, b) for a, b in zip(own, shape, strict=True)), (self, shape)
        strides = (0,) * (len(shape) - len(self.shape)) + self.stride
        return tuple(s if a == b else 0 for s, a, b in zip(strides, own, shape, strict=True))


def descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Returns what a Hopper GPU's copy engine needs to read tiles of a matrix: 0 past its ends."""
    # A view would forget the stride of a single row.
    return TensorDescriptor.from_tensor(x if x.ndim == 2 else x[0], [rows, columns])


Key = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def key(x: torch.Tensor) -> Key:
    """Returns the fields of a Layout, in less time."""
    return x.shape, x.stride(), x.dtype
