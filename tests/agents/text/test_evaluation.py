"""Evaluation: what it measures, and how often it runs and reads the models."""

from __future__ import annotations

import pytest
import torch

import textenv.task
from agents.text.evaluation import evaluate
from agents.text.networks import TextNetworkFactory
from tests.support.by_hand import perturb
from textenv import TextGenConfig, build_task
from textenv.generation import generate, response_log_probs
from textenv.models.sampling import Sampling


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_the_reference_is_read_and_run_once(settings, monkeypatch, kl_coef):
    """A task reads its reference from disk once, and an evaluation runs it once over each batch; the KL is right."""
    loads, load = [], textenv.task.load_causal_lm
    monkeypatch.setattr(textenv.task, "load_causal_lm", lambda *arguments: (loads.append(1), load(*arguments))[1])
    task = build_task(TextGenConfig(**{**settings, "kl_coef": kl_coef}))
    assert len(loads) == (kl_coef > 0)
    networks = TextNetworkFactory(task)
    actor = networks.actor()
    networks.critic()
    perturb(actor)
    reference, forwards = task.load_reference().model, []
    evaluate(task, actor.model, task.prompts, None, seed=0)  # the first one looks what the model does after its head
    reference.register_forward_pre_hook(lambda *_: forwards.append(1))
    evaluations = [evaluate(task, actor.model, task.prompts, None, seed=0, batch=(4, 1000)) for _ in range(2)]
    assert len(loads) == 1 and len(forwards) == 2 and evaluations[0] == evaluations[1]
    sampling, generator = Sampling(temperature=task.config.temperature), torch.Generator().manual_seed(0)
    generation = generate(task, actor.model, task.prompts, sampling, generator)
    log_ratio = generation.log_prob - response_log_probs(reference, generation.state, task.config.temperature)
    assert evaluations[0].kl == log_ratio.sum(1).tolist() and min(map(abs, evaluations[0].kl)) > 0
