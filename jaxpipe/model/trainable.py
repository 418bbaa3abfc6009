"""Which params are trained. The others are frozen: they have no gradient, no sum of gradients and no optimizer state."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import jax
import numpy as np

from jaxpipe.checks import show
from jaxpipe.errors import ConfigError
from jaxpipe.model.paths import param_path
from jaxpipe.model.precision import as_rule
from jaxpipe.model.shapes import is_inexact
from jaxpipe.types import Params, Tree

# What users pass: a regular expression, or a function of a path that says whether the param is trained.
TrainableOption: TypeAlias = str | Callable[[str], bool] | None
_LONGEST_LIST = 8  # how many paths a message shows


@dataclass(frozen=True)
class Trainable:
    """The rule of a pipeline.

    Attributes:
      rule: None trains everything that has a derivative.
    """

    rule: TrainableOption = None

    @classmethod
    def of(cls, rule: Any) -> Self:
        """The rule that a user has passed.

        Raises:
          ConfigError: it is neither a regular expression nor a function.
        """
        return cls(rule if callable(rule) else as_rule("trainable", rule))  # type: ignore[arg-type]

    def frozen(self, layers: Mapping[str, Params]) -> list[Tree]:
        """For each layer, whether each of its params is frozen, in their structure.

        Integers and the like, which no step changes anyway, are not counted as frozen.

        Args:
          layers: by the name of the layer, its own params, or their shapes.

        Raises:
          ConfigError: nothing would be trained, or the function does not return a bool.
        """
        if self.rule is None:
            return [jax.tree.map(lambda _: False, held) for held in layers.values()]
        seen: dict[str, bool] = {}

        def one(path: Any, leaf: Any, name: str) -> bool:
            if not is_inexact(leaf):
                return False
            text = param_path(name, path)
            seen[text] = self._trains(text)
            return not seen[text]

        found = [
            jax.tree_util.tree_map_with_path(lambda path, leaf, name=name: one(path, leaf, name), held)
            for name, held in layers.items()
        ]
        if not any(seen.values()):
            more = f" and {len(seen) - _LONGEST_LIST} more" if len(seen) > _LONGEST_LIST else ""
            listed = ", ".join(list(seen)[:_LONGEST_LIST]) or "none"
            what = (
                f"trainable={self.rule!r} is found in the path of no param that has a gradient"
                if isinstance(self.rule, str)
                else f"trainable={show(self.rule)} says False for every param"
            )
            raise ConfigError(
                f"{what}, so that nothing would be trained. The paths are {listed}{more}; a regular expression is searched "
                "for in these (re.search). Correct it, or leave it out to train everything."
            )
        return found

    def _trains(self, path: str) -> bool:
        if isinstance(self.rule, str):
            return re.search(self.rule, path) is not None
        assert self.rule is not None
        said = self.rule(path)
        if not isinstance(said, (bool, np.bool_)):
            raise ConfigError(
                f"trainable={show(self.rule)} returned {show(said)} for the path {path!r}: it is a function of a path that "
                "returns whether the param is trained, True or False."
            )
        return bool(said)


EVERYTHING = Trainable()
