"""Seconds and bytes of each layer on one chip, for any number of rows: what the traces cost at the published speeds.

Seconds come in three kinds: those of the products at the peak ("compute"), what an equation takes longer than that because
of its bytes ("memory"), and sums over the axis "model" ("link").
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.sharding import AbstractMesh

from jaxpipe.hardware.chips import Chip
from jaxpipe.hardware.live import peak
from jaxpipe.layout.on_mesh import own_spec
from jaxpipe.mesh import DATA, PIPE
from jaxpipe.planner.counts import Term, count
from jaxpipe.planner.cuts import WHOLE, Cut, is_cut
from jaxpipe.planner.links import scatter
from jaxpipe.planner.measured import Measured, Source
from jaxpipe.planner.trace import Both, Model, Traced

MODEL = "model"


class Linear(NamedTuple):
    """A number that is `fixed + slope * rows`."""

    fixed: float
    slope: float

    @classmethod
    def of(cls, small: float, large: float, rows: int) -> "Linear":
        """From its values for some rows and for twice as many."""
        slope = (large - small) / rows
        return cls(max(small - slope * rows, 0.0), slope)

    def at(self, rows: float) -> float:
        """The value for some rows."""
        return self.fixed + self.slope * rows


class Phase:
    """The equations of one op of a layer; each grows with the rows."""

    def __init__(self, small: Sequence[Term], large: Sequence[Term], rows: int):
        first = np.array(small, float).reshape(-1, 3)
        # Equations that depend on the number of rows: all costs are taken to be proportional to it.
        second = np.array(large, float).reshape(-1, 3) if len(small) == len(large) else 2 * first
        self.slope = (second - first) / rows
        self.fixed = np.maximum(first - self.slope * rows, 0)

    def flops(self, rows: float) -> float:
        """Operations of one device."""
        return float((self.fixed[:, 0] + self.slope[:, 0] * rows).sum())

    def seconds(self, rows: float, chip: Chip, size: int) -> np.ndarray:
        """[3]: compute, memory, link."""
        flops, passed, summed = (self.fixed + self.slope * rows).T
        work, move = flops / chip.peak_flops, passed / chip.bandwidth
        link = 2 * summed.sum() * scatter(chip, size, 1)
        return np.array([work.sum(), np.maximum(move - work, 0).sum(), link])


@dataclass(frozen=True)
class LayerCost:
    """One layer under one mode on one device of the axis "model".

    Attributes:
      forward, backward, input: the phases; `input` is that part of `backward` which the gradient of the input needs.
      saved: bytes that F keeps; `inputs` are those of them that are inputs of the layer.
      pending: bytes that wait between I and W.
      work: bytes that the backward makes while it runs, at most.
      output: bytes of what it hands on.
    """

    forward: Phase
    backward: Phase
    input: Phase
    saved: Linear
    inputs: Linear
    pending: Linear
    work: Linear
    output: Linear


class Weights(NamedTuple):
    """The weights that a layer owns, on one device of the axis "model": how many, and bytes of them as a step computes."""

    numbers: float
    computed: float
    cut: bool


class Costs:
    """The costs of a model on a chip.

    Args:
      model: the traces.
      chip: what its maker publishes.
      source: measures layers; None: they take what their operations and bytes take at the speeds of the chip.
    """

    def __init__(self, model: Model, chip: Chip, source: Source | None = None):
        self.model, self.chip, self.rows = model, chip, model.rows
        self.source = "operations and bytes at the published speeds" if source is None else source.name
        self.measured: dict[tuple[int, str], Measured] = {}
        self.measured_loss: Measured | None = None
        if source is not None:
            self.measured = {name: source.measure(both.small) for name, both in model.layers.items()}
            self.measured_loss = source.measure(model.loss.small)
        self.layer = functools.cache(self._layer)
        self.loss = functools.cache(self._loss)
        self.weights = functools.cache(self._weights)

    def seconds(self, like: int, keeps: str, rows: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[3] each, compute, memory and link: of the forward, of the whole backward, and of I in it."""
        cost = self.layer(like, keeps, size)
        forward, back, part = (p.seconds(rows, self.chip, size) for p in (cost.forward, cost.backward, cost.input))
        if (like, keeps) in self.measured:
            share = rows / self.rows / (size if self.weights(size)[self.model.module.owners[like]].cut else 1)
            found, whole = self.measured[like, keeps], cost.backward.flops(rows)
            first = cost.input.flops(rows) / whole if whole else float(bool(part.any()))
            forward = np.array([found.forward * share, 0, forward[2]])
            back = np.array([found.backward * share, 0, back[2]])
            part = np.array([found.backward * share * first, 0, part[2]])
        return forward, back, part

    def loss_seconds(self, rows: int, size: int) -> np.ndarray:
        """[3]: of the loss and its gradient."""
        if self.measured_loss is not None:
            return np.array([self.measured_loss.backward * rows / self.rows, 0, 0])
        return self.loss(size).backward.seconds(rows, self.chip, size)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.model.likes)

    def specs(self, size: int) -> Callable[..., object]:
        """How the rules of the module cut its params over so many devices; raises ShardingError if they do not divide."""
        axes = dict.fromkeys(sorted(self.model.module.axes | {MODEL}), 1) | {MODEL: size}
        mesh = AbstractMesh((1, 1, *axes.values()), (PIPE, DATA, *axes))
        return own_spec(self.model.module, mesh, [shape.params for shape in self.model.shapes])  # type: ignore[arg-type]

    def _weights(self, size: int) -> list[Weights]:
        specs, shapes = self.specs(size) if size > 1 else None, self.model.shapes
        found: list[Weights] = []
        for index, shape in enumerate(shapes):
            numbers = computed = 0.0
            any_cut = False
            leaves = jax.tree_util.tree_flatten_with_path(shape.params)[0]
            for (path, leaf), used in zip(leaves, jax.tree.leaves(shape.computed), strict=True):
                cut = specs is not None and any(specs(index, path, leaf) or ())  # type: ignore[arg-type]
                parts = size if cut else 1
                numbers, computed = numbers + leaf.size / parts, computed + used.size * used.dtype.itemsize / parts
                any_cut |= cut
            found.append(Weights(numbers, computed, any_cut))
        return found

    def _param_cuts(self, index: int, size: int) -> list[Cut]:
        """Of each leaf of the params that a layer computes with, the dims that the axis cuts."""
        owner = self.model.module.owners[index]
        leaves = jax.tree_util.tree_flatten_with_path(self.model.shapes[owner].params)[0]
        if size == 1:
            return [WHOLE] * len(leaves)
        specs = self.specs(size)
        return [
            frozenset(dim for dim, axes in enumerate(specs(owner, path, leaf) or ()) if axes)  # type: ignore[arg-type]
            for path, leaf in leaves
        ]

    def _layer(self, like: int, keeps: str, size: int) -> LayerCost:
        both, cuts = self.model.layers[like, keeps], self._param_cuts(like, size)
        return _cost(both, cuts, size, self.rows, self.model.shapes[like].outputs)

    def _loss(self, size: int) -> LayerCost:
        """That of the loss. Where the last layer is cut, its outputs are taken to be cut, too."""
        last = self.model.likes[-1]
        cut = any(map(is_cut, _results(self.model.layers[last, "none"].small, self._param_cuts(last, size), size)))
        return _cost(self.model.loss, [None] if cut else [], size, self.rows, ())


def _results(traced: Traced, cuts: Sequence[Cut], size: int) -> list[Cut]:
    """How the results of a forward are cut."""
    return count(traced.forward, _padded(cuts, traced.forward), size)[1]


def _padded(cuts: Sequence[Cut], jaxpr: ClosedJaxpr) -> list[Cut]:
    missing = len(jaxpr.jaxpr.invars) - len(cuts)
    return [*cuts, *[WHOLE] * missing][: len(jaxpr.jaxpr.invars)]


def _cost(both: Both, cuts: Sequence[Cut], size: int, rows: int, outputs: object) -> LayerCost:
    small, large = (_counted(traced, cuts, size) for traced in both)
    forward, back, part = (Phase(a, b, rows) for a, b in zip(small.phases, large.phases, strict=True))
    saved, inputs, pending, work = (Linear.of(a, b, rows) for a, b in zip(small.bytes, large.bytes, strict=True))
    handed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(outputs))
    return LayerCost(forward, back, part, saved, inputs, pending, work, Linear(0.0, handed / rows))


class _Counted(NamedTuple):
    """For one number of rows: the terms of forward, backward and I, and the bytes of a `LayerCost`, in its order."""

    phases: tuple[list[Term], list[Term], list[Term]]
    bytes: tuple[float, float, float, float]


def _counted(traced: Traced, cuts: Sequence[Cut], size: int) -> _Counted:
    forward, results = count(traced.forward, _padded(cuts, traced.forward), size)
    kept = results[traced.num_outputs :]
    given = _padded([*cuts, *kept], traced.backward)
    backward, _ = count(traced.backward, given, size)
    first = [number >= traced.num_gradients for number in range(len(traced.backward.jaxpr.outvars))]
    part, _ = count(traced.backward, given, size, first) if traced.saved else ([], [])
    bytes_of = [
        leaf.size * leaf.dtype.itemsize / (size if is_cut(cut) else 1)
        for leaf, cut in zip(traced.saved, kept, strict=False)
    ]
    share = 1 / size if any(map(is_cut, given)) else 1.0
    waiting = traced.pending * share
    work = peak(traced.backward.jaxpr) * share
    kept_bytes = sum(bytes_of), sum(bytes_of[: traced.num_inputs])
    return _Counted((forward, backward, part), (*kept_bytes, waiting, work))
