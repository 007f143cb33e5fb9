"""Ten thousand bad inputs, over every argument, flag and file: a working object, or a sentence of our own.

Never another error, never an error from elsewhere, and nothing of the user's is lost.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents import __main__ as command_line
from agents import run
from agents.algorithms.registry import ALGORITHMS
from agents.config import TrainConfig
from agents.control.config import ControlConfig
from agents.text.config import GenerateConfig, TextConfig
from tests.support import tiny
from tests.support.junk import JUNK, SCALARS, WORDS, assert_refused, damaged, many, replaced_values
from textenv import LanguageModel, Task, TextGenConfig, build_task, shared
from textenv.prompts.sources import read_prompts
from textenv.prompts.tokenized import PromptTokenizer
from textenv.rewards.build import check_fields
from textenv.rewards.functions import FunctionReward
from textenv.training.data import read_rows
from textenv.training.loop import split_rows
from textenv.training.preferences import encode_rows
from textenv.training.reward_model import RewardConfig
from textenv.training.supervised import SupervisedConfig

pytestmark = pytest.mark.slow
FIELDS = [field.name for field in dataclasses.fields(TextGenConfig)]
MODEL = LanguageModel(tiny.language_model(), tiny.tokenizer(), (tiny.END,))
CONFIGS = [
    TrainConfig,
    TextConfig,
    ControlConfig,
    RewardConfig,
    SupervisedConfig,
    *(pair[0] for pair in ALGORITHMS.values()),
]


def ones(prompts, responses, **fields):
    """A reward that is always 1, whatever fields the prompts have."""
    return [1.0] * len(prompts)


BASE: dict[str, Any] = dict(
    reference=shared(MODEL), reward=ones, prompts=tiny.PROMPTS, max_prompt_tokens=16, max_new_tokens=3, device="cpu"
)


@many(4500)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JUNK, min_size=1, max_size=2))
def check_arguments(changes):
    try:
        assert isinstance(build_task(TextGenConfig(**(BASE | changes))), Task)
    except (Exception, SystemExit) as error:
        assert_refused(error, changes)


def test_arguments_of_the_environment():
    """Any values of any two arguments of `gym.make`."""
    check_arguments()


@many(2000)
@given(kind=st.sampled_from(CONFIGS), data=st.data())
def check_settings(kind, data):
    names = [field.name for field in dataclasses.fields(kind)]
    changes = data.draw(st.dictionaries(st.sampled_from(names), JUNK, min_size=1, max_size=2))
    try:
        made = kind(**changes)
    except (Exception, SystemExit) as error:
        assert_refused(error, (kind, changes))
        return
    json.dumps(dataclasses.asdict(made))  # as config.json of a run holds them


def test_settings_of_runs_and_training():
    """Any values of any two settings of a run, an algorithm, or a training: refused, or a config.json can hold them."""
    check_settings()


def flags():
    """Flags of the command line with any text."""
    names = [
        f"--{field.name.replace('_', '-')}" for kind in (*CONFIGS, GenerateConfig) for field in dataclasses.fields(kind)
    ]
    values = st.one_of(
        WORDS, SCALARS.map(str), st.sampled_from(["kl_coef=[", "a=", "=", "temperature=1e999", "reference=3"])
    )
    values = values.map(
        lambda text: text.encode("utf-8", "replace").decode().replace("\0", "")
    )  # as a system passes them
    pair = st.tuples(st.sampled_from([*names, "--env-arg", "--run", "--env", "--algorithm", "--prompt"]), values)
    return st.lists(pair, max_size=3).map(lambda pairs: [part for each in pairs for part in each])


@many(500)
@given(command=st.sampled_from(["train", "evaluate", "generate", "reward-model", "x", ""]), arguments=flags())
def check_command_line(command, arguments):
    try:
        command_line.main([command, *arguments])
    except SystemExit as stop:
        # argparse's and tyro's own code for a mistake in a flag; a sentence for any other
        assert stop.code in (0, 2) or str(stop.code).startswith("error: "), (command, arguments, stop)
    except Exception as error:
        raise AssertionError(f"{command} {arguments}: {error!r}") from error


def test_flags(monkeypatch, tmp_path, capsys):
    """Any texts for any flags of any command: it is run, or a sentence says why not. No training starts here."""
    monkeypatch.setattr(run, "train", lambda *settings: None)
    monkeypatch.chdir(tmp_path)
    check_command_line()
    assert list(tmp_path.iterdir()) == []


PROMPT_LINES = b'{"prompt": "2+2=", "answer": "4", "weight": 1.5}\n\n{"prompt": [{"role": "user", "content": "hi"}], "answer": null, "weight": 0}\n{"prompt": "na\xc3\xafve <end>", "answer": [1, {"a": 2}], "weight": 3}\n'
PAIR_LINES = b'{"prompt": "a", "chosen": "na\xc3\xafve", "rejected": "c"}\n{"chosen": "b", "rejected": "<end>"}\n\n{"prompt": "d", "chosen": "", "rejected": "e"}\n'
LABEL_LINES = b'{"text": "a", "label": 1}\n{"prompt": "b", "text": "c", "label": 0}\n{"text": "d", "label": 1, "more": {"a": [1]}}\n'


@pytest.fixture
def chat_tokenizer():
    """A tokenizer with a chat template."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}[a]"
    return tokenizer


def test_prompt_files(tmp_path, chat_tokenizer):
    """Damaged files of prompts: read, tokenized and fit for a reward, or refused. The file stays as it is."""
    path = tmp_path / "prompts.jsonl"
    tokenize = PromptTokenizer(chat_tokenizer, tiny.VOCABULARY, 64, chat=True)

    @many(1500)
    @given(content=damaged(PROMPT_LINES))
    def check(content):
        path.write_bytes(content)
        try:
            rows = read_prompts(path)
            check_fields(FunctionReward(ones, "ones"), rows.fields, rows.places)
            assert len(tokenize(rows.prompts, rows.places)) == len(rows.prompts)
        except (Exception, SystemExit) as error:
            assert_refused(error, content)
        assert path.read_bytes() == content

    check()


def test_training_files(tmp_path):
    """Damaged files of preferences and labels: read, split and tokenized, or refused."""
    path = tmp_path / "rows.jsonl"

    @many(1000)
    @given(content=st.sampled_from([PAIR_LINES, LABEL_LINES]).flatmap(damaged))
    def check(content):
        path.write_bytes(content)
        try:
            for part in split_rows(read_rows(path), 0.4, 0):
                assert encode_rows(tiny.tokenizer(), part, 16, tiny.VOCABULARY).sequences()
        except (Exception, SystemExit) as error:
            assert_refused(error, content)

    check()


def damaged_file(path: Path) -> st.SearchStrategy[bytes]:
    """The bytes of a file with damage; of JSON also with values replaced."""
    content = path.read_bytes()
    if path.suffix != ".json":
        return damaged(content)
    values = replaced_values(json.loads(content)).map(lambda value: json.dumps(value).encode())
    return damaged(content) | values | values


def test_model_folders(folders, tmp_path):
    """Damaged folders of models: the task plays an episode's first step, or the folder is refused."""
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]

    @many(300)
    @given(role=st.sampled_from(["reference", "reward"]), name=st.sampled_from(names), data=st.data())
    def check(role, name, data):
        source = Path(folders["gpt2" if role == "reference" else "gpt2_reward"])
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        if not (folder / name).exists():
            return
        content = data.draw(damaged_file(folder / name))
        (folder / name).write_bytes(content)
        try:
            assert isinstance(build_task(TextGenConfig(**(BASE | {role: str(folder)}))), Task)
        except (Exception, SystemExit) as error:
            assert_refused(error, (role, name, content[:300]))

    check()


def test_run_folders(tmp_path, monkeypatch, capsys):
    """Damaged run folders: evaluated and resumed, or refused in one line; nothing in the folder is lost."""
    monkeypatch.chdir(tmp_path)
    small = ["--num-envs", "1", "--steps", "4", "--minibatch-size", "4", "--evaluation-episodes", "1", "--hidden", "4"]
    fast = ["--iterations", "2", "--checkpoint-every", "1", "--epochs", "1", "--schedule", "constant"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["agents"])
        limit = ["--env-arg", "max_episode_steps=4"]
        command_line.main(["train", "--env", "CartPole-v1", "--run", str(whole), *small, *fast, *limit])
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    read = [path for path in files if path.suffix not in (".png", ".lock") and "tensorboard" not in path.parts]

    @many(200)
    @given(name=st.sampled_from(read), resume=st.booleans(), data=st.data())
    def check(name, resume, data):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        content = data.draw(damaged_file(folder / name))
        (folder / name).write_bytes(content)
        command = (
            ["train", "--run", str(folder), "--resume", "--iterations", "3"]
            if resume
            else ["evaluate", "--run", str(folder)]
        )
        try:
            command_line.main(command)
        except SystemExit as stop:
            assert str(stop.code).startswith("error: "), (command, name, content[:300], stop)
        except Exception as error:
            raise AssertionError(f"{command[0]}, {name} {content[:300]!r}: {error!r}") from error
        assert all((folder / path).exists() for path in files)

    check()
