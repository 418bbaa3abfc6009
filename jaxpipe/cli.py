"""The command line: `python -m jaxpipe plot | simulate | inspect | compile | plan | launch`.

A subcommand is a function `_add_...` that declares its arguments and names the function that runs it. To add one, write it
and list it in `_COMMANDS`. A mistake of the user, such as an unusable file or a number out of range, ends the program with
one line on stderr and status 2, never with a traceback. Ctrl-C ends it silently with status 130, and an output that nobody
reads any more with status 141.
"""

import argparse
import dataclasses
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from jaxpipe.checkpoint import inspect
from jaxpipe.columns import columns
from jaxpipe.errors import JaxpipeError, ScheduleError
from jaxpipe.hardware.chips import CHIPS
from jaxpipe.hardware.command import Command
from jaxpipe.planner.command import PlanCommand
from jaxpipe.processes.launch import Launch
from jaxpipe.schedules import command as schedules_command
from jaxpipe.schedules.command import read_cost, read_costs
from jaxpipe.schedules.registry import ALL
from jaxpipe.schedules.render import render
from jaxpipe.schedules.simulate import SYNCS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments without the name of the program; by default those of the process.

    Returns:
      The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxpipe", description="Look at schedules, checkpoints and compiled steps, and start programs."
    )
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for add in _COMMANDS:
        add(subparsers)
    arguments = parser.parse_args(argv)
    try:
        _be_able_to_print_any_name()
        status = arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure can still be reported
        return status or 0
    except JaxpipeError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # nobody reads the rest, as in `... | head -1`, which is not an error
        _discard_output()
        return 128 + _SIGPIPE
    except OSError as error:
        _discard_output()
        what = "the output cannot be written" if error.filename is None else f"{error.filename!r} cannot be used"
        return _fail(f"{what}: {error.strerror or error}.")
    except MemoryError:
        return _fail("this needs more memory than there is. Use fewer stages or micro-batches.")


_SIGPIPE = 13  # the module signal does not have it on Windows


def _fail(message: str) -> int:
    if sys.stderr is not None:
        print(f"jaxpipe: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2


def _be_able_to_print_any_name() -> None:
    """Shows characters as escapes if they are not valid text, as in some file names, or if the terminal lacks them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Discards what is still buffered: Python would write it at its end, and fail again with a traceback."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # stdout is not a file of the system, or there is none
        pass


def _add_plot(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("plot", help="draw a schedule in the terminal or to a file")
    _add_schedule_arguments(parser)
    parser.add_argument("--sync", choices=SYNCS, default="none", help="what a rank waits for (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="write an .svg, .png or .json (Chrome trace) file instead")
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome trace (.json, for ui.perfetto.dev) as well")
    parser.set_defaults(run=_plot)


def _plot(arguments: argparse.Namespace) -> None:
    timeline = _filled(schedules_command.Command, arguments).plot(arguments.sync, arguments.output, arguments.trace)
    if timeline is not None:
        color = sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        width = shutil.get_terminal_size((120, 24)).columns
        print(render(timeline, name=arguments.schedule, width=width, color=color))


def _add_simulate(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("simulate", help="print makespan, bubble and peak memory of a schedule")
    _add_schedule_arguments(parser)
    parser.set_defaults(run=_simulate)


def _simulate(arguments: argparse.Namespace) -> None:
    print(_filled(schedules_command.Command, arguments).report())


def _add_inspect(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("inspect", help="print what a checkpoint holds")
    parser.add_argument("directory", metavar="DIR", help="a directory of checkpoints, or the folder of one")
    parser.add_argument("--tag", help="which one (default: the latest)")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    report = inspect.inspect(arguments.directory, arguments.tag)
    print("\n".join([*report.head, "", *columns(report.table, left={0, 1}), "", *report.foot]))


def _add_compile(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "compile",
        help="compile a training step for devices that need not be there, and report on it",
        description="Compiles a training step from shapes alone, and prints what the compiler made of it.",
    )
    parser.add_argument(
        "function", metavar="MODULE:FUNCTION", help="function() returns (module, optimizer, example, config)"
    )
    parser.add_argument(
        "--topology", metavar="NAME", help="v5p:4x4x4, h100:8, ... (default: the devices of this machine)"
    )
    parser.add_argument("--pipe", type=int, default=1, metavar="S", help="ranks of the pipeline (default: %(default)s)")
    parser.add_argument("--data", type=int, default=1, metavar="N", help="data ranks (default: %(default)s)")
    parser.add_argument(
        "--axis", dest="axes", action="append", default=[], metavar="NAME=SIZE", help="a further mesh axis, as model=4"
    )
    parser.add_argument("--evaluation", action="store_true", help="compile an evaluation instead")
    parser.set_defaults(run=_compile)


def _compile(arguments: argparse.Namespace) -> None:
    print(_filled(Command, arguments).run())


def _add_plan(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "plan",
        help="find the mesh, schedule and settings that train a model fastest",
        description="Searches meshes, schedules and settings for the fastest step, from shapes alone.",
    )
    parser.add_argument(
        "function", metavar="MODULE:FUNCTION", help="function() returns (module, optimizer, example, config)"
    )
    parser.add_argument("--chips", type=int, required=True, metavar="N", help="how many chips there are")
    parser.add_argument("--global-batch", type=int, required=True, metavar="B", help="rows of a step")
    parser.add_argument("--chip", default="v5p", metavar="NAME", help=f"{', '.join(CHIPS)} (default: %(default)s)")
    parser.add_argument("--memory", metavar="BYTES", help="what of a chip's memory may be used, as 80GB (default: all)")
    parser.add_argument("--measure", choices=("time", "tpu"), help="time layers here, or ask the TPU compiler")
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    print(_filled(PlanCommand, arguments).run())


def _add_launch(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "launch",
        help="run a script as several processes on this machine",
        description="Runs a script as several processes on this machine. The script calls jaxpipe.start().",
    )
    parser.add_argument(
        "-n", dest="num_processes", type=int, required=True, metavar="N", help="processes on this machine"
    )
    parser.add_argument("--devices-per-process", type=int, metavar="K", help="simulated CPU devices of each process")
    parser.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="start all again after a failure, so often"
    )
    parser.add_argument(
        "--nodes", dest="num_nodes", type=int, default=1, metavar="N", help="how many machines take part"
    )
    parser.add_argument("--node-rank", type=int, default=0, metavar="K", help="which of them this is, from 0")
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 can be reached, with several machines"
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="script.py ...", help="the script and its arguments"
    )
    parser.set_defaults(run=_launch)


def _launch(arguments: argparse.Namespace) -> int:
    return _filled(Launch, arguments).run()


def _add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("schedule", metavar="NAME", help=f"{', '.join(ALL)}, or the path of a .csv file")
    parser.add_argument("--stages", type=int, metavar="S", help="number of all stages; a .csv file has its own")
    parser.add_argument(
        "--micro-batches", type=int, metavar="M", help="number of micro-batches; a .csv file has its own"
    )
    parser.add_argument(
        "--chunks", type=int, default=1, metavar="V", help="stages per rank, for schedules that have several"
    )
    for name in ("forward", "backward-input", "backward-weight"):
        parser.add_argument(
            f"--{name}",
            type=_argument(read_costs),
            default="1",
            metavar="T",
            help="time per micro-batch and rank, or T,T,... with one for each stage",
        )
    parser.add_argument(
        "--comm", type=_argument(read_cost), default="0", metavar="T", help="time of a transfer between two ranks"
    )
    parser.add_argument(
        "--memory",
        type=_argument(read_costs),
        metavar="N",
        help="bytes that a micro-batch keeps in a stage, or N,N,...",
    )
    parser.add_argument(
        "--pending", type=_argument(read_costs), metavar="N", help="bytes that wait from I to W in a stage, or N,N,..."
    )


_Read = TypeVar("_Read")
_Filled = TypeVar("_Filled")


def _filled(command: type[_Filled], arguments: argparse.Namespace) -> _Filled:
    """A command, a dataclass, whose fields are named like the arguments."""
    names = [field.name for field in dataclasses.fields(command)]  # pyright: ignore[reportArgumentType]
    return command(**{name: getattr(arguments, name) for name in names})


def _argument(read: Callable[[str], _Read]) -> Callable[[str], _Read]:
    """Makes what is wrong with an argument a message of `argparse`, which names the argument."""

    def reads(text: str) -> _Read:
        try:
            return read(text)
        except ScheduleError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return reads


_COMMANDS = (_add_plot, _add_simulate, _add_inspect, _add_compile, _add_plan, _add_launch)
