"""Models whose numbers overflow: named at their source, before anything moves."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.support import tiny
from textenv import LanguageModel, TextGenConfig, build_task, shared
from textenv.dynamics import TextDynamics
from textenv.generation import Generation, generate, response_kl, response_log_probs, score_responses
from textenv.models.sampling import Sampling

BAD = tiny.tokenizer().encode("b")[0]  # after this token the model overflows
GOOD = 99


def overflowing(model):
    """A float16 model that overflows from the token BAD on: 1e5 is infinite in float16."""
    model = copy.deepcopy(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # the output stays as it is
    with torch.no_grad():
        model.transformer.wte.weight[BAD] = 1e5
    return model.to(torch.float16)


@pytest.fixture
def task(folders, models_kept):
    """A task whose reference overflows in float16."""
    reference = models_kept.reference
    model = LanguageModel(overflowing(reference.model), reference.tokenizer, reference.stop_token_ids)
    return build_task(
        TextGenConfig(
            reference=shared(model),
            reward=lambda prompts, responses: [0.0] * len(prompts),
            prompts=["a", "ca"],
            kl_coef=0.1,
            max_prompt_tokens=4,
            max_new_tokens=4,
            device="cpu",
        )
    )


def test_the_environment_names_it_and_stays(task):
    """The step is refused with row, token and remedy; nothing has moved, and the error is the same again."""
    dynamics = TextDynamics(task, rows=2)
    dynamics.reset([0, 1], [0, 1])
    assert dynamics.step(torch.tensor([GOOD, BAD])).reward.isfinite().all()
    before = dynamics.state
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"reference's log-probability is nan at row 1, token 1 \(id 99\).*float16"
        ):
            dynamics.step(torch.tensor([GOOD, GOOD]))
        assert dynamics.state is before and dynamics.running.all()
    transition = dynamics.step(torch.tensor([GOOD, GOOD]), torch.tensor([True, False]))  # the other row goes on
    assert transition.reward.isfinite().all()


def test_scores_and_log_probs_name_it(task, models_kept):
    """Scoring, log-probabilities and the exact KL name the row and the token, across passes."""
    dynamics = TextDynamics(task, rows=3)
    dynamics.reference = None  # writes without asking the reference
    state = dynamics.reset([0, 1, 2], [0, 1, 0])
    for tokens in ([GOOD, GOOD, GOOD], [GOOD, GOOD, BAD], [GOOD] * 3, [GOOD] * 3):
        state = state.append(torch.tensor(tokens), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"the reference's log-probability is nan at row 2, token \d of"):
        score_responses(task, state, ["a", "ca", "a"], tokens_per_pass=12)
    with pytest.raises(ValueError, match=r"the model's log-probability is nan at row 2, token \d of"):
        response_log_probs(task.reference.model, state, 0.7, tokens_per_pass=1)
    generation = Generation(state, torch.zeros(3, 4), None)
    with pytest.raises(ValueError, match=r"exact KL of the policy to the reference is nan at row 2, token \d of"):
        response_kl(models_kept.reference.model, task.reference.model, generation, 0.7, tokens_per_pass=1)


def test_the_sampler_names_it(task):
    """A policy that overflows is named with row and token, not by an error of torch's sampling."""
    prompts = task.read_prompts(["a", "b"])
    with pytest.raises(ValueError, match=r"largest of the policy's logits is nan at row 1, token 0: .*float16"):
        generate(task, task.reference.model, prompts, Sampling(), torch.Generator().manual_seed(0))


def test_a_mask_policy_names_it(task):
    """A mask of the likeliest tokens of a model that overflows is refused: it would have allowed stop tokens alone."""
    prompts = task.read_prompts(["a", "b"])
    masked = build_task(replace(task.config, action_mask="top_k:3"))
    with pytest.raises(ValueError, match=r"largest logit of action mask 'top_k:3' is nan at row 1"):
        TextDynamics(masked, rows=2).begin([0, 1], prompts, [-1, -1])


def test_no_allowed_token_has_a_probability(models_kept, monkeypatch):
    """Where a mask allows only tokens of logit −∞, generation names row and token; none of them is written."""
    reference = models_kept.reference
    task = build_task(
        TextGenConfig(
            reference=shared(reference),
            reward=lambda prompts, responses: [0.0] * len(prompts),
            prompts=["a", "ca"],
            action_mask=lambda prompt, response: [5] if response else [5, 6],
            max_prompt_tokens=4,
            max_new_tokens=4,
            device="cpu",
        )
    )
    model = copy.deepcopy(reference.model)

    def forbid(head, inputs, output):
        output = output.clone()
        output[..., 5] = -torch.inf
        return output

    model.lm_head.register_forward_hook(forbid)
    with pytest.raises(ValueError, match="largest of the policy's logits is -inf at row 0, token 1"):
        generate(task, model, task.prompts, Sampling(), torch.Generator().manual_seed(0))
