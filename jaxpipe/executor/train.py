"""Loss and gradients of one batch: the ops F and B of a training step, and what they carry from tick to tick."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpipe.executor import loop, reduce
from jaxpipe.executor.batch import pick
from jaxpipe.executor.job import Device, on_every_device
from jaxpipe.executor.plan import TrainPlan
from jaxpipe.executor.stage_program import MicroBatch, StageProgram
from jaxpipe.executor.store import Buffers
from jaxpipe.executor.unit import split_inexact
from jaxpipe.lowering.channels import DX, Y
from jaxpipe.lowering.program import SAVED
from jaxpipe.lowering.rows import Now
from jaxpipe.mesh import DATA, PIPE, data_size
from jaxpipe.model import keys
from jaxpipe.model.loss import over, weight_from_labels
from jaxpipe.types import Batch, Key, Params

P = PartitionSpec


class StepResult(NamedTuple):
    """What a training step computes.

    Attributes:
      loss: the mean loss, a scalar on all devices.
      grads: its gradient, in the structure and the sharding of the params tree.
    """

    loss: jax.Array
    grads: Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    """What a device carries from tick to tick.

    Attributes:
      buffers: what forwards have kept for backwards.
      grads: the sums of gradients of what the rank holds.
      total: the sum of the losses of its micro-batches.
    """

    buffers: Buffers
    grads: Params
    total: jax.Array


def value_and_grad(
    plan: TrainPlan, params: Params, batch: Batch, key: Key | None, *, poison: bool = False
) -> StepResult:
    """Loss and gradient; traceable.

    Args:
      params: the params tree.
      batch: leaves [M, B, ...], B the rows of one micro-batch on all data ranks.
      key: of the step, for dropout; None switches dropout off.
      poison: fill what nothing was written to with NaN, for tests.
    """
    specs: Any = P(), plan.layout.specs
    return on_every_device(
        lambda device, held, inputs, labels, key: _Step(plan, device, held, (inputs, labels), key, poison).run(),
        plan.weights,
        params,
        batch,
        key,
        specs=(P(),),
        out_specs=StepResult(*specs),
    )


@dataclass
class _Step:
    """A step on one device; inside `shard_map`."""

    plan: TrainPlan
    device: Device
    held: Params
    batch: Batch
    key: Key | None
    poison: bool
    starts: jax.Array = field(init=False)
    seed: jax.Array = field(init=False)
    mail: loop.Mail = field(init=False)

    def run(self) -> StepResult:
        plan, mesh = self.plan, self.plan.mesh
        self.starts = jnp.asarray(plan.layout.boundaries[:-1], jnp.int32)
        weight = self._total_weight()
        self.seed = over(jnp.ones_like(weight), weight)
        carry = Carry(
            buffers=plan.store.allocate(plan.program.pools[SAVED], self.poison),
            grads=plan.weights.blank_gradients(self.held),
            total=jnp.zeros((), plan.terms.total.dtype),
        )
        self.mail = loop.Mail(plan.program, {value: codec.spec for value, codec in plan.codecs.items()}, self.poison)
        carry = loop.run(self.mail, self.device.rank, self._branch, plan.program_ids, carry)
        total = reduce.total(carry.total, mesh, PIPE, DATA)
        counted = None if plan.terms.is_mean else weight != 0
        return StepResult(over(total, weight), plan.weights.leave(carry.grads, counted))

    def _branch(self, kind: str, program_id: int) -> loop.Branch[Carry]:
        program = self.plan.programs[program_id]
        if kind == "F":
            return loop.Branch(lambda *args: self._forward(program, *args), ("buffers",))
        changes = ("grads", "total", "buffers") if self.poison else ("grads", "total")
        return loop.Branch(lambda *args: self._backward(program, *args), changes)

    def _forward(self, program: StageProgram, carry: Carry, inbox: loop.Inbox, now: Now) -> tuple[Carry, loop.Inbox]:
        stage, codec, micro_batch = program.stage, self.plan.codecs[Y], self._micro_batch(now)
        x = micro_batch.inputs
        if not stage.is_first:
            x = codec.decode(self.mail.read(inbox, Y, now), stage.inputs)
        y, buffers = program.forward(self.held, x, micro_batch, carry.buffers)
        return replace(carry, buffers=buffers), {} if stage.is_last else {Y: codec.encode(y)}

    def _backward(self, program: StageProgram, carry: Carry, inbox: loop.Inbox, now: Now) -> tuple[Carry, loop.Inbox]:
        stage, codec, micro_batch = program.stage, self.plan.codecs[DX], self._micro_batch(now)
        grads, total = carry.grads, carry.total
        if stage.is_last:
            found, dy, grads = program.loss_and_gradient(self.held, micro_batch, carry.buffers, grads, self.seed)
            total = total + found
        else:
            dy = codec.decode(self.mail.read(inbox, DX, now), split_inexact(stage.outputs)[0])
        dx, grads = program.backward(self.held, dy, micro_batch, carry.buffers, grads)
        carry = replace(carry, grads=grads, total=total)
        if self.poison:
            at = micro_batch.slot
            carry = replace(carry, buffers={n: b.at[at].set(_spoiled(b[at])) for n, b in carry.buffers.items()})
        return carry, {} if stage.is_first else {DX: codec.encode(dx)}

    def _micro_batch(self, now: Now) -> MicroBatch:
        m, (inputs, labels) = now.micro_batch, self.batch
        key = None if self.key is None else keys.micro_batch_key(self.key, m, self.device.data_rank)
        return MicroBatch(key, pick(inputs, m), pick(labels, m), now.slots[SAVED], self.starts[now.stage])

    def _total_weight(self) -> jax.Array:
        """The weight of all micro-batches on all data ranks, from the labels alone.

        It is known before the loop, so that the backward passes can start from its reciprocal: they need not be linear in
        their cotangents (one may clip or round them), and then dividing at the end would give other gradients.
        """
        plan, labels = self.plan, self.batch[1]
        if plan.terms.is_mean:
            return jnp.full((), plan.num_micro_batches * data_size(plan.mesh), plan.terms.weight.dtype)
        loss_fn: Any = plan.layout.module.loss_fn

        def add(m: jax.Array, weight: jax.Array) -> jax.Array:
            return weight + weight_from_labels(loss_fn, plan.outputs, pick(labels, m))

        start = jnp.zeros((), plan.terms.weight.dtype)
        return reduce.total(jax.lax.fori_loop(0, plan.num_micro_batches, add, start), plan.mesh, DATA)


def _spoiled(leaf: jax.Array) -> jax.Array:
    return jnp.full_like(leaf, jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf
