"""Models whose layers have state, of all kinds, and a loop over their micro-batches that knows nothing of jaxpipe.

Nothing in them is followed by a normalization that would take its scale out again: gradients that are sums of large terms
which cancel show rounding only.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import jaxpipe
from tests.compare import assert_close

WIDTH, ROWS = 6, 8


class Count(nnx.Variable):
    """A type of the user's own."""


class Normed(nnx.Module):
    """A residual block with running statistics, a counter, and a table that is never written."""

    def __init__(self, width, momentum=0.9, *, rngs):
        self.norm = nnx.BatchNorm(width, momentum=momentum, rngs=rngs)
        self.dense = nnx.Linear(width, width, rngs=rngs)
        self.calls = Count(jnp.zeros((), jnp.int32))
        self.table = Count(jnp.linspace(0.3, 1.1, width))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return x + jnp.tanh(self.dense(self.norm(x))) * self.table[...][None]


class LinenNormed(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x, train: bool):
        return linen.Dense(self.width)(linen.BatchNorm(use_running_average=not train, momentum=0.8)(x))


def _ema_init(key, x):
    state = {"mean": jnp.zeros(x.shape[1:], x.dtype), "count": jnp.int32(0)}
    return {"w": 1 + 0.3 * jax.random.normal(key, x.shape[1:], x.dtype)}, state


def _ema_apply(params, state, x, *, train):
    """Its output and its gradient depend on the state, so a backward must see that of its own forward."""
    scale = 1 + jnp.tanh(state["mean"]) + 0.1 * state["count"].astype(x.dtype)
    y = x + jnp.tanh(x * (params["w"] * scale)[None])
    if not train:
        return y, state
    return y, {"mean": 0.5 * state["mean"] + 0.5 * x.mean(0), "count": state["count"] + 1}


EMA = jaxpipe.Layer(_ema_init, _ema_apply, "Ema", stateful=True)


def loss(y, t):
    return ((y - t) ** 2).mean()


def entries():
    """Stacks with state, single layers with state before and in the tail, and state without params."""
    spec = jaxpipe.LayerSpec
    return [
        spec(LinenNormed, WIDTH),
        spec(Normed, WIDTH),
        EMA,
        spec(Normed, WIDTH),
        spec(Normed, WIDTH),
        EMA,
        spec(nnx.BatchNorm, WIDTH, use_bias=False, use_scale=False),
        jnp.tanh,
        spec(Normed, WIDTH, momentum=0.7),
    ]


UNEVEN = {1: [0, 9], 2: [0, 6, 9], 3: [0, 1, 2, 9], 4: [0, 2, 3, 5, 9]}


def module(partition="uniform"):
    return jaxpipe.PipelineModule(entries(), loss, partition_method=partition)


def make_batch(num_micro_batches, rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    shape = num_micro_batches, rows, WIDTH
    return rng.normal(size=shape).astype(np.float32) + 0.5, rng.normal(size=shape).astype(np.float32)


def started(states, seed=0):
    """Distinct numbers in all floats, so that a swap shows."""
    rng = np.random.default_rng(seed)

    def one(leaf):
        leaf = np.asarray(leaf)
        return leaf + rng.uniform(0.1, 0.5, leaf.shape).astype(leaf.dtype) if leaf.dtype.kind == "f" else leaf

    return jax.tree.map(one, states)


def check_with_oracle(pipe, batch, num_data_ranks):
    """Loss, gradients and new state of a batch against those of one device.

    Returns:
      The params of the pipeline, and the state of each layer before and after.
    """
    params = pipe.init(1, batch[0][0])
    before = started(pipe.to_layers(pipe.init_state(1, batch[0][0])))
    found, grads, after = pipe.value_and_grad(params, batch, layer_state=before)
    wanted = jaxpipe.reference.value_and_grad(
        pipe.module, pipe.to_layers(params), batch, num_data_ranks=num_data_ranks, layer_state=before
    )
    assert_close(found, wanted[0], 1e-6, "loss")
    assert_close(pipe.to_layers(grads), wanted[1], 1e-5, "gradient")
    assert_close(after, wanted[2], 1e-6, "state")
    return params, before, after


class Plain:
    """The nnx layers of a list, as modules of flax alone: called one after the other, they change their own state."""

    def __init__(self, layers, states):
        self.modules = []
        for params, state in zip(layers, states, strict=True):
            module = Normed(WIDTH, rngs=nnx.Rngs(0))
            nnx.update(module, jax.tree.map(jnp.asarray, params))
            nnx.update(module, jax.tree.map(jnp.asarray, state))
            self.modules.append(module)

    def value_and_grad(self, batch):
        """Loss and gradients of a batch; the state goes on."""

        @nnx.jit
        def step(modules, x, t):
            def objective(modules):
                y = x
                for module in modules:
                    y = module(y)
                return loss(y, t)

            return nnx.value_and_grad(objective)(modules)

        total, sums, count = 0.0, None, len(batch[0])
        for x, t in zip(*batch, strict=True):
            found, grads = step(self.modules, x, t)
            total += float(found)
            grads = jax.tree.leaves(grads)
            sums = grads if sums is None else [a + b for a, b in zip(sums, grads, strict=True)]
        return total / count, [leaf / count for leaf in sums]

    def state(self):
        return [nnx.to_pure_dict(nnx.state(module, (nnx.BatchStat, Count))) for module in self.modules]
