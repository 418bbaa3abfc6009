"""The maker of meshes: which sizes and devices it takes, and what is read off a mesh."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import jaxpipe
from jaxpipe.errors import MeshError
from jaxpipe.mesh import data_size, manual_axes, on_tpu, pipe_size, rank_mesh


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipe": 1.0}, "pipe=1.0"),
        ({"pipe": "2"}, "pipe='2'"),
        ({"data": np.bool_(True)}, "data="),
        ({"pipe": 10**50}, "needs 1000"),
        ({"devices": []}, r"needs 1 devices, but devices= holds 0"),
        ({"devices": 5}, r"devices=...\) holds 5: expected a sequence of devices"),
        ({"devices": "cpu"}, r"devices=...\) holds 'c'"),
        ({"devices": [0, 1]}, r"devices=...\) holds 0"),
        ({"pipe": 2, "devices": "twice"}, "holds a device twice"),
        ({"inside": "Pipe"}, r"inside='Pipe'\): it is the axis .* Did you mean 'pipe'"),
        ({"inside": 0}, r"inside=0\)"),
    ],
    ids=str,
)
def test_arguments_of_make_mesh(arguments, message):
    if arguments.get("devices") == "twice":
        arguments = {**arguments, "devices": [jax.devices()[0]] * 2}
    with pytest.raises(MeshError, match=message):
        jaxpipe.make_mesh(**arguments)


def test_devices_in_any_form():
    grid = np.asarray(jax.devices()[:4], dtype=object).reshape(2, 2)
    assert jaxpipe.make_mesh(2, 2, devices=grid) == jaxpipe.make_mesh(2, 2, devices=tuple(jax.devices()[:4]))


def test_numbers_of_other_libraries():
    mesh = jaxpipe.make_mesh(pipe=np.int64(2), data=jnp.int32(2), model=np.uint8(1))
    assert mesh.shape == {"pipe": 2, "data": 2, "model": 1} and {type(n) for n in mesh.shape.values()} == {int}
    with pytest.raises(MeshError, match="model=True"):
        jaxpipe.make_mesh(model=True)


def test_axes_are_auto_and_devices_in_order():
    mesh = jaxpipe.make_mesh(pipe=2, data=3, model=2)
    assert mesh.axis_names == ("pipe", "data", "model") and set(mesh.axis_types) == {AxisType.Auto}
    assert list(mesh.devices.flat) == jax.devices()[:12], "the first ones, ranks of one data rank side by side"
    assert (pipe_size(mesh), data_size(mesh), manual_axes(mesh)) == (2, 3, {"pipe", "data"})


def test_a_mesh_without_a_data_axis():
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("pipe",), axis_types=(AxisType.Auto,))
    assert (data_size(mesh), manual_axes(mesh)) == (1, {"pipe"})
    assert dict(rank_mesh(mesh, 1).shape) == {"data": 1}


def test_the_mesh_of_one_rank_has_its_devices_and_the_other_axes():
    mesh = jaxpipe.make_mesh(pipe=2, data=3, model=2)
    one = rank_mesh(mesh, 1)
    assert dict(one.shape) == {"data": 3, "model": 2}
    assert (one.devices == mesh.devices[1]).all()


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (lambda devices: "pipe=4", "mesh='pipe=4': expected a jax.sharding.Mesh, such as jaxpipe.make_mesh"),
        (lambda devices: Mesh(devices, ("stage",)), r"has the axes \('stage',\), but stages live on an axis named"),
        (
            lambda devices: Mesh(devices, ("pipe",), axis_types=(AxisType.Explicit,)),
            "layers are written without shardings in their types",
        ),
    ],
    ids=["no mesh", "no pipe", "explicit"],
)
def test_what_no_pipeline_runs_on(mesh, message):
    with pytest.raises(MeshError, match=message):
        pipe_size(mesh(np.asarray(jax.devices()[:2])))


def test_which_devices_are_tpus():
    mesh = jaxpipe.make_mesh(pipe=2)
    assert not on_tpu(mesh)
    tpu = types.SimpleNamespace(platform="tpu")
    assert on_tpu(types.SimpleNamespace(devices=np.asarray([[tpu, tpu]])))
