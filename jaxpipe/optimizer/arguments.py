"""What may be passed as an optimizer, and what its `update` is called with."""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax

from jaxpipe.errors import ConfigError, JaxpipeError
from jaxpipe.types import Tree


class Optimizer(NamedTuple):
    """An optimizer that has been checked.

    Attributes:
      takes: names of the extra arguments that its `update` takes; None: any.
    """

    init: Callable[[Tree], Tree]
    update: Callable[..., tuple[Tree, Tree]]
    takes: frozenset[str] | None


@contextlib.contextmanager
def plain_numpy_rules() -> Iterator[None]:
    """JAX as optax expects it: strict promotion modes of the user's program do not reach into it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def checked(optimizer: Any) -> Optimizer:
    """The optimizer in the form that the rest uses.

    Raises:
      ConfigError: it is no gradient transformation.
    """
    functions = getattr(optimizer, "init", None), getattr(optimizer, "update", None)
    if inspect.isclass(optimizer) or not all(map(callable, functions)):
        raise ConfigError(f"optimizer={optimizer!r} is no optax gradient transformation. {_way_out(optimizer)}")
    plain = isinstance(optimizer, optax.GradientTransformation)
    if plain and not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return Optimizer(optimizer.init, optimizer.update, frozenset())
    return Optimizer(optimizer.init, optimizer.update, _named(optimizer.update))


def fitted(optimizer: Optimizer, params: Tree) -> tuple[Optimizer, Tree]:
    """The optimizer, and the shapes of its state for `params`, a tree of shapes.

    `optax.lookahead` wants pairs of fast and slow weights. Where it is given one set, those are the fast weights, and the
    slow ones become part of its state.
    """
    with plain_numpy_rules():
        state = jax.eval_shape(optimizer.init, params)
        if not isinstance(state, optax.LookaheadState) or hasattr(params, "fast"):
            return optimizer, state
        kept = _with_slow_weights(optimizer)
        return kept, jax.eval_shape(kept.init, params)


class SlowWeights(NamedTuple):
    """State of a lookahead that keeps its slow weights itself."""

    lookahead: Any
    slow: Tree


def _with_slow_weights(optimizer: Optimizer) -> Optimizer:
    pair: Any = optax.LookaheadParams

    def init(params: Tree) -> SlowWeights:
        return SlowWeights(optimizer.init(pair(params, params)), params)

    def update(grads: Tree, state: SlowWeights, params: Tree) -> tuple[Tree, SlowWeights]:
        updates: Any
        updates, lookahead = optimizer.update(grads, state.lookahead, pair(params, state.slow))
        return updates.fast, SlowWeights(lookahead, optax.apply_updates(state.slow, updates.slow))

    return Optimizer(init, update, frozenset())


def _way_out(optimizer: Any) -> str:
    if optimizer is None:
        return "Pass one, such as optax.adam(1e-3); optax.set_to_zero() trains nothing."
    if isinstance(optimizer, (int, float)):
        return f"It is a number. Pass a transformation made with it: optax.adam({optimizer!r})."
    if callable(optimizer):
        name = getattr(optimizer, "__name__", "")
        name = name if inspect.isfunction(optimizer) and hasattr(optax, name) else "adam"
        return (
            f"It is callable: a function that makes one has to be called, as in optax.{name}(1e-3), and a learning rate "
            "schedule goes into one, as in optax.adam(schedule)."
        )
    return "It needs the functions init(params) and update(grads, state, params), as optax.adam(1e-3) has."


def _named(update: Callable[..., Any]) -> frozenset[str] | None:
    """The keywords that `update` takes beside (updates, state, params); None if it takes any."""
    try:
        parameters = list(inspect.signature(update).parameters.values())
    except (TypeError, ValueError):
        return frozenset()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    by_name = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return frozenset(by_name[3:]) | {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def calling(optimizer: Optimizer, extra: dict[str, Any]) -> dict[str, Any]:
    """The part of `extra` that its `update` takes."""
    return {name: value for name, value in extra.items() if optimizer.takes is None or name in optimizer.takes}


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    """Around the first trace of an optimizer: says what is wrong if it needs what a training step cannot give.

    Other errors are the optimizer's own, and stay as they are, with a note on where they came from.
    """
    try:
        yield
    except JaxpipeError:
        raise
    except Exception as error:
        if isinstance(error, AttributeError) and error.name in ("fast", "slow"):
            raise ConfigError(
                "optax.lookahead is given pairs of fast and slow weights if it is the optimizer itself, and not inside of "
                "another one, such as a chain. Put it outside: optax.lookahead(optax.chain(...), ...)."
            ) from error
        if missing := _missing(error):
            raise ConfigError(
                f"The optimizer's update needs the argument {', '.join(map(repr, missing))}, which a training step cannot "
                "give. It gives gradients and params and, if named, 'value' (the loss) and 'grad' (its gradient). Line "
                "searches and the like evaluate the loss again and again; use a transformation without one."
            ) from error
        error.add_note(
            "jaxpipe: this happened inside the optimizer, which was traced on the shapes of one entry per layer, "
            '{"layer_000": {...}, ...}.'
        )
        raise


def _missing(error: Exception) -> list[str]:
    """The arguments that an `update` complains about; none if it is not the optimizer that does."""
    trace, message = error.__traceback__, str(error)
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "jaxpipe":
        return []
    if isinstance(error, TypeError) and (found := re.search(r"missing \d+ required .*argument", message)):
        return re.findall(r"'(\w+)'", message[found.start() :])
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str) and error.args[0].isidentifier():
        return [error.args[0]]
    return re.findall(r"^(\w+) must be provided", message) if isinstance(error, ValueError) else []
