"""Random configurations and action sequences: what must hold for every one of them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, PreTrainedModel

from tests.support import tiny
from tests.support.faces import assert_same
from textenv import LanguageModel, TextGenConfig, build_task, shared
from textenv.conformance import check_faces
from textenv.torchrl_env import TextGenTorchEnv


class OneLayer(PreTrainedModel):
    """One head of causal attention over tokens and positions: all that a stock model does here, in a tenth of its time."""

    config_class = GPT2Config

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        torch.manual_seed(0)
        width = config.n_embd
        self.tokens, self.positions = nn.Embedding(config.vocab_size, width), nn.Embedding(config.n_positions, width)
        self.attention, self.head = nn.Linear(width, 3 * width), nn.Linear(width, config.vocab_size)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **_):
        """Logits of all columns of whole texts, or of single tokens with a bias [B, 1, 1, keys] and positions [B, 1]."""
        positions = torch.arange(input_ids.shape[1]) if position_ids is None else position_ids
        hidden = self.tokens(input_ids) + self.positions(positions)  # [B, T, H]
        query, key, value = self.attention(hidden)[:, None].chunk(3, -1)  # [B, 1, T, H]
        bias = attention_mask
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, 0)
        if bias is None:
            bias = torch.full(2 * input_ids.shape[1:], torch.finfo(torch.float32).min).triu(1)
        weight = (query @ key.transpose(-1, -2) + bias).softmax(-1)  # [B, 1, T, keys]
        hidden = hidden + 2 * (weight @ value)[:, 0]
        # A quarter: the comparisons below are of float32 to a millionth, and temperatures and penalties magnify these.
        return SimpleNamespace(logits=self.head(hidden) / 4)


def _small_model() -> LanguageModel:
    sizes = dict(n_embd=8, n_layer=1, n_head=1, n_positions=32, vocab_size=tiny.VOCABULARY)
    config = GPT2Config(**sizes, eos_token_id=tiny.END, bos_token_id=None)
    model = OneLayer(config).eval().requires_grad_(False)
    return LanguageModel(model, tiny.tokenizer(), (tiny.END,))


MODEL = shared(_small_model())


def vowels(prompts, responses):
    """A reward that depends on every letter and on the prompt."""
    pairs = zip(prompts, responses, strict=True)
    return [sum(one in "aeiou" for one in text) - 0.5 * len(text) + 0.1 * len(prompt) for prompt, text in pairs]


def second(prompts, responses):
    """Another reward, for sums."""
    return [float(len(text) > 2) for text in responses]


REWARDS = [vowels, {"tests.textenv.test_properties:vowels": 0.5, "tests.textenv.test_properties:second": -2.0}]
MASKS = [None, "special", ["special", "top_k:7"], "regex:[a-z ]+"]
CONFIGS = st.fixed_dictionaries(
    dict(
        reference=st.just(MODEL),
        reward=st.sampled_from(REWARDS),
        prompts=st.lists(
            st.text(alphabet="abc de\u00e9", min_size=1, max_size=5).filter(str.strip), min_size=1, max_size=4
        ),
        kl_coef=st.sampled_from([0.0, 0.05, 1.0, 30.0]),
        max_prompt_tokens=st.integers(10, 12),
        max_new_tokens=st.integers(1, 3),
        temperature=st.sampled_from([0.1, 0.7, 1.0, 5.0]),
        stop_token_ids=st.sampled_from([[tiny.END], [tiny.END, 5, 299], list(range(150))]),
        action_mask=st.sampled_from(MASKS),
        prompt_sampling=st.sampled_from([None, "shuffle", "prioritized"]),
        group_size=st.integers(1, 2),
        score_normalization=st.sampled_from(["none", "fixed"]),
        score_clip=st.sampled_from([None, 0.5]),
        device=st.just("cpu"),
    )
)
SEEDS = st.integers(0, 2**31)


def examples(count: int) -> settings:
    """The same examples at every run."""
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


# Their numbers are part of the promise: a first part in `make test`, all of them in `make test-slow`.
few_or_many = pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.slow)])


@few_or_many
def test_all_faces_agree(count):
    """Native, single and TorchRL environments return the tokens, masks, rewards and infos of the fast path."""
    examples(count)(given(config=CONFIGS, seed=SEEDS)(check_all_faces))()


def check_all_faces(config, seed):
    task = build_task(TextGenConfig(**config))
    check_faces(task, rows=2, seed=seed, torchrl_env=TextGenTorchEnv(task, 2))


@few_or_many
def test_native_equals_sync(count):
    """Native equals SyncVectorEnv at every step; observations never change later; rewards are finite; seeds decide prompts."""
    examples(count)(given(config=CONFIGS, seed=SEEDS, mode=st.sampled_from(list(AutoresetMode)))(check_native))()


def check_native(config, seed, mode):
    native = gym.make_vec("TextGen-v0", num_envs=2, autoreset_mode=mode.value, **config)
    sync = SyncVectorEnv([lambda: gym.make("TextGen-v0", disable_env_checker=True, **config)] * 2, autoreset_mode=mode)
    got = native.reset(seed=seed)
    assert_same(got, sync.reset(seed=seed), "reset")
    first = copy.deepcopy(got[0])
    kept = [(got[0], first)]
    for step, actions in enumerate(np.random.default_rng(seed).integers(0, tiny.VOCABULARY, (5, 2))):
        got = native.step(actions)
        assert_same(got, sync.step(actions), f"step {step}")
        assert np.isfinite(got[1]).all()
        kept.append((got[0], copy.deepcopy(got[0])))
        if mode is AutoresetMode.DISABLED and got[2].any():
            again = [env.reset(options={"reset_mask": got[2].copy()}) for env in (native, sync)]
            assert_same(*again, f"reset after step {step}")
    for shown, was in kept:
        assert all((shown[key] == was[key]).all() for key in was)
    assert_same(native.reset(seed=seed)[0], first, "the same seed again")


@examples(100)
@given(config=CONFIGS, seed=SEEDS)
def test_masks_never_depend_on_ids(config, seed):
    """Attention masks count tokens; which tokens they are, the pad id included, changes nothing."""
    env = gym.make("TextGen-v0", **(config | {"stop_token_ids": [tiny.END]})).unwrapped
    generator, masks = np.random.default_rng(seed), []
    ordinary = np.setdiff1d(np.arange(tiny.VOCABULARY), [tiny.END])
    for tokens in (np.full(4, tiny.PAD), np.zeros(4, dtype=int), generator.choice(ordinary, 4)):
        found = [env.reset(seed=seed)[0]["attention_mask"].tolist()]
        for token in tokens[: config["max_new_tokens"]]:
            found.append(env.step(int(token))[0]["attention_mask"].tolist())
        masks.append(found)
    assert masks[0] == masks[1] == masks[2]
