"""The tree that an optimizer sees, one entry per layer that owns weights, and the params tree that it stands for.

    {"layer_000": what the layer's init made, "layer_001": ..., ...}

A later use of a tie has no entry, nor has a layer without weights. Leaves without derivatives (integers, booleans) are None
there: no optimizer should see them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxpipe.model.layout import Layout, layer_name
from jaxpipe.model.shapes import is_inexact
from jaxpipe.optimizer.trace import Home
from jaxpipe.types import Tree

Path = tuple[Any, ...]
Cell = tuple[
    str | None, str
]  # a leaf of the params tree: (stack, path in a layer), or (None, path in the natural tree)


@dataclass(frozen=True)
class Place:
    """Where a leaf of the natural tree is stored: its layer, and the cell of the params tree that holds it."""

    layer: int
    cell: Cell

    @property
    def home(self) -> Home | None:
        return None if self.cell[0] is None else (self.cell[0], self.layer)


def text(path: Path) -> str:
    """A path as JAX prints it."""
    return jax.tree_util.keystr(path)


class NaturalTree:
    """Translates between params trees and natural trees of one layout.

    Attributes:
      names: the entry of each layer that owns weights.
      shapes: the natural tree, of ShapeDtypeStruct.
      places: per leaf of the natural tree, where it is stored.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        stored = layout.shapes()
        owners = [layer for stack in layout.stacks.values() for layer in stack.places]
        owners += [shared.layer for shared in layout.shared.values()]
        self.names = {layer: layer_name(layer) for layer in sorted(owners)}
        self.layer_of = {name: layer for layer, name in self.names.items()}
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(stored)
        self._cells = [self._cell(path) if is_inexact(leaf) else None for path, leaf in leaves]
        self.shapes = self.read(stored)
        self._natural_structure = jax.tree.structure(self.shapes)
        stack_of = {layer: stack.name for stack in layout.stacks.values() for layer in stack.places}
        self.places: list[Place] = []
        for path, _ in jax.tree_util.tree_flatten_with_path(self.shapes)[0]:
            layer = self.layer_of[path[0].key]
            stack = stack_of.get(layer)
            self.places.append(Place(layer, (stack, text(path[1:])) if stack else (None, text(path))))

    def _cell(self, path: Path) -> Cell:
        if path[0].key == "stacked":
            return path[1].key, text(path[2:])
        entry = jax.tree_util.DictKey(layer_name(self.layout.shared[path[1].key].layer))
        return None, text((entry, *path[2:]))

    def read(self, params: Tree) -> dict[str, Tree]:
        """The natural tree of a params tree, of arrays or of shapes."""
        layers: dict[str, Tree] = {}
        for name, stack in self.layout.stacks.items():
            for layer, place in stack.places.items():
                layers[self.names[layer]] = jax.tree.map(lambda a, at=place: _row(a, at), params["stacked"][name])
        for name, shared in self.layout.shared.items():
            layers[self.names[shared.layer]] = params["shared"][name]
        layers = jax.tree.map(lambda a: a if is_inexact(a) else None, layers)
        return {name: layers[name] for name in self.names.values()}

    def cells(self, params: Tree) -> dict[Cell, Any]:
        """The leaves of a params tree that an optimizer sees, by cell."""
        return {cell: a for cell, a in zip(self._cells, jax.tree.leaves(params), strict=True) if cell is not None}

    def params(self, cells: dict[Cell, jax.Array]) -> Tree:
        """The inverse; zeros for leaves that an optimizer does not see."""
        blank = jax.tree.leaves(self.layout.shapes())
        leaves = [
            jnp.zeros(a.shape, a.dtype) if cell is None else cells[cell]
            for cell, a in zip(self._cells, blank, strict=True)
        ]
        return jax.tree.unflatten(self._structure, leaves)

    def shardings(self, mesh: Mesh) -> dict[Cell, NamedSharding]:
        """Where the leaves lie that an optimizer sees, by cell."""
        return self.cells(self.layout.shardings(mesh))

    # ------------------------------------------------------------------------------------- trees that hold such trees

    def holds_params(self, tree: Tree) -> bool:
        """Whether a tree is a params tree, or holds one (a pair of them, say)."""
        return any(map(self.is_params, jax.tree.leaves(tree, is_leaf=self.is_params)))

    def is_params(self, x: Any) -> bool:
        """Whether `x` has the structure of the params tree."""
        return isinstance(x, dict) and x.keys() == {"stacked", "shared"} and jax.tree.structure(x) == self._structure

    def is_natural(self, x: Any) -> bool:
        """Whether `x` has the structure of the natural tree."""
        return isinstance(x, dict) and x.keys() == self.layer_of.keys() and self._fits(x)

    def _fits(self, x: Any) -> bool:
        return jax.tree.structure(x) == self._natural_structure

    def natural_shapes(self, tree: Tree) -> Tree:
        """The tree as shapes, with a natural tree in the place of each params tree."""
        parts, rebuild = self.split(tree)
        return rebuild([self.shapes if self.is_params(part) else abstract(part) for part in parts])

    def split(self, tree: Tree) -> tuple[list[Any], Callable[[Sequence[Any]], Tree]]:
        """The params trees and the other leaves of a tree, in order, and the function that puts such things back."""
        parts, structure = jax.tree.flatten(tree, is_leaf=self.is_params)
        return parts, lambda values: jax.tree.unflatten(structure, values)


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, weakly typed where it is: that decides what a trace promotes to."""
    aval = jax.typeof(leaf) if not isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=bool(getattr(aval, "weak_type", False)))


def _row(a: Any, place: tuple[int, int]) -> Any:
    return jax.ShapeDtypeStruct(a.shape[2:], a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a[place]
