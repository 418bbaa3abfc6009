"""Generation: prompts and then token after token through the pipeline, in one program.

The rows are cut into as many groups as there are ranks, so that each rank always has one to work on (`executor/cycle.py`).
First each group's prompts go through at once, which fills the caches; then its newest token, again and again. A cache
stays on the rank of its layer. The last rank chooses the token, and sends it back to the first one.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpipe.executor import cycle, reduce
from jaxpipe.executor.batch import pick
from jaxpipe.executor.cycle import Cycle, Item
from jaxpipe.executor.generate_plan import GeneratePlan, GenerateStage, Where
from jaxpipe.executor.job import Device, on_every_device
from jaxpipe.executor.store import Buffers
from jaxpipe.executor.wire import Wire
from jaxpipe.mesh import DATA, PIPE, data_size
from jaxpipe.types import Key, Params, Tree

P = PartitionSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    """What a device carries from tick to tick.

    Attributes:
      caches: of the layers of its rank, [groups x stages per rank, entries, ...].
      tokens: the new ones, as far as the rank knows them, [groups, B, new], int32.
      ended: rows that need no more tokens, as far as the rank knows, bool [groups, B].
      alive: groups in which a row on any data rank needs more tokens, bool [groups], the same on all devices.
    """

    caches: Buffers
    tokens: jax.Array
    ended: jax.Array
    alive: jax.Array


def generate(
    plan: GeneratePlan,
    params: Params,
    prompts: tuple[jax.Array, jax.Array],
    temperature: jax.Array,
    key: Key,
    *,
    layer_state: Tree = None,
    poison: bool = False,
) -> jax.Array:
    """The new tokens of all rows; traceable.

    Args:
      prompts: int32 [groups, B on all data ranks, T], and the number of each row among the prompts of the call, int32
        [groups, B on all data ranks], from which its noise comes; -1 for the rows beyond those of the request.
      temperature: float32 [], above 0.
      key: of the call; row and token numbers are folded in.
      layer_state: the state of the layers, a tree that `layout/state_layout.py` describes; None: they have none.
      poison: fill caches that nothing was written to with NaN, for tests.

    Returns:
      int32 [groups, B on all data ranks, new], the same on all devices.
    """
    return on_every_device(
        lambda device, held, prompts, numbers, temperature, key, states: _Generation(
            plan, device, held, prompts, numbers, temperature, key, plan.states.enter(states), poison
        ).run(),
        plan.weights,
        params,
        prompts,
        temperature,
        key,
        plan.states.layout.checked(layer_state),
        specs=(P(), P(), plan.states.layout.specs),
        out_specs=P(),
    )


@dataclass
class _Generation:
    """A generation on one device; inside `shard_map`."""

    plan: GeneratePlan
    device: Device
    held: Params
    prompts: jax.Array
    rows: jax.Array  # the number among the prompts of each row, [groups, B]
    temperature: jax.Array
    key: Key
    states: Tree
    poison: bool

    def run(self) -> jax.Array:
        plan, sampling = self.plan, self.plan.request.sampling
        groups, rows = plan.layout.num_ranks, plan.rows
        all_rows = rows * data_size(plan.mesh)
        blank = 0 if sampling.stop is None else sampling.stop
        carry = Carry(
            caches=plan.store.allocate(self.poison),
            tokens=jnp.full((groups, rows, plan.request.new), blank, jnp.int32),
            ended=self.rows < 0,
            alive=jnp.arange(groups, dtype=jnp.int32) * all_rows < plan.request.rows,
        )
        carry = cycle.run(self._cycle(0, 1), self.device.rank, carry)
        if plan.request.new > 1:
            after_turn = None if sampling.stop is None else self._after_turn
            if after_turn is not None:
                carry, _ = after_turn(carry)
            carry = cycle.run(self._cycle(1, plan.request.new - 1), self.device.rank, carry, after_turn)
        return reduce.from_rank(plan.layout.placement[-1], carry.tokens, plan.mesh)

    def _cycle(self, first: int, turns: int) -> Cycle[Carry]:
        """The turns of each group that make its new tokens from number `first` on; those of 0 are the whole prompts."""
        plan = self.plan
        branches = [functools.partial(self._branch, program, first) for program in plan.programs]
        return Cycle(
            plan.rounds,
            turns,
            branches,
            plan.program_ids,
            plan.codecs[min(first, 1)].spec,
            wanted=lambda carry, item: carry.alive[item.group],
            back=lambda carry, item: carry.tokens[item.group, :, first + item.turn],
            arrived=functools.partial(self._arrived, first),
            poison=self.poison,
        )

    def _branch(self, program: GenerateStage, first: int, carry: Carry, inbox: Wire, item: Item) -> tuple[Carry, Wire]:
        number, group = first + item.turn, item.group  # the number of the token that comes of it
        codec = self.plan.codecs[min(first, 1)]
        stage = program.token if first else program.prompt
        if not stage.is_first:
            x: Tree = codec.decode(inbox, stage.inputs)
        elif first:
            newest = jax.lax.dynamic_index_in_dim(pick(carry.tokens, group), number - 1, axis=1, keepdims=True)
            x = self.plan.layout.precision.inputs(newest)
        else:
            x = self.plan.layout.precision.inputs(pick(self.prompts, group))
        if first:
            position = self.plan.request.prompt + number - 1
            y, caches = program.run_token(self.held, self.states, x, carry.caches, self._where(item), position)
        else:
            y, caches = program.run_prompt(self.held, self.states, x, carry.caches, self._where(item))
        carry = replace(carry, caches=caches)
        if not stage.is_last:
            return carry, codec.encode(y)
        return self._choose(carry, self.plan.layout.precision.outputs(y)[:, -1], group, number), []

    def _where(self, item: Item) -> Where:
        return Where(item.stage, self.plan.slot(item.group, item.stage))

    def _choose(self, carry: Carry, logits: jax.Array, group: jax.Array, number: jax.Array) -> Carry:
        """Takes the next token of each row of a group, on the last rank."""
        sampling = self.plan.request.sampling
        tokens = sampling.choose(logits, self.temperature, self.key, self.rows[group], number)
        ended = carry.ended
        if sampling.stop is not None:
            tokens = jnp.where(ended[group], jnp.int32(sampling.stop), tokens)
            ended = ended.at[group].set(ended[group] | (tokens == sampling.stop))
        return replace(carry, tokens=carry.tokens.at[group, :, number].set(tokens), ended=ended)

    def _arrived(self, first: int, carry: Carry, message: jax.Array, item: Item, mine: jax.Array) -> Carry:
        at = item.group, slice(None), first + item.turn
        return replace(carry, tokens=carry.tokens.at[at].set(jnp.where(mine, message, carry.tokens[at])))

    def _after_turn(self, carry: Carry) -> tuple[Carry, jax.Array]:
        """Tells all devices which groups need more tokens: the last rank knows which rows have ended."""
        last = self.device.rank == self.plan.layout.placement[-1]
        left = jnp.where(last, jnp.any(~carry.ended, axis=1).astype(jnp.int32), 0)
        alive = carry.alive & (reduce.total(left, self.plan.mesh, PIPE, DATA) > 0)
        return replace(carry, alive=alive), jnp.any(alive)
