"""Where a stage begins in the arrays of its rank: stages that run one program need not lie in the same slots.

A part counts its slots from the first one that its stage has. With one stage per rank that is slot 0. A rank with several
stages has the layers of all of them in one stack, so what an op adds to the slots of its parts is looked up by its stage.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.layout.layout import Address
from jaxpipe.layout.stages import Part, Stage

# Per address, the first slot of each stage: one number if all stages that run the program agree.
_Table = Mapping[Address, int | tuple[int, ...]]


@dataclass(frozen=True)
class Begin:
    """The first slots of the stages that run one program.

    Attributes:
      params, states: by address, in the tree of the params and in that of the states.
    """

    params: _Table
    states: _Table

    @classmethod
    def of(cls, stages: Sequence[Stage], runs: Sequence[int]) -> "Begin":
        """That of the stages number `runs`, of all stages."""
        return cls(
            _table([stage.slots for stage in stages], runs), _table([stage.state_slots for stage in stages], runs)
        )

    def placed(self, parts: Sequence[Part], stage: jax.Array) -> list[Part]:
        """Some parts of a stage with their slots counted as on the rank.

        Args:
          stage: the number of the stage, int32 [].
        """

        def one(part: Part) -> Part:
            state = part.state
            if state is not None:
                state = state._replace(slot=_looked_up(self.states, state.address, state.slot, stage))
            slot = part.slot if part.address is None else _looked_up(self.params, part.address, part.slot, stage)
            return replace(part, slot=slot, state=state)

        return [one(part) for part in parts]


# With one stage per rank, and where only shapes are asked for.
AT_ZERO = Begin({}, {})


def begins(stages: Sequence[Stage]) -> dict[Hashable, Begin]:
    """Per program, by its key."""
    keys = [stage.program_key() for stage in stages]
    return {key: Begin.of(stages, [n for n, own in enumerate(keys) if own == key]) for key in keys}


def _table(firsts: Sequence[Mapping[Address, int]], runs: Sequence[int]) -> _Table:
    found: dict[Address, int | tuple[int, ...]] = {}
    for address in firsts[runs[0]]:
        several = {firsts[stage][address] for stage in runs}
        every = tuple(first.get(address, 0) if stage in runs else 0 for stage, first in enumerate(firsts))
        found[address] = min(several) if len(several) == 1 else every
    return found


def _looked_up(table: _Table, address: Address, slot: int, stage: jax.Array) -> Any:
    first = table.get(address, 0)
    return slot + (first if isinstance(first, int) else jnp.asarray(first, jnp.int32)[stage])
