"""What `zero_stage` may be."""

from typing import Any

from jaxpipe.checks import as_integer, show
from jaxpipe.errors import ConfigError

WHY_NOT = {
    2: "to keep only a part of the gradients, they would have to be scattered inside the loop, once per micro-batch and "
    "not once per step",
    3: "weights would have to be gathered inside the loop, for each layer twice per micro-batch and not once per step",
}


def check_zero_stage(value: Any) -> int:
    """`zero_stage` as an integer.

    Raises:
      ConfigError: it is neither 0 nor 1. The message says why 2 and 3 are not there.
    """
    number = as_integer(value)
    if number in (0, 1):
        return number
    reason = f" Stage {number} is not there: {WHY_NOT[number]}." if number in WHY_NOT else ""
    raise ConfigError(
        f"zero_stage={show(value)}: it is 0, or 1, which cuts weights and the state of the optimizer over the data ranks."
        f"{reason}{' Use zero_stage=1, and more ranks if memory does not suffice.' if reason else ''}"
    )
