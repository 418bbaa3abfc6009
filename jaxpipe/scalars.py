"""Numbers as users pass them: Python's, NumPy's and JAX's are the same to every setting. No JAX, no NumPy.

What is stored is the Python number. A bool is no number: `True` where a count is meant is a mistake.
"""

import math
import numbers
import operator
from typing import Any


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
