"""The launcher: numbers in front of lines, the first failure ends the others, exit codes, restarts, signals."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.processes.launch import Launch

LIMIT = 600


def launch(tmp_path, script, *options, **popen):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    command = [sys.executable, "-m", "jaxpipe", "launch", *options, str(path), "an argument"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **popen.pop("env", {})}
    )


def finish(process):
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


def test_each_process_knows_its_number_and_lines_say_whose_they_are(tmp_path):
    code, out, _ = finish(
        launch(
            tmp_path,
            """
            import os, sys
            print(os.environ["JAXPIPE_PROCESS_ID"], os.environ["JAXPIPE_NUM_PROCESSES"], sys.argv[1])
            print(os.environ["JAX_NUM_CPU_DEVICES"], os.environ["JAXPIPE_COORDINATOR"], file=sys.stderr)
            sys.stdout.write("no newline at the end")
            """,
            *("-n", "3", "--devices-per-process", "2"),
        )
    )
    assert code == 0
    lines = sorted(out.splitlines())
    assert [line for line in lines if "an argument" in line] == [f"[{i}] {i} 3 an argument" for i in range(3)]
    assert [line for line in lines if "newline" in line] == [f"[{i}] no newline at the end" for i in range(3)]
    addresses = {line.split()[2] for line in lines if "127.0.0.1" in line}
    assert len(addresses) == 1 and all(f"[{i}] 2 {next(iter(addresses))}" in lines for i in range(3))


@pytest.mark.parametrize(("how", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137)])
def test_the_first_failure_ends_the_others_and_is_the_exit_code(tmp_path, how, code):
    found, _, err = finish(
        launch(
            tmp_path,
            f"""
            import os, sys, time
            if os.environ["JAXPIPE_PROCESS_ID"] == "1":
                {how}
            time.sleep({LIMIT * 2})
            """,
            *("-n", "3"),
        )
    )
    assert found == code and "process 1" in err


def test_processes_that_do_not_obey_are_killed(tmp_path, monkeypatch):
    code, out, _ = finish(
        launch(
            tmp_path,
            f"""
            import os, signal, sys, time
            if os.environ["JAXPIPE_PROCESS_ID"] == "1":
                signal.signal(signal.SIGTERM, lambda *_: print("heard", flush=True))
                open("ready", "w").close()
                for _ in range({LIMIT * 20}):
                    time.sleep(0.1)
            while not os.path.exists("ready"):
                time.sleep(0.01)
            sys.exit(3)
            """.replace('"ready"', repr(str(tmp_path / "ready"))),
            *("-n", "2"),
        )
    )
    assert code == 3 and "[1] heard" in out


def test_restarts(tmp_path):
    script = """
        import os, sys
        with open({path!r} + os.environ["JAXPIPE_PROCESS_ID"], "a") as file:
            file.write("x")
        sys.exit(len(open({path!r} + os.environ["JAXPIPE_PROCESS_ID"]).read()) < 3)
        """.format(path=str(tmp_path / "count"))
    code, _, err = finish(launch(tmp_path, script, "-n", "1", "--restarts", "2"))
    assert code == 0 and err.count("starting again") == 2
    (tmp_path / "count0").unlink()
    assert finish(launch(tmp_path, script, "-n", "1", "--restarts", "1"))[0] == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 5)])
def test_signals_go_to_all(tmp_path, number, code):
    process = launch(
        tmp_path,
        f"""
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        print("ready", flush=True)
        time.sleep({LIMIT * 2})
        """,
        *("-n", "2"),
    )
    for _ in range(2):
        assert "ready" in process.stdout.readline()
    process.send_signal(number)
    assert finish(process)[0] == code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 0}, "num_processes is 0"),
        ({"num_processes": 2, "num_nodes": 2}, "need --coordinator HOST:PORT"),
        ({"num_processes": 2, "node_rank": 1}, "node_rank is 1 of 1 machines"),
        ({"num_processes": 2, "restarts": -1}, "restarts is -1"),
        ({"num_processes": 2, "command": []}, "no script to run"),
    ],
)
def test_what_cannot_be_launched(options, message):
    with pytest.raises(ConfigError, match=message):
        Launch(**{"command": ["x.py"], **options})


def test_numbers_of_processes_on_several_machines():
    launch = Launch(command=["x.py"], num_processes=2, num_nodes=3, node_rank=2, coordinator="a:1")
    made = launch.environment(1, {"A": "b"}, "a:1")
    assert (made["JAXPIPE_PROCESS_ID"], made["JAXPIPE_NUM_PROCESSES"], made["JAXPIPE_COORDINATOR"]) == ("5", "6", "a:1")
    assert made["A"] == "b" and "JAX_NUM_CPU_DEVICES" not in made
