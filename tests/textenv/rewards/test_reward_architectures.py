"""Classifiers of many architectures as reward models: each score is that of a bare forward of the one text."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

from agents.text.networks import make_critic
from tests.support import families, tiny
from textenv import LanguageModel, TextGenConfig, build_task, shared
from textenv.generation import generate, score_responses
from textenv.models.sampling import Sampling
from textenv.rewards.reward_model import RewardModel, log_odds, reads_every_position

ENCODERS = ["albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "roberta"]
DECODERS = [
    "bloom",
    "falcon",
    "gemma2",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "llama",
    "mistral",
    "mpt",
    "opt",
    "phi3",
    "qwen2",
]


def classifier(name, labels=1, **changes):
    """A tiny random classifier with weights large enough that padding shows."""
    sizes = families.sizes(name) | dict(is_decoder=name not in ENCODERS, num_labels=labels) | changes
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIG_MAPPING[name](**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


def task_with(reward):
    """A task whose responses are ragged, scored by this reward model with the policy's own tokens."""
    lm = LanguageModel(tiny.language_model("gpt2"), tiny.tokenizer(), tuple(range(60)))
    settings = dict(reference=shared(lm), reward=shared(reward), prompts=tiny.PROMPTS, device="cpu", kl_coef=0.1)
    return build_task(TextGenConfig(**settings, max_prompt_tokens=16, max_new_tokens=12))


@pytest.mark.parametrize("name", ENCODERS + DECODERS)
@torch.no_grad()
def test_scores_of_a_batch_are_those_of_each_text(name):
    """Encoders get texts that start in column 0, as in their training; decoders are read at the last token."""
    model = classifier(name)
    task = task_with(RewardModel(model))
    assert reads_every_position(model) == (name in DECODERS)
    prompts = task.prompts.select([0, 1, 2, 3] * 2)
    state = generate(task, task.reference.model, prompts, Sampling(), torch.Generator().manual_seed(0)).state
    scored = score_responses(task, state, prompts.texts, tokens_per_pass=40)
    rows = [ids[mask][None] for ids, mask in zip(state.input_ids, state.attention_mask, strict=True)]
    alone = torch.stack([model(input_ids=row).logits[0, 0] for row in rows])
    assert alone.std() > 1e-3  # the texts differ in score
    torch.testing.assert_close(scored.score, alone, rtol=1e-4, atol=1e-5)


def test_a_critic_takes_the_width_that_comes_out():
    """OPT-350m's last hidden states are narrower than its layers: the critic's head fits them, and gives the score."""
    model = classifier("opt", word_embed_proj_dim=16)
    task = task_with(RewardModel(model))
    critic = make_critic(task)
    assert critic.head.in_features == 16
    ids = task.prompts.input_ids[:1, -1:]
    hidden = critic.backbone(input_ids=ids).last_hidden_state
    torch.testing.assert_close(critic.head(hidden)[0, 0, 0], model(input_ids=ids).logits[0, 0])
    narrow = LanguageModel(families.build("opt", word_embed_proj_dim=16), tiny.tokenizer(), (1,))
    settings = dict(reference=shared(narrow), reward=shared(RewardModel(model)), prompts=tiny.PROMPTS, device="cpu")
    assert make_critic(build_task(TextGenConfig(**settings)), "reference").head.in_features == 16


def test_a_batch_that_changes_its_scores_is_refused():
    """A classifier that mixes the texts of a batch, or reads the filling, is refused when the environment is made."""
    with pytest.raises(ValueError, match=r"XLNetForSequenceClassification \(xlnet\): its scores of a text depend"):
        task_with(RewardModel(classifier("xlnet", is_decoder=False)))
    model = classifier("bert")
    model.bert.encoder.register_forward_hook(
        lambda module, arguments, output: type(output)(last_hidden_state=output.last_hidden_state.roll(1, 0))
    )
    with pytest.raises(ValueError, match=r"'reward_model'.*BertForSequenceClassification.*depend on the other texts"):
        task_with(RewardModel(model))


@pytest.mark.parametrize(
    "problem_type", [None, "single_label_classification", "multi_label_classification", "regression"]
)
def test_the_problem_type_says_how_a_label_is_read(problem_type):
    """Log-odds under a softmax, under the label's own sigmoid, or the output of a regression; the critic's head agrees."""
    outputs = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.float64)
    if problem_type == "multi_label_classification":
        p = outputs[:, 1].sigmoid()
        expected = (p / (1 - p)).log()
    elif problem_type == "regression":
        expected = outputs[:, 1]
    else:
        p = outputs.softmax(1)[:, 1]
        expected = (p / (1 - p)).log()
    torch.testing.assert_close(log_odds(outputs, 1, problem_type), expected)
    model = classifier("gpt2", labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    model.config.problem_type = problem_type
    task = task_with(RewardModel(model, label="good"))
    critic, ids = make_critic(task), torch.tensor([[65, 66, 67]])
    value = critic.head(critic.backbone(input_ids=ids).last_hidden_state[0, -1])[0]
    torch.testing.assert_close(value, log_odds(model(input_ids=ids).logits, 1, problem_type)[0])
