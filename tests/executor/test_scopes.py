"""Name scopes: what is written is read, wherever XLA puts it into a name."""

import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.executor import scopes
from jaxpipe.executor.scopes import Scope


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        (f"jit(step)/shard_map/while/body/{scopes.of_op('F', 12)}/while/body/dot", Scope("F", 12, False, False)),
        (f"jit(step)/{scopes.of_op('I', 1, [0, 1, 1, 2])}/dot", Scope("I", 1, False, False)),
        (f"jit(step)/{scopes.PERMUTE}/ppermute", Scope(None, -1, False, False)),
        (f"{scopes.of_op('B', 0)}/{scopes.TAIL}/transpose(jvp())/dot", Scope("B", 0, True, False)),
        (f"jit(step)/{scopes.TAIL}/while", Scope(None, -1, True, False)),
        (f"jit(step)/cond/{scopes.RARE}/reduce_max", Scope(None, -1, False, True)),
        ("jit(step)/shard_map/while/body/ppermute", Scope(None, -1, False, False)),
        ("jit(my_jaxpipe.Forward)/add", Scope(None, -1, False, False)),
        ("", Scope(None, -1, False, False)),
    ],
)
def test_names(name, scope):
    assert scopes.read(name) == scope


def test_the_stages_that_share_a_program_are_named():
    assert scopes.of_op("F", 0, [0, 1, 1, 2]) == "jaxpipe.F0/stage_0"
    assert scopes.of_op("B", 1, [0, 1, 1, 2]) == "jaxpipe.B1/stages_1-2"
    assert scopes.of_op("W", 1, [0, 1, 1, 2, 1]) == "jaxpipe.W1/stages_1-2_4"


@pytest.mark.parametrize(("schedule", "backward"), [("1f1b", "B"), ("zero_bubble", "IW")])
def test_a_compiled_step_says_whose_its_instructions_are(schedule, backward):
    """What a profile shows are the names in the compiled program."""
    module = jaxpipe.PipelineModule(
        [jaxpipe.LayerSpec(nnx.Linear, 4, 4)] * 4, lambda y, t: optax.squared_error(y, t).mean()
    )
    row = jax.ShapeDtypeStruct((2, 4), np.float32)
    config = {"num_micro_batches": 4, "schedule": schedule, "zero_stage": 1}
    mesh = jaxpipe.make_mesh(pipe=4, data=2)
    engine = jaxpipe.initialize(module, optax.adam(1e-3), mesh=mesh, example=(row, row), config=config)
    batch = jax.ShapeDtypeStruct((4, 2, 4), np.float32)
    text = engine.lower_train((batch, batch)).compile().as_text()
    instructions = re.findall(r"^ *(?:ROOT )?%\S+ = .*? ([a-z-]+)\(.*op_name=\"([^\"]*)\"", text, re.M)

    ops = {name for _, name in instructions if scopes.read(name).kind is not None}
    found = {"".join(re.search(r"jaxpipe\.([A-Z])\d+(/stages?_[\d-]+)/", name).groups()) for name in ops}
    stages = ["/stage_0", "/stages_1-2", "/stage_3"]
    assert found == {kind + stage for kind in "F" + backward for stage in stages}
    assert any(scopes.TAIL in name for name in ops)

    def scopes_of(opcode):
        names = [name for code, name in instructions if code.removesuffix("-start") == opcode]
        return {scope for name in names for scope in re.findall(r"jaxpipe\.[a-z]+", name) or [name]}

    assert scopes_of("collective-permute") == {scopes.PERMUTE}
    assert scopes_of("all-gather") == {scopes.WEIGHTS}
    assert scopes.GRADIENTS in scopes_of("reduce-scatter") | scopes_of("all-reduce")
    assert any(scopes.OPTIMIZER in name and "sqrt" in name for _, name in instructions)
