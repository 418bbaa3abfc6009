"""What `python -m jaxpipe plan` does: finds the user's function, and prints the plan."""

from dataclasses import dataclass

from jaxpipe.errors import ConfigError
from jaxpipe.hardware.command import called
from jaxpipe.planner.plan import plan_for
from jaxpipe.planner.report import Plan
from jaxpipe.training.config import Config


@dataclass(frozen=True)
class PlanCommand:
    """The arguments of the command line.

    Attributes:
      function: `package.module:function`; called without arguments, it returns (module, optimizer, example, config).
      chips, global_batch: as for `jaxpipe.plan`.
      chip: the name of a chip.
      memory: bytes of a chip that may be used, as a number or with GB or GiB behind it; None: all that it has.
      measure: None, "time" or "tpu".
    """

    function: str
    chips: int
    global_batch: int
    chip: str = "v5p"
    memory: str | None = None
    measure: str | None = None

    def run(self) -> Plan:
        """Plans what the function returns. Its config says what the plan keeps, such as the dtype of a step; where there is
        none, that is bfloat16.

        Raises:
          JaxpipeError: the function cannot be found or returns something else, or what `jaxpipe.plan` raises.
        """
        memory = None if self.memory is None else _bytes(self.memory)
        module, _, example, given = called(self.function)
        config = Config.make(given if given is not None else {"compute_dtype": "bfloat16"})
        return plan_for(
            module,
            example,
            config,
            self.chips,
            self.chip,
            self.global_batch,
            memory,
            self.measure,  # type: ignore[arg-type]
        )


def _bytes(text: str) -> float:
    """A number of bytes: `80e9`, `80GB` or `95GiB`."""
    units = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6, "": 1}
    unit = next(unit for unit in units if text.endswith(unit))
    try:
        return float(text[: len(text) - len(unit)]) * units[unit]
    except ValueError:
        raise ConfigError(f"--memory {text}: write bytes of a chip, such as 80e9, 80GB or 95GiB.") from None
