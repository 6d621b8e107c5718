"""How tyro reads the flags of a command, and what its help and errors call their values."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from fastmem.base.arguments import user_path

REGISTRY = ConstructorRegistry()
_READ = "fastmem: tyro's own rule reads this dataclass"


@contextmanager
def named(argument: str, flag: str) -> Iterator[None]:
    """Errors of a function that start with its argument start with the flag that gave it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(rf"^{argument}\b", flag, str(error))) from None


@REGISTRY.primitive_rule
def _path_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """A path with ~ expanded, which bash leaves as it is in --out=~/x."""
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: user_path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


@REGISTRY.struct_rule
def _dataclass_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A dataclass as tyro reads it, with the fields of `_plain`. Suppressed fields are left out,
    which tyro's completion would offer."""
    if not is_dataclass(info.type) or _READ in info.markers:
        return None
    info = replace(info, markers=(*info.markers, _READ))
    spec = ConstructorRegistry.get_struct_spec(info)
    assert isinstance(spec, StructConstructorSpec)
    fields = [f for f in spec.fields if tyro.conf.Suppress not in get_args(f.type)]
    return replace(spec, fields=tuple(map(_plain, fields)))


def _plain(field: StructFieldSpec) -> StructFieldSpec:
    """A field whose help and errors have values as a user types them: None is only a default, and
    the type of several values is `INT ...`."""
    kind, *marks = get_args(field.type) if get_origin(field.type) is Annotated else (field.type,)
    union = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    specs = [_spec(one) for one in union if one is not NoneType]
    if None not in specs and kind is not bool:
        marks.append(_either([spec for spec in specs if spec]))
    marks.append(tyro.conf.arg(help_behavior_hint=_default))
    text = field.helptext() if callable(field.helptext) else field.helptext
    helptext = " ".join((text or "").split())
    return replace(field, type=Annotated[(kind, *marks)], helptext=helptext)  # type: ignore[arg-type]


def _default(value: str) -> str:
    return "" if value in ("", "None") else f"(default: {value})"


def _spec(kind: Any) -> PrimitiveConstructorSpec[Any] | None:
    """How tyro reads a value of this type; None for a dataclass."""
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, set()))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    if get_origin(kind) is tuple and (one := _spec(get_args(kind)[0])):
        return replace(spec, metavar=f"{one.metavar} ...")
    return spec


def _either(specs: list[PrimitiveConstructorSpec[Any]]) -> PrimitiveConstructorSpec[Any]:
    """Reads a value as the first of these that takes it."""
    metavar = "|".join(spec.metavar for spec in specs)

    def read(words: list[str]) -> Any:
        for spec in specs:
            if spec.choices is None or {*words} <= {*spec.choices}:
                with suppress(ValueError):
                    return spec.instance_from_str(words)
        raise ValueError(f"takes {metavar}, not {', '.join(map(repr, words))}")

    def words_of(value: Any) -> list[str]:
        return next((s.str_from_instance(value) for s in specs if s.is_instance(value)), [])

    return PrimitiveConstructorSpec(
        nargs=specs[0].nargs if len(specs) == 1 else "*",
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: any(spec.is_instance(value) for spec in specs),
        str_from_instance=words_of,
        choices=specs[0].choices if len(specs) == 1 else None,
    )
