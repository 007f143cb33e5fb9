"""Trackers: services that keep and compare the numbers of many runs, see `agents.reporting.services`.

Each gets a run's settings, the metrics of every iteration, and at the end the pictures and a table of samples. What it
keeps locally lies in the run folder. `metrics.jsonl` is written first, so that no tracker can lose a number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agents.config import NO_TRACKER
from agents.reporting.errors import stop_behind
from agents.reporting.services import KINDS, Place, Table, Tracker
from textenv.training.files import no_room, write_json

FILE = "trackers.json"  # in the run folder: by which names services know the run


class Trackers:
    """The trackers of a run. One that fails is left out from then on, and the run goes on without it.

    A full disk does not count as a failed tracker: it ends the run, which needs room for its checkpoints.
    """

    def __init__(self, tell: Callable[[str], Any]) -> None:
        """tell: prints a line."""
        self.tell, self.opened = tell, dict[str, Tracker]()
        self.resumed: set[str] = set()  # trackers that may have been told of iterations that run again
        self.reported = 0  # the last iteration that they may know

    def open(self, names: Sequence[str], folder: Path, resume_at: int) -> None:
        """Open the named trackers for the run in `folder`.

        resume_at: the iteration of its checkpoint. Raises ValueError if a service cannot be reached.
        """
        known = _identities(folder)
        for name in names:
            if name == NO_TRACKER:
                continue
            try:
                self.opened[name] = KINDS[name](Place(folder, resume_at, known.get(name)))
            except Exception as error:  # whatever the client of a service raises
                if no_room(error) is not None or stop_behind(error) is not None:
                    raise
                raise ValueError(
                    f"the tracker {name} cannot be started ({_line(error)}). Solve that, or choose another --tracker, "
                    f"such as {NO_TRACKER}."
                ) from error
        identities = {name: tracker.identity for name, tracker in self.opened.items() if tracker.identity is not None}
        self.resumed = identities.keys() & known.keys()
        if identities.keys() - known.keys():
            write_json(folder / FILE, known | identities)

    def configure(self, settings: Mapping[str, Any]) -> None:
        """The settings of the run."""
        self._each(lambda _, tracker: tracker.configure(settings))

    def scalars(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """The metrics of an iteration; only once, where a resumed run repeats it."""

        def log(name: str, tracker: Tracker) -> None:
            if name not in self.resumed or iteration > self.reported:
                tracker.scalars(iteration, metrics)

        self._each(log)

    def results(self, iteration: int, pictures: Sequence[Path], samples: Table) -> None:
        """What the run ends with. samples: may have no rows."""

        def log(_: str, tracker: Tracker) -> None:
            for path in pictures:
                tracker.picture(iteration, path.stem, path)
            if samples:
                tracker.table(iteration, "samples", samples)

        self._each(log)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close them all."""
        self._each(lambda _, tracker: tracker.close(failed=kind is not None))

    def _each(self, action: Callable[[str, Tracker], None]) -> None:
        for name, tracker in list(self.opened.items()):
            try:
                action(name, tracker)
            except Exception as error:  # whatever the client of a service raises
                if no_room(error) is not None or stop_behind(error) is not None:
                    raise
                del self.opened[name]
                self.tell(
                    f"note: the tracker {name} has failed and is left out from now on ({_line(error)}). metrics.jsonl "
                    "has all numbers."
                )


def check_installed(names: Sequence[str]) -> None:
    """Raise ValueError if the package of a tracker is missing."""
    for name in names:
        spec = None if name == NO_TRACKER else find_spec(name)
        # A folder such as ./wandb, which its runs leave, is found as a package without an origin.
        if name != NO_TRACKER and (spec is None or spec.origin is None):
            raise ValueError(
                f"--tracker {name} needs a package that is not installed: pip install 'textenv[{name}]', or choose "
                "another --tracker."
            )


def _identities(folder: Path) -> dict[str, str]:
    path = folder / FILE
    if not os.path.isfile(path):
        return {}
    try:
        known = json.loads(path.read_bytes())
    except ValueError:
        known = None
    if not isinstance(known, dict) or not all(isinstance(value, str) for value in known.values()):
        raise ValueError(f"{str(path)!r} is damaged; remove it, and the trackers begin with a run of their own.")
    return known


def _line(error: Exception) -> str:
    """An error as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
