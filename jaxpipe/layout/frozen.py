"""Which params of a model are frozen, layer by layer."""

from collections.abc import Sequence
from typing import Self

import jax

from jaxpipe.model.module import PipelineModule
from jaxpipe.model.paths import layer_name
from jaxpipe.model.shapes import is_inexact
from jaxpipe.model.trainable import Trainable
from jaxpipe.types import Params, Tree


class Frozen:
    """What is frozen in the layers of a module.

    Args:
      owners: those of a `PipelineModule`.
      params: per layer, its own params, or their shapes.
      layers: per layer, whether each of these params has a derivative and is not trained.
    """

    def __init__(self, owners: Sequence[int], params: Sequence[Params], layers: Sequence[Tree]):
        self._owners, self._params, self.layers = owners, list(params), list(layers)

    @classmethod
    def of_model(cls, module: PipelineModule, params: Sequence[Params], trainable: Trainable) -> Self:
        """What a rule freezes; raises ConfigError if that is everything."""
        named = {layer_name(index): held for index, held in enumerate(params)}
        return cls(module.owners, params, trainable.frozen(named))

    @property
    def any(self) -> bool:
        """Whether anything is."""
        return any(jax.tree.leaves(self.layers))

    def of(self, layer: int) -> frozenset[int]:
        """The numbers of the frozen leaves, in order, of the params that a layer computes with."""
        frozen = jax.tree.leaves(self.layers[self._owners[layer]])
        return frozenset(number for number, is_frozen in enumerate(frozen) if is_frozen)

    def trains(self, layer: int) -> bool:
        """Whether any of the params that a layer computes with is trained."""
        frozen, leaves = self.of(layer), jax.tree.leaves(self._params[self._owners[layer]])
        return any(is_inexact(leaf) and number not in frozen for number, leaf in enumerate(leaves))


def hidden(frozen: Tree, tree: Tree) -> Tree:
    """A tree with None in the place of what is frozen; `frozen` says so for each leaf."""
    return jax.tree.map(lambda is_frozen, leaf: None if is_frozen else leaf, frozen, tree)
