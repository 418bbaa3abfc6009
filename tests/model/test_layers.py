"""From list entries to bound layers: names, kinds, ties, and what is no layer."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from jaxpipe.errors import LayerError
from jaxpipe.model.layers import bind, bind_alone
from jaxpipe.model.specs import Layer, LayerSpec, TiedLayerSpec


def init(key, x):
    return {"w": jax.random.normal(key, (3,))}


def scale(params, x):
    return x * params["w"]


def made(factor):
    return Layer(init, lambda params, x: x * factor)


def test_like_entries_share_a_kind_and_with_one_name_the_object():
    layers = bind([Layer(init, scale), jnp.tanh, Layer(init, scale), Layer(init, scale, "Other"), jnp.tanh])
    assert layers[0] is layers[2] and layers[1] is layers[4]
    assert layers[3].kind is layers[0].kind is not layers[1].kind
    assert [layer.name for layer in layers] == ["scale", "tanh", "scale", "Other", "tanh"]
    assert layers[0].tie is None and layers[1].entry is jnp.tanh


def test_specs_are_of_one_kind_if_they_compute_the_same():
    one, two, three = bind([LayerSpec(made, 2.0), LayerSpec(made, 2.0), LayerSpec(made, 3.0)])
    assert one.kind is two.kind is not three.kind
    first, other, last = bind([LayerSpec(nnx.Linear, 3, 3), LayerSpec(linen.Dense, 3), LayerSpec(nnx.Linear, 3, 3)])
    assert first.kind is last.kind is not other.kind


def test_alone_an_entry_has_a_kind_of_its_own():
    entry = TiedLayerSpec("k", made, 2.0)
    one, two = bind_alone(entry, 0), bind_alone(entry, 1)
    assert one.kind is not two.kind and one.tie == two.tie == "k" and one.entry is entry


def test_ties():
    embed, head = TiedLayerSpec("k", made, 2.0), TiedLayerSpec("k", made, 2.0, forward_fn=scale)
    first, middle, last = bind([embed, LayerSpec(made, 2.0), head])
    assert (first.tie, middle.tie, last.tie) == ("k", None, "k")
    assert len({first.kind, middle.kind, last.kind}) == 3, "a tied layer is not stacked with others"
    with pytest.raises(LayerError, match="Layers 0 and 2 are tied by the key 'k' but differ: .*different forward_fn"):
        bind([embed, jnp.tanh, TiedLayerSpec("k", made, 3.0)])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "Layer 1 is 3. A layer is a jaxpipe.Layer"),
        (nnx.Linear, "Layer 1 is <class.*. A layer is a jaxpipe.Layer"),
        ([jnp.tanh], r"Layer 1 is \[.*A layer is"),
        (linen.Dense(3), r"Layer 1 is a Dense object without weights.*LayerSpec\(Dense, ...\).*module.bind"),
        (LayerSpec(lambda: 3), "Layer 1, .*made a int"),
    ],
)
def test_what_is_no_layer(entry, message):
    for call in (lambda: bind([jnp.tanh, entry]), lambda: bind_alone(entry, 1)):
        with pytest.raises(LayerError, match=message):
            call()
    with pytest.raises(LayerError, match="The layer list is empty"):
        bind([])


def test_errors_while_a_layer_is_built_name_it():
    def fails(width):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="^mine") as caught:
        bind([jnp.tanh, LayerSpec(fails, 3)])
    assert caught.value.__notes__ == ["Raised in layer 1, fails(3), while it was built."]


WITHOUT_FLAX = """
import sys
import jax.numpy as jnp
import jaxpipe
pair = jaxpipe.Layer(lambda key, x: {"w": jnp.ones(3)}, lambda p, x: x * p["w"])
jaxpipe.PipelineModule([pair, jnp.tanh, lambda x: x + 1]).shapes(jnp.ones(3))
assert "flax" not in sys.modules, "a model without flax paid for it"
jaxpipe.PipelineModule([jaxpipe.LayerSpec(lambda: pair)])
assert "flax" in sys.modules, "this test would not notice otherwise"
"""


def test_flax_is_imported_when_it_is_needed():
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", WITHOUT_FLAX], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr
