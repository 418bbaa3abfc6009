"""A training step and an evaluation of the same GPT by jaxpipe, torch and DeepSpeed, on the same cores; see README.md here.

Each contestant has processes of its own. They start from the same weights, see the same batches, must have the same losses,
and are timed in turns. Writes results/peers_<platform>_<date>.json and .md, and prints the tables. `make bench-peers` makes
an environment with all of them; those that are not installed are left out.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import report
from contest.players import Entry, Player
from contest.task import CHECKED_STEPS, LEARNING_RATE, MICRO_BATCHES, Task

HERE = Path(__file__).parent
PACKAGES = ("jax", "torch", "deepspeed")
TOLERANCE = 1e-4
WORKS = ("train", "evaluate")
# Batches that steps go round: few, so that the model learns them.
BATCHES = 4
# What --tune has found best on two cores: the number of simulated devices decides about XLA's threads.
SIMULATED = {1: 1, 2: 4, 4: 8}
HEAD = ["contestant", "S", "runs as", "train, s", "jaxpipe / it", "evaluate, s", "jaxpipe / it"]


def entries(stages: int) -> list[Entry]:
    """jaxpipe, the pipelines of others, and what runs without a pipeline."""
    torch, deepspeed = ("torch",), ("torch", "deepspeed")
    return [
        Entry("jaxpipe 1F1B", "with_jax.py", "pipeline", (), stages, SIMULATED.get(stages, stages)),
        Entry("JAX loop, one device", "with_jax.py", "loop", (), 1, SIMULATED[1]),
        Entry("torch, one process", "with_torch.py", "one_process", torch, 1, threads=2),
        Entry("torch 1F1B", "with_torch.py", "1f1b", torch, stages),
        Entry("torch interleaved 1F1B", "with_torch.py", "interleaved", torch, stages),
        # In torch 2.13 `eval` of this schedule fails: it still asks for the gradients that stages of a rank hand over.
        Entry("torch ZBV", "with_torch.py", "zbv", torch, stages, evaluates=False),
        Entry("DeepSpeed 1F1B", "with_deepspeed.py", "pipeline", deepspeed, stages),
    ]


def settings(entry: Entry) -> list[Entry]:
    """The numbers of devices and threads among which --tune chooses."""
    if entry.simulated is not None:
        tried = (1, 2, 4) if entry.kind == "loop" else (entry.stages, entry.stages + 1, 2 * entry.stages, 8)
        return [dataclasses.replace(entry, simulated=count) for count in dict.fromkeys(tried)]
    return [dataclasses.replace(entry, threads=count) for count in (1, 2)]


def main() -> None:
    """Runs everything; wants a machine that does nothing else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing, in turns (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4], choices=[2, 4])
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: does it run? Prints only")
    parser.add_argument("--print", action="store_true", help="write no results")
    parser.add_argument("--tune", action="store_true", help="how many devices or threads suit each? Prints only")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least one round is needed.")
    cores = same_cores()
    task = Task(width=32, length=16, rows=2) if arguments.quick else Task()
    rounds = 2 if arguments.quick else arguments.rounds
    start, found = time.perf_counter(), []
    for stages in arguments.stages:
        those = [entry for entry in entries(stages) if installed(entry)]
        if arguments.tune:
            those = [setting for entry in those for setting in settings(entry)]
        found += compete(those, task, rounds)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    measured = {
        **measure.machine(),
        "cores": cores,
        "versions": versions,
        "task": dataclasses.asdict(task),
        "micro_batches": MICRO_BATCHES,
        "learning_rate": LEARNING_RATE,
        "rounds": rounds,
        "contestants": found,
        "seconds": time.perf_counter() - start,
    }
    text = (
        "**A quick run: it shows that the script works, and nothing else.**\n\n" if arguments.quick else ""
    ) + markdown(measured)
    print(f"\n{text}\n{measured['seconds']:.0f} s")
    if not (arguments.quick or arguments.print or arguments.tune):
        report.write(HERE / "results", measured, text, "peers_")


def same_cores() -> int:
    """Puts all contestants on the same two cores, of however many there are; returns how many it has."""
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count() or 1
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    return len(os.sched_getaffinity(0))


def installed(entry: Entry) -> bool:
    """Whether it can take part; says so if not."""
    missing = [name for name in entry.needs if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out: {entry.name}, because {missing[0]} is not installed", flush=True)
    return not missing


def compete(those: Sequence[Entry], task: Task, rounds: int) -> list[dict[str, Any]]:
    """Starts all, checks their losses against those of the first, and times them in turns: A B C, C B A, and so on."""
    seconds: list[dict[str, list[float]]] = [{work: [] for work in WORKS} for _ in those]
    with contextlib.ExitStack() as stack:
        players: list[Player] = []
        wanted: list[float] = []
        for entry in those:  # one after the other: they would start no sooner together on the same cores
            print(f"starting: {entry.name}, S = {entry.stages}, {entry.setting}", flush=True)
            player = stack.enter_context(Player(entry, dataclasses.asdict(task)))
            player.ready()
            losses = [player.do("train", number % BATCHES)[0] for number in range(CHECKED_STEPS)]
            losses += [player.do("evaluate", 0)[0] for _ in range(2) if player.can("evaluate")]
            wanted = wanted or losses
            check(entry, losses, wanted)
            players.append(player)
        print(f"losses agree: {', '.join(f'{loss:.6f}' for loss in wanted)}; timing", flush=True)
        for number in range(rounds):
            for work in WORKS:
                for index in range(len(players))[:: 1 if number % 2 == 0 else -1]:
                    if players[index].can(work):
                        seconds[index][work].append(players[index].do(work, number % BATCHES)[1])
    return [
        {
            **dataclasses.asdict(entry),
            "setting": entry.setting,
            "at": max(each.stages for each in those),
            **each,
            "ratios": {work: measure.ratio(seconds[0][work], each[work]) for work in WORKS if each[work]},
        }
        for entry, each in zip(those, seconds, strict=True)
    ]


def check(entry: Entry, losses: Sequence[float], wanted: Sequence[float]) -> None:
    """Ends the benchmark if a contestant does not compute what the first one does: its times would mean nothing."""
    error = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=entry.evaluates))
    if not error < TOLERANCE:
        raise SystemExit(
            f"{entry.name}, S = {entry.stages}: losses {losses} instead of {wanted}, relative error {error:.1e}."
        )


def markdown(found: dict[str, Any]) -> str:
    """The table, and how jaxpipe stands beside the fastest of the others."""
    task, versions = found["task"], ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rows: list[list[Any]] = []
    best: list[str] = []
    for at in dict.fromkeys(each["at"] for each in found["contestants"]):
        those = [each for each in found["contestants"] if each["at"] == at]
        for each in those:
            cells = [cell for work in WORKS for cell in _cells(each, work)]
            rows.append([each["name"], at, each["setting"], *cells])
        peers = [each for each in those if "torch" in each["needs"]]
        for work in WORKS if peers else ():
            able = [each for each in peers if each[work]]
            fastest = min(able, key=lambda each, work=work: statistics.median(each[work]))
            ratio = report.spread(fastest["ratios"][work])
            best.append(f"- S = {at}, {work}: {ratio} of {fastest['name']}, the fastest without JAX")
    about = (
        f"A GPT of {task['layers']} blocks of width {task['width']}, {task['heads']} heads, sequence {task['length']}, "
        f"vocabulary {task['vocabulary']}; {found['micro_batches']} micro-batches of {task['rows']} rows, float32, Adam. "
        f"{found['cores']} cores, {found['date']}, {versions}. Medians (least-greatest) of "
        f"{found['rounds']} rounds in turns; ratios are taken within rounds."
    )
    return f"# Peers\n\n{about}\n\n{report.table(HEAD, rows)}\n\n" + "\n".join([*best, ""])


def _cells(each: dict[str, Any], work: str) -> tuple[str, str]:
    seconds = each[work]
    if not seconds:
        return "-", "-"
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})", report.spread(
        each["ratios"][work]
    )


if __name__ == "__main__":
    main()
