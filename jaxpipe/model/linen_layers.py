"""flax.linen modules as layers."""

import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, linen

from jaxpipe.errors import LayerError
from jaxpipe.model.axes import Annotations
from jaxpipe.model.blame import Fault
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.function_layers import with_cache
from jaxpipe.model.keywords import FLAGS, GENERATING, keywords_of
from jaxpipe.model.kinds import Kind, Recipe
from jaxpipe.model.one_by_one import one_by_one, with_length
from jaxpipe.model.same import open_with
from jaxpipe.model.sown import SownValue, Takes, check_kinds, in_loops
from jaxpipe.model.specs import LayerSpec
from jaxpipe.model.states import NO_STATE

ForwardFn = Callable[..., Any] | None
# Collections that are sown to by convention.
_SOWN_TO = ("intermediates", "losses")
# Those that are no state: the params, and what is there to look at values.
_NO_STATE = ("params", *_SOWN_TO, "perturbations")

# A module without a parent is its fields; every object has an id of its own beside them.
open_with(linen.Module, lambda module: {name: value for name, value in vars(module).items() if name != "_id"})


def recipe(
    spec: LayerSpec,
    target: type[linen.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    forward_fn: ForwardFn,
) -> Recipe:
    """The layer of a linen module class. The module's own `name` is for messages, no part of what it computes."""
    own = kwargs.get("name")
    same = {key: value for key, value in kwargs.items() if key != "name"}
    name = f"{spec.name}:{own}" if isinstance(own, str) else spec.name
    source = linen.Module, target, args, same, forward_fn, taken(spec)

    def build(params: Any, state: Any, key: jax.Array) -> linen.Module:
        return bound(target(*args, **kwargs), params, state)

    return Recipe(name, source, lambda: _Linen(spec, target(*args, **kwargs), forward_fn).kind(), build=build)


def recipe_of_module(spec: LayerSpec, module: linen.Module, forward_fn: ForwardFn) -> Recipe:
    """The layer of a module without weights that a function has made."""
    if module.scope is not None:
        raise LayerError(f"LayerSpec({spec!r}) made a module that is bound to weights. Return it without `bind`.")
    source = linen.Module, module, forward_fn, taken(spec)
    name, build = type(module).__name__, lambda params, state, key: bound(module, params, state)
    return Recipe(name, source, lambda: _Linen(spec, module, forward_fn).kind(), build=build)


def bound(module: linen.Module, params: Any, state: Any) -> linen.Module:
    """A module with weights and state, which can be called."""
    return module.bind({"params": params, **state})


def state_of(variables: Mapping[str, Any], takes: Takes) -> dict[str, Any]:
    """Every collection but the params, and but those that are there to look at values.

    Args:
      variables: by collection.
      takes: what is taken of what the module sows, which is no state either.
    """
    left_out = {*_NO_STATE, *takes.losses, *takes.metrics, *sown_to(variables)}
    return {name: held for name, held in variables.items() if name not in left_out}


def sown_to(variables: Mapping[str, Any]) -> list[str]:
    """The collections that the module sows to, whatever they are called: `sow` puts a tuple of values under a name."""

    def is_sown(held: Any) -> bool:
        leaves = jax.tree.leaves(held, is_leaf=lambda node: isinstance(node, tuple))
        return bool(leaves) and all(isinstance(leaf, tuple) for leaf in leaves)

    return [name for name, held in variables.items() if is_sown(held)]


def kind_of_built(
    shown: Any, module: linen.Module, forward_fn: ForwardFn, annotations: Annotations, sown_to: Sequence[str]
) -> Kind:
    """The kind of modules that were bound to weights; the layer is given those.

    Args:
      shown: prints as what messages call the layer.
      module: without weights.
      annotations: what the boxes of the weights said.
      sown_to: the collections that it is known to sow to.
    """
    made = _Linen(shown, module, forward_fn)
    made.watch(sown_to)
    return made.kind(annotations)


def taken(spec: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The collections that are taken; raises LayerError for what is none."""
    check_kinds(repr(spec), spec.takes, str, 'For flax.linen it names collections, such as "losses".')
    return spec.takes.losses, spec.takes.metrics


def _sown(collection: str, held: Any, *path: str) -> list[SownValue]:
    """What was sown into a collection."""
    if not isinstance(held, Mapping):
        return [SownValue(collection, "/".join(path), held)]
    return [each for name, inner in held.items() for each in _sown(collection, inner, *path, name)]


def _sown_beside(found: Mapping[str, Any], state: Mapping[str, Any]) -> list[SownValue]:
    """What was sown, of all collections that a call has changed."""
    return [each for name, held in found.items() if name not in state for each in _sown(name, held)]


class _Linen:
    def __init__(self, spec: Any, module: linen.Module, forward_fn: ForwardFn):
        self.spec, self.module, self.forward_fn = spec, module, forward_fn
        self.takes: Takes = getattr(spec, "takes", Takes())
        # linen's own modules have None for "see the attribute", and refuse to be told twice.
        unset = [name for name in FLAGS if getattr(module, name, None) is None]
        names = (*FLAGS, *GENERATING)
        self.named = keywords_of(type(module).__call__, 2, names, [*unset, *GENERATING])
        self.named_forward = keywords_of(forward_fn, 2, names) if forward_fn is not None else self.named
        self.has_cache = "cache" in self.named_forward and hasattr(module, "init_cache")
        # One whose field `decode` was set to True cannot be trained, so it is none that has to be told.
        self.decodes = not self.has_cache and getattr(module, "decode", None) is False
        self.streams: set[str] = set()  # that it has asked for, beside "dropout"
        self.dropped: set[str] = set()  # what is sown and not taken
        # All that is taken, and where flax's users sow to, so that it can be told what nobody takes.
        self.sown_to: list[str] = []
        self.watch([*map(str, (*self.takes.losses, *self.takes.metrics)), *_SOWN_TO])
        self.draws = False  # whether it asked for one in training although there was no key

    def kind(self, annotations: Annotations | None = None) -> Kind:
        init_cache = self.init_cache if self.has_cache or self.decodes else None
        made = self.dropped, init_cache, "position" in self.named_forward, self.init_state
        return Kind(self.init, self.apply, True, annotations, *made)

    def init(self, key: jax.Array, x: Any) -> Any:
        return self.variables(key, x).get("params", {})

    def init_state(self, key: jax.Array, x: Any) -> dict[str, Any]:
        variables = self.variables(key, x)
        self.watch(sown_to(variables))
        return state_of(variables, self.takes)

    def watch(self, sown_to: Iterable[str]) -> None:
        """Looks at what is sown to these collections as well."""
        self.sown_to = [*dict.fromkeys([*self.sown_to, *sown_to])]

    def variables(self, key: jax.Array, x: Any) -> Any:
        """What the module makes when it is called for the first time, by collection."""

        def call(module: linen.Module, x: Any) -> Any:
            values = {"train": False, "deterministic": True, **dict.fromkeys(GENERATING)}
            positions, names = self.named.arguments(values)
            return module(x, *positions, **names)  # pyright: ignore[reportCallIssue]

        init = linen.init(call, self.in_mode(False, False))
        try:
            # flax constrains the layout of annotated params as it makes them, wherever a mesh is around, and their names
            # need not be its axes.
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                return init({"params": key}, x)
        except RuntimeError as error:
            if "non-empty mesh" not in str(error) or jax.sharding.get_abstract_mesh().empty:
                raise
            variables = init({"params": key}, x)  # the layer constrains an activation by itself
        if "cache" in variables:
            raise LayerError(
                f"{self.spec!r}: makes a cache when it is initialized, so it cannot be trained. Leave its field `decode` "
                "False; jaxpipe turns it on while tokens are generated."
            )
        return variables

    def apply(self, params: Any, x: Any, context: Context, train: bool) -> tuple[Any, Aux]:
        key = context.key
        while True:
            try:
                if context.cache is not None and not self.has_cache:
                    return self.decode(params, x, context)
                returned, found = self.call(params, x, context, train)
                sown = _sown_beside(found, context.state)
                self.dropped |= self.takes.dropped(sown)
                y, aux = with_cache(returned, context)
                state = {name: found[name] for name in context.state}

                def again(params: Any, x: Any, context: Context) -> list[SownValue]:
                    return _sown_beside(self.call(params, x, context, train)[1], context.state)

                sown = in_loops(sown, again, params, x, context) if self.takes else []
                return y, self.takes.aux(sown, state)._replace(cache=aux.cache)
            except (errors.ScopeCollectionNotFound, errors.ScopeVariableNotFoundError) as error:
                raise error if context.state else Fault(NO_STATE) from error
            except errors.InvalidRngError as error:
                if key is None and train and not self.draws and "train" in self.named_forward:
                    self.draws = True
                    continue
                found = re.search(r'needs PRNG for "(.+)"', str(error))
                if key is None or found is None or found[1] in self.streams:
                    raise
                self.streams.add(found[1])

    def call(self, params: Any, x: Any, context: Context, train: bool) -> tuple[Any, Mapping[str, Any]]:
        rngs, key = None, context.key
        if key is not None:
            rngs = {name: jax.random.fold_in(key, zlib.crc32(name.encode()) >> 1) for name in sorted(self.streams)}
            rngs["dropout"] = key
        # Without a key there is no dropout. A module that names only `train`, and draws when that is true, has no other
        # way to be told.
        dropout = train and key is not None
        only = "deterministic" not in self.named_forward and key is None and self.draws
        method = self.method(train and not only, not dropout, context)
        # What an evaluation changes is not kept, but it may try to.
        mutable: Any = [*self.sown_to, *context.state]
        apply = linen.apply(method, self.in_mode(train, dropout), mutable=mutable)
        return apply({"params": params, **context.state}, x, rngs=rngs)  # type: ignore[return-value]  # with `mutable` it is a pair

    def method(self, train: bool, deterministic: bool, context: Context) -> Callable[[linen.Module, Any], Any]:
        """The call of a module with the keywords that it takes."""
        values = {"train": train, "deterministic": deterministic}
        values |= {"cache": context.cache if self.has_cache else None, "position": context.position}
        positions, names = self.named_forward.arguments(values)
        forward = self.forward_fn

        def method(module: linen.Module, x: Any) -> Any:
            if forward is None:
                return module(x, *positions, **names)  # pyright: ignore[reportCallIssue]
            return forward(module, x, *positions, **names)

        return method

    def init_cache(self, params: Any, state: Any, x: Any, length: int) -> Any:
        """What a module of flax keeps of positions: its collection `cache`, {} for none."""
        if self.has_cache:
            made: Any = linen.apply(lambda module, x: module.init_cache(x, length), self.in_mode(False, False))
            return made({"params": params, **state}, x)
        # As flax asks for it: initialised with whole sequences, which no position is written from.
        method, keys = self.method(False, True, Context(position=jnp.int32(0))), {"params": jax.random.key(0)}
        whole = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), with_length(x, length))
        made = linen.apply(method, self.in_mode(False, False, True), mutable=["cache"])
        return made({"params": params, **state}, whole, rngs=keys)[1].get("cache", {})

    def decode(self, params: Any, x: Any, context: Context) -> tuple[Any, Aux]:
        """One position after the other, with the caches that modules of flax keep in themselves."""
        module = self.in_mode(False, False, True)

        def step(carry: Any, x: Any) -> tuple[Any, Any]:
            cache, position = carry
            method = self.method(False, True, context._replace(position=position))
            variables = {"params": params, **context.state, "cache": cache}
            y, changed = linen.apply(method, module, mutable=["cache"])(variables, x)
            return y, (changed["cache"], position + 1)

        y, (cache, _) = one_by_one(step, (context.cache, context.position), x)
        return y, Aux(cache=cache)

    def in_mode(self, train: bool, dropout: bool, decode: bool = False) -> linen.Module:
        """The module, with a switch that its constructor has turned to training turned back in evaluation."""
        changes: dict[str, Any] = {"decode": True} if decode else {}
        fields = getattr(self.module, "__dataclass_fields__", {})
        if "deterministic" in fields and not dropout and getattr(self.module, "deterministic", None) is False:
            changes["deterministic"] = True
        if "train" in fields and not train and getattr(self.module, "train", None) is True:
            changes["train"] = False
        return self.module.clone(**changes) if changes else self.module
