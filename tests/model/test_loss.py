"""What `loss_fn` may return, and what the weight of a loss may depend on. Shapes only: nothing is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe import Weighted, make_mesh
from jaxpipe.errors import DataError, LossError
from jaxpipe.model.loss import call, loss_shapes, over, weight_from_labels

OUTPUTS = jax.ShapeDtypeStruct((4, 5, 7), jnp.float32)
LABELS = jnp.asarray(np.random.default_rng(0).integers(0, 3, (4, 5)), jnp.int32)
MASK_SUM = float((LABELS > 0).sum())


def each(y, t):
    return jax.nn.logsumexp(y, -1) - jnp.take_along_axis(y, t[..., None], -1)[..., 0]


def mask_sum(t):
    return (t > 0).astype(jnp.float32).sum()


def plain(y, t):
    return Weighted((each(y, t) * (t > 0).astype(y.dtype)).sum(), mask_sum(t))


def scanned(y, t):
    """Total and weight in one carry, as a loss computed chunk by chunk does it."""

    def step(carry, chunk):
        a, b = chunk
        return (carry[0] + each(a, b).sum(), carry[1] + mask_sum(b)), None

    return Weighted(*jax.lax.scan(step, (0.0, 0.0), (y, t))[0])


def scanned_late(y, t):
    """The weight sees the outputs in the second turn only, through the carry."""

    def step(carry, chunk):
        a, b = chunk
        return (carry[0] + a.sum(), carry[1] + mask_sum(b) + jnp.where(carry[0] > 0, 1.0, 0.0)), None

    return Weighted(*jax.lax.scan(step, (0.0, 0.0), (y, t))[0])


def while_loop(condition):
    def loss(y, t):
        def step(carry):
            i = carry[2]
            return carry[0] + each(y[i], t[i]).sum(), carry[1] + mask_sum(t[i]), i + 1

        return Weighted(*jax.lax.while_loop(condition, step, (0.0, 0.0, 0))[:2])

    return loss


@jax.custom_vjp
def custom(y, t):
    return y.sum(), mask_sum(t)


custom.defvjp(lambda y, t: (custom(y, t), y), lambda y, g: (jnp.ones_like(y) * g[0], None))


@jax.custom_jvp
def custom_forward(y, t):
    return y.sum(), mask_sum(t)


custom_forward.defjvp(lambda primals, tangents: (custom_forward(*primals), (tangents[0].sum(), 0.0)))


def printing(y, t):
    def fail(*_):
        raise AssertionError("called back for outputs that do not exist")

    jax.debug.callback(fail, y)
    return plain(y, t)


def called_back(y):
    return jax.pure_callback(lambda y: np.float32(y.sum()), jax.ShapeDtypeStruct((), jnp.float32), y)


def through_a_reference(y, t):
    kept = jax.new_ref(jnp.zeros(()))
    kept[...] = y.sum()
    return Weighted(y.sum(), kept[...] + mask_sum(t))


INDEPENDENT = {
    "plain": plain,
    "jit": jax.jit(lambda y, t: jax.jit(plain)(y, t)),
    "shape": lambda y, t: Weighted(y.sum(), y.shape[0] * MASK_SUM / 4),
    "ones_like": lambda y, t: Weighted(y.sum(), jnp.ones_like(y).mean() * MASK_SUM),
    "scan": scanned,
    "while": while_loop(lambda carry: carry[2] < 4),
    "custom_vjp": lambda y, t: Weighted(*custom(y, t)),
    "custom_jvp": lambda y, t: Weighted(*custom_forward(y, t)),
    "remat": lambda y, t: Weighted(*jax.checkpoint(lambda y, t: (y.sum(), mask_sum(t)))(y, t)),
    "cond": lambda y, t: Weighted(
        *jax.lax.cond(t.sum() > 3, lambda: (y.sum(), mask_sum(t)), lambda: (y.max(), jnp.float32(2)))
    ),
    "vmap": lambda y, t: Weighted(*(a.sum() for a in jax.vmap(lambda a, b: (each(a, b).sum(), mask_sum(b)))(y, t))),
    "callback": lambda y, t: Weighted(called_back(y), mask_sum(t)),
    "printing": printing,
    "boolean": lambda y, t: Weighted(y.sum(), (t > 0).any()),
    "integer": lambda y, t: Weighted(y.sum(), (t > 0).sum()),
    "numpy": lambda y, t: Weighted(y.sum().astype(jnp.bfloat16), np.float64(MASK_SUM)),
    "negative": lambda y, t: {"loss": Weighted(y.sum(), -mask_sum(t)), "accuracy": 0.5},
    "list": lambda y, t: [Weighted(y.sum(), mask_sum(t)), {"accuracy": 0.5}],
}
DEPENDENT = {
    "value": lambda y, t: Weighted(y.sum(), y.sum()),
    "stop_gradient": lambda y, t: Weighted(y.sum(), mask_sum(t) + jax.lax.stop_gradient(y).sum()),
    "integer": lambda y, t: Weighted(y.sum(), (y.argmax(-1) == t).sum()),
    "jit": jax.jit(lambda y, t: Weighted(y.sum(), (y > 0).sum())),
    "carry": scanned_late,
    "number of turns": while_loop(lambda carry: (carry[2] < 4) & (carry[0] < 1e9)),
    "choice": lambda y, t: Weighted(y.sum(), jax.lax.cond(y.sum() > 0, lambda: 1.0, lambda: 2.0)),
    "branch": lambda y, t: Weighted(y.sum(), jax.lax.cond(t.sum() > 0, lambda: y.sum(), lambda: 2.0)),
    "custom_vjp": lambda y, t: Weighted(custom(y, t)[0], custom(y, t)[0]),
    "map": lambda y, t: Weighted(y.sum(), jax.lax.map(lambda a: (a > 0).sum(), y).sum()),
    "reference": through_a_reference,
    "callback": lambda y, t: Weighted(y.sum(), called_back(y)),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_weights_that_come_from_labels_alone(name):
    loss = INDEPENDENT[name]
    shapes = loss_shapes(loss, OUTPUTS, LABELS)
    assert shapes.total.dtype == shapes.weight.dtype == jnp.float32 and not shapes.is_mean
    wanted = {"boolean": 1.0, "negative": -MASK_SUM}.get(name, MASK_SUM)
    assert float(weight_from_labels(loss, OUTPUTS, LABELS)) == pytest.approx(wanted, rel=1e-6)
    jax.effects_barrier()


@pytest.mark.parametrize("name", DEPENDENT)
def test_weights_that_depend_on_outputs_are_refused(name):
    with pytest.raises(LossError, match="weight depends on the outputs .* Compute the weight from the labels"):
        loss_shapes(DEPENDENT[name], OUTPUTS, LABELS)


def test_scalars_of_any_kind_are_a_loss():
    for value in (3.0, np.float32(3), np.float64(3), np.array(3.0), jnp.bfloat16(3), jnp.float16(3), jnp.asarray(3.0)):
        for form in (lambda v: v, lambda v: (v, {}), lambda v: [v, {"a": 1}], lambda v: {"loss": v, "a": None}):
            shapes = loss_shapes(lambda y, t, v=value, form=form: form(v), OUTPUTS, LABELS)
            assert shapes.is_mean and shapes.total.shape == () and shapes.total.dtype == jnp.float32


PAIR = (
    r"a pair of scalars, which is ambiguous: \(loss, accuracy\) or \(sum, weight\)\? Write jaxpipe.Weighted\(total, w"
)


def test_what_is_refused():
    cases = [
        (lambda y: (y.mean(), y.sum()), PAIR),
        (lambda y: [y.mean(), 3], PAIR),
        (lambda y: (2.0, np.float32(1)), PAIR),
        (lambda y: ((y.sum(), 1.0), {"accuracy": 1.0}), PAIR),
        (lambda y: {"loss": (y.sum(), 1.0)}, PAIR),
        (lambda y: (y.mean(), 1, 2), "a tuple of 3 values"),
        (lambda y: (y.mean(), None), "a tuple of 2 values"),
        (lambda y: ({"accuracy": 1.0}, y.mean()), "a tuple of 2 values"),
        (lambda y: (Weighted(y.sum(), 1), 0.5), "a tuple of 2 values"),
        (lambda y: None, "a value of type NoneType"),
        (lambda y: y, r"a value float32\[4,5,7\], which is not a .*\.mean\(\)"),
        (lambda y: True, r"a value bool\[\], which is not a floating-point scalar"),
        (lambda y: 3, r"a value int32\[\]"),
        (lambda y: y.sum().astype(jnp.complex64), r"a value complex64\[\]"),
        (lambda y: np.array(None), "a value array.None.*not a number"),
        (lambda y: Weighted(y, 1), r"Weighted with the total float32\[4,5,7\]"),
        (lambda y: Weighted(y.argmax(), 1), r"Weighted with the total int32\[\]"),
        (lambda y: Weighted(Weighted(y.sum(), 1), 1), "Weighted with the total of type Weighted"),
        (lambda y: Weighted(y.sum(), None), "Weighted with the weight of type NoneType"),
        (lambda y: Weighted(y.sum(), y[0, 0]), r"Weighted with the weight float32\[7\]"),
        (lambda y: Weighted(y.sum(), 1j), r"Weighted with the weight complex64\[\], which is not a real scalar"),
        (lambda y: Weighted(y.sum(), 10**400), "Weighted with the weight 1000.*not a number"),
    ]
    for result, message in cases:
        with pytest.raises(LossError, match="loss_fn returned " + message):
            loss_shapes(lambda y, t, result=result: result(y), OUTPUTS, LABELS)


def test_exceptions_of_the_user_stay_as_they_are():
    with pytest.raises(KeyError, match="mask") as found:
        loss_shapes(lambda y, t: y.sum() * t["mask"].sum(), OUTPUTS, {"ids": LABELS})
    note = r"Raised by loss_fn(outputs, labels) with outputs float32[4,5,7] and labels {'ids': int32[4,5]}."
    assert note in found.value.__notes__
    with pytest.raises(ZeroDivisionError) as found:
        call("metrics", lambda y, t: 1 / 0, OUTPUTS, None)
    assert found.value.__notes__[0] == "Raised by metrics(outputs, labels) with outputs float32[4,5,7] and labels None."
    with pytest.raises(DataError, match="The labels are None, but loss_fn needs them: TypeError: .*compute_loss=False"):
        loss_shapes(lambda y, t: (y - t).mean(), OUTPUTS, None)
    with pytest.raises(LossError, match="loss_fn is 'mse', which cannot be called"):
        loss_shapes("mse", OUTPUTS, LABELS)


def test_axes_of_the_mesh_are_known():
    def loss(y, t):
        return Weighted(y.sum(), jax.lax.all_gather(mask_sum(t), "data").sum() / jax.lax.axis_size("data"))

    assert not loss_shapes(loss, OUTPUTS, LABELS, make_mesh(pipe=2, data=4)).is_mean


def test_one_rule_for_total_over_weight():
    total, weight = np.array([6.0, 6.0, 5.0, np.nan]), np.array([2.0, -3.0, 0.0, 0.0])
    for made in (over(total, weight), over(jnp.asarray(total), jnp.asarray(weight))):
        np.testing.assert_array_equal(made, [3, -2, 0, 0])
