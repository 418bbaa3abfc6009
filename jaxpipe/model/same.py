"""Structural equality: do two values compute the same inside a traced function?

The answer may err on one side only. A false "no" costs memory and compile time (the layers are not stacked); a false
"yes" would compute with the wrong function. So nobody's `==` is asked: it may ignore a field, and it takes 1 for True and
0.0 for -0.0. Two values are the same if they are one object, or if they are of one type and everything that makes them up
is the same, in the same order: items of containers, code, defaults, closures and attributes of functions, attributes and
slots of objects. What cannot be taken apart so that nothing is left over (arrays, which may also change later; objects of
C extensions; objects of classes without fields, which are marks) is the same as itself only. (One thing is not seen: an
object with fields, or one that is called, which code also looks up by what it is, in a table by `id`.)

Values may contain themselves. A pair that is being compared is taken for the same meanwhile, which is right, because one
difference anywhere decides the whole.
"""

import functools
import struct
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# A value taken apart: a plain token to be compared as it is, and the values that are to be compared in turn.
Parts = tuple[Any, list[Any]] | None

_POINTER = struct.calcsize("P")
# Immutable, and compared completely by their own `==`.
_OF_JAX = (np.dtype, jax.sharding.Mesh, jax.sharding.PartitionSpec, jax.sharding.NamedSharding)

_opened: dict[type, Callable[[Any], dict[str, Any]]] = {}


def open_with(kind: type, attributes: Callable[[Any], dict[str, Any]]) -> None:
    """Tells how to take apart objects of `kind` (and of its subclasses) that also hold what plays no part."""
    _opened[kind] = attributes


def same_value(a: Any, b: Any) -> bool:
    """Whether `a` and `b` can stand for each other inside a traced function."""
    todo = [(a, b)]
    seen: dict[tuple[int, int], Any] = {}  # holds on to what it has seen, so that no id is used twice
    while todo:
        one, other = todo.pop()
        pair = id(one), id(other)
        if one is other or pair in seen:
            continue
        if type(one) is not type(other):
            return False
        seen[pair] = one, other
        if isinstance(one, _OF_JAX):
            if one != other:
                return False
            continue
        first, second = _parts(one), _parts(other)
        if first is None or second is None or first[0] != second[0] or len(first[1]) != len(second[1]):
            return False
        todo += zip(first[1], second[1], strict=True)
    return True


def _parts(value: Any) -> Parts:
    """What a value is made of; None if that cannot be told."""
    if isinstance(value, np.generic):
        return (value.dtype.str, value.tobytes()), [] if isinstance(value, (np.number, np.bool_)) else [object()]
    if isinstance(value, types.FunctionType):
        return _function(value)
    if isinstance(value, types.MethodType):
        return None, [value.__self__, value.__func__]
    if isinstance(value, types.BuiltinFunctionType):
        bound = value.__self__
        return value.__qualname__, [] if bound is None else [bound]
    if isinstance(value, functools.partial):
        return None, [value.func, value.args, value.keywords, *_attributes(value, functools.partial)]
    if isinstance(value, (type, types.ModuleType)) or hasattr(type(value), "__array__"):
        return None
    for kind, attributes in _opened.items():
        if isinstance(value, kind):
            return None, [attributes(value)]
    return _object(value)


def _function(value: types.FunctionType) -> Parts:
    try:
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
    except ValueError:  # an empty cell: the function refers to a name that is not bound yet
        return None
    # The code and the globals must be the very same objects; what a function wraps is one of its attributes.
    identity = id(value.__code__), id(value.__globals__), value.__name__, value.__qualname__
    return identity, [*cells, value.__defaults__, value.__kwdefaults__, value.__dict__]


def _base(kind: type) -> type:
    """The type in C that an object's class is built on."""
    return next(base for base in kind.__mro__ if base in _BASES or not _is_written_in_python(base))


def _is_written_in_python(kind: type) -> bool:
    return kind.__module__ != "builtins" and bool(kind.__flags__ & (1 << 9))  # Py_TPFLAGS_HEAPTYPE


def _floats(value: complex) -> bytes:
    """All bits: -0.0 is not 0.0, and one NaN is like another of the same bits."""
    return struct.pack("<2d", value.real, value.imag)


def _in_order(value: Any) -> list[Any]:
    return [part for item in dict.items(value) for part in item]


def _items(kind: Any) -> Callable[[Any], tuple[Any, list[Any]]]:
    return lambda value: (None, list(kind.__iter__(value)))


# How the C part of a value is read, whatever a subclass has made of the methods.
_BASES: dict[type, Callable[[Any], tuple[Any, list[Any]]]] = {
    object: lambda value: (None, []),
    bool: lambda value: (bool(value), []),
    int: lambda value: (int.__index__(value), []),
    float: lambda value: (_floats(float.__float__(value)), []),
    complex: lambda value: (_floats(complex.__complex__(value)), []),
    str: lambda value: (str.__str__(value), []),
    bytes: lambda value: (bytes.__bytes__(value), []),
    range: lambda value: ((value.start, value.stop, value.step), []),
    slice: lambda value: (None, [value.start, value.stop, value.step]),
    tuple: _items(tuple),
    list: _items(list),
    set: _items(set),
    frozenset: _items(frozenset),
    dict: lambda value: (None, _in_order(value)),
    OrderedDict: lambda value: (
        None,
        [part for key in OrderedDict.__iter__(value) for part in (key, dict.get(value, key))],
    ),
    types.MappingProxyType: lambda value: (None, [part for item in value.items() for part in item]),
}


def _object(value: Any) -> Parts:
    kind = type(value)
    base = _base(kind)
    if base not in _BASES:
        return None
    token, parts = _BASES[base](value)
    if kind is base:
        # An `object()` is a mark: it means itself.
        return None if base is object else (token, parts)
    if not _is_all_visible(kind, base):
        return None
    attributes = _attributes(value, base)
    if base is object and kind.__eq__ is object.__eq__ and not callable(value) and attributes in ([], [{}]):
        return None  # a mark of the user's own: it has nothing but what it is
    return token, [*parts, *attributes]


def _slots(kind: type, base: type) -> list[str]:
    names: list[str] = []
    for part in kind.__mro__:
        if part is base:
            break
        names += [name for name, slot in vars(part).items() if isinstance(slot, types.MemberDescriptorType)]
    return names


def _is_all_visible(kind: type, base: type) -> bool:
    """Whether objects of a class hold nothing but what `base` does, their slots and their `__dict__`.

    A class of a C extension may have more, and its size shows it.
    """
    extra = (
        len(_slots(kind, base))
        + ((kind.__dictoffset__ > 0 or (kind.__dictoffset__ < 0 < kind.__itemsize__)) and base.__dictoffset__ == 0)
        + (kind.__weakrefoffset__ > 0 and base.__weakrefoffset__ == 0)
    )
    return kind.__basicsize__ <= base.__basicsize__ + extra * _POINTER


def _attributes(value: Any, base: type) -> list[Any]:
    """The slots, with a mark where one is empty, and the attributes of an object."""
    filled = [
        object.__getattribute__(value, name) if _has(value, name) else _EMPTY for name in _slots(type(value), base)
    ]
    try:
        return [*filled, object.__getattribute__(value, "__dict__")]
    except AttributeError:
        return filled


_EMPTY = object()


def _has(value: Any, name: str) -> bool:
    try:
        object.__getattribute__(value, name)
    except AttributeError:
        return False
    return True
