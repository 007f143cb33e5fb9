"""Metrics of the `evaluate` library as rewards."""

from __future__ import annotations

import sys

import pytest

from tests.support import tiny
from tests.support.episodes import written
from textenv import TextGenConfig, build_task
from textenv.rewards.functions import FunctionReward
from textenv.rewards.metrics import metric_function

SCRIPT = '''
import datasets
import evaluate


class Overlap(evaluate.Metric):
    """Words in common, as a share of the reference's."""

    def _info(self):
        texts = datasets.Value("string")
        features = datasets.Features({"predictions": texts, "references": texts})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        shares = [len({*a.split()} & {*b.split()}) / len(b.split()) for a, b in zip(predictions, references)]
        return {"overlap": sum(shares) / len(shares), "each": shares, "pair": [0.0, 1.0]}
'''


@pytest.fixture(scope="module")
def metric(tmp_path_factory) -> str:
    """A folder with a metric's script."""
    pytest.importorskip("evaluate")
    folder = tmp_path_factory.mktemp("metrics") / "overlap"
    folder.mkdir()
    (folder / "overlap.py").write_text(SCRIPT)
    return str(folder)


def two_responses(**fields):
    """A batch of the responses "the cat" and "dog"."""
    responses = [tiny.tokenizer()(text).input_ids for text in ("the cat", "dog")]
    return written([[65]] * 2, responses, tiny.tokenizer(), fields=fields)


def test_each_response_against_its_reference(metric):
    """The metric is computed per response, not for the batch. A list of one number counts as a number."""
    for key in ("overlap", "each"):
        name = f"evaluate:{metric}:{key}"
        reward = FunctionReward(metric_function(name), name)
        scores = reward(two_responses(reference=["a cat sat on the mat", "dog"]))
        assert scores.total.tolist() == pytest.approx([2 / 6, 1.0])
        assert list(scores.parts) == [name]


def test_unusable_metrics_are_refused(metric):
    """A wrong key, a key with several numbers, and prompts without references each raise an error."""
    for key, says in (("rougeL", r"does not compute 'rougeL'; it computes \['each'"), ("pair", "not a single number")):
        with pytest.raises(ValueError, match=says):
            FunctionReward(metric_function(f"evaluate:{metric}:{key}"), "m")(two_responses(reference=["a", "b"]))
    with pytest.raises(ValueError, match="reward 'm' needs the prompts' field 'reference'"):
        FunctionReward(metric_function(f"evaluate:{metric}:overlap"), "m")(two_responses())


def test_a_metric_that_does_not_exist(tmp_path):
    """A metric that does not exist raises an error with the remedy when the reward is built."""
    pytest.importorskip("evaluate")
    with pytest.raises(ValueError, match=r"cannot load the metric '.*absent' .*folder with its script"):
        metric_function(f"evaluate:{tmp_path}/absent:overlap")


@pytest.mark.parametrize("name", ["evaluate:bleu", "evaluate:", "evaluate::bleu", "evaluate:bleu:"])
def test_names_of_metrics(name):
    """A metric name without a key raises an error before `evaluate` is imported."""
    with pytest.raises(ValueError, match="'evaluate:NAME:KEY', got"):
        metric_function(name)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_without_the_library(settings, monkeypatch):
    """Without `evaluate`, making the environment raises an error that says how to install it."""
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ValueError, match=r"not installed .*pip install 'textenv\[metrics\]'"):
        build_task(TextGenConfig(**{**settings, "reward": "evaluate:bleu:bleu", "kl_coef": 0}))
