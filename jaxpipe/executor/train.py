"""Loss and gradients of one batch: the ops of a training step, and what they carry from tick to tick."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxpipe.executor import beside, flow, loop, reduce, scopes
from jaxpipe.executor.batch import pick
from jaxpipe.executor.branch import Branch
from jaxpipe.executor.job import Device, on_every_device
from jaxpipe.executor.mail import Inbox, Mail
from jaxpipe.executor.plan import TrainPlan
from jaxpipe.executor.pullback import Twice
from jaxpipe.executor.seeds import Seeds
from jaxpipe.executor.stage_halves import StageHalves
from jaxpipe.executor.stage_program import MicroBatch, StageProgram
from jaxpipe.executor.store import Buffers
from jaxpipe.lowering.channels import DX, Y
from jaxpipe.lowering.program import PENDING, SAVED
from jaxpipe.lowering.rows import Now
from jaxpipe.mesh import DATA, PIPE, data_size, on_tpu, permutes_block
from jaxpipe.model import keys
from jaxpipe.model.context import Aux
from jaxpipe.model.loss import over, weight_from_labels
from jaxpipe.model.values import split_inexact
from jaxpipe.types import Batch, Key, Leaves, Params, Tree

P = PartitionSpec


class StepResult(NamedTuple):
    """What a training step computes.

    Attributes:
      loss: the objective, that is the mean loss with the means of extra losses added, a scalar on all devices.
      grads: its gradient, in the structure and the sharding of the params tree; None for what is frozen.
      metrics: extra losses and metrics of layers, and metrics of `loss_fn`, by name.
      layer_state: the state of the layers after the step, in the structure and the sharding of the tree of states.
    """

    loss: jax.Array
    grads: Params
    metrics: dict[str, jax.Array]
    layer_state: Tree = {}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    """What a device carries from tick to tick.

    Attributes:
      buffers: what forwards have kept for backwards.
      pending: what the first halves of backwards have kept for the second ones.
      grads: the sums of gradients of what the rank holds.
      total: the sum of the losses of its micro-batches.
      beside: the state of its layers, and what else they have given beside their outputs.
    """

    buffers: Buffers
    pending: Buffers
    grads: Params
    total: jax.Array
    beside: Aux


def value_and_grad(
    plan: TrainPlan,
    params: Params,
    batch: Batch,
    key: Key | None,
    *,
    layer_state: Tree = None,
    scale: jax.Array | None = None,
    metrics: bool = True,
    poison: bool = False,
) -> StepResult:
    """Loss and gradient; traceable.

    Args:
      params: the params tree.
      batch: leaves [M, B, ...], B the rows of one micro-batch on all data ranks.
      key: of the step, for dropout; None switches dropout off.
      layer_state: the state of the layers, a tree that `layout/state_layout.py` describes; None: they have none.
      scale: float32 [], by which the loss is multiplied on the way back, so that the short floats that gradients travel
        in can hold them; the gradients are divided by it at the end. None: it is not. The loss that is returned is not
        scaled.
      metrics: whether anyone wants to know the metrics; otherwise they are not computed.
      poison: fill what nothing was written to with NaN, for tests.
    """
    states = plan.states.layout.specs
    specs: Any = P(), plan.layout.trained(plan.layout.specs), P(), states
    return on_every_device(
        lambda device, held, inputs, labels, states, key, scale: _Step(
            plan, device, Twice.of(held), (inputs, labels), states, key, scale, metrics, poison
        ).run(),
        plan.weights,
        params,
        batch,
        plan.states.layout.checked(layer_state),
        key,
        scale,
        specs=(states, P(), P()),
        out_specs=StepResult(*specs),
    )


@dataclass
class _Step:
    """A step on one device; inside `shard_map`."""

    plan: TrainPlan
    device: Device
    held: Twice
    batch: Batch
    layer_state: Tree
    key: Key | None
    scale: jax.Array | None
    metrics: bool
    poison: bool
    starts: jax.Array = field(init=False)
    seeds: Seeds = field(init=False)
    mail: Mail = field(init=False)

    def run(self) -> StepResult:
        plan, mesh = self.plan, self.plan.mesh
        self.starts = jnp.asarray(plan.layout.boundaries[:-1], jnp.int32)
        weight = self._total_weight()
        parts = plan.num_micro_batches * data_size(mesh)
        self.seeds = Seeds.of(weight, parts, plan.extra, self.scale)
        wanted = beside.start(plan.beside, plan.metrics)
        carry = Carry(
            buffers=plan.store.allocate(self.poison, not on_tpu(mesh)),
            pending=plan.pending.allocate(self.poison, not on_tpu(mesh)),
            grads=plan.weights.blank_gradients(self.held.params),
            total=jnp.zeros((), plan.terms.total.dtype),
            beside=(wanted if self.metrics else wanted._replace(metrics={}))._replace(
                state=plan.states.enter(self.layer_state)
            ),
        )
        wires = {value: codec.spec for value, codec in plan.codecs.items()}
        self.mail = Mail(plan.program, wires, self.poison, blocks=permutes_block(plan.mesh))
        carry = loop.run(self.mail, self.device.rank, self._branch, plan.program_ids, carry)
        loss, metrics = self._objective(carry, weight, parts)
        # Where nothing counts, no gradient of `loss_fn` is in the sums; if there are extra losses, none has come that far.
        counted = None if plan.terms.is_mean or plan.extra is not None else weight != 0
        with jax.named_scope(scopes.GRADIENTS):
            grads = plan.weights.leave(carry.grads, self.device.rank, counted, self.scale)
        return StepResult(loss, grads, metrics, plan.states.leave(carry.beside.state, *self.device))

    def _objective(self, carry: Carry, weight: jax.Array, parts: int) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The objective, and what is reported beside it; one reduction."""
        mesh, found = self.plan.mesh, carry.beside
        if not found.losses and not found.metrics:
            return over(reduce.total(carry.total, mesh, PIPE, DATA), weight), {}
        place = self.device.rank * data_size(mesh) + self.device.data_rank
        sums = carry.total, dict(found.losses)
        (total, losses), metrics = reduce.metrics(sums, dict(found.metrics), place, mesh, PIPE, DATA)
        extras = {name: loss / parts for name, loss in losses.items()}
        loss = over(total, weight)
        wide = np.result_type(loss.dtype, *[extra.dtype for extra in extras.values()])
        for extra in extras.values():
            loss = loss.astype(wide) + extra.astype(wide)
        finished: dict[str, Any] = {name: joined.finish() for name, joined in metrics.items()}
        return loss, {**extras, **finished}

    def _branch(self, kind: str, program_id: int) -> Branch[Carry]:
        program = self.plan.programs[program_id]
        before, behind = not program.stage.is_first, not program.stage.is_last
        if kind == "F":
            return Branch(
                lambda *args: self._forward(program, *args), ("buffers", "beside"), (Y,) * before, (Y,) * behind
            )
        if kind == "W":
            changes = ("grads", *("pending", "buffers") * self.poison)
            return Branch(lambda *args: self._weight_gradient(self.plan.halves[program_id], *args), changes)
        if kind == "I":
            halves = self.plan.halves[program_id]
            changes = (*("grads",) * halves.changes_grads, "total", "beside", "pending", *("buffers",) * self.poison)
            return Branch(lambda *args: self._input_gradient(halves, *args), changes, (DX,) * behind, (DX,) * before)
        changes = ("grads", "total", "beside", *("buffers",) * self.poison)
        return Branch(lambda *args: self._backward(program, *args), changes, (DX,) * behind, (DX,) * before)

    def _forward(self, program: StageProgram, carry: Carry, inbox: Inbox, now: Now) -> tuple[Carry, Inbox]:
        stage, codec, micro_batch = program.stage, self.plan.codecs[Y], self._micro_batch(now)
        x = micro_batch.inputs
        if not stage.is_first:
            x = codec.decode(self.mail.read(inbox, Y, now), stage.inputs)
        y, buffers, carried = program.forward(self.held.params, x, micro_batch, carry.buffers, carry.beside)
        return replace(carry, buffers=buffers, beside=carried), {} if stage.is_last else {Y: codec.encode(y)}

    def _backward(self, program: StageProgram, carry: Carry, inbox: Inbox, now: Now) -> tuple[Carry, Inbox]:
        codec, micro_batch = self.plan.codecs[DX], self._micro_batch(now)
        grads, total, dy, carried = self._behind_the_units(program, carry, inbox, now)
        dx, grads = program.backward(self.held, dy, micro_batch, carry.buffers, carried, grads, self.seeds.extra)
        carry = replace(carry, grads=grads, total=total, beside=carried)
        if self.poison:
            carry = replace(carry, buffers=program.spoil_tail(program.spoil(carry.buffers, micro_batch), micro_batch))
        return carry, {} if program.stage.is_first else {DX: codec.encode(dx)}

    def _input_gradient(self, halves: StageHalves, carry: Carry, inbox: Inbox, now: Now) -> tuple[Carry, Inbox]:
        program, micro_batch = halves.program, self._micro_batch(now)
        grads, total, dy, carried = self._behind_the_units(program, carry, inbox, now)
        dx, pending, grads = halves.input_gradient(
            self.held, dy, micro_batch, carry.buffers, carry.pending, carried, grads, self.seeds.extra
        )
        carry = replace(carry, grads=grads, pending=pending, total=total, beside=carried)
        if self.poison:
            buffers = program.spoil_tail(carry.buffers, micro_batch)
            carry = replace(carry, buffers=buffers if halves.saved_again else program.spoil(buffers, micro_batch))
        return carry, {} if program.stage.is_first else {DX: self.plan.codecs[DX].encode(dx)}

    def _weight_gradient(self, halves: StageHalves, carry: Carry, inbox: Inbox, now: Now) -> tuple[Carry, Inbox]:
        del inbox
        micro_batch, program = self._micro_batch(now), halves.program
        kept = carry.buffers, carry.pending
        grads = halves.weight_gradient(self.held, micro_batch, *kept, carry.beside, carry.grads, self.seeds)
        carry = replace(carry, grads=grads)
        if self.poison:
            carry = replace(carry, pending=halves.spoil(carry.pending, micro_batch))
        if self.poison and halves.saved_again:
            carry = replace(carry, buffers=program.spoil(carry.buffers, micro_batch))
        return carry, {}

    def _behind_the_units(
        self, program: StageProgram, carry: Carry, inbox: Inbox, now: Now
    ) -> tuple[Params, jax.Array, Leaves, Aux]:
        """Where the backward of the units of a stage starts: the sums of gradients and of the loss, the gradient of what
        the units give, from the next stage or from the tail, and what is carried beside."""
        if not program.stage.is_last:
            return carry.grads, carry.total, self._arrived(program, inbox, now), carry.beside
        with jax.named_scope(scopes.TAIL):
            found, dy, grads, carried = program.loss_and_gradient(
                self.held.again, self._micro_batch(now), carry.buffers, carry.beside, carry.grads, self.seeds
            )
        return grads, carry.total + found, dy, carried

    def _arrived(self, program: StageProgram, inbox: Inbox, now: Now) -> Leaves:
        """The gradient of the output of a stage, from the next one."""
        stage = program.stage
        dy = flow.needed(split_inexact(stage.outputs)[0], stage.gives)
        return self.plan.codecs[DX].decode(self.mail.read(inbox, DX, now), dy)

    def _micro_batch(self, now: Now) -> MicroBatch:
        m, (inputs, labels) = now.micro_batch, self.batch
        key = None if self.key is None else keys.micro_batch_key(self.key, m, self.device.data_rank)
        x = self.plan.layout.precision.inputs(pick(inputs, m))
        slots = now.slots[SAVED], self.starts[now.stage], now.stage, m, now.slots.get(PENDING)
        return MicroBatch(key, x, pick(labels, m), *slots)

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
