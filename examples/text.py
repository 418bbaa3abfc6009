"""Real text that every machine has: the source files of Python's standard library, as bytes.

Also the model to beat, a table of which byte follows which.
"""

import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Tests repeat themselves, tables are no prose, installed packages differ from machine to machine.
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "distutils",
    "ensurepip",
    "turtledemo",
}
SKIPPED |= {"encodings", "pydoc_data", "__pycache__"}

Batch = tuple[np.ndarray, np.ndarray]  # inputs and labels, each [B, L]: the label of a byte is the byte after it


@dataclass(frozen=True)
class Text:
    """All training files in one array of bytes, all validation files in another."""

    train: np.ndarray
    validation: np.ndarray
    train_files: int
    validation_files: int


def read_standard_library() -> Text:
    """One file in ten is for validation, chosen by its name: whole files, so that no half of a function is in each."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.isdisjoint(name.parts):
            parts[zlib.crc32(name.as_posix().encode()) % 10 == 0].append(path.read_bytes())
    if not (parts[True] and parts[False]):
        raise SystemExit(
            f"No source files of the standard library were found in {root}; this Python comes without them."
        )
    train, validation = (np.frombuffer(b"\n".join(parts[held_out]), np.uint8) for held_out in (False, True))
    return Text(train, validation, len(parts[False]), len(parts[True]))


def random_windows(text: np.ndarray, *, rows: int, length: int, seed: int) -> Iterator[Batch]:
    """Micro-batches of windows from anywhere in the text, without end."""
    generator = np.random.default_rng(seed)
    while True:
        yield _windows(text, generator.integers(0, len(text) - length, rows), length)


def even_windows(text: np.ndarray, *, micro_batches: int, rows: int, length: int) -> list[Batch]:
    """Micro-batches of windows spread evenly over the whole text: the same ones every time."""
    starts = np.linspace(0, len(text) - length - 1, micro_batches * rows).astype(np.int64)
    return [_windows(text, part, length) for part in starts.reshape(micro_batches, rows)]


def _windows(text: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    window = text[starts[:, None] + np.arange(length + 1)].astype(np.int32)
    return window[:, :-1], window[:, 1:]


def bigram_loss(train: np.ndarray, batches: list[Batch]) -> float:
    """Mean loss, in nats per byte, of predicting each byte from the one before it alone.

    The probabilities are the counts in the training bytes, plus one each, so that no pair is impossible.
    """
    pairs = train[:-1].astype(np.int64) * 256 + train[1:]
    counts = np.bincount(pairs, minlength=256 * 256).reshape(256, 256) + 1.0
    nats = -np.log(counts / counts.sum(axis=1, keepdims=True))
    return float(np.mean([nats[inputs, labels].mean() for inputs, labels in batches]))
