"""What users pass as prompts: ids of tokens, in one array, or a list of rows of unlike lengths."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxpipe.checks import show
from jaxpipe.errors import DataError
from jaxpipe.model.shapes import describe

RULE = (
    "Prompts are ids of tokens: integers [N, T] with T of at least 1, or a list of N sequences of integers, whose lengths "
    "may differ."
)


@dataclass(frozen=True)
class Alike:
    """Prompts of one length.

    Attributes:
      ids: int32 [n, T], on the host unless they are being traced.
      numbers: which of the prompts of the call each of them is, int32 [n].
    """

    ids: Any
    numbers: np.ndarray


@dataclass(frozen=True)
class Prompts:
    """The prompts of a call.

    Attributes:
      parts: those of each length; the lengths in the order in which they occur first.
      unlike: whether there is more than one length.
    """

    parts: tuple[Alike, ...]
    unlike: bool

    @classmethod
    def of(cls, given: Any) -> Self:
        """Makes it of what a user has passed.

        Raises:
          DataError: they are no ids of tokens.
        """
        if isinstance(given, Mapping) or (isinstance(given, tuple) and any(getattr(p, "ndim", 1) > 1 for p in given)):
            raise DataError(
                f"prompts are a {type(given).__name__}. {RULE} A model with other inputs beside the ids, such as an "
                "encoder with its decoder, is evaluated once per token instead: docs/howto/two_streams.md has the loop."
            )
        lengths = _lengths(given)
        if len(set(lengths)) < 2:
            ids = _as_ids(given)
            return cls((Alike(ids, np.arange(len(ids), dtype=np.int32)),), False)
        parts = []
        for length in dict.fromkeys(lengths):
            numbers = [number for number, each in enumerate(lengths) if each == length]
            parts.append(Alike(_as_ids([given[number] for number in numbers]), np.asarray(numbers, np.int32)))
        return cls(tuple(parts), True)

    def joined(self, tokens: list[jax.Array]) -> Any:
        """What the caller gets, from the tokens [n, T + new] of each part."""
        if not self.unlike:
            return tokens[0]
        rows = [
            (number, row) for part, made in zip(self.parts, tokens, strict=True) for number, row in _rows(part, made)
        ]
        return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _rows(part: Alike, tokens: jax.Array) -> zip:
    return zip(part.numbers.tolist(), jnp.unstack(tokens), strict=True)


def _lengths(given: Any) -> list[int]:
    """The lengths of the sequences of a list; empty if it is something else."""
    if not isinstance(given, (list, tuple)):
        return []
    try:
        return [len(each) for each in given]
    except TypeError:
        return []


def _as_ids(prompts: Any) -> Any:
    if not isinstance(prompts, Tracer):
        try:
            prompts = np.asarray(prompts)
        except Exception as error:
            raise DataError(f"prompts={show(prompts)} are no array ({error}). {RULE}") from error
    if prompts.ndim != 2 or not jnp.issubdtype(prompts.dtype, jnp.integer) or not prompts.size:
        what = describe(prompts) if prompts.dtype.kind not in "OUS" else f"an array of {prompts.dtype}"
        raise DataError(f"prompts are {what}. {RULE}")
    most = np.iinfo(np.int32).max
    if isinstance(prompts, np.ndarray) and (int(prompts.min()) < 0 or int(prompts.max()) > most):
        raise DataError(
            f"prompts are {prompts.dtype}, from {prompts.min()} to {prompts.max()}. Ids of tokens are from 0 to {most}. "
            "Look where they come from; there is no id for padding."
        )
    return prompts.astype(np.int32)
