"""What the pages say (README, CONTRIBUTING, docs): examples run, tables are what the code gives, names and links exist."""

import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import jaxpipe
from jaxpipe import cli, errors, schedules
from jaxpipe.lowering.lower import lower

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def between(begin, end):
    return README.split(begin)[1].split(end)[0].strip()


@pytest.mark.slow
def test_the_examples_run(tmp_path):
    """All in one process, as a reader would paste them, with the devices that the script itself asks for."""
    # More time than a reader's machine would give: on a loaded one a device may come late to a collective.
    flags = "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_backend_optimization_level=0"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(PYTHON)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"(?:loss|on one device) (\d+\.\d+)", run.stdout)]
    training, test, ours, oracle = losses
    assert training < 1 and test < 1, f"it did not learn: {run.stdout}"
    assert abs(ours - oracle) < 2e-6, run.stdout
    assert re.search(r"^\{'loss': 0\.\d+, 'accuracy': [01]\.\d+, 'worst': \d", run.stdout, re.M), run.stdout
    assert (
        "loaded run/" not in run.stdout
        and f"loaded {tmp_path}/run/global_step0 {{'epoch': 3}} goes on after 0" in run.stdout
    )
    assert cli.main(["inspect", str(tmp_path / "run")]) == 0
    assert re.findall(r"^logits (.*)$", run.stdout, re.M) == ["(8, 16, 8, 64)", "(8, 16, 8, 64)"]


def test_the_training_script_is_short():
    script, loop, *_ = PYTHON
    assert "initialize" in script and "value_and_grad" in loop
    assert sum(bool(line.strip()) for line in script.splitlines()) < 30


def test_the_picture_is_what_str_gives():
    picture = re.search(r"^```text\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[1]
    assert picture.rstrip() == str(schedules.one_f_one_b(4, 8))


def test_the_table_of_schedules_is_what_simulate_gives():
    rows = []
    for name in schedules.registry.ALL:
        chunks = 2 if name == "zbv" or name in schedules.registry.CHUNKED and name != "forward_only" else 1
        table = schedules.registry.find(name, 4 * chunks, 8, chunks)
        free, barriers = schedules.simulate(table), schedules.simulate(table, sync="global")
        live = ", ".join(f"{float(peak):g}" for peak in free.peak_live)
        training = name in schedules.registry.TRAINING
        shown = [f'`"{name}"`', live] if training else ["(evaluation)", "nothing is kept"]
        percent = f"{100 * free.bubble_fraction:.0f} %"
        times = [f"{float(time):g}" for time in (free.makespan, free.bubble, barriers.bubble)]
        rows.append([shown[0], *times[:2], percent, times[2], shown[1]])
    lines = between("checked by tests/test_readme.py -->", "<!-- schedules: end").splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert found == rows


def test_the_table_of_evaluation_arguments_is_the_signature():
    found = re.findall(r"^\| `(\w+)` +\| `([^`]+)` +\|", between("| argument ", "\n\n"), re.MULTILINE)
    parameters = list(inspect.signature(jaxpipe.Engine.eval_batch).parameters.values())[2:]
    assert found == [(parameter.name, repr(parameter.default)) for parameter in parameters]


def test_figures_come_from_a_committed_result():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    quoted = between(*report.MARKS)
    source = re.search(r"benchmarks/results/([\w.-]+)\.md", quoted)
    if source is None:
        assert not re.search(r"\d", quoted), "figures that come from no result"
    else:
        assert quoted == report.figures(ROOT / "benchmarks" / "results" / f"{source[1]}.json").strip()


@pytest.mark.parametrize(
    "command", re.findall(r"^ {4}python -m jaxpipe (?!inspect|launch|compile)(.*)$", README, re.MULTILINE)
)
def test_commands_run(command, capsys):
    assert cli.main(shlex.split(command)) == 0
    assert capsys.readouterr().out


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z-]+)(?=    |`| ARGS| PYTHON)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


HOLDERS = {
    "jaxpipe": jaxpipe,
    "jaxpipe.schedules": schedules,
    "engine": jaxpipe.Engine,
    "pipe": jaxpipe.Pipeline,
    "module": jaxpipe.PipelineModule,
    "Schedule": jaxpipe.schedules.Schedule,
    "Config": jaxpipe.Config,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_exist(page):
    """Every `pipe.something` and `jaxpipe.something` in code: an attribute, a field, or a module of that name."""
    text = page.read_text(encoding="utf-8")
    code = "\n".join([*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.M)])
    for holder, name in re.findall(r"(?<![\w./])((?:jaxpipe\.)?\w+)\.([a-zA-Z_]\w*)", code):
        if holder in HOLDERS and name != "py" and not hasattr(HOLDERS[holder], name):
            source = inspect.getsource(HOLDERS[holder])
            assert re.search(rf"self\.{name}\b", source), f"{holder}.{name}"


NOT_DONE = {
    "interleaved": lambda: lower(schedules.forward_only(4, 4, num_chunks=2)),
    "split backward": lambda: lower(schedules.Schedule.from_csv("0F0,0I0,0W0\n")),
    "ZeRO": lambda: jaxpipe.Config(zero_stage=2),
}


@pytest.mark.parametrize("what", NOT_DONE)
def test_what_is_not_done_is_refused(what):
    """If this fails, something was finished: take it off the list in README.md, and off this one."""
    with pytest.raises(errors.JaxpipeError):
        NOT_DONE[what]()
