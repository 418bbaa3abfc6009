"""Evaluations and weights of several processes are those of one: every option, bit for bit where nothing is computed."""

import functools
import json

import jax
import pytest

import jaxpipe
from tests.contracts import processes_weights
from tests.contracts.launched import launched


@functools.cache
def alone(pipe, data, *what, folder=None):
    """What one process finds, as it comes out of JSON."""
    return json.loads(json.dumps(processes_weights.main(pipe, data, False, folder, *what)))


def together(pipe, data, what, folder):
    """The same for several things; evaluations, which write no files, are made once for all tests."""
    parts = [alone(pipe, data, each, folder=folder if each == "weights" else None) for each in what]
    return {name: {key: value for part in parts for key, value in part[name].items()} for name in ("found", "some")}


def assert_alike(found, wanted, tolerance=2e-6):
    found, structure = jax.tree_util.tree_flatten_with_path(found, is_leaf=lambda a: a is None)
    wanted, same = jax.tree_util.tree_flatten_with_path(wanted, is_leaf=lambda a: a is None)
    assert structure == same
    for (path, a), (_, b) in zip(found, wanted, strict=True):
        if isinstance(b, float):
            assert abs(a - b) <= tolerance * max(1, abs(b)), f"{jax.tree_util.keystr(path)}: {a} is not {b}"
        else:
            assert type(a) is type(b) and a == b, f"{jax.tree_util.keystr(path)}: {a} is not {b}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "pipe", "data", "order", "what", "holders"),
    [
        (2, 2, 2, "plain", ("evaluations", "weights"), [1]),
        (2, 2, 2, "turned", ("evaluations", "by hand"), [0, 1]),
        (4, 4, 1, "plain", ("weights",), [3]),
    ],
    ids=["ranks apart", "data ranks apart", "four"],
)
def test_several_processes_find_what_one_finds(processes, pipe, data, order, what, holders, tmp_path):
    (tmp_path / "several").mkdir()
    found = launched("processes_weights.py", processes, 4 // processes, pipe, data, order, tmp_path / "several", *what)
    assert len(found) == processes
    assert sorted(each["holds"] for each in found) == [False] * (processes - len(holders)) + [True] * len(holders)
    (tmp_path / "one").mkdir()
    one = together(pipe, data, what, tmp_path / "one")
    for each in found:
        assert_alike(each["found"], one["found"])
        if each["holds"]:
            assert_alike(each["some"], one["some"])
        else:  # neither loss nor metrics, with `bcast_loss=False`
            assert each["some"] == {name: [None, None] for name in one["some"]}
    if "weights" in what:
        files = [(tmp_path / by / "weights.safetensors").read_bytes() for by in ("several", "one")]
        assert files[0] == files[1] == (tmp_path / "several" / "list.safetensors").read_bytes()
        engine = processes_weights.make_engine(
            2, 1, layers=jaxpipe.load_weights(tmp_path / "several" / "weights.safetensors")
        )
        processes_weights.same(
            jaxpipe.fetch(engine.to_layers()), jaxpipe.load_weights(tmp_path / "one" / "weights.safetensors"), ""
        )
