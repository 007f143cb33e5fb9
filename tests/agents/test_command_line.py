"""The command line in real subprocesses, on a small run of the embedded task."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents.__main__ import main
from agents.config import TrainConfig
from agents.text.shading import shaded_responses
from agents.trainer import Trainer
from tests.support.learning import make_trainer
from textenv.rendering.text import NEGATIVE_COLORS, POSITIVE_COLORS

SHRUNK = [
    "--iterations",
    "3",
    "--rollout-size",
    "16",
    "--minibatch-size",
    "8",
    "--micro-batch-tokens",
    "400",
    "--evaluation-prompts",
    "12",
    "--checkpoint-every",
    "1",
    "--env-arg",
    "max_new_tokens=20",
    "--env-arg",
    "kl_coef=0.05",
    "--env-arg",
    "device=cpu",
    "--epochs",
    "2",
    "--seed",
    "5",
]
ROOT = Path(__file__).parents[2]
REVIEWS = ["--env-arg", "reference=reviews", "--env-arg", "reward=reviews"]


def agents(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """Run `python -m agents` in a folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "agents", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder in which a small run of the main job has written `runs/whole`."""
    folder = tmp_path_factory.mktemp("work")
    result = agents("train", "--run", "runs/whole", *SHRUNK, folder=folder)
    assert result.returncode == 0, result.stderr
    assert "score" in result.stdout and "KL" in result.stdout and "tokens/s" in result.stdout
    return folder


def test_the_main_job_writes_its_results(trained):
    """Training writes scalars, figures, samples and a summary, all of them readable."""
    run = trained / "runs/whole"
    summary = json.loads((run / "summary.json").read_text())
    expected = {"score_before", "score_after", "score_std_before", "gold_before", "gold_after"}
    assert expected | {"kl_per_response", "seconds", "tokens"} <= set(summary)
    assert summary["evaluation_prompts"] == 12 and summary["tokens"] > 0
    for picture in ("curves.png", "credit.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert {"score", "gold", "kl_per_response", "entropy", "policy_loss", "value_loss"} <= set(rows[0])
    assert list((run / "tensorboard").iterdir())
    samples = (run / "samples.md").read_text(encoding="utf-8")
    assert samples.count("\nBefore:") == samples.count("\nAfter:") == samples.count("### Prompt") >= 18
    assert f"| after | {summary['score_after']:+.2f} | {summary['gold_after']:+.2f} |" in samples


def test_the_actor_loads_with_transformers(trained):
    """The actor's folder loads in Transformers, with its tokenizer, and its weights differ from the reference's."""
    from textenv.reviews.weights import SUPERVISED

    folder = trained / "runs/whole/actor"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)("Review", return_tensors="pt")
    assert torch.isfinite(model(**tokens).logits).all()
    before = load_file(SUPERVISED / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_evaluate_repeats_the_evaluation(trained):
    """`evaluate` reproduces the numbers that training wrote."""
    result = agents("evaluate", "--run", "runs/whole", "--output", "again.json", folder=trained)
    assert result.returncode == 0, result.stderr
    again = json.loads((trained / "again.json").read_text())
    summary = json.loads((trained / "runs/whole/summary.json").read_text())
    assert again["score"] == pytest.approx(summary["score_after"], abs=1e-6)
    assert again["gold"] == pytest.approx(summary["gold_after"], abs=1e-6)
    assert again["kl_per_response"] == pytest.approx(summary["kl_per_response"], abs=1e-5)


def test_generate_answers_a_prompt(trained):
    """`generate` prints the requested number of responses, each with score and prompt."""
    prompt = "Review of the kettle"
    result = agents("generate", "--run", "runs/whole", "--prompt", prompt, "--samples", "2", folder=trained)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"] {prompt}") == 2 and result.stdout.count("[score ") == 2


def test_generate_colors_tokens(trained, monkeypatch, capsys):
    """`--color` prints the same responses with a legend, and tokens colored by penalty or advantage."""
    monkeypatch.chdir(trained)
    monkeypatch.delenv("NO_COLOR", raising=False)
    printed = {}
    for color in ("none", "penalty", "advantage"):
        main(["generate", "--run", "runs/whole", "--prompt", "Review of the kettle", "--color", color])
        printed[color] = capsys.readouterr().out
    for color in ("penalty", "advantage"):
        legend, _, rest = printed[color].partition("\n")
        assert legend.startswith(f"[{color}: blue below zero, red above, full color at ")
        assert re.sub(r"\x1b\[[0-9;]*m", "", rest) == printed["none"]
        # The largest value has full color, but may be that of the end token, which has no text.
        assert any(f"38;5;{code}m" in rest for code in (*NEGATIVE_COLORS, *POSITIVE_COLORS))
    assert printed["penalty"] != printed["advantage"]
    with pytest.raises(SystemExit, match="leave out --temperature"):
        main(["generate", "--run", "runs/whole", "--prompt", "a", "--color", "penalty", "--top-k", "5"])


def test_color_by_penalty_needs_a_penalty(settings):
    """Coloring by penalty is refused with kl_coef=0; the remedy is to color by advantage."""
    trainer = make_trainer(settings | dict(kl_coef=0))
    with pytest.raises(ValueError, match=r"kl_coef=0.*color them by advantage"):
        collector = trainer.collector
        shaded_responses(trainer.algorithm, collector, collector.prompts.select([0]), torch.Generator(), "penalty")


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(trained):
    """A run that is killed after its first checkpoint and resumed ends with the same actor, to the bit."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "agents", "train", "--run", "runs/killed", *SHRUNK]
    process = subprocess.Popen(command, cwd=trained, env=environment, stdout=subprocess.DEVNULL)
    while not (trained / "runs/killed/checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = agents(
        "train", "--resume", "--run", "runs/killed", folder=trained
    )  # no other flags: the settings come from the run
    assert result.returncode == 0, result.stderr
    whole, resumed = (load_file(trained / f"runs/{name}/actor/model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = (trained / "runs/killed/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["iteration"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((".05", 0.05), ("-.5", -0.5), ("5.", 5.0), ("+3", 3), ("True", True), ("False", False), ("None", None)),
        *(("0.05", 0.05), ("1e-3", 0.001), ("true", True), ("null", None), ('{"a:f": 1}', {"a:f": 1})),
        *(
            (plain, plain)
            for plain in ("cpu", "", "runs/a", "2024_01", "007", "(1, 2)", "1+2j", "'x'", "a b", "[[", "1 if", "{[1]}")
        ),
        ('"True"', "True"),  # quoted JSON is a string
    ],
)
def test_values_of_env_arg(text, value):
    """--env-arg takes JSON, and Python's numbers and words; anything else stays text."""
    parsed = TrainConfig(env_arg=(f"kl_coef={text}",)).env_arguments()["kl_coef"]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--run", "runs/whole"],
            "already exists; choose another --run, or continue it with --resume",
        ),
        (["train", "--resume", "--run", "runs/whole", "--seed", "6"], "another configuration"),
        (
            ["train", "--env", "CartPole-v1", "--algorithm", "dqn", "--buffer-size", "100000000000"],
            "a replay buffer of 100000000000 rows",
        ),
        (["train", "--resume", "--run", "runs/none"], "no run in 'runs/none'"),
        (["train", "--algorithm", "sarsa"], "no algorithm 'sarsa'; known are a2c"),
        (["train", "--env", "Nowhere-v0"], "gym.make cannot make 'Nowhere-v0'"),
        (["train", "--env-arg", "max_episode_steps=5"], "use max_new_tokens=N"),
        (["train", "--env-arg", "kl_coef=-1"], "kl_coef must be 0 or more"),
        (["train", *REVIEWS, "--env-arg", "prompts=none.jsonl"], "no prompts file at 'none.jsonl'"),
        (["train", "--env-arg", "prompts=none.jsonl"], "got prompts alone; give reference and reward too"),
        (["train", "--env-arg", "kl_coeff=1"], "TextGen-v0 has no argument 'kl_coeff'; did you mean 'kl_coef'?"),
        (["train", "--kl-horizon", "9"], "kl_horizon=9 would do nothing"),
        (["play", "--run", "runs/none"], "no run in 'runs/none'"),
        (["evaluate", "--run", "runs/none"], "no run in 'runs/none'"),
        (
            ["reward-model", "--base", "x/y", "--data", "none.jsonl", "--output", "runs/rm"],
            "no training data at 'none.js",
        ),
        (
            ["reward-model", "--base", "x/y", "--data", "pairs.jsonl", "--output", "runs/rm"],
            "no model configuration in",
        ),
        (["reward-model", "--base", "x/y", "--data", "pairs.jsonl", "--output", "runs"], "'runs' exists already"),
        (["generate", "--run", "runs/whole", "--prompt", " "], "prompt number 0 is empty"),
    ],
)
def test_mistakes_get_a_message(trained, monkeypatch, arguments, message):
    """A mistake ends in a one-line error message and changes no run folder."""
    before = sorted(trained.glob("runs/*"))
    (trained / "pairs.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": "c", "rejected": "d"}\n')
    monkeypatch.chdir(trained)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert str(end.value.code).startswith("error: ") and message in str(end.value.code)
    assert sorted(trained.glob("runs/*")) == before


def _in_place_of(stop: KeyboardInterrupt) -> RuntimeError:
    """What torch.save raises where a stop meets it: closing its file, it finds that bytes are missing."""
    error = RuntimeError("unexpected pos 258624 vs 258512")
    error.__context__ = stop
    return error


@pytest.mark.parametrize(
    ("stop", "code", "message"),
    [
        (ValueError("too far"), "error: too far", ""),
        (KeyboardInterrupt(), 130, "stopped."),
        (_in_place_of(KeyboardInterrupt(15)), 143, "stopped."),
    ],
    ids=["error", "interrupt", "interrupted library"],
)
def test_a_stopped_run_says_how_to_resume(tmp_path, monkeypatch, capsys, stop, code, message):
    """An error or interrupt after the first iteration prints how to resume, without a traceback.

    So does an interrupt in the place of which a library raises an error of its own.
    """
    resume = "The last checkpoint is good: continue from it with --run run --resume."
    iterate = Trainer._iterate

    def stopped(trainer, watch):
        if trainer.iteration == 1:
            raise stop
        return iterate(trainer, watch)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "_iterate", stopped)
    monkeypatch.setattr("agents.__main__.is_ours", lambda error: True)
    with pytest.raises(SystemExit) as end:
        main(["train", "--env", "CartPole-v1", "--run", "run", "--iterations", "2", "--evaluation-episodes", "1"])
    output = f"{end.value.code} {capsys.readouterr().err}"
    assert str(end.value.code).startswith(str(code)) and message in output and resume in output
    # What a stop has passed is let go, or threads that it has left waiting would keep the process from ending.
    assert not message or end.value.__context__ is None
    assert (tmp_path / "run/checkpoint.pt").exists()


@pytest.mark.filterwarnings("error")  # from TensorBoard's thread, if its file is not closed before it is removed
def test_only_new_runs_are_removed_when_they_fail(tmp_path, monkeypatch):
    """A new run that fails in its first iteration leaves no folder; a resumed run keeps its folder."""
    arguments = ["train", "--env", "CartPole-v1", "--iterations", "1", "--evaluation-episodes", "1"]

    def stopped(trainer, watch):
        raise failure

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "_iterate", stopped)
    monkeypatch.setattr("agents.__main__.is_ours", lambda error: True)
    failure = ValueError("too early")
    with pytest.raises(SystemExit, match="too early"):
        main([*arguments, "--run", "new"])
    assert not (tmp_path / "new").exists()
    failure = KeyboardInterrupt()
    with pytest.raises(SystemExit):
        main([*arguments, "--run", "kept"])
    failure = ValueError("again")
    with pytest.raises(SystemExit, match="again The last checkpoint is good"):
        main(["train", "--run", "kept", "--resume"])
    assert (tmp_path / "kept/checkpoint.pt").exists()


def test_a_run_whose_first_report_fails_leaves_no_folder(tmp_path, monkeypatch):
    """The report (a gold rater, say) may fail after the first update; the new run leaves no folder then either."""

    def fail(*_):
        raise ValueError("no gold")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("agents.control.experiment.ControlExperiment.report_metrics", fail)
    monkeypatch.setattr("agents.__main__.is_ours", lambda error: True)
    with pytest.raises(SystemExit, match="no gold"):
        main(["train", "--env", "CartPole-v1", "--iterations", "1", "--evaluation-episodes", "1", "--run", "new"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_every_flag_is_explained(capsys, algorithm):
    """`--help` explains every flag in words."""
    with pytest.raises(SystemExit):
        main(["train", "--algorithm", algorithm, "--help"])
    text = re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out)
    flags = re.split(r"\n\s*(?=--\w)", text.partition("--env ")[2])
    assert len(flags) > 20
    for flag in flags:
        help_text = re.sub(r"--[\w-]+|\(default:[^)]*\)", "", flag.partition("\n\n")[0])
        assert len(re.findall(r"\b[a-z]{2,}", help_text)) > 2, flag


def test_a_mistake_leaves_no_traceback(trained):
    """In a shell, a mistake gives exit code 1 and a one-line message without a traceback."""
    result = agents("evaluate", "--run", "runs/none", folder=trained)
    assert result.returncode == 1
    assert result.stderr.startswith("error: no run in") and "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [("--help",), pytest.param(("train", "--help"), marks=pytest.mark.slow)])
def test_a_reader_that_goes_away(arguments, tmp_path):
    """`... --help | head` ends as other commands do: exit code 141, and no word on standard error."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "agents", *arguments]
    ended = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")
