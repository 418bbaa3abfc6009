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
from jaxpipe.model import nnx_caches, nnx_modules
from jaxpipe.model.blame import Fault, mark
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.forwarded import origin
from jaxpipe.model.function_layers import with_cache
from jaxpipe.model.keys import KEY
from jaxpipe.model.keywords import FLAGS, GENERATING, keywords_of
from jaxpipe.model.kinds import Kind, Recipe
from jaxpipe.model.nnx_modules import Mode, Path, Variables, lookup
from jaxpipe.model.shapes import avals, is_key
from jaxpipe.model.sown import SownValue, Takes, in_loops
from jaxpipe.model.specs import LayerSpec
from jaxpipe.model.states import NO_STATE

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
    source = nnx.Module, target, args, kwargs, forward_fn, nnx_modules.taken(spec)

    def make(key: jax.Array) -> nnx.Module:
        return _make(target, args, kwargs, key)

    def build(params: dict[str, Any], state: dict[str, Any], key: jax.Array) -> nnx.Module:
        module = make(key)
        _, held, _, remembered, _ = nnx.split(module, *nnx_modules.GROUPS, ...)
        nnx.update(module, nnx_modules.with_values(held, params), nnx_modules.with_values(remembered, state))
        return module

    return Recipe(spec.name, source, lambda: _Nnx(spec, make, forward_fn).kind(), build=build)


class _Stale(Exception):
    """The call uses an array of the trace of the constructor, which is over."""


def kind_of_built(shown: Any, make: Callable[[jax.Array], nnx.Module], forward_fn: ForwardFn) -> Kind:
    """The kind of modules that are built already; `shown` prints as their name, `make` gives a copy with its arrays."""
    return _Nnx(shown, make, forward_fn, is_built=True).kind()


class _Nnx:
    def __init__(
        self, spec: Any, make: Callable[[jax.Array], nnx.Module], forward_fn: ForwardFn, is_built: bool = False
    ):
        self.spec, self.make, self.forward_fn = spec, make, forward_fn
        self.takes: Takes = getattr(spec, "takes", Takes())
        self.graphs: dict[Mode, Any] = {}
        hidden: list[str] = []
        self.kind_of_module: type = nnx.Module
        self.has_switches = self.decodes = False

        def trace(key: jax.Array) -> Any:
            # Not nnx.eval_shape: it would put arrays that are plain attributes, as tracers, into the static part.
            module = make(key)
            _, params, streams, state, rest = nnx.split(module, *nnx_modules.GROUPS, ...)
            hidden.extend(nnx_modules.constants(module))
            self.kind_of_module = type(module)
            self.has_switches = any(hasattr(node, "deterministic") for node, _ in nnx_modules.modules(module))
            self.decodes = nnx_caches.decodes(module)
            # A user may have put a module that is built into its evaluation mode, which says nothing about training.
            pinned = [] if is_built else nnx_modules.pinned(module)
            self.graphs.update({mode: nnx_modules.in_mode(module, mode, pinned)[0] for mode in nnx_modules.MODES})
            return params, streams, state, rest

        params, streams, state, self.rest = trace(KEY) if is_built else jax.eval_shape(trace, KEY)
        self.params, self.state = Variables(params), Variables(state)
        self.stream_leaves, self.stream_structure = jax.tree.flatten(streams)
        # An array that is a plain attribute (a table of frequencies, a mask) is no state of ours: such a module is rebuilt
        # inside each trace to have it, and XLA drops the rest of the initialisation, which nobody uses.
        self.rebuild = bool(hidden) and not is_built
        nnx_modules.reject_intermediates(spec, state)
        if self.rebuild:
            nnx_modules.reject_random_constants(spec, make)
        self.annotations = nnx_modules.annotations(params)
        if forward_fn is None and not any("__call__" in vars(part) for part in self.kind_of_module.__mro__):
            raise LayerError(f"{spec!r}: {self.kind_of_module.__name__} has no __call__(self, x). A layer needs one.")
        # With None for `deterministic` flax means: as the attributes say, which are set below.
        function = self.kind_of_module.__call__ if forward_fn is None else forward_fn
        self.named = keywords_of(function, 2, (*FLAGS, *GENERATING), none_is_unset=("train", *GENERATING))
        self.has_cache = "cache" in self.named and hasattr(self.kind_of_module, "init_cache")
        self.tried: dict[tuple[Mode, bool], bool] = {}  # whether a mode draws random numbers
        self.dropped: set[str] = set()  # what is sown and not taken

    def kind(self) -> Kind:
        # A module that has switches is told to be deterministic where there is no key, so it has to know.
        uses_key = bool(self.stream_leaves) or self.has_switches
        cache = self.init_cache if self.has_cache or self.decodes else None
        made = self.dropped, cache, "position" in self.named, self.state.init(self.make)
        return Kind(self.params.init(self.make), self.apply, uses_key, self.annotations, *made)

    def apply(self, params: dict[str, Any], x: Any, context: Context, train: bool) -> tuple[Any, Aux]:
        key = context.key
        if self.state.paths and not context.state:
            raise Fault(NO_STATE)
        flags = {"train": train, "deterministic": not train, "cache": context.cache, "position": context.position}
        mode = train, train and (key is not None or not (self.stream_leaves or self.has_switches))
        if self.stream_leaves:
            flags["deterministic"] = not mode[1]  # without a key there is no dropout
        draws = self.try_out(mode, params, x, context, {**flags, **dict.fromkeys(GENERATING)})
        if train and not mode[1] and draws and "train" in self.named and "deterministic" not in self.named:
            flags["train"] = False  # a module that names only `train` has no other way to be told
        module = self.module(mode, params, context)
        if context.cache is not None and not self.has_cache:
            flags["cache"] = None
            return nnx_caches.decode(module, lambda m, x, at: self.call(m, x, {**flags, "position": at}), x, context)
        before = nnx_modules.values(module) if self.takes else {}
        y, aux = with_cache(self.call(module, x, flags), context)
        if self.takes:

            def again(params: dict[str, Any], x: Any, context: Context) -> list[SownValue]:
                module = self.module(mode, params, context)
                self.call(module, x, {**flags, "cache": context.cache, "position": context.position})
                return nnx_modules.sown(module, before, self.takes)

            sown = in_loops(nnx_modules.sown(module, before, self.takes), again, params, x, context)
            aux = self.takes.aux(sown, {})._replace(cache=aux.cache)
        return y, aux._replace(state=self.state.of(module))

    def init_cache(self, params: dict[str, Any], state: Any, x: Any, length: int) -> Any:
        module = self.module((False, False), params, Context(state=state))
        return nnx_caches.empty(module, x, length, self.has_cache)

    def call(self, module: nnx.Module, x: Any, flags: dict[str, Any]) -> Any:
        try:
            positions, names = self.named.arguments(flags)
            with nnx_modules.quiet_about_sow():
                if self.forward_fn is None:
                    return module(x, *positions, **names)  # pyright: ignore[reportCallIssue]
                return self.forward_fn(module, x, *positions, **names)
        except Exception as error:
            mark(error)
            raise

    def module(self, mode: Mode, params: dict[str, Any], context: Context) -> nnx.Module:
        """The module with its weights and its state."""
        graph, rest = self.graphs[mode], self.rest
        if self.rebuild:
            made = self.make(jax.random.key(0))
            graph, rest = nnx_modules.in_mode(made, mode, nnx_modules.pinned(made))
        variables = self.params.filled(params), self.streams(context.key), self.state.filled(context.state)
        return nnx.merge(graph, *variables, rest)

    def streams(self, key: jax.Array | None) -> nnx.State:
        """The random streams, each in the shape that the constructor gave it (`rngs.fork(split=4)` makes four keys)."""
        base = jax.random.key(0) if key is None else key

        def one(number: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            if not is_key(leaf):
                return jnp.zeros(leaf.shape, leaf.dtype)
            folded = jax.random.fold_in(base, number)
            return jax.random.split(folded, leaf.shape) if leaf.shape else folded

        return jax.tree.unflatten(self.stream_structure, [one(*pair) for pair in enumerate(self.stream_leaves)])

    def try_out(self, mode: Mode, params: Any, x: Any, context: Context, flags: dict[str, Any]) -> bool:
        """Traces the call once per mode, to learn about it; returns whether it draws random numbers.

        Raises:
          Fault: it writes to a param or to an array that is no variable, or makes a variable, which would be lost.
        """
        known = mode, context.key is None
        if known not in self.tried:
            given = avals((params, x, context))
            try:
                self.tried[known] = self.traced(mode, *given, flags=flags)
            except (_Stale, jax.errors.UnexpectedTracerError):
                if self.rebuild:
                    raise
                # An array that the constructor has put out of sight: into a closure, a functools.partial, a list.
                self.rebuild = True
                self.tried[known] = self.traced(mode, *given, flags=flags)
        return self.tried[known]

    def traced(self, mode: Mode, params: Any, x: Any, context: Any, flags: dict[str, bool]) -> bool:
        written: list[tuple[Path, int]] = []  # path of a variable, and the number of one of its leaves
        created: list[str] = []
        replaced: set[str] = set()  # arrays that are plain attributes
        drew = False

        def run(params: Any, x: Any, context: Any) -> list[Any]:
            nonlocal drew
            module = self.module(mode, params, context)
            before, plain = nnx_modules.values(module), nnx_modules.arrays(module)
            self.call(module, x, flags)
            after = nnx_modules.arrays(module)
            replaced.update(path for path, held in plain.items() if after.get(path, held) is not held)
            sown = nnx_modules.sown(module, before, self.takes)
            self.dropped |= self.takes.dropped(sown)
            harmless = {each.name for each in sown}
            new: list[Any] = []
            for path, (kind, leaves) in nnx_modules.values(module).items():
                if path not in before:
                    if not issubclass(kind, _HARMLESS) and "/".join(path) not in harmless:
                        created.append(f"{'.'.join(path)!r} ({kind.__name__})")
                    continue
                old = before[path][1]
                changed = [n for n, leaf in enumerate(leaves) if n >= len(old) or leaf is not old[n]]
                drew = drew or (bool(changed) and issubclass(kind, nnx.RngState))
                if issubclass(kind, nnx.Param):
                    written.extend((path, n) for n in changed)
                    new.extend(leaves[n] for n in changed)
            return new

        jaxpr = jax.make_jaxpr(run)(params, x, context)
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
        if replaced:
            raise Fault(
                f"writes to {', '.join(map(repr, sorted(replaced)))} in its call, an array that is no variable. What is "
                "written would be lost: make it an nnx.Variable in __init__, and it is state of the layer."
            )
        if created:
            raise Fault(
                f"makes the variable {', '.join(created)} in its call. It would be lost: make every variable in __init__ "
                "(an nnx.Intermediate may be sown anywhere). If it is sown with a reduce_fn, name its type in the spec: "
                "LayerSpec(...).sown(losses=...) or sown(metrics=...)."
            )
        return drew
