"""How the next token of a row is chosen from its logits.

Noise depends on the key, on the number of the row among the prompts and on the number of the token, and on nothing else:
not on ranks, groups or data ranks. So the same call gives the same tokens on any mesh.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxpipe.types import Key


@dataclass(frozen=True)
class Sampling:
    """The rules of one call. Each distinct value is a program of its own; the temperature is an input.

    Attributes:
      greedy: take the most likely token, without noise.
      top_k: draw among so many of the most likely tokens; None: among all.
      stop: the token behind which a row is filled with it; None: there is none.
    """

    greedy: bool = True
    top_k: int | None = None
    stop: int | None = None

    def choose(
        self, logits: jax.Array, temperature: jax.Array, key: Key, rows: jax.Array, number: jax.Array
    ) -> jax.Array:
        """The next tokens, int32 [B].

        Args:
          logits: [B, V], floats.
          temperature: above 0, float32 []; the logits are divided by it.
          key: of the call.
          rows: the number of each row among the prompts, int32 [B].
          number: which of the new tokens this is, from 0, int32 [].
        """
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits.astype(jnp.float32) / temperature
        tokens = None
        if self.top_k is not None:
            logits, tokens = jax.lax.top_k(logits, self.top_k)

        def draw(row: jax.Array, logits: jax.Array) -> jax.Array:
            own = jax.random.fold_in(jax.random.fold_in(key, row), number)
            return jnp.argmax(logits + jax.random.gumbel(own, logits.shape, logits.dtype)).astype(jnp.int32)

        if "threefry" in str(jax.random.key_impl(key)):
            chosen = jax.vmap(draw)(rows, logits)
        else:  # other generators draw from the first key of several, so that a row would depend on those beside it
            chosen = jax.lax.map(lambda pair: draw(*pair), (rows, logits))
        if tokens is None:
            return chosen
        return jnp.take_along_axis(tokens, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)
