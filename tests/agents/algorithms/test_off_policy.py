"""DQN and SAC on text: losses by a loop, padding, micro-batches, resuming, a known answer, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from agents.algorithms.dqn import DQN, DQNConfig
from agents.algorithms.sac import SAC, SACConfig
from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.text.networks import language_model_of
from tests.support import tiny
from tests.support.learning import losses, make_rollout, make_trainer, same, weights, whole
from tests.support.vectors import VectorNetworks

BOTH = pytest.mark.parametrize("name", ["dqn", "sac"])
SMALL = dict(learning_starts=8, gradient_steps=3, buffer_size=20, gamma=0.9, lmbda=0.6)


def make(settings, name, algorithm=None, **changes):
    return make_trainer(settings, algorithm=SMALL | (algorithm or {}), learner=name, **changes)


def networks_of(trainer):
    return [*trainer.algorithm.networks.trained.values(), *trainer.algorithm.networks.targets.values()]


def perturb(trainer):
    """Moves the weights of all networks, targets too, each its own way."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for network in networks_of(trainer):
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def gradients(trainer):
    found = [parameter.grad for one in trainer.algorithm.networks.trained.values() for parameter in one.parameters()]
    return torch.cat([grad.flatten() for grad in found if grad is not None])


def loop_targets(data, row, value, old):
    """The Q(λ) targets of one response, from its end: γ = 0.9, λ = 0.6. value: of s_0..; old: Q̄ of what was chosen."""
    length, ahead, found = int(data["mask"][row].sum()), 0.0, []
    for t in reversed(range(length)):
        after = 0.0 if t == length - 1 else value[t + 1]
        ahead = float(data["reward"][row, t]) + 0.9 * after - old[t] + 0.9 * 0.6 * ahead
        found.append(old[t] + ahead)
    return found[::-1]


def expectation(log_prob, action_value, temperature):
    return sum(math.exp(p) * (q - temperature * p) for p, q in zip(log_prob, action_value, strict=True))


@pytest.mark.parametrize("double", [True, False])
def test_dqn_equals_the_loop(settings, double):
    """The loss is the mean over valid tokens of (Q(s, a) − target)², in plain Python, at the penalty's own β."""
    trainer = make(settings, "dqn", dict(double=double))
    data = make_rollout(trainer).data
    perturb(trainer)
    learner, beta = trainer.algorithm, settings["kl_coef"]
    assert learner.alpha == beta
    with torch.no_grad():
        online, target = (
            whole(one, data).double() for one in (learner.networks.online, learner.networks.target.network)
        )
    total, count, actions = 0.0, 0, data["action"].tolist()
    for row in range(len(data)):
        length = int(data["mask"][row].sum())
        policy = ((online if double else target)[row] / beta).log_softmax(-1)
        value = [expectation(policy[t].tolist(), target[row, t].tolist(), beta) for t in range(length)]
        old = [float(target[row, t, actions[row][t]]) for t in range(length)]
        for t, wanted in enumerate(loop_targets(data, row, value, old)):
            total += (float(online[row, t, actions[row][t]]) - wanted) ** 2
            count += 1
    assert losses(trainer, data)["q_loss"].item() == pytest.approx(total / count, rel=1e-4)


@BOTH
def test_they_learn_from_what_the_environment_pays(settings, name):
    """The reward in replay is the environment's: the score and β log π_ref, as stepping pays them."""
    rollout = make_rollout(make(settings, name))
    assert rollout.data["reference_log_prob"].abs().sum() > 1
    assert torch.equal(rollout.data["reward"], rollout.scored.reward)


def test_sac_equals_the_loop(settings):
    """Both losses are the means over valid tokens of the sums in sac.py's docstring, in plain Python."""
    trainer = make(settings, "sac")
    data = make_rollout(trainer).data
    perturb(trainer)
    learner, beta = trainer.algorithm, settings["kl_coef"]
    with torch.no_grad():
        log_prob = whole(learner.networks.policy, data).double().log_softmax(-1)
        online = [whole(network, data).double() for network in learner.networks.online]
        lowest = torch.minimum(*(whole(one.network, data).double() for one in learner.networks.target))
    policy_total, q_total, count, actions = 0.0, 0.0, 0, data["action"].tolist()
    for row in range(len(data)):
        length = int(data["mask"][row].sum())
        likely = [log_prob[row, t].tolist() for t in range(length)]
        value = [expectation(likely[t], lowest[row, t].tolist(), beta) for t in range(length)]
        old = [float(lowest[row, t, actions[row][t]]) for t in range(length)]
        for t, wanted in enumerate(loop_targets(data, row, value, old)):
            policy_total -= expectation(likely[t], torch.minimum(*(q[row, t] for q in online)).tolist(), beta)
            q_total += sum((float(q[row, t, actions[row][t]]) - wanted) ** 2 for q in online)
            count += 1
    found = losses(trainer, data)
    assert found["policy_loss"].item() == pytest.approx(policy_total / count, rel=1e-4)
    assert found["q_loss"].item() == pytest.approx(q_total / count, rel=1e-4)


@BOTH
def test_the_policy_is_the_language_model(settings, name):
    """softmax(Q/β) is what the fast path samples, masks and all, β log Σ exp(Q/β) is V, and all start as π_ref."""
    allowed = lambda prompt, response: range(0, 300, 2 + len(response) % 2)  # noqa: E731
    trainer = make({**settings, "action_mask": allowed}, name)
    data, beta = make_rollout(trainer).data, settings["kl_coef"]
    mask, q = data["mask"], list(trainer.algorithm.networks.trained.values())[-1]
    with torch.no_grad():
        values = whole(q, data)
    log_prob = (values / beta).log_softmax(-1).gather(-1, data["action"][..., None])[..., 0]
    # float32: cached decoding against one pass, and values of a few units divided by β
    torch.testing.assert_close(log_prob[mask], data["action_log_prob"][mask], atol=1e-4, rtol=1e-4)
    assert values.isfinite().all()
    hidden = trainer.collector.task.reference.model.base_model(
        input_ids=data["input_ids"],
        attention_mask=data["attention_mask"].long(),
        position_ids=(data["attention_mask"].long().cumsum(1) - 1).clamp_min(0),
    ).last_hidden_state[:, -mask.shape[1] - 1 : -1]
    expected = q.head(hidden)[..., 0].detach()
    soft = beta * (values / beta).logsumexp(-1)
    torch.testing.assert_close(soft[mask], expected[mask], atol=1e-4, rtol=1e-4)
    assert same(
        weights(language_model_of(trainer.algorithm.networks.policy)), weights(trainer.collector.task.reference.model)
    )


@BOTH
def test_gradients_do_not_depend_on_micro_batches(settings, name):
    """One optimizer step is a mean over all its valid tokens, however ragged rows are split."""
    found = {}
    for tokens in (1000, 45):
        trainer = make(settings, name, minibatch_size=8, micro_batch_tokens=tokens, max_grad_norm=1e9)
        data = make_rollout(trainer).data
        perturb(trainer)
        trainer._backward(data)
        found[tokens] = gradients(trainer)
    scale = found[1000].abs().max()
    # float32 sums in another order: a few roundings of the largest entry
    torch.testing.assert_close(found[45] / scale, found[1000] / scale, atol=1e-5, rtol=0)


@BOTH
def test_padding_changes_no_loss_and_no_gradient(settings, name):
    """Ids, infinite and NaN rewards in padding change nothing, to the bit; columns of padding can be left out."""
    trainer = make(settings, name, micro_batch_tokens=1000)
    data = make_rollout(trainer).data
    perturb(trainer)
    short = data[data["mask"].sum(1) < data["mask"].shape[1]]
    (trimmed_batch,) = trainer.collector.micro_batches(short)
    assert trimmed_batch["input_ids"].shape[1] < short["input_ids"].shape[1]
    spoilt = {value: short.clone() for value in (1e9, math.inf, math.nan)}
    for value, batch in spoilt.items():
        for key in ("reward", "step_score", "reference_log_prob", "action_log_prob"):
            batch[key][~short["mask"]] = value
        batch["action"][~short["mask"]] = 5
        batch["input_ids"][~short["attention_mask"]] = 7
    results = []
    for batch in (short, trimmed_batch, *spoilt.values()):
        trainer.optimizer.zero_grad()
        terms = losses(trainer, batch)
        sum(terms.values()).backward()
        results.append([*terms.values(), gradients(trainer)])
    assert all(same(results[0], other) for other in results[2:])
    for plain, trimmed in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(plain, trimmed, atol=1e-4 * float(plain.detach().abs().max()), rtol=1e-4)


@BOTH
def test_resumed_equals_uninterrupted(settings, tmp_path, name):
    """A run stopped after two iterations and resumed equals one never stopped, to the bit, buffer and targets too."""
    changes = dict(iterations=4)  # 32 rows through a buffer of 20: it has wrapped around
    whole = make(settings, name, **changes)
    expected = [iteration.metrics["score"] for iteration in whole.iterate()]
    stopped = make(settings, name, **changes)
    iterations = stopped.iterate()
    scores = [next(iterations).metrics["score"] for _ in range(2)]
    save_checkpoint(tmp_path, stopped)
    resumed = make(settings, name, **changes)
    load_checkpoint(tmp_path, resumed)
    scores += [iteration.metrics["score"] for iteration in resumed.iterate()]
    assert scores == expected
    for first, second in zip(networks_of(whole), networks_of(resumed), strict=True):
        assert same(list(first.state_dict().values()), list(second.state_dict().values()))
    assert whole.replay.cursor == resumed.replay.cursor == 12
    for key, kept in whole.replay.storage.items():
        assert torch.equal(kept, resumed.replay.storage[key]), key


@BOTH
def test_updates_and_warm_up(settings, name):
    """No update before the warm-up, then so many a rollout; and an iteration without has no losses to report."""
    trainer = make(settings, name, dict(learning_starts=16, gradient_steps=5), iterations=3)
    steps, step = [], trainer.optimizer.step
    trainer.optimizer.step = lambda: (steps.append(trainer.iteration), step())
    metrics = [iteration.metrics for iteration in trainer.iterate()]
    assert steps == [1] * 5 + [2] * 5
    assert "q_loss" not in metrics[0] and all(math.isfinite(value) for one in metrics for value in one.values())
    assert metrics[1]["q_loss"] > 0
    assert all(int(target.steps) == 10 for target in trainer.algorithm.networks.targets.values())


@BOTH
def test_a_run_shorter_than_its_warm_up(settings, name):
    """What would end before the first update is refused in its first iteration; later ones may bring few rows."""
    trainer = make(settings, name, dict(learning_starts=16), iterations=1)
    with pytest.raises(
        ValueError,
        match=r"1 iterations of 8 rows, as in the first, end before learning_starts=16 rows are there; lower learn",
    ):
        next(trainer.iterate())
    assert len(list(make(settings, name, dict(learning_starts=16), iterations=2).iterate())) == 2
    trainer = make(settings, name, dict(learning_starts=20), iterations=2)
    trainer.iteration = 1
    assert "q_loss" not in next(trainer.iterate()).metrics


@BOTH
def test_it_learns_a_known_answer(folders, name):
    """The learner finds the rewarded letter among twelve: its share of the tokens goes from a twelfth to most."""
    settings = dict(
        reference=folders["gpt2"],
        reward=lambda prompts, responses: [response.count("e") / 3 for response in responses],
        action_mask=lambda prompt, response: range(ord("a") - 33, ord("m") - 33),
        prompts=["a", "bc"],
        kl_coef=0.05,
        max_prompt_tokens=2,
        max_new_tokens=3,
        stop_token_ids=[tiny.END],
        temperature=3.0,  # this model's own distribution is all but certain of other letters
        device="cpu",
    )
    sizes = dict(iterations=16, schedule="constant", rollout_size=64, minibatch_size=32, micro_batch_tokens=640)
    own = dict(learning_starts=64, gradient_steps=8, gamma=1.0, lmbda=0.95, buffer_size=512)
    trainer = make(settings, name, own, **sizes, learning_rate=5e-3, critic_learning_rate=5e-3)
    scores = [iteration.metrics["score"] for iteration in trainer.iterate()]
    assert scores[0] < 0.2  # of the policy before its first update
    assert sum(scores[-3:]) / 3 > 0.7


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (DQNConfig, dict(buffer_size=0), "buffer_size must be at least 1, got 0"),
        (
            SACConfig,
            dict(learning_starts=300, buffer_size=200),
            "learning_starts must be at most buffer_size.*learning_starts=300 and buffer_size=200",
        ),
        (DQNConfig, dict(tau=0.0), "tau must be above 0"),
        (SACConfig, dict(gamma=1.5), r"gamma must lie in \[0, 1\], got 1.5"),
        (DQNConfig, dict(alpha=-1.0), "alpha must be 0 or more, got -1"),
        (SACConfig, dict(alpha=0.0), "alpha must be above 0, got 0.0; leave it out"),
        (DQNConfig, dict(loss_function="l3"), "loss_function must be one of l2, smooth_l1, got 'l3'"),
        (DQNConfig, dict(epsilon_end=2.0), r"epsilon_end must lie in \[0, 1\], got 2"),
    ],
)
def test_bad_settings(kind, changes, says):
    """Bad settings are refused before any work, with the value and the remedy."""
    with pytest.raises(ValueError, match=says):
        kind(**changes)


@pytest.mark.parametrize("learner", [lambda given: DQN(DQNConfig(), given), lambda given: SAC(SACConfig(), given)])
def test_continuous_actions_are_refused(learner):
    """What has no list of actions cannot have a value for each."""
    with pytest.raises(ValueError, match=r"actions are continuous.*choose an algorithm with a Gaussian policy"):
        learner(VectorNetworks(discrete=False))


@BOTH
def test_text_needs_an_alpha(settings, name):
    """Without a penalty there is no β to take as α, and on text none is learned; a setting is enough."""
    settings = {**settings, "kl_coef": 0.0}
    with pytest.raises(ValueError, match=r"alpha above 0, got 0.*kl-coef 0\.1 or so.*or --alpha"):
        make(settings, name)
    assert make(settings, name, dict(alpha=0.2)).algorithm.alpha == 0.2


def test_epsilon_falls_with_the_updates():
    """At α = 0 the share of random actions goes down a line, and stays at its end."""
    learner = DQN(DQNConfig(epsilon_start=0.9, epsilon_end=0.1, epsilon_updates=4), VectorNetworks())
    found = [float(learner.networks.policy.epsilon)]
    for _ in range(5):
        learner.after_step({})
        found.append(float(learner.networks.policy.epsilon))
    assert found == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1, 0.1])
