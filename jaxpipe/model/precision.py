"""Mixed precision: which floats a step computes in a shorter dtype, and where they become long again.

    params      stay as they are stored (float32) and are cast once per step; a rule by path keeps some of them as they are
    inputs      floats are cast, everything else is not
    between     what a layer hands to the next one is not wider than the compute dtype, so that messages and saved values
    layers      are short, and no result depends on where the stages are cut
    outputs     what the last layer returns is not cut down; it becomes float32 before `loss_fn` sees it, or the user does
    gradients   are added up in float32 over the micro-batches, and leave the step in the dtype of the stored params

Only real floats are cast. Integers, booleans, PRNG keys and complex numbers are what they were, and so are floats of eight
bits or less, which somebody has chosen on purpose.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp

from jaxpipe.checks import did_you_mean, show
from jaxpipe.errors import ConfigError
from jaxpipe.model.paths import param_path
from jaxpipe.model.shapes import HasDtype
from jaxpipe.types import Avals, Params, Tree

COMPUTE_DTYPES = ("bfloat16", "float16")
_LONGEST_LIST = 8  # how many paths a message shows


@dataclass(frozen=True)
class Precision:
    """What is computed in which dtype. Without a compute dtype nothing is ever cast.

    Attributes:
      compute_dtype: "bfloat16", "float16" or None.
      float32_params: a regular expression; params in whose path it is found (`re.search`) are not cast. None: all are. The
        path of a param is the name of its layer and the way to it, such as `layer_003/attn/qkv/kernel`.
    """

    compute_dtype: str | None = None
    float32_params: str | None = None

    @classmethod
    def of(cls, compute_dtype: Any, float32_params: Any) -> Self:
        """The precision from what a user has passed.

        Raises:
          ConfigError: no such dtype, or no regular expression.
        """
        return cls(as_compute_dtype(compute_dtype), as_rule("float32_params", float32_params))

    def of_layers(self, layers: Mapping[str, Params]) -> dict[str, Avals]:
        """The shapes and dtypes that layers compute with.

        Args:
          layers: by the name of the layer, its params as they are stored, or their shapes.

        Raises:
          ConfigError: `float32_params` finds none of the params.
        """
        found = {name: self.of_layer(name, params) for name, params in layers.items()}
        if self.float32_params is not None:
            paths = [path for name, params in layers.items() for path in _paths(name, params)]
            if not any(self._is_kept(path) for path in paths):
                more = f" and {len(paths) - _LONGEST_LIST} more" if len(paths) > _LONGEST_LIST else ""
                listed = ", ".join(paths[:_LONGEST_LIST]) or "none"
                raise ConfigError(
                    f"float32_params={self.float32_params!r} is found in the path of no param that is a float. The paths "
                    f"are {listed}{more}. It is searched for in these (re.search); correct it, or leave it out."
                )
        return found

    def of_layer(self, name: str, params: Params) -> Avals:
        """The shapes and dtypes that one layer computes with."""
        leaves, structure = jax.tree.flatten(params)
        paths = _paths(name, params, floats=False)
        made = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if self._is_kept(path) else self._computed(leaf))
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, made)

    def _is_kept(self, path: str) -> bool:
        return self.float32_params is not None and re.search(self.float32_params, path) is not None

    def _computed(self, leaf: HasDtype) -> Any:
        """The dtype of a param or an input in a step."""
        return leaf.dtype if self.compute_dtype is None or _bits(leaf) < 16 else jnp.dtype(self.compute_dtype)

    def inputs(self, tree: Tree) -> Tree:
        """Inputs of the first layer, arrays or their shapes, as it gets them."""
        return tree if self.compute_dtype is None else jax.tree.map(lambda a: _as(a, self._computed(a)), tree)

    def for_init(self, tree: Avals) -> Avals:
        """What a layer takes in a step, as its `init` gets it: in long floats, so that params made alike are long."""
        if self.compute_dtype is None:
            return tree
        long = jnp.zeros(()).dtype  # float64 where that is enabled
        return jax.tree.map(lambda a: _as(a, long if a.dtype == self.compute_dtype else a.dtype), tree)

    def handed_on(self, tree: Tree) -> Tree:
        """What a layer returns, arrays or their shapes, as the next layer gets it: nothing wider than the compute dtype."""
        if self.compute_dtype is None:
            return tree
        dtype = jnp.dtype(self.compute_dtype)
        return jax.tree.map(lambda a: _as(a, dtype if _bits(a) > 16 else a.dtype), tree)

    def outputs(self, tree: Tree) -> Tree:
        """What the last layer returns, arrays or their shapes, as the loss and the user get it: nothing below float32."""
        if self.compute_dtype is None:
            return tree
        return jax.tree.map(lambda a: _as(a, jnp.float32 if 0 < _bits(a) < 32 else a.dtype), tree)


NO_CASTS = Precision()


def as_compute_dtype(value: Any) -> str | None:
    """The name of a compute dtype; None for float32, which casts nothing.

    Args:
      value: a name, a dtype or a scalar type of JAX or NumPy, or None.

    Raises:
      ConfigError: it is none of the dtypes that a step can compute in.
    """
    name = value
    if value is not None and not isinstance(value, str):
        try:
            name = jnp.dtype(value).name
        except (TypeError, ValueError):
            name = ""
    if name in COMPUTE_DTYPES:
        return name
    if name in (None, "float32"):
        return None
    hint = did_you_mean(value, COMPUTE_DTYPES) if isinstance(value, str) else ""
    raise ConfigError(
        f"compute_dtype={show(value)} must be 'bfloat16', 'float16', or None, which computes in the dtypes of params and "
        f"inputs.{hint}"
    )


def as_rule(field: str, value: Any) -> str | None:
    """A rule over the paths of params, or None.

    Raises:
      ConfigError: it is no regular expression.
    """
    if value is None:
        return None
    rule = (
        "It is a regular expression as text, which is searched for in the paths of params, such as "
        "'layer_003/norm/scale'. Several are joined by '|'."
    )
    if not isinstance(value, str):
        raise ConfigError(f"{field}={show(value)} is a {type(value).__name__}. {rule}")
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigError(f"{field}={show(value)}: {error}. {rule}") from error
    return value


def _paths(name: str, params: Params, *, floats: bool = True) -> list[str]:
    """The paths of the params of a layer, or of those that are floats, in order."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return [param_path(name, path) for path, leaf in leaves if _bits(leaf) or not floats]


def _bits(leaf: HasDtype) -> int:
    """How long a real float is; 0 for everything else."""
    return jnp.finfo(leaf.dtype).bits if jnp.issubdtype(leaf.dtype, jnp.floating) else 0


def _as(leaf: Any, dtype: Any) -> Any:
    if leaf.dtype == dtype:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.astype(dtype)
