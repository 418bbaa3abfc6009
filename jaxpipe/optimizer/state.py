"""Where the state of an optimizer is stored: each leaf with the layer that it is about, or once."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from jaxpipe.layout.entries import in_stack
from jaxpipe.layout.placement import Placement, fit
from jaxpipe.optimizer.natural import NaturalTree, abstract, text
from jaxpipe.optimizer.trace import Home
from jaxpipe.types import Avals, KeyPath, Structure, Tree


class OptState(NamedTuple):
    """The state of an optimizer, as it is stored.

    Attributes:
      stacked: what belongs to layers of a stack, `{stack: {name: [S, slots, ...]}}`; rank r holds row [r] of each array.
      rest: everything else, by its path in the state that optax made: step counts, hyperparameters, and moments of layers
        that occur once.
    """

    stacked: dict[str, dict[str, jax.Array]]
    rest: dict[str, jax.Array]


@dataclass(frozen=True)
class StateLeaf:
    """A leaf of the state that optax made.

    Attributes:
      path: its path in that state.
      aval: its shape and dtype.
      layer: the layer that it is about, or None.
      stack, name: it is stored as `stacked[stack][name]`, or as `rest[name]` if `stack` is None.
      before, inside: the parts of `path` before and after the name of the layer.
      like: if it is about exactly one param of its layer, the path of that param in the natural tree.
    """

    path: KeyPath
    aval: jax.ShapeDtypeStruct
    layer: int | None = None
    stack: str | None = None
    name: str = ""
    before: KeyPath = ()
    inside: KeyPath = ()
    like: str | None = None

    @property
    def home(self) -> Home | None:
        """(stack, layer), or None if it is in no stack."""
        return (self.stack, self.layer) if self.stack is not None and self.layer is not None else None


def place_state(state: Avals, tree: NaturalTree, homes_by_use: Sequence[Home | None] | None = None) -> list[StateLeaf]:
    """Decides for every leaf of a state where it is stored.

    A leaf is about a layer if its path has the name of the layer, followed by the path of a param of the layer, by the
    beginning of such a path, or by such a path and more. A leaf whose path names no layer is about a layer if only the
    update of that layer uses it.

    Within a layer, leaves of one path, shape and dtype are numbered, and the n-th leaf goes into the n-th array of that
    kind. So layers that a `multi_transform` gives to different optimizers share arrays, instead of having one per label.

    Args:
      state: the shapes of what `optimizer.init` returns.
      homes_by_use: for each leaf, the home that the trace of an update found for it.

    Returns:
      One entry per leaf, in the order of the leaves.
    """
    stack_of = {layer: stack.name for stack in tree.layout.stacks.values() for layer in stack.places}
    inside_of = {
        name: [path for path, _ in jax.tree_util.tree_flatten_with_path(layer)[0]]
        for name, layer in tree.shapes.items()
    }
    used: Counter[Hashable] = Counter()
    found: list[StateLeaf] = []
    for number, (path, aval) in enumerate(jax.tree_util.tree_flatten_with_path(state)[0]):
        aval = abstract(aval)
        start = next((i for i, e in enumerate(path) if _names_layer(e, path[i + 1 :], inside_of)), None)
        layer, before, inside, like = None, path, (), None
        if start is not None:
            layer, before, inside = tree.layer_of[path[start].key], path[:start], path[start + 1 :]
            like = text(path[start:]) if inside in inside_of[path[start].key] else None
        elif homes_by_use is not None and (home := homes_by_use[number]) is not None and aval.size > 1:
            layer = home[1]
        stack = None if layer is None else stack_of.get(layer)
        name = text(path)
        if stack is not None:
            kind = f"{text(inside) if start is not None else 'by use'} {aval.dtype}{list(aval.shape)}"
            used[layer, kind] += 1
            name = f"{kind} {used[layer, kind]}"
        found.append(StateLeaf(path, aval, layer, stack, name, before, inside, like))
    return found


def _names_layer(entry: object, rest: KeyPath, inside_of: Mapping[str, list[KeyPath]]) -> bool:
    """Whether the entry of a path is the name of a layer, and the rest of the path fits a param of that layer."""
    name = getattr(entry, "key", None)
    if not isinstance(name, str) or name not in inside_of:
        return False
    return any(all(a == b for a, b in zip(rest, path, strict=False)) for path in inside_of[name])


def unnamed(leaves: Sequence[StateLeaf]) -> bool:
    """Whether the state has arrays of more than one element that are about no layer."""
    return any(leaf.layer is None and leaf.aval.size > 1 for leaf in leaves)


class StatePlan:
    """Translates between the state that optax makes and the one that is stored.

    Attributes:
      structure: the structure of the state that optax makes.
      leaves: what is known about each of its leaves, in order.
    """

    def __init__(self, tree: NaturalTree, structure: Structure, leaves: Sequence[StateLeaf]):
        self.tree, self.structure, self.leaves = tree, structure, list(leaves)
        paths = jax.tree_util.tree_flatten_with_path(tree.shapes)[0]
        self._shapes = {text(path): leaf.shape for path, leaf in paths}

    def natural(self, state: OptState) -> Tree:
        """The state in the structure and the shapes in which optax would hold it for the natural tree."""

        def one(leaf: StateLeaf) -> jax.Array:
            if leaf.home is None:
                return fit(state.rest[leaf.name], leaf.aval.shape)
            stack, layer = leaf.home
            array = state.stacked[stack][leaf.name][self.tree.layout.stacks[stack].places[layer]]
            return fit(array, leaf.aval.shape)

        return jax.tree.unflatten(self.structure, map(one, self.leaves))

    def stored(self, stacked: Mapping[tuple[str, str], Any], rest: Mapping[str, Any]) -> OptState:
        """Makes a stored state of its parts, which are arrays or shardings.

        Args:
          stacked: by (stack, name).
          rest: by name.
        """
        groups: dict[str, dict[str, Any]] = {name: {} for name in self.tree.layout.stacks}
        for (stack, name), array in stacked.items():
            groups[stack][name] = array
        return OptState(groups, dict(rest))

    def placement(self, leaf: StateLeaf) -> Placement:
        """How the array that a leaf is stored in, or with others of its stack, is cut.

        Stacks are cut over the ranks. A leaf in the shape of the param that it is about, perhaps with more dims in front,
        is cut like that param. Of all others, those that a layer is known to use alone are cut over the data ranks if
        params are.
        """
        own = Placement()
        if leaf.like is not None:
            shape = self._shapes[leaf.like]
            lead = len(leaf.aval.shape) - len(shape)
            if lead >= 0 and leaf.aval.shape[lead:] == shape:
                own = self.tree.placements[leaf.like].behind(lead)
        elif leaf.layer is not None and not leaf.inside:
            own = self.tree.layout.over_data(leaf.aval)
        return own if leaf.stack is None else in_stack(own)

    def padded(self, leaf: StateLeaf, array: Any) -> Any:
        """An array that a leaf is stored in, or with others of its stack, with zeros in the padding."""
        shape = leaf.aval.shape if leaf.stack is None else (*array.shape[:2], *leaf.aval.shape)
        return fit(array, self.placement(leaf).stored(shape))

    def shardings(self, mesh: Mesh) -> OptState:
        """The sharding of each array of a stored state; what is about no layer lies on all devices."""
        stacked, rest = {}, {}
        for leaf in self.leaves:
            sharding = NamedSharding(mesh, self.placement(leaf).spec)
            if leaf.stack is not None:
                stacked[leaf.stack, leaf.name] = sharding
            else:
                rest[leaf.name] = sharding
        return self.stored(stacked, rest)
