"""The layers of a model while tokens are generated, run on shapes only: what each takes, returns and remembers."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpipe.model.abstract import refuse_deadlocks
from jaxpipe.model.along_time import mixes
from jaxpipe.model.blame import Fault, blame
from jaxpipe.model.capture import Captured, capture
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.kinds import Kind
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.paths import layer_name
from jaxpipe.model.precision import Precision
from jaxpipe.model.shapes import avals, describe, signature
from jaxpipe.model.tracing import LayerShapes
from jaxpipe.types import Avals, Params, Tree


@dataclass(frozen=True)
class Generating:
    """Layers traced for one length of chunks.

    Attributes:
      shapes: per layer; `run(params, x, context) -> (y, aux)` takes cache and position from the context.
      caches: per layer, the abstract values of its cache, without leaves if it has none.
      starts: per layer with a cache, `start(params, state, x) -> cache`, before any position was seen; else None.
      chunk: how many positions a layer is given at once.
    """

    shapes: list[LayerShapes] = field(default_factory=list)
    caches: list[Avals] = field(default_factory=list)
    starts: list[Captured | None] = field(default_factory=list)
    chunk: int = 1


POSITION = jax.ShapeDtypeStruct((), jnp.int32)


def trace(
    module: PipelineModule,
    params: Sequence[Params],
    ids: jax.ShapeDtypeStruct,
    length: int,
    mesh: Mesh,
    precision: Precision,
    caches: Sequence[Avals] | None = None,
    states: Sequence[Tree] | None = None,
) -> Generating:
    """Runs the layers on the shapes of a chunk of ids.

    Args:
      params: per layer, arrays or their shapes.
      ids: the chunk, int32 [B, chunk].
      length: of the whole sequences, for which caches have room.
      caches: of a trace with another chunk, that this one must agree with; None: they are made here.
      states: per layer, the state that it owns, arrays or their shapes; None: no layer has any.

    Raises:
      LayerError: a layer does not take what it is given, or returns another cache than it got.
    """
    found = Generating(chunk=ids.shape[1])
    seen: dict[Hashable, Any] = {}

    def all_layers() -> tuple[()]:
        x: Avals = precision.inputs(ids)
        for index, layer in enumerate(module.layers):
            source = f"{module.label(index - 1)} returns" if index else "generate gives it"
            with blame(module.label(index), lambda x=x, source=source: f"{source} {describe(x)}"):
                held = avals(params[index])
                state = {} if states is None else avals(states[index])
                owned = precision.of_layer(layer_name(index), held)
                given = state
                if module.owners[index] != index:
                    owned, given = (
                        found.shapes[module.owners[index]].computed,
                        found.shapes[module.owners[index]].state,
                    )
                last = index + 1 == module.num_layers
                known = layer.kind, signature((owned, given, x)), last
                if known not in seen:
                    cache = None if caches is None else caches[index]
                    seen[known] = _layer(layer.kind, owned, given, x, length, cache, NO if last else precision, mesh)
                y, run, cache, start = seen[known]
                found.shapes.append(LayerShapes(held, x, y, run, owned, state=state, changes=unchanged(given)))
                found.caches.append(cache)
                found.starts.append(start)
                x = y
        return ()

    module.on_mesh(mesh, all_layers)
    return found


def unchanged(state: Avals) -> tuple[bool, ...]:
    """For each leaf of a layer's state, that generation does not change it."""
    return (False,) * len(jax.tree.leaves(state))


NO = Precision()


def _layer(
    kind: Kind,
    params: Avals,
    state: Avals,
    x: Avals,
    length: int,
    cache: Avals | None,
    precision: Precision,
    mesh: Mesh,
) -> tuple[Avals, Captured, Avals, Captured | None]:
    start: Captured | None = None
    if kind.init_cache is not None and (cache is None or jax.tree.leaves(cache)):
        init_cache = kind.init_cache
        start = capture(lambda params, state, x: init_cache(params, state, x, length), params, state, x)
        cache = start.outputs if cache is None else cache
    has_cache = bool(jax.tree.leaves(cache))
    position: Any = POSITION
    context = Context(state=state, cache=cache if has_cache else None, position=position)

    def call(params: Params, x: Tree, context: Context) -> tuple[Tree, Aux]:
        y, aux = kind.apply(params, x, context, False)
        return precision.handed_on(y), Aux(cache=aux.cache if has_cache else None)

    run = capture(call, params, x, context)
    refuse_deadlocks(run.jaxpr, mesh)
    y, aux = run.outputs
    if has_cache and signature(aux.cache) != signature(cache):
        raise Fault(
            f"returns another cache than it was given: {describe(aux.cache)}, and not {describe(cache)}. While tokens are "
            "generated, apply(params, x, cache=, position=) returns (y, cache) with a cache of the same structure, shapes "
            "and dtypes as that of init_cache."
        )
    return y, run, cache if has_cache else {}, start if has_cache else None


def mixing(module: PipelineModule, whole: Generating) -> tuple[int, str] | None:
    """The first layer without a cache that is not known to treat every position by itself, and what it does.

    Args:
      whole: traced with whole sequences of one row as the chunk.
    """
    for index, (layer, shapes) in enumerate(zip(module.layers, whole.shapes, strict=True)):
        assert shapes.run is not None
        if jax.tree.leaves(whole.caches[index]):
            continue
        own = whole.shapes[module.owners[index]]
        fixed = [[None] * len(jax.tree.leaves(each)) for each in (own.computed, own.state)]
        inputs = [*fixed[0], *dims(shapes.inputs, whole.chunk), *fixed[1], None]
        why = mixes(shapes.run.jaxpr, inputs, dims(shapes.outputs, whole.chunk), layer.kind.knows_position)
        if why is not None:
            return index, why
    return None


def dims(tree: Avals, chunk: int) -> list[int | None]:
    """Per leaf, the dim along which the positions of a chunk lie: dim 1, where that is as long as the chunk; or None."""
    return [1 if leaf.ndim > 1 and leaf.shape[1] == chunk else None for leaf in jax.tree.leaves(tree)]
