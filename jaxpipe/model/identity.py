"""Hashes of what a model computes, by which processes find out whether theirs are the same.

Nothing else would notice: two programs that differ in a number run side by side, and give parts of two different models.
"""

import re
import zlib
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.extend.core as jex
import numpy as np
from jax.sharding import Mesh

from jaxpipe.model.abstract import with_axes
from jaxpipe.model.loss import loss_terms
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.precision import NO_CASTS, Precision
from jaxpipe.model.shapes import avals, describe, is_key, signature
from jaxpipe.model.tracing import LayerShapes
from jaxpipe.types import Avals, Tree

# Of larger arrays evenly spaced parts are hashed, so that the weights of a large model take seconds, not minutes.
WHOLE, PART, PARTS = 1 << 20, 4096, 64


def of_layers(
    module: PipelineModule, shapes: Sequence[LayerShapes], mesh: Mesh, precision: Precision = NO_CASTS
) -> list[int]:
    """A hash per layer: of the shapes of its params, what it computes, and how what it holds is made, or what that is."""
    runs: dict[int, int] = {}  # like layers share a trace,
    inits: dict[Hashable, int] = {}  # and those of one kind make their params and their state alike
    hashes = []
    for index, (layer, shape) in enumerate(zip(module.layers, shapes, strict=True)):
        found = _text(layer.name, describe(shape.params), module.owners[index])
        if shape.run is not None:
            if id(shape.run) not in runs:
                runs[id(shape.run)] = of_trace(shape.run.jaxpr)
            found = _text(found, runs[id(shape.run)])
        sources = (shape.params, layer.kind.init, layer.given), (shape.state, layer.kind.init_state, layer.given_state)
        for made, init, given in sources:
            if not jax.tree.leaves(made) or init is None:
                continue
            if given is not None:
                found = _text(found, of_arrays(given))
                continue
            inputs = precision.for_init(shape.inputs)
            like = init, signature((made, inputs))
            if like not in inits:
                inits[like] = _of_function(lambda x, init=init: init(jax.random.key(0), x), mesh, inputs)
            found = _text(found, inits[like])
        hashes.append(found)
    return hashes


def of_loss(module: PipelineModule, outputs: Avals, labels: Avals, mesh: Mesh) -> int:
    """A hash of what `loss_fn` computes; 0 without one."""
    if module.loss_fn is None or labels is None:
        return 0

    def terms(outputs: Tree, labels: Tree) -> tuple[jax.Array, jax.Array]:
        found = loss_terms(module.loss_fn, outputs, labels)
        return found.total, found.weight

    return _of_function(terms, mesh, outputs, labels)


def _of_function(function: Callable[..., Tree], mesh: Mesh, *args: Tree) -> int:
    """A hash of what a function computes for arguments of these shapes, where the axes of the mesh are bound."""
    found: list[int] = []

    def trace() -> tuple[()]:
        found.append(of_trace(jax.make_jaxpr(function)(*avals(args))))
        return ()

    with_axes(mesh, trace)()
    return found[0]


def of_trace(trace: jex.ClosedJaxpr) -> int:
    """A hash of a trace and of the arrays that it has closed over."""
    # Functions are printed with their addresses, which mean nothing in another process.
    text = re.sub(r" at 0x[0-9a-f]+", "", str(trace))
    return _text(text, of_arrays(trace.consts))


def of_arrays(tree: Tree) -> int:
    """A hash of the shapes and of the numbers of arrays. Those that lie in other processes, too, count by their shapes."""
    found = _text(describe(tree))
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            if not leaf.is_fully_addressable:
                continue
            leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
        found = of_array(np.asarray(leaf), found, WHOLE)
    return found


def of_numbers(tree: Tree) -> int | None:
    """A hash of the numbers of arrays; None if this process does not hold all of them."""
    here = all(not isinstance(leaf, jax.Array) or leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))
    return of_arrays(tree) if here else None


def of_array(array: np.ndarray, before: int, whole: int | None) -> int:
    """A hash of the numbers of an array.

    Args:
      before: the hash of what comes before it.
      whole: an array of more bytes is hashed in parts; None: none is.
    """
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if whole is None or flat.size <= whole:
        return zlib.crc32(flat.data, before)
    for start in range(0, flat.size, flat.size // PARTS):
        before = zlib.crc32(flat[start : start + PART].data, before)
    return before


def _text(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())
