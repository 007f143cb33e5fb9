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


def episodes(**fields):
    """The responses "the cat" and "dog", to be measured."""
    responses = [tiny.tokenizer()(text).input_ids for text in ("the cat", "dog")]
    return written([[65]] * 2, responses, tiny.tokenizer(), fields=fields)


def test_each_response_against_its_reference(metric):
    """The metric is computed for every response by itself, not for the batch; a list of one number is a number."""
    for key in ("overlap", "each"):
        name = f"evaluate:{metric}:{key}"
        reward = FunctionReward(metric_function(name), name)
        found = reward(episodes(reference=["a cat sat on the mat", "dog"]))
        assert found.total.tolist() == pytest.approx([2 / 6, 1.0])
        assert list(found.parts) == [name]


def test_what_a_metric_lacks_is_named(metric):
    """A wrong key, a key of many numbers, and prompts without references are refused in a sentence."""
    for key, says in (("rougeL", r"computes no 'rougeL'; it has \['each'"), ("pair", "no single number")):
        with pytest.raises(ValueError, match=says):
            FunctionReward(metric_function(f"evaluate:{metric}:{key}"), "m")(episodes(reference=["a", "b"]))
    with pytest.raises(ValueError, match="reward 'm' needs the prompts' field 'reference'"):
        FunctionReward(metric_function(f"evaluate:{metric}:overlap"), "m")(episodes())


def test_a_metric_that_cannot_be_had(tmp_path):
    """A metric that does not exist is refused when the reward is made, with what to do."""
    pytest.importorskip("evaluate")
    with pytest.raises(ValueError, match=r"cannot load the metric '.*absent' .*folder with its script"):
        metric_function(f"evaluate:{tmp_path}/absent:overlap")


@pytest.mark.parametrize("name", ["evaluate:bleu", "evaluate:", "evaluate::bleu", "evaluate:bleu:"])
def test_names_of_metrics(name):
    """A metric without a key is refused before the library is looked for."""
    with pytest.raises(ValueError, match="'evaluate:NAME:KEY', got"):
        metric_function(name)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_without_the_library(settings, monkeypatch):
    """Where evaluate is not installed, making the environment says how to install it."""
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ValueError, match=r"not installed .*pip install 'textenv\[metrics\]'"):
        build_task(TextGenConfig(**{**settings, "reward": "evaluate:bleu:bleu", "kl_coef": 0}))
