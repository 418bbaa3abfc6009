"""What a flax.nnx module is made of: variables, plain arrays, switches of its mode, axes that metadata names."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpipe.errors import LayerError
from jaxpipe.model.specs import LayerSpec

Mode = tuple[bool, bool]  # train, and whether there is dropout
Path = tuple[str, ...]

MODES: tuple[Mode, ...] = ((True, True), (True, False), (False, False))
_SWITCHES = ("deterministic", "use_running_average")


def path_name(path: tuple[Any, ...]) -> Path:
    """A path of flax as strings."""
    return tuple(str(part) for part in path)


def nest(flat: dict[Path, Any]) -> dict[str, Any]:
    """`{("a", "b"): 1}` -> `{"a": {"b": 1}}`."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        here = nested
        for part in path[:-1]:
            here = here.setdefault(part, {})
        here[path[-1]] = value
    return nested


def lookup(nested: dict[str, Any], path: Path) -> Any:
    """The entry of a nested dict."""
    for part in path:
        nested = nested[part]
    return nested


def values(module: nnx.Module) -> dict[Path, tuple[type, list[Any]]]:
    """Type and leaves of every variable, by path."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {
        path_name(path): (type(variable), jax.tree.leaves(variable.get_value()))
        for path, variable in flat
        if isinstance(variable, nnx.Variable)
    }


def modules(module: nnx.Module) -> list[tuple[nnx.Module, str]]:
    """The module and the modules in it, with their paths."""
    nodes = nnx.iter_graph(module)
    return [(node, ".".join(path_name(path))) for path, node in nodes if isinstance(node, nnx.Module)]


def pinned(module: nnx.Module) -> list[tuple[nnx.Module, str]]:
    """The switches that the constructor has turned on: they stay on in training."""
    return [(node, name) for node, _ in modules(module) for name in _SWITCHES if _is_true(getattr(node, name, None))]


def _is_true(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_)) and bool(value)


def in_mode(module: nnx.Module, mode: Mode, pinned: list[tuple[nnx.Module, str]]) -> tuple[Any, nnx.State]:
    """Puts a module into a mode; returns its static part, and the arrays that are plain attributes."""
    train, dropout = mode
    (module.train if train else module.eval)()
    if train:
        for node, name in pinned:
            setattr(node, name, True)
    if train and not dropout:
        module.set_attributes(deterministic=True, raise_if_not_found=False)
    graph, _, _, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
    return graph, rest


def constants(module: nnx.Module) -> dict[str, jax.Array]:
    """Arrays that are plain attributes, by path."""
    nodes = nnx.iter_graph(module)
    return {".".join(path_name(p)): jnp.asarray(n) for p, n in nodes if isinstance(n, jax.Array | np.ndarray)}


def axes(params: nnx.State) -> set[str]:
    """The mesh or logical axes that the metadata of params names."""
    found: set[str] = set()
    for _, variable in nnx.to_flat_state(params):
        metadata = variable.get_metadata() if isinstance(variable, nnx.Variable) else {}
        for name in ("out_sharding", "sharding", "sharding_names"):
            names = metadata.get(name)
            spec = getattr(names, "spec", names)
            for axes in () if spec is None else spec:
                found.update(str(a) for a in (axes if isinstance(axes, tuple) else (axes,)) if a is not None)
    return found


def reject_state(spec: LayerSpec, rest: nnx.State) -> None:
    """Raises LayerError for variables that are neither params nor random streams."""
    for path, variable in nnx.to_flat_state(rest):
        if isinstance(variable, nnx.Variable):
            raise LayerError(
                f"{spec!r}: the variable {'.'.join(path_name(path))!r} is a {type(variable).__name__}. Layers with state "
                "beside nnx.Param and random streams (batch statistics, caches) are not supported in this version."
            )


def reject_random_constants(spec: LayerSpec, make: Callable[[jax.Array], nnx.Module]) -> None:
    """A random plain array would be a param that nobody trains, the same in every layer."""
    one, other = (jax.jit(lambda key: constants(make(key)))(jax.random.key(seed)) for seed in (0, 1))
    for name, value in one.items():
        if not np.array_equal(value, other[name], equal_nan=jnp.issubdtype(value.dtype, jnp.inexact)):
            raise LayerError(
                f"{spec!r}: the attribute {name!r} is a random array but not an nnx.Param. Make it an nnx.Param, or "
                "compute it from something else than rngs."
            )
