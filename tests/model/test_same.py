"""Which list entries are layers of one kind. A false yes would compute with the wrong function."""

import collections
import dataclasses
import enum
import functools
import itertools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxpipe
from jaxpipe.model.layers import bind
from jaxpipe.model.same import same_value
from tests.compare import assert_close


def factory(scale, table=None):
    return jaxpipe.Layer(
        lambda key, x: {"b": jnp.zeros(2)}, lambda p, x: scale * x + p["b"] + (0 if table is None else table)
    )


def same(a, b):
    first, second = bind([a, b])
    return first.kind is second.kind


def test_one_kind():
    assert same(factory(2.0), factory(2.0))
    assert same(jax.nn.relu, jax.nn.relu)
    assert same(jaxpipe.LayerSpec(nnx.Linear, 3, 4), jaxpipe.LayerSpec(nnx.Linear, 3, 4))
    assert same(functools.partial(jnp.clip, min=0), functools.partial(jnp.clip, min=0))
    assert same(
        jaxpipe.LayerSpec(nnx.Linear, 3, 3, kernel_init=nnx.initializers.ones),
        jaxpipe.LayerSpec(nnx.Linear, 3, 3, kernel_init=nnx.initializers.ones),
    )
    a, b = ((lambda x, f=f: f(x)) for f in (jnp.tanh, jnp.tanh))
    assert same(a, b)


def test_different_kinds():
    assert not same(factory(2.0), factory(3.0))
    assert not same(factory(1), factory(True))
    assert not same(factory(1.0, np.ones(2)), factory(1.0, np.ones(2))), (
        "arrays may change: only the same object counts"
    )
    assert not same(jax.nn.relu, jax.nn.gelu)
    assert not same(jaxpipe.LayerSpec(nnx.Linear, 3, 4), jaxpipe.LayerSpec(nnx.Linear, 3, 4, use_bias=False))
    assert not same(lambda x: x + 1, lambda x: x + 1), "different code objects"
    assert not same(functools.partial(jnp.clip, min=0), functools.partial(jnp.clip, min=1))
    a, b = ((lambda x, f=f: f(x)) for f in (jnp.tanh, jnp.sin))
    assert not same(a, b)


def test_a_tie_is_never_merged_with_an_untied_layer():
    tied = jaxpipe.TiedLayerSpec("k", nnx.Linear, 3, 3)
    assert not same(tied, jaxpipe.LayerSpec(nnx.Linear, 3, 3))
    assert not same(tied, jaxpipe.TiedLayerSpec("other", nnx.Linear, 3, 3))


def closure(value):
    return lambda x: x * value


def default(value):
    return lambda x, scale=value: x * scale


def keyword(value):
    def scale(x, *, scale=value):
        return x * scale

    return scale


def itself(value):
    """Its closure names itself."""

    def power(x, n=3):
        return power(x, n - 1) * value if n else x

    return power


def attribute(value):
    def scale(x):
        return x * scale.value

    scale.value = value
    return scale


def wrapped(value):
    @functools.wraps(closure(value))
    def wrapper(x):
        return wrapper.__wrapped__(x)

    return wrapper


class Text(str):
    pass


class Number(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


class Always:
    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Always)

    def __call__(self, x):
        return x * self.value

    def method(self, x):
        return x * self.value


class Slots:
    __slots__ = ("value",)


class Pair(NamedTuple):
    first: Any
    second: Any = 0


@dataclasses.dataclass(frozen=True)
class Settings:
    width: int
    rate: Any = dataclasses.field(default=0.0, compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    width: int
    rate: Any = dataclasses.field(default=0.0, compare=False)


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


def text(value, extra):
    made = Text(value)
    made.extra = extra
    return made


def slots(value):
    made = Slots()
    if value is not None:
        made.value = value
    return made


def partial(value, **attributes):
    made = functools.partial(jnp.clip, min=value)
    made.__dict__.update(attributes)
    return made


def chain(length):
    made = None
    for _ in range(length):
        made = [made]
    return made


def cycle(value):
    made = {"value": value}
    made["self"] = [made]
    return made


# A maker, two unlike arguments: made twice from one they are the same, made from both they are not.
MAKERS = {
    "closure": (closure, 2.0, 3.0),
    "signed zero": (closure, 0.0, -0.0),
    "signed zero in a tuple": (closure, (0.0,), (-0.0,)),
    "signed zero of a complex": (closure, complex(0.0, 0.0), complex(0.0, -0.0)),
    "nan": (closure, float("nan"), 0.0),
    "bool and int": (closure, True, 1),
    "int and float": (default, 1, 1.0),
    "keyword default": (keyword, 1, 1.0),
    "key of a dict": (closure, {1: "a"}, {True: "a"}),
    "order of a dict": (closure, {"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "order in a default": (default, {"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "ordered dict": (closure, collections.OrderedDict(a=1, b=2), collections.OrderedDict(b=2, a=1)),
    "names itself": (itself, 2.0, 3.0),
    "attribute of a function": (attribute, 2.0, 3.0),
    "wrapped": (wrapped, 2.0, 3.0),
    "object": (Always, 2.0, 3.0),
    "method": (lambda value: Always(value).method, 2.0, 3.0),
    "subclass of str": (lambda value: text("a", value), 1, 2),
    "subclass of int": (Number, 1, 2),
    "slots": (slots, 1, 2),
    "empty slot": (slots, None, 2),
    "named tuple": (Pair, 0.0, -0.0),
    "dataclass": (lambda value: Settings(3, value), 0.1, 0.2),
    "dataclass with slots": (lambda value: Slotted(3, value), 0.1, 0.2),
    "enum": (closure, Mode.FAST, Mode.SLOW),
    "partial": (partial, 0, 0.0),
    "attribute of a partial": (lambda value: partial(0, extra=value), 1, 2),
    "dtype": (lambda name: closure(np.dtype(name)), "float32", "float16"),
    "type": (closure, jnp.float32, jnp.bfloat16),
    "numpy scalar": (lambda value: closure(np.float32(value)), 0.0, -0.0),
    "type of a numpy scalar": (lambda kind: closure(kind(1)), np.int32, np.int64),
    "spec": (lambda axes: closure(jax.P(*axes)), ("data", None), (None, "data")),
    "initializer": (lambda scale: nnx.initializers.normal(scale), 0.1, 0.2),
    "cycle": (cycle, 1, 2),
    "depth": (chain, 10_000, 10_001),
    "linen module": (lambda width: linen.Dense(width), 3, 4),
    "range": (lambda stop: closure(range(stop)), 3, 4),
    "builtin method": (lambda sep: sep.join, "-", "+"),
}


@pytest.mark.parametrize(("make", "one", "other"), MAKERS.values(), ids=MAKERS)
def test_structure_decides(make, one, other):
    assert same_value(make(one), make(one))
    assert not same_value(make(one), make(other)) and not same_value(make(other), make(one))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (jnp.ones(2), jnp.ones(2)),
        (jax.random.key(0), jax.random.key(0)),
        (object(), object()),
        (operator.itemgetter(0), operator.itemgetter(0)),
        (itertools.count(), itertools.count()),
        (jax.jit(closure(1)), jax.jit(closure(1))),
        (collections.deque([1]), collections.deque([1])),
        (iter([1]), iter([1])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_looked_into_is_only_like_itself(one, other):
    assert same_value(one, one) and not same_value(one, other)
    assert not same(closure(one), closure(other)) and same(closure(one), closure(one))


def tanh_then(**functions):
    """Its arguments act in the order in which they are written."""

    def apply(p, x):
        for function in functions.values():
            x = function(x)
        return x + p["b"]

    return jaxpipe.Layer(lambda key, x: {"b": jnp.zeros(())}, apply)


def double(x):
    return 2 * x


def test_the_order_of_keyword_arguments_decides():
    orders = {"a": jnp.tanh, "b": double}, {"b": double, "a": jnp.tanh}
    for wrap in (lambda f: jaxpipe.LayerSpec(tanh_then, **f), lambda f: functools.partial(lambda x, **g: x, **f)):
        assert not same(wrap(orders[0]), wrap(orders[1])) and same(wrap(orders[0]), wrap(orders[0]))
    module = jaxpipe.PipelineModule([jaxpipe.LayerSpec(tanh_then, **f) for f in orders], lambda y, t: y.sum())
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), 1)
    x = np.linspace(0, 1, 4, dtype=np.float32)[None]
    assert_close(pipe.evaluate(pipe.init(0, x[0]), (x, None)), np.tanh(2 * 2 * np.tanh(x)).sum(dtype=np.float32), 1e-6)


def named(index, scale=0.9):
    def init(key, x):
        return {"w": jax.random.normal(key, (3, 3)) / 2}

    return jaxpipe.Layer(init, lambda p, x: jnp.tanh(x @ p["w"]) * scale, f"block_{index}")


class Dense(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        return linen.Dense(self.width)(x)


@pytest.mark.parametrize(
    "make",
    [
        named,
        lambda index: jaxpipe.LayerSpec(named, index),
        lambda index: jaxpipe.LayerSpec(functools.partial(named, scale=0.8), index),
        lambda index: jaxpipe.LayerSpec(Dense, 3, name=f"block_{index}"),
    ],
    ids=["pair", "factory", "partial", "linen"],
)
def test_names_are_no_part_of_the_kind(make):
    module = jaxpipe.PipelineModule([make(index) for index in range(5)], lambda y, t: (y**2).mean(), "type:block_[02]")
    assert [f"block_{index}" in layer.name for index, layer in enumerate(module.layers)] == [True] * 5
    assert "block_3" in module.label(3) and "block_4" in repr(module)
    x = np.ones((2, 4, 3), np.float32)
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), 2)
    params = pipe.init(0, x[0])
    assert len(params["stacked"]) == 1 and not params["shared"]
    assert pipe.partition == (0, 2, 5), "each of its own name"
    found, grads = pipe.value_and_grad(params, (x, None))
    wanted = jaxpipe.reference.value_and_grad(module, pipe.to_layers(params), (x, None))
    assert_close((found, pipe.to_layers(grads)), jax.device_get(wanted), 1e-6)


class Mark:
    """Two of these have nothing that could differ, and yet code tells them apart."""


class Shown:
    """A callable without fields is what its class makes of it."""

    def __call__(self, x):
        return x


def renamed(name):
    def function(x):
        return x

    function.__name__ = name
    return function


def test_marks_are_themselves():
    one, other = Mark(), Mark()
    assert same_value(one, one) and not same_value(one, other)
    assert not same_value({"mode": one}, {"mode": other})
    assert same_value(Shown(), Shown())


def test_names_of_functions_count():
    """A layer may look at them. (Names of layers do not: see above.)"""
    assert same_value(renamed("a"), renamed("a")) and not same_value(renamed("a"), renamed("b"))
