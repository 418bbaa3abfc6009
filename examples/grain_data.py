"""Reads training data with grain, and goes on at the same record after a restart.

    JAX_NUM_CPU_DEVICES=4 python examples/grain_data.py --data 2 --checkpoints run
    JAX_NUM_CPU_DEVICES=4 python examples/grain_data.py --data 2 --checkpoints run --steps 20

    python -m jaxpipe launch -n 2 --devices-per-process 2 examples/grain_data.py --data 2 --inside pipe --local-rows

The second line goes on where the first one has stopped. The third one starts two processes, of which each reads only the
records of its own data rank. Without `--local-rows` every process reads all records, and jaxpipe takes what belongs to its
devices; the losses are the same up to rounding.
"""

import argparse
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpipe

WIDTH, ROWS, MICRO_BATCHES = 16, 8, 4  # rows of a micro-batch on all data ranks, micro-batches of a step


class Waves:
    """A data set: record i is a few points, and a wave at these points. A real one would read record i from a file."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        points = np.random.default_rng(index).uniform(-2, 2, WIDTH).astype(np.float32)
        return {"points": points, "wave": np.sin(2 * points)}


def read(mesh: jax.sharding.Mesh, local_rows: bool, seed: int = 0) -> grain.DatasetIterator:
    """What this process yields: pairs (inputs, labels), one micro-batch after the other, in a random order.

    Args:
      mesh: tells which rows of a micro-batch belong to this process.
      local_rows: yield those only. The state of the iterator, which a checkpoint holds, is the number of micro-batches, so
        any number of processes can go on with it.
    """
    records = grain.MapDataset.source(Waves()).seed(seed).shuffle().repeat()  # the same order in every process
    rows = ROWS
    if local_rows:
        mine = jaxpipe.local_rows(mesh, ROWS)
        rows = mine.stop - mine.start
        # Part k of n takes the records k, k + n, k + 2 n, ...: in each micro-batch the parts together are what one
        # process would read. Nothing else is read: grain picks records by their number.
        records = records[mine.start // rows :: ROWS // rows]
    pairs = records.batch(rows).map(lambda batch: (batch["points"], batch["wave"]))
    return iter(pairs.to_iter_dataset())  # threads read ahead


def dense(size: int, activate: bool) -> jaxpipe.Layer:
    def init(key: jax.Array, x: jax.Array) -> dict[str, jax.Array]:
        return {"kernel": jax.random.normal(key, (x.shape[-1], size)) / x.shape[-1] ** 0.5}

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = x @ params["kernel"]
        return x + jnp.tanh(y) if activate else y

    return jaxpipe.Layer(init, apply, "Block" if activate else "Dense")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Trains on data that grain reads.")
    parser.add_argument("--steps", type=int, default=10, help="train until so many steps are made")
    parser.add_argument("--data", type=int, default=1, help="data ranks; the other devices are ranks of the pipeline")
    parser.add_argument("--inside", default="data", help="the axis that stays inside a process: data or pipe")
    parser.add_argument("--local-rows", action="store_true", help="each process reads only the rows of its data ranks")
    parser.add_argument("--checkpoints", type=Path, help="where to save at the end, and to go on from")
    args = parser.parse_args(arguments)

    mesh = jaxpipe.make_mesh(len(jax.devices()) // args.data, args.data, inside=args.inside)
    layers = [dense(4 * WIDTH, False), *[dense(4 * WIDTH, True)] * 6, dense(WIDTH, False)]
    row = jax.ShapeDtypeStruct((ROWS, WIDTH), np.float32)
    engine = jaxpipe.initialize(
        jaxpipe.PipelineModule(layers, lambda outputs, labels: ((outputs - labels) ** 2).mean()),
        optax.adam(1e-3),
        mesh=mesh,
        example=(row, row),
        config=jaxpipe.Config(num_micro_batches=MICRO_BATCHES, local_rows=args.local_rows),
    )
    show = print if jax.process_index() == 0 else lambda *_: None  # one of several processes is enough
    show(engine.summary())
    data = read(mesh, args.local_rows)
    if args.checkpoints is not None and (args.checkpoints / "latest").exists():
        path, _ = engine.load_checkpoint(args.checkpoints, data_iter=data)
        show(f"going on from {path}, data at {data.get_state()}")
    for step in range(engine.train_calls, args.steps):
        loss = engine.train_batch(data)
        show(f"step {step + 1}: loss {loss:.6f}")
    if args.checkpoints is not None:
        engine.save_checkpoint(args.checkpoints, data_iter=data)


if __name__ == "__main__":
    jaxpipe.start()
    main()
