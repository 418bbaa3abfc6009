"""Loss and every gradient of the pipeline equal those of the one-device oracle.

The cases cover every pair of option values (not the full product). All run poisoned: buffers and messages that nothing was
written to hold NaN, and so does every saved slot once it has been read.
"""

import itertools

import jax
import jax.numpy as jnp
import pytest

import jaxpipe
from tests.compare import assert_close
from tests.models import MODELS, make_batch

AXES = {
    "stages": (1, 2, 3, 8),  # and 4 below, in 64 bits
    "data": (1, 2),
    "micro_batches": (1, 2, 3, 8),
    "schedule": ("1f1b", "eager_1f1b", "gpipe"),
    "remat": ("layer", "none", "stage", 2, "dots"),
    "dropout": (True, False),
    "model": ("tied", "untied", "mixed"),
    "partition": ("uniform", "parameters", "uneven"),
}
UNEVEN = {
    1: [0, 9],
    2: [0, 2, 9],
    3: [0, 4, 5, 9],
    4: [0, 1, 5, 6, 9],
    6: [0, 1, 3, 4, 6, 8, 9],
    8: [0, 1, 2, 3, 4, 5, 7, 8, 9],
}
# Schedules with several stages per rank: "stages" are those of all ranks. More placements are in test_chunks.py.
CHUNKED = {
    "stages": ((2, 2), (3, 2), (2, 4)),  # ranks, chunks
    "data": (1, 2),
    "micro_batches": (2, 5),
    "schedule": ("interleaved", "looped_bfs"),
    "remat": ("layer", "none", 2),
    "dropout": (True, False),
    "model": ("tied", "untied", "mixed"),
    "partition": ("uneven",),
}


def pairwise(axes):
    """Greedy covering array: each case takes the combination that covers most uncovered pairs of values."""
    names = list(axes)
    todo = {frozenset({(a, x), (b, y)}) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]}
    cases = []
    while todo:
        case = dict(sorted(min(todo, key=lambda pair: sorted(map(str, pair)))))
        for name in sorted(set(names) - set(case), key=lambda name: (-len(axes[name]), name)):
            case[name] = max(
                axes[name],
                key=lambda value: sum(frozenset({(name, value), old}) in todo for old in case.items()),
            )
        cases.append({name: case[name] for name in names})
        todo -= {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
    return cases


CASES, SEVERAL = pairwise(AXES), pairwise(CHUNKED)


def id_of(case):
    return "-".join(str(value).replace(", ", "x").strip("()") for value in case.values())


@pytest.mark.parametrize("case", [*CASES, *SEVERAL], ids=map(id_of, [*CASES, *SEVERAL]))
def test_equals_oracle(case):
    check(case, 1e-6)


# One case per mechanism in 64 bits: what is left is rounding, so that a term of relative size 1e-6 cannot hide.
FLOAT64 = [
    dict(
        stages=4,
        data=2,
        micro_batches=3,
        schedule="1f1b",
        remat="layer",
        dropout=True,
        model="tied",
        partition="uneven",
    ),
    dict(
        stages=3,
        data=1,
        micro_batches=8,
        schedule="eager_1f1b",
        remat="none",
        dropout=True,
        model="mixed",
        partition="uneven",
    ),
    dict(
        stages=2,
        data=2,
        micro_batches=8,
        schedule="gpipe",
        remat="stage",
        dropout=False,
        model="untied",
        partition="parameters",
    ),
    dict(
        stages=4,
        data=1,
        micro_batches=8,
        schedule="1f1b",
        remat="policy",
        dropout=True,
        model="untied",
        partition="uniform",
    ),
]


@pytest.mark.parametrize("case", FLOAT64, ids=map(id_of, FLOAT64))
def test_equals_oracle_in_64_bits(case):
    with jax.enable_x64(True):
        check(case, 1e-12)


def check(case, tolerance):
    ranks, chunks = case["stages"] if isinstance(case["stages"], tuple) else (case["stages"], 1)
    num_micro_batches = case["micro_batches"]
    partition = UNEVEN[ranks * chunks] if case["partition"] == "uneven" else case["partition"]
    module = MODELS[case["model"]](partition)
    remat = case["remat"]
    if remat == "policy":
        remat = jax.checkpoint_policies.dots_saveable
    mesh = jaxpipe.make_mesh(pipe=ranks, data=case["data"])
    schedule = case["schedule"]
    pipe = jaxpipe.Pipeline(module, mesh, num_micro_batches, schedule, remat, num_chunks=chunks, poison=True)
    batch = make_batch(num_micro_batches)
    params = pipe.init(jax.random.key(1), batch[0][0])
    key = jax.random.key(2) if case["dropout"] else None

    loss, grads = pipe.value_and_grad(params, batch, key)
    layers = pipe.to_layers(params)
    wanted_loss, wanted_grads = jaxpipe.reference.value_and_grad(
        module, layers, batch, key, num_data_ranks=case["data"]
    )

    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert_close(loss, wanted_loss, tolerance, "loss")
    assert_close(pipe.to_layers(grads), wanted_grads, tolerance, "layers")
    for index, grad in enumerate(wanted_grads):  # a case that could not fail would prove nothing
        for leaf in jax.tree.leaves(grad):
            assert not jnp.issubdtype(leaf.dtype, jnp.floating) or jnp.abs(leaf).max() > 0, (
                f"layer {index} has no gradient"
            )


def test_the_cases_cover_every_pair():
    for cases, axes in ((CASES, AXES), (SEVERAL, CHUNKED)):
        covered = {frozenset(pair) for case in cases for pair in itertools.combinations(case.items(), 2)}
        assert len(covered) == sum(len(axes[a]) * len(axes[b]) for a, b in itertools.combinations(axes, 2))
