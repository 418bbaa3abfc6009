"""`Progress` shows finished steps, never makes the host wait inside the loop, and does not flood a log."""

import io
import os
import sys

import jax.numpy as jnp
import pytest

from jaxpipe.monitor import progress
from jaxpipe.monitor.progress import Progress


class Scalar:
    """A device scalar whose step may still be running; reading it then would make the host wait."""

    def __init__(self, value: float, *, ready: bool = True):
        self.value, self.ready, self.waited = value, ready, False

    def is_ready(self) -> bool:
        return self.ready

    def __float__(self) -> float:
        self.waited |= not self.ready
        return self.value


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: `clock[0] += 1`."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_fetches_late(clock, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    out = io.StringIO()
    losses = [Scalar(float(step), ready=False) for step in range(4)]
    with Progress(4, stream=out) as bar:
        for step, loss in enumerate(losses):
            clock[0] += 1
            if step == 2:
                losses[0].ready = True
                losses[1].ready = False
            bar.update(loss)
            assert bar.finished == (step >= 2), "a step counts when it has finished"
        losses[3].ready = True  # but step 1 is still running: steps finish in order
        bar.update(Scalar(4.0))
        assert bar.finished == 1
        assert not any(loss.waited for loss in losses)
        assert "step 1/4  loss 0.000" in out.getvalue() and "step 2/4" not in out.getvalue()
        losses[1].ready = True
    assert losses[2].waited and bar.finished == 5, "the end of the block waits for all"


def test_an_error_in_the_loop_is_not_delayed():
    loss = Scalar(1.0, ready=False)
    with pytest.raises(ZeroDivisionError), Progress(2, stream=io.StringIO()) as bar:
        bar.update(loss)
        raise ZeroDivisionError
    assert not loss.waited


def test_speed_and_time_left(clock, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    out = io.StringIO()
    with Progress(100, 1000, stream=out) as bar:
        clock[0] += 60  # compiling
        bar.update(5.0)
        for _ in range(4):
            clock[0] += 2
            bar.update(jnp.float32(2.5).block_until_ready())
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 1/100  loss 5.000"
    assert lines[-1] == "step 5/100  loss 2.500  500 tokens/s  3:10 left"


@pytest.mark.parametrize("seconds_per_step", [0.01, 1.0, 100.0])
def test_a_log_is_not_flooded(clock, seconds_per_step):
    out = io.StringIO()
    with Progress(5000, stream=out) as bar:
        for _ in range(5000):
            clock[0] += seconds_per_step
            bar.update(1.0)
    lines = out.getvalue().splitlines()
    assert 1 < len(lines) <= progress.LINES + 1
    assert len(lines) <= 5000 * seconds_per_step / progress.SECONDS_PER_LINE + 1
    assert lines[-1].startswith("step 5000/5000") and not set("\r\033") & set(out.getvalue())


def test_bar_on_a_terminal():
    pytest.importorskip("tqdm")
    out = Terminal()
    with Progress(3, 64, stream=out) as bar:
        for step in range(3):
            bar.update(Scalar(3.0 - step))
        bar.note("half of it")
    shown = out.getvalue()
    assert "100%|" in shown and "step 3/3  loss 1.000" in shown and "tokens/s" in shown
    assert "half of it\n" in shown and "half of it\r" not in shown


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_bar_on_a_terminal_without_a_size(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("LINES", raising=False)
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as stream, Progress(1, stream=stream) as bar:
        bar.update(1.0)
    shown = b""
    while b"100%|" not in shown:  # a terminal hands over what has arrived; after the last of it, reading raises EIO
        shown += os.read(reader, 10_000)
    os.close(reader)


def test_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    out = Terminal()
    with Progress(2, stream=out) as bar:
        bar.update(1.0)
        bar.update(0.5)
    assert "pip install 'jaxpipe[progress]'" in out.getvalue()
    assert out.getvalue().splitlines()[-1].startswith("step 2/2  loss 0.500")


def test_switched_off():
    out = Terminal()
    with Progress(2, stream=out, enabled=False) as bar:
        bar.update(1.0)
        bar.note("unseen")
    assert bar.finished == 1 and out.getvalue() == ""
