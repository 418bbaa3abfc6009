"""Random functions of arrays, and an evaluation of traces one operation after the other."""

import random

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from jaxpipe.model.jaxprs import CALLS, bodies

N = 3  # all values are [N, N]
SIMPLE = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: 0.5 * a * b,
    "tanh": lambda a, b: jnp.tanh(a),
    "product": lambda a, b: 0.3 * (a @ b),
    "sum": lambda a, b: 0.2 * jnp.broadcast_to(a.sum(0, keepdims=True), (N, N)),
    "transpose": lambda a, b: a.T,
    "exp": lambda a, b: jnp.exp(-(a**2)),
    "choose": lambda a, b: jnp.where(a > 0, a, b),
    "parts": lambda a, b: jnp.concatenate([a[:1], b[1:]]),
    "barrier": lambda a, b: lax.optimization_barrier((a, b))[0],
    "scale": lambda a, b: a * 0.7 + 1,
    "running sum": lambda a, b: 0.3 * jnp.cumsum(a, 0),
    "jit": lambda a, b: jax.jit(lambda a, b: jnp.sin(a @ b))(a, b),
    "checkpoint": lambda a, b: jax.checkpoint(lambda a, b: jnp.sin(jnp.tanh(a @ b)))(a, b),
    "cond": lambda a, b: lax.cond(a.sum() > 0, lambda: a @ b * 0.3, lambda: jnp.tanh(b)),
    "noise": lambda a, b: a * jax.random.uniform(jax.random.key(b.size), (N, N)),
}


def random_function(rng: random.Random, count: int, size: int, depth: int = 0):
    """(a function from `count` arrays to those and what it makes of them, how many arrays that are)."""
    steps = []
    for _ in range(size):
        if depth < 2 and rng.random() < 0.35:
            step, made = random_scan(rng, count, depth)
        else:
            step, made = one_of(SIMPLE[rng.choice(sorted(SIMPLE))], rng.randrange(count), rng.randrange(count)), 1
        steps.append(step)
        count += made

    def run(values):
        values = list(values)
        for step in steps:
            values += step(values)
        return values

    return run, count


def one_of(function, first, second):
    return lambda values: [function(values[first], values[second])]


def random_scan(rng, count, depth):
    """A scan over a random body, that carries some values, stacks some, and reads some constants."""
    carried, stacked, length = rng.randint(0, 3), rng.randint(1, 2), rng.choice([1, 2, 3])
    carry, over, constants = ([rng.randrange(count) for _ in range(n)] for n in (carried, rng.randint(0, 2), 2))
    body, inside = random_function(rng, carried + len(over) + 2, rng.randint(1, 6), depth + 1)
    outs = [rng.randrange(inside) for _ in range(carried + stacked)]
    reverse = rng.random() < 0.5

    def step(v):
        def one(state, x):
            found = body([*state, *x, *[v[i] for i in constants]])
            return [0.7 * found[i] for i in outs[:carried]], [found[i] for i in outs[carried:]]

        xs = [jnp.stack([v[i] * (0.5 + j) for j in range(length)]) for i in over]
        state, ys = lax.scan(one, [v[i] for i in carry], xs, length=length, reverse=reverse)
        return [*state, *[y.sum(0) for y in ys]]

    return step, carried + stacked


def random_trace(seed):
    """(a function of arrays, their number): half of them with derivatives."""
    rng = random.Random(seed)
    count = rng.randint(2, 5)
    function, made = random_function(rng, count, rng.randint(2, 9))
    outs = [rng.randrange(made) for _ in range(rng.randint(1, 6))]

    def plain(*values):
        found = function(values)
        return [found[i] for i in outs]

    def backward(*values):
        found, pullback = jax.vjp(plain, *values)
        return list(pullback([jnp.tanh(y) + 0.3 for y in found]))

    return (backward if rng.random() < 0.7 else plain), count, rng


def one_by_one(closed, args):
    """The results of a trace, with no operation compiled together with another one: scans as loops, calls opened."""
    jaxpr = closed.jaxpr
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jex.Literal) else known[atom]

    for equation in jaxpr.eqns:
        values, params = [read(v) for v in equation.invars], equation.params
        name = equation.primitive.name
        if name == "scan":
            made = _scan(params, values)
        elif name == "cond":
            made = one_by_one(params["branches"][int(values[0])], values[1:])
        elif name in CALLS:
            [body] = bodies(equation)
            consts = next((p.consts for p in params.values() if hasattr(p, "consts")), ())
            made = one_by_one(jex.ClosedJaxpr(body, consts), values)
        else:
            made = equation.primitive.bind(*values, **equation.primitive.get_bind_params(params))
            made = made if equation.primitive.multiple_results else [made]
        known.update(zip(equation.outvars, made, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _scan(params, values):
    constants = params["num_consts"]
    first = constants + params["num_carry"]
    state, rows = values[constants:first], []
    order = range(params["length"])[:: -1 if params["reverse"] else 1]
    for i in order:
        found = one_by_one(params["jaxpr"], [*values[:constants], *state, *[x[i] for x in values[first:]]])
        state = found[: params["num_carry"]]
        rows.append(found[params["num_carry"] :])
    rows = rows[:: -1 if params["reverse"] else 1]
    return [*state, *[jnp.stack(column) for column in zip(*rows, strict=True)]]


def products(closed):
    """How many products a trace runs, those in scans once per iteration."""
    return _products(closed.jaxpr)


def _products(jaxpr):
    found, need = 0, {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    for equation in reversed(jaxpr.eqns):
        if need.isdisjoint(equation.outvars):
            continue
        need |= {v for v in equation.invars if not isinstance(v, jex.Literal)}
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        found += equation.primitive.name == "dot_general"
        found += sum(times * _products(body) for body in bodies(equation))
    return found
