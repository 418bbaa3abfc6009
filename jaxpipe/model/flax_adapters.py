"""flax modules as layers: the only import of flax."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxpipe.errors import LayerError
from jaxpipe.model.keys import KEY
from jaxpipe.model.layers import BoundLayer, LayerSpec, keywords_named

ForwardFn = Callable[..., Any] | None


def adapt(spec: LayerSpec, forward_fn: ForwardFn) -> BoundLayer | None:
    """The layer of a spec whose target is a flax module class; None for other targets."""
    if inspect.isclass(spec.target) and issubclass(spec.target, nnx.Module):
        return _from_nnx(spec, forward_fn)
    if inspect.isclass(spec.target) and issubclass(spec.target, linen.Module):
        return _from_linen(spec, forward_fn)
    return None


def reject_built_module(entry: Any, index: int) -> None:
    """A module object in the list would look like a callable without parameters: its weights would silently freeze."""
    if isinstance(entry, (nnx.Module, linen.Module)):
        name = type(entry).__name__
        raise LayerError(
            f"Layer {index} is a {name} object. Layers are built late, each on its own rank: "
            f"write jaxpipe.LayerSpec({name}, ...) with the arguments of its constructor."
        )


# ---------------------------------------------------------------------------------------------------------- flax.nnx


def _path_name(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(part) for part in path)


def _nest(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        here = nested
        for part in path[:-1]:
            here = here.setdefault(part, {})
        here[path[-1]] = value
    return nested


def _lookup(nested: dict[str, Any], path: tuple[str, ...]) -> Any:
    for part in path:
        nested = nested[part]
    return nested


def _from_nnx(spec: LayerSpec, forward_fn: ForwardFn) -> BoundLayer:
    if "rngs" in spec.kwargs:
        raise LayerError(
            f"{spec!r}: leave `rngs` out. jaxpipe fills it in when the layer is made, with a key that depends on the "
            "layer's index."
        )
    takes_rngs = "rngs" in inspect.signature(spec.target.__init__).parameters

    def make(key: jax.Array) -> nnx.Module:
        rngs = {"rngs": nnx.Rngs(key)} if takes_rngs else {}
        return spec.target(*spec.args, **spec.kwargs, **rngs)

    def in_mode(module: nnx.Module, train: bool, dropout: bool) -> tuple[nnx.GraphDef, nnx.State]:
        (module.train if train else module.eval)()
        if train and not dropout:
            module.set_attributes(deterministic=True, raise_if_not_found=False)
        graph, _, _, constants = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return graph, constants

    constants: list[str] = []
    modes: dict[tuple[bool, bool], nnx.GraphDef] = {}

    def trace(key: jax.Array) -> tuple[nnx.State, nnx.State, nnx.State]:
        # Not nnx.eval_shape: it would put arrays that are plain attributes, as tracers, into the static part.
        module = make(key)
        _, params, streams, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
        constants.extend(_constants(module))
        modes.update({mode: in_mode(module, *mode)[0] for mode in ((True, True), (True, False), (False, False))})
        return params, streams, rest

    params_state, rng_state, rest = jax.eval_shape(trace, KEY)
    paths = [_path_name(path) for path, _ in nnx.to_flat_state(params_state)]
    structure = jax.tree.structure(params_state)
    rng_leaves, rng_structure = jax.tree.flatten(rng_state)
    # An array that is a plain attribute (a table of frequencies, a mask) is no state of ours: such a module is rebuilt
    # inside each trace to have it, and XLA drops the rest of the initialisation, which nobody uses.
    rebuild = bool(constants)
    _reject_state(spec, rest)
    if rebuild:
        _reject_random_constants(spec, make)

    def to_params(state: nnx.State) -> dict[str, Any]:
        return _nest({_path_name(path): variable[...] for path, variable in nnx.to_flat_state(state)})

    def streams(key: jax.Array | None) -> nnx.State:
        base = jax.random.key(0) if key is None else key
        values = [
            jax.random.fold_in(base, i)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(rng_leaves)
        ]
        return jax.tree.unflatten(rng_structure, values)

    def apply(params: dict[str, Any], x: Any, key: jax.Array | None, train: bool) -> Any:
        dropout = train and key is not None  # without a key there is no dropout
        rebuilt = in_mode(make(jax.random.key(0)), train, dropout) if rebuild else None
        graph, others = rebuilt or (modes[train, dropout], rest)
        state = jax.tree.unflatten(structure, [_lookup(params, path) for path in paths])
        module = nnx.merge(graph, state, streams(key), others)
        return module(x) if forward_fn is None else forward_fn(module, x)

    def init(key: jax.Array, x: Any) -> dict[str, Any]:
        del x
        return to_params(nnx.state(make(key), nnx.Param))

    return BoundLayer(spec.name, init, apply, uses_key=bool(rng_leaves))


def _constants(module: nnx.Module) -> dict[str, jax.Array]:
    """Arrays that are plain attributes, by path."""
    nodes = nnx.iter_graph(module)
    return {".".join(_path_name(p)): jnp.asarray(n) for p, n in nodes if isinstance(n, jax.Array | np.ndarray)}


def _reject_state(spec: LayerSpec, rest: nnx.State) -> None:
    for path, variable in nnx.to_flat_state(rest):
        if isinstance(variable, nnx.Variable):
            raise LayerError(
                f"{spec!r}: the variable {'.'.join(_path_name(path))!r} is a {type(variable).__name__}. Layers with state "
                "beside nnx.Param and random streams (batch statistics, caches) are not supported in this version."
            )


def _reject_random_constants(spec: LayerSpec, make: Callable[[jax.Array], nnx.Module]) -> None:
    """A random plain array would be a param that nobody trains, the same in every layer."""
    one, other = (jax.jit(lambda key: _constants(make(key)))(jax.random.key(seed)) for seed in (0, 1))
    for name, value in one.items():
        if not np.array_equal(value, other[name], equal_nan=jnp.issubdtype(value.dtype, jnp.inexact)):
            raise LayerError(
                f"{spec!r}: the attribute {name!r} is a random array but not an nnx.Param. Make it an nnx.Param, or "
                "compute it from something else than rngs."
            )


# -------------------------------------------------------------------------------------------------------- flax.linen


def _from_linen(spec: LayerSpec, forward_fn: ForwardFn) -> BoundLayer:
    module = spec.target(*spec.args, **spec.kwargs)
    named = keywords_named(spec.target.__call__, ("train", "deterministic"), 2)

    def mode(train: bool, key: jax.Array | None) -> dict[str, bool]:
        # Without a key there is no dropout; a module that names only `train` has no other way to be told.
        dropout = train and key is not None
        values = {"train": train if "deterministic" in named else dropout, "deterministic": not dropout}
        return {name: values[name] for name in named}

    def init(key: jax.Array, x: Any) -> Any:
        variables = module.init({"params": key}, x, **mode(False, None))
        others = sorted(set(variables) - {"params"})
        if others:
            raise LayerError(
                f"{spec!r}: has the variable collections {others} beside 'params'. Layers with state (batch "
                "statistics, caches) are not supported in this version."
            )
        return variables.get("params", {})

    def apply(params: Any, x: Any, key: jax.Array | None, train: bool) -> Any:
        rngs = None if key is None else {"dropout": key}
        if forward_fn is not None:
            return module.apply({"params": params}, x, method=forward_fn, rngs=rngs)
        return module.apply({"params": params}, x, rngs=rngs, **mode(train, key))

    return BoundLayer(spec.name, init, apply, uses_key=True)
