"""`Generator`: runs generations, and brings prompts and tokens into the form that the user has and gets."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.checks import as_integer, as_number, count, show
from jaxpipe.data.place import on_all
from jaxpipe.data.shapes_seen import ShapesSeen
from jaxpipe.errors import ConfigError, DataError, LayerError
from jaxpipe.evaluation.evaluator import Evaluator
from jaxpipe.evaluation.prompts import Alike, Prompts
from jaxpipe.executor.evaluate import evaluate
from jaxpipe.executor.generate import generate
from jaxpipe.executor.generate_plan import GeneratePlan, Request
from jaxpipe.executor.options import Options
from jaxpipe.executor.permutes import Checked
from jaxpipe.executor.sampling import Sampling
from jaxpipe.executor.whole_window import recompute
from jaxpipe.layout.layout import Layout
from jaxpipe.mesh import data_size, pipe_size
from jaxpipe.model.keys import anywhere, as_key
from jaxpipe.types import Key, Params, Tree

P = PartitionSpec
Mixing = tuple[int, str]  # a layer that mixes positions, and how
FEWER_SHAPES = (
    "Let prompts have a few lengths, such as the last 64 or 128 tokens of each, and generate for equal numbers of rows. "
    "The shapes are"
)
_LOGITS = Options(outputs=True, loss=False, reduce_output=None)


class Generator:
    """Generates tokens; each new shape of prompts, and each other set of rules, compiles once.

    Args:
      layout: where the weights live, asked for when it is needed.
      mesh: the devices.
      evaluator: for models that have to be run over the whole window.
      poison: fill what nothing was written to with NaN, for tests.
    """

    def __init__(self, layout: Callable[[], Layout], mesh: Mesh, evaluator: Evaluator, poison: bool = False):
        self._layout, self.mesh, self._evaluator, self._poison = layout, mesh, evaluator, poison
        self._warned: set[int] = set()
        self._shapes = ShapesSeen("prompt", FEWER_SHAPES)
        everywhere = NamedSharding(mesh, P())
        self._jitted = Checked(
            jax.jit(self._traceable, static_argnames="request", out_shardings=(everywhere, everywhere)), mesh
        )
        # What the trace of a request has found.
        self._mixing: dict[Request, Mixing | None] = {}
        self._vocabularies: dict[Request, int] = {}

    def run(
        self,
        params: Params,
        prompts: Prompts,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        stop: int | None = None,
        key: Any = None,
        layer_state: Tree = None,
    ) -> Any:
        """Continues prompts; see `Pipeline.generate`.

        Args:
          layer_state: the state of the layers on the mesh.
        """
        heat = as_number(temperature)
        if heat is None or heat < 0:
            raise ConfigError(
                f"temperature={show(temperature)} must be a number, 0 or more. 0 takes the most likely token each time."
            )
        if top_k is not None:
            top_k = count("top_k", top_k, " None draws among all tokens.")
            if not heat:
                raise ConfigError(
                    f"top_k={top_k} needs a temperature above 0, such as 1.0. With temperature=0 the most likely token is "
                    "taken each time."
                )
        if stop is not None and as_integer(stop) is None:
            raise ConfigError(f"stop={show(stop)} must be one token, an integer, or None.")
        sampling = Sampling(not heat, top_k, None if stop is None else as_integer(stop))
        new = count("max_new_tokens", max_new_tokens)
        inputs = np.float32(heat or 1.0), anywhere(as_key(0 if key is None else key), self.mesh), layer_state
        asked = []
        for part in prompts.parts:
            rows, length = part.ids.shape
            asked.append((part, Request(rows, length, new, sampling)))
        for part, request in asked:
            self._check_ids(part.ids, request)
            self._shapes.add(part.ids)
        return prompts.joined([self._run(params, part, request, inputs) for part, request in asked])

    def _run(self, params: Params, part: Alike, request: Request, inputs: tuple[Any, Any, Tree]) -> jax.Array:
        grouped = on_all((self._grouped(part.ids, 0), self._grouped(part.numbers, -1)), self.mesh)
        tokens, causal = self._jitted(params, *grouped, *inputs, request=request)
        self._check_ids(part.ids, request)
        mixing = self._mixing[request]
        if mixing is not None and not isinstance(causal, Tracer) and not bool(causal):
            raise LayerError(
                "The logits of a prompt depend on what stands behind it, so there is no next token to speak of: "
                f"{self._label(mixing)}, or a layer behind it, is not causal. Use a causal mask, or give the layer a cache "
                "(init_cache)."
            )
        return tokens

    def _check_ids(self, prompts: Any, request: Request) -> None:
        """Raises DataError where an id is none that the model can give, as soon as it is known which these are."""
        vocabulary = self._vocabularies.get(request)
        if vocabulary is None or isinstance(prompts, Tracer) or int(prompts.max()) < vocabulary:
            return
        raise DataError(
            f"prompts have the id {int(prompts.max())}, but the model knows {vocabulary} tokens, 0 to {vocabulary - 1}: "
            "its logits say so. Look whether the tokenizer is that of the model."
        )

    def _rows(self, request: Request) -> int:
        """Rows of a group on one data rank."""
        return -(-request.rows // (pipe_size(self.mesh) * data_size(self.mesh)))

    def _grouped(self, rows: Any, fill: int) -> Any:
        """[N, ...] -> [groups, B, ...], filled up with `fill`."""
        groups, data = pipe_size(self.mesh), data_size(self.mesh)
        size = -(-rows.shape[0] // (groups * data)) * data
        pad = ((0, groups * size - rows.shape[0]), *[(0, 0)] * (rows.ndim - 1))
        numpy: Any = jnp if isinstance(rows, Tracer) else np
        return numpy.pad(rows, pad, constant_values=fill).reshape(groups, size, *rows.shape[1:])

    def _traceable(
        self,
        params: Params,
        prompts: jax.Array,
        numbers: jax.Array,
        temperature: jax.Array,
        key: Key,
        layer_state: Tree,
        request: Request,
    ) -> tuple[jax.Array, jax.Array]:
        plan = GeneratePlan(self._layout(), self.mesh, request, self._rows(request))
        self._mixing[request] = plan.mixing
        self._vocabularies[request] = plan.vocabulary
        if plan.mixing is None:
            given = (prompts, numbers), temperature, key
            made = generate(plan, params, *given, layer_state=layer_state, poison=self._poison)
            causal = jnp.bool_(True)
        else:
            self._say_why(plan.mixing)

            def outputs(windows: jax.Array) -> jax.Array:
                evaluation = self._evaluator.plan((windows, None), _LOGITS)
                found = evaluate(evaluation, params, (windows, None), None, layer_state).outputs
                count, rank = windows.shape[0], evaluation.layout.placement[-1]
                return found[rank * count : (rank + 1) * count]

            made, causal = recompute(outputs, request, plan.vocabulary, (prompts, numbers), temperature, key)
        both = jnp.concatenate([prompts, made], axis=-1)
        return both.reshape(-1, request.length)[: request.rows], causal

    def _label(self, mixing: Mixing) -> str:
        return self._layout().module.label(mixing[0])

    def _say_why(self, mixing: Mixing) -> None:
        layer, why = mixing
        if layer in self._warned:
            return
        self._warned.add(layer)
        warnings.warn(
            f"generate runs the whole window again for each token, which is slow: {self._label(mixing)} has no cache, and "
            f"it is not known to treat every position by itself ({why}). Give it a cache (Layer(init_cache=), or a flax "
            "layer that decodes), or, if it only has to know where a position stands, the keyword `position`; see "
            "docs/howto/generation.md.",
            stacklevel=4,
        )
