"""What makers publish about their chips. Figures of the compilers become seconds and utilisation with these."""

from dataclasses import dataclass

from jaxpipe.checks import did_you_mean


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
    """

    name: str
    clock: float | None
    peak_flops: float
    bandwidth: float
    memory: int
    link: float


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
        Chip("v4", 275e12 / (8 * 2 * 128**2), 275e12, 1_228 * _GB, 32 * 2**30, 50 * _GB),
        Chip("v5e", 197e12 / (4 * 2 * 128**2), 197e12, 819 * _GB, 16 * 2**30, 50 * _GB),
        Chip("v5p", 459e12 / (8 * 2 * 128**2), 459e12, 2_765 * _GB, 95 * 2**30, 100 * _GB),
        Chip("v6e", 918e12 / (4 * 2 * 256**2), 918e12, 1_640 * _GB, 32 * 2**30, 112 * _GB),
        Chip("a100", None, 312e12, 2_039 * _GB, 80 * _GB, 300 * _GB),
        Chip("h100", None, 989e12, 3_350 * _GB, 80 * _GB, 450 * _GB),
        Chip("h200", None, 989e12, 4_800 * _GB, 141 * _GB, 450 * _GB),
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
