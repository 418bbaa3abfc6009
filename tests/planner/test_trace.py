"""Traces of layers, as a step runs them."""

import jax
import pytest

import jaxpipe
from jaxpipe.errors import DataError
from jaxpipe.model.precision import NO_CASTS
from jaxpipe.planner.trace import KEEPS, Model
from tests.planner.gpts import gpt, model


def test_like_layers_are_traced_once():
    found = model(blocks=3)
    assert found.likes == [0, 1, 1, 1, 4]
    assert set(found.layers) == {(like, keeps) for like in (0, 1, 4) for keeps in KEEPS}
    assert found.batch_bytes == 2 * 4 * 4  # ids and labels of one row


def test_what_is_kept_and_what_comes_out():
    found = model(blocks=1, rows=3)
    kept = {keeps: sum(a.size * a.dtype.itemsize for a in found.layers[1, keeps].small.saved) for keeps in KEEPS}
    assert kept["layer"] == 3 * 4 * 8 * 2 < kept["dots"] < kept["none"]
    block, embedding = found.layers[1, "layer"], found.layers[0, "layer"].small
    assert block.large.saved[0].shape == (6, 4, 8)
    assert block.small.num_gradients == 6 and len(block.small.backward.jaxpr.outvars) == 7
    assert embedding.num_gradients == len(embedding.backward.jaxpr.outvars) == 1  # ids have no gradient


def test_examples_that_do_not_do():
    module, (ids, _) = gpt()
    mesh = jaxpipe.make_mesh(1, 1, devices=jax.devices()[:1])
    with pytest.raises(DataError, match="holds no inputs"):
        Model(module, (None, ids), mesh, NO_CASTS)
    with pytest.raises(DataError, match="has no labels"):
        Model(module, (ids, None), mesh, NO_CASTS)
