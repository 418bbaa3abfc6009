"""Reading: everything is compared before anything changes, and a checkpoint that is replaced meanwhile is read again."""

import dataclasses
import types

import jax
import numpy as np
import pytest

import jaxpipe
from jaxpipe.checkpoint import load
from jaxpipe.checkpoint.load import Selection
from jaxpipe.errors import CheckpointError
from jaxpipe.processes.group import Group
from tests.checkpoint.crowd import crowd
from tests.checkpoint.states import homes, state, words, write
from tests.compare import assert_close
from tests.optimizer.layouts import mesh

ALL = Selection(strict=True, optimizer=True, module_only=False)
OF, SHARDINGS = state()
GROUP = Group.of(mesh())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write(directory, "a", OF)
    return directory


def loaded(directory, tag=None, selection=ALL, seed=1):
    into, shardings = state(seed)
    found = load.load(directory, tag, homes(into), into, shardings, selection)
    made, error = load.place(found, into, homes(into))
    assert error is None
    return found, made


def test_all_of_it(directory):
    found, made = loaded(directory)
    assert (found.path, found.manifest.train_calls) == (directory / "a", 7)
    assert_close(words(made).key, words(OF).key, 0)
    wanted = dict(homes(OF).items(OF))
    for item, arrays in homes(made).items(made):
        assert_close(arrays, {name: np.asarray(a) for name, a in wanted[item].items()}, 0, item)


@pytest.mark.parametrize(("optimizer", "module_only"), [(False, False), (True, True), (False, True)])
def test_a_part_of_it(directory, optimizer, module_only):
    _, made = loaded(directory, selection=Selection(True, optimizer, module_only))
    mine = dict(homes(state(1)[0]).items(state(1)[0]))
    theirs = dict(homes(OF).items(OF))
    arrays = dict(homes(made).items(made))
    assert_close(arrays["layer_003"]["params/w"], np.asarray(theirs["layer_003"]["params/w"]), 0)
    assert_close(arrays["layer_003"]["opt_state/0:mu/w"], np.asarray(mine["layer_003"]["opt_state/0:mu/w"]), 0)
    of_key = mine if module_only else theirs
    assert_close(arrays["state"]["key"], np.asarray(of_key["state"]["key"]), 0)


def test_flags_are_flags(directory):
    with pytest.raises(CheckpointError, match="load_optimizer_states=1: expected True or False"):
        load.load(directory, None, homes(OF), OF, SHARDINGS, Selection(True, 1, False))


def test_nothing_to_load(directory, tmp_path):
    for path, what in ((tmp_path / "nowhere", "no such directory"), (tmp_path, "no checkpoint")):
        with pytest.warns(UserWarning, match=f"{path}: {what}. Nothing was loaded"):
            assert load.load(path, None, homes(OF), OF, SHARDINGS, ALL) is None


def test_another_kind_of_key(directory):
    other = jax.tree.map(lambda a: a, OF)
    other = type(other)(other.step, other.params, other.opt_state, jax.random.key_data(other.key))
    with pytest.raises(CheckpointError, match=r"expected a PRNG key of kind uint32, found \S*fry"):
        load.load(directory, None, homes(other), other, SHARDINGS, ALL)


def test_one_layer(directory):
    found = jaxpipe.load_layer(directory, "a", 3)
    assert found.keys() == {"w", "b", "steps"}
    assert_close(found["w"], np.asarray(dict(homes(OF).items(OF))["layer_003"]["params/w"]), 0)
    assert jaxpipe.load_layer(str(directory), None, np.int64(1)) == {}
    for index in (6, -1, True, 1.0, "1"):
        with pytest.raises(CheckpointError, match="expected a layer index from 0 to 5, found"):
            jaxpipe.load_layer(directory, "a", index)
    with pytest.raises(CheckpointError, match="expected a checkpoint, found none"):
        jaxpipe.load_layer(directory / "nowhere", None, 0)


def test_where_the_data_stands(directory):
    found, _ = loaded(directory)
    load.restore_data(None, found, GROUP)
    several = found._replace(manifest=dataclasses.replace(found.manifest, data_states=[{"json": 1}, {"json": 2}]))

    def restored(group):
        into = []
        load.restore_data(types.SimpleNamespace(set_state=into.append), several, group)
        return into

    assert crowd(2, restored) == [[1], [2]]
    for error in crowd(3, restored):
        assert "of 2 processes, which stood at different places: expected as many processes, found 3" in str(error)
    with pytest.raises(CheckpointError, match=r"data_iter is a list_iterator without set_state\(\)"):
        load.restore_data(iter([]), found, GROUP)
    with pytest.raises(CheckpointError, match="found none: it was saved without data_iter. Skip 21 micro-batches"):
        load.restore_data(types.SimpleNamespace(set_state=None), found, GROUP)
