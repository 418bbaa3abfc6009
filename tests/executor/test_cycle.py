"""Who runs which item when, what arrives, and that the first rank hears from the last one in time."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.executor import cycle


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    """`heard`: what rank 0 was told per group; `seen`: what each rank has run, [groups, turns]."""

    heard: jax.Array
    seen: jax.Array
    turns: jax.Array


def run(ranks, turns, skipped=None, after=None):
    """Numbers travel: rank 0 sends what it was told last, every rank adds one, and the last one tells it to rank 0."""

    def branch(place, carry, inbox, item):
        x = carry.heard[item.group] if place == 0 else inbox[0]
        seen = carry.seen.at[item.group, item.turn].set(x)
        heard = carry.heard
        if place == min(ranks - 1, 2):  # the last program
            heard = heard.at[item.group].set(x + 1)
        return replace(carry, seen=seen, heard=heard), [] if place == min(ranks - 1, 2) else [x + 1]

    ids = [min(rank, 1) if rank < ranks - 1 else min(ranks - 1, 2) for rank in range(ranks)]
    made = cycle.Cycle(
        ranks,
        turns,
        [lambda *args, place=place: branch(place, *args) for place in range(min(ranks, 3))],
        ids,
        [jax.ShapeDtypeStruct((), jnp.float32)],
        wanted=lambda carry, item: jnp.bool_(True) if skipped is None else item.group != skipped,
        back=lambda carry, item: carry.heard[item.group],
        arrived=lambda carry, told, item, mine: replace(
            carry, heard=carry.heard.at[item.group].set(jnp.where(mine, told, carry.heard[item.group]))
        ),
        poison=True,
    )

    def work(rank):
        start = Carry(
            100.0 * jnp.arange(ranks, dtype=jnp.float32), jnp.full((ranks, turns), -1.0), jnp.zeros((), jnp.int32)
        )
        end = cycle.run(made, rank[0], start, after)
        return end.seen[None], end.turns[None]

    mesh = jaxpipe.make_mesh(pipe=ranks)
    mapped = jax.shard_map(work, mesh=mesh, in_specs=P("pipe"), out_specs=P("pipe"), check_vma=False)
    return jax.tree.map(np.asarray, jax.jit(mapped)(jnp.arange(ranks, dtype=jnp.int32)))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_runs_every_item_and_tokens_come_back_in_time(ranks):
    seen, _ = run(ranks, turns=3)
    group, turn = np.arange(ranks)[:, None], np.arange(3)[None]
    for rank in range(ranks):
        np.testing.assert_array_equal(seen[rank], 100 * group + turn * ranks + rank)


def test_what_is_not_wanted_is_skipped():
    seen, _ = run(3, turns=2, skipped=1)
    assert (seen[:, 1] == -1).all() and (seen[:, [0, 2]] >= 0).all()


@pytest.mark.parametrize(("end", "turns"), [(2, 2), (9, 5)])
def test_it_ends_when_all_say_so_and_at_the_end_at_the_latest(end, turns):
    def after(carry):
        carry = replace(carry, turns=carry.turns + 1)
        return carry, carry.turns < end

    seen, counts = run(2, turns=4, after=after)
    assert (counts == turns).all(), "four turns and one tick are five turns"
    assert ((seen[0] >= 0).sum(axis=1) == min(end, 4)).all()


def test_no_permute_is_a_cycle():
    made = cycle.Cycle(3, 4, [], [], [], None, None, None)
    assert made.num_ticks == 14
