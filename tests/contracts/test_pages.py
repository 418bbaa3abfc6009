"""The code on the pages of docs runs, one program per page, and prints what it should; shell blocks are read.

All pages run in this process, because starting one and importing JAX takes longer than most pages do. So the line that
makes simulated devices is left out: tests have eight. The README runs in a process of its own (tests/test_readme.py).
"""

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path

import jax
import pytest

import jaxpipe.schedules
from jaxpipe import cli

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md"))
FENCE = re.compile(r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.S | re.M)
DEVICES = re.compile(r"^jax.config.update\(\"jax_num_cpu_devices\", (\d)\).*\n", re.M)


def blocks(page, language):
    """Pairs of a block and the reason why it cannot run, or None."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return [(block["code"], block["reason"]) for block in FENCE.finditer(text) if block["language"] == language]


def program(page):
    return "\n".join(code for code, reason in blocks(page, "python") if reason is None)


# ------------------------------------------------------------------------------------------------------ what pages print


def generation(out):
    rows = re.findall(r"^ ?\[\[?([\d ]+)\]", out, re.M)
    assert len(rows) == 10 and all(len(row.split()) == 14 for row in rows)


def lengths(out):
    losses = [float(line) for line in out.split()]
    assert len(losses) == 2 and 3 < losses[1] < losses[0] < 4


def two_streams(out):
    first, last, other = map(float, re.findall(r"\d\.\d+", out))
    assert last < first / 2 and other < first / 2


def parts_and_wholes(out):
    alone, piped = re.search(r"the model (\d\.\d+), the engine (\d\.\d+)", out).groups()
    assert abs(float(alone) - float(piped)) < 2e-4
    assert re.search(r"^train  8,448 parameters of 27,264; 18,816 are frozen", out, re.M), out


def losses_and_metrics(out):
    names, values, found = out.strip().splitlines()
    assert names == "['balance', 'busiest', 'error', 'grad_norm', 'loss', 'share']"
    assert float(values.split()[0]) > float(values.split()[1]) > 0
    assert all(f"'{name}': " in found for name in ("loss", "error", "balance", "busiest", "share"))


def further_axes(out):
    spec = "PartitionSpec('pipe', None, None, 'model')"
    assert re.search(r"^loss \d\.\d+$", out, re.M) and spec in out.replace("P(", "PartitionSpec(")
    assert re.search(r"over model along dim 0: down/kernel, up/bias +rules or annotations say so", out)


def layer_state(out):
    assert "[['norm'], ['norm'], ['norm'], ['mean']]" in out and re.search(r"^by hand: \d+\.\d+$", out, re.M)


def evaluation(out):
    assert float(re.search(r"^test loss (\d\.\d+), logits \(4, 16, 8, 64\)$", out, re.M)[1]) < 4
    assert re.search(r"^\{'loss': [\d.]+, 'accuracy': [01]\.\d+, 'worst': \d", out, re.M), out
    assert re.findall(r"^logits (.*)$", out, re.M) == ["(4, 16, 8, 64)"] * 2


def schedules(out):
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows] == ["interleaved", "interleaved_zero_bubble", "zbv"]
    assert all(float(row[1]) > 24 and row[2] == "idle" and 0 < int(row[4]) < 30 for row in rows), out


def training_runs(out):
    assert "ended after step 20: all 20 steps are done" in out and re.search(
        r"^checkpoint \S+/run/global_step20$", out, re.M
    )
    assert "steps 21 to 40: steps" in out and len(re.findall(r"^step \d+: evaluation: loss 0", out, re.M)) == 4
    steps = [json.loads(line)["step"] for line in Path("run/log.jsonl").read_text().splitlines()]
    assert sorted(steps) == sorted([*range(1, 41), 10, 20, 30, 40]), steps
    assert re.search(r"^after 20 steps: 0\.\d+$", out, re.M)


def checkpoints(out):
    assert re.search(r"^loaded \S+/run/global_step5 \{'epoch': 3\} goes on after 20 micro-batches$", out, re.M), out
    assert cli.main(["inspect", "run"]) == 0


CHECKS = {
    check.__name__: check
    for check in (
        checkpoints,
        evaluation,
        further_axes,
        generation,
        layer_state,
        lengths,
        losses_and_metrics,
        parts_and_wholes,
        schedules,
        training_runs,
        two_streams,
    )
}
IN_THE_README = {"index", "tutorials/first_pipeline"}  # the script of the README; tests/test_readme.py runs it


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if program(page) and page not in IN_THE_README])
def test_the_code_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = program(page)
    assert all(int(count) <= jax.device_count() for count in DEVICES.findall(code))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        # The suite has a folder of its own for compiled programs, and a process has one.
        code = re.sub(r'^jax.config.update\("jax_compilation_cache_dir".*\n', "", DEVICES.sub("", code), flags=re.M)
        exec(compile(code, f"{page}.md", "exec"), {"__name__": "__main__"})
    CHECKS.get(Path(page).name, lambda out: None)(capsys.readouterr().out)


def test_every_check_has_its_page():
    assert set(CHECKS) <= {Path(page).name for page in PAGES if program(page)}


@pytest.mark.parametrize("page", PAGES)
def test_blocks_can_be_read(page, capsys):
    """Of blocks that are not run at least the syntax; a command that needs nothing is run."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(FENCE.findall(text)), "a fence that the tests do not see"
    for block in FENCE.finditer(text):
        language, code = block["language"], block["code"]
        assert language in ("python", "bash", "json", "text", "csv"), f"a block is marked {language!r}"
        if language == "python":
            ast.parse(code, page)
        elif language == "json":
            json.loads(code)
        elif language == "bash":
            read = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
            assert read.returncode == 0, read.stderr
            for command in re.findall(r"^python -m jaxpipe ((?:plot|simulate) .*)$", code, re.M):
                if block["reason"] is None and "--output" not in command:
                    assert cli.main(shlex.split(command)) == 0
                    assert capsys.readouterr().out


def test_pictures_of_schedules_are_what_str_gives():
    text = (DOCS / "explanations" / "schedule_tables.md").read_text(encoding="utf-8")
    found = re.findall(r"^<!-- schedules\.(\w+)\(([\d, ]+)\) -->\n```text\n(.*?)```", text, re.S | re.M)
    for name, counts, picture in found:
        assert picture.rstrip() == str(getattr(jaxpipe.schedules, name)(*map(int, counts.split(","))))
    assert len(found) == text.count("```text") == len(jaxpipe.schedules.registry.ALL)


@pytest.mark.parametrize("page", PAGES)
def test_no_code_hides_in_indented_blocks(page):
    """What is indented behind an empty line would be a block without a language, which no test runs."""
    text = FENCE.sub("", (DOCS / f"{page}.md").read_text(encoding="utf-8"))
    for block in re.findall(r"(?<=\n\n)((?: {4,}.*\n)+)", text):
        raise AssertionError(f"indented code, which belongs into a fence: {block}")
