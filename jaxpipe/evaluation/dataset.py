"""Whole data sets: batch after batch, the next one under way to the devices while one is running."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxpipe.checks import is_count
from jaxpipe.data.agree import Agreement
from jaxpipe.data.place import put
from jaxpipe.data.pull import check_for_evaluation, pull, take
from jaxpipe.errors import DataError
from jaxpipe.evaluation.evaluator import Evaluator
from jaxpipe.executor.options import Found, Options
from jaxpipe.model.loss import over
from jaxpipe.model.metrics import Joined
from jaxpipe.monitor.late import Late
from jaxpipe.monitor.progress import Progress
from jaxpipe.types import AnyArray, Batch, Params, Tree

Sums = tuple[Any, dict[str, Joined]]  # (total, weight) of the loss or None, and the metrics, on the host
# Batches whose results the host has not asked for yet: one running, one waiting behind it with its data in place.
IN_FLIGHT = 2


def batches(
    source: Iterable[Batch], num_micro_batches: int, num_batches: int | None, agreement: Agreement, labels: bool
) -> Iterator[list[Batch]]:
    """Groups of micro-batches, M in all, until the data or `num_batches` end; see `Evaluator.run`."""
    if not isinstance(source, Iterable):
        raise DataError(f"data_iter is a {type(source).__name__}, which yields nothing. Pass an iterator or a loader.")
    if num_batches is not None and not is_count(num_batches):
        raise DataError(f"num_batches={num_batches!r} must be an integer, 1 or more, or None for all there is.")
    return _batches(iter(source), num_micro_batches, num_batches, agreement, labels)


def _batches(
    source: Iterator[Batch], num_micro_batches: int, num_batches: int | None, agreement: Agreement, labels: bool
) -> Iterator[list[Batch]]:
    count = 0
    while num_batches is None or count < num_batches:
        items, share = agreement.take(
            lambda: _wanted(take(source, num_micro_batches, check_for_evaluation(labels)), labels)
        )
        if items:
            count += 1
            yield put(items, share)
        if len(items) < num_micro_batches:
            return


def groups(source: Iterator[Batch], num_micro_batches: int, agreement: Agreement, labels: bool) -> list[Batch]:
    """M micro-batches as groups on the mesh; raises DataError where there are fewer, or they do not fit."""
    items, share = agreement.take(
        lambda: _wanted(pull(source, num_micro_batches, check_for_evaluation(labels)), labels)
    )
    return put(items, share)


def _wanted(items: list[Batch], labels: bool) -> list[Batch]:
    """The micro-batches without labels that are not wanted, and that nobody has looked at."""
    return items if labels else [(inputs, None) for inputs, _ in items]


def bar(
    source: Any, num_micro_batches: int, num_batches: int | None, evaluator: Evaluator, wanted: bool | None
) -> Progress:
    """The progress bar of `Engine.evaluate`; `wanted=None`: if the output is a terminal."""
    total = number_of_batches(source, num_micro_batches, num_batches)
    enabled = sys.stdout.isatty() if wanted is None else wanted
    return Progress(total, unit="batch", enabled=enabled, mesh=evaluator.mesh)


def number_of_batches(source: Any, num_micro_batches: int, num_batches: int | None) -> int | None:
    """How many batches there will be, as far as that is known."""
    try:
        length = len(source)
    except TypeError:  # it has no length, or will not tell (a torch loader of an endless data set)
        return num_batches
    total = -(-length // num_micro_batches)
    return total if num_batches is None else min(total, num_batches)


def evaluate(
    evaluator: Evaluator,
    params: Params,
    source: Iterator[list[Batch]],
    options: Options,
    progress: Progress,
    states: Tree = None,
) -> dict[str, Any]:
    """The loss and the metrics over all batches, as plain floats (arrays where a metric is one)."""
    sums: Sums | None = None
    rows: dict[str, list[np.ndarray]] = {}
    pending = Late[Found]()

    def fetch(most: int) -> None:
        nonlocal sums
        for found in map(jax.device_get, pending.beyond(most)):
            sums = _wide(found) if sums is None else _plus(sums, _wide(found))
            for name, values in found.rows.items():
                rows.setdefault(name, []).append(values)
            progress.update(_loss(sums))

    with progress:
        for groups in source:
            found = evaluator.run(params, groups, options, states)
            pending.add(replace(found, outputs=None))
            fetch(IN_FLIGHT)
        fetch(0)
    if sums is None:
        raise DataError("data_iter has ended: there is nothing to evaluate. Make a fresh one for each call.")
    loss = _loss(sums)
    if sums[0] is not None and loss is None:
        raise DataError(
            "The weights that loss_fn returns add up to 0 over all of the data, so there is no mean loss. Pass data in "
            "which something counts; see jaxpipe.Weighted."
        )
    result = {} if loss is None else {"loss": loss}
    result |= {name: _plain(joined.finish()) for name, joined in sums[1].items()}
    return result | {name: np.concatenate(parts) for name, parts in rows.items()}


def _wide(found: Found) -> Sums:
    """Sums of one batch, in types that lose nothing over a long data set."""

    def one(leaf: AnyArray) -> np.ndarray:
        dtype = np.asarray(leaf).dtype
        if np.issubdtype(dtype, np.complexfloating):
            return np.asarray(leaf, np.complex128)
        return np.asarray(leaf, np.int64 if np.issubdtype(dtype, np.integer) else np.float64)

    loss = None if found.loss is None else tuple(a.sum(dtype=np.float64) for a in found.loss)
    return jax.tree.map(one, (loss, found.metrics))


def _plus(a: Sums, b: Sums) -> Sums:
    loss = None if a[0] is None else tuple(x + y for x, y in zip(a[0], b[0], strict=True))
    return loss, {name: joined + b[1][name] for name, joined in a[1].items()}


def _loss(sums: Sums) -> float | None:
    """Total over weight; None where no loss is wanted, or nothing has counted."""
    return float(over(*sums[0])) if sums[0] is not None and sums[0][1] != 0 else None


def _plain(value: Any) -> Any:
    return value.item() if np.ndim(value) == 0 else np.asarray(value)


def predict(
    evaluator: Evaluator, held: Callable[[], tuple[Params, Tree]], source: Iterator[list[Batch]], options: Options
) -> Iterator[Tree]:
    """Outputs batch by batch, leaves [M, B, ...]; while one is used, the next one is being computed.

    Args:
      held: gives the present params and the present state of the layers.
    """
    pending = Late[Tree]()
    try:
        for groups in source:
            for group in groups:
                params, states = held()
                pending.add(evaluator.run(params, [group], options, states).outputs)
                yield from pending.beyond(1)
    except Exception:  # of the data: what was computed before comes first
        yield from pending.beyond(0)
        raise
    yield from pending.beyond(0)
