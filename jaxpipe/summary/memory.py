"""The table of bytes: what a device holds always, and what is added while a step runs."""

import math
from typing import Any

import jax

from jaxpipe.columns import short
from jaxpipe.executor.plan import TrainPlan
from jaxpipe.executor.weights import OWNED
from jaxpipe.layout.entries import Shared, Stack
from jaxpipe.layout.on_mesh import parts_of
from jaxpipe.mesh import DATA, PIPE
from jaxpipe.model.keys import KEY
from jaxpipe.pipeline import Pipeline
from jaxpipe.training.state import TrainState
from jaxpipe.types import Batch


def table(pipe: Pipeline, state: TrainState, plan: TrainPlan | None) -> list[list[str]]:
    """By category; the same on all devices, because stacks are padded and everything else is cut evenly, and because all
    run one program, in which each buffer is as large as the rank that needs most."""
    kept = {"weights": _bytes_on_a_device(state.params), "optimizer state": _bytes_on_a_device(state.opt_state)}
    if jax.tree.leaves(state.layer_state):
        kept["layer state"] = _bytes_on_a_device(state.layer_state)
    during = {} if plan is None else _during_a_step(pipe, plan)
    rows = [["bytes on each device", "always", "during a step"]]
    rows += [[name, short(size, "B"), ""] for name, size in kept.items()]
    rows += [[name, "", short(size, "B")] for name, size in during.items() if size]
    total = sum(kept.values())
    return [*rows, ["total", short(total, "B"), short(total + sum(during.values()), "B") if during else ""]]


def planned(pipe: Pipeline, example: Batch) -> TrainPlan | None:
    """The plan of a step; None if the example has no labels to plan with."""
    if example[1] is None and pipe.module.loss_fn is not None:
        return None
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((pipe.num_micro_batches, *a.shape), a.dtype), example)
    return pipe.plan(batch, KEY)


def _during_a_step(pipe: Pipeline, plan: TrainPlan) -> dict[str, int]:
    """What is added while a step runs, as it is planned."""
    bytes_of = plan.bytes_per_rank()
    own = sum(_size(leaf) for leaf in jax.tree.leaves(plan.weights.avals().get(OWNED, {})))
    gathered, cast = _gathered_and_cast(pipe, plan)
    return {
        "gradients": bytes_of["gradients"],
        "weights of its own, from all ranks": own,
        f"weights gathered from all {'data ' if pipe.layout.cuts_data else ''}ranks": gathered,
        f"weights cast to {pipe.precision.compute_dtype}": cast,
        "saved for the backward pass": bytes_of["saved"],
        "waiting between I and W": bytes_of.get("pending", 0),
        "messages between stages": bytes_of["messages"],
    }


def _gathered_and_cast(pipe: Pipeline, plan: TrainPlan) -> tuple[int, int]:
    """Of layers that no rank owns: the bytes of what is made whole for a step, and of what is only cast."""
    layout, gathered, cast = pipe.layout, 0, 0
    everywhere = plan.weights.everywhere
    entries: list[tuple[int, int, Stack | Shared]] = [(s.slots, min(s.places), s) for s in layout.stacks.values()]
    entries += [(1, shared.layer, shared) for name, shared in layout.shared.items() if name in everywhere]
    for count, layer, entry in entries:
        computed, placements = jax.tree.leaves(layout.computed_params[layer]), jax.tree.leaves(entry.placements)
        for a, b, placement in zip(jax.tree.leaves(entry.params), computed, placements, strict=True):
            size = count * _size(b) // parts_of(placement, pipe.mesh.shape)
            is_cut = placement.dim(PIPE) is not None or placement.dim(DATA) is not None
            gathered += size * is_cut
            cast += size * (a.dtype != b.dtype and not is_cut)
    return gathered, cast


def _size(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _bytes_on_a_device(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
