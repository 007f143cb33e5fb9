"""`python -m agents COMMAND`, such as train, evaluate or supervised: the command line makes objects of names."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from textenv.command import check_first, check_whole

try:  # before any module of ours is read: another distribution's may lie in its place
    check_first(Path(__file__).resolve().parent)
    check_whole(Path(__file__).resolve().parent)
except ValueError as replaced:
    raise SystemExit(f"error: {replaced}") from replaced

from agents import run
from agents.commands.baselines import best_of_n_command, dpo_command
from agents.commands.flags import flags_named, run_command
from agents.commands.jobs import job_command, profile_job
from agents.commands.models import reward_model_command, supervised_command
from agents.commands.policies import evaluate_command, generate_command, play_command
from agents.commands.view import view_command
from agents.ranks import RankError
from agents.reporting.errors import is_ours, stop_behind
from agents.reporting.files import ending_with_the_reader, never_fail_to_print

DESCRIPTION = (
    "Train a policy by reinforcement learning, from your own data on; look at it, measure it, and play with it."
)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m agents") -> None:
    """Parse the command line and run the command. prog: what the program was called as, for help and errors.

    Errors that our own code raises end in a one-line message and exit code 1; all others keep their traceback.
    """
    never_fail_to_print()
    arguments, stopped = list(sys.argv[1:] if arguments is None else arguments), None
    try:
        train, profile, pairs, samples = (
            arguments[1:] if arguments[:1] == [name] else [] for name in ("train", "profile", "dpo", "best-of-n")
        )
        commands = {
            "train": job_command(
                train, run.train, "Train a policy and write the results to the run folder.", f"{prog} train"
            ),
            "view": view_command,
            "evaluate": evaluate_command,
            "generate": generate_command,
            "play": play_command,
            "profile": job_command(
                profile, profile_job, "Measure where the time of one iteration goes.", f"{prog} profile"
            ),
            "supervised": supervised_command,
            "reward-model": reward_model_command,
            "dpo": dpo_command(pairs, f"{prog} dpo"),
            "best-of-n": best_of_n_command(samples, f"{prog} best-of-n"),
        }
        with ending_with_the_reader():
            run_command(commands, arguments, prog, DESCRIPTION)
    except (Exception, KeyboardInterrupt) as error:
        if (stopped := _code_of_stop(error)) is not None:
            print(_with_notes("\nstopped.", error), file=sys.stderr)
        elif isinstance(error, RankError):
            raise SystemExit(_with_notes(f"stopped, because of another process: {error}", error)) from None
        elif isinstance(error, (ValueError, TypeError)) and is_ours(error):
            sentence = " ".join(filter(None, [f"error: {error}", flags_named(arguments, str(error))]))
            raise SystemExit(_with_notes(sentence, error)) from error
        else:
            raise
    if stopped is not None:  # out here the stop is forgotten: what its frames held, such as threads that wait, may end
        raise SystemExit(stopped)


def _code_of_stop(error: BaseException) -> int | None:
    """The exit code of a process that was asked to stop, by the shell's convention; None of any other error."""
    stop = stop_behind(error)
    return None if stop is None else 128 + (stop.args[0] if stop.args else signal.SIGINT)


def _with_notes(sentence: str, error: BaseException) -> str:
    return " ".join([sentence, *getattr(error, "__notes__", [])])


def terminate(number: int, frame: object) -> None:
    """End as with Ctrl-C: with the way to go on. A second signal ends the process at once."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


def start(prog: str) -> None:
    """The whole program: `main`, where a request to end is answered with the way to go on."""
    signal.signal(signal.SIGTERM, terminate)
    main(prog=prog)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_rank()


def _end_rank() -> None:
    """End a process of torchrun when its work is done, without taking its libraries apart.

    Seen once: a thread in C++ that still ran then aborted one process, and with it torchrun the others.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


if __name__ == "__main__":
    start("python -m agents")
