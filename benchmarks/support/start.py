"""How a module is started: by itself, or in several processes of torchrun; and what it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def command(module: str, *arguments: str, ranks: int | None = None) -> list[str]:
    """The command that runs a module. ranks: processes of torchrun; None: one without it."""
    # `--` keeps torchrun from reading --run as one of its own options.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "--"]
    return [sys.executable, *(["-m"] if ranks is None else torchrun), module, *arguments]


def answer(module: str, job: dict[str, Any], work: Path) -> dict[str, Any]:
    """What a module prints of a job after RESULT, as JSON, in a fresh process of one thread. work: a folder."""
    file = work / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    result = subprocess.run(
        command(module, str(file)),
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    answers = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    if result.returncode or not answers:
        raise SystemExit(f"{job} failed with exit code {result.returncode}:\n{result.stderr[-3000:]}")
    return json.loads(answers[-1].removeprefix("RESULT "))
