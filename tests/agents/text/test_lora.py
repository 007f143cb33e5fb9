"""LoRA: networks train adapters on a frozen model's own tensors, and nobody else ever meets an adapter."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading

import gymnasium as gym
import pytest
import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from agents import run
from agents.__main__ import main
from agents.checkpoint import FILE, load_checkpoint, save_checkpoint
from agents.play import load_player
from agents.presets import defaults
from agents.ranks import ALONE
from agents.text.config import TextConfig
from agents.text.fingerprints import of_weights
from agents.text.lora import merged_model, save_adapter, with_adapters
from agents.text.networks import TextActor, make_actor
from tests.support import families, learning, runs, tiny
from tests.support.by_hand import perturb
from textenv import TextGenConfig, build_task, shared
from textenv.models.comparison import bound, relative_difference
from textenv.models.decoding import CachedDecoder, new_decoder
from textenv.models.language_model import LanguageModel, find_backbone
from textenv.models.loading import refuse_adapters

RANK = 4
CASES = [
    *((family, torch.float32) for family in ("gpt2", "llama")),
    ("gpt2", torch.bfloat16),
    *(pytest.param(family, torch.float32, marks=pytest.mark.slow) for family in ("qwen2", "gemma2", "opt")),
    *(pytest.param(family, torch.bfloat16, marks=pytest.mark.slow) for family in ("llama", "qwen2", "gemma2", "opt")),
]
LEARNERS = [
    ("ppo", "bfloat16"),
    *(pytest.param(name, "float32", marks=pytest.mark.slow) for name in ("ppo", "a2c", "reinforce", "rloo", "grpo")),
    *(pytest.param(name, "bfloat16", marks=pytest.mark.slow) for name in ("a2c", "reinforce", "rloo", "grpo")),
]


@pytest.fixture
def kind() -> str:
    """One architecture is enough where its kind does not matter."""
    return "gpt2"


def frozen(family: str, dtype: torch.dtype = torch.float32):
    """A model as `load_frozen` gives it."""
    return families.build(family).to(dtype).requires_grad_(False)


def adapted(model) -> TextActor:
    """An actor on it."""
    return with_adapters(TextActor(model, 1.0), "model", RANK, seed=0)


def ids(rows: int = 3, columns: int = 12) -> torch.Tensor:
    """Random texts."""
    return torch.randint(tiny.VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(0))


def logits(model, texts: torch.Tensor | None = None) -> torch.Tensor:
    """A bare forward."""
    with torch.no_grad():
        return model(input_ids=ids() if texts is None else texts, use_cache=False).logits


def train_a_step(actor: TextActor) -> None:
    """A large step on some loss of the actor's own logits."""
    output = actor.model(input_ids=ids(), use_cache=False).logits.float()
    output.log_softmax(-1)[..., 65].mean().neg().backward()
    gradients = [weight.grad for weight in actor.parameters() if weight.grad is not None]
    with torch.no_grad():
        for _ in range(2):  # the first half of an adapter gets no gradient before the second has left zero
            for weight in actor.parameters():
                if weight.grad is not None:
                    weight.add_(weight.grad / torch.stack([g.norm() for g in gradients]).norm(), alpha=-3.0)
    actor.zero_grad()


def storages(module: torch.nn.Module) -> set[int]:
    """Where a module's weights lie."""
    return {weight.data_ptr() for weight in module.parameters()}


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_an_adapted_model(family, dtype, tmp_path):
    """It starts as its trunk to the bit, shares the trunk's memory, and trains and saves float32 adapters alone.

    Its merged weights are a plain float32 model with the same logits, and so is the saved adapter on its base, by peft.
    """
    trunk = frozen(family, dtype)
    before, weights = logits(trunk), of_weights(trunk)
    actor = adapted(trunk)
    own = list(actor.parameters())
    assert torch.equal(logits(actor.model), before)
    linear = [part for part in trunk.modules() if isinstance(part, torch.nn.Linear | Conv1D)]
    assert len(own) == 2 * (len(linear) - 1)  # of every linear layer except the head
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in own)
    assert storages(actor.model) == storages(trunk) | storages(actor) and not storages(trunk) & storages(actor)
    assert actor.model.dtype == dtype and type(actor.model) is type(trunk)
    assert [tensor.data_ptr() for tensor in actor.state_dict().values()] == [weight.data_ptr() for weight in own]

    train_a_step(actor)
    after = logits(actor.model)
    assert relative_difference(after, before) > 0.01
    assert torch.equal(logits(trunk), before) and of_weights(trunk) == weights  # names, types and bytes
    assert all(weight.grad is None and not weight.requires_grad for weight in trunk.parameters())

    merged = merged_model(actor)
    refuse_adapters("merged", merged)  # it is plain
    assert {weight.dtype for weight in merged.parameters()} == {torch.float32}
    assert relative_difference(logits(merged), after) < bound(dtype)
    assert not storages(merged) & storages(actor.model)
    save_adapter(actor, tmp_path, ALONE)
    restored = PeftModel.from_pretrained(families.build(family).to(dtype), tmp_path)
    assert torch.equal(logits(restored), after)


def test_adapters_of_another_rank_are_other_numbers():
    """The rank is the width of the adapters, and the seed decides their random half."""
    trunk = frozen("llama")
    first, second, third = (with_adapters(TextActor(trunk, 1.0), "model", *each) for each in ((4, 0), (4, 0), (4, 1)))
    assert learning.same(learning.weights(first), learning.weights(second))
    assert not learning.same(learning.weights(first), learning.weights(third))
    wide = with_adapters(TextActor(trunk, 1.0), "model", 8, 0)
    assert sum(map(torch.numel, wide.parameters())) == 2 * sum(map(torch.numel, first.parameters()))


def test_others_read_the_trunk_while_an_actor_computes_layers_again():
    """Gradients of a recomputed forward are those of a plain one, while another thread reads the reference."""
    trunk = frozen("llama")
    actor, expected = adapted(trunk), logits(trunk)
    perturb(actor)

    def gradients(output: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(output.square().sum(), list(actor.parameters())))

    plain = gradients(actor.model(input_ids=ids(), use_cache=False).logits)
    recomputed = checkpoint(lambda: actor.model(input_ids=ids(), use_cache=False).logits, use_reentrant=False)
    seen, over = [], threading.Event()

    def read() -> None:
        while not over.is_set() or not seen:
            seen.append(torch.equal(logits(trunk), expected))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        again = gradients(recomputed)
    finally:
        over.set()
        reader.join()
    assert learning.same(plain, again) and all(seen)


def test_a_live_reference_is_left_as_it_is(settings):
    """Weights that require gradients stay so, get none, and belong to the caller's model alone."""
    live = tiny.language_model("gpt2")
    live.requires_grad_(True)
    reference = LanguageModel(live, tiny.tokenizer(), (tiny.END,))
    trainer = learning.make_trainer(settings | dict(reference=shared(reference)), lora_rank=RANK, iterations=1)
    list(trainer.iterate())
    assert all(weight.requires_grad and weight.grad is None for weight in live.parameters())


def test_one_trunk(settings):
    """The actor is on the reference, the critic on the reward model; the optimizer holds adapters and the head."""
    trainer = learning.make_trainer(settings, lora_rank=RANK, iterations=1)
    task, networks = trainer.collector.task, trainer.algorithm.networks
    before = [of_weights(task.reference.model), of_weights(task.reward.model)]
    assert storages(networks.actor.model) - storages(networks.actor) == storages(task.reference.model)
    assert storages(networks.critic.backbone) - storages(networks.critic) == storages(find_backbone(task.reward.model))
    data = learning.make_rollout(trainer).data
    values = networks.critic.all_states(data).gather(1, data["mask"].sum(1)[:, None])[:, 0]
    torch.testing.assert_close(values, data["score"], rtol=1e-5, atol=1e-5)  # the critic starts as the reward model
    held = {weight.data_ptr() for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert held == storages(networks.actor) | storages(networks.critic)
    assert networks.critic.head.weight.data_ptr() in held
    list(trainer.iterate())
    assert [of_weights(task.reference.model), of_weights(task.reward.model)] == before


def test_the_critic_without_a_reward_model(settings):
    """It is on the reference's trunk, beside the actor's adapters, and not on them."""
    reward = dict(reward="tests.agents.text.test_lora:lengths")
    trainer = learning.make_trainer(settings | reward, lora_rank=RANK, iterations=1)
    networks, reference = trainer.algorithm.networks, trainer.collector.task.reference.model
    assert storages(networks.critic.backbone) - storages(networks.critic) == storages(find_backbone(reference))
    assert not storages(networks.actor) & storages(networks.critic)
    data = learning.make_rollout(trainer).data
    assert not networks.critic.values(data).any()  # the head is zero
    list(trainer.iterate())
    assert networks.critic.values(data).any()


def lengths(prompts, responses):
    """A reward function."""
    return [float(len(response)) for response in responses]


@pytest.mark.parametrize(("learner", "dtype"), LEARNERS)
def test_learners_train_adapters(settings, learner, dtype):
    """Every learner from rollouts: the KL starts at 0, adapters move and the trunk does not."""
    group = 4 if learner in ("rloo", "grpo") else 1
    changes = dict(learner=learner, lora_rank=RANK, iterations=2, learning_rate=1e-2)
    trainer = learning.make_trainer(settings | dict(group_size=group, dtype=dtype), **changes)
    task, networks = trainer.collector.task, trainer.algorithm.networks
    assert torch.equal(logits(networks.policy.model), logits(task.reference.model))
    assert isinstance(new_decoder(networks.policy.model, 3, task.width, task.vocabulary), CachedDecoder)
    before, frozen_before = learning.weights(networks.policy), of_weights(task.reference.model)
    first, second = trainer.iterate()
    # What is left is rounding, of the decoder against whole forwards.
    start, later = (largest_log_ratio(iteration.rollout.data) for iteration in (first, second))
    assert start < (1e-4 if dtype == "float32" else 0.2) and later > 2 * start and later > 0.02
    moved = [not torch.equal(*pair) for pair in zip(learning.weights(networks.policy), before, strict=True)]
    assert all(moved) and of_weights(task.reference.model) == frozen_before
    assert all(
        weight.dtype == torch.float32 for network in networks.trained.values() for weight in network.parameters()
    )


def largest_log_ratio(data):
    """Of actor and reference, over the tokens of a rollout: an estimate of the KL may be negative on few of them."""
    return float((data["action_log_prob"] - data["reference_log_prob"])[data["mask"]].abs().max())


def test_checkpoints_hold_adapters_alone(settings, tmp_path):
    """Adapters, the head and AdamW's moments. A resumed run equals an uninterrupted one to the bit."""
    changes = dict(lora_rank=RANK, iterations=2, learning_rate=1e-2)
    whole, first, second = (learning.make_trainer(settings, **changes) for _ in range(3))
    list(whole.iterate())
    next(first.iterate())
    save_checkpoint(tmp_path, first)
    for weight in tensors_of(second):
        torch.nn.init.zeros_(weight)  # all of them come from the file
    load_checkpoint(tmp_path, second)
    list(second.iterate())
    assert learning.same(tensors_of(whole), tensors_of(second))
    assert learning.same(runs.tensors(whole.optimizer.state_dict()), runs.tensors(second.optimizer.state_dict()))

    state, counts = torch.load(tmp_path / FILE, weights_only=True), [weight.numel() for weight in tensors_of(first)]
    saved = sum(map(torch.numel, state["tensors"].values()))
    assert saved == 3 * sum(counts) + len(counts)  # two moments of each weight, and a step of each tensor
    size, names = (tmp_path / FILE).stat().st_size, 3 * 500 * len(counts)
    assert 12 * sum(counts) < size < 12 * sum(counts) + names + 20_000  # generators
    assert {weight.dtype for weight in tensors_of(first)} == {torch.float32}


def tensors_of(trainer) -> list[torch.Tensor]:
    """All trained weights."""
    return [weight for network in trainer.algorithm.networks.trained.values() for weight in network.parameters()]


def test_mask_policies_get_merged_weights(settings):
    """NLPO's mask is the whole actor of its last refresh, as a plain model."""
    trainer = learning.make_trainer(
        settings | dict(action_mask="top_k:30"), lora_rank=RANK, iterations=1, mask_refresh=1, learning_rate=1e-2
    )
    list(trainer.iterate())
    (mask,), actor = trainer.collector.mask_policies, trainer.algorithm.networks.actor
    refuse_adapters("mask", mask.model)
    assert relative_difference(logits(mask.model), logits(actor.model)) < bound(torch.float32)
    assert relative_difference(logits(mask.model), logits(trainer.collector.task.reference.model)) > 0.01


def test_results_of_a_run(folders, tmp_path, monkeypatch, capsys):
    """`actor/` is the merged policy and `adapter/` is peft's; evaluate, generate and play read the run."""
    for name in ("draw_curves", "draw_credit"):  # they take longer than the training
        monkeypatch.setattr(f"agents.reporting.plots.{name}", lambda *_: None)
    folder = tmp_path / "run"
    task = dict(reference=folders["llama"], reward=folders["llama_reward"], prompts=tiny.PROMPTS, kl_coef=0.3)
    task |= dict(max_prompt_tokens=16, max_new_tokens=6, device="cpu")
    runs.train(folder, task, lora_rank=RANK, learning_rate=1e-2)
    assert "adapters of rank 4" in capsys.readouterr().out
    _, policy = run.load_policy(folder)
    expected = logits(policy.model)
    actor = AutoModelForCausalLM.from_pretrained(folder / "actor")
    assert relative_difference(logits(actor), expected) < bound(torch.float32)
    base = AutoModelForCausalLM.from_pretrained(task["reference"])
    assert relative_difference(logits(base), expected) > 0.01
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder / "adapter")), expected)
    env = gym.make("TextGen-v0", **task)
    player = load_player(folder, env, seed=0)
    observation, info = env.reset(seed=0)
    context = torch.from_numpy(observation["input_ids"][observation["attention_mask"] == 1])
    log_probs = (logits(policy.model, context[None])[0, -1] / player.temperature).log_softmax(-1)
    torch.testing.assert_close(player.log_probs(observation, info), log_probs, rtol=0, atol=1e-4)
    main(["evaluate", "--run", str(folder)])
    evaluated = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert float(evaluated["score"]) == pytest.approx(summary["score_after"], abs=1e-4)
    assert float(evaluated["kl_per_response"]) == pytest.approx(summary["kl_per_response"], abs=1e-4)
    main(["generate", "--run", str(folder), "--prompt", "a", "--color", "penalty"])
    assert "[score" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds an adapter.*merge_and_unload"):
        build_task(TextGenConfig(**task | dict(reference=str(folder / "adapter"))))


def test_what_cannot_be_adapted(settings, monkeypatch):
    """Architectures that peft refuses or breaks, settings that contradict, and a missing peft, each in a sentence."""
    for family, says in [
        ("mamba", r"peft has none for it \(.*Mamba.*Leave lora_rank out"),
        ("deepseek_v4", "its forward fails"),
    ]:
        with pytest.raises(ValueError, match=rf"the model with adapters is a \w+ \({family}\): {says}"):
            adapted(frozen(family))
    with pytest.raises(ValueError, match=r"critic='scratch' starts from random weights.*--critic reference"):
        TextConfig(critic="scratch", lora_rank=4)
    with pytest.raises(ValueError, match="lora_rank must be 0"):
        TextConfig(lora_rank=-1)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora_rank=4 needs peft .*pip install 'textenv\[lora\]'"):
        make_actor(build_task(TextGenConfig(**settings)), 4)


@pytest.mark.slow
@pytest.mark.parametrize("family", families.names())
def test_every_architecture(family):
    """Adapted or refused in our own words: the trunk's logits at first, and merged weights after a step."""
    try:
        trunk = frozen(family)
        before = logits(trunk)
    except Exception as error:  # sizes or inputs that its class does not take
        pytest.skip(f"{type(error).__name__}: {error}")
    try:
        actor = adapted(trunk)
    except ValueError as error:
        assert "model with adapters" in str(error)
        return
    assert relative_difference(logits(actor.model), before) < bound(torch.float32) / 10
    train_a_step(actor)
    assert relative_difference(logits(merged_model(actor)), logits(actor.model)) < 2 * bound(torch.float32)
    assert relative_difference(logits(actor.model), before) > 1e-3
    assert torch.equal(logits(trunk), before)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_adapters_learn_the_embedded_task(seed):
    """The score rises: by 1.2 to 1.4 in eight iterations over three seeds, at thirty times the rate of whole weights."""
    train, text, ppo = defaults("TextGen-v0", "ppo")
    rates = dict(learning_rate=3e-3, critic_learning_rate=3e-3)
    train = dataclasses.replace(train, seed=seed, iterations=8, env_arg=("device=cpu",), **rates)
    _, trainer = run.build(train, dataclasses.replace(text, lora_rank=16), ppo)
    scores = [iteration.metrics["score"] for iteration in trainer.iterate()]
    assert scores[-1] > scores[0] + 0.5
