"""Layers + boundaries -> what each stage computes, as a short list of parts.

A part is a run of like layers (scanned over their stack) or a single layer. Stages whose parts look the same are the
same program: three for a usual transformer (first, middle, last), whatever the number of ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from jaxpipe.model import keys
from jaxpipe.model.blame import blame
from jaxpipe.model.layers import Kind
from jaxpipe.model.layout import STACKED, Address, Layout
from jaxpipe.model.module import LayerShapes
from jaxpipe.model.shapes import describe, signature
from jaxpipe.types import Params, Tree


def not_traced(*_: Tree) -> Tree:
    """Stands for the function of a layer where only shapes are known."""
    raise AssertionError("This layer was not traced on a mesh.")


@dataclass(frozen=True)
class Part:
    """`count` like layers in a row.

    Attributes:
      kind: what makes layers alike.
      run: the function of one layer, as it was traced: `run(params, x, key) -> y`.
      offset: index of the first of them within the stage.
      address: where the weights are that they compute with, or None if they have none.
      slot: the slot of the first of them, if those weights are a stack.
      label: names the first of them in messages.
    """

    kind: Kind
    offset: int
    count: int = 1
    address: Address | None = None
    slot: int = 0
    label: str = field(default="", compare=False)
    run: Callable[..., Tree] = field(default=not_traced, compare=False, repr=False)

    @property
    def is_single(self) -> bool:
        """Whether this is one layer that is not one of a stack."""
        return self.count == 1 and (self.address is None or self.address.group != STACKED)

    def apply(self, params: Params, x: Tree, layer_keys: Any) -> Tree:
        """The layers one after the other, as they were traced.

        Args:
          params: of the layer; with a leading dim of `count` if it is more than one.
          layer_keys: a key, an array of `count` keys, or None.
        """

        def step(x: Tree, each: Any) -> tuple[Tree, None]:
            params, key = each
            return self.run(params, x, key), None

        # The rules of derivatives that users have written run here, but for the backward of a `custom_vjp`.
        with blame(f"{self.label} or one like it", lambda: f"it was given {describe(x)}"):
            if self.count == 1:
                return self.run(params, x, layer_keys)
            return jax.lax.scan(step, x, (params, layer_keys), length=self.count)[0]

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
    """

    parts: tuple[Part, ...]
    is_first: bool
    is_last: bool
    inputs: Tree
    outputs: Tree
    part_inputs: tuple[Tree, ...] = field(default=(), compare=False, repr=False)

    def program_key(self) -> Any:
        """Equal for stages that run the same program."""
        return self.parts, self.is_first, self.is_last, signature(self.inputs), signature(self.outputs)


def make_stages(layout: Layout, shapes: list[LayerShapes]) -> list[Stage]:
    """The stages of a model whose layers take and return `shapes` (those of one micro-batch on one data rank)."""
    last = layout.num_ranks - 1
    stages = []
    for stage in range(layout.num_ranks):
        start, stop = layout.boundaries[stage], layout.boundaries[stage + 1]
        parts: list[Part] = []
        taken: list[Tree] = []
        for index in range(start, stop):
            part = _single(layout, index, start, shapes[index])
            if parts and _continues(parts[-1], part, shapes[index - 1], shapes[index]):
                parts[-1] = replace(parts[-1], count=parts[-1].count + 1)
            else:
                parts.append(part)
                taken.append(shapes[index].inputs)
        ends = shapes[start].inputs, shapes[stop - 1].outputs
        stages.append(Stage(tuple(parts), stage == 0, stage == last, *ends, part_inputs=tuple(taken)))
    return stages


def _single(layout: Layout, index: int, start: int, shapes: LayerShapes) -> Part:
    kind, label = layout.module.layers[index].kind, layout.module.label(index)
    address = layout.address_of(index)
    stacked = address is not None and address.group == STACKED
    slot = layout.stacks[address.name].places[index][1] if address is not None and stacked else 0
    return Part(kind, index - start, address=address, slot=slot, label=label, run=shapes.run or not_traced)


def _continues(run: Part, part: Part, before: LayerShapes, here: LayerShapes) -> bool:
    """Whether `part` extends the run before it: a scan needs one function, one stack and one shape throughout."""
    in_a_row = part.address is None or (part.address.group == STACKED and part.slot == run.slot + run.count)
    return (
        run.kind is part.kind
        and run.address == part.address
        and in_a_row
        and signature(before.inputs) == signature(before.outputs) == signature(here.inputs) == signature(here.outputs)
    )
