"""`Plan`: the ranked ways to train, and their text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from jaxpipe.columns import columns, counted, short
from jaxpipe.hardware.chips import Chip
from jaxpipe.training.config import Config
from jaxpipe.training.loss_scale import DynamicScale

# What the parts of a step are called where one lost against another.
_WHY = {
    "compute": "computes more",
    "memory": "moves more bytes",
    "link": "waits longer for links",
    "optimizer": "longer optimizer step",
    "bubble": "larger bubble",
}


@dataclass(frozen=True)
class Row:
    """One way to train, as it is predicted.

    Attributes:
      config: the settings.
      mesh_shape: the sizes of the mesh axes, for `make_mesh`.
      rows: of a micro-batch on one data rank.
      partition: the boundaries of the stages, for `PipelineModule(partition_method=...)`.
      step_seconds: of a step of the global batch.
      utilisation: operations that the model needs, without recomputation, over what the chips of the mesh could do in that
        time at their peak, 0 to 1.
      bubble: the part of the ticks in which a rank waits, on average, 0 to 1.
      bytes_per_chip: at most.
      bytes: the same by category.
      seconds: of the rank that works longest, by what limits it: "compute", "memory", "link", "optimizer", "bubble".
      fits: whether it fits into the memory.
    """

    config: Config
    mesh_shape: Mapping[str, int]
    rows: int
    partition: tuple[int, ...]
    step_seconds: float
    utilisation: float
    bubble: float
    bytes_per_chip: int
    bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    fits: bool

    @property
    def limit(self) -> str:
        """What most of the time goes to: a key of `seconds`."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def chips(self) -> int:
        """How many chips the mesh takes."""
        product = 1
        for size in self.mesh_shape.values():
            product *= size
        return product

    def code(self) -> str:
        """Python that makes the mesh and the config, and an engine of `module`, `optimizer` and `example`."""
        axes = ", ".join(f"{axis}={size}" for axis, size in self.mesh_shape.items())
        default = Config()
        given = [(field.name, getattr(self.config, field.name)) for field in fields(Config)]
        kept = [f"{name}={_literal(value)}" for name, value in given if value != getattr(default, name)]
        return "\n".join(
            [
                f"mesh = jaxpipe.make_mesh({axes})",
                f"config = jaxpipe.Config({', '.join(kept)})",
                f"module.partition_method = {list(self.partition)}",
                "engine = jaxpipe.initialize(module, optimizer, mesh=mesh, example=example, config=config)",
            ]
        )


def _literal(value: object) -> str:
    if isinstance(value, DynamicScale):
        return f"jaxpipe.{value!r}"
    return repr(value) if isinstance(value, (str, int, float, bool)) else f"'{value}'"


@dataclass(frozen=True)
class Plan:
    """Ways to train a model on some chips.

    Attributes:
      rows: best first: what fits by the time of a step, and then what would be faster and does not fit; where nothing fits,
        what needs least memory.
      smallest: the way to train with the fewest chips that would do; None if none was found on any number.
      chip, chips, global_batch: what was asked for.
      costs: where the seconds of layers come from, in words.
    """

    rows: Sequence[Row]
    smallest: Row | None
    chip: Chip
    chips: int
    global_batch: int
    costs: str
    help: Sequence[str] = field(default=())

    @property
    def best(self) -> Row | None:
        """The fastest one that fits; None if nothing does."""
        return self.rows[0] if self.rows and self.rows[0].fits else None

    def __str__(self) -> str:
        lines = [
            f"{counted(self.chips, 'chip')} of {self.chip.name}, {short(self.chip.memory, 'B')} each, a global batch of "
            f"{counted(self.global_batch, 'row')}; seconds by {self.costs}",
            "",
        ]
        best = self.best
        if best is None:
            lines += [self._nothing(), ""]
        if self.rows:
            lines += columns([_HEAD, *(self._line(row) for row in self.rows)], left={0, 1, 4, 10, 11})
        if best is not None:
            spent = ", ".join(f"{name} {100 * part / best.step_seconds:.0f} %" for name, part in best.seconds.items())
            held = ", ".join(f"{name} {short(size, 'B')}" for name, size in best.bytes.items() if size)
            lines += ["", f"the best: {spent}", f"on a chip: {held}"]
            if self.smallest is not None and self.smallest.chips < best.chips:
                lines.append(f"it would fit on {counted(self.smallest.chips, 'chip')}: {_mesh(self.smallest)}")
            lines += ["", best.code()]
        return "\n".join(lines)

    def _nothing(self) -> str:
        what = f"nothing fits into {short(self.chip.memory, 'B')} on {counted(self.chips, 'chip')}"
        if self.smallest is None:
            found = "no number of chips was found that would do"
        else:
            row = self.smallest
            found = f"it needs at least {counted(row.chips, 'chip')}: {_mesh(row)}, remat={row.config.remat!r}"
        return "\n".join([f"{what}; {found}.", *self.help])

    def _line(self, row: Row) -> list[str]:
        config, best = row.config, self.best
        chunks = getattr(config, "num_chunks", 1)
        schedule = f"{config.schedule} x {chunks}" if chunks > 1 else str(config.schedule)
        return [
            _mesh(row),
            schedule,
            str(config.num_micro_batches),
            str(row.rows),
            str(config.remat),
            str(config.zero_stage),
            f"{row.step_seconds:.4g} s",
            f"{100 * row.utilisation:.1f} %",
            f"{100 * row.bubble:.1f} %",
            short(row.bytes_per_chip, "B"),
            row.limit,
            "best" if row is best else self._why(row),
        ]

    def _why(self, row: Row) -> str:
        """Why a row is not the best one."""
        best = self.best
        if not row.fits:
            return f"{short(row.bytes_per_chip - self.chip.memory, 'B')} too much"
        if best is None:
            return ""
        slower = 100 * (row.step_seconds / best.step_seconds - 1)
        if slower < 0.005:
            return "as fast, needs more memory" if row.bytes_per_chip > best.bytes_per_chip else "as fast"
        more = {name: part - best.seconds[name] for name, part in row.seconds.items()}
        return f"+{slower:.2g} %: {_WHY[max(more, key=lambda name: more[name])]}"


_HEAD = ["mesh", "schedule", "M", "rows", "remat", "zero", "step", "utilisation", "bubble", "a chip", "limit", ""]


def _mesh(row: Row) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in row.mesh_shape.items())
