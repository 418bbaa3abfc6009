"""What every contestant does: the sizes, the weights and the data, without JAX and without torch; and how it is told to.

Shapes: M micro-batches, B rows, L length, D width, V vocabulary.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

MICRO_BATCHES = 8
LEARNING_RATE = 1e-3
# Steps that are compared between contestants before any is timed.
CHECKED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Task:
    """A GPT: embedding with learned places, blocks, a norm and an untied head; and one micro-batch of it."""

    layers: int = 8
    width: int = 256
    heads: int = 4
    length: int = 128
    rows: int = 4
    vocabulary: int = 256

    def weights(self) -> list[dict[str, np.ndarray]]:
        """Embedding, blocks, head; matrices are [in, out], in float32. The same in every process."""
        rng, width, vocabulary = np.random.default_rng(0), self.width, self.vocabulary

        def dense(inputs: int, outputs: int, scale: float | None = None) -> np.ndarray:
            drawn = rng.standard_normal((inputs, outputs), np.float32)
            return drawn * np.float32(inputs**-0.5 if scale is None else scale)

        def block() -> dict[str, np.ndarray]:
            matrices = {
                "qkv": dense(width, 3 * width),
                "out": dense(width, width),
                "up": dense(width, 4 * width),
                "down": dense(4 * width, width),
            }
            return {**matrices, "scale_1": np.ones(width, np.float32), "scale_2": np.ones(width, np.float32)}

        embedding = {"tokens": dense(vocabulary, width, 0.02), "places": dense(self.length, width, 0.02)}
        blocks = [block() for _ in range(self.layers)]
        return [embedding, *blocks, {"scale": np.ones(width, np.float32), "kernel": dense(width, vocabulary)}]

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels [M, B, L] of step `number`: a rule that can be learned, so that losses move."""
        shape = MICRO_BATCHES, self.rows, self.length
        inputs = np.random.default_rng(number).integers(0, self.vocabulary, shape)
        return inputs, (3 * inputs + 1) % self.vocabulary


def arguments() -> argparse.Namespace:
    """What run.py tells a contestant: its kind, S, and the size of the task."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--task", type=lambda text: Task(**json.loads(text)), default=Task())
    return parser.parse_args()


def answers() -> Any:
    """Where answers go: what stdout was. From then on whatever libraries print goes to stderr."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return stream


def serve(stream: Any, train: Callable[[int], float | None], evaluate: Callable[[int], float | None]) -> None:
    """Answers each line of stdin, which is `train N` or `evaluate N` with the number of a batch, by a loss, or null.

    Both functions return when the work is done, not when it has been handed to a device. Null is for processes of a
    group that do not know the loss. Between two lines the process waits, and uses no processor.
    """
    works = {"train": train, "evaluate": evaluate}
    print(json.dumps("ready"), file=stream, flush=True)
    for line in sys.stdin:
        work, number = line.split()
        print(json.dumps(works[work](int(number))), file=stream, flush=True)
