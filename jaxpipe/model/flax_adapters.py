"""What stands behind a `LayerSpec`: a flax module of either API, or a function that makes a `Layer`.

A module that is built already is no layer: it would look like a callable without parameters, and its weights would be
frozen, without a word. It is looked for wherever a callable can hide it: bound methods, `functools.partial`, closures,
defaults, attributes, and the global names that a function uses.
"""

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from flax import linen, nnx

from jaxpipe.errors import LayerError
from jaxpipe.model import linen_layers, nnx_layers
from jaxpipe.model.kinds import Recipe, recipe_of_layer
from jaxpipe.model.specs import Layer, LayerSpec, TiedLayerSpec

_TARGETS = (
    "The target is a flax.nnx or flax.linen module class, a function that makes an nnx module and takes `rngs`, or a "
    "function that returns a jaxpipe.Layer(init, apply)."
)


_METHOD = "a bound method"


def recipe(spec: LayerSpec, index: int) -> Recipe:
    """How the layer of a spec is made.

    Raises:
      LayerError: the target makes no layer.
    """
    forward_fn = getattr(spec, "forward_fn", None)
    target, args, kwargs = _plain(spec.target, spec.args, spec.kwargs)
    if isinstance(target, (nnx.Module, linen.Module)):
        raise LayerError(
            f"Layer {index}, LayerSpec({spec!r}): the target is a module that is built already. {_TARGETS}"
        )
    bare = inspect.unwrap(target)
    if inspect.isclass(target) and issubclass(target, linen.Module):
        return linen_layers.recipe(spec, target, args, kwargs, forward_fn)
    if inspect.isclass(target) and issubclass(target, nnx.Module):
        return nnx_layers.recipe(spec, target, args, kwargs, forward_fn)
    if inspect.isclass(bare) and issubclass(bare, nnx.Module):
        raise LayerError(
            f"Layer {index}, LayerSpec({spec!r}): the target wraps the constructor of {bare.__name__} (nnx.remat, nnx.jit "
            f"and the like change functions). Name {bare.__name__} itself; to recompute its activations use `remat` of "
            "the pipeline, or put @nnx.remat on its __call__."
        )
    if nnx_layers.takes_rngs(target) and nnx_layers.makes_module(target, args, kwargs):
        return nnx_layers.recipe(spec, target, args, kwargs, forward_fn)
    built = target(*args, **kwargs)
    if isinstance(built, Layer):
        return recipe_of_layer(getattr(built.apply, "__name__", "Layer").strip("<>"), built, forward_fn)
    if isinstance(built, linen.Module):
        return linen_layers.recipe_of_module(spec, built, forward_fn)
    hint = ""
    if isinstance(built, nnx.Module):
        hint = " It has weights already: let the function take `rngs`, and pass them on."
    raise LayerError(f"Layer {index}, LayerSpec({spec!r}), made a {type(built).__name__}.{hint} {_TARGETS}")


def _plain(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The target and its arguments without `functools.partial`."""
    while isinstance(target, functools.partial):
        args, kwargs = (*target.args, *args), {**target.keywords, **kwargs}
        target = target.func
    return target, args, kwargs


# ------------------------------------------------------------------------------------------------------ built modules


def reject_built_modules(entry: Any, index: int) -> None:
    """Raises LayerError for an entry that is, or uses, a module that is built already."""
    if isinstance(entry, (nnx.Module, linen.Module)):
        name = type(entry).__name__
        raise LayerError(
            f"Layer {index} is a {name} object. Layers are built late, each on its own rank: "
            f"write jaxpipe.LayerSpec({name}, ...) with the arguments of its constructor."
        )
    if isinstance(entry, TiedLayerSpec):
        used = None if entry.forward_fn is None else find_built(entry.forward_fn)
    elif isinstance(entry, (Layer, LayerSpec)) or not callable(entry) or inspect.isclass(entry):
        return  # a Layer says itself what its weights are
    else:
        used = find_built(entry)
    if used is not None:
        module, how = used
        name = type(module).__name__
        method = getattr(entry, "__name__", "method") if isinstance(entry, types.MethodType) else "method"
        raise LayerError(
            f"Layer {index}, {_short(entry)}, uses a {name} object that is built already ({how}). Its weights would be no "
            f"parameters of the layer: they would never be trained. Write jaxpipe.LayerSpec({name}, ...) with the "
            f"arguments of its constructor; for a method of a module that is a layer too, jaxpipe.TiedLayerSpec(key, "
            f"{name}, ..., forward_fn={name}.{method}). To freeze weights on purpose, return them from the init of a "
            "jaxpipe.Layer, and use jax.lax.stop_gradient in its apply."
        )


def find_built(value: Any) -> tuple[Any, str] | None:
    """A module with weights that a callable holds, and how it does; None if there is none."""
    todo: list[tuple[Any, str]] = [(value, "")]
    seen: set[int] = set()
    kept: list[Any] = []  # so that no id is used twice
    while todo:
        here, how = todo.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        kept.append(here)
        # A linen module without weights may be used by a function; a method of it is meant to be the layer.
        if isinstance(here, nnx.Module) or (
            isinstance(here, linen.Module) and (here.scope is not None or how.endswith(_METHOD))
        ):
            return here, how
        todo += [(part, name if not how else f"{how}, {name}") for part, name in _held(here)]
    return None


def _held(value: Any) -> Iterator[tuple[Any, str]]:
    """What a callable or a container holds, with a word for each."""
    if isinstance(value, types.MethodType):
        yield value.__self__, _METHOD
        yield value.__func__, _METHOD
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield part, "in a functools.partial"
    elif isinstance(value, types.FunctionType):
        yield from _used_by_function(value)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for part in value:
            yield part, "in a container"
    elif isinstance(value, dict):
        for part in value.values():
            yield part, "in a container"
    elif callable(value) and not inspect.isclass(value):
        yield getattr(value, "__wrapped__", None), "a wrapped function"
        for name, part in getattr(value, "__dict__", {}).items():
            yield part, f"its attribute {name!r}"


def _used_by_function(function: types.FunctionType) -> Iterator[tuple[Any, str]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield cell.cell_contents, f"as {name!r}"
        except ValueError:  # not bound yet
            continue
    for part in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield part, "in a default"
    yield from ((part, "a wrapped function") for part in function.__dict__.values())
    for name in _global_names(function.__code__):
        part = function.__globals__.get(name)
        # Functions of a program use each other; only what is a module itself, or a method of one, is looked at.
        if isinstance(getattr(part, "__self__", part), (nnx.Module, linen.Module)):
            yield part, f"as {name!r}"


def _global_names(code: types.CodeType) -> set[str]:
    names = {line.argval for line in dis.get_instructions(code) if line.opname == "LOAD_GLOBAL"}
    inner: list[types.CodeType] = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return names.union(*map(_global_names, inner))


def _short(value: Any) -> str:
    text = " ".join((getattr(value, "__qualname__", None) or repr(value)).split())
    return text if len(text) <= 80 else text[:77] + "..."
