"""What a compiled generation will do, planned on shapes alone, outside of the program."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpipe.errors import ConfigError, LayerError
from jaxpipe.executor import states, store
from jaxpipe.executor.begin import Begin
from jaxpipe.executor.plan import distinct
from jaxpipe.executor.residence import Repeat
from jaxpipe.executor.rounds import Rounds
from jaxpipe.executor.sampling import Sampling
from jaxpipe.executor.states import States
from jaxpipe.executor.store import Buffers, Entry, Kept, Store
from jaxpipe.executor.unit import repeated
from jaxpipe.executor.weights import Weights
from jaxpipe.executor.wire import Codec
from jaxpipe.layout.layout import Layout
from jaxpipe.layout.stages import Part, Stage, make_stages
from jaxpipe.layout.state_layout import state_layout
from jaxpipe.model import generating
from jaxpipe.model.blame import blame
from jaxpipe.model.capture import Captured
from jaxpipe.model.context import Context
from jaxpipe.model.shapes import describe, is_inexact, signature
from jaxpipe.types import Avals, Params, Tree


@dataclass(frozen=True)
class Request:
    """What is asked for. Each distinct value is a program of its own.

    Attributes:
      rows: N, the prompts of the call.
      prompt, new: the lengths of a prompt and of what is generated.
      sampling: how tokens are chosen.
    """

    rows: int
    prompt: int
    new: int
    sampling: Sampling

    @property
    def length(self) -> int:
        """Of the whole sequences."""
        return self.prompt + self.new


@dataclass(frozen=True)
class _Step:
    """Some like layers in a row: those of a part, for one length of chunks.

    Attributes:
      part: the layers.
      cache: abstract values of the cache of one of them, without leaves if they have none.
      start: makes that cache, or None.
      entries: the places of its leaves.
    """

    part: Part
    cache: Avals
    start: Captured | None
    entries: tuple[Entry, ...]


class Where(NamedTuple):
    """Where a stage works on a group of rows: the number of the stage, and the slot of its caches; int32 [] each."""

    stage: jax.Array
    slot: jax.Array


class GenerateStage:
    """A distinct stage while tokens are generated: a prompt at once, then token after token.

    Args:
      pair: the stage for prompts, and for single tokens.
      first: the index of its first layer.
      traced: the layers, for prompts and for single tokens.
      weights: what its rank computes with.
      cursor: where it gets places for its caches.
      begin: where the stages that run it begin in the arrays of their ranks.
    """

    def __init__(
        self,
        pair: tuple[Stage, Stage],
        first: int,
        traced: tuple[generating.Generating, generating.Generating],
        weights: Weights,
        cursor: Kept,
        begin: Begin,
    ):
        self.weights, (self.prompt, self.token), self.kept, self._begin = weights, pair, cursor, begin
        assert [(p.offset, p.count) for p in self.prompt.parts] == [(p.offset, p.count) for p in self.token.parts]
        self._steps: tuple[list[_Step], list[_Step]] = [], []
        for parts in zip(self.prompt.parts, self.token.parts, strict=True):
            layer = first + parts[0].offset
            cache = traced[0].caches[layer]
            entries = tuple(cursor.take(jax.tree.leaves(cache), parts[0].count, apart=True))
            for steps, part in zip(self._steps, parts, strict=True):
                steps.append(_Step(part, cache, traced[0].starts[layer], entries))
        self._chunk = traced[0].chunk
        self._trim = self._first_without_cache() if self.prompt.is_last else None

    def _first_without_cache(self) -> int | None:
        """The number of the part from which on only the last position of a prompt is of use; None if there is none.

        No part behind it has a cache, so the logits of the last position need nothing of the others. They are most of the
        memory of a prompt where the vocabulary is large.
        """
        number = len(self._steps[0])
        while number and not self._steps[0][number - 1].entries:
            number -= 1
        if number == len(self._steps[0]) or self._chunk == 1:
            return None
        last = jax.eval_shape(self._last_position, self.prompt.part_inputs[number])
        return number if signature(last) == signature(self.token.part_inputs[number]) else None

    def _last_position(self, x: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(x)
        along = generating.dims(x, self._chunk)
        kept = [leaf if dim is None else leaf[:, -1:] for leaf, dim in zip(leaves, along, strict=True)]
        return jax.tree.unflatten(structure, kept)

    def run_prompt(self, held: Params, carried: Tree, x: Tree, caches: Buffers, where: Where) -> tuple[Tree, Buffers]:
        """Runs whole prompts, from caches in which nothing is. The last stage returns the logits of the last position.

        Args:
          carried: the state of the layers of its rank, which is only read.
          x: what the stage takes, leaves [B, T, ...].
          where: which stage it is, and where its caches are.
        """
        position = jnp.int32(0)
        for number, step in enumerate(self._steps[0]):
            if number == self._trim:
                x, position = self._last_position(x), jnp.int32(self._chunk - 1)
            if self._trim is not None and number >= self._trim:
                step = self._steps[1][number]
            x, caches = self._run(step, held, carried, x, caches, where, position, True)
        return x, caches

    def run_token(
        self, held: Params, carried: Tree, x: Tree, caches: Buffers, where: Where, position: jax.Array
    ) -> tuple[Tree, Buffers]:
        """Runs one token of each row, at a position, int32 []; x has leaves [B, 1, ...]."""
        for step in self._steps[1]:
            x, caches = self._run(step, held, carried, x, caches, where, position, False)
        return x, caches

    def _run(
        self,
        step: _Step,
        held: Params,
        carried: Tree,
        x: Tree,
        caches: Buffers,
        where: Where,
        position: jax.Array,
        fresh: bool,
    ) -> tuple[Tree, Buffers]:
        [one] = self._begin.placed([replace(step.part, count=1)], where.stage)
        like, structure = jax.tree.flatten(step.cache)

        def layer(carry: Any, repeat: Repeat) -> Any:
            x, caches = carry
            [params] = self.weights.take(held, [one], repeat)
            state = states.take(carried, one, repeat)
            cache: Tree = None
            if step.start is not None:
                if fresh:
                    cache = step.start(params, state, x)
                else:
                    cache = jax.tree.unflatten(structure, store.read(caches, where.slot, step.entries, repeat, like))
            y, aux = one.run(params, x, Context(state=state, cache=cache, position=position))
            if step.start is not None:
                caches = store.write(caches, where.slot, step.entries, repeat, jax.tree.leaves(aux.cache))
            return y, caches

        touched = {entry.buffer: caches[entry.buffer] for entry in step.entries}
        with blame(f"{step.part.label} or one like it", lambda: f"it was given {describe(x)}"):
            x, touched = repeated(layer, (x, touched), step.part.count)
        return x, {**caches, **touched}


class GeneratePlan:
    """The plan of a generation.

    Args:
      layout: of the params tree.
      mesh: the devices.
      request: what is wanted.
      rows: of a group on one data rank.

    Attributes:
      programs: the distinct stages; `program_ids[stage]` is the number of the one that a stage runs.
      rounds: which rank runs which stage of which group when.
      store: the caches, [groups x stages per rank, entries, ...].
      states: the state of the layers, which is read only.
      codecs: how outputs of whole prompts travel, and those of single tokens.
      mixing: the index of a layer that makes it necessary to run the whole window for each token, and why; or None. There
        is nothing else in the plan then.

    Raises:
      LayerError: the model does not fit itself, or its outputs are no logits. ConfigError: the vocabulary is too small.
    """

    def __init__(self, layout: Layout, mesh: Mesh, request: Request, rows: int):
        module = layout.module
        self.layout, self.mesh, self.request, self.rows = layout, mesh, request, rows

        def traced(rows: int, chunk: int, caches: Any = None) -> generating.Generating:
            ids = jax.ShapeDtypeStruct((rows, chunk), jnp.int32)
            held = None if layout.states is None else layout.states.layer_params
            return generating.trace(
                module, layout.layer_params, ids, request.length, mesh, layout.precision, caches, held
            )

        whole = traced(1, request.length)
        self.vocabulary = check_logits(module.label(module.num_layers - 1), whole.shapes[-1].outputs, request)
        self.weights, self.store = Weights(layout, mesh), Store()
        self.mixing = generating.mixing(module, whole)
        if self.mixing is not None:
            return
        prompt = traced(rows, request.prompt)
        token = traced(rows, 1, prompt.caches)
        stages = [make_stages(layout, each.shapes) for each in (prompt, token)]
        self.states = States(state_layout(layout, prompt.shapes), mesh, stages[0])
        self.codecs = [Codec([stage.inputs for stage in each[1:]]) for each in stages]

        self.rounds = Rounds.of(layout.placement)
        pairs = list(zip(layout.boundaries[:-1], zip(*stages, strict=True), strict=True))
        keys = {first: tuple(stage.program_key() for stage in pair) for first, pair in pairs}

        def made(one: tuple[int, tuple[Stage, Stage]]) -> GenerateStage:
            first, pair = one
            alike = [number for number, (other, _) in enumerate(pairs) if keys[other] == keys[first]]
            begin = Begin.of(stages[0], alike)
            return GenerateStage(pair, first, (prompt, token), self.weights, self.store.program(), begin)

        self.programs, self.program_ids = distinct(pairs, made, lambda one: keys[one[0]])
        # As many groups as ranks, each with a slot per stage of a rank.
        self._places = [self.rounds.place_on_rank(stage) for stage in range(layout.num_stages)]
        together = [
            {own for own, other in zip(self.program_ids, layout.placement, strict=True) if other == rank}
            for rank in range(layout.num_ranks)
        ]
        self.store.settle([layout.num_ranks * (1 + max(self._places))] * len(self.programs), together)

    def slot(self, group: jax.Array, stage: jax.Array) -> jax.Array:
        """The slot of the caches that a stage has for a group, int32 []."""
        return group * (1 + max(self._places)) + jnp.asarray(self._places, jnp.int32)[stage]


def check_logits(label: str, outputs: Avals, request: Request) -> int:
    """The size of the vocabulary, from what the last layer makes of one row.

    Raises:
      LayerError: it returns no logits. ConfigError: `top_k` or `stop` is not in the vocabulary.
    """
    leaves = jax.tree.leaves(outputs)
    good = len(leaves) == 1 and leaves[0].shape[:-1] == (1, request.length) and is_inexact(leaves[0])
    if not good or outputs is not leaves[0]:
        raise LayerError(
            f"generate needs logits, one array of floats [B, T, V], but {label} returns {describe(outputs)} for one row of "
            f"{request.length} tokens (prompt and new ones). Let the last layer return logits; the loss belongs into "
            "loss_fn."
        )
    vocabulary, sampling = leaves[0].shape[-1], request.sampling
    if sampling.top_k is not None and sampling.top_k > vocabulary:
        raise ConfigError(f"top_k={sampling.top_k}: the model knows {vocabulary} tokens. Use at most so many, or None.")
    if sampling.stop is not None and not 0 <= sampling.stop < vocabulary:
        raise ConfigError(f"stop={sampling.stop} is no token: the model knows those from 0 to {vocabulary - 1}.")
    return vocabulary
