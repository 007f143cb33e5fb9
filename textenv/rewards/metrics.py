"""Metrics of Hugging Face's `evaluate` library as rewards: `"evaluate:NAME:KEY"`.

Each response is measured by itself against the prompts' field `reference`. A metric is a Python script that
`evaluate` downloads (or reads from a folder) and runs: name only those that you trust.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from textenv.rewards.functions import PerResponse

METRIC_PREFIX = "evaluate:"


def metric_function(name: str) -> PerResponse:
    """The reward function that `"evaluate:NAME:KEY"` names: KEY of what metric NAME computes for one response."""
    path, _, key = name.removeprefix(METRIC_PREFIX).rpartition(":")
    if not path or not key:
        raise ValueError(
            f"a metric as a reward is 'evaluate:NAME:KEY', got {name!r}; for instance 'evaluate:rouge:rougeL', or a "
            "folder with the metric's script as NAME."
        )
    metric = _load_metric(path)

    def measure(prompt: str, response: str, reference: Any) -> float:
        found: Any = metric.compute(predictions=[response], references=[reference])
        if key not in found:
            raise ValueError(f"metric {path!r} computes no {key!r}; it has {sorted(found)}")
        values = np.ravel(found[key])  # some metrics give one number, some a list of one
        if values.shape != (1,):
            raise ValueError(f"{key!r} of metric {path!r} is no single number for one response: {found[key]!r}")
        return float(values[0])

    return PerResponse(measure, workers=1)


def _load_metric(path: str) -> Any:
    try:
        library = importlib.import_module("evaluate")
    except ImportError as error:
        raise ValueError(
            f"the metric {path!r} needs the library evaluate, which is not installed ({error}); install it with: "
            "pip install 'textenv[metrics]'"
        ) from error
    try:
        return library.load(path, keep_in_memory=True)  # in memory, or every response would write a file
    except Exception as error:  # a metric's script may raise whatever it likes
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"evaluate cannot load the metric {path!r} ({type(error).__name__}: {reason}); give a metric of the hub "
            "that can be reached, or a folder with its script, and install what the metric itself imports."
        ) from error
