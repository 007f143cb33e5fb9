"""Flags are read into settings, the text environment's too, and a mistake in them is named with the right place."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import pytest

from agents.__main__ import main
from agents.commands.baselines import best_of_n_command, dpo_command
from agents.commands.flags import PREFIX, flags_named, read
from agents.commands.jobs import job_command
from agents.presets import defaults
from tests.support import tiny
from tests.support.runs import SIZES, saved, train
from textenv import TextGenConfig
from textenv.env import TextGenEnv

ROOT = Path(__file__).parents[3]


class Short(TextGenEnv):
    """An environment with a default and a setting of its own."""

    def __init__(self, max_new_tokens=7, mood="good", **settings):
        super().__init__(max_new_tokens=max_new_tokens, **settings)


gym.register("Short-v0", Short, kwargs={"temperature": 0.9})


def parts_of(*arguments: str) -> tuple:
    """The three parts of the configuration that `train` would be called with."""
    got = []
    command = job_command(arguments, lambda *parts: got.append(parts), "Train.", "textenv train")
    read(command, arguments, "textenv train")()
    return got[0]


def arguments_of(*arguments: str) -> dict:
    """The environment's arguments."""
    return parts_of(*arguments)[0].env_arguments()


def refused(*arguments: str) -> str:
    """The sentence that a command line ends in."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments), prog="textenv")
    return str(end.value.code)


def printed(capsys, *arguments: str) -> str:
    """What is said where tyro ends a command, without its box."""
    with pytest.raises(SystemExit):
        main(list(arguments), prog="textenv")
    output = capsys.readouterr()
    return " ".join(re.sub("[│╭╮╰╯─]", " ", output.out + output.err).split())


# ---- the text environment's settings


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        (["--env.kl-coef", "0.05"], {"kl_coef": 0.05}),
        (["--env.kl_coef=5e-2"], {"kl_coef": 0.05}),
        (["--env.chat"], {"chat": True}),
        (["--env.no-chat"], {"chat": False}),
        (["--env.score-clip", "None"], {"score_clip": None}),
        (["--env.reference", "a/b", "--env.max-new-tokens", "5"], {"reference": "a/b", "max_new_tokens": 5}),
        (["--env.reward", '{"a:f": 1}'], {"reward": {"a:f": 1}}),
        (["--env.stop-token-ids", "[1, 2]"], {"stop_token_ids": [1, 2]}),
        (
            ["--env.chat-template-kwargs", '{"enable_thinking": false}'],
            {"chat_template_kwargs": {"enable_thinking": False}},
        ),
        (["--env.kl-coef", "1", "--env.kl-coef", "2"], {"kl_coef": 2}),
        (["--env-arg", "chat=True", "--env.kl-coef", "2"], {"chat": True, "kl_coef": 2}),
    ],
)
def test_a_setting_is_an_argument_of_the_environment(flag, value):
    """`--env.NAME VALUE` beside `--env ID` is what `--env-arg NAME=VALUE` is, so that a run has one truth."""
    assert arguments_of("--env", "TextGen-v0", *flag) == value


@pytest.mark.parametrize(("name", "command"), [("dpo", dpo_command), ("best_of_n", best_of_n_command)])
def test_baselines_take_them_too(name, command, monkeypatch):
    """What a run is held against is measured in the same environment, named by the same flags."""
    got = []
    monkeypatch.setattr(f"agents.commands.baselines.{name}", lambda config, where, *_: got.append(where.arguments()))
    flags = ["--output", "x", "--env.kl-coef", "0.05", "--env.reference=a/b", "--env-arg", "chat=True"]
    read(command(flags, name), flags, name)()
    assert got == [{"kl_coef": 0.05, "reference": "a/b", "chat": True}]


def test_names_stay_texts():
    """A folder that looks like a number is a name, as with --env-arg."""
    config = parts_of("--env.reference", "007", "--env.reward", "reviews", "--env.prompts", "12")[0]
    assert config.env_arguments(texts=("reference", "prompts"))["prompts"] == "12"


def test_flags_replace_the_presets_arguments():
    """GRPO's preset has groups of four; one's own size takes its place in config.json, and is not written beside it."""
    assert parts_of("--algorithm", "grpo")[0].env_arg == ("group_size=4",)
    assert parts_of("--algorithm", "grpo", "--env.group-size", "8")[0].env_arg == ("group_size=8",)


def test_the_preset_follows_the_flags():
    """Another reference has the field's rates, however it is given."""
    by_flag, by_item = (parts_of(*way)[0] for way in (["--env.reference=x"], ["--env-arg", "reference=x"]))
    assert (
        by_flag == by_item
        and by_flag.learning_rate == defaults("TextGen-v0", "ppo", {"reference": "x"})[0].learning_rate
    )


def test_help_has_every_setting_of_the_environment(capsys):
    """With its comment and the default that holds: the class's, the registration's, or --env-arg's."""
    said = printed(capsys, "train", "--env", "Short-v0", "--env-arg", "kl_coef=0.3", "--help")
    for field in fields(TextGenConfig):
        start = said.index(
            f"{PREFIX}{field.name.replace('_', '-')} " if field.type != "bool" else f"{PREFIX}{field.name},"
        )
        text = said[start:].partition("(default:")[0]
        assert len(re.findall(r"\b[a-z]{2,}", text.partition(" ")[2])) > 3, text
    shown = dict(re.findall(r"--env\.([\w-]+) [A-Z|{}a-zN]+ .*?\(default: (.*?)\)", said))
    assert (shown["max-new-tokens"], shown["temperature"], shown["kl-coef"]) == ("7", "0.9", "0.3")
    groups = [said.index(f"{name} options") for name in ("run", "env", "text", "ppo")]
    assert groups == sorted(groups)


def test_both_ways_at_once_are_refused():
    """Which of the two would count is not to be guessed."""
    message = refused("train", "--env-arg", "kl_coef=0.1", "--env.kl-coef", "0.2")
    assert message.startswith("error: kl_coef is given twice, as --env-arg kl_coef=... and as --env.kl-coef 0.2; leave")


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["train", "--kl-coef", "0.05"],
            "--kl-coef is a setting of the environment: write --env.kl-coef 0.05. See textenv train",
        ),
        (["train", "--no-chat"], "--no-chat is a setting of the environment: write --env.no-chat."),
        (["profile", "--reference=x"], "write --env.reference x. See textenv profile --help."),
        (
            ["train", "--gradient-steps", "3"],
            "--gradient-steps is a setting of dqn, sac, and this run's algorithm is ppo",
        ),
        (["train", "--num-envs", "3"], "--num-envs is a setting for environments other than text, and this run's"),
        (
            ["train", "--env", "CartPole-v1", "--rollout-size", "3"],
            "--rollout-size is a setting for text, and this run's",
        ),
        (
            ["train", "--env", "CartPole-v1", "--env.x-y", "3"],
            "CartPole-v1 is none; give its arguments as --env-arg x_y=VALUE",
        ),
        (
            ["train", "--env", "CartPole-v1", "--kl-coef", "3"],
            "is a setting of text environments, and CartPole-v1 is none",
        ),
        (["dpo", "--output", "x", "--kl-coef=1"], "write --env.kl-coef 1. See textenv dpo --help."),
        (["best-of-n", "--output", "x", "--no-chat"], "write --env.no-chat. See textenv best-of-n --help."),
        (["best-of-n", "--output", "x", "--env", "CartPole-v1"], "--env must be an environment of text"),
        (["dpo", "--output", "x", "--env-arg", "chat=True", "--env.chat"], "chat is given twice"),
        (["dpo", "--output", "x", "--beta", "1", "--env.kl-coef", "1"], "--beta and --env.kl-coef are the same β"),
        (["dpo", "--output", "x", "--base", "a", "--env.reference", "b"], "--base and --env.reference name the same"),
        (
            ["train", "--iterations", "0"],
            "iterations must be at least 1, got 0. On the command line: --iterations. See",
        ),
        (["train", "--env.kl-coef", "-1"], "kl_coef must be 0 or more, got -1.0"),
        (
            ["generate", "--run", "x", "--prompt", "a", "--samples", "0"],
            "samples must be at least 1, got 0. See textenv generate",
        ),
        (["trian"], "no command 'trian'; did you mean 'train'? See textenv --help."),
        (["zzz"], "no command 'zzz'; known are train, view, evaluate"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, says):
    """It names the flag or the setting, where that goes, and the page of help that has it."""
    assert refused(*arguments).startswith("error: ") and says in refused(*arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--iteratoins", "3"], ["Perhaps you meant: --iterations", "run textenv train --help"]),
        (["train", "--env.kl-coeff", "3"], ["Perhaps you meant: --env.kl-coef FLOAT", "run textenv train --help"]),
        (["train", "--env.kl-coef", "much"], ["Error parsing --env.kl-coef", "see textenv train --help"]),
        (["generate"], ["Missing from textenv generate: --run", "--prompt"]),
    ],
)
def test_a_mistake_in_a_flag_is_named_by_it(capsys, arguments, says):
    """A typo gets the likeliest flag, and a value of another type its flag; nothing of the parser's insides is shown."""
    said = printed(capsys, *arguments)
    assert all(words in said for words in says) and "tyro" not in said


def test_of_several_processes_one_tells(capsys, monkeypatch):
    """Under torchrun the others end without a word."""
    monkeypatch.setenv("RANK", "1")
    for arguments in (["train", "--iterations", "0"], ["train", "--iteratoins", "3"]):
        assert printed(capsys, *arguments) == ""


# ---- the settings of another run


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory) -> Path:
    """A finished run, started in its folder's parent with relative names."""
    parent = tmp_path_factory.mktemp("first")
    (parent / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in tiny.PROMPTS))
    settings = dict(reference=folders["gpt2"], reward=folders["gpt2_reward"], prompts="prompts.jsonl")
    settings |= dict(max_prompt_tokens=16, max_new_tokens=4, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(parent)
        patch.setattr("agents.reporting.plots.draw_curves", lambda *_: None)
        patch.setattr("agents.reporting.plots.draw_credit", lambda *_: None)
        train(Path("run"), settings, iterations=1)
    return parent / "run"


def test_the_same_run_again(finished, tmp_path, monkeypatch):
    """From another folder, and by a copy of the file alone: equal to the bit, in a folder of its own."""
    from tests.support.learning import same

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("agents.reporting.plots.draw_curves", lambda *_: None)
    monkeypatch.setattr("agents.reporting.plots.draw_credit", lambda *_: None)
    Path("mine.json").write_bytes((finished / "config.json").read_bytes())
    main(["train", "--config", "mine.json", "--run", "again"])
    assert same(saved(finished), saved(Path("again")))
    before, after = (json.loads((folder / "config.json").read_bytes()) for folder in (finished, Path("again")))
    assert {name: before[name] for name in ("settings", "algorithm")} == {
        name: after[name] for name in ("settings", "algorithm")
    }
    assert [*(finished.parent / "run").iterdir()] and after["directory"] == str(tmp_path)


def test_flags_beside_a_configuration_override_it(finished, tmp_path, monkeypatch):
    """Settings of the environment too; the run's folder and --resume are not taken over."""
    monkeypatch.chdir(tmp_path)
    for source in (finished, finished / "config.json"):
        config, settings, _ = parts_of(
            "--config", str(source), "--seed", "4", "--env.kl-coef", "0.5", "--rollout-size", "4"
        )
        assert (config.run, config.resume, config.seed, settings.rollout_size) == (None, False, 4, 4)
        arguments = config.env_arguments()
        assert (arguments["kl_coef"], arguments["prompts"]) == (0.5, str(finished.parent / "prompts.jsonl"))
        assert len(config.env_arg) == len(arguments)
        assert (config.iterations, config.minibatch_size) == (1, SIZES["minibatch_size"])


def test_misuse_of_a_configuration(finished, tmp_path, monkeypatch):
    """Each is refused in a sentence with the remedy."""
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text('{"model_type": "gpt2"}')
    for arguments, says in (
        (["--config", "none"], "no configuration at 'none'; --config takes a run folder, or its config.json"),
        (["--config", "other.json"], "'other.json' is not a configuration that this version can read"),
        (["--config", "."], "no run in '.' (no config.json)"),
        (
            ["--config", str(finished), "--algorithm", "grpo"],
            "of a run of ppo, whose settings do not fit --algorithm grpo",
        ),
        (["--config", str(finished), "--env", "CartPole-v1"], "whose settings do not fit --env CartPole-v1"),
        (["--config", str(finished), "--run", "x", "--resume"], "leave --config out"),
        (["--config", str(finished), "--minibatch-size", "3"], "minibatch_size must divide rollout_size"),
    ):
        assert says in refused("train", *arguments), arguments
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


@pytest.mark.parametrize(
    ("arguments", "sentence", "flags"),
    [
        (["train"], "kl_coef must be a finite number, got nan", "--env.kl-coef"),
        (["dpo"], "max_prompt_tokens + max_new_tokens = 65", "--env.max-prompt-tokens, --env.max-new-tokens"),
        (["train"], "temperature must be above 0, got 0.0; rollout_size", "--env.temperature, --rollout-size"),
        (["train"], "the reward of this temperature; give reward='reviews'", "--env.reward"),
        (["train", "--env", "CartPole-v1"], "kl_coef is no argument, and num_envs must be", "--num-envs"),
        (["train", "--env", "Nothing-v7"], "minibatch_size must", "--minibatch-size"),
        (["train"], "give --env.kl-coef 0.1 or so, for kl_coef is 0", None),
        (["train"], "the file is damaged", None),
        (["supervised"], "max_prompt_tokens is none of its settings, and max_length is", "--max-length"),
        (["dpo"], "held_out_pairs must lie in (0, 1), and rollout_size is none", "--held-out-pairs"),
        (["best-of-n"], "samples must be 1 or more; kl_coef", "--samples, --env.kl-coef"),
        (["train"], "the run folder 'runs/kl_coef=0.02' already exists", None),
        ([], "kl_coef", None),
    ],
)
def test_errors_name_flags(arguments, sentence, flags):
    """An error speaks of settings, which are arguments in Python too; on the command line their flags follow."""
    assert flags_named(arguments, sentence) == ("" if flags is None else f"On the command line: {flags}.")


def test_an_error_of_the_command_line_ends_in_its_flag():
    """After the sentence, and before where to read on."""
    message = refused("train", "--env.temperature", "0")
    assert message.endswith("own distribution. On the command line: --env.temperature. See textenv train --help.")
