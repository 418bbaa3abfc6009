"""Structural equality: decides whether two values compute the same inside a traced function.

The answer may be wrong on one side only. A wrong "no" costs memory and compile time, because layers are not stacked. A
wrong "yes" would compute with the wrong function. So `==` is not used: it may ignore a field, and it takes 1 for True and
0.0 for -0.0.

Two values are the same if they are one object. They are also the same if they have one type, and all their parts are the
same and in the same order: the items of containers; the code, defaults, closures and attributes of functions; the
attributes and slots of objects. Some values cannot be taken apart completely: arrays (which may also change later), objects
of C extensions, and objects of classes without fields, which serve as marks. Such a value is the same as itself only.

One case is not seen: code that looks up an object with fields, or a callable one, in a table by its `id`.

Values may contain themselves. A pair that is still being compared counts as the same, which is right, because a difference
anywhere decides the whole answer.
"""

import functools
import struct
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

# A value taken apart: a plain token that is compared with `==`, and the parts that are compared in turn.
Parts = tuple[Hashable, list[object]]

_POINTER = struct.calcsize("P")
# Types of JAX and NumPy that are immutable, and whose own `==` compares everything.
_OF_JAX = (np.dtype, jax.sharding.Mesh, jax.sharding.PartitionSpec, jax.sharding.NamedSharding)

_opened: dict[type, Callable[[Any], dict[str, Any]]] = {
    jax.tree_util.PyTreeDef: lambda tree: {"node": tree.node_data(), "children": tree.children()},
}


def open_with(kind: type, attributes: Callable[[Any], dict[str, Any]]) -> None:
    """Declares how objects of `kind` and its subclasses are taken apart, if they hold more than what they compute with.

    Args:
      attributes: returns the parts of an object that count.
    """
    _opened[kind] = attributes


def same_value(a: object, b: object) -> bool:
    """Whether `a` and `b` can replace each other inside a traced function."""
    todo = [(a, b)]
    seen: dict[tuple[int, int], object] = {}  # keeps what it has seen alive, so that no id is used twice
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


def _parts(value: Any) -> Parts | None:
    """What a value is made of; None if it cannot be taken apart completely."""
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


def _function(value: types.FunctionType) -> Parts | None:
    try:
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
    except ValueError:  # an empty cell: the function refers to a name that is not bound yet
        return None
    # The code and the globals must be the very same objects; what a function wraps is one of its attributes.
    identity = id(value.__code__), id(value.__globals__), value.__name__, value.__qualname__
    return identity, [*cells, value.__defaults__, value.__kwdefaults__, value.__dict__]


def _base(kind: type) -> type:
    """The type, implemented in C, that a class is built on."""
    return next(base for base in kind.__mro__ if base in _BASES or not _is_written_in_python(base))


def _is_written_in_python(kind: type) -> bool:
    return kind.__module__ != "builtins" and bool(kind.__flags__ & (1 << 9))  # Py_TPFLAGS_HEAPTYPE


def _floats(value: complex) -> bytes:
    """All bits of a number: -0.0 differs from 0.0, and two NaNs of the same bits are the same."""
    return struct.pack("<2d", value.real, value.imag)


def _in_order(value: dict[object, object]) -> list[object]:
    return [part for item in dict.items(value) for part in item]


def _items(kind: Any) -> Callable[[Any], Parts]:
    return lambda value: (None, list(kind.__iter__(value)))


# How the part of a value that is implemented in C is read, even where a subclass has replaced the methods.
_BASES: dict[type, Callable[[Any], Parts]] = {
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


def _object(value: object) -> Parts | None:
    kind = type(value)
    base = _base(kind)
    if base not in _BASES:
        return None
    token, parts = _BASES[base](value)
    if kind is base:
        # An `object()` is a mark, which is the same as itself only.
        return None if base is object else (token, parts)
    if not _is_all_visible(kind, base):
        return None
    attributes = _attributes(value, base)
    if base is object and kind.__eq__ is object.__eq__ and not callable(value) and attributes in ([], [{}]):
        return None  # a mark of the user's own: it has nothing but its identity
    return token, [*parts, *attributes]


def _slots(kind: type, base: type) -> list[str]:
    names: list[str] = []
    for part in kind.__mro__:
        if part is base:
            break
        names += [name for name, slot in vars(part).items() if isinstance(slot, types.MemberDescriptorType)]
    return names


def _is_all_visible(kind: type, base: type) -> bool:
    """Whether objects of a class hold only what `base` holds, their slots and their `__dict__`.

    A class of a C extension may hold more, which its size shows.
    """
    extra = (
        len(_slots(kind, base))
        + ((kind.__dictoffset__ > 0 or (kind.__dictoffset__ < 0 < kind.__itemsize__)) and base.__dictoffset__ == 0)
        + (kind.__weakrefoffset__ > 0 and base.__weakrefoffset__ == 0)
    )
    return kind.__basicsize__ <= base.__basicsize__ + extra * _POINTER


def _attributes(value: object, base: type) -> list[object]:
    """The slots of an object, with a mark for each empty one, and its `__dict__`."""
    filled = [
        object.__getattribute__(value, name) if _has(value, name) else _EMPTY for name in _slots(type(value), base)
    ]
    try:
        return [*filled, object.__getattribute__(value, "__dict__")]
    except AttributeError:
        return filled


_EMPTY = object()


def _has(value: object, name: str) -> bool:
    try:
        object.__getattribute__(value, name)
    except AttributeError:
        return False
    return True
