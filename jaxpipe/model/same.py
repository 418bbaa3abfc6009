"""Structural equality of list entries: are two layers of one kind?

The answer may err on one side only. A false "no" costs memory and compile time (the layers are not stacked); a false
"yes" would compute with the wrong function. So functions are equal only with the same code, the same globals and equal
closures, arrays only when they are the same object, and anything unknown must say so itself through `==`.
"""

import functools
import types
from typing import Any

_ATOMS = (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType, types.BuiltinFunctionType)


def same_value(a: Any, b: Any) -> bool:
    """Whether `a` and `b` can stand for each other inside a traced function."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _ATOMS):
        return bool(a == b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    if isinstance(a, types.FunctionType):
        return _same_function(a, b)
    if isinstance(a, types.MethodType):
        return a.__self__ is b.__self__ and a.__func__ is b.__func__
    if isinstance(a, functools.partial):
        return same_value((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if hasattr(a, "__array__") or type(a).__eq__ is object.__eq__:
        return False
    try:
        return bool(a == b)
    except Exception:
        return False


def _same_function(a: types.FunctionType, b: types.FunctionType) -> bool:
    if a.__code__ is not b.__code__ or a.__globals__ is not b.__globals__:
        return False
    if not same_value((a.__defaults__, a.__kwdefaults__), (b.__defaults__, b.__kwdefaults__)):
        return False
    cells_a, cells_b = a.__closure__ or (), b.__closure__ or ()
    try:
        return all(same_value(x.cell_contents, y.cell_contents) for x, y in zip(cells_a, cells_b, strict=True))
    except ValueError:  # an empty cell: the function refers to a name that is not bound yet
        return False
