"""The loop that all trainings from data share: Transformers' Trainer, with progress, checkpoints and held-out numbers.

With a job, a training keeps its last checkpoint in the subfolder `training` of its output folder. A training that was
stopped goes on from there, to the same bits as one that was not; `finish` removes the subfolder once the results are
written. A kill at any moment leaves a training to go on with, one that is finished, or none. Without a job nothing is
written. One process trains, on one device.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from textenv.models.loading import quietly, without_report
from textenv.settings import check_new_folder, check_types
from textenv.training.checkpoints import last_checkpoint, read_started
from textenv.training.files import LOCK, UNFINISHED, check_unlocked, locked, no_room, write_json

WORK = "training"  # subfolder of the output folder for what a training needs to go on
STARTED = "started_with.json"  # in WORK: data, base and settings
FINISHED = "training.finished"  # WORK while it is removed: the results are written
MEASUREMENTS = 10  # on held-out rows during a training, besides the one before it
LOGGED = 50  # training losses on the curve of a training with a job
LINE_SECONDS = 10  # between lines of progress where there is no terminal

Row = dict[str, Any]
Measure = Callable[[], Mapping[str, float]]  # numbers on held-out rows, of the model as it is


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How a training is run. Nothing here changes the weights that come out."""

    resume: bool = False  # go on with the stopped training in the output folder, from its last checkpoint
    save_every: int = 200  # optimizer steps between checkpoints; each takes the place of the one before

    def __post_init__(self) -> None:
        check_types(self)
        if self.save_every < 1:
            raise ValueError(f"save_every must be 1 or more, got {self.save_every}.")


LOOP = LoopConfig()


@dataclass(frozen=True)
class Job:
    """A training that has an output folder."""

    output: Path
    started_with: Mapping[str, Any]  # JSON: data, base, and the settings that the weights depend on
    loop: LoopConfig = LOOP

    @property
    def work(self) -> Path:
        """The folder of checkpoints."""
        return self.output / WORK

    def check(self, compare: bool = True) -> None:
        """Raise ValueError for an output folder that this training must not write to. Creates nothing.

        Or where the library is missing that runs it. compare: a resumed training with what it was started with.
        """
        if find_spec("accelerate") is None:
            raise ValueError("training needs accelerate; install it with: pip install 'textenv[reward-model]'.")
        check_unlocked(self.work)
        finished = self._sweep()
        if self.loop.resume:
            self._check_started(finished)
            if compare:
                self._check_same()
                self.checkpoint()  # a damaged one is refused before a model is loaded
        else:
            self._check_not_started()
            check_new_folder(self.output, "output folder")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the folder of checkpoints until the block ends, and tell how to go on after it.

        A new training begins with it: only now is the folder created, with what the training was started with. Raises
        ValueError while another process trains there, and for a full disk.
        """
        self.check(compare=False)  # another process may have begun or ended here since this one looked
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            with locked(self.work):
                if self.loop.resume:
                    self._check_started(finished=False)
                else:
                    self._check_not_started()
                    write_json(self.work / STARTED, self.started_with)
                yield
        except (KeyboardInterrupt, Exception) as error:
            full = no_room(error)
            if full is None and isinstance(error, ValueError):
                raise  # it would come again
            shown: BaseException = error
            if full is not None:
                place = f"the output folder {str(self.output)!r} cannot be written"
                shown = ValueError(f"{place}: {full.strerror}. Make room on that disk.")
            if os.path.isfile(self.work / STARTED):
                shown.add_note("Give --resume to go on with this training.")
            if shown is error:
                raise
            raise shown from error

    def checkpoint(self) -> Path | None:
        """The last whole checkpoint, to resume from: a process may be killed while it writes one."""
        return last_checkpoint(self.work) if self.loop.resume else None

    def finish(self) -> None:
        """Remove the checkpoints, when the results are written."""
        finished = self.output / FINISHED
        self.work.rename(finished)  # a checkpoint with half of its files must not look like one to go on from
        shutil.rmtree(finished)

    def _sweep(self) -> bool:
        """Remove what a kill left of a training that ended or had not begun. Returns whether one had ended."""
        finished = os.path.isdir(self.output / FINISHED)
        if finished:
            shutil.rmtree(self.output / FINISHED, ignore_errors=True)
        if self._has_not_begun():
            with locked(self.work):
                if self._has_not_begun():  # still: nobody can begin now
                    shutil.rmtree(self.work, ignore_errors=True)
        return finished

    def _has_not_begun(self) -> bool:
        return os.path.isdir(self.work) and set(os.listdir(self.work)) <= {LOCK, f"{STARTED}{UNFINISHED}"}

    def _check_not_started(self) -> None:
        if os.path.isfile(self.work / STARTED):
            raise ValueError(
                f"{str(self.output)!r} holds a training that was stopped; give --resume to go on with it, or choose "
                "another output folder."
            )

    def _check_started(self, finished: bool) -> None:
        if finished:
            raise ValueError(
                f"the training in {str(self.output)!r} is finished, and its last checkpoint is now removed; use the "
                "results in that folder."
            )
        if not os.path.isfile(self.work / STARTED):
            raise ValueError(
                f"{str(self.output)!r} holds no training that was stopped, so there is nothing to resume; leave "
                "--resume out, or name the output folder that the training was started with."
            )

    def _check_same(self) -> None:
        before, now = _flat(read_started(self.work / STARTED)), _flat(self.started_with)
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"the training in {str(self.output)!r} was started with {name} = {before.get(name)!r}, and now it "
                    f"is {now.get(name)!r}; resume with what it was started with, or choose another output folder."
                )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Values by dotted name, as JSON would give them back."""
    if not isinstance(value, Mapping):
        return {name: json.loads(json.dumps(value))}
    parts = [_flat(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()]
    return {key: item for part in parts for key, item in part.items()}


def started_with(data: Path, base: str | Path, config: Any) -> dict[str, Any]:
    """What decides the weights of a training: contents of the data and of the base, and the settings, a dataclass."""
    folder = Path(base)
    local = folder.glob("*") if os.path.isdir(folder) else ()  # a name that is too long is no folder
    files = sorted(path for path in local if path.suffix in (".safetensors", ".json", ".jinja"))
    hashes = {path.name: file_hash(path) for path in files if os.path.isfile(path)}
    return {"data": file_hash(data), "base": hashes or str(base), "settings": asdict(config)}


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_training(config: Any) -> None:
    """Raise ValueError for settings of a training that are out of range."""
    for name in ("learning_rate", "epochs", "batch_size", "gradient_accumulation", "max_length"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}.")
    if config.batch_size % config.gradient_accumulation:
        raise ValueError(
            f"batch_size must be a multiple of gradient_accumulation, got {config.batch_size} and "
            f"{config.gradient_accumulation}."
        )
    if config.weight_decay < 0:
        raise ValueError(f"weight_decay must be 0 or more, got {config.weight_decay}.")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed must be 0 or more and below 2^32, got {config.seed}.")


@contextmanager
def training_arguments(config: Any, rows: int, job: Job | None = None, **more: Any) -> Iterator[TrainingArguments]:
    """The Trainer's arguments for a training on `rows` rows; without a job, for the time of the block.

    config: the settings that `check_training` checks. more: further arguments. Raises ValueError where several GPUs
    would multiply the batch.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder if job is None else str(job.work),
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            # The first step of a warm-up has a learning rate of 0, which would be all of a training of one step.
            warmup_steps=0.05 if total_steps(config, rows) >= 20 else 0,
            adam_beta2=0.95,  # runs are short, so the second moment must forget the gradients of the first steps
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size // config.gradient_accumulation,
            gradient_accumulation_steps=config.gradient_accumulation,
            weight_decay=config.weight_decay,
            seed=config.seed,
            bf16=torch.cuda.is_available(),  # autocast over float32 weights
            logging_nan_inf_filter=False,  # a loss that is not finite stops the training
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=not sys.stdout.isatty(),
            **_intervals(config, rows, job),
            **more,
        )
        if arguments.n_gpu > 1:
            raise ValueError(f"training uses one GPU, and {arguments.n_gpu} are visible; set CUDA_VISIBLE_DEVICES=0.")
        yield arguments


def total_steps(config: Any, rows: int) -> int:
    """The optimizer steps of a training on `rows` rows."""
    return math.ceil(config.epochs * math.ceil(rows / config.batch_size))


def _intervals(config: Any, rows: int, job: Job | None) -> dict[str, Any]:
    """When losses are logged and checkpoints written. A checkpoint falls on a logged step: half a mean is not saved."""
    if job is None:
        return {"logging_steps": 100, "save_strategy": "no"}
    save = job.loop.save_every
    wanted = max(1, total_steps(config, rows) // LOGGED)
    log = next(steps for steps in range(min(save, wanted), 0, -1) if save % steps == 0)
    return {"logging_steps": log, "save_strategy": "steps", "save_steps": save, "save_total_limit": 1}


@dataclass(frozen=True)
class Trained:
    """What came of a training besides the weights."""

    loss: float  # mean training loss over the steps since the training was started or resumed
    history: list[Row]  # {step, seconds, loss} and {step, seconds, held-out numbers}, in order, resumed or not
    seconds: float  # of the whole training, resumed or not


def train(trainer: Trainer, job: Job | None = None, measure: Measure | None = None) -> Trained:
    """Run the trainer, from the last checkpoint if the job says so.

    measure: called before training, about ten times during it and at its end. It must not change the model or draw
    random numbers. Raises ValueError for a loss that is not finite.
    """
    trainer.remove_callback(PrinterCallback)  # where there is no terminal; _Progress takes its place
    trainer.add_callback(_Progress(measure))
    with quietly(), without_report():  # bars of files written; of tied weights, saved once, the second is "missing"
        output = trainer.train(resume_from_checkpoint=None if job is None else _path(job.checkpoint()))
    if not math.isfinite(output.training_loss):
        raise ValueError(_not_finite(output.training_loss, trainer.state.global_step))
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)  # forward without autocast again
    history = [row for row in trainer.state.log_history if "train_runtime" not in row]
    kept = [{name: value for name, value in row.items() if name not in ("grad_norm", "epoch")} for row in history]
    return Trained(output.training_loss, kept, history[-1]["seconds"] if history else 0.0)


def _not_finite(loss: float, step: int) -> str:
    return (
        f"the training loss is {loss} at step {step}; lower learning_rate, or look for broken rows in the data, and "
        "choose another output folder."
    )


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


class _Progress(TrainerCallback):
    """Measures on held-out rows, notes the time, and prints a line now and then where there is no terminal."""

    def __init__(self, measure: Measure | None) -> None:
        self.measure = measure
        self.started = self.printed = time.perf_counter()
        self.before = 0.0  # seconds until the checkpoint that a resumed training goes on from
        self.lines = not sys.stdout.isatty()

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = state.log_history[-1]["seconds"] if state.log_history else 0.0
        if state.global_step == 0:
            self._measure(state)
        elif self.lines:
            print(f"resumed at step {state.global_step} of {state.max_steps}", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % max(1, state.max_steps // MEASUREMENTS) == 0 or state.global_step == state.max_steps:
            self._measure(state)
        if state.global_step >= state.max_steps:
            control.should_save = False  # the results follow; and resumed at its last step, the Trainer does another

    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history[-1]["seconds"] = self._seconds()
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise ValueError(_not_finite(loss, state.global_step))
        if time.perf_counter() - self.printed >= LINE_SECONDS:
            self._print(state, {"loss": loss})

    def _measure(self, state: Any) -> None:
        if self.measure is not None:
            numbers = dict(self.measure())
            state.log_history.append({**numbers, "step": state.global_step, "seconds": self._seconds()})
            self._print(state, numbers)

    def _print(self, state: Any, numbers: Mapping[str, float]) -> None:
        self.printed = time.perf_counter()
        if self.lines:
            words = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items()]
            print(f"step {state.global_step} of {state.max_steps}:", ", ".join(words), flush=True)

    def _seconds(self) -> float:
        return self.before + time.perf_counter() - self.started


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split into training rows and held-out rows. Rows with the same prompt stay together, so no prompt leaks.

    share: of the prompts, held out. A row's field `prompt` is a text or a chat; a row without one is its own prompt.
    """
    keys = [prompt_key(row) for row in rows]
    distinct = sorted(set(keys))
    held_out = set(random.Random(seed).sample(distinct, max(1, round(share * len(distinct)))))
    if len(held_out) == len(distinct):
        raise ValueError(f"{len(rows)} rows of {len(distinct)} prompts leave no training rows. Give more rows.")
    paired = list(zip(keys, rows, strict=True))
    return [row for key, row in paired if key not in held_out], [row for key, row in paired if key in held_out]


def prompt_key(row: Row) -> str:
    """Equal for rows with equal prompts, and without a prompt for rows of the same texts, whatever is said of them."""
    prompt = row.get("prompt")
    texts = [row[name] for name in ("text", "response", "chosen", "rejected") if name in row]
    own = sorted(json.dumps(text, sort_keys=True) for text in texts)
    return prompt if prompt and isinstance(prompt, str) else json.dumps(prompt or own, sort_keys=True)


def grouped_by_length(rows: Sequence[Row], batch_size: int, seed: int) -> list[Row]:
    """Reorder rows with `input_ids` into batches of similar length, with the batches in random order.

    Random batches of the embedded corpus are 39% padding. The Trainer's own "group_by_length" sorts the batches of a
    block, longest first, so momentum would average over texts of one length, and an optimizer that normalizes its
    step would weight short texts like long ones.
    """
    rng = random.Random(seed)
    rows, block, batches = rng.sample(rows, len(rows)), 50 * batch_size, []
    for start in range(0, len(rows), block):
        by_length = sorted(rows[start : start + block], key=lambda row: len(row["input_ids"]))
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    full = [batch for batch in batches if len(batch) == batch_size]
    rng.shuffle(full)
    partial = [batch for batch in batches if len(batch) < batch_size]  # last, so that every other batch stays full
    return [row for batch in full + partial for row in batch]


def pad_right(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad sequences of different lengths on the right, with id 0 and mask 0.

    Returns int64 input_ids and attention_mask, both [B, T].
    """
    input_ids = pad_sequence([torch.tensor(s) for s in sequences], True, 0)
    mask = pad_sequence([torch.ones(len(s), dtype=torch.long) for s in sequences], True, 0)
    return input_ids, mask
