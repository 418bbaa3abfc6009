"""What users put into the layer list: `Layer`, `LayerSpec` and `TiedLayerSpec`.

A spec is built late, so that no device ever holds the whole model. `layers` turns the entries of a list into what is
described in `kinds`.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from jaxpipe.errors import LayerError
from jaxpipe.model.sown import Takes
from jaxpipe.types import Params, Tree


@dataclass(frozen=True)
class Layer:
    """A pure pair of functions.

    Attributes:
      init: `init(key, x) -> params`; `x` is a batch of the layer's input (its values are zeros, only shapes count).
      apply: `apply(params, x) -> y`. It may name the keywords `key` (a PRNG key of this layer, micro-batch and data
        rank; None when the caller gave no key), `train` and `deterministic` (bool); they are passed where they have no
        default, or None, or for the flags a bool.
      name: shown in messages and used in the names of parameters; no part of what makes layers alike.
      init_cache: `init_cache(x, length) -> cache` for a layer that mixes positions, any pytree with leaves of fixed shapes.
        While tokens are generated, `x` is its input for the prompts, leaves [B, T, ...], `length` that of prompt and new
        tokens, and it is called as `apply(params, x, ..., cache=, position=)` with chunks [B, n, ...] of any length n that
        begin at `position`, int32 []; it returns `(y, cache)`. Otherwise both keywords are None, and it returns y. A layer
        that only has to know where a position stands names `position` alone.
      stateful: whether the layer has state, such as running means: `init(key, x) -> (params, state)`, and
        `apply(params, state, x) -> (y, new state)`. The micro-batches of training change it, one after the other. It keeps
        the structure, shapes and dtypes that `init` gave it, and is a constant to derivatives. An evaluation reads it, and
        what it returns there is not kept.

    Raises:
      LayerError: `init`, `apply` or `init_cache` is not callable, `name` no string, or `stateful` no bool.
    """

    init: Callable[..., Params]
    apply: Callable[..., Tree]
    name: str = ""
    stateful: bool = False
    init_cache: Callable[..., Tree] | None = None

    def __post_init__(self):
        for what in ("init", "apply"):
            if not callable(getattr(self, what)):
                raise LayerError(
                    f"Layer({what}={getattr(self, what)!r}): a layer is a pair of functions, init(key, x) -> params and "
                    "apply(params, x) -> y. One without parameters is a plain function in the layer list."
                )
        if self.init_cache is not None and not callable(self.init_cache):
            raise LayerError(
                f"Layer(init_cache={self.init_cache!r}): it is a function init_cache(x, length) -> cache, or None for a "
                "layer that keeps nothing of the positions before."
            )
        if not isinstance(self.name, str):
            raise LayerError(f"Layer(name={self.name!r}): the name of a layer is a string.")
        if not isinstance(self.stateful, bool):
            raise LayerError(
                f"Layer(stateful={self.stateful!r}): True for a layer whose init returns (params, state), else False."
            )


class LayerSpec:
    """A layer that is built where it is needed: `target(*args, **kwargs)`.

    `target` is a `flax.nnx.Module` class or a function that makes such a module (its `rngs` argument is filled in), a
    `flax.linen.Module` class, or a function that returns a `Layer`; a `functools.partial` of these too. Specs that
    compute the same make layers of one kind, which are stacked, sharded over the ranks and scanned.
    """

    def __init__(self, target: Callable[..., Any], *args: Any, **kwargs: Any):
        if not callable(target):
            raise LayerError(
                f"LayerSpec({target!r}): the first argument is a flax module class or a function that returns a "
                "jaxpipe.Layer; the arguments to build it with follow."
            )
        self.target, self.args, self.kwargs = target, args, kwargs
        self.takes = Takes()

    def sown(self, losses: Any = (), metrics: Any = ()) -> Self:
        """The same layer, of which what its flax module sows is taken.

        A sown value is named by its path in the module, such as "experts/balance". What is sown several times under one
        name in a call is added up (a loss) or averaged (a metric), in a loop of the module as well: a block that is scanned
        over sows a value per iteration. See `LayerOut` for what becomes of both.

        Args:
          losses: what is one: the name of a collection (flax.linen), such as "losses", or a type of variables (flax.nnx),
            such as `nnx.Intermediate`; several of them in a tuple.
          metrics: the same for metrics.

        Returns:
          A new spec.

        Raises:
          LayerError: it is neither, or one is among both.
        """
        made = copy.copy(self)
        made.takes = Takes.of(losses, metrics)
        return made

    @property
    def name(self) -> str:
        target = self.target.func if isinstance(self.target, functools.partial) else self.target
        return getattr(target, "__name__", type(target).__name__)

    def __repr__(self) -> str:
        arguments = [repr(a) for a in self.args] + [f"{k}={v!r}" for k, v in self.kwargs.items()]
        return f"{self.name}({', '.join(arguments)})"


class TiedLayerSpec(LayerSpec):
    """A layer that shares one set of weights with every other `TiedLayerSpec` of the same `key`.

    The first use in the list owns the weights: its arguments build them, its index seeds and stores them. Gradients of
    all uses are summed.

    Args:
      key: identity of the tie.
      target: as for `LayerSpec`; all uses of one key name the same target and arguments.
      forward_fn: `forward_fn(module, x)` replaces the plain call, for example to use an embedding as the output
        projection. It gets the flax module with its weights, or the params when `target` makes a `Layer`; and `train` and
        `deterministic` (with a `Layer` also `key`) as `Layer.apply` does.
    """

    def __init__(
        self,
        key: str,
        target: Callable[..., Any],
        *args: Any,
        forward_fn: Callable[..., Tree] | None = None,
        **kwargs: Any,
    ):
        super().__init__(target, *args, **kwargs)
        try:
            hash(key)
        except TypeError:
            key = None  # type: ignore[assignment]
        if key is None:
            raise LayerError(
                "TiedLayerSpec(key, ...): the key, a string, names the tie, but it was None or unhashable."
            )
        if forward_fn is not None and not callable(forward_fn):
            raise LayerError(
                f"TiedLayerSpec({key!r}, ..., forward_fn={forward_fn!r}): it is a function (module, x) -> y."
            )
        self.key, self.forward_fn = key, forward_fn

    def __repr__(self) -> str:
        return f"Tied[{self.key}]:{super().__repr__()}"
