"""Judges single values that users pass: numbers, names, and how a message shows them. No JAX, no NumPy.

Python's, NumPy's and JAX's numbers are the same to every setting, and what is stored is the Python number. A bool is no
number: `True` where a count is meant is a mistake.
"""

import difflib
import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

from jaxpipe.errors import ConfigError


def as_integer(value: object) -> int | None:
    """An integer of any library as an int; None for everything else, floats such as 4.0 included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]  # what has no index raises
    except TypeError:  # NumPy's and JAX's booleans, arrays with dims, values that are being traced
        return None


def as_count(value: object) -> int | None:
    """An integer, 1 or more, as an int; None for everything else."""
    number = as_integer(value)
    return number if number is not None and number >= 1 else None


def as_number(value: object) -> int | float | None:
    """A finite number of any library as an int or a float; None for everything else."""
    number: Any = as_integer(value)
    try:
        if number is None and _is_real(value):
            number = float(value)  # pyright: ignore[reportArgumentType]
        return number if number is not None and math.isfinite(number) else None
    except (OverflowError, TypeError):  # an integer that no float can hold; a value that is being traced
        return None


def _is_real(value: object) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, numbers.Real):
        return True
    return getattr(value, "ndim", None) == 0 and getattr(getattr(value, "dtype", None), "kind", None) == "f"


def show(value: object) -> str:
    """`repr` for a message: short, on one line, and without an error of its own."""
    try:
        text = str(value) if isinstance(value, numbers.Rational) else " ".join(repr(value).split())
    except Exception:  # a repr of the user's, or an integer with more digits than Python prints
        return f"<{type(value).__name__}>"
    return text if len(text) <= 100 else f"{text[:80]}..."


def is_count(value: object) -> bool:
    """An integer, 1 or more, of Python or NumPy; `True` is not one."""
    return as_count(value) is not None


def is_number(value: object) -> bool:
    """A finite int or float, of Python or NumPy; `True` is not one."""
    return as_number(value) is not None


def count(name: str, value: object, more: str = "") -> int:
    """`value` as an int; raises ConfigError unless it is an integer, 1 or more. `more` ends the message."""
    number = as_count(value)
    if number is None:
        raise ConfigError(f"{name}={show(value)} must be an integer, 1 or more.{more}")
    return number


def number_above_0(name: str, value: object, more: str) -> int | float:
    """`value` as an int or float; raises ConfigError unless it is a finite number above 0. `more` ends the message."""
    number = as_number(value)
    if number is None or number <= 0:
        raise ConfigError(f"{name}={show(value)} must be a finite number above 0{more}")
    return number


def did_you_mean(word: object, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """A question naming the nearest known word, with a space before it; empty where none is as near as `cutoff` asks."""
    near = difflib.get_close_matches(str(word).lower(), list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
