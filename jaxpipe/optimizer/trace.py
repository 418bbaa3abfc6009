"""A traced transformation as one flat list of equations, in which every value knows which layer it belongs to.

A value's *home* is a layer of a stack, or none: step counts, hyperparameters, layers that occur once, and whatever joins
several layers have none. Equations at home in a layer can run where its weights are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.extend.core as jex

from jaxpipe.optimizer.calls import bind, taken_apart
from jaxpipe.optimizer.fingerprint import fingerprint

Home = tuple[str, int]  # (stack, layer)

SMALL = 64  # entries: a value with more of them is worth computing on one rank only


@dataclass(eq=False)
class Value:
    """An array of the trace.

    Attributes:
      home: the layer it belongs to, or None.
      joined: it has no home, though it is made from values of layers.
      constant: its value, if that is known.
      batch: which array [S, K, ...] holds it, for values with a home; see `groups`.
      level: how many gathers lie before it; see `groups`.
    """

    aval: Any
    home: Home | None = None
    joined: bool = False
    constant: Any = None
    batch: Any = None
    level: int = -1

    @property
    def size(self) -> int:
        return math.prod(self.aval.shape)


@dataclass(eq=False)
class Equation:
    """One primitive.

    Attributes:
      look: primitive and parameters, hashable.
      aside: it has effects (a callback, a print), so it must run once, and not on padding.
    """

    primitive: Any
    params: dict[str, Any] = field(repr=False)
    inputs: list[Value]
    outputs: list[Value]
    look: Any = field(repr=False)
    aside: bool

    @property
    def home(self) -> Home | None:
        return self.outputs[0].home if self.outputs else None

    def bind(self, *args: Any) -> list[Any]:
        return bind(self.primitive, self.params, *args)


class Trace:
    """A closed jaxpr, flattened: calls put inline, equal equations merged, unused ones dropped.

    Args:
      homes: per input, its home or None.
      batches: per input with a home, the array that holds it.
      out_homes: per output, the layer that it will be stored with, or None.
    """

    def __init__(
        self, closed: Any, homes: Sequence[Home | None], batches: Sequence[Any], out_homes: Sequence[Home | None]
    ):
        self.equations: list[Equation] = []
        self.out_homes = list(out_homes)
        self._seen: dict[Any, list[Value]] = {}
        self._constants: dict[Any, Value] = {}
        self.inputs = [
            Value(aval, home, batch=batch if home else None, level=0 if home else -1)
            for aval, home, batch in zip(closed.in_avals, homes, batches, strict=True)
        ]
        self.outputs = self._visit(closed, self.inputs)
        self._drop_and_push()

    def _visit(self, closed: Any, args: Sequence[Value]) -> list[Value]:
        known = dict(zip(closed.jaxpr.invars, args, strict=True))
        known.update((v, self._constant(c, v.aval)) for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True))

        def read(v: Any) -> Value:
            return self._constant(v.val, v.aval) if isinstance(v, jex.Literal) else known[v]

        for eqn in closed.jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            joins = len({v.home for v in inputs if v.home}) > 1
            inner = taken_apart(eqn, joins)
            outputs = self._visit(inner, inputs) if inner is not None else self._emit(eqn, inputs, joins)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [read(v) for v in closed.jaxpr.outvars]

    def _constant(self, value: Any, aval: Any) -> Value:
        return self._constants.setdefault((fingerprint(value), aval.dtype, aval.shape), Value(aval, constant=value))

    def _emit(self, eqn: Any, inputs: list[Value], joins: bool) -> list[Value]:
        look = eqn.primitive, fingerprint(eqn.params)
        aside = bool(eqn.effects) or "callback" in eqn.primitive.name
        # optax makes the same scalar once per array (a bias correction, a rate); as one value all layers share it.
        same = (look, *map(id, inputs))
        if same in self._seen and not aside:
            return self._seen[same]
        mine, shared = [v for v in inputs if v.home], [v for v in inputs if v.joined]
        home = None
        if mine and not joins and not aside and not _takes_part(mine, shared, eqn.outvars):
            home = mine[0].home
        outputs = [Value(v.aval, home, joined=home is None and bool(mine or shared)) for v in eqn.outvars]
        self.equations.append(Equation(eqn.primitive, eqn.params, inputs, outputs, look, aside))
        return self._seen.setdefault(same, outputs)

    def _drop_and_push(self) -> None:
        """Backwards: drops what nobody reads; gives what only one layer reads (its noise, say) to that layer."""
        readers: dict[Value, set[Home | None]] = {}
        for value, home in zip(self.outputs, self.out_homes, strict=True):
            readers.setdefault(value, set()).add(home)
        kept = []
        for eqn in reversed(self.equations):
            here = set().union(*[readers.get(v, set()) for v in eqn.outputs])
            if not here and not eqn.aside:
                continue
            homes = {v.home for v in eqn.inputs if v.home}
            worth = bool(homes) or max((v.size for v in eqn.outputs), default=0) > SMALL
            if len(here) == 1 and None not in here and homes <= here and worth and not eqn.aside:
                for v in eqn.outputs:
                    v.home = next(iter(here))
            for v in eqn.inputs:
                readers.setdefault(v, set()).add(eqn.home)
            kept.append(eqn)
        self.equations = kept[::-1]


def _takes_part(mine: list[Value], shared: list[Value], outvars: Sequence[Any]) -> bool:
    """Whether an equation of one layer's values (`mine`) with joined ones (`shared`) is itself part of the joining.

    A layer may *use* a scalar that joins layers, as when a gradient is scaled by the clip factor. It *takes part* where all
    are scalars, as in a chain of sums, or where the joined value is an array.
    """
    if not shared:
        return False
    sizes = [v.size for v in mine] + [math.prod(v.aval.shape) for v in outvars]
    return max(v.size for v in shared) > 1 or max(sizes) <= 1
