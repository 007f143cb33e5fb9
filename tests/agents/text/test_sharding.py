"""Sharded weights: the numbers of whole ones, in any architecture, and no weight where none is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from agents.checkpoint import FILE, load_checkpoint, load_networks, load_policy, save_checkpoint
from agents.ranks import ALONE, connected
from agents.text.config import TextConfig
from agents.text.lora import merged_model
from agents.text.networks import TextActor
from agents.text.sharding import layers_of, shard_network, twin_of, whole
from tests.support import families, tiny
from tests.support.learning import make_trainer, same, weights
from tests.support.rank import environment, free_port, trainer_of

ROOT = Path(__file__).parents[3]


@pytest.fixture
def kind() -> str:
    """One architecture is enough here."""
    return "gpt2"


@pytest.fixture
def rank(monkeypatch):
    """The only rank of a process group, in this process."""
    for name, value in environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    with connected(60) as ranks:
        yield ranks


def sharded(settings, ranks, **changes):
    """A trainer with sharded networks."""
    return make_trainer(settings, ranks=ranks, shard="full", **changes)


def sizes(model: nn.Module) -> set[int]:
    """How many numbers each weight has at present."""
    return {weight.numel() for weight in model.parameters()}


@pytest.mark.parametrize("changes", [{}, dict(lora_rank=2), dict(precision="bf16"), dict(old_log_probs="recomputed")])
def test_one_rank_equals_none(settings, rank, changes):
    """Two iterations of the sharded code end with the weights and metrics of the plain one."""
    cases = (dict(learner="ppo", algorithm={}, changes=changes | dict(shard=shard)) for shard in ("none", "full"))
    plain, trainer = (trainer_of(settings, case, rank) for case in cases)
    # bfloat16 has 7 bits behind the first, and a sum of rounded numbers loses another.
    relative, absolute = (2**-6, 2**-6) if "precision" in changes else (1e-4, 1e-5)
    for one, other in zip(plain.iterate(), trainer.iterate(), strict=True):
        for name in one.metrics.keys() - {"seconds", "rollout_seconds", "tokens_per_second"}:
            assert other.metrics[name] == pytest.approx(one.metrics[name], rel=relative, abs=absolute), name
    for name, network in plain.algorithm.networks.trained.items():
        found = weights(trainer.algorithm.networks.trained[name])
        torch.testing.assert_close(found, weights(network), rtol=1e-4, atol=1e-3 if "precision" in changes else 1e-5)


def test_weights_are_there_while_they_are_needed(settings, rank):
    """Frozen models and the twin are empty but inside `whole`, also after an error in it; inside another they stay."""
    trainer = sharded(settings, rank)
    policy, task = trainer.algorithm.networks.policy, trainer.collector.task
    twin = twin_of(policy)
    for model in (twin, task.reference.model, task.reward.model):
        assert sizes(model) == {0}
        with pytest.raises(KeyError), whole(model):
            raise KeyError
        assert sizes(model) == {0}
        with whole(model), whole(model):
            pass
        with whole(model):
            with whole(model):
                pass
            assert 0 not in sizes(model)
    with whole(twin):
        assert same(weights(twin), weights(policy.model))
    next(trainer.iterate())
    assert sizes(twin) == sizes(task.reference.model) == sizes(task.reward.model) == {0}
    with whole(nn.Linear(2, 2)):  # whatever is not sharded is left alone
        pass


@pytest.mark.parametrize(("learner", "changes"), [("ppo", {}), ("ppo", dict(lora_rank=2)), ("dqn", {})])
def test_checkpoints_open_either_way(settings, rank, tmp_path, learner, changes):
    """What a sharded trainer has saved goes on whole, and the other way round, with all weights and moments."""
    algorithm = dict(learning_starts=8, gradient_steps=2) if learner == "dqn" else {}
    make = dict(algorithm=algorithm, learner=learner, **changes)
    for first in ("full", "none"):
        trainers = [make_trainer(settings, ranks=rank, shard=shard, **make) for shard in (first, "none", "full")]
        folder = tmp_path / first
        folder.mkdir()
        next(trainers[0].iterate())
        save_checkpoint(folder, trainers[0])
        assert (folder / "checkpoint-1").is_dir() == (first == "full")
        for other in trainers[1:]:
            load_checkpoint(folder, other)
            for name, network in trainers[0].algorithm.networks.trained.items():
                assert same(weights(other.algorithm.networks.trained[name]), weights(network))
            assert moments(other) == moments(trainers[0])
        policy = make_trainer(settings, **make)
        assert same(
            weights(load_policy(folder, policy.algorithm, policy.collector)),
            weights(trainers[0].algorithm.networks.policy),
        )
        load_networks(folder, policy.algorithm, policy.collector)


def moments(trainer) -> dict[str, float]:
    """The sum of each kind of state of each weight in the optimizer."""
    return {
        f"{name}.{weight_name}.{kind}": float(value.sum())
        for name, network in trainer.algorithm.networks.trained.items()
        for weight_name, weight in network.named_parameters()
        for kind, value in trainer.optimizer.state[weight].items()
    }


def test_old_parts_are_removed(settings, rank, tmp_path):
    """The folder holds the parts of the last checkpoint alone; without them, it is refused in a sentence."""
    trainer = sharded(settings, rank)
    save_checkpoint(tmp_path, trainer)
    next(trainer.iterate())
    save_checkpoint(tmp_path, trainer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", FILE]
    (tmp_path / "checkpoint-1" / ".metadata").unlink()
    with pytest.raises(ValueError, match="does not fit this trainer"):
        load_checkpoint(tmp_path, sharded(settings, rank))


@pytest.mark.parametrize("changes", [{}, dict(lora_rank=2)])
def test_the_policy_is_exported_whole(settings, rank, changes):
    """The copy that is written to the run's folder is an ordinary model with the trained weights, which it leaves."""
    trainer = sharded(settings, rank, **changes)
    next(trainer.iterate())
    policy = trainer.algorithm.networks.policy
    before, twin = weights(policy.model), twin_of(policy)
    model, ids = merged_model(policy), torch.arange(8)[None] + 5
    assert type(model).__name__ == "GPT2LMHeadModel" and same(before, weights(policy.model))
    with whole(twin):
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-5)
    assert "lora_rank" in changes or same(weights(model), before)


def test_refusals(settings):
    """Weights are not shared out among one process, nor those of a model whose head only its own forward can read."""
    with pytest.raises(ValueError, match="--shard full divides weights among the processes of torchrun"):
        sharded(settings, ALONE)
    with pytest.raises(ValueError, match="shard must be one of none, full, got 'half'"):
        TextConfig(shard="half")
    with pytest.raises(ValueError, match="compile remembers where weights lie"):
        TextConfig(shard="full", compile=True)
    model = families.build("xlstm")
    with pytest.raises(ValueError, match=r"the sharded model is a xLSTMForCausalLM .*its head cannot be read apart"):
        shard_network(TextActor(model, 1.0), model, None)


def test_one_device_for_several_ranks(settings, rank, monkeypatch):
    """A device by its number is refused where several processes run on the machine."""
    rank.check_device("cuda:0")  # the only process here
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    rank.check_device("cuda")
    with pytest.raises(ValueError, match="device=cuda:0 is one device, and several processes"):
        rank.check_device("cuda:0")


def test_layers():
    """Every layer once, and none that shares weights with another."""
    model = tiny.language_model("llama")
    assert layers_of(model) == list(model.model.layers)
    twice = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])})
    assert layers_of(twice) == list(twice["layers"])
    twice["layers"][0].weight = twice["layers"][1].weight
    assert layers_of(twice) == [twice["layers"][2]]


@pytest.mark.slow
def test_every_architecture(tmp_path):
    """Of every causal architecture that can be built small, two ranks get the gradients of one. Two are refused."""
    port, output = free_port(), tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.support.sharded", str(output)]
    ranks = [subprocess.Popen(command, cwd=ROOT, env=environment(index, 2, port)) for index in range(2)]
    assert [each.wait(900) for each in ranks] == [0, 0]
    found = {name: row for name, row in json.loads(output.read_text(encoding="utf-8")).items() if row is not None}
    refused = {name for name, row in found.items() if "refused" in row}
    assert refused == {"recurrent_gemma", "xlstm"}
    assert len(found) - len(refused) > 140 and found.keys() <= set(families.names())
    for name in found.keys() - refused:
        assert found[name]["difference"] < 1e-5 and found[name]["twin"] and found[name]["layers"] >= 2, name
