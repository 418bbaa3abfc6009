"""`python -m jaxpipe compile`: what it calls, and what it says when it cannot."""

import pytest

from jaxpipe.cli import main
from jaxpipe.errors import ConfigError
from jaxpipe.hardware.command import Command

PROJECT = """
import jax, jax.numpy as jnp, optax, jaxpipe

def training():
    layer = jaxpipe.Layer(lambda key, x: {"w": jax.random.normal(key, (8, 8))}, lambda p, x: jnp.tanh(x @ p["w"]))
    module = jaxpipe.PipelineModule([layer] * 4, lambda y, t: ((y - t) ** 2).mean())
    like = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    return module, optax.sgd(0.1), (like, like), {"num_micro_batches": 2}

def three():
    return 1, 2, 3

def broken():
    import a_module_that_is_nowhere
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    (tmp_path / "a_project_of_mine.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)


def test_it_prints_the_report(capsys):
    assert main(["compile", "a_project_of_mine:training", "--pipe", "2", "--data", "2", "--axis", "model=1"]) == 0
    assert capsys.readouterr().out.startswith("a training step on cpu, pipe 2 x data 2 x model 1, 6 ticks\n")
    assert main(["compile", "a_project_of_mine:training", "--pipe", "2", "--evaluation"]) == 0
    assert capsys.readouterr().out.startswith("an evaluation on cpu, pipe 2 x data 1, 3 ticks\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a_project_of_mine:trainin"], "has no function 'trainin'. Did you mean 'training'?"),
        (["a_project_of_yours:training"], "there is no module 'a_project_of_yours'"),
        (["a_project_of_mine.sub:training"], "there is no module"),
        (["a_project_of_mine"], "write package.module:function"),
        (["a_project_of_mine:three"], "it must return (module, optimizer, example, config)"),
        (["a_project_of_mine:training", "--axis", "model"], "--axis model: write the name"),
        (["a_project_of_mine:training", "--axis", "pipe=2"], "--axis pipe=2: write the name"),
        (["a_project_of_mine:training", "--pipe", "0"], "make_mesh(pipe=0)"),
        (["a_project_of_mine:training", "--topology", "v5e"], "topology('v5e')"),
    ],
)
def test_mistakes(capsys, arguments, message):
    assert main(["compile", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_module_that_is_missing_inside_is_not_hidden():
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_nowhere"):
        Command("a_project_of_mine:broken").run()


def test_an_axis_given_twice():
    with pytest.raises(ConfigError):
        Command("a_project_of_mine:training", axes=("model=2", "model=2")).run()
