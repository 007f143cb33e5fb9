"""Ensembles of reward models: one score from several, the same in every face, and their disagreement beside it."""

import json
import math

import gymnasium as gym
import pytest
import torch

from tests.support import tiny
from tests.support.faces import STOPS
from textenv import TextGenConfig, build_task, shared
from textenv.conformance import check_faces
from textenv.generation import score_responses
from textenv.rewards.build import member_folders
from textenv.rewards.reward_model import (
    RewardEnsemble,
    RewardModel,
    combined,
    has_heads,
    last_token_scores,
    member_name,
    reward_models,
)
from textenv.state import start
from textenv.torchrl_env import TextGenTorchEnv


@pytest.fixture
def kind():
    """One architecture is enough here."""
    return "gpt2"


def with_heads(count: int = 3, seed: int = 1):
    """A classifier whose labels are the members of an ensemble."""
    model = tiny.reward_model("gpt2", seed, labels=count)
    model.config.id2label = {index: member_name(index) for index in range(count)}
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    model.config.problem_type = "regression"
    return model


@pytest.fixture(scope="module")
def ensembles(tmp_path_factory):
    """Folders of an ensemble of three models, and of one of three heads."""
    root = tmp_path_factory.mktemp("ensembles")
    for index in range(3):
        tiny.save(tiny.reward_model("gpt2", seed=index + 1), root / "models" / member_name(index))
    tiny.save(with_heads(), root / "heads")
    return {"models": str(root / "models"), "heads": str(root / "heads")}


def finished(task):
    """Responses that end at the stop token or the budget, the texts of their prompts, and their ids without padding."""
    prompts, budget = task.prompts, task.config.max_new_tokens
    state = start(prompts.input_ids, prompts.attention_mask, budget, task.pad_token_id)
    generator, running = torch.Generator().manual_seed(0), torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(budget):
        tokens = torch.randint(tiny.VOCABULARY, (len(prompts),), generator=generator)
        state = state.append(tokens, running)
        running = running & ~torch.isin(tokens, torch.tensor(STOPS))
    return state, prompts.texts, [ids[mask] for ids, mask in zip(state.input_ids, state.attention_mask, strict=True)]


def member_scores(task, ids):
    """The score of each member for each text, by plain loops over texts and models: [B][K]."""
    models, rows = [reward.model for reward in reward_models(task.reward)], []
    for text in ids:
        outputs = [last_token_scores(model, text[None], torch.ones(1, len(text)))[0].tolist() for model in models]
        rows.append([score for scores in outputs for score in scores])
    return rows


def by_hand(row, combine):
    """One score from those of the members, and their std."""
    mean = sum(row) / len(row)
    std = math.sqrt(sum((score - mean) ** 2 for score in row) / len(row))
    return {"mean": mean, "min": min(row), 1.5: mean - 1.5 * std}[combine], std


def test_combined_by_hand():
    """Mean, least, and mean − κ · std of members 1, 2, 6: std is √(14/3), and κ = 0 is the mean."""
    members = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    std = math.sqrt(14 / 3)
    for combine, wanted in [("mean", 3.0), ("min", 1.0), (0, 3.0), (0.0, 3.0), (2, 3 - 2 * std), (0.5, 3 - 0.5 * std)]:
        assert combined(members, combine).tolist() == pytest.approx([wanted, 4.0])


@pytest.mark.parametrize("form", ["models", "heads"])
@pytest.mark.parametrize("combine", ["mean", "min", 1.5])
def test_scores_equal_plain_loops(settings, ensembles, form, combine):
    """Scores and disagreement of ragged responses are those of a loop over members and texts."""
    given = {**settings, "reward": ensembles[form], "reward_ensemble": combine, "stop_token_ids": STOPS}
    task = build_task(TextGenConfig(**given))
    state, texts, ids = finished(task)
    assert len({len(text) for text in ids}) > 2
    scored = score_responses(task, state, texts)
    wanted = [by_hand(row, combine) for row in member_scores(task, ids)]
    assert scored.score.tolist() == pytest.approx([score for score, _ in wanted], abs=1e-4)  # float32
    assert scored.score_parts["disagreement"].tolist() == pytest.approx([std for _, std in wanted], abs=1e-4)
    assert min(std for _, std in wanted) > 1e-2
    assert set(scored.score_parts) == {ensembles[form], "disagreement"} == set(task.score_part_names)


@pytest.mark.parametrize("form", ["models", "heads"])
def test_faces_equal_the_fast_path(settings, ensembles, form):
    """Stepping pays what the fast path pays, in all faces, and shows the disagreement."""
    given = {**settings, "reward": ensembles[form], "reward_ensemble": 1.0, "stop_token_ids": STOPS}
    task = build_task(TextGenConfig(**given))
    check_faces(task, rows=3, torchrl_env=TextGenTorchEnv(task, 3))


def test_the_setting_survives_json(settings, ensembles):
    """An environment made from its spec's JSON pays the same, and its last step's info holds the disagreement."""
    given = {**settings, "reward": ensembles["models"], "reward_ensemble": 2, "max_new_tokens": 3}
    env = gym.make("TextGen-v0", **given)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    infos = []
    for each in (env, again):
        each.reset(seed=0)
        for token in (65, 66, 67):
            *_, info = each.step(token)
        infos.append(info)
    assert infos[0] == infos[1]
    parts = infos[0]["score_parts"]
    assert infos[0]["score"] == parts[ensembles["models"]] and parts["disagreement"] > 0
    assert env.unwrapped.task.reward.combine == json.loads(env.spec.to_json())["kwargs"]["reward_ensemble"] == 2.0


def test_one_head_by_its_label(settings, ensembles):
    """`reward_label` takes one head alone, as it is; the ensemble's setting is then refused."""
    given = {**settings, "reward": ensembles["heads"], "stop_token_ids": STOPS}
    task = build_task(TextGenConfig(**given, reward_label="member-1"))
    state, texts, ids = finished(task)
    model = task.reward.model
    wanted = [last_token_scores(model, text[None], torch.ones(1, len(text)))[0, 1].item() for text in ids]
    assert score_responses(task, state, texts).score.tolist() == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(ValueError, match=r"reward_ensemble='min' would do nothing.*not an ensemble"):
        build_task(TextGenConfig(**given, reward_label="member-1", reward_ensemble="min"))


def test_live_ensembles(settings):
    """A live ensemble and a live model with heads are read as they are; each model is checked."""
    models = [RewardModel(tiny.reward_model("gpt2", seed), name=f"m{seed}") for seed in (1, 2)]
    task = build_task(TextGenConfig(**{**settings, "reward": shared(RewardEnsemble(models, combine="min"))}))
    assert [reward.name for reward in reward_models(task.reward)] == ["m1", "m2"]
    heads = build_task(TextGenConfig(**{**settings, "reward": shared(with_heads())}))
    assert isinstance(heads.reward, RewardEnsemble) and heads.reward.combine == "mean"
    live = {**settings, "reward": shared(RewardEnsemble(models))}
    with pytest.raises(ValueError, match=r"reward_ensemble='min' would do nothing.*RewardEnsemble\(models, combine"):
        build_task(TextGenConfig(**live, reward_ensemble="min"))
    models[1].model.train()
    with pytest.raises(ValueError, match="in train mode"):
        build_task(TextGenConfig(**live))


def test_in_a_sum(settings, ensembles):
    """An ensemble in a weighted sum shows its own score and disagreement before the weight; two are refused."""
    given = {**settings, "stop_token_ids": STOPS}
    alone = build_task(TextGenConfig(**{**given, "reward": ensembles["models"]}))
    both = {ensembles["models"]: 2.0, "textenv.rewards.library:length": 0.5}
    task = build_task(TextGenConfig(**{**given, "reward": both}))
    state, texts, _ = finished(task)
    parts, wanted = score_responses(task, state, texts).score_parts, score_responses(alone, state, texts).score_parts
    for name in (ensembles["models"], "disagreement"):
        torch.testing.assert_close(parts[name], wanted[name])
    with pytest.raises(ValueError, match="a sum takes one ensemble"):
        build_task(TextGenConfig(**{**given, "reward": dict.fromkeys(ensembles.values(), 1.0)}))


@pytest.mark.parametrize("wrong", ["max", -1.0, "1.0", True, float("nan"), None, [1]])
def test_wrong_settings(settings, wrong):
    """Anything but mean, min and a κ of 0 or more is refused, by the setting and by the class."""
    with pytest.raises(ValueError, match="reward_ensemble must be"):
        TextGenConfig(**settings, reward_ensemble=wrong)
    with pytest.raises(ValueError, match="combine must be"):
        RewardEnsemble([RewardModel(tiny.reward_model())] * 2, combine=wrong)


def test_wrong_ensembles(settings, ensembles, tmp_path):
    """Too few members, gaps in their numbers, members that are ensembles, and a clash of names are refused."""
    one = RewardModel(tiny.reward_model())
    with pytest.raises(ValueError, match="two members or more, got 1"):
        RewardEnsemble([one])
    with pytest.raises(ValueError, match="named 'disagreement'"):
        RewardEnsemble([one, one], name="disagreement")
    for name in ("member-0", "member-2", "member-02", "member-x"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"holds the members \[0, 2\] of an ensemble.*without gaps"):
        build_task(TextGenConfig(**{**settings, "reward": str(tmp_path)}))
    assert member_folders(ensembles["models"]) == [f"{ensembles['models']}/member-{index}" for index in range(3)]
    assert member_folders(str(tmp_path / "none")) == []
    nested = tmp_path / "nested"
    for index in range(2):
        tiny.save(with_heads(), nested / member_name(index))
    with pytest.raises(ValueError, match=r"its member '.*member-0' has heads"):
        build_task(TextGenConfig(**{**settings, "reward": str(nested)}))


def test_heads_are_known_by_their_labels():
    """A classifier of several classes is no ensemble, and neither is a model with one head."""
    assert has_heads(with_heads(2)) and not has_heads(tiny.reward_model(labels=3)) and not has_heads(with_heads(1))
