"""What the pages say (README, CONTRIBUTING, docs): examples run, tables are what the code gives, names and links exist."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxpipe
from jaxpipe import errors, schedules
from jaxpipe.executor import scopes
from jaxpipe.schedules.draw import draw

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]
BLOCK = r"^```python\n(.*?)^```"
PYTHON = re.findall(BLOCK, README, re.DOTALL | re.MULTILINE)


def between(begin, end, page):
    return (DOCS / page).read_text(encoding="utf-8").split(begin)[1].split(end)[0].strip()


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    """With the rest of the first tutorial, in a process of its own, with the devices that the script itself asks for."""
    tutorial = (DOCS / "tutorials" / "first_pipeline.md").read_text(encoding="utf-8")
    script, loop = re.findall(BLOCK, tutorial, re.DOTALL | re.MULTILINE)
    assert [script] == PYTHON
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{script}\n{loop}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    training, test, ours, oracle = (float(x) for x in re.findall(r"(?:loss|on one device) (\d+\.\d+)", run.stdout))
    assert training < 1 and test < 1, f"it did not learn: {run.stdout}"
    assert abs(ours - oracle) < 2e-6, run.stdout


def test_the_example_is_short_and_the_same_on_the_first_pages():
    (script,) = PYTHON
    assert sum(bool(line.strip()) for line in script.splitlines()) <= 25
    for page in ("index.md", "tutorials/first_pipeline.md"):
        assert f"```python\n{script}```" in (DOCS / page).read_text(encoding="utf-8"), page


def test_it_is_one_page_with_the_commands_that_people_need():
    assert len(README.splitlines()) < 110
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("make test", "python -m jaxpipe launch -n 2", "srun ", "gcloud compute tpus tpu-vm ssh "):
        assert re.search(rf"^{command}", README, re.MULTILINE), command
    assert re.search(r"^make test$", ci, re.MULTILINE)


def test_the_picture_is_what_draw_gives(tmp_path):
    """Of the drawing, what does not depend on the version of matplotlib: the texts in it."""
    pytest.importorskip("matplotlib")
    draw(schedules.one_f_one_b(4, 8), tmp_path / "now.svg", name="1f1b")
    now, committed = (path.read_text(encoding="utf-8") for path in (tmp_path / "now.svg", DOCS / "assets" / "1f1b.svg"))
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", committed)
    assert len(texts) > 64 and texts == re.findall(r"<text[^>]*>([^<]*)</text>", now)


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
    lines = between("checked by tests/test_readme.py -->", "<!-- schedules: end", "howto/schedules.md").splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert found == rows


def test_the_table_of_evaluation_arguments_is_the_signature():
    table = between("| argument ", "\n\n", "tutorials/evaluation.md")
    found = re.findall(r"^\| `(\w+)` +\| `([^`]+)` +\|", table, re.MULTILINE)
    parameters = list(inspect.signature(jaxpipe.Engine.eval_batch).parameters.values())[2:]
    assert found == [(parameter.name, repr(parameter.default)) for parameter in parameters]


def test_figures_come_from_a_committed_result():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    quoted = between(*report.MARKS, "explanations/when_not.md")
    source = re.search(r"benchmarks/results/([\w.-]+)\.md", quoted)
    if source is None:
        assert not re.search(r"\d", quoted), "figures that come from no result"
    else:
        assert quoted == report.figures(ROOT / "benchmarks" / "results" / f"{source[1]}.json").strip()


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
    # Blocks that are not run may be of other libraries.
    text = re.sub(r"^<!-- not run.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    code = "\n".join([*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.M)])
    for holder, name in re.findall(r"(?<![\w./])((?:jaxpipe\.)?\w+)\.([a-zA-Z_]\w*)", code):
        full = f"{holder}.{name}"
        if full in vars(scopes).values() or scopes.read(full).kind is not None:
            continue  # a name in the compiled program
        if holder in HOLDERS and name != "py" and not hasattr(HOLDERS[holder], name):
            source = inspect.getsource(HOLDERS[holder])
            assert re.search(rf"self\.{name}\b", source), f"{holder}.{name}"


NOT_DONE = {
    "ZeRO": lambda: jaxpipe.Config(zero_stage=2),
}


@pytest.mark.parametrize("what", NOT_DONE)
def test_what_is_not_done_is_refused(what):
    """If this fails, something was finished: take it off the list in docs/status.md, and off this one."""
    with pytest.raises(errors.JaxpipeError):
        NOT_DONE[what]()


# ---------------------------------------------------------------------------------------------------------- the reference


PUBLIC = {
    # Schedule is the one of jaxpipe.schedules, and stands there.
    "jaxpipe": set(jaxpipe.__all__)
    - {"Schedule", "callbacks", "errors", "metrics", "parallel", "reference", "schedules"},
    "jaxpipe.schedules": set(schedules.__all__),
    "jaxpipe.callbacks": set(jaxpipe.callbacks.__all__),
    "jaxpipe.errors": set(errors.__all__),
    "jaxpipe.parallel": set(jaxpipe.parallel.__all__),
    "jaxpipe.metrics": {"Metric", "Mean", "WeightedMean", "Sum", "Max", "Min", "Concat"},
    "jaxpipe.reference": {"value_and_grad"},
}


def in_the_reference():
    """Public names by module, as the directives of mkdocstrings on the pages name them."""
    found = {module: set() for module in PUBLIC}
    for page in sorted((DOCS / "reference").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for path, members in re.findall(r"^::: ([\w.]+)$(?:\n    options:\n      members: \[([\w, ]+)\])?", text, re.M):
            if path in PUBLIC:
                found[path] |= set(members.split(", ")) - {""}
            else:
                module, _, name = path.rpartition(".")
                found[module].add(name)
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_every_public_name_and_no_other(module):
    """Where a name leads nowhere, `make docs` fails."""
    assert in_the_reference()[module] == PUBLIC[module]


def test_public_names_are_explained_somewhere_else_as_well():
    pages = [page for page in PAGES if page.parent.name != "reference"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert not [name for name in jaxpipe.__all__ if not re.search(rf"\bjaxpipe\.{name}\b", text)]
