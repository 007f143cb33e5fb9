"""Files of result rows, with the commit, the machine and the versions of each measurement."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agents.reporting.report import machine
from textenv import TextGenConfig

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RESULTS.mkdir(exist_ok=True)
PACKAGES = ("numpy", "scipy", "stable_baselines3")  # in addition to those of `report.machine`


def commit() -> str:
    """The current commit, with a plus sign if the work tree differs from it anywhere but in results/."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=False, cwd=HERE).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "--", ":/", ":(exclude)results") else ""
    )


COMMIT = commit()  # read at import, before any result is written


def folder(output: Path | None, quick: bool) -> Path:
    """Where results go: to `output`, else to results/, or to a temporary folder if the sizes are small."""
    if output is None:
        return Path(tempfile.mkdtemp(prefix="benchmark-")) if quick else RESULTS
    output.mkdir(parents=True, exist_ok=True)
    return output


def write(name: str, rows: list[dict[str, Any]], settings: dict[str, Any], folder: Path | None = None) -> Path:
    """Write NAME.json, by default in results/; returns its path."""
    path = (folder or RESULTS) / f"{name}.json"
    machine_info = machine(TextGenConfig().torch_device())
    machine_info["versions"] |= {name: version(name) for name in PACKAGES if find_spec(name)}
    document = {"commit": COMMIT, "machine": machine_info, "settings": settings, "rows": rows}
    path.write_text(json.dumps(document, indent=2, default=_name) + "\n", encoding="utf-8")
    return path


def report(
    name: str,
    measured: Iterable[dict[str, Any]],
    settings: Any,
    lines_of: Callable[[list[dict[str, Any]]], str],
    draw: Callable[[list[dict[str, Any]], Path], None],
) -> None:
    """Print and write rows as they come, then draw NAME.png and print the whole table.

    settings: with `output` and `quick`, see `folder`.
    """
    place, rows = folder(settings.output, settings.quick), list[dict[str, Any]]()
    for row in measured:
        rows.append(row)
        print(lines_of(rows[-1:]), flush=True)
        write(name, rows, vars(settings), place)
    draw(rows, place / f"{name}.png")
    print(f"\n{lines_of(rows)}\nwritten to {place / name}.json")


def _name(value: Any) -> str:
    """Folders are this machine's own: only their names are written."""
    return value.name if isinstance(value, Path) else str(value)


def read_rows(name: str) -> list[dict[str, Any]]:
    """The rows of results/NAME.json; empty if there is no file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def add(name: str, row: dict[str, Any], keys: tuple[str, ...], settings: dict[str, Any]) -> None:
    """Add a row and its commit to results/NAME.json, replacing the row with the same values of `keys`."""

    def identity(candidate: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(candidate[key] for key in keys)

    others = [old for old in read_rows(name) if identity(old) != identity(row)]
    write(name, sorted([*others, row | {"commit": COMMIT}], key=identity), settings)
