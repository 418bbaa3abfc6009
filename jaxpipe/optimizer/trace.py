"""A traced transformation as one flat list of equations, in which every value knows which layer it belongs to.

The *home* of a value is the layer of a stack that it belongs to. Step counts, hyperparameters, layers that occur once, and
values that join several layers have no home. An equation whose home is a layer can run where the weights of that layer are.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.extend.core as jex
from jax.core import ShapedArray
from jax.typing import ArrayLike

from jaxpipe.optimizer.calls import bind, taken_apart
from jaxpipe.optimizer.fingerprint import fingerprint

Home = tuple[str, int]  # (stack, layer)
# Names an array [S, K, ...] that holds one value of each of several layers.
ArrayKey = Hashable

SMALL = 64  # elements; a value with more of them is worth computing on one rank only


@dataclass(eq=False)
class Value:
    """An array of the trace.

    Attributes:
      aval: its shape and dtype.
      home: the layer it belongs to, or None.
      joined: whether it has no home although it is made from values of layers.
      constant: its numbers, if they are known while tracing.
      held_in: the key of the array [S, K, ...] that holds it, for values with a home; see `groups`.
      level: how many gathers come before it; see `groups`.
    """

    aval: ShapedArray
    home: Home | None = None
    joined: bool = False
    constant: ArrayLike | None = None
    held_in: ArrayKey = None
    level: int = -1

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.aval.shape)


@dataclass(eq=False)
class Equation:
    """One primitive with its operands.

    Attributes:
      primitive, params: as in the jaxpr.
      look: the primitive and its parameters as a hashable value; equal for equations that compute the same.
      aside: whether it has side effects (a callback, a print). Then it must run exactly once, and never on padding.
    """

    primitive: jex.Primitive
    params: dict[str, Any] = field(repr=False)
    inputs: list[Value]
    outputs: list[Value]
    look: Hashable = field(repr=False)
    aside: bool

    @property
    def home(self) -> Home | None:
        """The layer it belongs to, or None."""
        return self.outputs[0].home if self.outputs else None

    def bind(self, *args: ArrayLike) -> list[jax.Array]:
        """Computes its outputs from arrays in the shapes of its inputs."""
        return bind(self.primitive, self.params, *args)


class Trace:
    """A closed jaxpr as a flat list: calls are put inline, equal equations are merged, and unused ones are dropped.

    Args:
      closed: as `jax.make_jaxpr` returns it.
      homes: for each input, its home or None.
      held_in: for each input with a home, the key of the array that holds it.
      out_homes: for each output, the layer that it will be stored with, or None.
    """

    def __init__(
        self,
        closed: jex.ClosedJaxpr,
        homes: Sequence[Home | None],
        held_in: Sequence[ArrayKey],
        out_homes: Sequence[Home | None],
    ):
        self.equations: list[Equation] = []
        self.out_homes = list(out_homes)
        self._seen: dict[Hashable, list[Value]] = {}
        self._constants: dict[Hashable, Value] = {}
        self.inputs = [
            Value(aval, home, held_in=key if home else None, level=0 if home else -1)
            for aval, home, key in zip(closed.in_avals, homes, held_in, strict=True)
        ]
        self.outputs = self._visit(closed, self.inputs)
        self._drop_and_push()

    def _visit(self, closed: jex.ClosedJaxpr, args: Sequence[Value]) -> list[Value]:
        known = dict(zip(closed.jaxpr.invars, args, strict=True))
        known.update((v, self._constant(c, v.aval)) for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True))

        def read(v: jex.Var | jex.Literal) -> Value:
            return self._constant(v.val, v.aval) if isinstance(v, jex.Literal) else known[v]

        for eqn in closed.jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            joins = len({v.home for v in inputs if v.home}) > 1
            inner = taken_apart(eqn, joins)
            outputs = self._visit(inner, inputs) if inner is not None else self._emit(eqn, inputs, joins)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [read(v) for v in closed.jaxpr.outvars]

    def _constant(self, value: ArrayLike, aval: Any) -> Value:
        return self._constants.setdefault((fingerprint(value), aval.dtype, aval.shape), Value(aval, constant=value))

    def _emit(self, eqn: jex.JaxprEqn, inputs: list[Value], joins: bool) -> list[Value]:
        look = eqn.primitive, fingerprint(eqn.params)
        aside = bool(eqn.effects) or "callback" in eqn.primitive.name
        # optax makes some scalars (a bias correction, a learning rate) once per array. Merged, all layers share one value.
        same = (look, *map(id, inputs))
        if same in self._seen and not aside:
            return self._seen[same]
        mine, shared = [v for v in inputs if v.home], [v for v in inputs if v.joined]
        home = None
        if mine and not joins and not aside and not _takes_part(mine, shared, eqn.outvars):
            home = mine[0].home
        outputs = [Value(_aval(v), home, joined=home is None and bool(mine or shared)) for v in eqn.outvars]
        self.equations.append(Equation(eqn.primitive, eqn.params, inputs, outputs, look, aside))
        return self._seen.setdefault(same, outputs)

    def _drop_and_push(self) -> None:
        """Drops equations that nobody reads, and moves those that only one layer reads (such as its noise) to that layer.

        The list is walked backwards, so that all readers of a value are known when its equation is reached.
        """
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


def _takes_part(mine: list[Value], shared: list[Value], outvars: Sequence[jex.Var]) -> bool:
    """Whether an equation of one layer's values (`mine`) with joined ones (`shared`) is itself part of the joining.

    A layer may *use* a scalar that joins layers, as when a gradient is scaled by the clip factor. It *takes part* in the
    joining where all values are scalars, as in a chain of sums, or where the joined value is an array.
    """
    if not shared:
        return False
    sizes = [v.size for v in mine] + [math.prod(_aval(v).shape) for v in outvars]
    return max(v.size for v in shared) > 1 or max(sizes) <= 1


def _aval(v: jex.Var) -> ShapedArray:
    """The shape and dtype of a variable; JAX declares a wider type, without either."""
    aval: Any = v.aval
    return aval
