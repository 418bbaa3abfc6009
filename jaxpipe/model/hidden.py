"""Looks for flax modules with weights that a callable hides: their weights would be frozen, without a word.

It looks into bound methods, `functools.partial`, closures, defaults, attributes, and the global names that a function uses.
"""

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from flax import linen, nnx

_METHOD = "a bound method"


def find_built(value: Any) -> tuple[Any, str] | None:
    """A module with weights that a callable holds, and how it does; None if there is none."""
    todo: list[tuple[Any, str]] = [(value, "")]
    seen: set[int] = set()
    kept: list[Any] = []  # so that no id is used twice
    while todo:
        here, how = todo.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        kept.append(here)
        # A linen module without weights may be used by a function; a method of it is meant to be the layer.
        if isinstance(here, nnx.Module) or (
            isinstance(here, linen.Module) and (here.scope is not None or how.endswith(_METHOD))
        ):
            return here, how
        todo += [(part, name if not how else f"{how}, {name}") for part, name in _held(here)]
    return None


def _held(value: Any) -> Iterator[tuple[Any, str]]:
    """What a callable or a container holds, with a word for each."""
    if isinstance(value, types.MethodType):
        yield value.__self__, _METHOD
        yield value.__func__, _METHOD
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield part, "in a functools.partial"
    elif isinstance(value, types.FunctionType):
        yield from _used_by_function(value)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for part in value:
            yield part, "in a container"
    elif isinstance(value, dict):
        for part in value.values():
            yield part, "in a container"
    elif callable(value) and not inspect.isclass(value):
        yield getattr(value, "__wrapped__", None), "a wrapped function"
        for name, part in getattr(value, "__dict__", {}).items():
            yield part, f"its attribute {name!r}"


def _used_by_function(function: types.FunctionType) -> Iterator[tuple[Any, str]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield cell.cell_contents, f"as {name!r}"
        except ValueError:  # not bound yet
            continue
    for part in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield part, "in a default"
    yield from ((part, "a wrapped function") for part in function.__dict__.values())
    for name in _global_names(function.__code__):
        part = function.__globals__.get(name)
        # Functions of a program use each other; only what is a module itself, or a method of one, is looked at.
        if isinstance(getattr(part, "__self__", part), (nnx.Module, linen.Module)):
            yield part, f"as {name!r}"


def _global_names(code: types.CodeType) -> set[str]:
    names = {line.argval for line in dis.get_instructions(code) if line.opname == "LOAD_GLOBAL"}
    inner: list[types.CodeType] = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return names.union(*map(_global_names, inner))
