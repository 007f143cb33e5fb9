"""Rows of results: where, when and on what they were measured."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agents.reporting.report import machine
from textenv import TextGenConfig

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RESULTS.mkdir(exist_ok=True)
PACKAGES = ("numpy", "scipy", "stable_baselines3")  # besides those that every run notes


def commit() -> str:
    """The commit that was measured, with a plus sign where the work tree differed from it, results left out."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "--", ":/", ":(exclude)results") else ""
    )


COMMIT = commit()  # at the start, before any result is written


def write(name: str, rows: list[dict[str, Any]], settings: dict[str, Any]) -> Path:
    """Writes results/NAME.json."""
    path = RESULTS / f"{name}.json"
    where = machine(TextGenConfig().torch_device())
    where["versions"] |= {name: version(name) for name in PACKAGES if find_spec(name)}
    document = {"commit": COMMIT, "machine": where, "settings": settings, "rows": rows}
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path


def measured(name: str) -> list[dict[str, Any]]:
    """The rows of results/NAME.json so far."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def add(name: str, row: dict[str, Any], keys: tuple[str, ...], settings: dict[str, Any]) -> None:
    """Adds a row to results/NAME.json, in the place of the one with the same values under `keys`; notes its commit."""

    def identity(one: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(one[key] for key in keys)

    others = [old for old in measured(name) if identity(old) != identity(row)]
    write(name, sorted([*others, row | {"commit": COMMIT}], key=identity), settings)
