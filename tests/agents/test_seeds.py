"""Every generator of a run has a stream of its own, and evaluations are the same in every run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.config import TrainConfig
from agents.control.config import ControlConfig
from agents.control.experiment import ControlExperiment
from agents.seeds import STREAMS, evaluation_seed, seed_of
from agents.text.networks import TextNetworkFactory
from tests.support.learning import make_trainer


def test_streams_never_coincide():
    """No two streams of 100 neighboring runs, members included, share a seed; none is an evaluation's."""
    seeds = [
        seed_of(run, stream, member)
        for run in range(100)
        for stream in STREAMS
        if stream != "evaluation"
        for member in range(4)
    ]
    assert len({*seeds, evaluation_seed()}) == len(seeds) + 1
    assert all(0 <= seed < 2**32 for seed in seeds)  # torch's generator on the CPU uses 32 bits of a seed


def test_streams_are_children_of_one_sequence():
    """A stream is numpy's own child of the run's SeedSequence: a stable number, by hand."""
    children = np.random.SeedSequence(7).spawn(len(STREAMS))
    expected = int(children[STREAMS.index("minibatches")].spawn(1)[0].generate_state(1)[0])
    assert seed_of(7, "minibatches") == expected


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_generators_of_a_text_run(settings):
    """Minibatches, sampling and prompts differ within a run, and between runs; the evaluation's seed is none of them."""
    trainers = [make_trainer(settings, seed=seed) for seed in (0, 1)]
    generators = [g for t in trainers for g in (t.generator, t.collector.sampling_generator)]
    seeds = {generator.initial_seed() for generator in generators}
    assert len(seeds | {evaluation_seed()}) == 5
    draws = [trainer.collector.prompt_generator.integers(2**60) for trainer in trainers]
    assert len({*draws, np.random.default_rng(0).integers(2**60), np.random.default_rng(1).integers(2**60)}) == 4


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_q_heads_of_neighboring_seeds(settings):
    """The random heads of the Q networks of runs 0, 1 and 2 are nine different ones."""
    task = make_trainer(settings).collector.task
    factories = [TextNetworkFactory(task, seed=seed) for seed in range(3)]
    heads = [factory.q_network(0.3).head.weight for factory in factories for _ in range(3)]
    assert len({tuple(head.flatten().tolist()) for head in heads}) == 9


def test_generators_of_a_control_run():
    """Networks, sampling and minibatches differ; every evaluation starts from the same states in every run."""
    runs = [
        ControlExperiment(TrainConfig(env="CartPole-v1", seed=seed), ControlConfig(evaluation_episodes=3))
        for seed in (0, 1)
    ]
    networks = [run.network_factory.actor() for run in runs for _ in range(2)]
    assert len({float(next(network.parameters()).flatten()[0]) for network in networks}) == 4
    seeds = {run.collector.generator.initial_seed() for run in runs}
    assert len(seeds | {0, 1, evaluation_seed()}) == 5
    policy = runs[0].network_factory.actor()
    with torch.no_grad():
        assert runs[0].evaluate(policy) == runs[1].evaluate(policy)
