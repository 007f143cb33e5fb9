"""A live model as the reference, and one opened from a folder."""

import copy

import gymnasium as gym
import pytest
import torch

import textenv
from tests.support import tiny

REST = dict(reward="tests.textenv.models.test_shared:length", prompts=["a"], max_prompt_tokens=8, max_new_tokens=4)


def length(prompts, responses):
    """A reward."""
    return [float(len(response)) for response in responses]


def test_a_model_and_its_tokenizer():
    """`shared(model, tokenizer)` is the model itself, with the stop tokens that its configurations name."""
    model = tiny.language_model()
    env = gym.make("TextGen-v0", reference=textenv.shared(model, tiny.tokenizer()), **REST)
    reference = env.unwrapped.task.load_reference()
    assert reference.model is model and reference.stop_token_ids == (tiny.END,)
    model.generation_config.eos_token_id = [5, 6]
    assert textenv.shared(model, tiny.tokenizer()).value.stop_token_ids == (5, 6)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert textenv.shared(model, tiny.tokenizer()).value.stop_token_ids == (tiny.END,)


@pytest.mark.parametrize("wrap", [lambda model: model, textenv.shared])
def test_a_bare_model_is_told_the_remedy(wrap):
    """A model without its tokenizer is refused, bare or shared, with the call that is right."""
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel without its tokenizer; .*textenv.shared\(model, tokenizer"):
        gym.make("TextGen-v0", reference=wrap(tiny.language_model()), **REST)
    with pytest.raises(ValueError, match="must be a Transformers model"):
        textenv.shared("gpt2", tiny.tokenizer())


def test_from_a_folder(tmp_path):
    """`from_pretrained` opens what the setting `reference` opens, frozen, and a copy of it can be trained."""
    folder = tiny.save(tiny.language_model(), tmp_path / "m")
    opened = textenv.LanguageModel.from_pretrained(folder)
    assert opened.stop_token_ids == (tiny.END,) and not opened.model.training
    assert not any(parameter.requires_grad for parameter in opened.model.parameters())
    environment = gym.make("TextGen-v0", reference=folder, **REST)
    assert environment.unwrapped.task.load_reference().model is opened.model  # loaded once
    policy = copy.deepcopy(opened.model).requires_grad_(True)
    ids = torch.tensor([[1, 2, 3]])
    policy(ids).logits.sum().backward()
    assert torch.equal(policy(ids).logits, opened.model(ids).logits) and opened.model.lm_head.weight.grad is None
    with pytest.raises(ValueError, match="no model configuration in"):
        textenv.LanguageModel.from_pretrained(tmp_path / "none")
