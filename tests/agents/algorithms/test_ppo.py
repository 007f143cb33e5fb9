"""PPO on text: losses, first ratios, gradients, and who shares weights with whom."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from transformers import LlamaConfig, LlamaForCausalLM

from agents.algorithms.ppo import PPOConfig
from agents.objectives.losses import dual_clipped
from agents.text.config import TextConfig
from agents.text.networks import make_critic
from agents.text.rollout import kl_metrics
from tests.support import tiny
from tests.support.by_hand import gradients, perturb, whole_loss
from tests.support.learning import loss, losses, make_rollout, make_trainer, same, weights
from textenv import LanguageModel, TextGenConfig, build_task, shared
from textenv.generation import response_log_probs
from textenv.rewards.reward_model import last_token_scores


def test_first_ratios_are_one(settings):
    """Before the first optimizer step every ratio is 1 and KL(actor, reference) is 0, in train mode, at τ = 0.7."""
    trainer = make_trainer(settings)
    assert trainer.algorithm.networks.actor.training and settings["temperature"] == 0.7
    data = make_rollout(trainer).data
    fresh = trainer.algorithm.networks.actor.distribution(data).log_prob(data["action"])
    mask = data["mask"]
    assert mask.sum() > mask.shape[0]  # not only one token a row
    # Cached decoding and one full forward differ by rounding alone.
    torch.testing.assert_close(fresh[mask], data["action_log_prob"][mask], atol=1e-5, rtol=1e-5)
    assert abs(kl_metrics(data)["kl_per_response"]) < 1e-4  # twelve tokens of 1e-5 each


def test_the_actor_is_certain_of_padding(settings):
    """Outside the response log-probability and entropy are exactly 0, so metrics of TorchRL count no padding."""
    trainer = make_trainer(settings)
    data = make_rollout(trainer).data
    distribution = trainer.algorithm.networks.actor.distribution(data)
    outside = ~data["mask"]
    assert outside.any()
    assert torch.equal(distribution.log_prob(data["action"])[outside], torch.zeros(int(outside.sum())))
    assert torch.equal(distribution.entropy()[outside], torch.zeros(int(outside.sum())))


def test_losses_equal_the_loop(settings):
    """Policy and value loss are the clipped means of over valid tokens, by a plain-Python loop."""
    trainer = make_trainer(settings, algorithm=dict(clip=0.1, value_clip=0.05))
    data = make_rollout(trainer).data
    perturb(trainer.algorithm.networks.actor)
    perturb(trainer.algorithm.networks.critic)
    terms, (_, diagnostics) = losses(trainer, data), loss(trainer.algorithm, data)
    new = trainer.algorithm.networks.actor.distribution(data).log_prob(data["action"]).detach()
    value = trainer.algorithm.networks.critic.values(data).detach()
    policy, worth, clipped, count = 0.0, 0.0, 0, 0
    for row in range(data.shape[0]):
        for t in range(int(data["mask"][row].sum())):
            advantage = float(data["advantage"][row, t])
            ratio = float((new[row, t] - data["action_log_prob"][row, t]).exp())
            policy += max(-advantage * ratio, -advantage * min(max(ratio, 0.9), 1.1))
            old, target = float(data["state_value"][row, t]), float(data["value_target"][row, t])
            near = old + min(max(float(value[row, t]) - old, -0.05), 0.05)
            worth += 0.5 * max((float(value[row, t]) - target) ** 2, (near - target) ** 2)
            clipped += abs(ratio - 1) > 0.1
            count += 1
    assert clipped > 0  # the clip is at work, or this test would not see it
    assert terms["policy_loss"].item() == pytest.approx(policy / count, rel=1e-4, abs=1e-5)
    assert terms["value_loss"].item() == pytest.approx(worth / count, rel=1e-4)
    assert float(diagnostics["clip_fraction"]) / count == pytest.approx(clipped / count, abs=1e-6)


@pytest.mark.parametrize("tokens", [1, 45, 100])
def test_gradients_do_not_depend_on_micro_batches(settings, tokens):
    """One optimizer step is a mean over all its valid tokens, however ragged rows are split."""
    found = {}
    for size in (1000, tokens):
        trainer = make_trainer(settings, minibatch_size=8, micro_batch_tokens=size, max_grad_norm=1e9)
        data = make_rollout(trainer).data
        assert len(set(data["mask"].sum(1).tolist())) > 1
        perturb(trainer.algorithm.networks.actor)
        perturb(trainer.algorithm.networks.critic)
        trainer._backward(data)
        found[size] = torch.cat(
            [gradients(trainer.algorithm.networks.actor), gradients(trainer.algorithm.networks.critic)]
        )
    scale = found[1000].abs().max()
    # float32 sums in another order: a few roundings of the largest entry
    torch.testing.assert_close(found[tokens] / scale, found[1000] / scale, atol=1e-5, rtol=0)


def test_padding_changes_no_loss_and_no_gradient(settings):
    """Ids of padding, and ±1e9 there in every number that the rollout stored, change nothing, to the bit.

    Both signs: an old log-probability of 1e9 makes a ratio of 0, which a forgotten mask would let pass.
    """
    trainer = make_trainer(settings)
    data = make_rollout(trainer).data
    outside = ~data["mask"]  # [B, R]
    numbers = [key for key, value in data.items() if value.is_floating_point() and value.shape[:2] == outside.shape]
    assert {"action_log_prob", "reference_log_prob", "state_value", "advantage", "value_target"} <= set(numbers)
    results = []
    for spoil in (0.0, 1e9, -1e9):
        batch = data.clone()
        if spoil:
            for key in numbers:
                batch[key][outside] = spoil
            batch["input_ids"][~batch["attention_mask"]] = 7
        trainer.optimizer.zero_grad()
        terms = losses(trainer, batch)
        sum(terms.values()).backward()
        both = torch.cat([gradients(trainer.algorithm.networks.actor), gradients(trainer.algorithm.networks.critic)])
        results.append([*terms.values(), both])
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_trimming_changes_no_loss(settings):
    """Columns that are padding in every row can be left out."""
    trainer = make_trainer(settings, micro_batch_tokens=1000)
    data = make_rollout(trainer).data
    short = data[data["mask"].sum(1) < data["mask"].shape[1]]
    (trimmed,) = trainer.collector.micro_batches(short)
    assert trimmed["input_ids"].shape[1] < short["input_ids"].shape[1]
    for name, value in losses(trainer, trimmed).items():
        torch.testing.assert_close(value, losses(trainer, short)[name], atol=1e-5, rtol=1e-5)


def test_training_leaves_the_frozen_models_alone(settings):
    """Reward model and reference are bit-identical after training; actor and critic are not."""
    trainer = make_trainer(settings)
    reference, reward = trainer.collector.task.reference.model, trainer.collector.task.reward.model
    frozen = weights(reference), weights(reward)
    trained = weights(trainer.algorithm.networks.actor), weights(trainer.algorithm.networks.critic)
    list(trainer.iterate())
    assert same(frozen[0], weights(reference)) and same(frozen[1], weights(reward))
    assert not same(trained[0], weights(trainer.algorithm.networks.actor)) and not same(
        trained[1], weights(trainer.algorithm.networks.critic)
    )


def test_no_weight_is_shared(settings):
    """Actor, critic, reference and reward model have no parameter in common."""
    trainer = make_trainer(settings)
    modules = [
        trainer.algorithm.networks.actor,
        trainer.algorithm.networks.critic,
        trainer.collector.task.reference.model,
        trainer.collector.task.reward.model,
    ]
    places = [{parameter.data_ptr() for parameter in module.parameters()} for module in modules]
    for index, first in enumerate(places):
        for second in places[index + 1 :]:
            assert not first & second


def test_where_actor_and_critic_start(settings):
    """The actor starts as the reference, the critic from the reward model, backbone and head."""
    trainer = make_trainer(settings)
    task, critic = trainer.collector.task, trainer.algorithm.networks.critic
    assert same(weights(trainer.algorithm.networks.policy.model), weights(task.reference.model))
    assert same(weights(critic.backbone), weights(task.reward.model.base_model))
    data = make_rollout(trainer).data
    values = critic.all_states(data)
    scores = last_token_scores(task.reward.model, data["input_ids"], data["attention_mask"])[:, 0]
    last = data["mask"].sum(1, keepdim=True)
    torch.testing.assert_close(values.gather(1, last)[:, 0], scores, atol=1e-5, rtol=1e-5)


def test_critic_of_a_two_label_reward_model(settings, tmp_path):
    """Where the score is the log-odds of one label of two, the critic starts from those log-odds, sign and all."""
    folder = tiny.save(tiny.reward_model("gpt2", labels=2), tmp_path / "two")
    trainer = make_trainer(settings | dict(reward=folder, reward_label="LABEL_1"))
    data, critic = make_rollout(trainer).data, trainer.algorithm.networks.critic
    values = critic.all_states(data)
    last = data["mask"].sum(1, keepdim=True)
    torch.testing.assert_close(values.gather(1, last)[:, 0], data["score"], atol=1e-4, rtol=1e-4)


def test_a_live_model_with_dropout_is_trained_without(settings):
    """Dropout in a model that a user shares, a module's or a plain number, is off in the actor."""
    model = LlamaForCausalLM(LlamaConfig(**tiny.LLAMA, attention_dropout=0.5, pad_token_id=tiny.PAD)).eval()
    live = shared(LanguageModel(model, tiny.tokenizer(), (tiny.END,)))
    trainer = make_trainer(settings | dict(reference=live, reward=lambda prompts, responses: [0.0] * len(prompts)))
    data = make_rollout(trainer).data
    fresh, mask = trainer.algorithm.networks.actor.distribution(data).log_prob(data["action"]), data["mask"]
    torch.testing.assert_close(fresh[mask], data["action_log_prob"][mask], atol=1e-5, rtol=1e-5)


def test_critic_of_a_reward_function_starts_from_the_reference(settings):
    """Where the reward is a function, the critic's backbone is the reference's and its values start at 0."""
    task = build_task(TextGenConfig(**(settings | dict(reward=lambda prompts, responses: [1.0] * len(prompts)))))
    critic = make_critic(task)
    assert same(weights(critic.backbone), weights(task.reference.model.base_model))
    assert not critic.head.weight.any() and not critic.head.bias.any()


def test_critic_from_the_reference(settings):
    """`reference`: the reference's backbone and a zero head, though the reward model would fit."""
    critic = make_trainer(settings, critic="reference").algorithm.networks.critic
    task = build_task(TextGenConfig(**settings))
    assert same(weights(critic.backbone), weights(task.reference.model.base_model))
    assert not same(weights(critic.backbone), weights(task.reward.model.base_model))
    assert not critic.head.weight.any() and not critic.head.bias.any()


def test_critic_from_scratch(settings):
    """`scratch`: random weights of the same shapes, drawn from the seed alone, and a zero head."""
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))  # global randomness must not matter
        found.append(make_trainer(settings, critic="scratch", seed=seed).algorithm.networks.critic)
    reference = build_task(TextGenConfig(**settings)).reference.model.base_model
    assert same(weights(found[0]), weights(found[1])) and not same(weights(found[0]), weights(found[2]))
    assert [w.shape for w in weights(found[0].backbone)] == [w.shape for w in weights(reference)]
    assert not same(weights(found[0].backbone), weights(reference))
    assert not found[0].head.weight.any() and not found[0].head.bias.any()


def test_critic_from_the_reward_model(settings):
    """`reward-model`: what `auto` chooses where it fits; a reward function is refused in a sentence."""
    chosen, automatic = (
        make_trainer(settings, critic=start).algorithm.networks.critic for start in ("reward-model", "auto")
    )
    assert same(weights(chosen), weights(automatic))
    function = settings | dict(reward=lambda prompts, responses: [1.0] * len(prompts))
    with pytest.raises(ValueError, match=r"cannot start from the reward .* Choose --critic reference, or leave it out"):
        make_trainer(function, critic="reward-model")
    with pytest.raises(ValueError, match="critic must be one of auto, reward-model, reference, scratch, got 'value'"):
        TextConfig(critic="value")


def test_a_value_depends_on_earlier_tokens_only(settings):
    """V_t changes with token t − 1 and does not change with token t or any later one."""
    trainer = make_trainer(settings)
    data = make_rollout(trainer).data
    row = int(data["mask"].sum(1).argmax())
    data = data[row : row + 1]
    length, width = int(data["mask"].sum()), data["input_ids"].shape[1] - data["mask"].shape[1]
    assert length >= 3
    critic = trainer.algorithm.networks.critic

    def values(ids):
        return critic.values(TensorDict({**data, "input_ids": ids}, batch_size=[1]))[0, :length].detach()

    before = values(data["input_ids"])
    for t in range(length - 1):
        changed = data["input_ids"].clone()
        changed[0, width + t] = (changed[0, width + t] + 1) % 256
        after = values(changed)
        torch.testing.assert_close(after[: t + 1], before[: t + 1], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(after[t + 1], before[t + 1], atol=1e-4)


def test_temperature_reaches_every_log_probability(settings):
    """Actor, recorded and reference log-probabilities are all of the tempered distribution."""
    trainer = make_trainer(settings)
    rollout = make_rollout(trainer)
    data, model = rollout.data, copy.deepcopy(trainer.collector.task.reference.model)
    with torch.no_grad():
        width = data["input_ids"].shape[1] - data["mask"].shape[1]
        logits = model(
            input_ids=data["input_ids"],
            attention_mask=data["attention_mask"].long(),
            position_ids=(data["attention_mask"].long().cumsum(1) - 1).clamp_min(0),
        ).logits[:, width - 1 : -1]
    expected = (logits / 0.7).log_softmax(-1).gather(-1, data["action"][..., None])[..., 0]
    mask = data["mask"]
    for key in ("action_log_prob", "reference_log_prob"):
        torch.testing.assert_close(data[key][mask], expected[mask], atol=1e-5, rtol=1e-5)


def test_response_log_probs_is_zero_outside(settings):
    """The evaluation's KL sums over response tokens only."""
    trainer = make_trainer(settings)
    from textenv.state import TextState

    data = make_rollout(trainer).data
    state = TextState.from_masks(data["input_ids"], data["attention_mask"], data["mask"])
    found = response_log_probs(trainer.collector.task.reference.model, state, 0.7, tokens_per_pass=40)
    torch.testing.assert_close(found, data["reference_log_prob"], atol=1e-5, rtol=1e-5)
    assert not found[~data["mask"]].any()


def test_dual_clip_by_hand():
    """Where A < 0 the loss stops at −cA and its gradient there is 0; where A > 0, or below the bound, nothing changes."""
    ratio = torch.tensor([[0.5, 2.0, 4.0, 4.0]], requires_grad=True)
    advantage = torch.tensor([[-1.0, -1.0, -2.0, 1.0]])
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    found = dual_clipped(loss, advantage, 3.0)
    found.sum().backward()
    # losses max(0.5, 0.8), max(2, 1.2), min(max(8, 2.4), 6) and max(−4, −1.2)
    torch.testing.assert_close(found.detach(), torch.tensor([[0.8, 2.0, 6.0, -1.2]]))
    torch.testing.assert_close(ratio.grad, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_dual_clip_in_the_loss(settings):
    """With a dual clip the whole loss and its gradient are those of the loop, and differ from those without."""
    found = {}
    for bound in (0.0, 1.3):
        trainer = make_trainer(settings, algorithm=dict(dual_clip=bound))
        data = make_rollout(trainer).data
        for network in trainer.algorithm.networks.trained.values():
            perturb(network)
        sum(losses(trainer, data).values()).backward()
        found[bound] = gradients(trainer.algorithm.networks.actor)
        trainer.optimizer.zero_grad()
        whole_loss(trainer, data).backward()
        expected = gradients(trainer.algorithm.networks.actor)
        scale = expected.abs().max()
        # float32 sums in another order: a few roundings of the largest entry
        torch.testing.assert_close(found[bound] / scale, expected / scale, atol=1e-5, rtol=0)
    assert (found[0.0] - found[1.3]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize(("target_kl", "steps"), [(0.0, 12), (1e-3, 1), (1e9, 12)])
def test_target_kl_stops_the_updates(settings, target_kl, steps):
    """A minibatch that finds the policy too far away takes no step, as in Stable-Baselines3, and ends the updates.

    So the weights are those after the steps before it. The next rollout is learned from.
    """
    trainer = make_trainer(settings, algorithm=dict(target_kl=target_kl, epochs=6), learning_rate=1e-2)
    taken, step = [], trainer.optimizer.step
    trainer.optimizer.step = lambda: (step(), taken.append(weights(trainer.algorithm.networks.actor)))
    iterations = trainer.iterate()
    metrics = next(iterations).metrics
    assert len(taken) == steps and same(taken[-1], weights(trainer.algorithm.networks.actor))
    # The mean over the minibatches includes the one that was too far away.
    assert (metrics["approx_kl"] > 1e-3 / 2) and (target_kl != 1e-3 or 2 * metrics["approx_kl"] > target_kl)
    next(iterations)
    assert len(taken) > steps


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_approximate_kl_by_hand(settings):
    """`approx_kl` is the mean of ρ − 1 − log ρ over valid tokens: never negative, and 0 before the first step."""
    trainer = make_trainer(settings)
    data = make_rollout(trainer).data
    valid = data["mask"].sum()
    # a ratio's rounding of 1e-6, in a sum of some sixty
    assert abs(float(loss(trainer.algorithm, data)[1]["approx_kl"] / valid)) < 1e-5
    perturb(trainer.algorithm.networks.actor)
    ratio = trainer.algorithm.networks.actor.distribution(data).log_prob(data["action"]) - data["action_log_prob"]
    expected = (ratio.exp() - 1 - ratio)[data["mask"]].mean().detach()
    found = loss(trainer.algorithm, data)[1]["approx_kl"] / valid
    assert float(found) == pytest.approx(float(expected), rel=1e-4) and found > 0


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_whitening_is_a_choice(settings):
    """Advantages have mean 0 and deviation 1 over a rollout's tokens; with `whiten` off they are the raw ones."""
    data = make_rollout(make_trainer(settings)).data
    valid = data["advantage"][data["mask"]]
    assert abs(float(valid.mean())) < 1e-5 and float(valid.std(correction=0)) == pytest.approx(1, abs=1e-4)
    data = make_rollout(make_trainer(settings, algorithm=dict(whiten=False))).data
    assert torch.equal(data["advantage"], data["raw_advantage"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(dual_clip=1.1), "dual_clip must be above 1 \\+ clip, or 0 for none, got 1.1; 3 is usual"),
        (dict(target_kl=-1.0), "target_kl must be 0 or more, got -1.0"),
    ],
)
def test_bad_settings(settings, message):
    """Bad settings are refused before any work, with the value and the remedy."""
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)
