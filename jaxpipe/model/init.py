"""Fresh weights, made where they will live."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.mesh import PIPE, manual_axes
from jaxpipe.model import keys
from jaxpipe.model.layout import SHARED, STACKED, Layout, Stack
from jaxpipe.model.module import LayerShapes
from jaxpipe.types import Key, Params, Tree

P = PartitionSpec


def init_params(layout: Layout, mesh: Mesh, key: Key, shapes: Sequence[LayerShapes]) -> Params:
    """Makes the params from `key`, each rank its own: no device ever holds the whole model.

    The weights of a layer depend on `key` and its index only, not on the partition.
    """

    def zeros(layer: int) -> Tree:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes[layer].inputs)

    def one_rank(key: jax.Array, layers: dict[str, jax.Array]) -> Params:
        def one_stack(stack: Stack, layers_here: jax.Array) -> Params:
            some = next(iter(stack.places))
            inputs = zeros(some)

            def one_slot(layer: jax.Array) -> Params:
                made = layout.module.layers[some].init(keys.init_key(key, layer), inputs)
                return jax.tree.map(lambda a: jnp.where(layer >= 0, a, jnp.zeros_like(a)), made)

            # One after the other: a vmap over the slots would hold every intermediate of init at once.
            return jax.tree.map(lambda a: a[None], jax.lax.map(one_slot, layers_here[0]))

        return {name: one_stack(layout.stacks[name], layers[name]) for name in layout.stacks}

    def make(key: jax.Array) -> Params:
        table = {}
        for name, stack in layout.stacks.items():
            rows = [[-1] * stack.slots for _ in range(layout.num_ranks)]
            for layer, (rank, slot) in stack.places.items():
                rows[rank][slot] = layer
            table[name] = jnp.asarray(rows, jnp.int32)
        stacked = jax.shard_map(
            one_rank,
            mesh=mesh,
            in_specs=(P(), P(PIPE)),
            out_specs=P(PIPE),
            axis_names=manual_axes(mesh),
            check_vma=False,  # users' init functions need not know about varying axes
        )(key, table)
        shared = {n: layout.module.init_layer(s.layer, key, zeros(s.layer)) for n, s in layout.shared.items()}
        # Python scalars and the like are weakly typed; the first optimizer step would change that, and compile again.
        return jax.tree.map(
            lambda a: jax.lax.convert_element_type(a, jnp.result_type(a)), {STACKED: stacked, SHARED: shared}
        )

    return jax.jit(make, out_shardings=layout.shardings(mesh))(key)
