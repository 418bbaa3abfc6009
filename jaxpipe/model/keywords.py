"""Decides which of the keywords `key`, `train`, `deterministic`, `cache` and `position` a layer is given.

A name alone is not enough: in `def scale(x, train=2.5)` it belongs to a number. `train` and `deterministic` are flags if
their default is a bool or None, or if they have no default. `key` is a PRNG key if its default is None, or if it has no
default. `cache` and `position`, with such a default, are what a layer is given while tokens are generated, and None
otherwise. A keyword that a `functools.partial` has set stays as it is.
"""

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")
FLAGS = ("train", "deterministic")
GENERATING = ("cache", "position")
_BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Keywords:
    """The keywords that one function is given.

    Attributes:
      by_position: the keywords that directly follow the data. They are passed by position, because `jax.checkpoint` and
        the `remat` of flax know static arguments by position only.
      by_name: the other keywords.
    """

    by_position: tuple[str, ...] = ()
    by_name: tuple[str, ...] = ()

    def __contains__(self, name: object) -> bool:
        return name in self.by_position or name in self.by_name

    def __bool__(self) -> bool:
        return bool(self.by_position or self.by_name)

    def arguments(self, values: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """What to pass behind the data: `function(*data, *positions, **names)`."""
        return [values[name] for name in self.by_position], {name: values[name] for name in self.by_name}


def keywords_of(
    function: Callable[..., object],
    num_data: int,
    names: Collection[str] = ("key", *FLAGS, *GENERATING),
    none_is_unset: Collection[str] = ("key", *FLAGS, *GENERATING),
) -> Keywords:
    """The keywords that `function` takes after its first `num_data` parameters.

    Args:
      names: the keywords to look for.
      none_is_unset: the keywords for which the default None means that the caller decides.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())[num_data:]
    except (TypeError, ValueError):  # some built-in functions have no signature
        return Keywords()
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    by_position, by_name = _accepted(function, num_data)
    positions: list[str] = []
    rest: list[str] = []
    directly = True  # so far, every parameter after the data is one of the keywords
    for parameter in parameters:
        name = parameter.name
        wanted = name in names and name not in fixed and _is_ours(parameter, name in none_is_unset)
        directly = directly and wanted and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if wanted and directly and by_position(name):
            positions.append(name)
        elif wanted and by_name(name):
            directly = False
            rest.append(name)
    return Keywords(tuple(positions), tuple(rest))


def _is_ours(parameter: inspect.Parameter, none_is_unset: bool) -> bool:
    if parameter.kind not in _BY_NAME:
        return False
    if parameter.default is inspect.Parameter.empty:
        return True
    if parameter.default is None:
        return none_is_unset
    return parameter.name in FLAGS and isinstance(parameter.default, (bool, np.bool_))


def _accepted(function: Callable[..., object], num_data: int) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
    """Two functions that say whether a name can be passed to `function` by position, and whether by name.

    `inspect.signature` shows the signature of the function that a decorator wraps, but the wrapper may accept less.
    """
    try:
        outer = list(inspect.signature(function, follow_wrapped=False).parameters.values())
    except (TypeError, ValueError):
        return (lambda name: True), (lambda name: True)
    kinds = {parameter.kind for parameter in outer}
    named = {parameter.name: parameter.kind for parameter in outer[num_data:]}
    positional = inspect.Parameter.VAR_POSITIONAL in kinds
    keyword = inspect.Parameter.VAR_KEYWORD in kinds
    return (
        lambda name: positional or named.get(name) is inspect.Parameter.POSITIONAL_OR_KEYWORD,
        lambda name: keyword or named.get(name) in _BY_NAME,
    )
