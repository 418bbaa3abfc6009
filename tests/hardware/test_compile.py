"""A report of a step on simulated devices: from shapes alone, and right where it can be counted by hand."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxpipe
from jaxpipe.errors import ConfigError, MeshError
from tests.models import untied

WIDTH, ROWS = 8, 6
IDS = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


def dense(out):
    def init(key, x):
        return {"w": jax.random.normal(key, (x.shape[-1], out))}

    return jaxpipe.Layer(init, lambda p, x: jnp.tanh(x @ p["w"]), f"dense_{out}")


def compiled(**options):
    options = {"num_micro_batches": 4} | options
    evaluation = options.pop("evaluation", False)
    module = jaxpipe.PipelineModule([dense(WIDTH)] * 4, lambda y, t: ((y - t) ** 2).mean(), partition_method="uniform")
    return jaxpipe.compile(
        module,
        optax.adam(1e-3),
        mesh=jaxpipe.make_mesh(pipe=2, data=3),
        example=(IDS, IDS),
        config=options,
        evaluation=evaluation,
    )


def test_a_training_step():
    report = compiled()
    own = report.bytes_per_device
    layer = WIDTH * WIDTH * 4
    assert (own["weights"], own["optimizer"], own["gradients"]) == (2 * layer, 4 * layer + 4, 2 * layer)
    assert own["total"] == sum(size for name, size in own.items() if name != "total")
    assert list(own) == ["weights", "optimizer", "gradients", "saved", "temporary", "total"]
    # On a device 4 micro-batches of 2 rows through 2 layers: forward, again, and two products for the derivatives.
    product = 2 * (ROWS // 3) * WIDTH * WIDTH
    assert report.flops == 4 * 2 * (1 + 1 + 2) * product
    assert report.useful_flops == 4 * 2 * 3 * product
    permutes = [one for one in report.collectives if one.kind == "collective-permute"]
    assert {(one.bytes, one.where) for one in permutes} == {(ROWS // 3 * WIDTH * 4, "loop over pipe")}
    assert {one.axes for one in report.collectives if one.part == "outside"} >= {("data",)}
    assert report.cycles == {} and report.step_seconds is None and report.utilisation is None
    assert "a training step on cpu, pipe 2 x data 3" in str(report)


def test_an_evaluation():
    report = compiled(evaluation=True)
    assert report.bytes_per_device["optimizer"] == report.bytes_per_device["gradients"] == 0
    assert report.flops == report.useful_flops == 4 * 2 * 2 * (ROWS // 3) * WIDTH * WIDTH
    assert report.evaluation and report.ticks == 5


def test_nothing_is_made():
    """Two layers of 34 GB, and what an optimizer keeps for them: only shapes, or this machine would notice."""
    size = 1 << 17
    huge = jaxpipe.Layer(
        lambda key, x: {"w": jax.random.normal(key, (size, size), jnp.bfloat16)},
        lambda p, x: x + (x[:, :1] * p["w"][:1, :8].astype(x.dtype).sum()),
        "huge",
    )
    module = jaxpipe.PipelineModule([huge, huge], lambda y, t: ((y - t) ** 2).mean(), partition_method="uniform")
    mesh = jaxpipe.make_mesh(pipe=2)
    report = jaxpipe.compile(module, optax.adam(1e-3), mesh=mesh, example=(IDS, IDS), config={"num_micro_batches": 2})
    assert report.bytes_per_device["weights"] == size * size * 2


@pytest.mark.parametrize(
    ("error", "options"),
    [(ConfigError, {"schedul": "1f1b"}), (ConfigError, {"num_micro_batches": 0})],
)
def test_mistakes_are_those_of_initialize(error, options):
    with pytest.raises(error):
        compiled(**options)


def test_a_mesh_that_is_none():
    with pytest.raises(MeshError):
        jaxpipe.compile(untied(), optax.sgd(1.0), mesh=None, example=(IDS, IDS))
