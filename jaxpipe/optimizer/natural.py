"""The natural tree, which an optimizer sees, and the params tree that it stands for.

    {"layer_000": what the layer's init made, "layer_001": ..., ...}

The natural tree has one entry per layer that owns weights. Layers without weights and the later uses of a tied layer have
no entry. Leaves without derivatives (integers, booleans) are None in it, and so are those that are frozen, because no
optimizer should see them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxpipe.layout.layout import Layout, address_and_rest, is_stack
from jaxpipe.layout.placement import Placement, fit
from jaxpipe.model.paths import layer_name
from jaxpipe.model.shapes import is_inexact
from jaxpipe.optimizer.trace import Home
from jaxpipe.types import Avals, KeyPath, Params, Tree

# A leaf of the params tree: (stack, path in a layer), or (None, path in the natural tree) for layers that occur once.
Cell = tuple[str | None, str]


@dataclass(frozen=True)
class Place:
    """Where a leaf of the natural tree is stored.

    Attributes:
      layer: global index of the layer that owns it.
      cell: the leaf of the params tree that holds it.
    """

    layer: int
    cell: Cell

    @property
    def home(self) -> Home | None:
        """(stack, layer), or None for a layer that occurs once."""
        return None if self.cell[0] is None else (self.cell[0], self.layer)


def text(path: KeyPath) -> str:
    """The path in the form in which JAX prints it, such as `['layer_000']['w']`."""
    return jax.tree_util.keystr(path)


class NaturalTree:
    """Translates between the params trees and the natural trees of one layout.

    Attributes:
      names: for each layer that owns weights, the name of its entry.
      layer_of: the layer of each entry; the inverse of `names`.
      shapes: the natural tree, with a ShapeDtypeStruct per leaf.
      places: for each leaf of the natural tree, in order, where it is stored.
      placements: how each leaf is cut, by its path, its dims counted as in the layer.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        stored = layout.shapes()
        self.names = {layer: layer_name(layer) for layer in layout.owned(stored)}
        self.layer_of = {name: layer for layer, name in self.names.items()}
        trained = layout.trained(stored)
        leaves, _ = jax.tree_util.tree_flatten_with_path(trained, is_leaf=_is_none)
        self._structure, self._trained = jax.tree.structure(stored), jax.tree.structure(trained)
        self._cells = [self._cell(path) if leaf is not None and is_inexact(leaf) else None for path, leaf in leaves]
        self.shapes = self.read(stored)
        self._natural_structure = jax.tree.structure(self.shapes)
        stack_of = {layer: stack.name for stack in layout.stacks.values() for layer in stack.places}
        self.places: list[Place] = []
        placements = {self.names[layer]: layout.placements_of(layer) for layer in self.names}
        by_path = {text(path): placement for path, placement in jax.tree_util.tree_flatten_with_path(placements)[0]}
        self.placements: dict[str, Placement] = {}
        for path, _ in jax.tree_util.tree_flatten_with_path(self.shapes)[0]:
            self.placements[text(path)] = by_path[text(path)]
            layer = self.layer_of[path[0].key]
            stack = stack_of.get(layer)
            self.places.append(Place(layer, (stack, text(path[1:])) if stack else (None, text(path))))

    def _cell(self, path: KeyPath) -> Cell:
        address, inside = address_and_rest(path)
        if is_stack(path):
            return address.name, text(inside)
        entry = jax.tree_util.DictKey(layer_name(self.layout.shared[address.name].layer))
        return None, text((entry, *inside))

    def read(self, params: Params) -> dict[str, Tree]:
        """The natural tree of a params tree.

        Args:
          params: leaves are arrays or ShapeDtypeStruct, [S, slots, ...] in stacks; they may be padded.

        Returns:
          The same kind of leaves, each in the shape that its layer made.
        """
        owned = self.layout.owned(params)
        layers = {self.names[layer]: own for layer, own in owned.items()}
        frozen = {self.names[layer]: self.layout.frozen.layers[layer] for layer in owned}
        return jax.tree.map(lambda f, a: None if f or a is None or not is_inexact(a) else a, frozen, layers)

    def cells(self, params: Params) -> dict[Cell, Any]:
        """The leaves of a params tree, without those that no optimizer sees. They may be arrays, shapes or shardings."""
        leaves = jax.tree.leaves(params, is_leaf=_is_none)
        return {cell: a for cell, a in zip(self._cells, leaves, strict=True) if cell is not None}

    def params(self, cells: Mapping[Cell, ArrayLike]) -> Params:
        """The params tree of such leaves, with zeros in the padding and for integers, and None for what is frozen."""
        blank, structure = jax.tree.flatten(self.layout.trained(self.layout.shapes()), is_leaf=_is_none)

        def leaf(cell: Cell | None, a: jax.ShapeDtypeStruct | None) -> Any:
            if a is None:
                return None
            return jnp.zeros(a.shape, a.dtype) if cell is None else fit(jnp.asarray(cells[cell]), a.shape)

        return jax.tree.unflatten(structure, [leaf(cell, a) for cell, a in zip(self._cells, blank, strict=True)])

    # ------------------------------------------------------------------------------------- trees that hold such trees

    def holds_params(self, tree: Tree) -> bool:
        """Whether a tree is a params tree, or holds one: it may be a pair of params trees, for instance."""
        return any(map(self.is_params, jax.tree.leaves(tree, is_leaf=self.is_params)))

    def is_params(self, x: Tree) -> bool:
        """Whether `x` has the structure of the params tree, or of gradients, which have None for what is frozen."""
        return isinstance(x, dict) and jax.tree.structure(x) in (self._structure, self._trained)

    def is_natural(self, x: Tree) -> bool:
        """Whether `x` has the structure of the natural tree."""
        return isinstance(x, dict) and x.keys() == self.layer_of.keys() and self._fits(x)

    def _fits(self, x: Tree) -> bool:
        return jax.tree.structure(x) == self._natural_structure

    def natural_shapes(self, tree: Tree) -> Avals:
        """The shapes of a tree, with a natural tree in the place of each params tree."""
        parts, rebuild = self.split(tree)
        return rebuild([self.shapes if self.is_params(part) else abstract(part) for part in parts])

    def split(self, tree: Tree) -> tuple[list[Tree], Callable[[Sequence[Tree]], Tree]]:
        """Takes a tree apart into params trees and other leaves.

        Returns:
          The params trees and the other leaves, in order; and the function that makes a tree of values in their places.
        """
        parts, structure = jax.tree.flatten(tree, is_leaf=self.is_params)
        return parts, lambda values: jax.tree.unflatten(structure, values)


def _is_none(leaf: object) -> bool:
    return leaf is None


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array-like leaf. A weak type stays weak, because it decides what a trace promotes to."""
    aval = jax.typeof(leaf) if not isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=bool(getattr(aval, "weak_type", False)))
