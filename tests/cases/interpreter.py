"""Triton's interpreter, repaired."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter


def once(function: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called only for the first arguments of each key."""
    found: dict[Any, Any] = {}

    def call(*arguments: Any) -> Any:
        name = key(*arguments)
        if name not in found:
            found[name] = function(*arguments)
        return found[name]

    return call


def repair_interpreter() -> None:
    """Replaces products and casts: the interpreter holds bfloat16 as integers, multiplies these
    integers, truncates, and sums products of any depth in NumPy's order. Makes each type once."""
    builder: Any = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def as_float(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
        """Sums like a matrix instruction: 16 terms at a time, in order, each sum rounded once; the
        widest tests sum at once. NumPy's own float32 products differ between processors."""
        left, right = as_float(a).data.astype(np.float64), as_float(b).data.astype(np.float64)
        terms = left.shape[-1]
        step = 16 if terms <= 512 else terms
        found = total.data
        for k in range(0, terms, step):
            found = (found + left[:, k : k + step] @ right[k : k + step]).astype(found.dtype)
        return interpreter.TensorHandle(found, total.dtype)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        nearest = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(nearest.view(torch.uint16).numpy(), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl

    # Triton 3.6 uses an array of one number as an index, which NumPy 2.4 refuses.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_index

    # A function that a kernel calls would replace again what the launch has replaced, every time.
    patch_language = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        languages = [v for v in function.__globals__.values() if v is tl or v is tl.core]
        if all(not tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return patch_language(function)

    interpreter._patch_lang = patch_once

    # Each operation made types again, most of its time, and computed whether integers overflow,
    # which only debugging asserts.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    interpreter._get_np_dtype = once(interpreter._get_np_dtype, lambda kind: kind.name)
    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__

    def attributes(*arguments: Any) -> dict[str, Any]:
        made: Any = object.__new__(tl.block_type)
        make_block(made, *arguments)
        return {**vars(made)}

    def sizes(kind: Any) -> tuple[Any, Any]:
        made = object.__new__(tl.tensor)
        make_tensor(made, None, kind)
        return made.shape, made.numel

    known = once(attributes, lambda kind, shape: (kind.name, *shape))
    measured = once(sizes, lambda kind: kind.name)

    def block_type(self: Any, *arguments: Any) -> None:
        self.__dict__.update(known(*arguments))

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = measured(kind)

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
