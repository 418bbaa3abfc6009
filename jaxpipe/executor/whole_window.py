"""Generation without caches: the whole window is run again for each token. Right, and slow.

It is for models in which a layer mixes positions and has no cache. What stands behind the newest token must not matter to
it, so the window has its full length from the beginning, and one evaluation serves all tokens. Whether that holds is seen
when the first token is made: the window is run twice, with two fillings of what is not written yet.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.executor.generate_plan import Request
from jaxpipe.types import Key


class Recomputed(NamedTuple):
    """What a generation without caches has found.

    Attributes:
      tokens: the new ones, int32 [groups, B, new].
      causal: whether nothing depended on what stands behind the newest token, bool [].
    """

    tokens: jax.Array
    causal: jax.Array


def recompute(
    outputs: Callable[[jax.Array], jax.Array],
    request: Request,
    vocabulary: int,
    prompts: tuple[jax.Array, jax.Array],
    temperature: jax.Array,
    key: Key,
) -> Recomputed:
    """The new tokens of all rows; traceable.

    Args:
      outputs: the logits [groups, B, L, V] of windows int32 [groups, B, L], L the length of whole sequences.
      vocabulary: V.
      prompts: int32 [groups, B, T], and the number of each row among the prompts of the call, int32 [groups, B].
      temperature: float32 [], above 0.
      key: of the call.
    """
    ids, numbers = prompts[0], prompts[1].reshape(-1)
    groups, rows, first = ids.shape
    sampling = request.sampling

    def window(fill: int) -> jax.Array:
        return jnp.full((groups, rows, request.length), fill, jnp.int32).at[..., :first].set(ids)

    def logits_at(window: jax.Array, position: jax.Array) -> jax.Array:
        found = jax.lax.dynamic_index_in_dim(outputs(window), position, axis=2, keepdims=False)
        return found.reshape(groups * rows, vocabulary)

    def turn(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # Turn 0 fills what is not written yet in another way than all others, and writes nothing.
        filled, before, ended, causal = carry
        number = jnp.maximum(step - 1, 0)
        logits = logits_at(filled, first - 1 + number)
        same = jnp.all((logits == before) | (jnp.isnan(logits) & jnp.isnan(before)))
        causal &= same | (step != 1)
        tokens = sampling.choose(logits, temperature, key, numbers, number)
        if sampling.stop is not None:
            tokens = jnp.where(ended, jnp.int32(sampling.stop), tokens)
            ended |= (tokens == sampling.stop) & (step > 0)
        written = filled.at[..., first + number].set(tokens.reshape(groups, rows))
        return jnp.where(step == 0, window(0), written), logits, ended, causal

    like = jax.eval_shape(logits_at, window(0), jnp.int32(0))
    start = window(vocabulary - 1), jnp.zeros(like.shape, like.dtype), jnp.zeros(groups * rows, bool), jnp.bool_(True)
    filled, _, _, causal = jax.lax.fori_loop(jnp.int32(0), jnp.int32(request.new + 1), turn, start)
    return Recomputed(filled[..., first:], causal)
