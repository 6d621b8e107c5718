"""Checks of arguments: each gives a plain Python value, or an error with the fix."""

import math
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from types import UnionType

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

MAX_WORD = 2**64 - 1


def integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int; ValueError unless `value` is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(
            f"{name} must be an integer from {low} to {high}, got {value!r} "
            f"({type(value).__name__}); pass an int"
        )
    number = int(value)
    if not low <= number <= high:
        raise ValueError(
            f"{name} must be from {low} to {high}, got {number}; choose one in these limits"
        )
    return number


def number(name: str, value: object) -> float:
    """`value` as a float; ValueError unless `value` is a real number. The caller checks limits."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(
            f"{name} must be a number, got {value!r} ({type(value).__name__}); pass a float"
        )
    try:
        return float(value)
    except OverflowError:  # an int above the largest float
        return math.inf if value > 0 else -math.inf


def plain_numbers(config: object) -> None:
    """Makes NumPy's scalars in a frozen dataclass Python's, which JSON and checkpoints hold."""
    for name, value in vars(config).items():
        if isinstance(value, np.generic):
            object.__setattr__(config, name, value.item())


def check_axis(name: str, values: object, kind: type | UnionType) -> None:
    """ValueError unless `values` are one or more different values of type `kind`, none a bool."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise ValueError(f"{name} needs a tuple of values, not {values!r}: give ({values!r},)")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, kind):
            wanted = getattr(kind, "__name__", kind)
            raise ValueError(f"{name} needs values of type {wanted}, not {value!r} in {values!r}")
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{name} needs one or more different values, not {values}")


def numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """`values` as an array of floats; ValueError unless they are numbers."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{name} must be numbers, got {reprlib.repr(values)} ({type(values).__name__}); pass a "
            "list of floats"
        ) from None


def user_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path, in which the home directory replaces a leading ~.

    Raises:
        ValueError: `path` is neither a str nor a Path.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(
            f"a path must be a str or a Path, got {type(path).__name__}; fastmem.from_array makes "
            "a data set of tokens in memory"
        )
    return Path(os.path.expanduser(path))  # Path alone makes ./~ a home


def threads_or_all(threads: int | None) -> int:
    """`threads`, checked; None becomes the number of cores that this process may use."""
    if threads is not None:
        return integer("threads", threads, 1, MAX_WORD)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def array_length(places: range) -> int:
    """The number of places; ValueError if an array cannot have an entry for each place."""
    try:
        return len(places)
    except OverflowError:
        raise ValueError(
            f"{places.start} to {places.stop} is more than one array can hold; take smaller parts"
        ) from None


def checked_device(device: str | torch.device | None, meta: bool = False) -> torch.device:
    """`device` as a torch.device, None as torch's default device; ValueError if unavailable, or if
    it is meta and `meta` False."""
    try:
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type == "meta" and not meta:
            raise ValueError("device meta holds shapes, not numbers: try --device cpu")
        if device.type != "meta":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of "):
            reason = "PyTorch does not know this name"
        raise ValueError(
            f"device {device or 'by default'} is unavailable ({reason}): try --device cpu"
        ) from None
    return device
