"""The launcher: numbers in front of lines, the first failure ends the others, exit codes, restarts, signals."""

import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.processes.launch import Launch, reserved_port

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


def test_the_first_failure_is_the_first_in_time(tmp_path):
    """Process 0 ends as soon as process 1 is gone, as it does where they are connected."""
    code, _, err = finish(
        launch(
            tmp_path,
            f"""
            import fcntl, os, time
            lock, ready = open({str(tmp_path / "lock")!r}, "w"), {str(tmp_path / "ready")!r}
            if os.environ["JAXPIPE_PROCESS_ID"] == "1":
                fcntl.flock(lock, fcntl.LOCK_EX)
                open(ready, "w").close()
                os.kill(os.getpid(), 9)
            while not os.path.exists(ready):
                time.sleep(0.001)
            fcntl.flock(lock, fcntl.LOCK_EX)
            time.sleep(0.02)
            os._exit(1)
            """,
            *("-n", "2"),
        )
    )
    assert code == 137 and "process 1 was ended by signal 9" in err


def test_what_failed_processes_leave_behind_is_ended(tmp_path):
    """Otherwise the launch would wait for it, because it holds the output open."""
    code, _, _ = finish(
        launch(
            tmp_path,
            f"""
            import os, time
            if os.fork() == 0:
                time.sleep({LIMIT * 2})
            os._exit(3)
            """,
            *("-n", "2"),
        )
    )
    assert code == 3


def test_nobody_reads_the_output(tmp_path):
    done = tmp_path / "done"
    process = launch(
        tmp_path,
        f"""
        for _ in range(1000):
            print("x" * 1000)
        open({str(done)!r}, "w").close()
        """,
        *("-n", "1"),
    )
    assert process.stdout.readline().startswith("[0] x")
    process.stdout.close()
    process.stderr.close()
    process.wait(timeout=LIMIT)
    assert done.exists(), "it did not hang, and was not ended"


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
    ("numbers", "code"),
    [
        ((signal.SIGTERM, signal.SIGTERM), 0),
        ((signal.SIGTERM, signal.SIGINT), 130),
        ((signal.SIGINT, signal.SIGINT), 130),
    ],
)
def test_signals_that_come_again(tmp_path, numbers, code):
    """A second Ctrl-C does not wait any more; a second SIGTERM lets processes save. Nothing is started again."""
    process = launch(
        tmp_path,
        f"""
        import signal, sys, time
        asked = []
        def ask(number, _):
            print("heard", int(number), flush=True)
            asked.append(number)
        signal.signal(signal.SIGTERM, ask)
        signal.signal(signal.SIGINT, ask)
        print("ready", flush=True)
        while signal.SIGTERM not in asked or {int(numbers[1])} not in asked:
            time.sleep(0.01)
        time.sleep(0.5)
        """,
        *("-n", "1", "--restarts", "3"),
    )
    assert "ready" in process.stdout.readline()
    process.send_signal(numbers[0])
    assert f"heard {int(numbers[0])}" in process.stdout.readline()
    process.send_signal(numbers[1])
    found, out, err = finish(process)
    assert found == code and "ready" not in out and "starting again" not in err


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


def test_a_port_belongs_to_one_launch():
    """The service of JAX can have it, as it shares ports; another launch, or any other program, is not given it."""
    with reserved_port() as held, socket.socket() as service, socket.socket() as other:
        address = held.getsockname()
        with pytest.raises(OSError):
            other.bind(address)
        service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        service.bind(address)
        service.listen()
        for _ in range(20):  # `held` does not listen, so none of them is lost there
            with socket.create_connection(address, timeout=600):
                service.accept()[0].close()


def test_numbers_of_processes_on_several_machines():
    launch = Launch(command=["x.py"], num_processes=2, num_nodes=3, node_rank=2, coordinator="a:1")
    made = launch.environment(1, {"A": "b"}, "a:1")
    assert (made["JAXPIPE_PROCESS_ID"], made["JAXPIPE_NUM_PROCESSES"], made["JAXPIPE_COORDINATOR"]) == ("5", "6", "a:1")
    assert made["A"] == "b" and "JAX_NUM_CPU_DEVICES" not in made
