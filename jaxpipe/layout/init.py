"""What training begins with, weights and state of layers: fresh, made where it will live, or that of built modules."""

from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.errors import LayerError
from jaxpipe.layout.entries import Shared, Stack
from jaxpipe.layout.layout import SHARED, STACKED, Address, Layout
from jaxpipe.layout.placement import Placement, fit
from jaxpipe.layout.state_layout import StateLayout
from jaxpipe.mesh import DATA, PIPE, data_size, manual_axes
from jaxpipe.model import keys
from jaxpipe.model.precision import Precision
from jaxpipe.model.tracing import LayerShapes
from jaxpipe.types import Key, Params, Tree

P = PartitionSpec


def init_params(layout: Layout, mesh: Mesh, key: Key, shapes: Sequence[LayerShapes]) -> Params:
    """Makes the params; see `_init`.

    Raises:
      LayerError: a layer was built on shapes alone.
    """
    layers = layout.module.layers
    made = [layer.kind.init for layer in layers]
    return _init(layout, mesh, key, shapes, made, [layer.given for layer in layers], layout.precision)


def init_state(layout: StateLayout, mesh: Mesh, key: Key, shapes: Sequence[LayerShapes], precision: Precision) -> Tree:
    """Makes the state of the layers, as `init_params` makes their params."""
    if layout.is_empty:
        return layout.shapes()
    layers = layout.module.layers
    made = [layer.kind.init_state or (lambda key, x: {}) for layer in layers]
    return _init(layout, mesh, key, shapes, made, [layer.given_state for layer in layers], precision)


def _init(
    layout: Layout,
    mesh: Mesh,
    key: Key,
    shapes: Sequence[LayerShapes],
    inits: Sequence[Callable[[Key, Tree], Params]],
    held: Sequence[Params | None],
    precision: Precision,
) -> Params:
    """Makes what the layers hold, each rank its own: no device ever holds the whole model.

    Those of layers that are given some are copied from there, array by array; the others are made from `key`. Where they
    are cut over the data ranks, each makes one layer of a stack after the other, and keeps its part of each.

    What is made for a layer depends on `key` and its index only, not on the partition.

    Args:
      inits: per layer, the function that makes it: `init(key, x)`.
      held: per layer, what it is given, or None.
    """
    module = layout.module
    brought = {layer for layer in range(module.num_layers) if held[layer] is not None}
    addresses = {layer: address for layer in range(module.num_layers) if (address := layout.address_of(layer))}
    given = {address for layer, address in addresses.items() if layer in brought}
    fresh = set(addresses.values()) - given
    if not given:
        return _made(layout, mesh, key, shapes, inits, precision, fresh)
    for layer in sorted(brought):
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(held[layer])):
            raise LayerError(
                f"{module.label(layer)} was built on shapes alone (nnx.eval_shape, say), so there are no weights to begin "
                "with. Pass `layers` to jaxpipe.initialize, or write jaxpipe.LayerSpec, which makes fresh ones."
            )
    layers = [{} if own is None else own for own in held]
    with jax.ensure_compile_time_eval():  # inside of a caller's jit these are constants
        copied = layout.from_layers(mesh, layers, given)
    made = _made(layout, mesh, key, shapes, inits, precision, fresh)
    return {group: {name: (made[group] | copied[group])[name] for name in layout.names(group)} for group in copied}


def _made(
    layout: Layout,
    mesh: Mesh,
    key: Key,
    shapes: Sequence[LayerShapes],
    inits: Sequence[Callable[[Key, Tree], Params]],
    precision: Precision,
    fresh: Collection[Address],
) -> Params:
    """The entries `fresh` of the tree, made from `key`."""
    stacks, singles = layout.names(STACKED, fresh), layout.names(SHARED, fresh)
    if not stacks and not singles:
        return {STACKED: {}, SHARED: {}}

    def zeros(layer: int) -> Tree:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), precision.for_init(shapes[layer].inputs))

    def one_rank(key: jax.Array, data_rank: jax.Array, layers: dict[str, jax.Array]) -> Params:
        def mine(made: jax.Array, stored: jax.ShapeDtypeStruct, placement: Placement) -> jax.Array:
            whole, dim = fit(made, stored.shape), placement.dim(DATA)
            if dim is None:
                return whole
            size = whole.shape[dim] // data_size(mesh)
            return jax.lax.dynamic_slice_in_dim(whole, data_rank[0] * size, size, axis=dim)

        def one_stack(stack: Stack, layers_here: jax.Array) -> Params:
            some = next(iter(stack.places))
            inputs = zeros(some)

            def one_slot(layer: jax.Array) -> Params:
                made = inits[some](keys.init_key(key, layer), inputs)
                made = jax.tree.map(lambda a: jnp.where(layer >= 0, a, jnp.zeros_like(a)), made)
                return jax.tree.map(mine, made, stack.stored, stack.placements)

            # One after the other: a vmap over the slots would hold every intermediate of init at once.
            return jax.tree.map(lambda a: a[None], jax.lax.map(one_slot, layers_here[0]))

        return {name: one_stack(layout.stacks[name], layers[name]) for name in stacks}

    def make(key: jax.Array) -> Params:
        table = {}
        for name in stacks:
            stack = layout.stacks[name]
            rows = [[-1] * stack.slots for _ in range(layout.num_ranks)]
            for layer, (rank, slot) in stack.places.items():
                rows[rank][slot] = layer
            table[name] = jnp.asarray(rows, jnp.int32)
        stacked = jax.shard_map(
            one_rank,
            mesh=mesh,
            in_specs=(P(), P(DATA) if DATA in mesh.axis_names else P(), P(PIPE)),
            out_specs=_of(layout.specs, fresh)[STACKED],
            axis_names=manual_axes(mesh),
            check_vma=False,  # users' init functions need not know about varying axes
        )(key, jnp.arange(data_size(mesh), dtype=jnp.int32), table)

        def one_layer(shared: Shared) -> Params:
            made = inits[shared.layer](keys.init_key(key, shared.layer), zeros(shared.layer))
            return jax.tree.map(lambda a, stored: fit(jnp.asarray(a), stored.shape), made, shared.stored)

        shared = {name: one_layer(layout.shared[name]) for name in singles}
        # Python scalars and the like are weakly typed; the first optimizer step would change that, and compile again.
        return jax.tree.map(
            lambda a: jax.lax.convert_element_type(a, jnp.result_type(a)), {STACKED: stacked, SHARED: shared}
        )

    return jax.jit(make, out_shardings=_of(layout.shardings(mesh), fresh))(key)


def _of(tree: Params, addresses: Collection[Address]) -> Params:
    """Some entries of a tree like the params tree."""
    return {
        group: {name: entry for name, entry in entries.items() if (group, name) in addresses}
        for group, entries in tree.items()
    }
