"""The page about messages: it has every error class and every warning, and what it quotes is what the package says."""

import ast
import re
from pathlib import Path

import pytest

from jaxpipe import errors

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "jaxpipe").rglob("*.py"))}


def text(node):
    """A literal as it is, an f-string with … for each value; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


LITERALS = [found for tree in SOURCES.values() for node in ast.walk(tree) if (found := text(node))]


def quoted(section):
    """The messages in the first column of a table. One may hold backticks itself, and then stands in two of them."""
    return [message for _, message in re.findall(r"^\| (`+)(.+?)\1 \| ", SECTIONS[section], re.MULTILINE)]


@pytest.mark.parametrize("name", sorted(set(errors.__all__) - {"JaxpipeError"}))
def test_every_error_class_is_there(name):
    assert name in SECTIONS and quoted(name), f"docs/troubleshooting.md has no section about {name}"
    assert "`JaxpipeError`" in PAGE


@pytest.mark.parametrize("section", sorted(set(errors.__all__) - {"JaxpipeError"}) + ["Warnings"])
def test_what_it_quotes_is_what_the_package_says(section):
    for message in quoted(section):
        # Where a value ends a message, the source may have it in front of more text.
        assert any(message.rstrip("…") in literal for literal in LITERALS), f"{section}: {message!r} is in no source"


# Where the package warns, and what the page quotes of it.
WARNINGS = {
    "checkpoint/load.py": ("Nothing was loaded.", "The rest was loaded."),
    "compat/deepspeed_config.py": ("ignored in the DeepSpeed configuration: …",),
    "data/shapes_seen.py": ("batches so far. Each one compiles a program of its own",),
    "evaluation/generator.py": ("generate runs the whole window again for each token",),
    "model/tracing.py": ("which nobody takes, so it is dropped",),
}


def test_every_warning_is_there():
    def warns(node):
        return isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn")

    found = {str(path.relative_to(ROOT / "jaxpipe")): sum(map(warns, ast.walk(tree))) for path, tree in SOURCES.items()}
    assert {path: count for path, count in found.items() if count} == dict.fromkeys(WARNINGS, 1)
    assert set(quoted("Warnings")) == {message for messages in WARNINGS.values() for message in messages}
