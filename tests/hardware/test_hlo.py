"""The parser of HLO text, on text as XLA prints it."""

import jax
import jax.numpy as jnp
import pytest

from jaxpipe.hardware import hlo
from jaxpipe.hardware.hlo import Shape, parse
from tests.hardware import texts


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (Shape("f32", (8, 128)), 4096),
        (Shape("bf16", (3, 5)), 30),
        (Shape("pred", (7,)), 7),
        (Shape("s4", (8,)), 4),
        (Shape("f8e4m3fn", (16,)), 16),
        (Shape("c64", (2,)), 16),
        (Shape("s32", ()), 4),
        (Shape("token", ()), 0),
    ],
)
def test_bytes(shape, size):
    assert shape.bytes == size


def test_layouts():
    shape = Shape("bf16", (5, 8), "1,0:T(8,128)(2,1)S(1)")
    assert (shape.order, shape.space, str(shape)) == ("1,0", 1, "bf16[5,8]")
    assert Shape("bf16", (5, 8), "0,1").space == 0


def test_instructions():
    module = parse(texts.TPU)
    assert module.entry == "main" and len(module.computations) == 13
    tick = module.computations["tick_body"]
    start = tick.instructions["collective-permute-start.1"]
    assert start.opcode == "collective-permute-start" and start.operands == ("y.1",)
    assert [str(shape) for shape in start.shapes] == ["bf16[128,256]", "bf16[128,256]", "u32[]", "u32[]"]
    assert start.op_name == "jit(step)/shard_map/while/body/ppermute"
    assert tick.root == "t.4" and list(tick.instructions)[-1] == "t.4"
    layer = module.computations["layer"]
    assert layer.instructions["dot.1"].cycles == 1000 and layer.instructions["dot.1"].called == {"calls": "fused_dot"}
    assert [str(shape) for shape in layer.instructions["t.1"].shapes] == ["s32[]", "bf16[8,256]"]
    norm = module.computations["main"].instructions["norm"]
    assert norm.called == {"branch 0": "unusual", "branch 1": "usual"}


def test_how_often_loops_run():
    module = parse(texts.TPU)

    def trips(computation, name):
        return module.trips(module.computations[computation].instructions[name])

    assert trips("main", "while.5") == 5 and trips("forward", "while.2") == 2
    assert trips("tick_body", "while.3") is None  # depends on a value
    gpu = parse(texts.GPU)
    assert gpu.trips(gpu.computations["main"].instructions["while.2"]) == 7
    assert gpu.trips(gpu.computations["body"].instructions["while.1"]) is None


def test_what_is_fused():
    module = parse(texts.GPU)
    turned = module.computations["branch"].instructions["turned"]
    assert module.fused(turned) == {"parameter", "transpose"} <= hlo.MOVES
    assert not module.fused(module.computations["main"].instructions["work"]) <= hlo.MOVES


def test_what_this_xla_prints():
    def step(x):
        y = jax.lax.fori_loop(0, 9, lambda i, y: jnp.tanh(y @ x) + i, x)
        return jax.lax.cond(y[0, 0] > 0, jnp.sin, lambda z: z @ z, y)

    text = jax.jit(step).lower(jax.ShapeDtypeStruct((16, 16), jnp.float32)).compile().as_text()
    module = parse(text)
    loops = [i for computation in module.computations.values() for i in computation if i.opcode == "while"]
    assert [module.trips(loop) for loop in loops] == [9]
    assert any(str(shape) == "f32[16,16]" for shape in loops[0].shapes)
    assert all(
        name in module.computations for c in module.computations.values() for i in c for name in i.called.values()
    )
