"""Messages on their way: what has arrived at a rank, how it is kept until it is read, and what a message looks like."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxpipe.executor.store import blank
from jaxpipe.executor.wire import Wire
from jaxpipe.lowering.program import Program
from jaxpipe.lowering.rows import Now

# What has arrived and what is sent, by kind of value: `Y` or `DX`.
Inbox = dict[str, Wire]


@dataclass(frozen=True)
class Mail:
    """What travels in a program: how arrivals are kept, and how they are read.

    Attributes:
      wires: per kind of value, the shapes of a message.
      poison: fill what nothing was written to with NaN instead of zeros.
      blocks: a rank stands still in a permute, so all ops of a tick come before its permutes.
    """

    program: Program
    wires: Mapping[str, Sequence[jax.ShapeDtypeStruct]]
    poison: bool = False
    blocks: bool = False

    def is_direct(self, value: str) -> bool:
        """With one slot and no permute between arrival and use, what arrives is used as it is, without a copy."""
        return self.program.inboxes[value] == 1 and value in self.program.direct

    def empty_inbox(self) -> Inbox:
        """The arrival slots before the first tick."""
        return {
            value: self._blank(value, () if self.is_direct(value) else (size,))
            for value, size in self.program.inboxes.items()
        }

    def blank(self, value: str) -> Wire:
        """A message that nothing was written to."""
        return self._blank(value, ())

    def _blank(self, value: str, lead: tuple[int, ...]) -> Wire:
        return [blank((*lead, *spec.shape), spec.dtype, self.poison) for spec in self.wires[value]]

    def put(self, inbox: Inbox, value: str, slot: jax.Array, wire: Wire) -> Inbox:
        """Stores an arrival; slot -1 leaves everything as it is. (`where` on the row, so that XLA updates in place.)"""
        if self.is_direct(value):
            return {**inbox, value: wire}
        at = jnp.maximum(slot, 0)
        old = zip(inbox[value], wire, strict=True)
        return {**inbox, value: [kept.at[at].set(jnp.where(slot >= 0, new, kept[at])) for kept, new in old]}

    def read(self, inbox: Inbox, value: str, now: Now) -> Wire:
        """The message of that kind which the present op reads."""
        if self.is_direct(value):
            return inbox[value]
        return [leaf[now.read] for leaf in inbox[value]]
