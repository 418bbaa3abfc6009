"""What `initialize` takes: every argument is looked at before anything is compiled."""

import itertools

import jax
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.errors import ConfigError, DataError, LayerError, MeshError, ScheduleError
from tests.data.micro_batches import item


def init(key, x):
    return {"w": jax.random.normal(key, (3, 3))}


LAYER = jaxpipe.Layer(init, lambda params, x: {**x, "h": x["h"] @ params["w"]}, "Dense")


def loss_fn(outputs, labels):
    return ((outputs["h"] - labels["t"]) ** 2).mean()


def make_engine(**changes):
    arguments = {"mesh": jaxpipe.make_mesh(pipe=2, data=2), "example": item(), "config": {"num_micro_batches": 2}}
    module = jaxpipe.PipelineModule([LAYER, LAYER], loss_fn, partition_method="uniform")
    return jaxpipe.initialize(module, optax.sgd(0.1), **{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"mesh": None}, MeshError, "mesh=None: expected a jax.sharding.Mesh, such as jaxpipe.make_mesh"),
        ({"mesh": 4}, MeshError, "mesh=4: expected"),
        ({"mesh": [0, 1]}, MeshError, r"mesh=\[0, 1\]: expected"),
        ({"example": None}, DataError, "example is one micro-batch: .* got a NoneType"),
        ({"example": 5}, DataError, "example is one micro-batch: .* got a int"),
        ({"example": item()[0]}, DataError, "example is one micro-batch: .* got a dict"),
        ({"config": 5}, ConfigError, "config is a int"),
        ({"config": "ds.json"}, ConfigError, "config is a str: .*from_deepspeed"),
        ({"config": {"num_micro_batches": np.int64(0)}}, ConfigError, "num_micro_batches=0 must be an integer"),
        ({"config": {"schedule": 5}}, ConfigError, "schedule=5 is a int"),
        ({"config": {"remat": print}}, ConfigError, "remat=.*builtin"),
        ({"config": {"num_micro_batches": 10**30}}, ScheduleError, "num_micro_batches=1000.*does not fit in memory"),
        ({"layers": 5}, LayerError, "layers is a int: expected a list"),
        ({"layers": {}}, LayerError, "layers is a dict: expected a list"),
        ({"layers": "ab"}, LayerError, "layers is a str: expected a list"),
        ({"layers": (None for _ in range(2))}, LayerError, "layers is a generator: expected a list"),
        ({"layers": [{}]}, LayerError, "1 per-layer params were given; the module has 2 layers"),
        ({"layers": [{"w": "x"}, {"w": "y"}]}, LayerError, r"layers\[0\]\['w'\] is 'x', a single str"),
        ({"layers": [{"w": np.ones((3, 3), object)}] * 2}, LayerError, r"layers\[0\]\['w'\] is .* Python objects"),
        ({"layers": [{"w": np.ones((3, 4), np.float32)}] * 2}, LayerError, "layer 0|float32"),
    ],
    ids=itertools.count(),
)
def test_arguments_of_initialize(changes, kind, message):
    with pytest.raises(kind, match=message):
        make_engine(**changes)


@pytest.mark.parametrize("module", [None, 5, [LAYER], LAYER, jaxpipe.PipelineModule, "module"], ids=itertools.count())
def test_what_is_no_module(module):
    mesh = jaxpipe.make_mesh(pipe=2)
    with pytest.raises(LayerError, match="expected a jaxpipe.PipelineModule. Write jaxpipe.PipelineModule"):
        jaxpipe.Pipeline(module, mesh)
    with pytest.raises(LayerError, match="expected a jaxpipe.PipelineModule"):
        jaxpipe.initialize(module, optax.sgd(0.1), mesh=mesh, example=item())
