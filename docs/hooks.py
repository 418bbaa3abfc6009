"""Hooks of mkdocs: the site also has the examples, the reports of benchmarks, CHANGELOG.md and CONTRIBUTING.md.

These files lie outside of docs/, and pages link to them as they lie in the repository, so that links work there, too. Here
they become pages, and links to them are turned to those. A link to a file that has no page, such as a module of the
package, becomes its text: the site is no viewer of the sources.
"""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[([^\]\[]*)\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)


def outside() -> list[Path]:
    """The files that become pages, relative to the repository."""
    patterns = ("CHANGELOG.md", "CONTRIBUTING.md", "examples/*.py", "benchmarks/README.md", "benchmarks/results/*.md")
    return sorted(path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern))


def uri(path: Path | str) -> str:
    """Where a file of the repository stands on the site."""
    path = str(path)
    return path.removeprefix("docs/") if path.startswith("docs/") else re.sub(r"\.py$", ".md", path)


def on_files(files: Files, config) -> Files:
    for path in outside():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, uri(path), content=example(path, text) if path.suffix == ".py" else text))
    files.append(File.generated(config, "examples/index.md", content=list_of_examples()))
    return files


def example(path: Path, text: str) -> str:
    return f"# {path.name}\n\n{first_line(text)} Start it with `python {path} --help`.\n\n```python\n{text}```\n"


def first_line(text: str) -> str:
    return (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")


def list_of_examples() -> str:
    lines = ["# Examples", "", "All of them run on simulated devices, and are run by the tests.", ""]
    for path in sorted((ROOT / "examples").glob("*.py")):
        lines.append(f"- [{path.name}]({path.stem}.md): {first_line(path.read_text(encoding='utf-8'))}")
    return "\n".join(lines) + "\n"


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    here = page.file.src_uri
    of_repository = {uri(path): str(path) for path in outside()}.get(here, f"docs/{here}")

    def turned(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(of_repository), target))
        if not (ROOT / path).exists():
            return match[
                0
            ]  # left as it is: the build says that it leads nowhere, unless it is a page that is made here
        if files.get_file_from_path(uri(path)) is None:
            return text
        return f"[{text}]({posixpath.relpath(uri(path), posixpath.dirname(here) or '.')}{anchor})"

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(turned, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(turned, markdown[end:])])
