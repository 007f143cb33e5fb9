"""The training loop: optimizer steps, learning, exact resuming, and refused configurations."""

from __future__ import annotations

import math

import pytest
import torch

from agents.checkpoint import FILE, load_checkpoint, save_checkpoint
from agents.config import TrainConfig
from agents.run_folder import check_same, create, save_config
from agents.text.config import TextConfig
from agents.text.evaluation import rate, split_prompts
from agents.text.experiment import check_minibatch, make_task
from tests.support.learning import make_rollout, make_trainer, same, weights
from textenv import TextGenConfig, build_task


@pytest.mark.parametrize(("minibatch", "tokens"), [(8, 1000), (4, 1000), (4, 60), (2, 1)])
def test_optimizer_steps(settings, minibatch, tokens):
    """An iteration takes epochs × minibatches optimizer steps, whatever the micro-batch size."""
    trainer = make_trainer(
        settings, algorithm=dict(epochs=3), iterations=1, minibatch_size=minibatch, micro_batch_tokens=tokens
    )
    steps = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (steps.append(1), step())
    list(trainer.iterate())
    assert len(steps) == 3 * (8 // minibatch)


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ({}, {}),
        ({}, dict(kl_controller="adaptive", kl_target=0.5, kl_horizon=20)),
        ({"prompt_sampling": "prioritized", "group_size": 2}, {}),
    ],
    ids=["fixed", "adaptive", "curriculum"],
)
def test_resumed_equals_uninterrupted(settings, tmp_path, task, changes):
    """A run stopped after one iteration and resumed has the same weights and β as an uninterrupted one, to the bit."""
    settings = {**settings, **task}
    whole = make_trainer(settings, **changes)
    expected = [iteration.metrics["score"] for iteration in whole.iterate()]
    stopped = make_trainer(settings, **changes)
    first = next(stopped.iterate())
    save_checkpoint(tmp_path, stopped)
    resumed = make_trainer(settings, **changes)
    load_checkpoint(tmp_path, resumed)
    scores = [first.metrics["score"]] + [iteration.metrics["score"] for iteration in resumed.iterate()]
    assert scores == expected
    assert whole.collector.controller.coef == resumed.collector.controller.coef
    assert (whole.collector.controller.coef == settings["kl_coef"]) == (not changes)
    assert same(weights(whole.algorithm.networks.actor), weights(resumed.algorithm.networks.actor))
    assert same(weights(whole.algorithm.networks.critic), weights(resumed.algorithm.networks.critic))


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_order_of_prompts(settings):
    """Prompts come in shuffled rounds unless the task names another order; a group's rows are adjacent."""
    first = next(make_trainer(settings).iterate()).rollout.prompts
    assert sorted(first) == sorted(settings["prompts"] * 2) and sorted(first[:4]) == sorted(first[4:])
    rows = [{"prompt": text, "weight": float(len(text) > 7)} for text in settings["prompts"]]  # the last two
    weighted = {**settings, "prompts": rows, "prompt_sampling": "weighted", "group_size": 4}
    iterations = make_trainer(weighted).iterate()
    drawn = [next(iterations).rollout.prompts for _ in range(3)]
    assert {text for rollout in drawn for text in rollout} == {"two words more", "it is late"}
    assert all(rollout[start] == text for rollout in drawn for start in (0, 4) for text in rollout[start : start + 4])
    with pytest.raises(
        ValueError, match=r"whole groups; got rollout_size=8 and group_size=3. Make rollout_size a multiple"
    ):
        make_trainer({**settings, "group_size": 3})


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize("normalization", ["none", "running"])
def test_the_curriculum_receives_scores(settings, normalization):
    """The prompt sampler receives the mean raw score of each prompt in the rollout."""
    changes = dict(prompt_sampling="prioritized", group_size=2, score_normalization=normalization)
    trainer = make_trainer(settings | changes)
    rollout = next(trainer.iterate()).rollout
    means: dict[str, list[float]] = {}
    scores = rollout.data["score"] if normalization == "none" else rollout.scored.score_parts["raw"]
    for text, score in zip(rollout.prompts, scores.tolist(), strict=True):
        means.setdefault(text, []).append(score)
    state = trainer.state_dict()["collector"]["sampler"]["sampler"]
    for text, returns in zip(trainer.collector.prompts.texts, state["returns"], strict=True):
        assert returns == ([pytest.approx(sum(means[text]) / len(means[text]))] if text in means else [])
    assert state["episodes"] == 8


def test_same_seed_same_run_other_seed_another(settings):
    """A run depends on its seed and not on global randomness."""
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(runs))  # global randomness must not matter
        trainer = make_trainer(settings, seed=seed, iterations=1)
        list(trainer.iterate())
        runs.append(weights(trainer.algorithm.networks.policy.model))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_ppo_learns_a_known_answer(folders):
    """The share of responses with the rewarded letter rises from below 0.2 to above 0.6."""
    settings = dict(
        reference=folders["gpt2"],
        reward=lambda prompts, responses: [float("e" in response) for response in responses],
        prompts=["a", "bc"],
        kl_coef=0.01,
        max_prompt_tokens=2,
        max_new_tokens=4,
        stop_token_ids=[256],
        temperature=1.0,
        device="cpu",
    )
    trainer = make_trainer(
        settings, iterations=25, rollout_size=64, minibatch_size=32, micro_batch_tokens=640, learning_rate=3e-3
    )
    scores = [iteration.metrics["score"] for iteration in trainer.iterate()]
    assert sum(scores[:2]) / 2 < 0.2
    assert sum(scores[-3:]) / 3 > 0.6


def test_metrics_are_finite_and_mean_what_they_say(settings):
    """Metrics are finite; KL starts at 0; lengths are within the budget; entropy is not negative."""
    metrics = next(make_trainer(settings).iterate()).metrics
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
    assert abs(metrics["kl_per_response"]) < 1e-4
    assert 1 <= metrics["length"] <= settings["max_new_tokens"]
    assert metrics["entropy"] >= 0
    assert 0 <= metrics["clip_fraction"] <= 1


def test_gradients_are_clipped(settings):
    """No optimizer step sees a gradient norm above max_grad_norm."""
    trainer = make_trainer(settings, iterations=1, max_grad_norm=1e-3)
    norms = []
    step = trainer.optimizer.step

    def watch():
        for network in (trainer.algorithm.networks.actor, trainer.algorithm.networks.critic):
            norms.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm())
        step()

    trainer.optimizer.step = watch
    list(trainer.iterate())
    assert norms and max(norms) <= 1e-3 * (1 + 1e-4)


@pytest.mark.parametrize("rates", [(1e-3, 3e-3), (2e-3, 2e-3)], ids=["two rates", "one rate"])
def test_every_network_has_its_learning_rate(settings, rates):
    """Adam's first step changes weights by at most the learning rate, and by all of it where the gradient is clear.

    The second of two iterations uses half the rate: the schedule is linear.
    """
    sizes = dict(iterations=2, rollout_size=8, minibatch_size=8, learning_rate=rates[0], critic_learning_rate=rates[1])
    trainer = make_trainer(settings, algorithm=dict(epochs=1), **sizes)
    networks = (trainer.algorithm.networks.actor, trainer.algorithm.networks.critic)
    before = [weights(network) for network in networks]
    used, step = [], trainer.optimizer.step
    trainer.optimizer.step = lambda: (used.append({group["lr"] for group in trainer.optimizer.param_groups}), step())
    passes = trainer.iterate()
    next(passes)
    for network, old, moves in zip(networks, before, rates, strict=True):
        moved = max(float((new - before).abs().max()) for new, before in zip(weights(network), old, strict=True))
        assert moved == pytest.approx(moves, rel=0.02)
    next(passes)
    assert used == [set(rates), {rate / 2 for rate in rates}]


def test_held_out_prompts_are_held_out(settings):
    """No prompt is used for both training and evaluation, and the split is reproducible."""
    many = [f"number {index}" for index in range(50)]
    task = build_task(TextGenConfig(**(settings | dict(prompts=many))))
    kept, held_out = split_prompts(task, TextConfig(evaluation_prompts=8))
    assert len(held_out) == 8 and len(kept) == 42
    assert not set(kept.texts) & set(held_out.texts)
    again = split_prompts(task, TextConfig(evaluation_prompts=8))
    assert again[1].texts == held_out.texts


def test_repeated_prompts_are_not_on_both_sides(settings):
    """A text that occurs several times is used for training or for evaluation, never both."""
    task = build_task(TextGenConfig(**(settings | dict(prompts=["a", "b", "c", "d", "e", "f"] * 5))))
    kept, held_out = split_prompts(task, TextConfig())
    assert len(held_out) == 1 and len(kept) == 25
    assert not set(kept.texts) & set(held_out.texts)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "advantage",
            math.nan,
            "policy_loss is nan; actor_grad_norm is nan; the first .* of the actor is that of model",
        ),
        (
            "value_target",
            math.inf,
            "value_loss is inf; critic_grad_norm is (inf|nan); the first .* of the critic is that",
        ),
        ("advantage", 1e38, "iteration 1 is not finite: actor_grad_norm is (inf|nan)"),  # every loss is finite
    ],
)
def test_an_update_that_is_not_finite_changes_nothing(settings, key, value, message):
    """No weight moves, no gradient is left or clipped, the error names what was not finite, and the run can go on."""
    trainer = make_trainer(settings, iterations=2)
    rows = trainer.collector.training_rows(make_rollout(trainer).data)
    spoilt = rows.clone()
    spoilt[key][spoilt["mask"]] = value
    networks = trainer.algorithm.networks.trained.values()
    before = [weights(network) for network in networks]
    with pytest.raises(ValueError, match=message):
        trainer._learn(trainer._shuffled(spoilt))
    assert all(same(weights(network), old) for network, old in zip(networks, before, strict=True))
    assert all(parameter.grad is None for network in networks for parameter in network.parameters())
    metrics = trainer._learn(trainer._shuffled(rows))
    untouched = make_trainer(settings, iterations=2)
    untouched.generator.set_state(trainer_generator_after_one_order(untouched))
    assert metrics == untouched._learn(untouched._shuffled(rows))
    assert same(weights(trainer.algorithm.networks.actor), weights(untouched.algorithm.networks.actor))


def trainer_generator_after_one_order(trainer):
    """The generator's state after the order of one pass has been drawn."""
    generator = trainer.generator.clone_state()
    torch.randperm(8, generator=generator)
    return generator.get_state()


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_an_error_in_a_micro_batch_leaves_no_gradient(settings):
    """Whatever interrupts a minibatch between its micro-batches, the next minibatch starts from no gradient."""
    trainer = make_trainer(settings, minibatch_size=8)
    rows = trainer.collector.training_rows(make_rollout(trainer).data)
    parts = trainer.collector.micro_batches

    def interrupted(minibatch):
        yield next(parts(minibatch))
        raise KeyboardInterrupt

    trainer.collector.micro_batches = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer._learn(trainer._shuffled(rows))
    assert all(parameter.grad is None for parameter in trainer.algorithm.networks.actor.parameters())


def test_another_configuration_is_not_resumed(settings, tmp_path):
    """Resuming under another configuration is refused, and the differences are named."""
    trainer = make_trainer(settings)
    create(tmp_path / "run")
    save_config(tmp_path / "run", trainer.config, trainer.collector.config, trainer.algorithm.config, {})
    check_same(tmp_path / "run", trainer.config, trainer.collector.config, trainer.algorithm.config)
    other = make_trainer(settings, learning_rate=5e-4, algorithm=dict(clip=0.3))
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001 and is now 0\.0005.*clip was 0\.2"):
        check_same(tmp_path / "run", other.config, other.collector.config, other.algorithm.config)


def test_a_run_without_checkpoint_is_not_resumed(settings, tmp_path):
    """Resuming a run without a checkpoint is refused."""
    with pytest.raises(ValueError, match="no checkpoint"):
        load_checkpoint(tmp_path, make_trainer(settings))


def test_a_checkpoint_that_does_not_fit(settings, tmp_path):
    """A truncated configuration, one with other fields, and an incomplete checkpoint are refused with a remedy."""
    trainer = make_trainer(settings)
    config = trainer.config, trainer.collector.config, trainer.algorithm.config
    create(tmp_path / "run")
    save_config(tmp_path / "run", *config, {})
    save_checkpoint(tmp_path / "run", trainer)
    written = (tmp_path / "run/config.json").read_text()
    for broken in (written[:40], written.replace('"clip"', '"clipping"'), "{}"):
        (tmp_path / "run/config.json").write_text(broken)
        with pytest.raises(ValueError, match=r"not a configuration that this version can read.*start a new run"):
            check_same(tmp_path / "run", *config)
    written = (tmp_path / "run" / FILE).read_bytes()
    for broken in (b"", written[:1000], written[:-1000]):
        (tmp_path / "run" / FILE).write_bytes(broken)
        with pytest.raises(ValueError, match=r"does not fit this trainer.*start a new run"):
            load_checkpoint(tmp_path / "run", trainer)


def test_environment_arguments_are_compared_by_value(settings, tmp_path):
    """Repeated or reordered environment arguments are the same configuration; a missing one is another."""
    trainer = make_trainer(settings)
    parts = trainer.collector.config, trainer.algorithm.config
    original = TrainConfig(env_arg=("kl_coef=0.1", "device=cpu"))
    create(tmp_path / "run")
    save_config(tmp_path / "run", original, *parts, {})
    check_same(tmp_path / "run", TrainConfig(env_arg=("device=cpu", "kl_coef=0.10", "device=cpu")), *parts)
    with pytest.raises(ValueError, match="env_arg was"):
        check_same(tmp_path / "run", TrainConfig(env_arg=("device=cpu",)), *parts)


@pytest.mark.parametrize("scores", [[1.0], [1.0, float("nan")]], ids=["too few", "nan"])
def test_gold_scores_are_checked(scores):
    """A gold function must return a finite number for every response."""
    with pytest.raises(ValueError, match="gold must return a finite number for each of 2 responses"):
        rate(lambda prompts, responses: scores, ["a", "b"], ["c", "d"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seed=-1), "seed must be 0 or more"),
        (dict(resume=True), "resume needs the folder of the run.*--run"),
        (dict(iterations=0), "iterations must be at least 1"),
        (dict(learning_rate=0.0), "learning_rate must be above 0"),
        (dict(env_arg=("kl_coef",)), "NAME=VALUE"),
        (dict(env_arg=("=3",)), "NAME=VALUE"),
    ],
)
def test_bad_settings(changes, message):
    """Bad settings are refused with the value or the remedy."""
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("max_episode_steps=3", "max_episode_steps .* cuts an episode before it is scored.*use max_new_tokens"),
        ("kl_coeff=1", "cannot make 'TextGen-v0': TextGen-v0 has no argument 'kl_coeff'; did you mean 'kl_coef'"),
        ("prompt_sampling=best", r"prompt_sampling must be None or one of \['uniform', 'shuffle'"),
    ],
)
def test_environments_that_cannot_be_learned_on(argument, message):
    """Environment arguments that the learners cannot use are refused."""
    with pytest.raises(ValueError, match=message):
        make_task(TrainConfig(env_arg=("kl_coef=0", "device=cpu", argument)))


def test_environment_arguments():
    """--env-arg accepts JSON values and plain strings."""
    config = TrainConfig(env_arg=("kl_coef=0.05", 'prompts=["a", "b"]', "reward=module:function", "x=true"))
    assert config.env_arguments() == {
        "kl_coef": 0.05,
        "prompts": ["a", "b"],
        "reward": "module:function",
        "x": True,
    }


def test_minibatches_divide_rollouts():
    """A minibatch size that does not divide the rollout is refused: the last step would average fewer responses."""
    with pytest.raises(
        ValueError, match=r"minibatch_size must divide rollout_size.*rollout_size=8 and minibatch_size=3"
    ):
        check_minibatch(TrainConfig(minibatch_size=3), TextConfig(rollout_size=8))
