"""Compares what all processes must have alike, and names the process and the field where they have not."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxpipe.errors import JaxpipeError
from jaxpipe.processes.group import Group


class Field(NamedTuple):
    """Something that is the same on every process.

    Attributes:
      name: what messages call it.
      value: JSON; a dict if it has parts with names of their own. None, also for a part, if this process does not know.
      error: the class of the error where it differs.
      shown: whether messages show the value, which is a hash otherwise.
    """

    name: str
    value: Any
    error: type[JaxpipeError]
    shown: bool = False


def check_alike(group: Group, fields: Sequence[Field]) -> None:
    """Raises on all processes the error of the first field in which they differ."""
    said = group.gather([field.value for field in fields])
    for index, field in enumerate(fields):
        name, values = field.name, [one[index] for one in said]
        if all(isinstance(value, dict) for value in values):
            parts = dict.fromkeys(part for value in values for part in value)
            each = {part: [value.get(part, "not there") for value in values] for part in parts}
            odd_part = next((part for part in parts if _differ(each[part])), None)
            if odd_part is None:
                continue
            name, values = f"{name}: {odd_part}", each[odd_part]
        elif not _differ(values):
            continue
        known = [value for value in values if value is not None]
        usual = max(known, key=known.count)  # of two processes nobody knows which one is right
        place = next(place for place, value in enumerate(values) if value not in (None, usual))
        how = f" ({values[place]!r}, and there {usual!r})" if field.shown else ""
        raise field.error(
            f"Process {group.members[place]} differs from process {group.members[values.index(usual)]} in {name}{how}. All "
            "processes of a program build the same model on the same mesh, with the same settings."
        )


def _differ(values: Sequence[Any]) -> bool:
    known = [value for value in values if value is not None]
    return any(value != known[0] for value in known)
