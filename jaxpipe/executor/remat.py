"""Rematerialisation: how a stage is cut into units, and what each of them keeps for its backward.

A mode takes the parts of a stage and gives groups, one after the other: the parts of a unit, how often the unit repeats
on the next layers of the stack, and how to make it.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

from jaxpipe.checks import as_count, did_you_mean, show
from jaxpipe.errors import ConfigError
from jaxpipe.executor.unit import Unit
from jaxpipe.executor.unit_kinds import Keep, Recompute
from jaxpipe.layout.stages import Part
from jaxpipe.model.costs import Recomputing, recompute

MODES = ("none", "dots", "layer", "stage")
# What `Pipeline(remat=...)` takes: a mode, an interval of layers, or a policy of `jax.checkpoint`.
RematOption: TypeAlias = str | int | Callable[..., Any]


class Group(NamedTuple):
    """A unit in the making, and how often it repeats."""

    parts: tuple[Part, ...]
    repeats: int
    make: Callable[..., Unit]


class Remat(Protocol):
    """A rematerialisation mode."""

    def groups(self, parts: Sequence[Part]) -> list[Group]:
        """The parts of a stage, grouped."""
        ...


@dataclass(frozen=True)
class EveryLayer:
    """A unit per layer."""

    make: Callable[..., Unit]

    def groups(self, parts: Sequence[Part]) -> list[Group]:
        return [Group((replace(part, count=1),), part.count, self.make) for part in parts]


@dataclass(frozen=True)
class Interval:
    """A unit of `length` like layers, as often as they fill one, and one of the layers that are left over."""

    length: int

    def groups(self, parts: Sequence[Part]) -> list[Group]:
        found: list[Group] = []
        for part in parts:
            whole, rest = divmod(part.count, self.length)
            if whole:
                found.append(Group((replace(part, count=self.length),), whole, Recompute))
            if rest:
                found.append(Group((part.behind(whole * self.length),), 1, Recompute))
        return found


class WholeStage:
    """One unit."""

    def groups(self, parts: Sequence[Part]) -> list[Group]:
        return [Group(tuple(parts), 1, Recompute)] if parts else []


def mode(remat: RematOption) -> Remat:
    """The mode that `Pipeline(remat=...)` names (one that has passed `check_remat`)."""
    if remat == "stage":
        return WholeStage()
    if isinstance(remat, int):
        return Interval(remat)
    if remat == "layer":
        return EveryLayer(Recompute)
    return EveryLayer(Keep if remat == "none" else functools.partial(Keep, policy=_policy(remat)))


def recomputing(remat: RematOption) -> Recomputing:
    """What a mode does to the function of a layer, in terms of `jax.checkpoint`; to count what it costs."""
    if remat == "none":
        return lambda function: function
    if isinstance(remat, int) or remat in ("layer", "stage"):
        return recompute
    return functools.partial(jax.checkpoint, policy=_policy(remat), prevent_cse=False)


def _policy(remat: RematOption) -> Callable[..., Any]:
    """The `jax.checkpoint` policy that a mode names, or is."""
    # Products whose operands share no batch dim are those of activations and weights: most of the work of a layer, in
    # arrays no larger than its activations. Those of attention grow with the square of the length, and are made again.
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else remat  # type: ignore[return-value]


def check_remat(remat: Any) -> RematOption:
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
        f"remat={show(remat)} must be 'none', 'dots', 'layer', 'stage', a positive number of layers, or a policy from "
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
