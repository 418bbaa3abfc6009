"""The few judgements about values and keys that settings share, wherever they are passed."""

import difflib
import math
from collections.abc import Iterable

from jaxpipe.errors import ConfigError

__all__ = ["check_remat", "did_you_mean", "is_count", "is_number"]

REMATS = ("none", "layer", "stage")


def is_count(value: object) -> bool:
    """An integer, 1 or more; `True` is not one."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: object) -> bool:
    """A finite int or float; `True` is not one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """A question naming the nearest known word, with a space before it; empty where none is near."""
    near = difflib.get_close_matches(str(word).lower(), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_remat(remat: object) -> None:
    """Raises ConfigError unless `remat` is one of the rematerialisation modes."""
    if callable(remat) or is_count(remat) or (isinstance(remat, str) and remat in REMATS):
        return
    raise ConfigError(
        f"remat={remat!r} must be 'none', 'layer', 'stage', a positive number of layers, or a policy from "
        "jax.checkpoint_policies. Use 'none' to keep every intermediate value."
    )
