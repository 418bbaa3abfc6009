"""Writes checkpoints, either at once or from a copy on the host while training goes on."""

import copy
import dataclasses
import datetime
import importlib.metadata
import logging
import threading
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import items, manifest, verify
from jaxpipe.checkpoint.homes import STATE, Homes, layer_item
from jaxpipe.checkpoint.items import Arrays
from jaxpipe.checkpoint.manifest import LayerRecord, Manifest
from jaxpipe.checks import is_count
from jaxpipe.errors import CheckpointError
from jaxpipe.training.config import Config
from jaxpipe.training.state import TrainState

log = logging.getLogger(__name__)


def describe(homes: Homes, state: TrainState, config: Config, mesh: jax.sharding.Mesh, **counters: Any) -> Manifest:
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
        mesh=dict(mesh.shape),
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

    def save(
        self,
        directory: Path,
        tag: str,
        made: Manifest,
        source: Iterable[tuple[str, Arrays]],
        *,
        save_latest: bool,
        keep: int | None,
        blocking: bool,
    ) -> Path:
        """Writes a checkpoint.

        The items are written first, then the manifest, and both are looked at on the disk. Only then the folder gets its
        name, and at last `latest` names it.

        Args:
          made: the manifest, without `files`.
          source: yields (item, arrays). The next item is asked for when the one before is on the disk. If the writing is
            done in the background, everything is copied to the host first.
          save_latest: whether `latest` names the checkpoint.
          keep: how many checkpoints to keep in the directory; None keeps all.
          blocking: False writes in the background.

        Returns:
          The folder of the checkpoint.

        Raises:
          CheckpointError: it could not be written, or a flag is not True or False.
        """
        for flag, value in {"save_latest": save_latest, "blocking": blocking}.items():
            if not isinstance(value, bool):
                raise CheckpointError(f"{flag}={value!r}: expected True or False.")
        self.join()
        if blocking:
            return _write(directory, tag, made, source, save_latest, keep)
        copied = [(name, {key: np.array(array) for key, array in arrays.items()}) for name, arrays in source]

        def work() -> None:
            try:
                _write(directory, tag, made, copied, save_latest, keep)
            except CheckpointError as error:
                self._error = error
                log.error("%s", error)

        self._thread = threading.Thread(target=work, name="jaxpipe-checkpoint")
        self._thread.start()
        return directory / tag

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


def _write(
    directory: Path,
    tag: str,
    made: Manifest,
    source: Iterable[tuple[str, Arrays]],
    save_latest: bool,
    keep: int | None,
) -> Path:
    try:
        with (draft := folders.Draft(directory, tag)) as path:
            for name, arrays in source:
                items.write(path / name, arrays)
                del arrays  # before the next one is made
            files = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
            folders.write_text(path / manifest.NAME, dataclasses.replace(made, files=files).to_json())
            verify.check_written(path, made, directory / tag)
            written = draft.commit()
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and tensorstore raise many kinds of exceptions when a disk is full
        raise CheckpointError(
            f"{directory / tag}: the checkpoint could not be written: {type(error).__name__}: {_reason(error)} Earlier "
            "checkpoints and the state of training are as they were."
        ) from error
    try:
        if save_latest:
            folders.point_latest(directory, tag)
        if keep is not None:
            folders.prune(directory, keep)
    except OSError as error:
        raise CheckpointError(
            f"{directory / tag}: the checkpoint was written, but 'latest' or the older ones could not be changed: {error}."
        ) from error
    return written


def _reason(error: BaseException) -> str:
    """The most helpful line of an error: what the operating system said, if it said something."""
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = str(error).strip()
    if "shutdown" in text:  # Orbax needs new threads, but Python does not start any at its end
        return "The program ended meanwhile: call engine.wait_for_checkpoint() before its end."
    for known in ("No space left on device", "Read-only file system", "Permission denied", "File too large"):
        if known in text:
            return f"{known}. Make room, or save somewhere else."
    return f"{text.splitlines()[0][:300]}." if text else "no message."


def check_arguments(client_state: Mapping[str, Any] | None, keep: int | None) -> dict[str, Any]:
    """Checks the arguments of a save before anything is written, and copies the client state.

    Returns:
      The copy, which may be written later.

    Raises:
      CheckpointError: the client state cannot be stored as JSON, `keep` is no count, or there are several processes.
    """
    state = {} if client_state is None else client_state
    if not isinstance(state, dict):
        raise CheckpointError(f"client_state is a {type(state).__name__}: expected a dict.")
    try:
        manifest.check_json(state, "client_state")
    except RecursionError:
        raise CheckpointError("client_state contains itself, or is nested too deep: JSON cannot hold that.") from None
    if keep is not None and not is_count(keep):
        raise CheckpointError(f"keep={keep!r}: expected how many checkpoints to keep, 1 or more, or None for all.")
    if jax.process_count() > 1:
        raise CheckpointError(
            f"Checkpoints of {jax.process_count()} processes are not available yet in this version of jaxpipe: expected "
            "one process that holds all devices."
        )
    return copy.deepcopy(state)  # it may be written later


def data_state(data_iter: Any) -> dict[str, manifest.Json] | None:
    """What a data iterator says about where it stands, as a JSON value; None if there is no iterator.

    Raises:
      CheckpointError: the iterator has no `get_state`, or what it returns cannot be stored.
    """
    if data_iter is None:
        return None
    if not hasattr(data_iter, "get_state"):
        raise CheckpointError(
            f"data_iter is a {type(data_iter).__name__} without get_state(): expected an iterator that knows where it "
            "stands, such as grain's. Leave it out; engine.micro_batches_seen is stored in any case."
        )
    return manifest.encode_data_state(data_iter.get_state())
