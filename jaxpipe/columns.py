"""Tables as lines of text."""

from collections.abc import Collection, Sequence


def columns(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """Makes lines of rows of cells. The columns of the numbers `left` are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def ranges(numbers: Collection[int], most: int = 8) -> str:
    """Numbers in a short form, such as `0-3, 5`, or `1, 3, 5, ..., 15` if there are more than `most` parts."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return listed([str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs], most)


def listed(parts: Sequence[str], most: int = 8, between: str = ", ") -> str:
    """Parts one after the other; the beginning and the last one if there are more than `most`."""
    return between.join(parts if len(parts) <= most else [*parts[: most - 2], "...", parts[-1]])


def counted(number: int, one: str, several: str = "") -> str:
    """A number with its noun, such as `1 layer` or `1,200 layers`."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def short(number: float, unit: str = "") -> str:
    """A number with three digits and a prefix of thousands, such as `12.6 MB` for 12,582,912 and the unit B."""
    prefixes = iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while abs(number) >= 999.5 and prefix != "P":
        number, prefix = number / 1000, next(prefixes)
    digits = 0 if not prefix or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f} {prefix}{unit}".rstrip()
