"""What users put into the layer list: what is refused at once, and how it is shown."""

import functools

import pytest

from jaxpipe.errors import LayerError
from jaxpipe.model.specs import Layer, LayerSpec, TiedLayerSpec


def target(width, *, bias=True):
    return width, bias


def nothing(*_):
    return {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layer(None, nothing), r"Layer\(init=None\): a layer is a pair of functions"),
        (lambda: Layer(nothing, "apply"), r"Layer\(apply='apply'\): .*One without parameters is a plain function"),
        (lambda: Layer(nothing, nothing, 3), r"Layer\(name=3\): the name of a layer is a string"),
        (lambda: LayerSpec(3, 4), r"LayerSpec\(3\): the first argument is a flax module class or a function"),
        (lambda: TiedLayerSpec(None, target), "the key, a string, names the tie, but it was None or unhashable"),
        (lambda: TiedLayerSpec([], target), "None or unhashable"),
        (lambda: TiedLayerSpec("k", "target"), r"LayerSpec\('target'\)"),
        (lambda: TiedLayerSpec("k", target, forward_fn=3), r"'k', ..., forward_fn=3\): it is a function \(module, x\)"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(LayerError, match=message):
        make()


def test_arguments_are_kept_for_later():
    spec = TiedLayerSpec("k", target, 8, bias=False, forward_fn=nothing)
    assert (spec.key, spec.target, spec.args, spec.kwargs, spec.forward_fn) == (
        "k",
        target,
        (8,),
        {"bias": False},
        nothing,
    )


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        (LayerSpec(target, 8, bias=False), "target(8, bias=False)"),
        (LayerSpec(functools.partial(target, 8)), "target()"),
        (TiedLayerSpec("embed", target, 8), "Tied[embed]:target(8)"),
        (LayerSpec(type("Odd", (), {"__call__": nothing})()), "Odd()"),
    ],
)
def test_how_messages_show_it(spec, shown):
    assert repr(spec) == shown
