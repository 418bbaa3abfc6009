"""Takes micro-batches from an iterator and checks them, before any of them goes to a device."""

import itertools
from collections.abc import Callable, Hashable, Iterator

from jaxpipe.data.check import check_micro_batch
from jaxpipe.data.leaves import appearance, check_pair, difference
from jaxpipe.errors import DataError
from jaxpipe.processes import watchdog
from jaxpipe.types import Batch

Check = Callable[[Batch], None]  # raises DataError for a micro-batch that does not fit


class EndOfData(DataError):
    """A `DataError` whose only fault is that the iterator has ended, here or in another process."""


def as_data_error(error: Exception) -> DataError:
    """What went wrong with data as a `DataError`. An iterator of the user may raise anything."""
    if isinstance(error, DataError):
        return error
    made = DataError(f"data_iter raised {type(error).__name__}: {error}")
    made.__cause__ = error
    return made


def pull(data_iter: Iterator[Batch], num_micro_batches: int, check: Check) -> list[Batch]:
    """Takes M micro-batches, (inputs, labels) with leaves [B, ...], from an iterator.

    Raises:
      DataError: it is no iterator, ends early (`EndOfData`), or yields something else than pairs; or `check` raised it.
    """
    items = take(data_iter, num_micro_batches, check)
    if len(items) < num_micro_batches:
        raise EndOfData(
            f"data_iter ended after {len(items)} of {num_micro_batches} micro-batches. Nothing was computed and the state "
            "is unchanged. Give it more data, let it repeat (itertools.cycle), lower num_micro_batches, or fill the last "
            "step up with micro-batches without weight (jaxpipe.pad_micro_batches)."
        )
    return items


def take(data_iter: Iterator[Batch], most: int, check: Check) -> list[Batch]:
    """Takes up to `most` micro-batches from an iterator, and fewer only where it ends.

    Each one is checked before the next one is taken.

    Raises:
      DataError: it is no iterator, or yields something else than pairs; or `check` raised it.
    """
    if not hasattr(data_iter, "__next__"):
        raise DataError(
            f"data_iter is a {type(data_iter).__name__}, not an iterator: each call would start it over. "
            "Make one with iter(...) and pass the same one to every call."
        )
    items: list[Batch] = []
    for item in itertools.islice(watchdog.pulled(data_iter), most):
        try:
            pair = check_pair(item, "is", " It yields pairs (inputs, labels).")
            check(pair)
        except DataError as error:
            raise DataError(
                f"Micro-batch {len(items)} of data_iter{_joint(str(error))} ({len(items) + 1} of {most} micro-batches were "
                "taken from data_iter. Nothing was computed, and the state is unchanged.)"
            ) from error
        items.append(pair)
    return items


def _joint(text: str) -> str:
    """The text with what comes before it: a space if it continues a sentence, and a colon if it is a sentence itself."""
    return f" {text}" if text.startswith("is ") else f": {text}"


def check_for_training(ranks: int) -> Check:
    """A check for the micro-batches of one training step: each must fit the data ranks, and all must have one shape.

    Args:
      ranks: the number of data ranks over which their rows are split.
    """
    rule = (
        "All micro-batches of one training step have one shape: pad them with jaxpipe.pad_micro_batches, which gives "
        "weights that keep the loss exact, or drop the odd one."
    )
    return _check(lambda item: check_micro_batch(item, ranks), rows_too=True, rule=rule)


def check_for_evaluation(needs_labels: bool) -> Check:
    """A check for the micro-batches of one evaluation, which may differ in their numbers of rows and in nothing else.

    Args:
      needs_labels: False leaves the labels unchecked.
    """
    rule = (
        "In one evaluation micro-batches may differ in the number of rows, their first dim, and in nothing else; "
        "jaxpipe.pad_micro_batches makes their lengths alike."
    )
    check = _check(lambda item: check_micro_batch(item, 1, any_rows=True), rows_too=False, rule=rule)
    return check if needs_labels else lambda item: check((item[0], None))


def _check(one: Check, rows_too: bool, rule: str) -> Check:
    """A check that calls `one` on the first micro-batch, and on the others unless they look the same as an earlier one.

    Args:
      rows_too: whether different numbers of rows are an error.
      rule: the last sentence of the message.
    """
    first: list[Batch] = []
    seen: set[Hashable] = set()

    def check(item: Batch) -> None:
        looks = appearance(item)
        if looks is not None and looks in seen:
            return
        one(item)
        first.append(item)
        if odd := difference(item, first[0], rows_too):
            raise DataError(f"is {odd[0]}, but micro-batch 0 is {odd[1]}. {rule}")
        seen.add(looks)

    return check
