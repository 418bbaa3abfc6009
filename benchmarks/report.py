"""Turns the measurements of one run into Markdown: the full report, and the few lines that the documentation quotes."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]

MARKS = ("<!-- figures: begin, written by benchmarks/run.py --quote -->", "<!-- figures: end -->")


def markdown(report: Report) -> str:
    """The tables of one run."""
    return "\n\n".join([_head(report), _times(report), _programs(report), _memory(report)]) + "\n"


def _head(report: Report) -> str:
    size, few, many = report["model"], report["micro_batches"], report["many_micro_batches"]
    kind = "simulated devices that share" if report["simulated"] else f"device(s) of kind {report['device_kind']};"
    quick = "**A quick run: it shows that the script works, and nothing else.**\n\n" if report["quick"] else ""
    return (
        f"# {report['platform']}, {report['date']}\n\n{quick}"
        f"{report['devices']} {kind} {report['cores']} CPU cores; jax {report['jax']}, jaxlib {report['jaxlib']}, "
        f"Python {report['python']}. {size['layers']} layers, width {size['width']}, {size['heads']} heads, sequence "
        f"{size['length']}, micro-batches of {size['rows']} rows, float32; M = {few} (where noted, {many}). "
        f"{report['rounds']} rounds; the run took {report['seconds']:.0f} s. [How to read this](../README.md)."
    )


def _times(report: Report) -> str:
    rows = [
        [
            time["work"],
            time["remat"],
            time["stages"],
            spread(time["ratio"]),
            f"{statistics.median(time['seconds']):.3f}",
            f"{statistics.median(time['plain_seconds']):.3f}",
        ]
        for time in report["times"]
    ]
    head = ["work", "remat", "S", "time / plain loop: median (min-max)", "pipeline, s", "plain loop, s"]
    return "## Time\n\n" + table(head, rows)


def _programs(report: Report) -> str:
    rows = [
        [
            program["name"],
            program["remat"],
            program["stages"],
            program["micro_batches"],
            f"{program['trace_seconds']:.2f}",
            f"{program['lower_seconds']:.2f}",
            f"{program['xla_seconds']:.2f}",
            program["hlo_lines"],
            program["layer_forward_lines"],
            program["layer_backward_lines"],
            program["permutes"],
            _megabytes(program["temp_bytes"]),
        ]
        for program in report["programs"]
    ]
    head = ["program", "remat", "S", "M", "trace, s", "lower, s", "XLA, s", "HLO lines", "forward", "backward"]
    head += ["permutes", "temp MB / device"]
    ours = [p for p in report["programs"] if p["name"] == "1F1B"]
    shares = [p["xla_seconds"] / (p["trace_seconds"] + p["lower_seconds"] + p["xla_seconds"]) for p in ours]
    return (
        f"## Compiling\n\n{table(head, rows)}\n\n"
        f"XLA takes {100 * min(shares):.0f} to {100 * max(shares):.0f} % of the time that compiling 1F1B takes."
    )


def _memory(report: Report) -> str:
    return f"## Temporary memory per device against M\n\n{_memory_table(report)}"


def _memory_table(report: Report) -> str:
    few, many = report["micro_batches"], report["many_micro_batches"]
    found: dict[tuple[str, str, int], dict[int, int]] = {}
    for program in report["programs"]:
        at = program["name"], program["remat"], program["stages"]
        found.setdefault(at, {})[program["micro_batches"]] = program["temp_bytes"]
    rows = [
        [name, remat, stages, _megabytes(sizes[few]), _megabytes(sizes[many]), f"{sizes[many] / sizes[few]:.2f}"]
        for (name, remat, stages), sizes in found.items()
        if few in sizes and many in sizes
    ]
    head = ["program", "remat", "S", f"MB at M = {few}", f"MB at M = {many}", "grows by"]
    return table(head, rows)


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table with aligned columns: words to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(cell[:1].isdigit() for cell in column) for column in zip(*cells[1:], strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def write(folder: Path, found: Report, text: str, prefix: str = "") -> None:
    """Writes <prefix><platform>_<date>.json and the tables as .md beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{prefix}{found['platform']}_{found['date']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"Written: {path} and {path.with_suffix('.md').name}")


def spread(ratio: dict[str, float]) -> str:
    """Median (least-greatest)."""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


# ------------------------------------------------------------------------------------------------------------ the site


def figures(source: Path) -> str:
    """What docs/explanations/when_not.md quotes of one run; nothing is typed by hand there."""
    report: Report = json.loads(source.read_text(encoding="utf-8"))
    if report["quick"]:
        raise SystemExit(f"{source} is a quick run, which measures nothing. Quote one made without --quick.")
    times = [[t["work"], t["remat"], t["stages"], spread(t["ratio"])] for t in report["times"]]
    devices = f"{report['devices']} {'simulated ' if report['simulated'] else ''}{report['platform']} devices"
    return (
        f"{table(['work', 'remat', 'S', 'time / one-device loop: median (min-max)'], times)}\n\n"
        f"{_memory_table(report)}\n\n"
        f"Times are compared with a plain jitted loop on one device; memory is the temporary memory of one device. "
        f"Measured on {devices}, {report['cores']} cores, {report['date']}, jax {report['jax']}: "
        f"[the whole report](../../benchmarks/results/{source.stem}.md), [how to read it](../../benchmarks/README.md)."
    )


def quote(page: Path, source: Path) -> None:
    """Puts the figures of `source` between the marks in `page`."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{figures(source)}\n{MARKS[1]}{after}", encoding="utf-8")
