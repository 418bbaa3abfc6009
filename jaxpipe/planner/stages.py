"""From layers to stages: where the model is cut, what each stage costs, and what it keeps."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpipe.model.partition import balanced
from jaxpipe.model.shapes import signature
from jaxpipe.planner.candidate import Candidate
from jaxpipe.planner.cost import Costs
from jaxpipe.planner.walk import OpCosts

_SUM = 4  # bytes of a number in a sum of gradients, which are float32


class Layers(NamedTuple):
    """What each layer costs, [layers, 3] seconds (compute, memory, link) and [layers] bytes.

    Attributes:
      forward, input, weight: of F, I and W, for a layer that is in a stage and not in the tail.
      tail: of B of a layer in the tail, where F is in it.
      saved, pending, work: as in `LayerCost`; `everything` is what is saved under the mode "none".
      output: what it hands on.
    """

    forward: np.ndarray
    input: np.ndarray
    weight: np.ndarray
    tail: np.ndarray
    saved: np.ndarray
    pending: np.ndarray
    work: np.ndarray
    everything: np.ndarray
    output: np.ndarray


class Stages(NamedTuple):
    """What the stages cost, of one micro-batch.

    Attributes:
      ops: seconds of each op.
      kinds: [stages, 3], seconds of all ops of a stage: compute, memory, link.
      saved, pending: [stages], bytes, without the input of the tail; that is `tail`.
      programs: for each stage, the first one that runs the same program.
      work: bytes that an op makes while it runs, at most.
      message: bytes of what travels between stages, at most.
    """

    ops: OpCosts
    kinds: np.ndarray
    saved: np.ndarray
    pending: np.ndarray
    tail: float
    programs: tuple[int, ...]
    work: float
    message: float


class Cutter:
    """Cuts a model on a chip into stages.

    Args:
      costs: of its layers.
    """

    def __init__(self, costs: Costs):
        self.costs, self.model = costs, costs.model
        self.layers = functools.lru_cache(maxsize=4096)(self._layers)
        self.loss_seconds = functools.cache(costs.loss_seconds)
        self.boundaries = functools.cache(self._boundaries)
        self.total = functools.cache(self._total)
        self.first_of_tail = costs.num_layers - self.model.module.costs.tail_length(self.model.shapes)

    def _layers(self, keeps: str, rows: int, size: int) -> Layers:
        chip, found = self.costs.chip, dict[int, list[Any]]()
        weights = self.costs.weights(size)
        owners, likes = self.model.module.owners, self.model.likes
        for like in sorted(set(likes)):
            cost, plain = self.costs.layer(like, keeps, size), self.costs.layer(like, "none", size)
            forward, back, part = self.costs.seconds(like, keeps, rows, size)
            # F writes what is kept, and its first reader reads it; each gradient is added to a sum in memory.
            kept = np.array([0, cost.saved.at(rows) / chip.bandwidth, 0])
            sums = np.array([0, 2 * _SUM * weights[owners[like]].numbers / chip.bandwidth, 0])
            rest = np.maximum(back - part, 0)
            whole = sum(self.costs.seconds(like, "none", rows, size)[:2])
            saved = cost.saved.at(rows)
            if like == 0 and self.model.module.owners.count(0):
                saved -= cost.inputs.at(rows)  # the batch has it
            has_input = bool(part.any())
            first = [forward + kept, part + kept * has_input, rest + kept * (not has_input) + sums]
            second = [saved, cost.pending.at(rows), cost.work.at(rows), plain.saved.at(rows), cost.output.at(rows)]
            found[like] = [*first, whole + sums, *second]
        columns = zip(*(found[like] for like in likes), strict=True)
        return Layers(*(np.array(column) for column in columns))

    def _boundaries(self, num_stages: int, keeps: str, size: int) -> tuple[int, ...]:
        """The cuts: those that the module asks for, or else the ones that balance the seconds of a micro-batch.

        Raises:
          PartitionError: the model cannot be cut so often.
        """
        module = self.model.module
        if module.partition_method is not None:
            return module.partition_from(num_stages, lambda: self.model.shapes)
        rows = self.model.rows
        layers = self.layers(keeps, rows, size)
        seconds = (layers.forward + layers.input + layers.weight).sum(1)
        seconds[self.first_of_tail :] = layers.tail[self.first_of_tail :].sum(1)
        seconds[-1] += self.loss_seconds(rows, size).sum()
        return balanced([float(f"{second:.6e}") for second in seconds], num_stages)

    def useful_flops(self, rows: int) -> float:
        """Operations of a micro-batch on one data rank that the model needs: nothing is computed twice."""
        layers = (self.costs.layer(like, "none", 1) for like in self.model.likes)
        return sum(layer.forward.flops(rows) + layer.backward.flops(rows) for layer in layers)

    def _total(self, keeps: str, rows: int, size: int) -> tuple[float, float]:
        """Seconds of one micro-batch in all stages together, and in the dearest layer."""
        layers = self.layers(keeps, rows, size)
        each = (layers.forward + layers.input + layers.weight).sum(1)
        each[self.first_of_tail :] = np.minimum(each, layers.tail.sum(1))[self.first_of_tail :]
        return float(each.sum() + self.loss_seconds(rows, size).sum()), float(each.max())

    def least(self, keeps: str, rows: int, size: int) -> tuple[float, float]:
        """Bytes that all layers which are in no tail save, and of the work of the one among them that makes most."""
        layers, body = self.layers(keeps, rows, size), slice(0, self.first_of_tail)
        return float(layers.saved[body].sum()), float(layers.work[body].max(initial=0.0))

    def stages(self, candidate: Candidate, boundaries: Sequence[int]) -> Stages:
        """What the stages cost."""
        size, rows = candidate.mesh.model, candidate.rows
        layers = self.layers(candidate.keeps, rows, size)
        starts, tail = list(boundaries[:-1]), max(boundaries[-2], self.first_of_tail)
        in_tail = np.arange(len(layers.saved)) >= tail
        body = ~in_tail[:, None]
        f, i, w = (np.add.reduceat(part * body, starts) for part in (layers.forward, layers.input, layers.weight))
        behind = (layers.tail * in_tail[:, None]).sum(0) + self.loss_seconds(rows, size)
        # Of the tail, a third is forward; the rest is taken to be I and W alike, as of a product. All of I waits for F.
        i[-1] += behind * 2 / 3
        w[-1] += behind / 3
        saved = np.add.reduceat(layers.saved * ~in_tail, starts)
        inputs = np.concatenate([[self.costs.model.batch_bytes * rows], layers.output])[starts]
        if candidate.remat == "stage":
            saved = inputs * (np.arange(len(starts)) > 0) * (np.array(starts) < tail)
        pending = np.add.reduceat(layers.pending, starts)
        parts = [
            (start == 0, stop == len(self.model.likes), self.model.likes[start:stop])
            for start, stop in zip(boundaries, boundaries[1:], strict=False)
        ]
        programs = tuple(parts.index(part) for part in parts)
        tail_input = float(layers.output[tail - 1]) if tail else 0.0
        work = float((layers.work * ~in_tail).max())
        if candidate.remat == "stage":
            work += float(np.add.reduceat(layers.everything * ~in_tail, starts).max())
        loss = self.costs.loss(size)
        last = (layers.everything * in_tail).sum() + max((layers.work * in_tail).max(), loss.work.at(rows))
        message = float(layers.output[[stop - 1 for stop in boundaries[1:-1]]].max()) if len(starts) > 1 else 0.0
        ops = OpCosts(f.sum(1), i.sum(1), w.sum(1))
        return Stages(ops, f + i + w, saved, pending, tail_input, programs, max(work, float(last)), message)


def groups(costs: Costs) -> list[int]:
    """For each layer with weights of its own a number that is equal for layers of one stack; -1 for layers without."""
    model, seen = costs.model, dict[Any, int]()
    found: list[int] = []
    for index, (layer, shape) in enumerate(zip(model.module.layers, model.shapes, strict=True)):
        owned = model.module.owners[index] == index and bool(jax.tree.leaves(shape.params))
        alone = index if layer.tie is not None else -1
        key = layer.kind, signature((shape.params, shape.computed)), alone
        found.append(seen.setdefault(key, index) if owned else -1)
    return found
