"""What a flax.nnx module is made of: variables, plain arrays, switches of its mode, axes that metadata names."""

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpipe.errors import LayerError
from jaxpipe.model.axes import Annotation
from jaxpipe.model.sown import SownValue, Takes, check_kinds

Mode = tuple[bool, bool]  # train, and whether there is dropout
Path = tuple[str, ...]

MODES: tuple[Mode, ...] = ((True, True), (True, False), (False, False))
_SWITCHES = ("deterministic", "use_running_average")
# The variables of a module: params, random streams, and what is left, which is its state.
GROUPS = (nnx.Param, nnx.RngState, nnx.Variable)


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


def taken(spec: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The types of variables that are taken of what is sown; raises LayerError for what is none."""
    rule = "For flax.nnx it names types of variables, such as nnx.Intermediate; nnx.Param is none of them."
    check_kinds(repr(spec), spec.takes, nnx.Variable, rule)
    kinds = *spec.takes.losses, *spec.takes.metrics
    if any(issubclass(kind, nnx.Param) for kind in kinds):  # type: ignore[arg-type]
        raise LayerError(f"{spec!r}: sown(...) names nnx.Param. {rule}")
    return spec.takes.losses, spec.takes.metrics


class Variables:
    """Some of the variables of a module, as a nested dict of their values.

    Args:
      like: shapes of the variables, as `nnx.split` gives them.

    Attributes:
      paths: the paths of the variables.
    """

    def __init__(self, like: nnx.State):
        self.paths = [path_name(path) for path, _ in nnx.to_flat_state(like)]
        self._like = like

    def of(self, module: nnx.Module) -> dict[str, Any]:
        """Their values in a module."""
        flat = {path_name(path): variable for path, variable in nnx.to_flat_state(nnx.state(module))}
        return nest({path: flat[path].get_value() for path in self.paths})

    def init(self, make: Callable[[jax.Array], nnx.Module]) -> Callable[[jax.Array, Any], dict[str, Any]]:
        """`init(key, x)`, which gives their values in a module that is made of a key."""
        return lambda key, x: self.of(make(key)) if self.paths else {}

    def filled(self, values: dict[str, Any]) -> nnx.State:
        """The variables with these values, for `nnx.merge`."""
        return with_values(self._like, values)


def sown(module: nnx.Module, before: Collection[Path], takes: Takes) -> list[SownValue]:
    """The variables of a module that its call has made, but for those that are there for other uses than to be looked at.

    Args:
      before: the paths of the variables that it had.
      takes: what is taken of what it sows.
    """
    found: list[SownValue] = []
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        name = path_name(path)
        if name in before or not isinstance(variable, nnx.Variable):
            continue
        value = variable.get_value()
        # `sow` makes a tuple, if the call gives no other rule; with one only the type of the variable tells.
        if isinstance(variable, nnx.Intermediate) or isinstance(value, tuple) or takes.has(type(variable)):
            found.append(SownValue(type(variable), "/".join(name), value))
    return found


@contextlib.contextmanager
def quiet_about_sow() -> Iterator[None]:
    """Flax warns of `sow` outside of its own way to look at what was sown; jaxpipe has another one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Using 'Module.sow\(\)' outside", DeprecationWarning)
        yield


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
    graph, *_, rest = nnx.split(module, *GROUPS, ...)
    return graph, rest


def constants(module: nnx.Module) -> dict[str, jax.Array]:
    """Arrays that are plain attributes, by path."""
    return {path: jnp.asarray(held) for path, held in arrays(module).items()}


def arrays(module: nnx.Module) -> dict[str, Any]:
    """The same as the objects that they are."""
    return {".".join(path_name(p)): n for p, n in nnx.iter_graph(module) if isinstance(n, jax.Array | np.ndarray)}


def values_of(params: nnx.State) -> dict[str, Any]:
    """The values of variables as nested dicts, which is how a layer holds its params."""
    return nest({path_name(path): variable.get_value() for path, variable in nnx.to_flat_state(params)})


def with_values(params: nnx.State, nested: dict[str, Any]) -> nnx.State:
    """Variables like those of `params` with other values: the inverse of `values_of`."""
    paths = [path_name(path) for path, _ in nnx.to_flat_state(params)]
    leaves = jax.tree.leaves([lookup(nested, path) for path in paths])
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def annotations(params: nnx.State) -> dict[str, Annotation]:
    """What the metadata of params says about their dims, by path."""
    found: dict[str, Annotation] = {}
    for path, variable in nnx.to_flat_state(params):
        metadata = variable.get_metadata() if isinstance(variable, nnx.Variable) else {}
        names = next((metadata[n] for n in ("out_sharding", "sharding", "sharding_names") if metadata.get(n)), None)
        if (annotation := Annotation.of(names, metadata.get("sharding_rules"))) is not None:
            found["/".join(path_name(path))] = annotation
    return found


def reject_intermediates(spec: Any, state: nnx.State) -> None:
    """Raises LayerError for variables that are made to look at values: those of a call are nobody's state."""
    for path, variable in nnx.to_flat_state(state):
        if isinstance(variable, nnx.Intermediate):
            raise LayerError(
                f"{spec!r}: the variable {'.'.join(path_name(path))!r} is an nnx.Intermediate that __init__ makes. What a "
                "layer remembers is a variable of another type; to look at a value, call self.sow where it is computed."
            )


def reject_random_constants(spec: Any, make: Callable[[jax.Array], nnx.Module]) -> None:
    """A random plain array would be a param that nobody trains, the same in every layer."""
    one, other = (jax.jit(lambda key: constants(make(key)))(jax.random.key(seed)) for seed in (0, 1))
    for name, value in one.items():
        if not np.array_equal(value, other[name], equal_nan=jnp.issubdtype(value.dtype, jnp.inexact)):
            raise LayerError(
                f"{spec!r}: the attribute {name!r} is a random array but not an nnx.Param. Make it an nnx.Param, or "
                "compute it from something else than rngs."
            )
