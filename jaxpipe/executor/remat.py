"""Rematerialisation: what the forward pass keeps for the backward pass."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from jaxpipe.checks import as_count, did_you_mean, show
from jaxpipe.errors import ConfigError

MODES = ("none", "layer", "stage")


def check_remat(remat: Any) -> str | int | Callable[..., Any]:
    """`remat`, a NumPy integer made an int; raises ConfigError unless it is one of the rematerialisation modes."""
    if isinstance(remat, str) and remat in MODES:
        return remat
    if (interval := as_count(remat)) is not None:
        return interval
    why = _no_policy(remat) if callable(remat) else None
    if callable(remat) and why is None:
        return remat
    hint = did_you_mean(remat, MODES) if isinstance(remat, str) else ""
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
