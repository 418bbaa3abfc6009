"""Loss scaling: gradients that short floats could not hold are made larger on their way back, and small again at the end.

In float16 numbers below 6e-8 are zero. A gradient seldom reaches 65,504, the other end, so the backward pass starts from
`scale` times the gradient of the loss, and the sums are divided by it in float32. How large a scale fits changes while a
model learns; a dynamic one finds out:

    a step overflows   its gradient is not finite: it changes nothing but the scale, which is halved
    `window` steps     in a row did not: the scale is doubled

With `hysteresis` h the first h - 1 overflows leave the scale as it is; that many are forgiven again after it was doubled.
"""

from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxpipe.checks import as_number, count, did_you_mean, show
from jaxpipe.errors import ConfigError

__all__ = ["DynamicScale"]

DYNAMIC = "dynamic"
# What float32 holds with all its digits. Powers of 2, so that they and all halves and doubles are exact.
SMALLEST, LARGEST = 2.0**-126, 2.0**127


@dataclass(frozen=True)
class DynamicScale:
    """A loss scale that adapts itself: `Config(loss_scale=jaxpipe.DynamicScale(window=500))`.

    Attributes:
      initial: the scale of the first step.
      window: so many steps in a row without overflow double the scale.
      minimum: the scale is never halved to less.
      hysteresis: of so many overflows the last one halves the scale, and each one after it; the count begins again when the
        scale is doubled. 1: every overflow does.

    Raises:
      ConfigError: a field is wrong.
    """

    initial: float = 2.0**16
    window: int = 2000
    minimum: float = 1.0
    hysteresis: int = 1

    def __post_init__(self):
        for name in ("initial", "minimum"):
            object.__setattr__(self, name, _scale(f"DynamicScale: {name}", getattr(self, name)))
        for name in ("window", "hysteresis"):
            object.__setattr__(self, name, count(f"DynamicScale: {name}", getattr(self, name)))
        if self.initial < self.minimum:
            raise ConfigError(
                f"DynamicScale: initial={self.initial} is below minimum={self.minimum}: begin at the minimum or above it."
            )

    def start(self) -> "ScaleState":
        """The state at step 0."""
        return ScaleState(jnp.float32(self.initial), jnp.int32(0), jnp.int32(self.hysteresis), jnp.int32(0))

    def after(self, state: "ScaleState", finite: jax.Array) -> "ScaleState":
        """The state after a step; traceable.

        The state may be one that another rule has left in a checkpoint: with more good steps than this window, or with a
        scale below this minimum, which an overflow then does not raise.

        Args:
          finite: bool [], whether loss and gradient of the step were finite.
        """
        good = jnp.where(finite, state.good + 1, 0)
        grows = good >= self.window
        falls = ~finite & (state.forgiven <= 1)
        doubled = jnp.minimum(state.scale, LARGEST / 2) * 2
        halved = jnp.minimum(state.scale, jnp.maximum(state.scale / 2, self.minimum))
        forgiven = jnp.where(finite | falls, state.forgiven, state.forgiven - 1)
        return ScaleState(
            scale=jnp.where(grows, doubled, jnp.where(falls, halved, state.scale)),
            good=jnp.where(grows, 0, good),
            forgiven=jnp.where(grows, self.hysteresis, forgiven),
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )


# What `Config(loss_scale=...)` takes, checked.
LossScale: TypeAlias = None | float | str | DynamicScale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScaleState:
    """What a dynamic loss scale remembers from step to step.

    Attributes:
      scale: that of the next step, float32 [].
      good: the steps since the last overflow or change, int32 [].
      forgiven: if it is more than 1, the next overflow leaves the scale as it is, int32 [].
      skipped: how many steps have overflowed, int32 [].
    """

    scale: jax.Array
    good: jax.Array
    forgiven: jax.Array
    skipped: jax.Array


def as_loss_scale(value: Any) -> LossScale:
    """A loss scale that a user has passed, numbers made floats.

    Raises:
      ConfigError: it is none.
    """
    if value is None or isinstance(value, DynamicScale) or (isinstance(value, str) and value == DYNAMIC):
        return value
    if isinstance(value, str) or value is DynamicScale or as_number(value) is None:
        hint = did_you_mean(value, [DYNAMIC]) if isinstance(value, str) else ""
        raise ConfigError(
            f"loss_scale={show(value)} must be None, a number above 0, 'dynamic', or a jaxpipe.DynamicScale(...).{hint}"
        )
    more = "; 'dynamic' finds the number by itself" if as_number(value) == 0 else ""
    return _scale("loss_scale", value, more)


def dynamic(value: LossScale) -> DynamicScale | None:
    """The rule of a loss scale that adapts itself; None for all others."""
    if isinstance(value, str):
        return DynamicScale()
    return value if isinstance(value, DynamicScale) else None


def first_scale(value: LossScale) -> float | None:
    """The scale of the first step; None if there is none."""
    rule = dynamic(value)
    return rule.initial if rule is not None else value  # pyright: ignore[reportReturnType]


def describe(value: LossScale) -> str:
    """A loss scale for people."""
    rule = dynamic(value)
    if rule is None:
        return f"{value:g}"
    told = [f"{each.name} {getattr(rule, each.name):g}" for each in fields(rule)]
    return f"dynamic ({', '.join(told)})"


def _scale(name: str, value: Any, more: str = "") -> float:
    number = as_number(value)
    if number is None or not SMALLEST <= number <= LARGEST:
        raise ConfigError(
            f"{name}={show(value)} must be a number above 0 that float32 holds ({SMALLEST:.0e} to {LARGEST:.0e}){more}."
        )
    return float(number)
