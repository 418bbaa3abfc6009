"""What is taken of what a flax module sows: extra losses and metrics, where the spec of the layer says so.

Flax names what is sown by a kind (linen: a collection; nnx: a type of variable) and by a path in the module. A spec says
which kinds are losses and which are metrics; the path is the name under which they are reported.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.errors import LayerError
from jaxpipe.model.context import Aux
from jaxpipe.model.loop_dims import loop_dims
from jaxpipe.model.shapes import sum_dtype

# A collection of linen, or a type of variable of nnx.
SownKind = str | type


class SownValue(NamedTuple):
    """What was sown under one name in one call.

    Attributes:
      kind: where to.
      name: its path in the module, such as "experts/balance".
      value: a tuple of all that was sown there, or what the module's own `reduce_fn` has made of it.
      loops: for each leaf of the value, the dims that a loop in the module has stacked it along; () if there is none.
    """

    kind: SownKind
    name: str
    value: Any
    loops: tuple[tuple[int, ...], ...] = ()

    def values(self) -> dict[str, "list[_Values]"]:
        """All that was sown, by name, in floats that are long enough to be summed: a pytree has a name per leaf."""
        found: dict[str, list[_Values]] = {}
        entries = self.value if isinstance(self.value, tuple) else (self.value,)
        leaves = [pair for entry in entries for pair in jax.tree_util.tree_leaves_with_path(entry)]
        for (path, leaf), dims in zip(leaves, self.loops or ((),) * len(leaves), strict=True):
            name = "/".join([self.name, *(jax.tree_util.keystr((part,), simple=True) for part in path)])
            leaf = jnp.asarray(leaf)
            count = math.prod(leaf.shape[dim] for dim in dims)
            found.setdefault(name, []).append(_Values(leaf.astype(sum_dtype(leaf.dtype)).sum(dims), count))
        return found


class _Values(NamedTuple):
    """The sum of some values of one shape, and how many they are."""

    total: jax.Array
    number: int


def in_loops(sown: list[SownValue], again: Callable[..., list[SownValue]], *args: Any) -> list[SownValue]:
    """The sown values, with what loops have stacked them along.

    Args:
      again: makes the same values of `args` once more; it is traced if one of them has dims.
    """
    if not any(jnp.ndim(leaf) for leaf in jax.tree.leaves([each.value for each in sown])):
        return sown
    dims = iter(loop_dims(lambda *given: [each.value for each in again(*given)], *args))
    return [each._replace(loops=tuple(next(dims) for _ in jax.tree.leaves(each.value))) for each in sown]


@dataclass(frozen=True)
class Takes:
    """Which kinds of sown values are taken, and for what."""

    losses: tuple[SownKind, ...] = ()
    metrics: tuple[SownKind, ...] = ()

    @classmethod
    def of(cls, losses: Any, metrics: Any) -> "Takes":
        """Makes it of what a user has passed: a kind, or several of them.

        Raises:
          LayerError: something is no kind, or one is among both.
        """
        made = cls(_kinds("losses", losses), _kinds("metrics", metrics))
        if both := [_text(kind) for kind in made.losses if kind in made.metrics]:
            raise LayerError(f"sown(losses=..., metrics=...): {both} are among both. What is sown is one of the two.")
        return made

    def __bool__(self) -> bool:
        return bool(self.losses or self.metrics)

    def has(self, kind: SownKind) -> bool:
        """Whether what is sown to this kind is taken."""
        return _is_among(kind, (*self.losses, *self.metrics))

    def aux(self, sown: Iterable[SownValue], state: Any) -> Aux:
        """What a layer gives beside its output, with its state after the call."""
        losses: dict[str, list[_Values]] = {}
        metrics: dict[str, list[_Values]] = {}
        for each in sown:
            into = losses if _is_among(each.kind, self.losses) else metrics
            if into is losses or self.has(each.kind):
                for name, values in each.values().items():  # one name may be in several kinds
                    into.setdefault(name, []).extend(values)

        def total(values: list[_Values]) -> jax.Array:
            return sum((each.total for each in values[1:]), values[0].total)

        sums = {name: total(values) for name, values in losses.items()}
        means = {name: total(values) / sum(each.number for each in values) for name, values in metrics.items()}
        return Aux(state, sums, means)

    def dropped(self, sown: Iterable[SownValue]) -> set[str]:
        """What is sown and not taken, for a message."""
        left = [each for each in sown if not self.has(each.kind)]
        return {f"{each.name!r} ({_text(each.kind)})" for each in left}


def check_kinds(what: str, takes: Takes, allowed: type, rule: str) -> None:
    """Raises LayerError unless all kinds are strings (`allowed` is `str`), or all are subclasses of `allowed`."""
    for kind in (*takes.losses, *takes.metrics):
        fits = isinstance(kind, str) if allowed is str else isinstance(kind, type) and issubclass(kind, allowed)
        if not fits:
            raise LayerError(f"{what}: sown(...) names {_text(kind)}. {rule}")


def _kinds(name: str, value: Any) -> tuple[SownKind, ...]:
    kinds = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for kind in kinds:
        if not isinstance(kind, (str, type)) or not kind:
            raise LayerError(
                f'sown({name}={value!r}): it takes names of collections for flax.linen, such as "losses", or types of '
                "variables for flax.nnx, such as nnx.Intermediate; several of them in a tuple."
            )
    return kinds


def _is_among(kind: SownKind, kinds: tuple[SownKind, ...]) -> bool:
    if isinstance(kind, str):
        return kind in kinds
    return any(isinstance(other, type) and issubclass(kind, other) for other in kinds)


def _text(kind: SownKind) -> str:
    return repr(kind) if isinstance(kind, str) else kind.__name__
