"""Rows of results: where, when and on what they were measured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from agents.report import machine

RESULTS = Path(__file__).parent / "results"
RESULTS.mkdir(exist_ok=True)


def commit() -> str:
    """The commit that was measured, with a plus sign where the work tree differed from it."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def write(name: str, rows: list[dict[str, Any]], settings: dict[str, Any]) -> Path:
    """Writes results/NAME.json."""
    path = RESULTS / f"{name}.json"
    document = {"commit": commit(), "machine": machine(), "settings": settings, "rows": rows}
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path
