"""Names of topologies. What the compilers make of them is in tests/compilers; here, as in most places, there are none."""

import importlib.util

import pytest

from jaxpipe.errors import HardwareError
from jaxpipe.hardware import topology as module
from jaxpipe.hardware.topology import topology


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", 'expected a name such as "v5e:2x4"'),
        ("", "expected a name such as"),
        (8, "expected a name such as"),
        (None, "expected a name such as"),
        ("v5e:2 x 4", "expected a name such as"),
        ("v7:2x2", "'v7' is not a chip that is known here. Known: v4, v5e"),
        ("h10:8", "Did you mean 'h100'?"),
        ("v5e:0x4", "no axis of 0 chips"),
        ("h100:2x4", 'GPUs are counted, as in "h100:8"'),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(HardwareError) as error:
        topology(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "install"), [("v5e:2x4", "pip install jaxpipe[tpu]"), ("h100:8", "pip install jaxpipe[cuda]")]
)
def test_a_compiler_that_is_missing(monkeypatch, name, install):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HardwareError, match="not installed") as error:
        topology(name)
    assert install in str(error.value)


def test_gpus_of_machines_that_are_not_full(monkeypatch):
    monkeypatch.setattr(module, "_installed", lambda name: True)
    with pytest.raises(HardwareError, match="machines hold 8 GPUs each"):
        topology("h100:12")


@pytest.mark.parametrize(("count", "shape"), [(2, "1x1x2"), (8, "1x1x8"), (32, "1x4x8")])
def test_how_many_gpus(monkeypatch, count, shape):
    asked = []
    monkeypatch.setattr(module, "_installed", lambda name: True)
    monkeypatch.setattr(module, "_made", lambda plugin, kind, shape: asked.append((kind, shape)) or [])
    topology(f"H200:{count}")
    assert asked == [("h200", shape)]


def test_description_of_a_gpu():
    text = module._target(module._GPUS["h100"])
    assert "core_count: 132 " in text and "cuda_compute_capability { major: 9 minor: 0 }" in text
    assert text.count("{") == text.count("}")
