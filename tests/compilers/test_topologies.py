"""Topologies as the compilers make them."""

import pytest

import jaxpipe
from jaxpipe.errors import HardwareError
from tests.compilers.cases import Case, need


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("v5e:2x4", 8, "TPU v5 lite"),
        ("v5e:1x1", 1, "TPU v5 lite"),
        ("v5p:4x4x4", 64, "TPU v5"),
        ("v4:2x2x1", 4, "TPU v4"),
        ("v6e:16x16", 256, "TPU v6 lite"),
    ],
)
def test_tpu(name, count, kind):
    need(Case("v5e:2x4"))
    devices = jaxpipe.topology(name)
    assert len(devices) == count and {device.device_kind for device in devices} == {kind}
    mesh = jaxpipe.make_mesh(pipe=count, devices=devices)
    assert mesh.shape == {"pipe": count, "data": 1}


@pytest.mark.parametrize(("name", "count", "kind"), [("h100:8", 8, "NVIDIA H100"), ("a100:16", 16, "NVIDIA A100")])
def test_gpu(name, count, kind):
    need(Case("h100:8"))
    devices = jaxpipe.topology(name)
    assert len(devices) == count and all(device.device_kind.startswith(kind) for device in devices)


def test_a_tpu_topology_that_cannot_be():
    need(Case("v5e:2x4"))
    with pytest.raises(HardwareError, match="the TPU compiler refuses it: .*Slices of v5e have two axes"):
        jaxpipe.topology("v5e:3x7")
