"""Writes checkpoints, either at once or from a copy on the host while training goes on."""

import dataclasses
import datetime
import importlib.metadata
import logging
import threading
import uuid
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.checkpoint import together
from jaxpipe.checkpoint.homes import STATE, Homes, layer_item
from jaxpipe.checkpoint.manifest import LayerRecord, Manifest
from jaxpipe.checkpoint.request import Request, accept
from jaxpipe.checkpoint.write import Order, Source, write
from jaxpipe.errors import CheckpointError
from jaxpipe.processes.group import Group
from jaxpipe.training.config import Config
from jaxpipe.training.state import TrainState

log = logging.getLogger(__name__)


def describe(homes: Homes, state: TrainState, config: Config, **counters: Any) -> Manifest:
    """Makes the manifest of a state. `counters` are the fields of `Manifest` that only the engine knows."""
    module, expected = homes.layout.module, homes.expected(state)
    layers = [
        LayerRecord(
            layer.name,
            None if module.owners[index] == index else module.owners[index],
            expected[layer_item(index)],
        )
        for index, layer in enumerate(module.layers)
    ]
    typed = jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
    return Manifest(
        id=uuid.uuid4().hex,
        layers=layers,
        state=expected[STATE],
        step=int(state.step),
        key_impl=str(jax.random.key_impl(state.key)) if typed else None,
        config={each.name: _plain(getattr(config, each.name)) for each in dataclasses.fields(config)},
        partition=list(homes.layout.boundaries),
        mesh=dict(homes.mesh.shape),
        versions={name: _version(name) for name in ("jaxpipe", "jax", "optax", "orbax-checkpoint")},
        saved_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        **counters,
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
        return "unknown"


def _plain(value: object) -> str | int | float | None:
    return value if isinstance(value, (str, int, float, type(None))) else getattr(value, "__name__", repr(value))


class Saver:
    """Writes one checkpoint at a time. A failure in the background is logged, and `wait` raises it."""

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None

    def save(self, request: Request, homes: Homes, state: TrainState, config: Config, **counters: int) -> Path:
        """Writes a checkpoint of a state. Every process calls it.

        Args:
          request: what the user asked for.
          counters: `train_calls` and `micro_batches_seen`, for the manifest.

        Returns:
          The folder of the checkpoint, which may be written in the background.

        Raises:
          CheckpointError: it could not be written, or the request cannot be met. With several processes all of them raise.
        """
        group = homes.shares.group
        accepted = accept(request, f"global_step{int(state.step)}", group)
        made = describe(
            homes,
            state,
            config,
            client_state=accepted.client_state,
            data_state=accepted.data_state,
            data_states=accepted.data_states,
            **counters,
        )
        return self.start(accepted.order, made, homes.items(state), group)

    def start(self, order: Order, made: Manifest, source: Source, group: Group) -> Path:
        """Writes what a source yields, or begins to.

        Args:
          made: the manifest, without `files`.
          source: yields (item, arrays). The next item is asked for when the one before is on the disk. If the writing is
            done in the background, everything is copied to the host first.
        """
        self.join()
        share = together.begin(group, order, made) if group.several else None
        if order.blocking:
            return write(order, made, source) if share is None else share.run(source)
        copied = _copy(source) if share is None else share.copy(source)

        def work() -> None:
            try:
                write(order, made, copied) if share is None else share.run(copied)
            except CheckpointError as error:
                self._error = error
                log.error("%s", error)

        self._thread = threading.Thread(target=work, name="jaxpipe-checkpoint")
        self._thread.start()
        return order.target

    def join(self) -> None:
        """Waits until no checkpoint is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Waits as `join` does, and then reports the failure of a checkpoint that was written in the background.

        Raises:
          CheckpointError: it could not be written.
        """
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


def _copy(source: Source) -> Source:
    return [(name, {key: np.array(array) for key, array in arrays.items()}) for name, arrays in source]
