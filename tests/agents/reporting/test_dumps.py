"""`--dump-rollouts`: the files hold what the learner saw, to the bit, and one function reads them all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from agents.__main__ import main
from agents.algorithms.ppo import PPOConfig
from agents.config import TrainConfig
from agents.control.config import ControlConfig
from agents.reporting.dumps import Dumps, read_rollouts
from agents.run import build
from agents.text.rollout import PER_TOKEN
from agents.trainer import Trainer
from tests.support import tiny
from tests.support.learning import make_rollout, make_trainer
from tests.support.runs import resume, stop_after, train

FORMATS = ["jsonl", "parquet"]
ODD = ["<b>|x", "日本 \u2028", 7, -0.5, None, {"a": [1, {"b": None}]}, {}, [[]]]  # a prompt's field may be anything


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Pictures take most of the time of a small run, and have tests of their own."""
    monkeypatch.setattr("agents.reporting.plots.draw_curves", lambda *_: None)
    monkeypatch.setattr("agents.reporting.plots.draw_credit", lambda *_: None)


@pytest.fixture(scope="module")
def rollout(folders):
    """A prepared rollout of PPO whose prompts have a field; a token in the middle of a response is not generated."""
    prompts = [
        {"prompt": text, "odd": odd}
        for text, odd in zip([*tiny.PROMPTS, *map(str.upper, tiny.PROMPTS)], ODD, strict=True)
    ]
    settings = dict(reference=folders["gpt2"], reward=folders["gpt2_reward"], prompts=prompts, device="cpu")
    rollout = make_rollout(make_trainer(settings | dict(max_prompt_tokens=16, max_new_tokens=12, kl_coef=0.3)))
    rollout.data["mask"][int(rollout.data["mask"].sum(1).argmax()), 1] = False
    return rollout


@pytest.mark.parametrize("file_format", FORMATS)
def test_rows_are_the_rollout_to_the_bit(rollout, tmp_path, file_format):
    """Every number of every token of every response, texts, tokens and fields come back as they were."""
    pytest.importorskip("pyarrow")
    rollout.data["gold"] = torch.linspace(-1, 1, 8, dtype=torch.float64) / 3
    Dumps(tmp_path, 1, file_format, 0).write(3, rollout.rows())
    rows, data = list(read_rollouts(tmp_path)), rollout.data
    assert [(row["iteration"], row["row"]) for row in rows] == [(3, number) for number in range(8)]
    width, lengths = data["mask"].shape[1], set()
    for index, row in enumerate(rows):
        whole, real = data["input_ids"][index], data["attention_mask"][index].bool()
        assert torch.equal(torch.tensor(row["prompt_ids"] + row["response_ids"]), whole[real])
        assert len(row["prompt_ids"]) == int(real[:-width].sum())
        inside = real[-width:]
        lengths.add(int(inside.sum()))
        for name in PER_TOKEN:
            values = data[name][index][inside]
            read = torch.tensor(row[name], dtype=torch.float64 if name != "mask" else torch.bool)
            assert torch.equal(read, values.to(read.dtype)), name  # float32 in float64: exact
        assert (row["prompt"], row["response"]) == (rollout.prompts[index], rollout.scored.responses[index])
        assert row["fields"] == {"odd": ODD[index]} and row["finish_reason"] in ("stop", "length")
        assert [row[name] for name in ("score", "gold")] == [float(data[name][index]) for name in ("score", "gold")]
        assert sum(row["step_score"]) == row["score"]
    assert len(lengths) > 2 and any(False in row["mask"] for row in rows)


def test_both_formats_read_alike_in_one_folder(rollout, tmp_path):
    """A run may change its format when it goes on: the rows are equal, and come in the order of iterations."""
    pytest.importorskip("pyarrow")
    for iteration, file_format in ((100_000, "jsonl"), (2, "parquet"), (10, "jsonl")):
        Dumps(tmp_path, 1, file_format, 100_000).write(iteration, rollout.rows())
    rows = list(read_rollouts(tmp_path))
    assert [row.pop("iteration") for row in rows] == [2] * 8 + [10] * 8 + [100_000] * 8
    assert rows[:8] == rows[8:16] == rows[16:]


def test_what_is_no_json_is_a_text(rollout, tmp_path):
    """Prompts of a Python function may have fields of any type."""
    pytest.importorskip("pyarrow")
    row = next(rollout.rows()) | {"fields": {"where": Path("a/b"), "nan": float("nan")}}
    for file_format in FORMATS:
        Dumps(tmp_path / file_format, 1, file_format, 0).folder.parent.mkdir()
        Dumps(tmp_path / file_format, 1, file_format, 0).write(1, [row])
        (read,) = read_rollouts(tmp_path / file_format)
        assert read["fields"]["where"] == "a/b" and read["fields"]["nan"] != read["fields"]["nan"]


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_second_rollout_of_a_run_that_goes_on(folders, tmp_path, file_format):
    """Files of every second iteration, with gold scores; a resumed run writes those after its checkpoint again."""
    pytest.importorskip("pyarrow")
    settings = dict(reference=folders["gpt2"], reward=folders["gpt2_reward"], prompts=tiny.PROMPTS, device="cpu")
    flags = dict(iterations=5, checkpoint_every=3, tracker="none", gold=f"{__name__}:gold")
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Trainer, "_iterate", stop_after(Trainer._iterate, 4, SystemExit))
        train(folder, settings | dict(max_new_tokens=4), **flags, dump_rollouts=2, dump_format=file_format)
    first = list(read_rollouts(folder))
    assert [row["iteration"] for row in first] == [2] * 8 + [4] * 8
    assert all(row["gold"] == len(row["response"]) / 7 for row in first)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    mean = sum(row["gold"] for row in first[8:]) / 8
    assert metrics[3]["gold"] == pytest.approx(mean, rel=1e-12)
    later = folder / "rollouts" / f"00005.{file_format}"  # as with another N before
    later.write_bytes((folder / "rollouts" / f"00004.{file_format}").read_bytes())
    resume(folder)
    assert list(read_rollouts(folder)) == first and not (folder / "tensorboard").exists()


@pytest.mark.parametrize("file_format", FORMATS)
def test_rollouts_of_control(tmp_path, file_format):
    """A row is an environment: observations, actions, rewards, values and advantages of its steps, to the bit."""
    pytest.importorskip("pyarrow")
    config = TrainConfig(env="CartPole-v1", iterations=1, minibatch_size=8)
    experiment, trainer = build(config, ControlConfig(num_envs=3, steps=8), PPOConfig())
    (iteration,) = trainer.iterate()
    data = iteration.rollout.data
    Dumps(tmp_path, 1, file_format, 0).write(1, experiment.dump_rows(iteration.rollout))
    rows = list(read_rollouts(tmp_path))
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert {"observation", "action", "reward", "state_value", "advantage", "mask", "done"} <= rows[0].keys()
    for name, values in data.items():
        read = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        assert torch.equal(read, values.double()), name


def test_what_is_refused(tmp_path, monkeypatch):
    """A format without rollouts, an unknown format, a negative N, a missing package, and a folder without rollouts."""
    config, control = TrainConfig(env="CartPole-v1", dump_format="parquet"), ControlConfig()
    with pytest.raises(ValueError, match="dump_format='parquet' would do nothing: no rollout is written"):
        build(config, control, PPOConfig())
    with pytest.raises(ValueError, match="dump_format must be one of jsonl, parquet, got 'csv'"):
        TrainConfig(dump_format="csv", dump_rollouts=1)
    with pytest.raises(ValueError, match="dump_rollouts must be 0 or more, got -1"):
        TrainConfig(dump_rollouts=-1)
    with pytest.raises(ValueError, match=r"no rollouts in .*give a run folder of train --dump-rollouts 10"):
        read_rollouts(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SystemExit, match=r"error: --dump-format parquet needs PyArrow.*pip install 'textenv\[parquet\]'"
    ):
        main(["train", "--run", "run", "--dump-rollouts", "2", "--dump-format", "parquet"])
    assert not list(tmp_path.iterdir())


def gold(prompts, responses):
    """A gold rater whose numbers are no float32."""
    return [len(response) / 7 for response in responses]
