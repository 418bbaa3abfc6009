"""Checks what users pass as an optimizer, and decides which arguments its `update` is called with."""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax

from jaxpipe.errors import ConfigError, JaxpipeError
from jaxpipe.types import Avals, Tree


class Optimizer(NamedTuple):
    """An optimizer that has been checked.

    Attributes:
      init: params -> state.
      update: (gradients, state, params, **extra) -> (updates, state).
      takes: the names of the extra arguments that `update` takes; None if it takes any.
    """

    init: Callable[[Tree], Tree]
    update: Callable[..., tuple[Tree, Tree]]
    takes: frozenset[str] | None


@contextlib.contextmanager
def plain_numpy_rules() -> Iterator[None]:
    """Sets the promotion rules that optax expects, so that stricter modes of the user's program do not reach into it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def checked(optimizer: Any) -> Optimizer:
    """Returns the user's optimizer in the form that the rest of this folder uses.

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


def fitted(optimizer: Optimizer, params: Avals) -> tuple[Optimizer, Avals]:
    """Fits an optimizer to the params that it will be given.

    `optax.lookahead` wants pairs of fast and slow weights. If it is given one set of weights, these are the fast ones, and
    the slow ones become part of its state.

    Args:
      params: a tree of shapes.

    Returns:
      The optimizer to use, and the shapes of its state for `params`.
    """
    with plain_numpy_rules():
        state = jax.eval_shape(optimizer.init, params)
        if not isinstance(state, optax.LookaheadState) or hasattr(params, "fast"):
            return optimizer, state
        kept = _with_slow_weights(optimizer)
        return kept, jax.eval_shape(kept.init, params)


class SlowWeights(NamedTuple):
    """State of a lookahead that keeps its slow weights itself."""

    lookahead: Tree
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


def calling(optimizer: Optimizer, extra: dict[str, Tree]) -> dict[str, Tree]:
    """The arguments among `extra` that the `update` of the optimizer takes."""
    return {name: value for name, value in extra.items() if optimizer.takes is None or name in optimizer.takes}


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    """Goes around the first trace of an optimizer, and explains its errors.

    Errors of the optimizer itself are raised as they are, with a note that says where they came from.

    Raises:
      ConfigError: the optimizer needs arguments that a training step cannot give.
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
    """The names of the arguments that an `update` misses; empty if the error says something else, or is jaxpipe's own."""
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
