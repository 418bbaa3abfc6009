"""flax modules that are built already, as layers that begin with the weights which the modules have.

    [model.embed, *model.blocks, model.norm, model.embed.attend]

An entry of the layer list may be an nnx module, a linen module that is bound to its variables, a method of either, or a
`TiedLayerSpec(key, module, forward_fn=...)` of one. Entries of one module share one set of weights. Two modules that share
a part of their weights only are refused: weights belong to one layer, wherever that is.

The module of the user is looked at when the list is bound, and is never changed: a layer computes with copies of it, which
hold other arrays, and its weights are copied onto the mesh.
"""

import hashlib
import types
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import core, linen, nnx
from jax.core import Tracer

from jaxpipe.errors import LayerError
from jaxpipe.model import linen_layers, nnx_layers, nnx_modules
from jaxpipe.model.blame import Fault
from jaxpipe.model.hidden import find_built
from jaxpipe.model.kinds import Recipe, take_off_boxes
from jaxpipe.model.nnx_modules import path_name
from jaxpipe.model.shapes import signature
from jaxpipe.model.sown import Takes
from jaxpipe.model.specs import LayerSpec

# A kind of variable, where it is, and the layer that has it.
Owner: TypeAlias = tuple[int, str, Hashable]


@dataclass(frozen=True, eq=False)
class Built:
    """What a list entry says about a module that is built.

    Attributes:
      module: the module.
      method: `method(module, x)` is what the layer computes; None: the call of the module.
      is_own: whether the method is one of the module's class.
      takes: what is taken of what the module sows.
    """

    module: Any
    method: Callable[..., Any] | None = None
    is_own: bool = True
    takes: Takes = Takes()

    @property
    def name(self) -> str:
        """For messages, and for the names of stacks."""
        name = type(self.module).__name__
        own = getattr(self.method, "__name__", "")
        return f"{name}.{own}" if self.method is not None and self.is_own and own else name

    def __repr__(self) -> str:
        return self.name

    @property
    def key(self) -> Hashable:
        """The same for entries of one module."""
        if isinstance(self.module, nnx.Module):
            return id(self.module)
        return id(self.module.scope.root), self.module.scope.path


def found(entry: Any) -> Built | None:
    """What an entry of a layer list says about a module that is built; None if it is no such module."""
    if _has_weights(entry):
        return Built(entry)
    if isinstance(entry, types.MethodType) and _has_weights(entry.__self__):
        return Built(entry.__self__, entry.__func__)
    if isinstance(entry, LayerSpec) and _has_weights(entry.target) and not entry.args and not entry.kwargs:
        return Built(entry.target, getattr(entry, "forward_fn", None), is_own=False, takes=entry.takes)
    return None


def _has_weights(value: Any) -> bool:
    return isinstance(value, nnx.Module) or (isinstance(value, linen.Module) and value.scope is not None)


def recipe(entry: Built) -> Recipe:
    """The layer of a module that is built.

    Raises:
      LayerError: the module cannot be a layer.
    """
    if entry.method is None and isinstance(entry.module, (nnx.List, nnx.Dict)) and not callable(entry.module):
        kind, way = type(entry.module).__name__, "*blocks" if isinstance(entry.module, nnx.List) else "*blocks.values()"
        raise Fault(
            f"is an nnx.{kind}, which holds modules and has no __call__. Each of its modules is a layer: unpack it in the "
            f"list of layers, as in [embed, {way}, head], or write a module whose __call__ runs them."
        )
    if entry.method is not None and not entry.is_own and (hidden := find_built(entry.method)) is not None:
        raise Fault(
            f"has a forward_fn that uses another module, a {type(hidden[0]).__name__} ({hidden[1]}). {_TRAINED}"
        )
    return _of_nnx(entry) if isinstance(entry.module, nnx.Module) else _of_linen(entry)


_TRAINED = "Its weights would be no parameters of the layer: they would never be trained. Make both one module."


def _of_nnx(entry: Built) -> Recipe:
    graph, *split = nnx.split(entry.module, *nnx_modules.GROUPS, ...)
    params, streams, states, rest = _fresh(split)
    for node, path in nnx_modules.modules(entry.module):
        for name, value in vars(node).items():
            if isinstance(value, Tracer):
                raise Fault(
                    f"was built on shapes alone, and has the array {'.'.join(filter(None, [path, name]))!r} beside its "
                    "weights, whose numbers nobody knows. Make it an nnx.Variable, or build the module as usual."
                )
            if callable(value) and not isinstance(value, (nnx.Module, nnx.Variable)) and find_built(value) is not None:
                raise Fault(
                    f"has the attribute {'.'.join(filter(None, [path, name]))!r}, a function that holds a module. "
                    f"{_TRAINED}"
                )
    constants = [(path_name(path), _token(leaf)) for path, leaf in nnx.to_flat_state(rest)]
    source = nnx.Module, graph, constants, signature((streams, states)), entry.method, nnx_modules.taken(entry)

    def copy(values: nnx.State, states: nnx.State) -> nnx.Module:
        return nnx.merge(graph, *_fresh((values, streams, states, rest)))

    return Recipe(
        entry.name,
        source,
        lambda: nnx_layers.kind_of_built(entry, lambda key: copy(params, states), entry.method),
        nnx_modules.values_of(params),
        lambda values, state, key: copy(
            nnx_modules.with_values(params, values), nnx_modules.with_values(states, state)
        ),
        nnx_modules.values_of(states) or None,
    )


def _fresh(states: Any) -> Any:
    """The same values in new variables: flax splits and merges modules without copying those, so they would be shared."""
    return jax.tree.map(lambda leaf: leaf, states)


def _token(leaf: Any) -> Hashable:
    """Equal for arrays of the same numbers, which like modules may have as plain attributes, and for no others."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise Fault("was built on shapes alone, and has an array beside its weights, whose numbers nobody knows.")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return id(leaf)
    array = np.ascontiguousarray(leaf)
    return array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).hexdigest()


def _of_linen(entry: Built) -> Recipe:
    module, variables = entry.module.unbind()
    variables = core.unfreeze(variables)
    params, annotations = take_off_boxes(variables.get("params", {}))
    state = take_off_boxes(linen_layers.state_of(variables, entry.takes))[0]
    module = module.clone(name=None)
    source = linen.Module, module, annotations, entry.method, linen_layers.taken(entry)
    sown_to = linen_layers.sown_to(variables)
    return Recipe(
        entry.name,
        source,
        lambda: linen_layers.kind_of_built(entry, module, entry.method, annotations, sown_to),
        params,
        lambda params, state, key: linen_layers.bound(module, params, state),
        state or None,
    )


# ------------------------------------------------------------------------------------------------- who shares weights


def ties(entries: Sequence[Any]) -> list[Hashable]:
    """For each entry of a layer list what it has in common with other entries of its module; None if there are none.

    Raises:
      LayerError: modules of two entries share a part of their weights.
    """
    modules = [found(entry) for entry in entries]
    uses: dict[Hashable, list[int]] = {}
    for index, each in enumerate(modules):
        if each is not None:
            uses.setdefault(each.key, []).append(index)
    firsts = {key: indices[0] for key, indices in uses.items()}
    _reject_sharing({first: each for first in firsts.values() if (each := modules[first]) is not None})
    return [None if each is None or len(uses[each.key]) < 2 else ("module of", firsts[each.key]) for each in modules]


def _reject_sharing(modules: dict[int, Built]) -> None:
    """Raises LayerError where modules, by their layer, have variables in common."""
    owners: dict[Hashable, tuple[int, str]] = {}
    scopes: list[tuple[Any, int]] = []
    for layer, each in modules.items():
        if isinstance(each.module, nnx.Module):
            for path, node in nnx.iter_graph(each.module):
                # Random streams may be shared: the keys are made by jaxpipe, for each layer its own.
                if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState):
                    here = layer, ".".join(path_name(path))
                    first = owners.setdefault(id(node), here)
                    if first[0] != layer:
                        raise _shared(modules, first, here, f"nnx.{type(node).__name__}")
            continue
        scope = each.module.scope
        for other, first in scopes:
            length = min(len(scope.path), len(other.path))
            if scope.root is other.root and scope.path[:length] == other.path[:length]:
                longer = max(scope.path, other.path, key=len)
                ends = [".".join(longer[len(each.path) :]) for each in (other, scope)]
                raise _shared(modules, (first, ends[0]), (layer, ends[1]), "variables")
        scopes.append((scope, layer))


def _shared(modules: dict[int, Built], one: tuple[int, str], other: tuple[int, str], what: str) -> LayerError:
    first, second = (f"layer {layer} ({modules[layer].name})" for layer, _ in (one, other))
    return LayerError(
        f"The {what} {one[1]!r} of {first} is also {other[1]!r} of {second}. Layers share all of their weights or none. "
        "Put the module that has these weights into the list wherever they are used, or one of its methods, such as "
        "model.embed.attend; or make one layer of both."
    )
