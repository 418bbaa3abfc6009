"""The example that `make demo` runs, as a user runs it, but tiny; and data that grain reads."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxpipe
from tests.devices import cpus

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = "--stages 2 --data 1 --num-blocks 2 --d-model 32 --heads 2 --seq 32 --steps 4 --eval-every 2 --sample-bytes 3"


def run_script(tmp_path, name, *arguments):
    """Runs an example as a user does: it has to end well, and to warn of nothing."""
    # As after an installation: the package is found wherever the script is started. With the suite's flags for XLA, because
    # compiling is nearly all of the time.
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done


def run(tmp_path, output, *options):
    return run_script(tmp_path, "train_gpt", *TINY.split(), "--micro-batches", "2", "--output", output, *options)


def example(tmp_path, name, options):
    """Runs an example, and returns what it prints; its picture goes to the folder `out`."""
    pytest.importorskip("matplotlib")
    done = run_script(tmp_path, name, *options.split(), "--output", "out")
    assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return done.stdout


@pytest.mark.slow
def test_train_gpt(tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "new" / "folder"
    done = run(tmp_path, output, "--checkpoints", tmp_path / "run")
    for picture in ("loss.png", "schedule.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
        assert str(output / picture) in done.stdout

    losses = {
        name: float(value)
        for name, value in re.findall(r"^(training|validation|bigram).*? (\d\.\d{3}) ", done.stdout, re.M)
    }
    before = re.search(r"^step 0: evaluation: loss (\d\.\d+)", done.stdout, re.M)
    assert before and losses["validation"] < float(before[1]) and 1 < losses["training"] < 6
    assert 1 < losses["bigram"] < 4
    assert re.findall(r"^step (\d): evaluation", done.stdout, re.M) == ["0", "2", "4"]
    assert "step 4/4" in done.stdout and "\r" not in done.stdout, "plain lines, because this is no terminal"
    assert "Block" in done.stdout and "head (tied to Embedding)" in done.stdout
    assert len(re.findall(r"^--- ", done.stdout, re.M)) == 2

    # Two steps more, at another number of stages: as if it had not stopped in between.
    again = run(tmp_path, output, "--checkpoints", tmp_path / "run", "--steps", "6", "--stages", "3")
    assert "going on behind step 4\n" in again.stdout
    assert re.findall(r"^step (\d): evaluation", again.stdout, re.M) == ["6"]
    assert "step 6/6" in again.stdout


@pytest.mark.slow
def test_translation(tmp_path):
    pytest.importorskip("matplotlib")
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable,
        "-W",
        "error",
        EXAMPLES / "translation.py",
        "--stages",
        "2",
        "--data",
        "2",
        "--steps",
        "80",
    ]
    done = subprocess.run(
        [*command, "--output", tmp_path], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert (tmp_path / "translation.png").read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"^step +\d+: held-out loss", done.stdout, re.M)) == 8
    accuracy = re.search(r"^accuracy: ([\d.]+) % of 512 numbers that it never saw", done.stdout, re.M)
    assert accuracy and float(accuracy[1]) > 90, done.stdout
    assert " tausend " in done.stdout and "hundred" in done.stdout


@pytest.fixture
def grain_data():
    """The example as a module."""
    pytest.importorskip("grain")
    spec = importlib.util.spec_from_file_location("grain_data", EXAMPLES / "grain_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(text):
    return [float(loss) for loss in re.findall(r"step \d+: loss (\S+)$", text, re.M)]


@pytest.mark.slow
def test_after_a_restart_grain_goes_on_with_the_records_that_follow(grain_data, tmp_path, monkeypatch, capsys):
    seen = []
    train = jaxpipe.Engine.train_batch

    def recording(data):
        for inputs, labels in data:
            seen.append(inputs.copy())
            yield inputs, labels

    monkeypatch.setattr(jaxpipe.Engine, "train_batch", lambda engine, data: train(engine, recording(data)))
    grain_data.main(["--data", "8", "--steps", "4"])
    straight, loss = np.stack(seen), losses(capsys.readouterr().out)
    assert straight.shape == (16, grain_data.ROWS, grain_data.WIDTH) and len(np.unique(straight)) == straight.size
    seen.clear()
    for steps in ("1", "4"):
        grain_data.main(["--data", "8", "--steps", steps, "--checkpoints", str(tmp_path / "run")])
    np.testing.assert_array_equal(np.stack(seen), straight)
    assert losses(capsys.readouterr().out) == loss and len(loss) == 4


def test_the_parts_that_processes_read_make_up_the_whole(grain_data, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: cpus(1, 1, 1, 1))
    mesh = jaxpipe.make_mesh(pipe=2, data=2)  # processes 0 and 2 hold the rows of data rank 0
    whole = grain_data.read(mesh, local_rows=False)
    parts = []
    for process in range(4):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(grain_data.read(mesh, local_rows=True))
    for _ in range(3):
        found = [next(part)[0] for part in parts]
        np.testing.assert_array_equal(found[0], found[2])
        joined = np.concatenate(found[:2])
        np.testing.assert_array_equal(np.sort(joined[:, 0]), np.sort(next(whole)[0][:, 0]))
    assert whole.get_state() == parts[1].get_state(), "a checkpoint fits any number of processes"


@pytest.mark.slow
def test_two_processes_read_their_own_records_and_any_number_goes_on(grain_data, tmp_path, capsys):
    grain_data.main(["--data", "8", "--steps", "4"])
    straight = losses(capsys.readouterr().out)
    found = []
    for steps in (2, 3):  # two processes, and two again
        options = ["--data", "2", "--inside", "pipe", "--local-rows", "--steps", steps, "--checkpoints", tmp_path]
        done = subprocess.run(
            [sys.executable, "-m", "jaxpipe", "launch", "-n", "2", "--devices-per-process", "2"]
            + [str(EXAMPLES / "grain_data.py"), *map(str, options)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "[1] step" not in done.stdout and "data crosses processes: rank 0 in process 0" in done.stdout
        found += losses(done.stdout)
    grain_data.main(["--data", "8", "--steps", "4", "--checkpoints", str(tmp_path)])  # and one
    np.testing.assert_allclose([*found, *losses(capsys.readouterr().out)], straight, rtol=1e-5)


@pytest.mark.slow
def test_resnet_digits(tmp_path):
    """At its usual size, and compiled as usual: what it is there to show is an accuracy, and most of its time are steps."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "resnet_digits.py", "--output", tmp_path / "new"],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    found = re.search(r"^accuracy on 360 test images: (\d+\.\d) %; see (.*)$", done.stdout, re.M)
    assert found and float(found[1]) >= 97, done.stdout
    assert Path(found[2]).read_bytes().startswith(b"\x89PNG")
    assert "layer state" in done.stdout and "running statistics: " in done.stdout


@pytest.mark.slow
def test_mixture_of_experts(tmp_path):
    """The balance loss of every stage is a part of what is trained, and no part of the evaluation's loss."""
    tiny = "--stages 2 --num-blocks 2 --d-model 16 --heads 2 --seq 16 --steps 8 --micro-batches 2"
    said = example(tmp_path, "mixture_of_experts", tiny)
    assert re.search(r"over expert along dim 0: experts/down, experts/up", said)
    steps = re.findall(r"^step +(\d): objective (\d\.\d+), of which balance loss (0\.\d+)", said, re.M)
    assert [step for step, *_ in steps] == list("12345678")
    assert all(4 < float(loss) < 7 and 0.02 <= float(balance) < 0.08 for _, loss, balance in steps)
    found = re.search(r"^validation: loss (\d\.\d+) .*balance loss (0\.\d+)", said, re.M)
    assert found and 4 < float(found[1]) < 7 and 0.02 <= float(found[2]) < 0.08


@pytest.mark.slow
def test_lora(tmp_path):
    """Adapters learn what the base cannot do, in less than 5 % of the optimizer's bytes, and are saved and loaded alone."""
    pytest.importorskip("safetensors")
    said = example(tmp_path, "lora", "--stages 2 --steps 30 --base-steps 40")
    before, after, loaded = (
        float(re.search(rf"^{line}: loss (\d+\.\d+)", said, re.M)[1])
        for line in ("the base alone", "with adapters", "loaded beside the same base")
    )
    assert after < before - 1 and abs(loaded - after) <= 0.002, said
    assert float(re.search(r"all weights \((\d+\.\d) %\)", said)[1]) < 5
    assert re.search(r"^train  4,608 parameters of 208,768; 204,160 are frozen", said, re.M), said
    assert (tmp_path / "out" / "adapters.safetensors").stat().st_size < 25_000


@pytest.mark.slow
def test_built_model(tmp_path):
    """The modules that come back compute what the pipeline computes."""
    said = example(tmp_path, "built_model", "--stages 2 --blocks 2 --steps 16")
    assert float(re.search(r"differs by (\S+) at most", said)[1]) < 1e-4
    first, *_, last = (float(loss) for loss in re.findall(r"test loss (\d+\.\d+)", said))
    assert last < first and re.search(r"^accuracy: \d", said, re.M)
