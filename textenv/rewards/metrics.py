"""Metrics of Hugging Face's `evaluate` library as rewards: `"evaluate:NAME:KEY"`.

For instance `reward="evaluate:rouge:rougeL"`. Each response is scored alone, against the prompt field `reference`. A
metric is a Python script that `evaluate` downloads (or reads from a folder) and runs: use only metrics that you trust.
Needs `pip install 'textenv[metrics]'`.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from textenv.rewards.functions import PerResponse

METRIC_PREFIX = "evaluate:"


def metric_function(name: str) -> PerResponse:
    """The reward function of `"evaluate:NAME:KEY"`: value KEY of metric NAME, computed for one response at a time."""
    path, _, key = name.removeprefix(METRIC_PREFIX).rpartition(":")
    if not path or not key:
        raise ValueError(
            f"a metric as a reward must be 'evaluate:NAME:KEY', got {name!r}; write for instance "
            "'evaluate:rouge:rougeL', or use a folder with the metric's script as NAME."
        )
    metric = _load_metric(path)

    def measure(prompt: str, response: str, reference: Any) -> float:
        results: Any = metric.compute(predictions=[response], references=[reference])
        if key not in results:
            raise ValueError(f"metric {path!r} does not compute {key!r}; it computes {sorted(results)}")
        values = np.ravel(results[key])  # some metrics return a number, some a list of one number
        if values.shape != (1,):
            raise ValueError(f"{key!r} of metric {path!r} is not a single number for one response: {results[key]!r}")
        return float(values[0])

    return PerResponse(measure, workers=1)


def _load_metric(path: str) -> Any:
    try:
        library = importlib.import_module("evaluate")
    except ImportError as error:
        raise ValueError(
            f"the metric {path!r} needs the library evaluate, which is not installed ({error}); install it with "
            "pip install 'textenv[metrics]'."
        ) from error
    try:
        return library.load(path, keep_in_memory=True)  # otherwise every response writes a file
    except Exception as error:  # a metric's script may raise anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"evaluate cannot load the metric {path!r} ({type(error).__name__}: {reason}); name a metric on the "
            "hub, or a folder with its script, and install the packages that the metric imports."
        ) from error
