"""What stands behind a `LayerSpec`: a flax module of either API, or a function that makes a `Layer`.

A module that is built already is a layer of its own (see `built`), but not inside of a callable: that would look like a
layer without parameters, and the weights would be frozen, without a word. So it is looked for wherever a callable can hide
it: `functools.partial`, closures, defaults, attributes, and the global names that a function uses.
"""

import functools
import inspect
from typing import Any

from flax import linen, nnx

from jaxpipe.errors import LayerError
from jaxpipe.model import linen_layers, nnx_layers
from jaxpipe.model.function_layers import recipe_of_layer
from jaxpipe.model.hidden import find_built
from jaxpipe.model.kinds import Recipe
from jaxpipe.model.specs import Layer, LayerSpec, TiedLayerSpec

_TARGETS = (
    "The target is a flax.nnx or flax.linen module class, a function that makes an nnx module and takes `rngs`, or a "
    "function that returns a jaxpipe.Layer(init, apply)."
)


def recipe(spec: LayerSpec, index: int) -> Recipe:
    """How the layer of a spec is made.

    Raises:
      LayerError: the target makes no layer.
    """
    forward_fn = getattr(spec, "forward_fn", None)
    target, args, kwargs = _plain(spec.target, spec.args, spec.kwargs)
    if isinstance(target, (nnx.Module, linen.Module)):
        raise LayerError(
            f"Layer {index}, LayerSpec({spec!r}): the target is a module that is built already, and takes no arguments. "
            f"Put the module itself into the list. {_TARGETS}"
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
        if spec.takes:
            raise LayerError(
                f"Layer {index}, {spec!r}: sown(...) is for flax modules. Let the apply of the Layer return a LayerOut."
            )
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


def reject_hidden_modules(entry: Any, index: int) -> None:
    """Raises LayerError for an entry that uses a module which is built already, and for a linen module without weights."""
    if isinstance(entry, linen.Module):
        name = type(entry).__name__
        raise LayerError(
            f"Layer {index} is a {name} object without weights. Write jaxpipe.LayerSpec({name}, ...) with the arguments of "
            "its constructor, or bind it to the weights that it shall begin with: module.bind(variables)."
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
        raise LayerError(
            f"Layer {index}, {_short(entry)}, uses a {name} object that is built already ({how}). Its weights would be no "
            "parameters of the layer: they would never be trained. Put the module itself into the list, or one of its "
            "methods, such as model.embed.attend; for any other function of it write jaxpipe.TiedLayerSpec(key, module, "
            f"forward_fn=lambda module, x: ...). Or write jaxpipe.LayerSpec({name}, ...), which is built late. To freeze "
            "weights on purpose, use `trainable` of jaxpipe.initialize."
        )


def _short(value: Any) -> str:
    text = " ".join((getattr(value, "__qualname__", None) or repr(value)).split())
    return text if len(text) <= 80 else text[:77] + "..."
