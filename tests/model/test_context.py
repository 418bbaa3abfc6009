"""`Context` and `Aux`: pytrees without leaves as long as nothing is in them."""

import jax
import jax.numpy as jnp

from jaxpipe.model.context import Aux, Context


def test_what_is_not_used_has_no_leaves():
    assert jax.tree.leaves((Context(), Aux())) == []
    context = Context(jax.random.key(0), {"mean": jnp.ones(3)})
    moved = jax.jit(lambda context: Aux(context.state, {"extra": context.state["mean"].sum()}))(context)
    assert isinstance(moved, Aux) and moved.losses["extra"] == 3 and moved.metrics == {}
