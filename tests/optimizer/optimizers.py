"""The registry of optimizers that have to act as on one tree entry per layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

RATE = 1e-2
with_path = jax.tree_util.tree_map_with_path


def only_init():
    """Half a transformation."""
    return type("OnlyInit", (), {"init": lambda self, params: params})()


def by_ndim(tree):
    return jax.tree.map(lambda a: a.ndim > 1, tree)


def odd_layers(tree):
    return with_path(lambda path, _: int(path[0].key[-3:]) % 2 == 1, tree)


def ndims(tree):
    return jax.tree.map(lambda a: str(min(a.ndim, 2)), tree)


def labels(tree):
    def label(path, _):
        if path[0].key in ("layer_000", "layer_002"):
            return "frozen"
        return "slow" if path[-1].key == "b" else "fast"

    return with_path(label, tree)


def nameless():
    """Momentum, kept as a list in the order of the leaves."""

    def update(grads, state, params):
        new = [0.9 * m + g for m, g in zip(state, jax.tree.leaves(grads), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(grads), [-0.01 * m for m in new]), new

    return optax.GradientTransformation(lambda p: [jnp.zeros_like(a) for a in jax.tree.leaves(p)], update)


def minus_mean():
    """Takes the mean over layers of the same shapes from each of them: mixes whole arrays."""

    def update(grads, _):
        like = [g for g in grads.values() if "conv" in g]
        mean = jax.tree.map(lambda *a: sum(a) / len(a), *like)
        return {k: jax.tree.map(jnp.subtract, g, mean) if "conv" in g else g for k, g in grads.items()}

    return optax.stateless(update)


def by_depth():
    """A smaller step for each layer than for the one before, written with its number; state with keys of its own."""

    def init(params):
        return {"sizes": {name: {"seen": jnp.zeros(())} for name in params}, "count": 0}

    def update(grads, state, params=None, **extra):
        scaled = {
            name: jax.tree.map(lambda g, i=i: -RATE * 0.7**i * g, layer)
            for i, (name, layer) in enumerate(grads.items())
        }
        sizes = {name: {"seen": state["sizes"][name]["seen"] + optax.tree.norm(g)} for name, g in grads.items()}
        return scaled, {"sizes": sizes, "count": state["count"] + 1}

    return optax.GradientTransformationExtraArgs(init, update)


def waiting():
    """Each layer waits for a number from the one before it; a loop of a length that depends on the layer's values."""

    def update(grads, _):
        carried, out = jnp.float32(0), {}
        for name, layer in grads.items():
            out[name] = jax.tree.map(lambda g, c=carried: -RATE * g / (1 + c), layer)
            halved = jax.lax.while_loop(lambda x: jnp.abs(x) > 0.1, lambda x: x / 2, optax.tree.norm(layer))
            carried = carried + halved
        return out

    return optax.stateless(update)


def loops():
    """A loop per array that would not end on zeros."""

    def one(g):
        grown = jax.lax.while_loop(lambda x: jnp.sum(x * x) < 100.0, lambda x: 2 * x, g + 1e-3)
        return -RATE * grown

    return optax.stateless(lambda grads, _: jax.tree.map(one, grads))


def normalized():
    """Divides by a norm per array, which is zero in padding only."""
    return optax.stateless(lambda grads, _: jax.tree.map(lambda g: g / jnp.sqrt(jnp.sum(g * g)), grads))


def traced_value():
    """Uses the loss and the gradient before clipping, and keeps both."""

    def init(params):
        return {"value": jnp.zeros(()), "grad": jax.tree.map(jnp.zeros_like, params)}

    def update(updates, state, params, *, value, grad):
        new = {"value": state["value"] + value, "grad": jax.tree.map(lambda a, b: a + b, state["grad"], grad)}
        return jax.tree.map(lambda u, m: -RATE * (u + 0.1 * m / (1 + jnp.abs(new["value"]))), updates, new["grad"]), new

    return optax.GradientTransformationExtraArgs(init, update)


def optimizers():
    o, c = optax, optax.contrib
    three = {"frozen": o.set_to_zero(), "slow": o.sgd(1e-3), "fast": o.adamw(RATE)}
    each = {f"layer_{i:03d}": o.adam(RATE * 0.8**i) for i in range(9)}
    clipped = o.chain(o.clip_by_global_norm(0.5), o.adamw(RATE, mask=by_ndim))
    return {
        "sgd": o.sgd(RATE, 0.9, nesterov=True),
        "adam": o.adam(RATE),
        "adamw_ndim": o.adamw(RATE, weight_decay=0.1, mask=by_ndim),
        "adamw_path": o.adamw(RATE, weight_decay=0.1, mask=odd_layers),
        "clip_adamw": clipped,
        "lion": o.lion(RATE),
        "lamb": o.lamb(RATE, weight_decay=0.1),
        "lars": o.lars(0.1, weight_decay=0.01),
        "adafactor": o.adafactor(RATE, min_dim_size_to_factor=4),
        "adafactor_unfactored": o.adafactor(RATE, factored=False, momentum=0.9),
        "muon": c.muon(RATE, weight_decay=0.1),
        "novograd": o.novograd(RATE, weight_decay=0.1),
        "sm3": o.sm3(RATE),
        "fromage": o.fromage(RATE),
        "block_rms": o.chain(o.clip_by_block_rms(0.1), o.sgd(RATE)),
        "adaptive_grad_clip": o.chain(o.adaptive_grad_clip(0.01), o.sgd(RATE, 0.9)),
        "centralize": o.chain(o.centralize(), o.adam(RATE)),
        "trust_ratio": o.chain(o.scale_by_rms(), o.scale_by_trust_ratio(), o.scale(-RATE)),
        "param_block": o.chain(o.scale_by_param_block_rms(), o.scale_by_param_block_norm(), o.scale(-RATE)),
        **({"galore": c.galore(RATE, rank=2, update_proj_gap=2)} if hasattr(c, "galore") else {}),  # since optax 0.2.7
        "noisy_sgd": o.noisy_sgd(RATE, key=jax.random.key(3)),
        "noisy_sgd_rbg": o.noisy_sgd(RATE, key=jax.random.key(3, impl="rbg")),
        "by_path": o.multi_transform(three, labels),
        "by_ndim": o.multi_transform({"0": o.sgd(RATE), "1": o.lion(RATE), "2": o.lamb(RATE)}, ndims),
        "rate_per_layer": o.multi_transform(each, lambda tree: {k: k for k in tree}),
        "schedule_free": c.schedule_free_adamw(RATE),
        "lookahead": o.lookahead(o.sgd(RATE), 2, 0.5),
        "multi_steps": o.MultiSteps(clipped, 2),
        "hyperparams": o.inject_hyperparams(o.adamw)(learning_rate=o.linear_schedule(RATE, 1e-3, 5)),
        "plateau": o.chain(o.adam(RATE), c.reduce_on_plateau(factor=0.5, patience=1)),
        "polyak": o.polyak_sgd(max_learning_rate=0.1),
        "momo": c.momo(0.1),
        "apply_if_finite": o.apply_if_finite(o.adamw(RATE), 3),
        "ema": o.chain(o.ema(0.9), o.scale(-RATE)),
        "ademamix": c.ademamix(RATE),
        "adan": o.adan(RATE),
        "prodigy": c.prodigy(0.1),
        "dadapt": c.dadapt_adamw(0.1),
        "mechanize": c.mechanize(o.sgd(RATE)),
        "lbfgs_directions": o.chain(o.scale_by_lbfgs(3), o.scale(-RATE)),
        "nameless": nameless(),
        "flatten": o.flatten(o.adam(RATE)),
        "minus_mean": o.chain(minus_mean(), o.sgd(RATE)),
        "normalized": o.chain(normalized(), o.clip_by_global_norm(1.0), o.sgd(RATE)),
        "by_depth": by_depth(),
        "waiting": waiting(),
        "loops": loops(),
        "value_and_grad": traced_value(),
    }


OPTIMIZERS = optimizers()
# Those whose neighbours of the same mechanism are tested at every number of stages: one number is enough for them.
ALIKE = {
    "adafactor_unfactored",
    "param_block",
    "noisy_sgd_rbg",
    "rate_per_layer",
    "momo",
    "ema",
    "ademamix",
    "adan",
    "dadapt",
    "mechanize",
    "lbfgs_directions",
    "nameless",
    "flatten",
    "minus_mean",
    "waiting",
    "normalized",
}
# These amplify rounding: plain optax against itself, jitted or not, differs by as much. In float64 all agree to 1e-11.
LOOSE = {"muon": 1e-4, "schedule_free": 1e-4, "lbfgs_directions": 1e-4, "prodigy": 1e-4, "dadapt": 1e-4}


def with_slow(tx):
    """What `optax.lookahead` does to one set of weights: the slow ones are kept beside it."""
    pair = optax.LookaheadParams

    def update(grads, state, params):
        updates, new = tx.update(grads, state[0], pair(params, state[1]))
        return updates.fast, (new, optax.apply_updates(state[1], updates.slow))

    return optax.GradientTransformation(lambda p: (tx.init(pair(p, p)), p), update)


def plain(name):
    """The optimizer as it is run on the natural tree: (init, update(grads, state, params, value))."""
    tx = OPTIMIZERS[name]
    if name == "lookahead":
        tx = with_slow(tx)
    tx = tx if name in ("multi_steps", "value_and_grad", "by_depth") else optax.with_extra_args_support(tx)

    def update(grads, state, params, value):
        extra = {"value": value} | ({"grad": grads} if name == "value_and_grad" else {})
        return tx.update(grads, state, params, **extra)

    return tx.init, update


def natural(layers):
    """One entry per layer that owns weights."""
    return {f"layer_{i:03d}": layer for i, layer in enumerate(layers) if jax.tree.leaves(layer)}


def error(found, wanted):
    """The largest difference, in parts of the largest entry of its leaf."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), (x.shape, x.dtype, y.shape, y.dtype)
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        off = np.where(x == y, 0, np.abs(x - y))
        worst = max(worst, float(np.max(off, initial=0) / max(1e-30, np.max(np.abs(y), initial=0))))
    return worst
