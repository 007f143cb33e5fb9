"""Every bad input is refused with a ValueError that says what was wrong, what was got, and the remedy."""

import json
import math
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

import textenv.rewards.build
import textenv.task
from tests.support import tiny
from textenv import LanguageModel, TextGenConfig, build_task, shared
from textenv.models.loading import load_stop_token_ids
from textenv.rewards.reward_model import RewardModel
from textenv.training.reward_model import load_base
from textenv.vector_env import TextGenVectorEnv


def refuse(settings, says, **changes):
    """Both single and vector environment refuse these arguments in these words."""
    for make in (lambda **given: gym.make("TextGen-v0", **given), lambda **given: TextGenVectorEnv(2, **given)):
        with pytest.raises(ValueError, match=says):
            make(**{**settings, **changes})


def copied(folder, target, **edits):
    """A saved model copied, with fields of its JSON files changed."""
    target.mkdir()
    for file in Path(folder).iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = target / name
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | edits))
    return target


# ---- arguments


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kl_coef": -0.1}, "kl_coef must be 0 or more, got -0.1.*Use 0"),
        ({"kl_coef": math.nan}, "kl_coef must be a finite number, got nan"),
        ({"kl_coef": math.inf}, "kl_coef must be a finite number, got inf"),
        ({"kl_coef": "0.1"}, "kl_coef must be a finite number, got '0.1'"),
        ({"temperature": 0}, "temperature must be above 0, got 0.0; 1.0 is"),
        ({"temperature": -1.0}, "temperature must be above 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be a finite number, got nan"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number, got '5'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, got True"),
        ({"max_prompt_tokens": -3}, "max_prompt_tokens must be a whole number of at least 1, got -3"),
        ({"dtype": "float8"}, r"dtype must be one of \['bfloat16', 'float16', 'float32'\], got 'float8'"),
        ({"device": "abacus"}, "device must be 'auto', 'cpu' or .*got 'abacus'"),
        ({"device": "cuda:99"}, "device must be 'auto', 'cpu' or .*got 'cuda:99'"),
        ({"stop_token_ids": []}, r"no end token.*pass stop_token_ids=\[...\]"),
        ({"stop_token_ids": [300]}, r"stop_token_ids must be token ids, from 0 to 299, got \[300\]"),
        ({"stop_token_ids": [5, -1]}, "stop_token_ids must be"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids must be"),
        ({"stop_token_ids": "<end>"}, "stop_token_ids must be a list of token ids, or None .*got '<end>'"),
        ({"prompts": ["ok", ""]}, "prompt number 1 is empty.*leave it out"),
        ({"prompts": ["x" * 17]}, "prompt number 0 has 17 tokens, more than max_prompt_tokens=16.*to 17"),
        ({"prompts": []}, "prompts are empty; give at least one"),
        ({"prompts": "missing.jsonl"}, "no prompts file at 'missing.jsonl'"),
        ({"max_new_tokens": 49}, "max_prompt_tokens [+] max_new_tokens = 65, more than the reference's 64 positions"),
        ({"max_new_tokens": 49, "kl_coef": 0}, "= 65, more than the reference's 64 positions; lower one"),
        ({"reference": "/no/such/folder"}, "'/no/such/folder'"),
        ({"reference": "/no/such/folder", "kl_coef": 0}, "'/no/such/folder'"),
        ({"reference": 7}, "reference must be a folder, a hub name or .*got int"),
        ({"reward": "/no/such/folder"}, "'/no/such/folder'"),
        ({"reward": 7}, "reward must be a folder or hub name .*got int"),
        ({"reward": {}}, "reward is an empty mapping"),
        ({"reward": {"textenv.rewards.library:length": math.nan}}, "weight of reward .*finite number, got nan"),
        ({"reward": {"textenv.rewards.library:length": "1"}}, "weight of reward .*finite number, got '1'"),
        ({"reward": "textenv.rewards.library:absent"}, "'textenv.rewards.library:absent' names no importable function"),
        ({"reward": "textenv.config:DTYPES"}, "must name a function, got dict"),
        ({"reward_label": 3}, "reward_label must be a text or None, got 3"),
        ({"render_mode": "video"}, "render_mode must be None or one of .*'ansi'.*, got 'video'"),
    ],
)
def test_bad_arguments(settings, changes, says):
    """A bad argument of gym.make is refused when the environment is made."""
    refuse(settings, says, **changes)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize("changes", [{"kl_coef": -1}, {"temperature": 0}, {"device": "abacus"}, {"prompts": "x.jsonl"}])
def test_refused_before_models_are_loaded(settings, changes, monkeypatch):
    """What can be known without a model is refused before one is read from disk."""
    for name in ("load_causal_lm", "load_tokenizer", "load_config"):
        monkeypatch.setattr(textenv.task, name, lambda *args: pytest.fail("work was done"))
    monkeypatch.setattr(textenv.rewards.build, "load_classifier", lambda *args: pytest.fail("work was done"))
    refuse(settings, "got|no prompts", **changes)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize("ends", ["abc", 2.5, [-5], [256, "x"], True, {"id": 3}])
def test_end_tokens_of_a_model(settings, folders, kind, tmp_path, ends):
    """What a model's files name as its end tokens is refused where it is no token id, by whoever reads it."""
    folder = copied(folders[kind], tmp_path / "ends")
    config = folder / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": ends}))
    says = "eos_token_id must be a token id or a list of them, .*generation_config.json"
    refuse(settings, says, reference=str(folder))
    with pytest.raises(ValueError, match=says):
        load_stop_token_ids(str(folder), tiny.tokenizer())


def test_unknown_argument(settings):
    """A misspelt argument is named (TypeError, as Python has it for keyword arguments)."""
    with pytest.raises(TypeError, match="kl_coeff"):
        gym.make("TextGen-v0", **settings, kl_coeff=0.1)


# ---- models


def test_model_without_end_token(settings, folders, kind, tmp_path):
    """A model that has no end token needs stop_token_ids."""
    folder = str(copied(folders[kind], tmp_path / "endless", eos_token_id=None, eos_token=None))
    for kl_coef in (0, 0.3):
        refuse(settings, "no end token.*stop_token_ids", reference=folder, kl_coef=kl_coef)
    task = build_task(TextGenConfig(**{**settings, "reference": folder, "stop_token_ids": [65]}))
    assert task.stop_token_ids == (65,) == task.reference.stop_token_ids


def test_end_tokens_of_the_generation_config(settings, folders, kind, tmp_path):
    """A list of end tokens in generation_config.json counts, as for chat models."""
    folder = copied(folders[kind], tmp_path / "chat")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [tiny.END, 65]}))
    for kl_coef in (0, 0.3):
        task = build_task(TextGenConfig(**{**settings, "reference": str(folder), "kl_coef": kl_coef}))
        assert task.stop_token_ids == (tiny.END, 65)
    (folder / "generation_config.json").unlink()
    assert build_task(TextGenConfig(**{**settings, "reference": str(folder)})).stop_token_ids == (tiny.END,)


@pytest.mark.parametrize("content", ["[]", "{", "null"])
def test_damaged_generation_config(settings, folders, kind, tmp_path, content):
    """A generation config that cannot be read is refused, not taken for a missing one: it holds the end tokens."""
    folder = copied(folders[kind], tmp_path / "damaged")
    (folder / "generation_config.json").write_text(content)
    refuse(settings, r"the generation_config.json of .* cannot be read .*; repair it", reference=str(folder))


def test_pickled_weights_are_refused(settings, folders, kind, tmp_path):
    """Weights as pickles, which can run code, are not read; the error says how to re-save."""
    for role, name in (("reference", kind), ("reward", f"{kind}_reward")):
        folder = copied(folders[name], tmp_path / role)
        (folder / "model.safetensors").unlink()
        model = tiny.language_model(kind) if role == "reference" else tiny.reward_model(kind)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        refuse(settings, "safetensors.*re-save", **{role: str(folder)})
        with pytest.raises(ValueError, match=r"no model could be loaded from .*safetensors.*re-save"):
            load_base(folder, seed=0)


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_folder_is_not_run(settings, folders, kind, tmp_path, known, monkeypatch):
    """auto_map names code in the model's folder: it is never imported, whether the architecture is known or not.

    Nor is anybody asked whether it may be, who could answer yes.
    """
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    marker = tmp_path / "was_run"
    code = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoModelForSequenceClassification": "evil.Model",
        "AutoTokenizer": ["evil.Slow", "evil.Fast"],
    }
    edits = {"auto_map": code} if known else {"auto_map": code, "model_type": "evil"}
    for role, name in (("reference", kind), ("reward", f"{kind}_reward")):
        folder = copied(folders[name], tmp_path / role, **edits)
        (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').write('x')\n")
        if known:
            build_task(TextGenConfig(**{**settings, role: str(folder)}))
            load_base(folder, seed=0)
        else:
            refuse(settings, "evil|trust_remote_code|custom code", **{role: str(folder)})
            with pytest.raises(ValueError, match=r"no model configuration in .*(trust_remote_code|custom code)"):
                load_base(folder, seed=0)
    assert not marker.exists()


def test_causal_model_is_no_reward_model(settings, folders, kind, tmp_path):
    """A language model given as reward model would have a random head: refused, also under a false label."""
    refuse(settings, "is not a sequence-classification model.*head would be random", reward=folders[kind])
    name = {"gpt2": "GPT2For", "llama": "LlamaFor"}[kind]
    false = copied(folders[kind], tmp_path / "false", architectures=[f"{name}SequenceClassification"])
    refuse(settings, "no weights for score.weight.*random", reward=str(false))
    tokens = copied(folders[kind], tmp_path / "tokens", architectures=[f"{name}TokenClassification"])
    refuse(settings, "is not a sequence-classification model", reward=str(tokens))


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_forked_from_a_process_with_cuda(settings, monkeypatch, device):
    """Such a process has no CUDA: that is said, with the remedy, and the CPU is not taken in its place unasked."""
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    refuse(settings, "forked from one that uses CUDA.*'spawn'.*or set device='cpu'", device=device)
    gym.make("TextGen-v0", **settings).close()
    live = shared(LanguageModel(tiny.language_model(), tiny.tokenizer(), (tiny.END,)))
    gym.make("TextGen-v0", **{**settings, "reference": live, "device": "auto"}).close()  # on the CPU, as the model is


@pytest.mark.parametrize("wrong", [True, "GPT2LMHeadModel", [5], {}])
def test_damaged_architectures(settings, folders, tmp_path, wrong):
    """What a folder holds is read from its architectures: anything but a list of names is refused, in both roles."""
    for role, kind in (("reference", "gpt2"), ("reward", "gpt2_reward")):
        damaged = copied(folders[kind], tmp_path / role, architectures=wrong)
        # The oldest Transformers that works here checks the type by itself, and says it in its own words.
        refuse(settings, "architectures('.* match any type| must be a list of names)", **{role: str(damaged)})


def test_damaged_tokenizer_settings(settings, folders, kind, tmp_path):
    """A tokenizer that loads and then cannot read is refused when it is loaded."""
    damaged = copied(folders[kind], tmp_path / "damaged", model_max_length=[])
    refuse(settings, "no tokenizer in .*Save one beside the model", reference=str(damaged))


def test_reward_model_is_no_language_model(settings, folders, tmp_path):
    """A reward model writes no text, and a reference whose output layer was never saved would be random: refused."""
    refuse(settings, "such as a reward model, and writes no text", reference=folders["llama_reward"])
    body = copied(folders["llama_reward"], tmp_path / "body", architectures=["LlamaModel"])
    refuse(settings, "no weights for lm_head.weight.*random", reference=str(body))


def test_short_reward_model(settings, kind, tmp_path):
    """A reward model with fewer positions than the text is refused at once, not at the first long response."""
    sizes, name = {"gpt2": (tiny.GPT2, "n_positions"), "llama": (tiny.LLAMA, "max_position_embeddings")}[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sizes, name, 20)
        folder = tiny.save(tiny.reward_model(kind), tmp_path)
    refuse(settings, "= 28, more than the reward model's 20 positions", reward=folder)


def test_live_models_in_train_mode(settings, kind):
    """Live models in train mode are refused: dropout would blur every number. Nothing about them is changed."""
    model, reward = tiny.language_model(kind), tiny.reward_model(kind)
    lm = LanguageModel(model.train(), tiny.tokenizer(), (tiny.END,))
    refuse(settings, r"the reference is in train mode.*model.eval\(\)", reference=shared(lm))
    refuse(settings, r"the reference is in train mode.*model.eval\(\)", reference=shared(lm), kl_coef=0)
    for given in (reward.train(), RewardModel(reward.train())):
        refuse(settings, r"the reward model is in train mode.*model.eval\(\)", reward=shared(given))
    assert model.training and reward.training
    refuse(
        settings, r"without its tokenizer; pass reference=textenv.shared\(model, tokenizer\)", reference=shared(model)
    )


def test_live_reward_models_that_cannot_read(settings):
    """A live reward model of too few positions or ids is refused at once, bare or wrapped, and not at the first score."""
    for changes, says in [
        (dict(n_positions=27), r"= 28, more than the reward model's 27 positions; lower one"),
        (dict(vocab_size=299), "the reward model has 299 token ids and the reference 300"),
    ]:
        ends = dict(pad_token_id=tiny.PAD, eos_token_id=tiny.END, bos_token_id=None, num_labels=1)
        model = GPT2ForSequenceClassification(GPT2Config(**(tiny.GPT2 | changes), **ends)).eval()
        for given in (model, RewardModel(model)):
            refuse(settings, says, reward=shared(given))


def test_stop_tokens_of_a_live_model(settings):
    """stop_token_ids overrides a live model's own, and a live model without any is refused."""
    model = tiny.language_model("gpt2")
    lm, endless = (LanguageModel(model, tiny.tokenizer(), ends) for ends in ((tiny.END,), ()))
    refuse(settings, "no end token", reference=shared(endless))
    task = build_task(TextGenConfig(**{**settings, "reference": shared(lm), "stop_token_ids": [65, 66]}))
    assert task.stop_token_ids == (65, 66) and lm.stop_token_ids == (tiny.END,)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_embedded_prompts_that_do_not_fit(settings):
    """Where a foreign reference cannot take the embedded task's prompts, the error says whose they are."""
    whose = r"prompt number 0 has .*These are the embedded task's prompts, prompts='reviews'; give your own.*prompts="
    refuse(settings, whose, prompts="reviews")
    with pytest.raises(ValueError, match="prompt number 0 has") as raised:
        build_task(TextGenConfig(**{**settings, "prompts": ["x" * 17]}))
    assert "embedded" not in str(raised.value)


@pytest.mark.parametrize("kl_coef", [0, 0.3])
def test_folder_of_a_run(settings, folders, kind, tmp_path, kl_coef):
    """The folder of a run, whose model is one deeper, is told from one that holds nothing."""
    run = tmp_path / "a"
    run.mkdir()
    copied(folders[kind], run / "actor")
    (run / "config.json").write_text('{"train": {"env": "TextGen-v0"}}')  # what a run says of itself
    says = "'.*a' is the folder of a run, not of a model; did you mean '.*a/actor'"
    refuse(settings, says, reference=str(run), kl_coef=kl_coef)
    with pytest.raises(ValueError, match=says):
        load_base(run, seed=0)
    build_task(TextGenConfig(**{**settings, "reference": str(run / "actor"), "kl_coef": kl_coef}))


# ---- stepping


def story(env, tokens):
    """Ids, reward and end of these steps."""
    answers = [env.step(token) for token in tokens]
    return [(answer[0]["input_ids"].tolist(), answer[1], answer[2]) for answer in answers]


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize("bad", [-1, tiny.VOCABULARY, 1.5, np.array([1, 2]), "a", None, True, 2**70, [], np.int64(-7)])
def test_bad_actions(settings, bad):
    """What is no token id is refused, and the episode goes on as if it had not been tried."""
    env, untouched = (gym.make("TextGen-v0", disable_env_checker=True, **settings) for _ in range(2))
    env.reset(seed=0)
    untouched.reset(seed=0)
    env.step(65)
    with pytest.raises(ValueError, match=r"action .*(not a token id; ids range from 0 to 299|must be one token id)"):
        env.step(bad)
    assert story(env, [66, tiny.END]) == story(untouched, [65, 66, tiny.END])[1:]


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize("good", [65, np.int64(65), np.int32(65), np.array(65), np.array([65]), torch.tensor(65)])
def test_good_actions(settings, good):
    """A token id may come as any whole number of Python, NumPy or torch."""
    env = gym.make("TextGen-v0", disable_env_checker=True, **settings)
    env.reset(seed=0)
    assert env.step(good)[0]["input_ids"][16] == 65


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_bad_vector_actions(settings, mode):
    """One bad id among many is named with its row; no row has moved, none that was to start anew has."""
    env, untouched = (TextGenVectorEnv(3, autoreset_mode=mode, **settings) for _ in range(2))
    for one in (env, untouched):
        one.reset(seed=0)
        one.step(np.array([65, 65 if mode == "Disabled" else tiny.END, 65]))
    for bad, says in [
        (np.array([65, 65, 300]), "action 300 in row 2 is not a token id; ids range from 0 to 299"),
        (np.array([-1, 65, 65]), "action -1 in row 0 is not a token id"),
        (np.array([65, 65]), "an action must be 3 token ids"),
        (np.array([65.0, 65.0, 65.0]), r"an action must be 3 token ids \(whole numbers\)"),
    ]:
        with pytest.raises(ValueError, match=says):
            env.step(bad)
    for actions in np.array([[70, 71, 72], [73, 74, 75]]):
        got, wanted = env.step(actions), untouched.step(actions)
        assert got[0]["input_ids"].tolist() == wanted[0]["input_ids"].tolist()
        assert got[1].tolist() == wanted[1].tolist()


def test_step_at_the_wrong_time(settings):
    """Stepping before reset or after the end is refused: call reset() first."""
    env = gym.make("TextGen-v0", **settings).unwrapped
    vector = TextGenVectorEnv(2, autoreset_mode="Disabled", **settings)
    for one, actions in ((env, 65), (vector, np.array([65, 65]))):
        with pytest.raises(ValueError, match=r"row 0 is over or was never started; call reset\(\) first"):
            one.step(actions)
    env.reset(seed=0)
    env.step(tiny.END)
    with pytest.raises(ValueError, match=r"row 0 is over.*call reset\(\)"):
        env.step(65)
    vector.reset(seed=0)
    vector.step(np.array([65, tiny.END]))
    with pytest.raises(ValueError, match=r"row 1 is over.*call reset\("):
        vector.step(np.array([65, 65]))
    vector.reset(options={"reset_mask": np.array([False, True])})
    assert vector.step(np.array([65, 65]))[0]["attention_mask"][:, 16:].sum(1).tolist() == [2, 1]


# ---- the vector environment's own arguments


def test_bad_vector_arguments(settings):
    """autoreset_mode, num_envs, seeds and reset_mask say what they should have been."""
    with pytest.raises(ValueError, match=r"autoreset_mode must be one of .*'NextStep'.*got 'Sometimes'"):
        TextGenVectorEnv(2, autoreset_mode="Sometimes", **settings)
    for rows in (0, 2.5, "2", True, None):
        with pytest.raises(ValueError, match=rf"num_envs must be a whole number of at least 1, got {rows!r}"):
            TextGenVectorEnv(rows, **settings)
    env = TextGenVectorEnv(2, **settings)
    for seed in ([1], [1, 2, 3]):
        with pytest.raises(ValueError, match=r"seed must be one whole number or a list of 2 \(num_envs\), got"):
            env.reset(seed=seed)
    for mask in (np.array([True]), np.array([1, 0]), np.array([False, False]), np.ones((2, 1), dtype=bool), "yes"):
        with pytest.raises(ValueError, match=r"reset_mask.* must be a boolean array of shape \(2,\) with at least one"):
            env.reset(options={"reset_mask": mask})
