"""Reports are kept, under a key of what they depend on. This needs no compiler."""

import pickle

import pytest

from tests.compilers import cases

NAME = "tpu-1f1b-bfloat16"


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The names that are compiled from here on, by something that costs nothing."""
    names: list[str] = []

    def compile(name, file):
        names.append(name)
        file.write_bytes(pickle.dumps(f"{name}, number {len(names)}"))

    monkeypatch.setenv("JAXPIPE_REPORTS", str(tmp_path))
    monkeypatch.setattr(cases, "need", lambda case: None)
    monkeypatch.setattr(cases, "_compile", compile)
    forget()
    yield names
    forget()


def forget():
    """As in another process."""
    cases._folder.cache_clear()
    cases._report_in.cache_clear()


def test_a_report_is_made_once_for_a_version(compiled, monkeypatch, tmp_path):
    assert cases.report_of(NAME) == cases.report_of(NAME) == f"{NAME}, number 1"
    forget()
    assert cases.report_of(NAME) == f"{NAME}, number 1" and compiled == [NAME]
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(cases, "_version", lambda: "reports-of-another-version")
    forget()
    assert cases.report_of(NAME) == f"{NAME}, number 2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "reports-of-another-version"]


def test_an_interrupted_compilation_leaves_nothing(compiled, monkeypatch):
    whole = cases._compile

    def interrupted(name, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cases, "_compile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cases.report_of(NAME)
    monkeypatch.setattr(cases, "_compile", whole)
    assert cases.report_of(NAME) == f"{NAME}, number 1"
