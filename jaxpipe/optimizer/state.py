"""Where the state of an optimizer is stored: leaf by leaf with the layer that it is about, or once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.mesh import PIPE
from jaxpipe.optimizer.natural import NaturalTree, Path, abstract, text
from jaxpipe.optimizer.trace import Home
from jaxpipe.types import Tree

P = PartitionSpec


class OptState(NamedTuple):
    """The state of an optimizer, as it is stored.

    Attributes:
      stacked: what belongs to layers of a stack, `{stack: {name: [S, slots, ...]}}`, rank r holds [r].
      rest: everything else, by its path in the state that optax made: step counts, hyperparameters, moments of layers that
        occur once.
    """

    stacked: dict[str, dict[str, jax.Array]]
    rest: dict[str, jax.Array]


@dataclass(frozen=True)
class StateLeaf:
    """A leaf of the state as optax made it.

    Attributes:
      path: in that state. `before` is the part in front of the name of the layer, and `inside` the part behind it.
      aval: its shape and dtype.
      layer: the layer it is about, or None.
      stack, name: where it is stored: `stacked[stack][name]`, or `rest[name]` without a stack.
      like: the path of the param of its layer that it is about, in the natural tree; None where it is about none or more.
    """

    path: Path
    aval: jax.ShapeDtypeStruct
    layer: int | None = None
    stack: str | None = None
    name: str = ""
    before: Path = ()
    inside: Path = ()
    like: str | None = None

    @property
    def home(self) -> Home | None:
        return (self.stack, self.layer) if self.stack is not None and self.layer is not None else None


def place_state(state: Tree, tree: NaturalTree, homes_by_use: Sequence[Home | None] | None = None) -> list[StateLeaf]:
    """Says of every leaf of a state where it is stored.

    A leaf is about a layer if its path has the name of the layer followed by the path of a param in it, or by the begin of
    one, or by more. Without a name, if only that layer's update uses it. Of one layer, the n-th leaf of one path in it,
    shape and dtype lies in the n-th stack of that kind: so layers that a `multi_transform` gives to different optimizers
    share stacks, instead of having one per label.

    Args:
      state: as `optimizer.init` gives, of shapes.
      homes_by_use: per leaf, the home that the trace of an update found for it.
    """
    stack_of = {layer: stack.name for stack in tree.layout.stacks.values() for layer in stack.places}
    inside_of = {
        name: [path for path, _ in jax.tree_util.tree_flatten_with_path(layer)[0]]
        for name, layer in tree.shapes.items()
    }
    used: Counter[Any] = Counter()
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


def _names_layer(entry: Any, rest: Path, inside_of: Mapping[str, list[Path]]) -> bool:
    name = getattr(entry, "key", None)
    if not isinstance(name, str) or name not in inside_of:
        return False
    return any(all(a == b for a, b in zip(rest, path, strict=False)) for path in inside_of[name])


def unnamed(leaves: Sequence[StateLeaf]) -> bool:
    """Whether there are arrays that no path assigns to a layer."""
    return any(leaf.layer is None and leaf.aval.size > 1 for leaf in leaves)


class StatePlan:
    """Translates between the state that optax makes and the one that is stored.

    Attributes:
      leaves: what is known of each leaf, in the order of the state that optax makes.
    """

    def __init__(self, tree: NaturalTree, structure: Any, leaves: Sequence[StateLeaf]):
        self.tree, self.structure, self.leaves = tree, structure, list(leaves)

    def natural(self, state: OptState) -> Tree:
        """The state as optax would hold it."""

        def one(leaf: StateLeaf) -> Any:
            if leaf.home is None:
                return state.rest[leaf.name]
            stack, layer = leaf.home
            return state.stacked[stack][leaf.name][self.tree.layout.stacks[stack].places[layer]]

        return jax.tree.unflatten(self.structure, map(one, self.leaves))

    def stored(self, stacked: Mapping[tuple[str, str], Any], rest: Mapping[str, Any]) -> OptState:
        """The state from its arrays, by (stack, name) and by name."""
        groups: dict[str, dict[str, Any]] = {name: {} for name in self.tree.layout.stacks}
        for (stack, name), array in stacked.items():
            groups[stack][name] = array
        return OptState(groups, dict(rest))

    def shardings(self, mesh: Mesh) -> OptState:
        """Stacks over the ranks; what has the shape of the param it is about, as that; the rest on all devices."""
        params = self.tree.shardings(mesh)
        shapes = self.tree.cells(self.tree.layout.shapes())
        stacked, rest = {}, {}
        for leaf in self.leaves:
            if leaf.stack is not None:
                stacked[leaf.stack, leaf.name] = NamedSharding(mesh, P(PIPE))
                continue
            cell = (None, leaf.like or "")
            same = cell in params and shapes[cell].shape == leaf.aval.shape
            rest[leaf.name] = params[cell] if same else NamedSharding(mesh, P())
        return self.stored(stacked, rest)
