"""One process: there is nothing to tell. Several processes: tests/contracts/test_processes.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.errors import DataError, JaxpipeError
from jaxpipe.processes.group import Group, _as_error


def test_one_process_is_alone_and_first():
    group = Group.of(jaxpipe.make_mesh(pipe=2, data=2))
    assert group.members == (0,) and group.first and not group.several
    assert group.gather({"a": 1}) == [{"a": 1}] and group.broadcast("x") == "x"
    assert group.together(lambda: 5) == 5
    assert group is Group.of(jaxpipe.make_mesh(pipe=4)), "the devices count, not the mesh"


def test_what_fails_here_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        Group.everyone().together(lambda: 1 // 0)


def test_what_another_process_raised_keeps_its_class():
    assert str(_as_error("DataError", "no rows.", 3)) == "Process 3: no rows."
    assert type(_as_error("DataError", "", 3)) is DataError
    assert type(_as_error("KeyError", "'a'", 3)) is JaxpipeError and type(_as_error("__all__", "", 3)) is JaxpipeError


def test_fetch_gives_arrays_of_the_host():
    found = jaxpipe.fetch({"a": jnp.arange(3), "b": 5, "c": np.ones(2)})
    assert type(found["a"]) is np.ndarray and found["a"].tolist() == [0, 1, 2]
    assert found["b"] == 5 and jax.tree.structure(found) == jax.tree.structure({"a": 0, "b": 0, "c": 0})


def test_keys_stay_keys():
    keys = jax.device_put(jax.random.split(jax.random.key(3), 2), jax.devices()[1])
    found = jaxpipe.fetch([keys])[0]
    assert (found == keys).all() and not found.committed


def test_whose_an_array_is():
    group = Group.everyone()
    assert group.holders([jnp.ones(2), np.ones(2), 3]) == [[0], [], []]
    assert group.fetch(np.float32(2), []) == 2
