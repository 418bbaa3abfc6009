"""What makers publish about their chips. Figures of compilers and of plans become seconds and utilisation with these."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxpipe.checks import as_number, did_you_mean, show
from jaxpipe.errors import ConfigError


@dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    Attributes:
      name: short, in lower case.
      clock: cycles per second of the unit that the compiler counts cycles of; None where it counts none.
      peak_flops: products and sums per second in bfloat16, with dense operands.
      bandwidth: bytes per second between the chip and its memory.
      memory: bytes.
      link: bytes per second in one direction from one chip to a neighbour.
      group: how many chips such links join; None: all of them.
      network: bytes per second in one direction from one chip to those of other groups; None where it is not known.
    """

    name: str
    clock: float | None
    peak_flops: float
    bandwidth: float
    memory: int
    link: float
    group: int | None = None
    network: float | None = None

    @property
    def ring(self) -> float:
        """Bytes per second that a chip sends in a collective among chips that links join.

        On a torus, which the chips with a clock here have, a ring goes round in both directions.
        """
        return self.link if self.clock is None else 2 * self.link


_GB = 10**9

# TPU: peak, memory, bandwidth and interconnect are those of "TPU system architecture" in the documentation of Google
# Cloud, one page per version (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e). The interconnect is given there per chip: it
# is divided here by the number of links, 6 in a 3-dim torus and 4 in a 2-dim one. The clock is the peak divided by the
# products and sums per cycle of the matrix units: 2 x 128 x 128 in each of 8 (v4, v5p) or 4 (v5e) units, and as much as
# 2 x 256 x 256 in 4 units (v6e). What libtpu estimates for a product of two bfloat16 matrices of 4096 x 4096 fits: 88, 97,
# 96 and 87 % of that many per cycle on v4, v5e, v5p and v6e. The clock of v4, 1,050 MHz, is also printed in "TPU v4: An
# Optically Reconfigurable Supercomputer" (Jouppi et al., 2023).
# GPU: the data sheets of NVIDIA for A100 (SXM, 80 GB), H100 (SXM) and H200 (SXM), without sparsity. The link is NVLink, of
# which data sheets give the sum of both directions.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12 / (8 * 2 * 128**2), 275e12, 1_228 * _GB, 32 * 2**30, 50 * _GB, 4096),
        Chip("v5e", 197e12 / (4 * 2 * 128**2), 197e12, 819 * _GB, 16 * 2**30, 50 * _GB, 256, 6.4e12 / 256 / 8),
        Chip("v5p", 459e12 / (8 * 2 * 128**2), 459e12, 2_765 * _GB, 95 * 2**30, 100 * _GB, 8960, 50e9 / 8),
        Chip("v6e", 918e12 / (4 * 2 * 256**2), 918e12, 1_640 * _GB, 32 * 2**30, 112 * _GB, 256),
        Chip("a100", None, 312e12, 2_039 * _GB, 80 * _GB, 300 * _GB, 8, 200e9 / 8),
        Chip("h100", None, 989e12, 3_350 * _GB, 80 * _GB, 450 * _GB, 8, 400e9 / 8),
        Chip("h200", None, 989e12, 4_800 * _GB, 141 * _GB, 450 * _GB, 8, 400e9 / 8),
    )
}

# What JAX calls the kind of a device.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device, by what JAX calls its kind; None if it is none of those that are known here."""
    if device_kind in _KINDS:
        return CHIPS[_KINDS[device_kind]]
    words = device_kind.lower().replace("-", " ").split()
    return next((chip for name, chip in CHIPS.items() if name in words and chip.clock is None), None)


def known(name: str) -> str:
    """The names of all chips, for a message, and the one that `name` may have meant."""
    return f"{', '.join(CHIPS)}.{did_you_mean(name, CHIPS)}"


_FIELDS = ("peak_flops", "memory", "bandwidth", "link")


def as_chip(value: str | Mapping[str, float], memory: float | None = None) -> Chip:
    """The chip that a user means.

    Args:
      value: a name, in upper or lower case, or a dict of "peak_flops", "memory", "bandwidth" and "link", in FLOP/s, bytes,
        and bytes per second.
      memory: bytes that may be used, in the place of all that the chip has.

    Raises:
      ConfigError: the name is not known (the message lists those that are), or a value is no number above 0.
    """
    if isinstance(value, str):
        if value.lower() not in CHIPS:
            raise ConfigError(
                f"chip={show(value)} is not known here. Known chips: {known(value)} For another one, give its figures: "
                'chip={"peak_flops": 459e12, "memory": 95e9, "bandwidth": 2.8e12, "link": 100e9}.'
            )
        found = CHIPS[value.lower()]
    elif isinstance(value, Mapping) and set(value) == set(_FIELDS):  # pyright: ignore[reportUnnecessaryIsInstance]
        peak, room, bandwidth, link = (_above_0(f"chip[{name!r}]", value[name]) for name in _FIELDS)
        found = Chip("your chip", None, peak, bandwidth, int(room), link)
    else:
        raise ConfigError(
            f"chip={show(value)}: give a name ({', '.join(CHIPS)}), or a dict with exactly the keys "
            f"{', '.join(map(repr, _FIELDS))}: FLOP/s, bytes, and bytes per second."
        )
    return found if memory is None else replace(found, memory=int(_above_0("memory", memory)))


def _above_0(name: str, value: object) -> float:
    number = as_number(value)
    if number is None or number <= 0:
        raise ConfigError(f"{name}={show(value)} must be a finite number above 0.")
    return number
