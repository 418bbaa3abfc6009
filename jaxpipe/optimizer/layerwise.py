"""Runs an optax transformation on stacked, sharded weights, with the results that it has on one tree entry per layer.

Layers of one kind are stored stacked, [S, slots, ...] over the ranks, and padded with zeros. A transformation that is not
elementwise must not see that: a mask by `ndim` would count two more dims, the norm of an array would be the norm of many
layers, and no path would name a layer. So `init` and `update` are traced on the natural tree (see `natural`), and the trace
is run on the stacks in three steps:

1. `trace` flattens it, and gives every value a home, which is one layer of a stack, or none.
2. `groups` makes one equation on all slots out of the equations that look the same in layers of one stack.
3. `run` computes each group on the ranks that hold its layers, and all other equations on every rank.

What a transformation does to each layer separately moves no weights between devices, whether it looks at shapes, dims,
norms or paths. Scalars that join layers, as in a global norm, travel packed, with one `all_gather` per level of joining.
Arrays of several layers that really meet (`optax.flatten`) are gathered whole, once per step.
"""

from collections.abc import Hashable
from typing import Any

import jax
import jax.extend.core as jex
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxpipe.errors import ConfigError
from jaxpipe.layout.layout import Layout
from jaxpipe.model.shapes import describe
from jaxpipe.optimizer import padded
from jaxpipe.optimizer.arguments import Optimizer, calling, fitted, plain_numpy_rules
from jaxpipe.optimizer.call import Call
from jaxpipe.optimizer.natural import NaturalTree, Place, abstract
from jaxpipe.optimizer.run import Stacked, Target
from jaxpipe.optimizer.state import OptState, StateLeaf, StatePlan, place_state, unnamed
from jaxpipe.optimizer.trace import Home, Trace
from jaxpipe.types import Avals, KeyPath, Params, Tree

STATE = -1  # the number of the state among the results; those of the updates count from 0


class Layerwise:
    """`optimizer` on the params trees of one layout.

    Args:
      optimizer: as `arguments.checked` returns it.
      params: what its `init` will be given, as arrays or shapes: a params tree, or a tree that holds params trees, such
        as `optax.LookaheadParams(fast, slow)`.
      extra: the further arguments that its `update` will be given, by name: params trees or arrays, or their shapes.

    Raises:
      ConfigError: `params` holds no params tree, or an update changes the structure or the shapes of the state.
    """

    def __init__(
        self, optimizer: Optimizer, layout: Layout, mesh: Mesh, params: Params | Avals, extra: dict[str, Tree]
    ):
        self.layout, self.mesh = layout, mesh
        self._traces: dict[Hashable, tuple[jex.ClosedJaxpr, tuple[Avals, Avals]]] = {}
        self.tree = NaturalTree(layout)
        if not self.tree.holds_params(params):
            raise ConfigError(
                f"The optimizer was given {describe(params)}, which is no params tree of this pipeline. Give it what "
                "Pipeline.init and Pipeline.value_and_grad return."
            )
        self._params = self.tree.natural_shapes(params)
        self.optimizer, shapes = fitted(optimizer, self._params)
        natural_extra = {name: self.tree.natural_shapes(value) for name, value in extra.items()}
        shapes = self._settled(shapes, natural_extra)
        leaves = place_state(shapes, self.tree)
        if unnamed(leaves):
            leaves = place_state(shapes, self.tree, self._homes_by_use(leaves, shapes, natural_extra))
        self.plan = StatePlan(self.tree, jax.tree.structure(shapes), leaves)

    # ------------------------------------------------------------------------------------------------------ what it gives

    def init(self, params: Params) -> OptState:
        """The state for `params`, which are arrays [S, slots, ...] in stacks; traceable."""
        call = self._call()
        natural = call.argument(params)
        with plain_numpy_rules():
            closed = jax.make_jaxpr(self.optimizer.init)(natural)
            return self._state(*call.run(closed, self._state_targets()))

    def update(self, grads: Params, state: OptState, params: Params, **extra: Tree) -> tuple[Params, OptState]:
        """One update; traceable.

        Args:
          grads: a params tree, or a tree that holds one.
          state: as `init` or `update` returned it.
          params, extra: trees that hold any number of params trees.

        Returns:
          (updates, new state). Updates have the shapes and the shardings of the params; None for what is frozen.

        Raises:
          ConfigError: `grads` holds no params tree, or the optimizer returns updates that do not fit the params.
        """
        if not self.tree.holds_params(grads):
            raise ConfigError(
                f"update was given the gradients {describe(grads)}, which are no params tree of this pipeline. Give it "
                "what Pipeline.value_and_grad returns."
            )
        call = self._call()
        arguments = call.argument(grads), call.state(state), call.argument(params), call.argument(extra)
        closed, (made, _) = self._traced(*arguments)
        with plain_numpy_rules():
            parts, structure = jax.tree.flatten(made, is_leaf=self.tree.is_natural)
            targets: list[Target] = []
            for number, part in enumerate(parts):
                natural = self.tree.is_natural(part)
                targets += [_target(place, number) for place in self.tree.places] if natural else [None]
            stacked, rest = call.run(closed, targets + self._state_targets())
        updates = []
        for number, part in enumerate(parts):
            if not self.tree.is_natural(part):
                updates.append(padded.fitted(rest.pop(0), part.shape))
                continue
            single = [place.cell for place in self.tree.places if place.home is None]
            cells = dict(zip(single, [rest.pop(0) for _ in single], strict=True))
            cells |= {(stack, name): a for (stack, (n, name)), a in stacked.items() if n == number}
            made = self.tree.params(cells)
            shardings = self.layout.trained(self.layout.shardings(self.mesh))
            updates.append(jax.lax.with_sharding_constraint(made, shardings))
        return jax.tree.unflatten(structure, updates), self._state(stacked, rest)

    def natural_state(self, state: OptState) -> Tree:
        """The state in the structure and the shapes in which optax would hold it for the natural tree."""
        return self.plan.natural(state)

    @property
    def traces(self) -> list[jex.ClosedJaxpr]:
        """The updates that were traced so far, the first one when this was made: what the optimizer does."""
        return [trace for trace, _ in self._traces.values()]

    def shardings(self) -> OptState:
        """The sharding of each array of the state."""
        return self.plan.shardings(self.mesh)

    def _traced(self, *arguments: Avals) -> tuple[jex.ClosedJaxpr, tuple[Avals, Avals]]:
        """Traces `update` on natural trees of shapes. Traces are kept, because tracing takes time.

        Returns:
          The trace, and the shapes of (updates, new state).
        """

        def update(grads: Tree, state: Tree, params: Tree, extra: dict[str, Tree]) -> tuple[Tree, Tree]:
            made = self.optimizer.update(grads, state, params, **calling(self.optimizer, extra))
            if not isinstance(made, tuple) or len(made) != 2:
                raise ConfigError(
                    f"The optimizer's update returns {made!r:.200}: expected a pair (updates, new state)."
                )
            return self._whole(made[0]), made[1]

        key = jax.tree.structure(arguments), tuple(map(abstract, jax.tree.leaves(arguments)))
        if key not in self._traces:
            with plain_numpy_rules():
                self._traces[key] = jax.make_jaxpr(update, return_shape=True)(*arguments)
        return self._traces[key]

    # ------------------------------------------------------------------------------------------------------------ inside

    def _state_targets(self) -> list[Target]:
        return [leaf.home and (*leaf.home, (STATE, leaf.name)) for leaf in self.plan.leaves]

    def _state(self, stacked: Stacked, rest: list[ArrayLike]) -> OptState:
        """Makes the stored state of the results of a run."""
        leaves = {(leaf.stack, leaf.name): leaf for leaf in self.plan.leaves}
        names = [leaf.name for leaf in self.plan.leaves if leaf.home is None]
        ours = {(stack, name): a for (stack, (n, name)), a in stacked.items() if n == STATE}
        ours = {key: self.plan.padded(leaves[key], _strong(a, leaves[key].aval)) for key, a in ours.items()}
        found = {name: (leaves[None, name], a) for name, a in zip(names, rest, strict=True)}
        loose = {name: self.plan.padded(leaf, _strong(a, leaf.aval)) for name, (leaf, a) in found.items()}
        state = self.plan.stored(ours, loose)
        return jax.lax.with_sharding_constraint(state, self.shardings())

    def _call(self) -> Call:
        return Call(self.tree, self.mesh, self.plan)

    def _whole(self, updates: Tree) -> Tree:
        """Broadcasts updates to the shapes of the params, as adding them to the params would do.

        Raises:
          ConfigError: they do not fit the params.
        """

        def whole(update: ArrayLike, param: jax.ShapeDtypeStruct) -> jax.Array:
            update = jax.numpy.asarray(update)
            return update if update.shape == param.shape else jax.numpy.broadcast_to(update, param.shape)

        parts, structure = jax.tree.flatten(updates, is_leaf=self.tree.is_natural)
        try:
            if not all(map(self.tree.is_natural, parts)) or not parts:
                raise ValueError("structures differ")
            return jax.tree.unflatten(structure, [jax.tree.map(whole, part, self.tree.shapes) for part in parts])
        except (TypeError, ValueError) as error:
            found = describe(jax.tree.map(jax.numpy.asarray, updates))
            raise ConfigError(
                f"The optimizer's update returns the updates {found[:400]}, which do not fit the params "
                f"{describe(self.tree.shapes)[:400]} ({str(error).splitlines()[0][:200]}). Updates have the structure of "
                "the gradients, and shapes that can be added to the params."
            ) from error

    def _settled(self, shapes: Avals, extra: dict[str, Avals]) -> Avals:
        """The shapes of the state, with dtypes and weak types that an update does not change any more.

        Raises:
          ConfigError: an update changes the structure or the shapes.
        """
        for _ in range(3):
            _, (_, after) = self._traced(self.tree.shapes, shapes, self._params, extra)
            if jax.tree.structure(after) != jax.tree.structure(shapes):
                raise ConfigError(
                    f"The optimizer's update returns a state of another structure than its init: {describe(after)} and "
                    f"{describe(shapes)}. One compiled step needs a state that keeps its structure."
                )
            same = jax.tree.map(lambda a, b: abstract(a) == abstract(b), shapes, after)
            if all(jax.tree.leaves(same)):
                return shapes
            for path, (one, two) in _pairs(shapes, after):
                if one.shape != two.shape:
                    raise ConfigError(
                        f"The optimizer's update changes the shape of its state at {jax.tree_util.keystr(path)} from "
                        f"{describe(one)} to {describe(two)}. One compiled step needs a state that keeps its shapes."
                    )
            shapes = after
        return shapes

    def _homes_by_use(self, leaves: list[StateLeaf], shapes: Avals, extra: dict[str, Avals]) -> list[Home | None]:
        """For each leaf of the state, the home that the trace of an update finds for it.

        A home that is found may let the next trace find further ones, so this goes on until nothing new is found.
        """
        closed, _ = self._traced(self.tree.shapes, shapes, self._params, extra)
        stored = self.layout.shapes()
        before, after = Call(self.tree, self.mesh), Call(self.tree, self.mesh)
        before.argument(stored)
        parts = jax.tree.leaves(self._params, is_leaf=self.tree.is_natural)
        after.argument([stored if self.tree.is_natural(part) else part for part in parts])
        homes = [leaf.home for leaf in leaves]
        num_updates = len(closed.out_avals) - len(leaves)
        while True:
            ins = [*before.homes, *homes, *after.homes]
            ins += [None] * (len(closed.in_avals) - len(ins))
            trace = Trace(closed, ins, [None] * len(ins), [None] * len(closed.out_avals))
            found = [old or v.home for old, v in zip(homes, trace.outputs[num_updates:], strict=True)]
            if found == homes:
                return homes
            homes = found


def _target(place: Place, number: int) -> Target:
    return place.home and (*place.home, (number, place.cell[1]))


def _pairs(one: Avals, two: Avals) -> list[tuple[KeyPath, tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]]:
    leaves = jax.tree_util.tree_flatten_with_path(one)[0]
    return [(path, (a, b)) for (path, a), b in zip(leaves, jax.tree.leaves(two), strict=True)]


def _strong(array: Any, aval: jax.ShapeDtypeStruct) -> jax.Array:
    """The array in the dtype that is stored, without a weak type: a flag that changed would compile the next step again."""
    return jax.lax.convert_element_type(array, aval.dtype) if _is_number(aval) else array


def _is_number(aval: jax.ShapeDtypeStruct) -> bool:
    return not jax.numpy.issubdtype(aval.dtype, jax.dtypes.extended)
