"""Makes all PRNG keys. Nothing here knows about stages, so results do not depend on the partition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from jaxpipe.errors import ConfigError
from jaxpipe.model.shapes import describe, is_key
from jaxpipe.types import Key

# The shape of a key.
KEY = jax.eval_shape(lambda: jax.random.key(0))
_WORDS = jax.eval_shape(jax.random.key_data, KEY).shape


def as_key(key: Any, what: str = "key") -> Any:
    """Makes a PRNG key of what a user may pass for one.

    Args:
      key: a typed key [], an older key of words (uint32 [words]), the shape of either, or an integer seed.
      what: what messages call it.

    Returns:
      A typed key [], or the shape of one.

    Raises:
      ConfigError: it is none of these.
    """
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        try:
            return jax.random.key(int(key))
        except OverflowError as error:
            raise ConfigError(f"{what}={key}: a seed has at most 64 bits.") from error
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and not isinstance(key, np.generic):
        if is_key(key) and shape == ():
            return key
        if dtype == np.uint32 and shape == _WORDS:
            if isinstance(key, jax.ShapeDtypeStruct):
                return KEY
            return jax.random.wrap_key_data(jnp.asarray(key))
        if jnp.issubdtype(dtype, jnp.integer) and shape == () and not isinstance(key, jax.ShapeDtypeStruct):
            return jax.random.key(key)
    shown = describe(key) if dtype is not None else repr(key)
    raise ConfigError(f"{what}={shown} must be one PRNG key, such as jax.random.key(0), or an integer seed.")


def anywhere(key: Key, mesh: Mesh) -> Key:
    """The key in a form that a computation on the devices of a mesh takes, wherever it lies.

    JAX refuses a key that was put on one device where the params are on others. So a key that was put somewhere else than
    on these devices is copied by way of the host.
    """
    if isinstance(key, Tracer) or not key.committed or key.sharding.device_set == set(mesh.devices.flat):
        return key
    return jax.random.wrap_key_data(jax.device_get(jax.random.key_data(key)), impl=jax.random.key_impl(key))


def init_key(key: Key, layer: int | jax.Array) -> Key:
    """The key that initialises the layer with the global index `layer`; `key` is that of the model."""
    return jax.random.fold_in(key, layer)


def micro_batch_key(key: Key, micro_batch: int | jax.Array, data_rank: int | jax.Array) -> Key:
    """The key of one micro-batch on one data rank; `key` is that of the step."""
    return jax.random.fold_in(jax.random.fold_in(key, micro_batch), data_rank)


def layer_key(micro_batch_key: Key, layer: int | jax.Array) -> Key:
    """The key that the `apply` of a layer is given, for dropout and the like."""
    return jax.random.fold_in(micro_batch_key, layer)
