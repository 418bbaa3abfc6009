"""flax.nnx modules as layers.

The constructor is traced once, on shapes. A module is then put together again wherever the layer is applied: the static
part from that trace, the params from the caller, the random streams from the layer's key.
"""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from jaxpipe.errors import LayerError
from jaxpipe.model import nnx_modules
from jaxpipe.model.blame import Fault, mark
from jaxpipe.model.forwarded import origin
from jaxpipe.model.keys import KEY
from jaxpipe.model.keywords import FLAGS, keywords_of
from jaxpipe.model.kinds import Kind, Recipe
from jaxpipe.model.linen_layers import warn_of_axes
from jaxpipe.model.nnx_modules import Mode, Path, lookup, nest, path_name
from jaxpipe.model.shapes import avals, is_key
from jaxpipe.model.specs import LayerSpec

ForwardFn = Callable[..., Any] | None
_HARMLESS = (nnx.Intermediate, nnx.RngState)  # may be written in a call: what is sown is for debugging


def takes_rngs(target: Callable[..., Any]) -> bool:
    """Whether a module class, or a function that makes a module, takes `rngs`, perhaps among its `**kwargs`."""
    made_by = target.__init__ if inspect.isclass(target) else target
    if made_by is object.__init__:
        return False  # shows *args and **kwargs, and takes nothing
    try:
        parameters = inspect.signature(made_by).parameters
    except (TypeError, ValueError):
        return False
    return "rngs" in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def makes_module(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function makes an nnx module when it is given `rngs`."""
    made: list[bool] = []
    jax.eval_shape(lambda key: made.append(isinstance(_make(target, args, kwargs, key), nnx.Module)), KEY)
    return made[0]


def _make(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], key: jax.Array) -> Any:
    # Metadata about axes would otherwise ask for a mesh while the module is made.
    quiet = nnx.use_eager_sharding(False) if hasattr(nnx, "use_eager_sharding") else contextlib.nullcontext()
    with quiet:
        if not takes_rngs(target):
            return target(*args, **kwargs)
        try:
            return target(*args, **kwargs, rngs=nnx.Rngs(key))
        except TypeError as error:
            if "'rngs'" not in str(error):
                raise
            return target(*args, **kwargs)  # its **kwargs go to something that takes none


def recipe(
    spec: LayerSpec,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    forward_fn: ForwardFn,
) -> Recipe:
    """The layer of an nnx module class, or of a function that makes such a module.

    Raises:
      LayerError: `rngs` is given.
    """
    if "rngs" in kwargs:
        raise LayerError(
            f"{spec!r}: leave `rngs` out. jaxpipe fills it in when the layer is made, with a key that depends on the "
            "layer's index."
        )
    source = nnx.Module, target, args, kwargs, forward_fn

    def make(key: jax.Array) -> nnx.Module:
        return _make(target, args, kwargs, key)

    return Recipe(spec.name, source, lambda: _Nnx(spec, make, forward_fn).kind())


class _Stale(Exception):
    """The call uses an array of the trace of the constructor, which is over."""


class _Nnx:
    def __init__(self, spec: LayerSpec, make: Callable[[jax.Array], nnx.Module], forward_fn: ForwardFn):
        self.spec, self.make, self.forward_fn = spec, make, forward_fn
        self.graphs: dict[Mode, Any] = {}
        hidden: list[str] = []
        self.kind_of_module: type = nnx.Module
        self.has_switches = False

        def trace(key: jax.Array) -> Any:
            # Not nnx.eval_shape: it would put arrays that are plain attributes, as tracers, into the static part.
            module = make(key)
            _, params, streams, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
            hidden.extend(nnx_modules.constants(module))
            self.kind_of_module = type(module)
            self.has_switches = any(hasattr(node, "deterministic") for node, _ in nnx_modules.modules(module))
            pinned = nnx_modules.pinned(module)
            self.graphs.update({mode: nnx_modules.in_mode(module, mode, pinned)[0] for mode in nnx_modules.MODES})
            return params, streams, rest

        params, streams, self.rest = jax.eval_shape(trace, KEY)
        self.paths = [path_name(path) for path, _ in nnx.to_flat_state(params)]
        self.structure = jax.tree.structure(params)
        self.stream_leaves, self.stream_structure = jax.tree.flatten(streams)
        # An array that is a plain attribute (a table of frequencies, a mask) is no state of ours: such a module is rebuilt
        # inside each trace to have it, and XLA drops the rest of the initialisation, which nobody uses.
        self.rebuild = bool(hidden)
        nnx_modules.reject_state(spec, self.rest)
        if self.rebuild:
            nnx_modules.reject_random_constants(spec, make)
        if axes := nnx_modules.axes(params):
            warn_of_axes(spec, axes)
        if forward_fn is None and not any("__call__" in vars(part) for part in self.kind_of_module.__mro__):
            raise LayerError(f"{spec!r}: {self.kind_of_module.__name__} has no __call__(self, x). A layer needs one.")
        # With None for `deterministic` flax means: as the attributes say, which are set below.
        function = self.kind_of_module.__call__ if forward_fn is None else forward_fn
        self.named = keywords_of(function, 2, FLAGS, none_is_unset=("train",))
        self.tried: dict[tuple[Mode, bool], bool] = {}  # whether a mode draws random numbers

    def kind(self) -> Kind:
        # A module that has switches is told to be deterministic where there is no key, so it has to know.
        return Kind(self.init, self.apply, uses_key=bool(self.stream_leaves) or self.has_switches)

    def init(self, key: jax.Array, x: Any) -> dict[str, Any]:
        del x
        state = nnx.state(self.make(key), nnx.Param)
        return nest({path_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)})

    def apply(self, params: dict[str, Any], x: Any, key: jax.Array | None, train: bool) -> Any:
        flags = {"train": train, "deterministic": not train}
        mode = train, train and (key is not None or not (self.stream_leaves or self.has_switches))
        if self.stream_leaves:
            flags["deterministic"] = not mode[1]  # without a key there is no dropout
        draws = self.try_out(mode, params, x, key, flags)
        if train and not mode[1] and draws and "train" in self.named and "deterministic" not in self.named:
            flags["train"] = False  # a module that names only `train` has no other way to be told
        module = self.module(mode, params, key)
        return self.call(module, x, flags)

    def call(self, module: nnx.Module, x: Any, flags: dict[str, bool]) -> Any:
        try:
            positions, names = self.named.arguments(flags)
            if self.forward_fn is None:
                return module(x, *positions, **names)  # pyright: ignore[reportCallIssue]
            return self.forward_fn(module, x, *positions, **names)
        except Exception as error:
            mark(error)
            raise

    def module(self, mode: Mode, params: dict[str, Any], key: jax.Array | None) -> nnx.Module:
        """The module with its weights."""
        graph, rest = self.graphs[mode], self.rest
        if self.rebuild:
            made = self.make(jax.random.key(0))
            graph, rest = nnx_modules.in_mode(made, mode, nnx_modules.pinned(made))
        state = jax.tree.unflatten(self.structure, jax.tree.leaves([lookup(params, path) for path in self.paths]))
        return nnx.merge(graph, state, self.streams(key), rest)

    def streams(self, key: jax.Array | None) -> nnx.State:
        """The random streams, each in the shape that the constructor gave it (`rngs.fork(split=4)` makes four keys)."""
        base = jax.random.key(0) if key is None else key

        def one(number: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            if not is_key(leaf):
                return jnp.zeros(leaf.shape, leaf.dtype)
            folded = jax.random.fold_in(base, number)
            return jax.random.split(folded, leaf.shape) if leaf.shape else folded

        return jax.tree.unflatten(self.stream_structure, [one(*pair) for pair in enumerate(self.stream_leaves)])

    def try_out(self, mode: Mode, params: Any, x: Any, key: jax.Array | None, flags: dict[str, bool]) -> bool:
        """Traces the call once per mode, to learn about it; returns whether it draws random numbers.

        Raises:
          Fault: it writes to a param, or makes a variable, which would be lost.
        """
        known = mode, key is None
        if known not in self.tried:
            given = avals((params, x, key))
            try:
                self.tried[known] = self.traced(mode, *given, flags=flags)
            except (_Stale, jax.errors.UnexpectedTracerError):
                if self.rebuild:
                    raise
                # An array that the constructor has put out of sight: into a closure, a functools.partial, a list.
                self.rebuild = True
                self.tried[known] = self.traced(mode, *given, flags=flags)
        return self.tried[known]

    def traced(self, mode: Mode, params: Any, x: Any, key: Any, flags: dict[str, bool]) -> bool:
        written: list[tuple[Path, int]] = []  # path of a variable, and the number of one of its leaves
        created: list[str] = []
        drew = False

        def run(params: Any, x: Any, key: Any) -> list[Any]:
            nonlocal drew
            module = self.module(mode, params, key)
            before = nnx_modules.values(module)
            self.call(module, x, flags)
            new: list[Any] = []
            for path, (kind, leaves) in nnx_modules.values(module).items():
                if path not in before:
                    if not issubclass(kind, _HARMLESS):
                        created.append(f"{'.'.join(path)!r} ({kind.__name__})")
                    continue
                old = before[path][1]
                changed = [n for n, leaf in enumerate(leaves) if n >= len(old) or leaf is not old[n]]
                drew = drew or (bool(changed) and issubclass(kind, nnx.RngState))
                if issubclass(kind, nnx.Param):
                    written.extend((path, n) for n in changed)
                    new.extend(leaves[n] for n in changed)
            return new

        jaxpr = jax.make_jaxpr(run)(params, x, key)
        if not self.rebuild and any(isinstance(constant, Tracer) for constant in jaxpr.consts):
            raise _Stale
        numbers = jax.tree.unflatten(jax.tree.structure(params), range(len(jax.tree.leaves(params))))
        lost = set()
        for result, (path, n) in enumerate(written):
            here = jax.tree.leaves(lookup(numbers, path))
            if n >= len(here) or origin(jaxpr, result) != here[n]:
                lost.add(".".join(path))
        if lost:
            raise Fault(
                f"writes to the nnx.Param {', '.join(map(repr, sorted(lost)))} in its call. What is written would be lost: "
                "params are changed by the optimizer alone. Compute with a local value, or sow an nnx.Intermediate to look "
                "at it."
            )
        if created:
            raise Fault(
                f"makes the variable {', '.join(created)} in its call. It would be lost: make every variable in __init__ "
                "(an nnx.Intermediate may be sown anywhere)."
            )
        return drew
