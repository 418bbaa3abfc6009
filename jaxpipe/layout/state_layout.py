"""Where the state of layers lives: beside the params, in a tree of the same form.

    layer_state = {"stacked": {"Block": leaves [S, slots, ...]},    like layers, rank r holds [r]
                   "shared":  {"00_Stem": leaves in their own shape}}   every other layer, whole on every device

It is replicated over data ranks and further axes, and no array of it is cut: state is small, next to what it belongs to.
Which layers are stacked follows from the shapes of their state alone, so it need not be as it is for their params.
"""

from collections.abc import Collection, Sequence

import jax

from jaxpipe.errors import LayerError
from jaxpipe.layout.layout import STACKED, Layout
from jaxpipe.layout.placement import Placement
from jaxpipe.model.paths import path_text
from jaxpipe.model.shapes import describe, is_key, signature
from jaxpipe.model.tracing import LayerShapes
from jaxpipe.types import Tree


class StateLayout(Layout):
    """The layout of the state of layers whose params have the layout `of`.

    Args:
      states: per layer, the shapes of the state that it owns.
    """

    def __init__(self, of: Layout, states: Sequence[Tree]):
        for index, held in enumerate(states):
            owner = of.module.owners[index]
            if owner != index and jax.tree.leaves(held):
                raise LayerError(
                    f"{of.module.label(index)} was given state, but it is tied to {of.module.label(owner)}, which holds "
                    "it: give an empty dict for it."
                )
            if any(is_key(leaf) for leaf in jax.tree.leaves(held)):
                raise LayerError(f"{of.module.label(index)} has a PRNG key in its state: {describe(held)}.")
        super().__init__(of.module, of.boundaries, states, placement=of.placement)

    def _piles(
        self, kinds: Sequence[Sequence[int]], further: Sequence[Tree], users: Sequence[Collection[int]]
    ) -> list[bool]:
        return [False] * len(kinds)

    def _over_ranks(self, leaf: jax.ShapeDtypeStruct, placement: Placement) -> Placement:
        return placement

    @property
    def is_empty(self) -> bool:
        """Whether no layer has state."""
        return not self.stacks and not self.shared

    def checked(self, given: Tree) -> Tree:
        """What a user has passed, a tree of this layout or a list with the state of each layer; such a tree for None.

        Raises:
          LayerError: it does not fit, or is None although layers have state.
        """
        if self.is_empty and not isinstance(given, (list, tuple)) and not jax.tree.leaves(given):
            return self.shapes()
        if given is None:
            raise LayerError(
                f"{self.first_label} has state, such as running means, so layer_state=... is needed: what "
                "pipe.init_state(key, example_inputs) or the step before has returned, or a list with the state of each "
                "layer, as engine.layer_state() gives it."
            )
        if isinstance(given, (list, tuple)):
            self.check_layers(given)
        else:
            self.check(given)
        return given

    @property
    def first_label(self) -> str:
        """Names the first layer with state in messages."""
        first = min(index for index, state in enumerate(self.layer_params) if jax.tree.leaves(state))
        return self.module.label(first)

    def check(self, layer_state: Tree) -> None:
        """Raises LayerError unless a tree has the structure, shapes and dtypes of this layout."""
        wanted = self.shapes()
        if jax.tree.structure(layer_state) != jax.tree.structure(wanted):
            raise LayerError(
                f"layer_state is {_shown(layer_state)}, but that of this pipeline is {describe(wanted)[:500]}. Pass what "
                "pipe.init_state or the step before has returned, or a list with the state of each layer."
            )
        pairs = zip(jax.tree_util.tree_flatten_with_path(layer_state)[0], jax.tree.leaves(wanted), strict=True)
        for (path, given), like in pairs:
            if signature(given) != signature(like):
                group, name = path[0].key, path[1].key
                layers = list(self.stacks[name].places) if group == STACKED else [self.shared[name].layer]
                raise LayerError(
                    f"layer_state: {path_text(path[2:])!r} of {self.module.label(layers[0])}"
                    f"{' and those like it' if len(layers) > 1 else ''} is {describe(given)}, expected {describe(like)}."
                )

    def check_layers(self, states: Sequence[Tree]) -> None:
        """Raises LayerError unless a list has, per layer, the structure, shapes and dtypes of its state."""
        if len(states) != len(self.layer_params):
            raise LayerError(
                f"layer_state has {len(states)} entries, and the module has {len(self.layer_params)} layers: it has one "
                "for each, {} where a layer has no state."
            )
        for index, (given, wanted) in enumerate(zip(states, self.layer_params, strict=True)):
            found, expected = (dict(_paths(tree)) for tree in (given, wanted))
            if jax.tree.structure(given) != jax.tree.structure(wanted) or found.keys() != expected.keys():
                odd = sorted(found.keys() ^ expected.keys())
                raise LayerError(
                    f"layer_state: that of {self.module.label(index)} is {describe(given)[:300]}, expected "
                    f"{describe(wanted)[:300]}{f': only one of both has {odd[:4]}' if odd else ''}."
                )
            for path, leaf in found.items():
                if signature(leaf) != signature(expected[path]):
                    raise LayerError(
                        f"layer_state: {path!r} of {self.module.label(index)} is {describe(leaf)}, expected "
                        f"{describe(expected[path])}."
                    )


def state_layout(of: Layout, shapes: Sequence[LayerShapes]) -> StateLayout:
    """The layout of the state of layers: that of `of`, or if it is not known there, the one that follows from shapes."""
    if isinstance(of.states, StateLayout):
        return of.states
    return StateLayout(of, [each.state for each in shapes])


def _paths(tree: Tree) -> list[tuple[str, jax.ShapeDtypeStruct]]:
    return [(path_text(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _shown(tree: object) -> str:
    try:
        return describe(tree)[:500]
    except Exception:  # leaves that are no arrays
        return repr(tree)[:500]
