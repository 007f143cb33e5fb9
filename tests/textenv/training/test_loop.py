"""The shared loop: stopped and resumed trainings, held-out rows, progress."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback

from tests.support import tiny
from textenv.training.loop import (
    FINISHED,
    STARTED,
    WORK,
    Job,
    LoopConfig,
    check_training,
    pad_right,
    split_rows,
    started_with,
    train,
    training_arguments,
)
from textenv.training.muon import muon_for


@dataclass(frozen=True)
class Config:
    """Settings that a training needs."""

    learning_rate: float = 1e-2
    epochs: float = 2.5
    batch_size: int = 4
    gradient_accumulation: int = 1
    weight_decay: float = 0.01
    max_length: int = 8
    seed: int = 3


class _Halt(TrainerCallback):
    """Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def _run(job: Job | None, optimizer: str = "adamw", halt: int = -1, config: Config = Config(), dropout: bool = True):
    """Weights, and what `train` returns, of a tiny GPT-2 on 18 random rows: 5 steps an epoch, 13 in all."""
    rng, model = random.Random(0), tiny.language_model()  # with dropout, so random numbers have to go on too
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
    rows = [[rng.randrange(256) for _ in range(rng.randint(2, 8))] for _ in range(18)]

    def collate(batch):
        ids, mask = pad_right(batch)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    with nullcontext() if job is None else job.held(), training_arguments(config, len(rows), job) as arguments:
        optimizers = (muon_for(model, 1e-2, 1e-2) if optimizer == "muon" else None, None)
        trainer = Trainer(model, arguments, collate, rows, optimizers=optimizers, callbacks=[_Halt(halt)])  # type: ignore[arg-type]
        trained = train(trainer, job, lambda: {"held_out": float(model.lm_head.weight.detach().sum())})
    return nn.utils.parameters_to_vector(model.parameters()).detach(), trained


def _job(folder: Path, resume: bool = False, **started) -> Job:
    return Job(folder, started or {"seed": 3}, LoopConfig(resume=resume, save_every=3))


def _begin(job: Job) -> None:
    """A training that has begun, and whose process is gone."""
    with job.held():
        pass


@pytest.mark.parametrize(("optimizer", "halt"), [("adamw", 2), ("adamw", 11), ("muon", 4)])
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path: Path, optimizer: str, halt: int) -> None:
    """Stopped before its first checkpoint, within an epoch or in a later one: weights and history are the same."""
    whole, trained = _run(_job(tmp_path / "whole"), optimizer)
    with pytest.raises(KeyboardInterrupt) as stop:
        _run(_job(tmp_path / "cut"), optimizer, halt)
    assert "--resume" in str(stop.value.__notes__)
    saved = halt // 3 * 3
    assert [path.name for path in (tmp_path / "cut" / WORK).glob("checkpoint-*")] == [f"checkpoint-{saved}"][:saved]
    again, resumed = _run(_job(tmp_path / "cut", resume=True), optimizer)
    assert torch.equal(whole, again)
    for row in [*trained.history, *resumed.history]:
        assert row.pop("seconds") >= 0
    assert trained.history == resumed.history
    assert [row["step"] for row in trained.history if "held_out" in row] == list(range(14))
    assert [row["step"] for row in trained.history if "loss" in row] == list(range(1, 14))


def test_any_error_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that fails for any reason, such as a full disk, names --resume beside the reason."""

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(_Halt, "on_step_begin", fail)
    with pytest.raises(OSError, match="no space left") as failed:
        _run(_job(tmp_path))
    assert "Give --resume to go on with this training" in str(failed.value.__notes__)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError("archive"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        (SafetensorError("I/O error: No space left on device (os error 28)"), None),
    ],
)
def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error, cause) -> None:
    """A full disk is named as such whatever library meets it, with the folder, and how to go on."""

    def fail(*_, **__):
        raise error from cause

    monkeypatch.setattr(_Halt, "on_step_begin", fail)
    with pytest.raises(ValueError, match=r"the output folder .* cannot be written: No space left.*Make room") as failed:
        _run(_job(tmp_path))
    assert "Give --resume to go on with this training" in str(failed.value.__notes__)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """While a training goes on, nobody starts or resumes one in its folder; when it has stopped, it can be resumed."""
    job, resumed = _job(tmp_path), _job(tmp_path, resume=True)
    with job.held():
        for other in (job, resumed):
            with pytest.raises(ValueError, match=r"another process is training in .*; wait until it ends"):
                other.check()
        with pytest.raises(ValueError, match="another process is training in"), resumed.held():
            raise AssertionError("held twice")
    resumed.check()
    with resumed.held(), pytest.raises(ValueError, match="another process is training in"), job.held():
        raise AssertionError("held twice")
    with resumed.held():
        resumed.finish()
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="holds no training that was stopped"), resumed.held():
        raise AssertionError("resumed what another process has ended")
    assert not any(tmp_path.iterdir())


def test_a_look_leaves_nothing(tmp_path: Path) -> None:
    """A folder that holds something else is refused as it was, a subfolder of our name in it too."""
    (tmp_path / WORK).mkdir()
    (tmp_path / WORK / "own.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already and is not empty"):
        _job(tmp_path).check()
    assert [path.name for path in (tmp_path / WORK).iterdir()] == ["own.txt"]


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, and nothing is promised to go on with."""

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("textenv.training.loop.write_json", fail)
    with pytest.raises(ValueError, match="cannot be written: No space left") as failed, _job(tmp_path).held():
        raise AssertionError("begun")
    assert not getattr(failed.value, "__notes__", [])


def test_a_training_of_one_step_learns() -> None:
    """A warm-up that rounds up to one step would have a learning rate of 0 and be all there is."""
    before = nn.utils.parameters_to_vector(tiny.language_model().parameters()).detach()
    after, trained = _run(None, config=Config(epochs=0.2))
    assert [row["step"] for row in trained.history][-1] == 1
    assert 5e-3 < (after - before).abs().max() < 2e-2  # Adam's first step is the learning rate


def test_a_job_changes_no_weight(tmp_path: Path) -> None:
    """Checkpoints and measurements leave the weights as they are without."""
    assert torch.equal(_run(_job(tmp_path / "a"))[0], _run(None)[0])


def test_halves_of_a_batch_add_up() -> None:
    """Two forwards of half a batch take the optimizer step of the whole batch, up to rounding."""
    whole, halves = (_run(None, config=Config(epochs=0.2, gradient_accumulation=n), dropout=False)[0] for n in (1, 2))
    assert (whole - halves).abs().quantile(0.99) < 1e-4  # Adam's first step is ±1e-2; tiny gradients change their sign


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    """A process killed while it writes a checkpoint goes on from the one before."""
    whole, _ = _run(_job(tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        _run(_job(tmp_path / "b"), halt=7)
    part = tmp_path / "b" / WORK / "checkpoint-9"
    part.mkdir()
    assert _job(tmp_path / "b", resume=True).checkpoint() == part.with_name("checkpoint-6")
    (part / "trainer_state.json").write_text('{"global_step": 9, "log_hi')
    assert torch.equal(whole, _run(_job(tmp_path / "b", resume=True))[0])


@pytest.mark.parametrize("gone", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_a_file_is_passed_over(tmp_path: Path, gone: str) -> None:
    """The Trainer would go on without an optimizer or random numbers, to other weights: it starts anew, to the same."""
    whole, _ = _run(_job(tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        _run(_job(tmp_path / "b"), halt=4)
    (tmp_path / "b" / WORK / "checkpoint-3" / gone).unlink()
    assert _job(tmp_path / "b", resume=True).checkpoint() is None
    assert torch.equal(whole, _run(_job(tmp_path / "b", resume=True))[0])


def test_a_copy_of_a_checkpoint_is_none(tmp_path: Path) -> None:
    """A folder that someone put beside the checkpoints is left alone."""
    with pytest.raises(KeyboardInterrupt):
        _run(_job(tmp_path), halt=4)
    last = tmp_path / WORK / "checkpoint-3"
    shutil.copytree(last, last.with_name("checkpoint-backup"))
    assert _job(tmp_path, resume=True).checkpoint() == last


def _halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _without_seconds(file: Path) -> None:
    state = json.loads(file.read_text())
    del state["log_history"][0]["seconds"]
    file.write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", _halve),
        ("optimizer.pt", _halve),
        ("scheduler.pt", _halve),
        ("rng_state.pth", _halve),
        ("trainer_state.json", lambda file: file.write_text("5")),
        ("trainer_state.json", _without_seconds),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, damage) -> None:
    """A file of a checkpoint that cannot be read is refused with the folder to remove; then the training goes on."""
    with pytest.raises(KeyboardInterrupt):
        _run(_job(tmp_path), halt=4)
    last = tmp_path / WORK / "checkpoint-3"
    damage(last / name)
    with pytest.raises(ValueError, match=rf"{name}' is damaged; remove the folder '.*checkpoint-3', and --resume"):
        _job(tmp_path, resume=True).check()
    shutil.rmtree(last)
    _job(tmp_path, resume=True).check()


def test_a_kill_while_a_training_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the removal of checkpoints is cut short, the training is finished; the next command removes the rest."""
    _begin(_job(tmp_path))
    (tmp_path / "model.safetensors").write_text("result")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        _job(tmp_path).finish()
    assert (tmp_path / FINISHED / STARTED).exists()
    with pytest.raises(ValueError, match="is finished, and its last checkpoint is now removed; use the results"):
        _job(tmp_path, resume=True).check()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(ValueError, match="exists already and is not empty"):
        _job(tmp_path).check()


def test_a_kill_while_a_training_begins(tmp_path: Path) -> None:
    """Killed before it noted what it was started with, a training counts as none: the same command starts it."""
    for left in ((), (f"{STARTED}.new", ".lock")):
        (tmp_path / WORK).mkdir()
        for name in left:
            (tmp_path / WORK / name).write_text('{"se')
        with pytest.raises(ValueError, match="holds no training that was stopped"):
            _job(tmp_path, resume=True).check()
        (tmp_path / WORK).mkdir()
        _job(tmp_path).check()
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", '{"data": "ab', "[1]", "5"])
def test_a_damaged_note_of_the_start(tmp_path: Path, content: str) -> None:
    """What a training was started with is read as a whole, or refused in a sentence."""
    _begin(_job(tmp_path))
    (tmp_path / WORK / STARTED).write_text(content)
    with pytest.raises(ValueError, match=r"started_with.json' is damaged, .*; start it anew, in another output folder"):
        _job(tmp_path, resume=True).check()


def test_a_finished_loop_resumes_to_its_end(tmp_path: Path) -> None:
    """Killed after the last step and before the results were written, a training ends with the same weights."""
    whole, trained = _run(_job(tmp_path / "a"))
    again, resumed = _run(_job(tmp_path / "a", resume=True))
    assert torch.equal(whole, again) and len(resumed.history) == len(trained.history)
    _job(tmp_path / "a").finish()
    assert not any((tmp_path / "a").iterdir())


def test_what_may_be_written_and_resumed(tmp_path: Path) -> None:
    """Nothing is overwritten, and a training goes on only with what it was started with."""
    new, old = _job(tmp_path / "new"), _job(tmp_path / "old", data="abc", settings={"seed": 1, "rate": 0.5})
    new.check()
    assert not new.output.exists()
    _begin(old)
    with pytest.raises(ValueError, match="holds a training that was stopped; give --resume"):
        _job(tmp_path / "old").check()
    _job(tmp_path / "old", True, settings={"rate": 0.5, "seed": 1}, data="abc").check()
    with pytest.raises(ValueError, match=r"started with settings.seed = 1, and now it is 2"):
        _job(tmp_path / "old", True, data="abc", settings={"seed": 2, "rate": 0.5}).check()
    with pytest.raises(ValueError, match=r"started with data = 'abc', and now it is None"):
        _job(tmp_path / "old", True, settings={"seed": 1, "rate": 0.5}).check()
    with pytest.raises(ValueError, match="holds no training that was stopped"):
        _job(tmp_path / "new", True).check()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("precious")
    with pytest.raises(ValueError, match="exists already and is not empty"):
        _job(tmp_path / "full").check()


def test_what_a_training_is_started_with(tmp_path: Path) -> None:
    """The contents of the data and of a base count, not their names."""
    folder, data = Path(tiny.save(tiny.language_model(), tmp_path / "base")), tmp_path / "d.jsonl"
    data.write_text("{}\n")
    before = started_with(data, folder, Config())
    assert before == started_with(data, folder, Config()) and json.dumps(before)
    data.write_text("{} \n")
    assert started_with(data, folder, Config())["data"] != before["data"]
    tiny.save(tiny.language_model(seed=1), folder)
    after = started_with(data, folder, Config())["base"]
    assert after.pop("model.safetensors") != before["base"].pop("model.safetensors") and after == before["base"]
    assert started_with(data, "some/model", Config())["base"] == "some/model"


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    """A diverged training ends in a sentence, not in a folder of useless weights."""
    with pytest.raises(ValueError, match=r"training loss is nan at step .*lower learning_rate"):
        _run(_job(tmp_path / "a"), config=Config(learning_rate=1e30))


def test_progress_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of held-out numbers, which a log file can hold."""
    _run(_job(tmp_path / "a"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14 and lines[0].startswith("step 0 of 13: held out ")


def test_gradient_accumulation_divides_the_batch() -> None:
    """A batch is split into equal parts."""
    with pytest.raises(ValueError, match="batch_size must be a multiple of gradient_accumulation, got 4 and 3"):
        check_training(Config(gradient_accumulation=3))


def test_chats_with_one_prompt_stay_together() -> None:
    """A chat is a prompt like a text: whole on one side of the split."""
    rows = [{"prompt": [{"role": "user", "content": str(i % 10)}], "chosen": str(i)} for i in range(40)]
    training, held_out = split_rows(rows, 0.3, seed=0)
    contents = [{row["prompt"][0]["content"] for row in part} for part in (training, held_out)]
    assert len(contents[1]) == 3 and not contents[0] & contents[1]
