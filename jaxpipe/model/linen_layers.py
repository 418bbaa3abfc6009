"""flax.linen modules as layers."""

import re
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import jax
from flax import errors, linen

from jaxpipe.errors import LayerError
from jaxpipe.model.keywords import FLAGS, keywords_of
from jaxpipe.model.kinds import Kind, Recipe
from jaxpipe.model.same import open_with
from jaxpipe.model.specs import LayerSpec

ForwardFn = Callable[..., Any] | None

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
    source = linen.Module, target, args, same, forward_fn
    return Recipe(name, source, lambda: _Linen(spec, target(*args, **kwargs), forward_fn).kind())


def recipe_of_module(spec: LayerSpec, module: linen.Module, forward_fn: ForwardFn) -> Recipe:
    """The layer of a module without weights that a function has made."""
    if module.scope is not None:
        raise LayerError(f"LayerSpec({spec!r}) made a module that is bound to weights. Return it without `bind`.")
    source = linen.Module, module, forward_fn
    return Recipe(type(module).__name__, source, lambda: _Linen(spec, module, forward_fn).kind())


class _Linen:
    def __init__(self, spec: LayerSpec, module: linen.Module, forward_fn: ForwardFn):
        self.spec, self.module, self.forward_fn = spec, module, forward_fn
        # linen's own modules have None for "see the attribute", and refuse to be told twice.
        unset = [name for name in FLAGS if getattr(module, name, None) is None]
        self.named = keywords_of(type(module).__call__, 2, FLAGS, unset)
        self.named_forward = keywords_of(forward_fn, 2, FLAGS) if forward_fn is not None else self.named
        self.streams: set[str] = set()  # that it has asked for, beside "dropout"
        self.draws = False  # whether it asked for one in training although there was no key
        self.warned = False

    def kind(self) -> Kind:
        return Kind(self.init, self.apply, uses_key=True)

    def init(self, key: jax.Array, x: Any) -> Any:
        def call(module: linen.Module, x: Any) -> Any:
            positions, names = self.named.arguments({"train": False, "deterministic": True})
            return module(x, *positions, **names)  # pyright: ignore[reportCallIssue]

        # flax constrains the layout of annotated params as it makes them, wherever a mesh is around, and those of a step
        # have axes that are no business of the layer's.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            variables = linen.init(call, self.in_mode(False, False))({"params": key}, x)
        others = sorted(set(variables) - {"params"})
        if others:
            raise LayerError(
                f"{self.spec!r}: has the variable collections {others} beside 'params'. Layers with state (batch "
                "statistics, caches) are not supported in this version."
            )
        return self.unboxed(variables.get("params", {}))

    def unboxed(self, params: Any) -> Any:
        """The params as plain arrays: their boxes say how to lay them out, which nothing here looks at."""
        axes: set[str] = set()

        def one(leaf: Any) -> Any:
            while isinstance(leaf, linen.meta.AxisMetadata):
                names = getattr(leaf, "names", None) or ()
                axes.update(str(name) for name in names if name is not None)
                leaf = leaf.unbox(apply_constraint=False) if isinstance(leaf, linen.Partitioned) else leaf.unbox()
            return leaf

        found = jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, linen.meta.AxisMetadata))
        if axes and not self.warned:
            self.warned = True
            warn_of_axes(self.spec, axes)
        return found

    def apply(self, params: Any, x: Any, key: jax.Array | None, train: bool) -> Any:
        while True:
            try:
                return self.call(params, x, key, train)
            except errors.InvalidRngError as error:
                if key is None and train and not self.draws and "train" in self.named_forward:
                    self.draws = True
                    continue
                found = re.search(r'needs PRNG for "(.+)"', str(error))
                if key is None or found is None or found[1] in self.streams:
                    raise
                self.streams.add(found[1])

    def call(self, params: Any, x: Any, key: jax.Array | None, train: bool) -> Any:
        rngs = None
        if key is not None:
            rngs = {name: jax.random.fold_in(key, zlib.crc32(name.encode()) >> 1) for name in sorted(self.streams)}
            rngs["dropout"] = key
        # Without a key there is no dropout. A module that names only `train`, and draws when that is true, has no other
        # way to be told.
        dropout = train and key is not None
        only = "deterministic" not in self.named_forward and key is None and self.draws
        values = {"train": train and not only, "deterministic": not dropout}
        positions, names = self.named_forward.arguments(values)
        forward = self.forward_fn

        def method(module: linen.Module, x: Any) -> Any:
            if forward is None:
                return module(x, *positions, **names)  # pyright: ignore[reportCallIssue]
            return forward(module, x, *positions, **names)

        return linen.apply(method, self.in_mode(train, dropout))({"params": params}, x, rngs=rngs)

    def in_mode(self, train: bool, dropout: bool) -> linen.Module:
        """The module, with a switch that its constructor has turned to training turned back in evaluation."""
        changes: dict[str, Any] = {}
        fields = getattr(self.module, "__dataclass_fields__", {})
        if "deterministic" in fields and not dropout and getattr(self.module, "deterministic", None) is False:
            changes["deterministic"] = True
        if "train" in fields and not train and getattr(self.module, "train", None) is True:
            changes["train"] = False
        return self.module.clone(**changes) if changes else self.module


def warn_of_axes(spec: LayerSpec, axes: set[str]) -> None:
    """Says that metadata is not followed."""
    warnings.warn(
        f"{spec!r}: its params name the axes {sorted(axes)} to be laid out along (with_partitioning). jaxpipe does not "
        "follow such metadata yet: the params are laid out as if there were none.",
        UserWarning,
        stacklevel=2,
    )
