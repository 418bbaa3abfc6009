"""The few judgements about values and keys that settings share, wherever they are passed."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxpipe.errors import ConfigError
from jaxpipe.scalars import as_count, as_number, show

__all__ = ["check_remat", "count", "did_you_mean", "is_count", "is_number", "number_above_0"]

REMATS = ("none", "layer", "stage")


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


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """A question naming the nearest known word, with a space before it; empty where none is near."""
    near = difflib.get_close_matches(str(word).lower(), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_remat(remat: Any) -> str | int | Callable[..., Any]:
    """`remat`, a NumPy integer made an int; raises ConfigError unless it is one of the rematerialisation modes."""
    if isinstance(remat, str) and remat in REMATS:
        return remat
    if (interval := as_count(remat)) is not None:
        return interval
    why = _no_policy(remat) if callable(remat) else None
    if callable(remat) and why is None:
        return remat
    hint = did_you_mean(remat, REMATS) if isinstance(remat, str) else ""
    raise ConfigError(
        f"remat={show(remat)} must be 'none', 'layer', 'stage', a positive number of layers, or a policy from "
        f"jax.checkpoint_policies.{hint}{f' {why}' if why else ''} Use 'none' to keep every intermediate value."
    )


# These make a policy. Passed themselves they would be one that is always true, and keep everything without a word.
_FACTORIES = (
    "save_only_these_names",
    "save_any_names_but_these",
    "save_anything_except_these_names",
    "save_and_offload_only_these_names",
    "offload_dot_with_no_batch_dims",
    "save_from_both_policies",
)


def _no_policy(function: Callable[..., Any]) -> str | None:
    """Why a callable cannot be a policy, which is asked `policy(primitive, *avals, **params)`; None if it may be one."""
    for name in _FACTORIES:
        if function is getattr(jax.checkpoint_policies, name, None):
            return f"jax.checkpoint_policies.{name} makes a policy: call it, jax.checkpoint_policies.{name}(...)."
    if isinstance(function, type):
        return f"{function.__name__} is a class."
    if inspect.isbuiltin(function) or (isinstance(function, functools.partial) and inspect.isbuiltin(function.func)):
        return "It is a builtin function."
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return "It does not say which arguments it takes."
    try:
        signature.bind(object(), object(), object(), a_parameter=None)
    except TypeError as error:
        return f"A policy is called as policy(primitive, *arrays, **parameters), and this one cannot be: {error}."
    return None
