"""What saves memory changes no number: logits in parts, one network's graph at a time, recomputed layers, micro-batches."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXJapaneseConfig, GPTNeoXJapaneseForCausalLM

from agents.text.collector import TextCollector
from agents.text.networks import TextActor, TextQ, recompute_layers
from tests.support.by_hand import gradients, perturb
from tests.support.learning import losses, make_rollout, make_trainer, same, weights
from textenv.masks.token_sets import TokenSets
from textenv.models import logits as parts
from textenv.models.language_model import read, read_states

SMALL = dict(learning_starts=8, gradient_steps=2, gamma=0.9, lmbda=0.6)
LEARNERS: dict[str, dict[str, Any]] = {
    "ppo": dict(entropy_coef=0.05, kl_loss="k3", clip=0.1),
    "a2c": dict(entropy_coef=0.05),
    "reinforce": {},
    "rloo": dict(kl_loss="k2"),
    "grpo": {},
    "dqn": SMALL,
    "sac": SMALL,
}
FAST = ("ppo", "dqn", "sac")
gpt2 = pytest.mark.parametrize("kind", ["gpt2"], indirect=True)


def some(names, fast):
    """All names as parameters; those beyond the fast ones are slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


# ---- logits in parts


def odd_or_third(prompt: str, response: str) -> range:
    """Allowed tokens that change from step to step, fewer and more than half of the vocabulary left out."""
    return range(0, 300, 2 + len(response) % 2)


def whole_states(network: Any, batch: Any) -> Tensor:
    """Numbers of all tokens at s_0..s_R as one tensor, [B, R + 1, V], in the plain way."""
    mask = batch["mask"]
    texts, width = (batch["input_ids"], batch["attention_mask"]), batch["input_ids"].shape[1] - mask.shape[1]
    logits, hidden = read(network.model, *read_states(*texts, width, mask.shape[1] + 1))
    inside = TokenSets(batch["allowed_ids"], batch["allowed_inside"]).dense(300)
    inside = torch.cat([inside, torch.ones_like(inside[:, :1])], 1)
    logits = (logits / network.temperature).masked_fill(~inside, -1e4)
    if isinstance(network, TextQ):
        return network.head(hidden.detach()) + network.alpha * logits.log_softmax(-1)
    return logits


def map_whole_states(function: Any, values: list[Tensor], *others: Tensor) -> Tensor:
    """See `NetworkFactory.map_states`."""
    return function(*values, *(nn.functional.pad(other, (0, 1)) for other in others))


class Whole:
    """The distribution over tokens at every step, from whole logits."""

    def __init__(self, network: Any, batch: Any) -> None:
        self.log_probs = whole_states(network, batch)[:, :-1].log_softmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        return self.log_probs.gather(-1, action[..., None])[..., 0]

    def entropy(self) -> Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum(-1)


def update_of(trainer: Any, data: Any) -> tuple[dict[str, float], Tensor]:
    """Loss terms, and gradients of all networks."""
    trainer.optimizer.zero_grad()
    terms = losses(trainer, data)
    torch.stack(list(terms.values())).sum().backward()
    trained = trainer.algorithm.networks.trained.values()
    return {name: float(term.detach()) for name, term in terms.items()}, torch.cat(
        [gradients(each) for each in trained]
    )


def moved_trainer(settings: dict, name: str, **changes: Any) -> tuple[Any, Any]:
    """A trainer whose networks, targets too, are no longer those that wrote its rollout; and the rollout."""
    trainer = make_trainer(settings | dict(group_size=2), LEARNERS[name], name, **changes)
    data = make_rollout(trainer).data
    networks = trainer.algorithm.networks
    for network in [*networks.trained.values(), *networks.targets.values()]:
        perturb(network)
    return trainer, data


@gpt2
@pytest.mark.parametrize("name", some(LEARNERS, FAST))
def test_parts_equal_whole_logits(settings, name, monkeypatch):
    """Loss and gradient of every learner, with action masks, in parts of three states, are those of whole logits."""
    trainer, data = moved_trainer(settings | dict(action_mask=odd_or_third), name)
    monkeypatch.setattr(parts, "PART", 3 * 300)
    found, gradient = update_of(trainer, data)
    monkeypatch.setattr(TextActor, "distribution", lambda actor, batch: Whole(actor, batch))
    for kind in (TextActor, TextQ):
        monkeypatch.setattr(kind, "all_states", whole_states)
    if name in ("dqn", "sac"):
        monkeypatch.setattr(trainer.algorithm.factory, "map_states", map_whole_states)
    expected, wanted = update_of(trainer, data)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    scale = wanted.abs().max()
    assert scale > 1e-3
    # float32 sums in another order: a few roundings of the largest entry
    torch.testing.assert_close(gradient / scale, wanted / scale, atol=1e-5, rtol=0)


# ---- one network's graph at a time


class Saved:
    """A tensor that autograd has kept for the backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@gpt2
@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_one_graph_at_a_time(settings, name):
    """When a network's forward with gradients starts, nothing is kept of the networks before it."""
    trainer, data = moved_trainer(settings, name, micro_batch_tokens=1000)
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    starts, most = [], []

    def keep(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        most.append(len(alive))
        return saved

    def before(*_: Any) -> None:
        if torch.is_grad_enabled():
            starts.append(len(alive))

    for network in trainer.algorithm.networks.trained.values():
        model = network.backbone if hasattr(network, "backbone") else network.model
        model.register_forward_pre_hook(before)
    update_of(trainer, data)  # the first time, a model's head is looked at
    starts.clear()
    with saved_tensors_hooks(keep, lambda saved: saved.tensor):
        trainer._backward(data)
    assert starts == [0] * len(trainer.algorithm.networks.trained)
    assert max(most) > 20


# ---- recomputed layers

SIZES: dict[str, Any] = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": dict(resid_pdrop=0.5, n_embd=32, n_layer=3, n_head=4),
    "opt": dict(dropout=0.5, ffn_dim=48, word_embed_proj_dim=32),  # draws dropout in the layer itself
    "bloom": dict(hidden_dropout=0.5, n_head=4, n_layer=3),
    "llama": {},
    "gemma2": dict(query_pre_attn_scalar=8, sliding_window=4),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mamba2": dict(num_heads=8, head_dim=8, state_size=8, n_groups=1),
    "falcon_h1": dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32, mamba_d_state=8),
}


def step_of(model: Any) -> tuple[Tensor, list[Tensor], int]:
    """A loss, its gradients, and how many numbers the forward pass keeps, weights left out."""
    own, kept = {parameter.data_ptr() for parameter in model.parameters()}, []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    ids = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    loss = hidden.square().mean()
    numbers = sum(kept)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], numbers


@pytest.mark.parametrize("kind", some(FAMILIES, ("gpt2", "opt")))
def test_recomputed_layers(kind):
    """Value and gradient are equal to the bit, no dropout is drawn, and the forward pass keeps less than half."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | FAMILIES[kind])).eval()
    other = copy.deepcopy(model)
    recompute_layers(other)
    other = copy.deepcopy(other)  # as target networks are made
    plain, found = step_of(model), step_of(other)
    assert torch.equal(plain[0], found[0]) and same(plain[1], found[1])
    assert found[2] < plain[2] / 2
    assert not any(module.training for module in other.modules())


def test_layers_that_cannot_be_recomputed():
    """An architecture for which Transformers has no checkpointing is refused in a sentence."""
    config = GPTNeoXJapaneseConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(
        ValueError, match=r"recompute the layers of GPTNeoXJapanese.*; leave out gradient_checkpointing"
    ):
        recompute_layers(GPTNeoXJapaneseForCausalLM(config))


@gpt2
@pytest.mark.parametrize("name", some(("ppo", "dqn", "sac"), ("ppo",)))
def test_gradient_checkpointing_changes_no_weight(settings, name):
    """The setting reaches every network, and an iteration ends at the same weights."""
    ends = []
    for switch in (False, True):
        own = LEARNERS[name] | (dict(epochs=1) if name == "ppo" else {})
        trainer = make_trainer(settings, own, name, iterations=1, gradient_checkpointing=switch)
        trained = list(trainer.algorithm.networks.trained.values())
        layers = [next(m for m in network.modules() if type(m).__name__ == "GPT2Block") for network in trained]
        assert all(("forward" in vars(layer)) == switch for layer in layers)
        list(trainer.iterate())
        ends.append([weight for network in trained for weight in weights(network)])
    assert same(*ends)


# ---- micro-batches


@gpt2
def test_micro_batches_are_within_their_tokens(settings):
    """Every row once; whole texts, padded to the longest, are at most so many tokens, or one text; no empty columns."""
    trainer = make_trainer(settings)
    data = make_rollout(trainer).data
    task, prompts = trainer.collector.task, trainer.collector.prompts
    for tokens in (1, 30, 60, 1000):
        config = replace(trainer.collector.config, micro_batch_tokens=tokens)
        batches = list(TextCollector(task, prompts, config, seed=0).micro_batches(data))
        assert sorted(text for batch in batches for text in texts_of(batch)) == sorted(texts_of(data))
        for batch in batches:
            length = batch["attention_mask"].sum(1)
            assert len(batch) * int(length.max()) <= tokens or len(batch) == 1
            assert batch["attention_mask"].any(0).all() and batch["mask"].shape[1] <= batch["attention_mask"].shape[1]
            assert torch.equal(batch["attention_mask"][:, -batch["mask"].shape[1] :], batch["mask"])


def texts_of(batch: Any) -> list[tuple[int, ...]]:
    """The tokens of each row, without padding."""
    return [tuple(ids[mask].tolist()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


@gpt2
def test_state_values_do_not_depend_on_the_tokens_of_a_pass(settings):
    """Values of a rollout come in its own order, however its rows are grouped."""
    trainer = make_trainer(settings)
    data, critic = make_rollout(trainer).data, trainer.algorithm.networks.critic
    with torch.no_grad():
        expected = torch.cat([critic.all_states(data[row : row + 1]) for row in range(len(data))])
    found = trainer.algorithm.networks.factory.state_values(critic, data)
    length = data["attention_mask"][:, -data["mask"].shape[1] :].sum(1, keepdim=True)
    valid = torch.arange(data["mask"].shape[1] + 1) <= length  # up to the state after the last token
    assert not found[~valid].any()
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"lora_rank": 2}], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama"], indirect=True)
def test_what_saves_memory_goes_together(settings, caplog, changes):
    """A compiled step decodes with layers that are recomputed, a bfloat16 copy and adapters; copies call their own."""
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    trainer = make_trainer(settings, gradient_checkpointing=True, compile=True, **changes)
    iterations = list(trainer.iterate())
    assert len(iterations) == 3 and "not compiled" not in caplog.text
    if "precision" in changes:  # bfloat16 rounds a compiled step otherwise, so other tokens are drawn
        return
    plain = make_trainer(settings, **changes)
    expected = [iteration.metrics["policy_loss"] for iteration in plain.iterate()]
    found = [iteration.metrics["policy_loss"] for iteration in iterations]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
