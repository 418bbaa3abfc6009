"""The backward of a unit as two ops: I gives the gradient of the input, and keeps what W needs for those of the weights."""

import jax

from jaxpipe.executor.halves import Halves
from jaxpipe.executor.unit import Unit
from jaxpipe.types import Leaves, Params, Tree


class UnitHalves:
    """A unit whose backward is cut.

    W has params, keys, state that no layer changes, and seeds, as I has them; and the input of the unit if that is in the
    batch. Everything else that it needs crosses, also what the forward has kept: then the slot of the forward is free once
    I has read it, and what waits is the little that W needs, and not all that the derivative by the input did. To leave
    such values where they are would save the copy, and keep the whole slot for longer.

    Args:
      unit: what is cut.
      inputs_again: whether W is given the leaves of the input in `unit.saved_inputs`, too.

    Attributes:
      pending: abstract values of what crosses.
      early: of each gradient of the weights, whether I gives it.
    """

    def __init__(self, unit: Unit, inputs_again: bool):
        self._unit, count = unit, len(unit.saved_inputs)
        dparams, dx = unit.captured.outputs
        self._structure = jax.tree.structure(dx)
        known, saved = [inputs_again] * count, [False] * len(unit.saved[count:])
        params, contexts, seed = jax.tree.map(lambda _: True, (unit.params, unit.contexts, unit.seed))
        dy = jax.tree.map(lambda _: False, unit.wanted)
        given = jax.tree.leaves((unit.operands(params, params, known, saved, contexts), dy, seed))
        self._halves = Halves(unit.captured, range(len(jax.tree.leaves(dparams))), given)
        self.pending, self.early = self._halves.pending, self._halves.early

    def first(
        self,
        params: Params,
        again: Params,
        known: Leaves,
        saved: Leaves,
        contexts: Tree,
        dy: Leaves,
        extra: jax.Array | None,
    ) -> tuple[Leaves, list[jax.Array | None], Leaves]:
        """Arguments as for `Unit.backward`.

        Returns:
          The gradients of the input, those of the weights that are early (None for the others), and what is pending.
        """
        unit = self._unit
        operands = unit.operands(params, again, known, saved, contexts), dy, unit.own_seed(extra)
        dx, early, pending = self._halves.first(jax.tree.leaves(operands))
        return jax.tree.unflatten(self._structure, dx), early, pending

    def second(
        self, params: Params, again: Params, known: Leaves, contexts: Tree, extra: jax.Array | None, pending: Leaves
    ) -> list[jax.Array | None]:
        """The gradients of the weights that are not early, None for the others.

        Args:
          known: the leaves of the input, or nothing if W has not got them.
          contexts: those of now; state that has gone on is not looked at.
        """
        unit, count = self._unit, len(self._unit.saved_inputs)
        known, saved = known or unit.saved[:count], unit.saved[count:]  # abstract values stand for what it has not got
        operands = unit.operands(params, again, known, saved, contexts), unit.wanted, unit.own_seed(extra)
        return self._halves.second(jax.tree.leaves(operands), pending)
