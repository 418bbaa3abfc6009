"""What the layers of a rank are given, and give, beside params, input and output, from the side of the ops.

A rank carries one `Aux` through its ticks: the state of its layers, and what their extra losses and metrics have come to.
An op makes the contexts of a unit's parts from it, and records in it what the parts have given.
"""

from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.executor import states
from jaxpipe.executor.residence import Repeat
from jaxpipe.layout.stages import Part
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.metrics import Joined
from jaxpipe.types import Key


def contexts(
    parts: Sequence[Part], beside: Aux, key: Key | None, first_layer: jax.Array | None, repeat: Repeat
) -> list[Context]:
    """Per part, what its repetition `repeat` is given.

    Args:
      beside: what the rank carries.
      key: that of the micro-batch, or None.
      first_layer: index of the first layer of the stage, int32; it matters for the key only.
    """

    def one(part: Part) -> Context:
        state = states.take(beside.state, part, repeat)
        if key is None or first_layer is None:
            return Context(None, state)
        return Context(part.keys(key, first_layer + part.offset + repeat * part.count), state)

    return [one(part) for part in parts]


def start(layers: Iterable[Aux], more: Mapping[str, Joined]) -> Aux:
    """What a rank carries before its first tick: sums of nothing.

    Args:
      layers: abstract values of what each layer of the model gives.
      more: those of other metrics that are joined with them.
    """
    losses: dict[str, jax.Array] = {}
    metrics = dict(more)
    for aux in layers:
        for name, loss in aux.losses.items():
            dtypes = [loss.dtype, *([losses[name].dtype] if name in losses else [])]
            losses[name] = jnp.zeros((), np.result_type(*dtypes))  # whatever promotion the user has set
        metrics.update(aux.metrics)
    return Aux(losses=losses, metrics={name: joined.blank() for name, joined in metrics.items()})


def record(beside: Aux, parts: Sequence[Part], repeat: Repeat, found: Sequence[Aux]) -> Aux:
    """What the rank carries, with what one repetition of some parts has given, per part.

    State is changed where it lies. Losses of one name are added up and metrics of one name are joined, over layers as over
    micro-batches. What the rank does not carry, because nobody wants it, is left out.
    """
    state, losses, metrics = beside.state, dict(beside.losses), dict(beside.metrics)
    for part, aux in zip(parts, found, strict=True):
        state = states.put(state, part, repeat, aux.state)
        several = part.count > 1  # then leaves have a leading dim
        for name in aux.losses.keys() & losses.keys():
            loss = aux.losses[name].sum(0) if several else aux.losses[name]
            losses[name] += loss.astype(losses[name].dtype)
        for name in aux.metrics.keys() & metrics.keys():
            joined = aux.metrics[name]
            metrics[name] += joined.over_first_dim() if several else joined
    return beside._replace(state=state, losses=losses, metrics=metrics)


def joined(beside: Aux, more: Mapping[str, Joined]) -> Aux:
    """What the rank carries, with other metrics of a micro-batch joined to it, as far as they are wanted."""
    wanted = {name: beside.metrics[name] + each for name, each in more.items() if name in beside.metrics}
    return beside._replace(metrics={**beside.metrics, **wanted})
