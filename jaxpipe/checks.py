"""Judges single values that users pass, such as numbers and names, and shows them in messages.

Every setting accepts numbers of Python, NumPy and JAX alike, and stores the Python number. A bool is not a number: `True`
in the place of a count is a mistake. This module imports neither JAX nor NumPy.
"""

import difflib
import math
import numbers
import operator
from collections.abc import Iterable

from jaxpipe.errors import ConfigError


def as_integer(value: object) -> int | None:
    """An integer of any library as an int; None for everything else, including floats such as 4.0."""
    if isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", None) == "b":
        return None  # older NumPy takes its own bool for an index
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]  # raises for values without an index
    except TypeError:  # NumPy's and JAX's booleans, arrays with dims, values that are being traced
        return None


def as_count(value: object) -> int | None:
    """An integer of at least 1 as an int; None for everything else."""
    number = as_integer(value)
    return number if number is not None and number >= 1 else None


def as_number(value: object) -> int | float | None:
    """A finite number of any library as an int or a float; None for everything else."""
    number: int | float | None = as_integer(value)
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
    """The `repr` of a value for a message: shortened, on one line. It never raises."""
    try:
        text = str(value) if isinstance(value, numbers.Rational) else " ".join(repr(value).split())
    except Exception:  # the user's own `__repr__` fails, or an integer has more digits than Python prints
        return f"<{type(value).__name__}>"
    return text if len(text) <= 100 else f"{text[:80]}..."


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 1, of any library; `True` is not."""
    return as_count(value) is not None


def is_number(value: object) -> bool:
    """Whether a value is a finite int or float, of any library; `True` is not."""
    return as_number(value) is not None


def count(name: str, value: object, more: str = "") -> int:
    """Returns `value` as an int.

    Args:
      name: what messages call it.
      more: the end of the message.

    Raises:
      ConfigError: it is no integer of at least 1.
    """
    number = as_count(value)
    if number is None:
        raise ConfigError(f"{name}={show(value)} must be an integer, 1 or more.{more}")
    return number


def number_above_0(name: str, value: object, more: str) -> int | float:
    """Returns `value` as an int or a float.

    Args:
      name: what messages call it.
      more: the end of the message.

    Raises:
      ConfigError: it is no finite number above 0.
    """
    number = as_number(value)
    if number is None or number <= 0:
        raise ConfigError(f"{name}={show(value)} must be a finite number above 0{more}")
    return number


def did_you_mean(word: object, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """A question with the nearest known word, and a space before it; empty if no known word is near enough.

    Args:
      cutoff: how similar the words must be, from 0 to 1.
    """
    near = difflib.get_close_matches(str(word).lower(), list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
