"""A whole run in a process of its own, and what it took: `python -m benchmarks.support.measured_run JOB.json`.

The job names the run's folder, arguments of the environment, and settings of text. Memory is that of the process at its
peak, less what Python and the libraries hold before.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from agents import run
from agents.checkpoint import FILE
from agents.config import TrainConfig
from agents.domains import arguments_of
from agents.presets import defaults
from agents.reporting.estimate import of_run

ENV = "TextGen-v0"
LATE = ("matplotlib.figure", "matplotlib.backends.backend_agg", "torch.utils.tensorboard")  # imported by a run


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Two iterations of PPO. Returns bytes, as measured and as estimated before."""
    for name in LATE:
        importlib.import_module(name)
    given = TrainConfig(env_arg=tuple(job["env_arg"]))
    config, text, ppo = defaults(ENV, "ppo", arguments_of(given), job["settings"].get("lora_rank", 0) > 0)
    config = replace(config, run=job["run"], iterations=2, env_arg=given.env_arg, **job["train"])
    text, ppo = replace(text, **job["settings"]), replace(ppo, epochs=1)
    needs = of_run(config, text, ppo, 1)  # imports the models' code, which counts among the libraries
    resident = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    run.train(config, text, ppo)
    # Not getrusage: its peak is that of the parent process too, if that is larger.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]
    (saved,) = [item.bytes for item in needs.disk if item.name.startswith("checkpoint")]
    return {
        "memory_bytes": peak - resident,
        "estimated_memory_bytes": needs.memory,
        "checkpoint_bytes": (Path(job["run"]) / FILE).stat().st_size,
        "estimated_checkpoint_bytes": saved,
    }


if __name__ == "__main__":
    print("RESULT", json.dumps(measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
