"""Forward only: the same loop with one kind of op, nothing saved, no gradients anywhere in the program.

The tail of the last stage (usually a norm and the projection to the vocabulary) and the loss can cost more than all other
layers of a stage together, and every rank would wait for the last one. Their weights are on every rank anyway, so where
only sums are wanted the last rank keeps what enters the tail for S ticks, deals the S micro-batches out, and all ranks run
tail and loss of one micro-batch each, at the same time:

    rank 0 | F3 F4 F5 F6 T0 F7 ...        S ticks (v S where stages go round v times), then one turn of T
    rank 1 | F2 F3 F4 F5 T1 F6 ...
    rank 2 | F1 F2 F3 F4 T2 F5 ...
    rank 3 | F0 F1 F2 F3 T3 F4 ...        F of the last rank: without tail and loss
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpipe.executor import loop, reduce, scopes
from jaxpipe.executor.batch import pick
from jaxpipe.executor.branch import Branch, run_if
from jaxpipe.executor.eval_plan import EvalPlan
from jaxpipe.executor.job import Device, on_every_device, rows_of
from jaxpipe.executor.mail import Inbox, Mail
from jaxpipe.executor.options import Found
from jaxpipe.executor.tally import Sums
from jaxpipe.lowering.channels import Y
from jaxpipe.lowering.rows import Now
from jaxpipe.mesh import DATA, PIPE, data_size, permutes_block
from jaxpipe.model.context import Aux
from jaxpipe.model.metrics import Joined, Mean
from jaxpipe.types import Batch, Params, Tree

P = PartitionSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    """What a device carries from tick to tick.

    Attributes:
      sums: of the loss and the metrics of the last layer.
      beside: what all layers have given beside their outputs.
      outputs: those of every micro-batch, [M, B, ...], or None if they are not wanted.
      hand: what the last rank keeps to be dealt out, [S, B, ...], or None if it runs the tail itself.
    """

    sums: Sums
    beside: Aux
    outputs: Tree
    hand: Tree


def evaluate(plan: EvalPlan, params: Params, batch: Batch, real: jax.Array | None, layer_state: Tree = None) -> Found:
    """One batch in evaluation mode; traceable.

    Args:
      batch: leaves [M, B, ...].
      real: bool [data ranks], whether the rows of a data rank count; None: all do.
      layer_state: the state of the layers, a tree that `layout/state_layout.py` describes; None: they have none.

    Returns:
      What was asked for. Outputs and rows are [S * M, B, ...], of which only the M entries of the rank with the last
      stage count; with `plan.rows_everywhere` rows are [M, B, ...] on all devices.
      Without `broadcast`, loss and metrics have one value per rank along dim 0, of which only that of this rank counts.
    """
    mesh = plan.mesh
    sums: Any = P() if plan.options.broadcast else P(PIPE)
    kept: Any = P(PIPE, DATA) if DATA in mesh.axis_names else P(PIPE)
    rows: Any = P() if plan.rows_everywhere else kept
    return on_every_device(
        lambda device, held, inputs, labels, states, real: _Evaluation(
            plan, device, held, (inputs, labels), plan.states.enter(states), real
        ).run(),
        plan.weights,
        params,
        batch,
        plan.states.layout.checked(layer_state),
        real,
        specs=(plan.states.layout.specs, rows_of(mesh)),
        out_specs=Found(sums, sums, kept, rows),
    )


@dataclass
class _Evaluation:
    """An evaluation on one device; inside `shard_map`."""

    plan: EvalPlan
    device: Device
    held: Params
    batch: Batch
    states: Tree
    real: jax.Array | None
    mail: Mail = field(init=False)

    def run(self) -> Found:
        plan, mesh, options = self.plan, self.plan.mesh, self.plan.options
        ranks, chunks = plan.layout.num_ranks, len(plan.stages) // plan.layout.num_ranks
        if self.real is not None:
            self.real = self.real[0]
        self.mail = Mail(plan.program, {Y: plan.codec.spec}, blocks=permutes_block(mesh))
        pause, hand = None, None
        outputs = _blank(plan.outputs, plan.num_micro_batches) if options.outputs else None
        if plan.tail is not None:
            hand = _blank(plan.tail.inputs, ranks)
            pause = loop.Pause(ranks - 1, chunks * ranks, self._tail)
        carry = Carry(plan.tally.start(), plan.start(), outputs, hand)
        carry = loop.run(self.mail, self.device.rank, self._branch, plan.program_ids, carry, pause)

        axes = (PIPE, DATA) if options.broadcast else (DATA,)
        rank, data_rank = self.device
        place = rank * data_size(mesh) + data_rank if options.broadcast else data_rank
        given = self._given(carry.beside)
        if not options.broadcast:
            _, given = reduce.metrics((), given, rank * data_size(mesh) + data_rank, mesh, PIPE, DATA)
            loss, metrics = plan.tally.reduced(carry.sums, {}, place, *axes)
            found = plan.tally.results(loss, {**metrics, **given})
        else:
            found = plan.tally.results(*plan.tally.reduced(carry.sums, given, place, *axes))
        loss, metrics = found if options.broadcast else jax.tree.map(lambda a: a[None], found)
        rows = plan.tally.kept_rows(carry.sums)
        if plan.rows_everywhere:
            rows = reduce.from_rank(plan.layout.placement[-1], rows, mesh)
        return Found(loss, metrics, carry.outputs, rows)

    def _given(self, found: Aux) -> dict[str, Joined]:
        """What the layers of this rank have given for rows that count: extra losses, as means over rows, and metrics."""
        plan, last, real = self.plan, self.plan.layout.placement[-1], self.real
        rows = plan.tally.rows

        def loss(total: jax.Array) -> Joined:
            # Several ranks may give losses of one name, and the micro-batches count once.
            weight = jnp.where(self.device.rank == last, plan.num_micro_batches * rows, 0).astype(total.dtype)
            return Joined((total * rows, weight), Mean)

        given = {name: loss(total) for name, total in found.losses.items()} | dict(found.metrics)
        if real is None:
            return given
        return jax.tree.map(
            lambda a, b: jnp.where(real, a, b), given, {n: joined.blank() for n, joined in given.items()}
        )

    def _branch(self, kind: str, program_id: int) -> Branch[Carry]:
        assert kind == "F"
        program = self.plan.programs[program_id]
        stage = program.stage
        changes: tuple[str, ...] = ("beside",)
        if stage.is_last:
            changes += ("sums", "outputs") if self.plan.tail is None else ("hand",)

        def forward(carry: Carry, inbox: Inbox, now: Now) -> tuple[Carry, Inbox]:
            m, codec = now.micro_batch, self.plan.codec
            if stage.is_first:
                x = self.plan.layout.precision.inputs(pick(self.batch[0], m))
            else:
                x = codec.decode(self.mail.read(inbox, Y, now), stage.inputs)
            y, given = program.run(self.held, now.stage, carry.beside._replace(state=self.states), x)
            carry = replace(carry, beside=given)
            if not stage.is_last:
                return carry, {Y: codec.encode(y)}
            if self.plan.tail is None:
                return self._finish(carry, y, m), {}
            at = m % self.plan.layout.num_ranks
            return replace(carry, hand=jax.tree.map(lambda kept, a: kept.at[at].set(a), carry.hand, y)), {}

        return Branch(forward, changes, (Y,) * (not stage.is_first), (Y,) * (not stage.is_last))

    @jax.named_scope(scopes.TAIL)
    def _tail(self, turn: jax.Array, carry: Carry) -> Carry:
        """All ranks run tail and loss of one micro-batch each."""
        tail, last = self.plan.tail, jnp.int32(len(self.plan.stages) - 1)
        assert tail is not None
        m = turn * self.plan.layout.num_ranks + self.device.rank
        x = reduce.deal(carry.hand, self.plan.mesh)

        def once(found: tuple[Sums, Aux], x: Tree, m: jax.Array) -> tuple[Sums, Aux]:
            y, given = tail.run(self.held, last, found[1]._replace(state=self.states), x)
            return self._finish(replace(carry, sums=found[0]), y, m).sums, given

        found = run_if(m < self.plan.num_micro_batches, once, (carry.sums, carry.beside), x, m)
        return replace(carry, sums=found[0], beside=found[1])

    @jax.named_scope(scopes.TAIL)
    def _finish(self, carry: Carry, y: Tree, m: jax.Array) -> Carry:
        """Counts what the last layer has returned for a micro-batch."""
        y = self.plan.layout.precision.outputs(y)
        carry = replace(carry, sums=self.plan.tally.add(carry.sums, m, y, pick(self.batch[1], m), self.real))
        if not self.plan.options.outputs:
            return carry
        return replace(carry, outputs=jax.tree.map(lambda kept, a: kept.at[m].set(a), carry.outputs, y))


def _blank(tree: Tree, count: int) -> Tree:
    return jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), tree)
