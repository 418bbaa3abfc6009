"""Layers + boundaries -> what each stage computes, as a short list of parts.

A part is a run of like layers (scanned over their stack) or a single layer. Stages whose parts look the same are the
same program: three for a usual transformer (first, middle, last), whatever the number of ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax

from jaxpipe.layout.layout import SHARED, Address, Layout
from jaxpipe.layout.state_layout import state_layout
from jaxpipe.model import keys
from jaxpipe.model.blame import blame
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.layers import Kind
from jaxpipe.model.shapes import describe, signature
from jaxpipe.model.tracing import LayerShapes
from jaxpipe.types import Params, Tree


def not_traced(*_: Tree) -> tuple[Tree, Aux]:
    """Stands for the function of a layer where only shapes are known."""
    raise AssertionError("This layer was not traced on a mesh.")


class StatePlace(NamedTuple):
    """Where the state of like layers in a row is.

    Attributes:
      address: where in the tree of states.
      slot: the slot of the first of them, if they are in a stack, counted from the first one of the stage.
      changes: for each leaf, whether the layers change it.
    """

    address: Address
    slot: int
    changes: tuple[bool, ...]


@dataclass(frozen=True)
class Part:
    """`count` like layers in a row.

    Attributes:
      kind: what makes layers alike.
      run: the function of one layer, as it was traced: `run(params, x, context) -> (y, aux)`.
      offset: index of the first of them within the stage.
      address: where the weights are that they compute with, or None if they have none.
      slot: the slot of the first of them, if those weights are a stack during a step, counted from the first one of the
        stage.
      frozen: the numbers of those leaves of its params, in order, that have a derivative and are not trained.
      takes, gives: of each inexact leaf of what the first of them takes and the last of them gives, whether its gradient
        is needed. () where no gradients are.
      state: where their state is, or None if they have none.
      label: names the first of them in messages.
    """

    kind: Kind
    offset: int
    count: int = 1
    address: Address | None = None
    slot: int = 0
    frozen: frozenset[int] = frozenset()
    takes: tuple[bool, ...] = ()
    gives: tuple[bool, ...] = ()
    state: StatePlace | None = None
    label: str = field(default="", compare=False)
    run: Callable[..., tuple[Tree, Aux]] = field(default=not_traced, compare=False, repr=False)

    @property
    def is_single(self) -> bool:
        """Whether this is one layer that is not one of a stack, so that any rank could run it."""
        homes = [self.address, None if self.state is None else self.state.address]
        return self.count == 1 and all(home is None or home.group == SHARED for home in homes)

    def behind(self, first: int) -> "Part":
        """All but the `first` first of the layers: weights and state begin as many slots later."""
        state = None if self.state is None else self.state._replace(slot=self.state.slot + first)
        offset, slot = self.offset + first, self.slot + first
        return replace(self, offset=offset, count=self.count - first, slot=slot, state=state)

    def apply(self, params: Params, x: Tree, context: Context) -> tuple[Tree, Aux]:
        """The layers one after the other, as they were traced.

        Args:
          params, context: of the layer; with a leading dim of `count` if it is more than one.

        Returns:
          The output of the last layer, and what the layers give beside it: with a leading dim of `count` if that is more
          than one.
        """

        def step(x: Tree, each: Any) -> tuple[Tree, Aux]:
            params, context = each
            return self._one(params, x, context)

        # The rules of derivatives that users have written run here, but for the backward of a `custom_vjp`.
        with blame(f"{self.label} or one like it", lambda: f"it was given {describe(x)}"):
            if self.count == 1:
                return self._one(params, x, context)
            return jax.lax.scan(step, x, (params, context), length=self.count)

    def _one(self, params: Params, x: Tree, context: Context) -> tuple[Tree, Aux]:
        y, aux = self.run(params, x, context)
        # Here, and not where layers are traced, because there it is looked at which state comes out as it was.
        return y, aux._replace(state=jax.lax.stop_gradient(aux.state))

    def keys(self, micro_batch_key: jax.Array | None, first: jax.Array) -> Any:
        """The keys of the layers, or None; `first` is the global index of the first of them."""
        if micro_batch_key is None or not self.kind.uses_key:
            return None
        if self.count == 1:
            return keys.layer_key(micro_batch_key, first)
        indices = first + jax.numpy.arange(self.count, dtype=first.dtype)
        return jax.vmap(keys.layer_key, in_axes=(None, 0))(micro_batch_key, indices)


@dataclass(frozen=True)
class Stage:
    """What one stage computes. Equal stages are one program.

    Attributes:
      inputs, outputs: abstract values of what the stage takes and returns; `part_inputs` of what each part takes.
      takes, gives: as those of a part. They may need less than the first or the last part says: like layers in a row are
        all treated as the one that needs most.
      slots, state_slots: the first slots that the stage has in stacks on its rank, of weights and of state; 0 if it is the
        first stage of the rank.
    """

    parts: tuple[Part, ...]
    is_first: bool
    is_last: bool
    inputs: Tree
    outputs: Tree
    takes: tuple[bool, ...] = ()
    gives: tuple[bool, ...] = ()
    part_inputs: tuple[Tree, ...] = field(default=(), compare=False, repr=False)
    slots: Mapping[Address, int] = field(default_factory=dict[Address, int], compare=False, repr=False)
    state_slots: Mapping[Address, int] = field(default_factory=dict[Address, int], compare=False, repr=False)

    def program_key(self) -> Any:
        """Equal for stages that run the same program."""
        flow = self.takes, self.gives
        return self.parts, self.is_first, self.is_last, signature(self.inputs), signature(self.outputs), flow


def make_stages(
    layout: Layout, shapes: list[LayerShapes], needed: Sequence[tuple[bool, ...]] | None = None
) -> list[Stage]:
    """The stages of a model.

    Args:
      shapes: what the layers take and return, of one micro-batch on one data rank.
      needed: for the input of each layer and the output of the last one, of each inexact leaf, whether its gradient is
        needed; None where there are no gradients.
    """
    flags = [()] * (len(shapes) + 1) if needed is None else needed
    last = layout.num_stages - 1
    states = state_layout(layout, shapes)
    stages = []
    for stage in range(layout.num_stages):
        start, stop = layout.boundaries[stage], layout.boundaries[stage + 1]
        firsts = _first_slots(layout, range(start, stop)), _first_slots(states, range(start, stop))
        parts: list[Part] = []
        taken: list[Tree] = []
        for index in range(start, stop):
            single = _single(layout, states, index, start, shapes[index], firsts)
            part = replace(single, takes=flags[index], gives=flags[index + 1])
            if parts and _continues(parts[-1], part, shapes[index - 1], shapes[index]):
                both = tuple(
                    any(each) for each in zip(parts[-1].takes, parts[-1].gives, part.takes, part.gives, strict=True)
                )
                parts[-1] = replace(parts[-1], count=parts[-1].count + 1, takes=both, gives=both)
            else:
                parts.append(part)
                taken.append(shapes[index].inputs)
        ends = shapes[start].inputs, shapes[stop - 1].outputs
        flow = flags[start], flags[stop]
        stages.append(Stage(tuple(parts), stage == 0, stage == last, *ends, *flow, tuple(taken), *firsts))
    return stages


_Slots = dict[Address, int]


def _first_slots(layout: Layout, layers: Sequence[int]) -> _Slots:
    """The first slot of some layers in each stack that they are in."""
    found: _Slots = {}
    for address, slot in map(layout.place_in_step, layers):
        if address is not None:
            found[address] = min(found.get(address, slot), slot)
    return found


def _single(
    layout: Layout, states: Layout, index: int, start: int, shapes: LayerShapes, firsts: tuple[_Slots, _Slots]
) -> Part:
    kind, label = layout.module.layers[index].kind, layout.module.label(index)
    address, slot = layout.place_in_step(index)
    home, state_slot = states.place_in_step(index)
    slot -= 0 if address is None else firsts[0][address]
    state = None if home is None else StatePlace(home, state_slot - firsts[1][home], shapes.changes)
    run, frozen = shapes.run or not_traced, layout.frozen.of(index)
    return Part(kind, index - start, 1, address, slot, frozen, state=state, label=label, run=run)


def _continues(run: Part, part: Part, before: LayerShapes, here: LayerShapes) -> bool:
    """Whether `part` extends the run before it: a scan needs one function, one stack and one shape throughout."""
    in_a_row = part.address is None or (part.address.group != SHARED and part.slot == run.slot + run.count)
    return (
        run.kind is part.kind
        and run.address == part.address
        and in_a_row
        and _state_continues(run, part)
        and signature(before.inputs) == signature(before.outputs) == signature(here.inputs) == signature(here.outputs)
    )


def _state_continues(run: Part, part: Part) -> bool:
    """The same for the state of both."""
    if run.state is None or part.state is None:
        return run.state is part.state
    in_a_row = part.state.address.group != SHARED and part.state.slot == run.state.slot + run.count
    return in_a_row and run.state._replace(slot=0) == part.state._replace(slot=0)
