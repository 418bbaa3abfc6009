"""Where every PRNG key comes from. Nothing here knows about stages, so results do not depend on the partition."""

import jax

# What a key looks like from outside.
KEY = jax.eval_shape(lambda: jax.random.key(0))


def init_key(key: jax.Array, layer: int | jax.Array) -> jax.Array:
    """The key that initialises the layer with global index `layer`."""
    return jax.random.fold_in(key, layer)


def micro_batch_key(key: jax.Array, micro_batch: int | jax.Array, data_rank: int | jax.Array) -> jax.Array:
    """The key of one micro-batch on one data rank; `key` is that of the step."""
    return jax.random.fold_in(jax.random.fold_in(key, micro_batch), data_rank)


def layer_key(micro_batch_key: jax.Array, layer: int | jax.Array) -> jax.Array:
    """The key a layer's `apply` gets (dropout)."""
    return jax.random.fold_in(micro_batch_key, layer)
