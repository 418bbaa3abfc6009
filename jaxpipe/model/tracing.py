"""The layers of a model run on shapes only: what each takes and returns, and its trace."""

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh

from jaxpipe.model import keys
from jaxpipe.model.abstract import on_one_data_rank, on_one_device, refuse_deadlocks, with_axes
from jaxpipe.model.axes import AxisRules
from jaxpipe.model.blame import Fault, blame
from jaxpipe.model.capture import Captured, capture
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.kinds import BoundLayer
from jaxpipe.model.paths import layer_name
from jaxpipe.model.precision import NO_CASTS, Precision
from jaxpipe.model.reports import with_terms
from jaxpipe.model.shapes import avals, describe, signature
from jaxpipe.model.states import changes, paths_of
from jaxpipe.types import Avals, Key, Params, Tree

Traced = TypeVar("Traced")


@dataclass(frozen=True)
class LayerShapes:
    """The shapes of one layer, trees of ShapeDtypeStruct, and its trace.

    Attributes:
      params: the params that it owns, as they are stored; `{}` for a later use of a tied layer.
      inputs: what it takes, leaves [B, ...].
      outputs: what it returns, leaves [B, ...].
      run: `run(params, x, context) -> (y, aux)`, the layer as it was traced. The key of the context is None if the layer
        looks at none. Without a mesh there is no trace, and this is None.
      computed: the params that it owns, in the dtypes that it computes with.
      aux: what it gives beside its output.
      state: the state that it owns; `{}` if there is none, and for a later use of a tied layer.
      changes: for each leaf of the state that it is given, whether it changes it; all True where there is no trace.
    """

    params: Avals
    inputs: Avals
    outputs: Avals
    run: Captured | None = None
    computed: Avals = None
    aux: Aux = Aux()
    state: Avals = field(default_factory=dict)
    changes: tuple[bool, ...] = ()


class _Found(NamedTuple):
    """What is known of a layer that was run on shapes; see `LayerShapes`."""

    outputs: Avals
    aux: Aux
    changes: tuple[bool, ...]
    run: Captured | None = None


class Tracer:
    """Runs layers on shapes.

    Args:
      layers, owners, axis_rules, axes: those of a `PipelineModule`.
    """

    def __init__(self, layers: Sequence[BoundLayer], owners: Sequence[int], axis_rules: AxisRules, axes: set[str]):
        self.layers, self.owners, self.axis_rules, self.axes = layers, owners, axis_rules, axes
        self._warned = False

    def label(self, index: int) -> str:
        """The name of a layer in messages, such as `layer 2 (Block)`."""
        return f"layer {index} ({self.layers[index].name})"

    def init_layer(self, index: int, key: Key, inputs: Tree) -> Params:
        """Makes the params of one layer.

        Args:
          key: the key of the model; each layer uses its own key, which is made of it.
          inputs: arrays of the shapes that the layer takes.

        Returns:
          The params; `{}` for a later use of a tied layer.
        """
        if self.owners[index] != index:
            return {}
        return self.layers[index].init(keys.init_key(key, index), inputs)

    def init_state(self, index: int, key: Key, inputs: Tree) -> Tree:
        """Makes the state of one layer, from the same arguments as `init_layer`; `{}` if it has none or shares one."""
        make = self.layers[index].init_state
        return {} if make is None or self.owners[index] != index else make(keys.init_key(key, index), inputs)

    def shapes(
        self,
        example: Tree,
        params: Sequence[Params] | None = None,
        states: Sequence[Tree] | None = None,
        *,
        train: bool = True,
        key: jax.ShapeDtypeStruct | None = keys.KEY,
        mesh: Mesh | None = None,
        precision: Precision = NO_CASTS,
    ) -> list[LayerShapes]:
        """Runs the layers on shapes only.

        Args:
          example: one micro-batch of inputs, arrays or ShapeDtypeStruct [B, ...].
          params: the params of each layer, arrays or ShapeDtypeStruct. Without them, the `init` of each layer decides.
          states: the same of their state.
          train, key: what each layer is called with; `key` is the shape of a key, or None.
          mesh: the mesh whose axes layers may name. With None, "data" is an axis of one device.
          precision: what params and inputs are cast to, and what layers hand on. `init` sees long inputs all the same.

        Returns:
          The shapes of each layer, in order; of the last one those of what it returns, before `precision.outputs`.

        Raises:
          LayerError: a layer does not accept what the layer before it returns. The message names both. What a layer itself
            raises is raised as it is, with a note that names the layer.
        """
        found: list[LayerShapes] = []
        trace = functools.partial(self._trace, found, example, params, states, train, key, mesh, precision)
        if mesh is None:

            def afresh() -> None:
                found.clear()
                trace()

            self.alone(afresh)
        else:
            self.on_mesh(mesh, trace)
        self._warn_of_dropped()
        return found

    def on_mesh(self, mesh: Mesh, trace: Callable[[], tuple[()]]) -> None:
        """Runs `trace` on shapes, with the axes of the mesh bound and the logical names of activations in effect."""
        with self._logical_names(mesh):
            with_axes(mesh, trace)()

    def _warn_of_dropped(self) -> None:
        """Tells once per model what its layers sow and nobody takes."""
        dropped = {
            self.label(index): layer.kind.dropped for index, layer in enumerate(self.layers) if layer.kind.dropped
        }
        if self._warned or not dropped:
            return
        self._warned = True
        first, names = next(iter(dropped.items()))
        others = f", and {len(dropped) - 1} other layers sow something as well" if len(dropped) > 1 else ""
        warnings.warn(
            f"{first} sows {', '.join(sorted(names))}, which nobody takes, so it is dropped{others}. To train or report "
            "what a module sows, say so in its spec: jaxpipe.LayerSpec(...).sown(losses=..., metrics=...), with the names "
            "of collections for flax.linen, and types of variables for flax.nnx.",
            stacklevel=2,
        )

    def alone(self, trace: Callable[[], Traced]) -> Traced:
        """What `trace` gives where layers are traced as on one device, whatever axes they name.

        What fails so is traced once more without: a layer may bring a mesh of its own along, as a NamedSharding does.
        """
        names = self._logical_names(jax.sharding.get_abstract_mesh())
        with contextlib.suppress(Exception), on_one_device(self.axes), names:
            return trace()
        return trace()

    def _logical_names(self, mesh: Any) -> contextlib.AbstractContextManager[None]:
        """What logical names of activations stand for in layers that are traced inside."""
        if "flax" not in sys.modules:  # who uses it has imported it
            return contextlib.nullcontext()
        from jaxpipe.model import flax_axes

        return flax_axes.in_effect(self.axis_rules, mesh)

    def _trace(
        self,
        found: list[LayerShapes],
        example: Tree,
        params: Sequence[Params] | None,
        states: Sequence[Tree] | None,
        train: bool,
        key: Avals,
        mesh: Mesh | None,
        precision: Precision,
    ) -> tuple[()]:
        """Fills `found`; if there is a mesh, its axes are bound. Layers of one kind on the same shapes are traced once."""
        seen: dict[Hashable, _Found] = {}
        made: dict[Hashable, Avals] = {}
        x = precision.inputs(avals(example))
        rows = jax.tree.leaves(x)[0].shape[0] if jax.tree.leaves(x) else 1
        for index, layer in enumerate(self.layers):
            source = f"{self.label(index - 1)} returns" if index else "the example inputs are"
            with blame(self.label(index), lambda x=x, source=source: f"{source} {describe(x)}"):
                long = precision.for_init(x)
                held = self._init_shapes(index, long, mesh) if params is None else avals(params[index])
                state = self._state_shapes(index, long, mesh, made) if states is None else avals(states[index])
                computed = precision.of_layer(layer_name(index), held)
                owned = computed if self.owners[index] == index else found[self.owners[index]].computed
                given = state if self.owners[index] == index else found[self.owners[index]].state
                args = owned, x, Context(key if layer.kind.uses_key else None, given)
                same = layer.kind, signature(args)
                apply = with_terms(functools.partial(layer.kind.apply, train=train), rows)
                if same in seen:
                    pass
                elif mesh is None:
                    y, aux = on_one_data_rank(apply, *args)
                    seen[same] = _Found(y, aux, (True,) * len(jax.tree.leaves(given)))
                else:
                    run = Captured(*jax.make_jaxpr(apply, return_shape=True)(*args))
                    refuse_deadlocks(run.jaxpr, mesh)
                    y, aux = run.outputs
                    seen[same] = _Found(y, aux, _changes(run, args), run)
                known = seen[same]
                self._refuse_tied_state(index, given, known.changes if mesh is not None else ())
                short = precision.handed_on(known.outputs)
                if index + 1 < len(self.layers) and signature(short) != signature(known.outputs):
                    same = "handed on", same
                    if same not in seen:
                        run = None if known.run is None else capture(_then(precision.handed_on, known.run), *args)
                        seen[same] = known._replace(outputs=short, run=run)
            known = seen[same]
            x, inputs = known.outputs, x
            found.append(LayerShapes(held, inputs, x, known.run, computed, known.aux, state, known.changes))
        return ()

    def _init_shapes(self, index: int, x: Avals, mesh: Mesh | None) -> Avals:
        given = self.layers[index].given
        if given is not None:
            return avals(given) if self.owners[index] == index else {}
        return _made(lambda x: self.init_layer(index, jax.random.key(0), x), x, mesh)

    def _state_shapes(self, index: int, x: Avals, mesh: Mesh | None, made: dict[Hashable, Avals]) -> Avals:
        """The shapes of what `init_state` gives; `made` has those of like layers."""
        kind, given = self.layers[index].kind, self.layers[index].given_state
        like = kind, signature(x)
        if kind.init_state is None or self.owners[index] != index:
            return {}
        if given is not None:
            return avals(given)
        if like not in made:
            made[like] = _made(lambda x: self.init_state(index, jax.random.key(0), x), x, mesh)
        return made[like]

    def _refuse_tied_state(self, index: int, state: Avals, changed: Sequence[bool]) -> None:
        """Raises Fault if a layer that shares its state with another one changes it."""
        together = [other for other, owner in enumerate(self.owners) if owner == self.owners[index]]
        if any(changed) and len(together) > 1:
            raise Fault(
                f"changes its state {', '.join(map(repr, paths_of(state, changed)))}, and is tied: layers {together} share "
                "it. Several micro-batches are on their way at once, so a later layer would change it when an earlier one "
                "has already seen the next micro-batch, and nothing would be as in a loop over micro-batches. Put what has "
                "state into a layer that is not tied."
            )


def _changes(run: Captured, args: tuple[Avals, Avals, Context]) -> tuple[bool, ...]:
    params, x, context = args
    before, results = jax.tree.leaves((params, x, context.key)), jax.tree.leaves(run.outputs[0])
    return changes(run.jaxpr, len(results), len(before), len(jax.tree.leaves(context.state)))


def _then(after: Callable[[Tree], Tree], run: Callable[..., tuple[Tree, Aux]]) -> Callable[..., tuple[Tree, Aux]]:
    def both(*args: Tree) -> tuple[Tree, Aux]:
        y, aux = run(*args)
        return after(y), aux

    return both


def _made(init: Callable[[Tree], Tree], x: Avals, mesh: Mesh | None) -> Avals:
    if mesh is None:
        return on_one_data_rank(init, x)
    made = capture(init, x)
    refuse_deadlocks(made.jaxpr, mesh)
    return made.outputs
