"""The state of the layers of a pipeline: made, checked, and brought onto the mesh."""

from collections.abc import Callable, Sequence

import jax
from jax.core import Tracer
from jax.sharding import Mesh

from jaxpipe.errors import LayerError
from jaxpipe.layout.init import init_state
from jaxpipe.layout.layout import Layout
from jaxpipe.layout.state_layout import StateLayout, state_layout
from jaxpipe.model.shapes import aval
from jaxpipe.model.tracing import LayerShapes
from jaxpipe.processes.group import Group
from jaxpipe.types import Avals, Key, Tree


class LayerStates:
    """What a pipeline does with the state of its layers.

    The shapes of state may depend on what a layer takes, so they are known only when a pipeline has seen inputs.

    Args:
      layout: gives that of the params.
    """

    def __init__(self, mesh: Mesh, layout: Callable[[], Layout]):
        self.mesh, self._params_layout = mesh, layout

    @property
    def layout(self) -> StateLayout:
        """Where the state lives."""
        states = self._params_layout().states
        assert isinstance(states, StateLayout), "no inputs were seen yet"
        return states

    def learn(self, shapes: Sequence[LayerShapes]) -> None:
        """Fixes the shapes of the state, if they are not known."""
        of = self._params_layout()
        of.states = state_layout(of, shapes)

    def see(self, inputs: Tree) -> None:
        """The same from the inputs of a batch, leaves [M, B, ...]."""
        of = self._params_layout()
        if of.states is None:
            example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(aval(leaf).shape[1:], aval(leaf).dtype), inputs)
            self.learn(of.module.shapes(example, of.layer_params, mesh=self.mesh, precision=of.precision))

    def init(self, key: Key, shapes: Sequence[LayerShapes]) -> Tree:
        """Fresh state on the mesh."""
        self.learn(shapes)
        return init_state(self.layout, self.mesh, key, shapes, self._params_layout().precision)

    def brought(self, given: Tree) -> Tree:
        """The tree of states on the mesh from what a user has passed: such a tree, or a list with the state of each layer.

        Raises:
          LayerError: it does not fit, or is None although layers have state; raised on all processes.
        """
        tree = Group.of(self.mesh).together(lambda: self._checked(given))
        return self.layout.from_layers(self.mesh, tree) if isinstance(tree, (list, tuple)) else tree

    def _checked(self, given: Tree) -> Tree:
        tree = self.layout.checked(given)
        if isinstance(tree, (list, tuple)) and any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
            raise LayerError(
                "layer_state is a list with the state of each layer, inside of a jit. It is brought onto the mesh outside: "
                "pass the tree that pipe.init_state or the step before has returned."
            )
        return tree

    def avals(self) -> Avals:
        """The shapes of the state, and where it lies."""
        shapes, shardings = self.layout.shapes(), self.layout.shardings(self.mesh)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
