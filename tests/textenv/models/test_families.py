"""Every causal architecture of Transformers: right in every face and in training, fast or slow; or refused.

The oracle is a bare forward of one text, cut at the state: no batch, no filling, no cache. `families.md` beside the code
is the table that users read, and it is tested here.
"""

import random
import re
from pathlib import Path

import gymnasium as gym
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import textenv
from agents.text.networks import make_actor, make_critic, make_q_network
from agents.text.rollout import collect
from tests.support import families, learning, tiny
from textenv.config import TextGenConfig
from textenv.dynamics import TextDynamics
from textenv.generation import generate, response_log_probs
from textenv.models import probe
from textenv.models.decoding import decodes_from_cache
from textenv.models.language_model import LanguageModel, find_backbone
from textenv.models.probe import check_causal
from textenv.models.sampling import Sampling
from textenv.task import build_task

TABLE = Path(textenv.__file__).parent / "models" / "families.md"
P, R = 16, 12
# Float32 sums in another order: measured up to 6e-5 where weights are five times as large as trained ones.
TOLERANCE = 2e-4
# One of each mechanism: learned positions that count from 2, ALiBi, two kinds of windows, chunks, a recurrent state,
# both attention and a recurrent state, positions counted by the model itself, experts.
TYPICAL = ["bart", "bloom", "gemma2", "gpt_neo", "jamba", "llama4_text", "mamba", "mistral", "opt", "phimoe"]


# The version that the table describes. Older ones lack some of its architectures.
DESCRIBED = re.search(r"Transformers (\d+\.\d+)", TABLE.read_text(encoding="utf-8"))[1]


def table():
    """Model type -> "fast", "slow" or "refused", as users read it."""
    rows = (line.split("|") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `"))
    return {name.strip(" `"): ending.strip() for _, name, ending, *_ in rows}


def settings_of(model, **changes):
    """A task on a live model, with windows of 8 tokens crossed by texts of up to 28, and ragged responses."""
    reference = textenv.shared(LanguageModel(model, tiny.tokenizer(), tuple(range(40))))
    reward = textenv.shared(lambda prompts, responses: [float(len(text)) for text in responses])
    fixed = dict(kl_coef=0.3, max_prompt_tokens=P, max_new_tokens=R, temperature=0.7, device="cpu")
    return dict(reference=reference, reward=reward, prompts=tiny.PROMPTS, **fixed, **changes)


@torch.no_grad()
def bare_logits(model, ids):
    """The oracle: next-token logits after one text. [V]."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def bare_log_probs(model, state, row):
    """Log π of a row's response tokens at the task's temperature, each from a forward of the text before it."""
    ids = state.input_ids[row][state.attention_mask[row]].tolist()
    prompt = len(ids) - int(state.length[row])
    return [
        float((bare_logits(model, ids[:cut]) / 0.7).log_softmax(-1)[ids[cut]]) for cut in range(prompt, len(ids))
    ] + [0.0] * (R - int(state.length[row]))


def check_fast_path(task, model):
    """Recorded, teacher-forced and bare log-probabilities agree, whichever rows have ended."""
    prompts = task.prompts.select([0, 1, 2, 3] * 2)
    generation = generate(task, model, prompts, Sampling(temperature=0.7), torch.Generator().manual_seed(0))
    assert len(set(generation.state.length.tolist())) > 2  # rows left the decoder at several steps
    expected = torch.tensor([bare_log_probs(model, generation.state, row) for row in range(8)])
    torch.testing.assert_close(generation.log_prob, expected, rtol=0, atol=TOLERANCE)
    teacher_forced = response_log_probs(model, generation.state, 0.7, tokens_per_pass=40)
    torch.testing.assert_close(teacher_forced, expected, rtol=0, atol=TOLERANCE)


def check_stepping(task, model):
    """Rows that restart at different steps get the logits that they would get alone."""
    dynamics, draw = TextDynamics(task, rows=3), random.Random(0)
    dynamics.reset([0, 2], [1, 2])
    for step in range(10):
        if step == 3:
            dynamics.reset([1, 2], [3, 0])  # row 1 starts late, row 2 starts again
        for row in range(3):
            if dynamics.running[row]:
                ids = dynamics.state.input_ids[row][dynamics.state.attention_mask[row]].tolist()
                expected = bare_logits(model, ids)
                torch.testing.assert_close(dynamics.reference.logits[row], expected, rtol=0, atol=TOLERANCE)
        dynamics.step(torch.tensor([draw.randrange(41, 256) for _ in range(3)]), dynamics.running)


def check_env(settings, model):
    """The single environment pays β log π_ref of a bare forward at every step before the last."""
    env = gym.make("TextGen-v0", **settings, disable_env_checker=True)
    observation, _ = env.reset(seed=0)
    for token in (65, 66, 299, 70):
        ids = observation["input_ids"][observation["attention_mask"].astype(bool)].tolist()
        expected = 0.3 * float((bare_logits(model, ids) / 0.7).log_softmax(-1)[token])
        observation, reward, *_ = env.step(token)
        assert reward == pytest.approx(expected, abs=TOLERANCE)


@torch.no_grad()
def check_networks(task, model):
    """Actor, critic and Q network read every state as a bare forward of the text up to it."""
    actor, critic, q_network = make_actor(task), make_critic(task), make_q_network(task, 0.3, seed=1)
    torch.nn.init.normal_(critic.head.weight)  # it starts at zero
    rollout = collect(task, actor.model, task.prompts, torch.Generator().manual_seed(1), 100)
    data = rollout.data
    log_probs = actor.distribution(data).log_prob(data["action"])
    torch.testing.assert_close(log_probs, data["action_log_prob"], rtol=0, atol=TOLERANCE)
    values, token_values = critic.values(data), learning.whole(q_network, data)
    for row in range(len(data)):
        ids = data["input_ids"][row][data["attention_mask"][row]].tolist()
        length = int(data["mask"][row].sum())
        for step in range(length):
            before = torch.tensor([ids[: len(ids) - length + step]])
            hidden = critic.backbone(input_ids=before, use_cache=False).last_hidden_state[0, -1]
            torch.testing.assert_close(values[row, step], critic.head(hidden)[0], rtol=1e-4, atol=TOLERANCE)
            advantages = token_values[row, step] - token_values[row, step, 0]
            logits = bare_logits(model, before[0].tolist()) * 0.3 / 0.7
            torch.testing.assert_close(advantages, logits - logits[0], rtol=0, atol=TOLERANCE)


def check_training(settings, folder):
    """Two iterations of PPO learn, every ratio starts at 1, and the saved actor gives the same numbers when reloaded."""
    changes = dict(iterations=2, rollout_size=8, minibatch_size=8, micro_batch_tokens=80, learning_rate=1e-4)
    trainer = learning.make_trainer(settings, dict(epochs=1), **changes)
    actor = trainer.algorithm.networks.policy.model
    start = learning.weights(actor)
    iterations = list(trainer.iterate())
    assert not actor.training and not learning.same(start, learning.weights(actor))
    for iteration in iterations:
        assert abs(iteration.metrics["approx_kl"]) < 1e-4, iteration.metrics  # before the only step of an epoch
    ids = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))
    actor.save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    logits, expected = (model(input_ids=ids, use_cache=False).logits for model in (reloaded, actor))
    kept = torch.arange(tiny.VOCABULARY) != tiny.PAD  # Youtu sets the pad token's row to zero when it is loaded
    # Not to the bit: where a file's weights lie in memory decides how some processors multiply them.
    torch.testing.assert_close(logits[..., kept], expected[..., kept], rtol=1e-5, atol=1e-5)


def test_the_table_names_every_architecture():
    """Every causal model type of the installed Transformers is in the table, with one of four endings."""
    assert set(families.names()) <= set(table())
    assert set(table().values()) <= {"fast", "slow", "refused", "not tried"}


@pytest.mark.skipif(not transformers.__version__.startswith(f"{DESCRIBED}."), reason=f"not Transformers {DESCRIBED}")
def test_the_table_names_no_other_architecture():
    """With the version that the table names, nothing is left in the table that this version does not have."""
    assert set(table()) <= set(families.names())


@pytest.mark.parametrize("name", TYPICAL)
def test_typical_architectures(name):
    """One architecture of each mechanism is right on the fast path and when stepping."""
    model = families.build(name)
    task = build_task(TextGenConfig(**settings_of(model)))
    check_fast_path(task, model)
    check_stepping(task, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", families.names())
def test_every_architecture(name, tmp_path):
    """As the table says: right in every face, network and in training, fast or slow; or refused in a sentence."""
    try:
        model = families.build(name)
    except Exception:
        assert table()[name] == "not tried"
        return
    if table()[name] == "refused":
        with pytest.raises(ValueError, match=rf"the reference is a \w+ \({name}\): it.*\. \w"):
            check_causal(model, "reference", P + R)
        return
    settings = settings_of(model)
    task = build_task(TextGenConfig(**settings))
    assert table()[name] == ("fast" if decodes_from_cache(model, P + R) else "slow")
    check_fast_path(task, model)
    check_stepping(task, model)
    check_env(settings, model)
    check_networks(task, model)
    check_training(settings, tmp_path / "actor")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TYPICAL, "bert", "gemma3n_text", "xlnet"])
def test_the_check_of_long_texts(name, monkeypatch):
    """Where the check's oracle lets the head read the last token alone, as in long texts, the verdict is the same."""
    monkeypatch.setattr(probe, "WHOLE", 0)
    model = families.build(name)
    if table()[name] == "refused":
        with pytest.raises(ValueError, match=rf"the reference is a \w+ \({name}\): it"):
            check_causal(model, "reference", P + R)
    else:
        check_causal(model, "reference", P + R)


def test_the_oracle_sees_faults():
    """The comparison can fail: one token of the text moves the oracle by far more than the tolerance."""
    model = families.build("llama")
    first, second = (bare_logits(model, [*b"the cat", token]) for token in (65, 66))
    assert (first - second).abs().max() > 1000 * TOLERANCE
    assert find_backbone(model) is model.model
