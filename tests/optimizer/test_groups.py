"""Which equations run together, and in which order."""

import jax.numpy as jnp

from jaxpipe.optimizer.groups import Grouped
from tests.optimizer.traces import A, B, C, traced


def test_what_one_layer_computes_stays_there_and_scalars_of_all_join():
    def norm_scaled(a, b):
        norm = jnp.sqrt(jnp.sum(a * a) + jnp.sum(b * b))
        return a / norm, b / norm

    trace = traced(norm_scaled, [A, B], [A, B])
    homes = [(eqn.primitive.name, eqn.home) for eqn in trace.equations]
    assert homes.count(("reduce_sum", A)) == 1 and homes.count(("reduce_sum", B)) == 1
    assert ("add", None) in homes and ("sqrt", None) in homes
    assert [v.home for v in trace.outputs] == [A, B]
    grouped = Grouped(trace)
    assert sorted(grouped.groups) == [0, 1]  # the sums, then the divisions
    assert all(len(group) == 2 for groups in grouped.groups.values() for group in groups)
    assert len(grouped.gathered) == 1


def test_like_equations_of_like_layers_are_one_group_whatever_else_a_layer_does():
    def update(a, b, c):
        return jnp.tanh(a) * 0.1, jnp.tanh(b) * 0.2, jnp.exp(c)

    grouped = Grouped(traced(update, [A, B, C], [A, B, C]))
    sizes = {group[0].primitive.name: len(group) for group in grouped.groups[0]}
    assert sizes == {"tanh": 2, "mul": 2, "exp": 1}
