"""Who takes part: each contestant does the same work from the same weights on the same batch, in its own way."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import model
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import jaxpipe

NAMES = {
    "1f1b": "1F1B",
    "eager_1f1b": "eager 1F1B",
    "gpipe": "GPipe",
    "interleaved": "interleaved",
    "looped_bfs": "looped BFS",
    "zero_bubble": "zero bubble",
    "interleaved_zero_bubble": "interleaved zero bubble",
    "zbv": "ZBV",
}


@dataclass
class Contestant:
    """One way to do the work.

    Attributes:
      make: from M to a jitted function of (params, inputs, labels).
      params: the weights, where the function wants them.
      home: where a batch has to lie: a device or a sharding.
      to_layers: from params or gradients to those of each layer.
    """

    name: str
    remat: str
    stages: int
    make: Callable[[int], Any]
    params: Any
    home: Any
    to_layers: Callable[[Any], list[Any]]


class Contestants:
    """Makes them. `few` is the M that is run."""

    def __init__(self, size: model.Size, few: int):
        self.size, self.few = size, few
        self.module = model.make_module(size)
        self.layers = model.make_layers(size)
        self.batch = model.make_batch(size, few)

    def plain(self, remat: str) -> Contestant:
        """Training on one device, no pipeline."""
        step, device = model.plain_train(self.size, remat), jax.devices()[0]
        params = jax.device_put(jax.tree.map(lambda *a: np.stack(a), *self.layers), device)
        return Contestant("plain loop", remat, 1, lambda count: step, params, device, self._unstack)

    def plain_evaluation(self) -> Contestant:
        """Evaluation on one device, no pipeline."""
        function = model.plain_evaluate(self.size)
        return replace(
            self.plain("none"), name="plain evaluation", remat="-", make=lambda count: function, to_layers=list
        )

    def pipeline(self, stages: int, remat: str, schedule: str = "1f1b", chunks: int = 1) -> Contestant:
        """Training with jaxpipe, on so many ranks (`stages`, of one chunk each unless more are asked for)."""
        mesh = jaxpipe.make_mesh(pipe=stages)

        def make(count: int) -> Any:
            pipe = self._plan(mesh, count, remat, schedule, chunks)
            return jax.jit(lambda params, inputs, labels: pipe.value_and_grad(params, (inputs, labels)))

        pipe = self._plan(mesh, self.few, remat, schedule, chunks)
        home = NamedSharding(mesh, PartitionSpec())
        return Contestant(NAMES[schedule], remat, stages, make, pipe.from_layers(self.layers), home, pipe.to_layers)

    def evaluation(self, stages: int) -> Contestant:
        """Evaluation with jaxpipe."""
        mesh = jaxpipe.make_mesh(pipe=stages)
        pipe = self._plan(mesh, self.few, "layer", "1f1b")
        function = jax.jit(lambda params, inputs, labels: pipe.evaluate(params, (inputs, labels)))
        home = NamedSharding(mesh, PartitionSpec())
        return Contestant("evaluation", "-", stages, lambda count: function, pipe.from_layers(self.layers), home, list)

    def _plan(
        self, mesh: jax.sharding.Mesh, count: int, remat: str, schedule: str, chunks: int = 1
    ) -> jaxpipe.Pipeline:
        pipe = jaxpipe.Pipeline(self.module, mesh, count, schedule, model.REMATS[remat], num_chunks=chunks)
        jax.eval_shape(pipe.init, jax.random.key(0), self.batch[0][0])  # cuts the module, makes no weights
        return pipe

    def autodiff(self, stages: int) -> Contestant:
        """Training with GPipe as `jax.grad` makes it."""
        mesh = jaxpipe.make_mesh(pipe=stages)
        step = model.autodiff_gpipe(self.size, mesh)
        params = jax.tree.map(lambda *a: np.stack(a).reshape(stages, -1, *a[0].shape), *self.layers)
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec("pipe")))
        home = NamedSharding(mesh, PartitionSpec())

        def to_layers(grads: Any) -> list[Any]:
            return self._unstack(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), grads))

        return Contestant("GPipe by autodiff", "layer", stages, lambda count: step, params, home, to_layers)

    def _unstack(self, tree: Any) -> list[Any]:
        return [jax.tree.map(lambda a, i=i: a[i], tree) for i in range(self.size.layers)]
