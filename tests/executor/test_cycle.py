"""Who runs which item when, what arrives, and that the first rank hears from the last one in time."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.executor import cycle
from jaxpipe.executor.rounds import Rounds


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    """`heard`: what rank 0 was told per group; `seen`: what each rank has run, [groups, turns, stages]."""

    heard: jax.Array
    seen: jax.Array
    turns: jax.Array


def run(placement, turns, skipped=None, after=None):
    """Numbers travel: stage 0 sends what it was told last, every stage adds one, and the last one tells it to stage 0."""
    stages, ranks = len(placement), 1 + max(placement)
    last = min(stages - 1, 2)  # the number of the last program

    def branch(place, carry, inbox, item):
        x = carry.heard[item.group] if place == 0 else inbox[0]
        seen = carry.seen.at[item.group, item.turn, item.stage].set(x)
        heard = carry.heard
        if place == last:
            heard = heard.at[item.group].set(x + 1)
        return replace(carry, seen=seen, heard=heard), [] if place == last else [x + 1]

    made = cycle.Cycle(
        Rounds.of(placement),
        turns,
        [lambda *args, place=place: branch(place, *args) for place in range(min(stages, 3))],
        [min(stage, 1) if stage < stages - 1 else last for stage in range(stages)],
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
            100.0 * jnp.arange(ranks, dtype=jnp.float32),
            jnp.full((ranks, turns, stages), -1.0),
            jnp.zeros((), jnp.int32),
        )
        end = cycle.run(made, rank[0], start, after)
        return end.seen[None], end.turns[None]

    mesh = jaxpipe.make_mesh(pipe=ranks)
    mapped = jax.shard_map(work, mesh=mesh, in_specs=P("pipe"), out_specs=P("pipe"), check_vma=False)
    return jax.tree.map(np.asarray, jax.jit(mapped)(jnp.arange(ranks, dtype=jnp.int32)))


@pytest.mark.parametrize(
    "placement", [(0,), (0, 0), (0, 1), (0, 1, 2, 3), (0, 1, 0, 1, 0, 1), (0, 1, 1, 0), (1, 0, 0, 2, 1)]
)
def test_every_rank_runs_its_stages_of_every_item_and_tokens_come_back_in_time(placement):
    seen, _ = run(placement, turns=3)
    stages, ranks = len(placement), 1 + max(placement)
    group, turn = np.arange(ranks)[:, None], np.arange(3)[None]
    for rank in range(ranks):
        for stage, home in enumerate(placement):
            wanted = 100 * group + turn * stages + stage if home == rank else np.full((ranks, 3), -1)
            np.testing.assert_array_equal(seen[rank, :, :, stage], wanted)


def test_what_is_not_wanted_is_skipped():
    seen, _ = run((0, 1, 2), turns=2, skipped=1)
    own = seen[np.arange(3), :, :, np.arange(3)]  # [ranks, groups, turns]
    assert (own[:, 1] == -1).all() and (own[:, [0, 2]] >= 0).all()


@pytest.mark.parametrize(("end", "turns"), [(2, 2), (9, 5)])
def test_it_ends_when_all_say_so_and_at_the_end_at_the_latest(end, turns):
    def after(carry):
        carry = replace(carry, turns=carry.turns + 1)
        return carry, carry.turns < end

    seen, counts = run((0, 1), turns=4, after=after)
    assert (counts == turns).all(), "four turns and one tick are five turns"
    assert ((seen[0, :, :, 0] >= 0).sum(axis=1) == min(end, 4)).all()


def test_the_number_of_ticks():
    made = cycle.Cycle(Rounds.of((0, 1, 2)), 4, [], [], [], None, None, None)
    assert made.num_ticks == 14
