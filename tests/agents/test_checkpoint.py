"""The checkpoint file: whole whenever the process dies or the disk is full, and readable on any device."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from agents.checkpoint import (
    FILE,
    iterations_done,
    load_checkpoint,
    load_networks,
    load_policy,
    remove_surplus,
    save_checkpoint,
)
from agents.config import TrainConfig
from agents.run import load_policy as load_run_policy
from agents.text.config import TextConfig
from agents.text.experiment import TextExperiment
from agents.trainer import Trainer
from tests.support.learning import make_trainer, same, weights
from tests.support.runs import resume, saved, train
from textenv import TextGenConfig, build_task
from textenv.training.files import no_room, replacing


@pytest.fixture
def kind() -> str:
    """One architecture is enough here."""
    return "gpt2"


@pytest.fixture
def trained(settings) -> Trainer:
    """A trainer with an iteration behind it, and statistics of scores."""
    trainer = make_trainer(settings | dict(score_normalization="running"), iterations=2)
    next(trainer.iterate())
    return trainer


def names(folder) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def again(settings, **changes) -> Trainer:
    """The same trainer at its start."""
    return make_trainer(settings | dict(score_normalization="running"), iterations=2, **changes)


@pytest.fixture
def from_cuda(trained, tmp_path, monkeypatch):
    """The checkpoint of a trainer as a CUDA machine writes it: tensors tagged cuda:0, a generator state of 16 bytes."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        patch.setattr(Trainer, "device", torch.device("cuda", 0))
        patch.setattr(trained.collector, "sampling_generator", CudaGenerator())
        save_checkpoint(tmp_path, trained)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / FILE, weights_only=True)  # so it really names a device that is not here
    return tmp_path


class CudaGenerator:
    """A CUDA generator's state is its seed and its offset."""

    def get_state(self):
        return torch.zeros(16, dtype=torch.uint8)


def test_a_policy_from_a_device_that_is_not_here(settings, trained, from_cuda):
    """A run trained on CUDA gives its policy, and all its networks, to a machine without: nothing asks for the device."""
    other = again(settings)
    policy = load_policy(from_cuda, other.algorithm, other.collector)
    assert same(weights(policy), weights(trained.algorithm.networks.policy))
    other = again(settings)
    load_networks(from_cuda, other.algorithm, other.collector)
    assert same(weights(other.algorithm.networks.critic), weights(trained.algorithm.networks.critic))
    assert other.collector.task.normalizer.statistics.mean == trained.collector.task.normalizer.statistics.mean != 0


def test_no_resume_on_another_kind_of_device(settings, from_cuda):
    """Random numbers of a CUDA generator cannot be continued on a CPU: the resume is refused, and says what works."""
    with pytest.raises(ValueError, match=r"was trained on cuda and would go on on cpu.*evaluate and generate here"):
        load_checkpoint(from_cuda, again(settings))


def test_the_policy_is_restored_alone(settings, trained, tmp_path):
    """A checkpoint without critic, optimizer, replay and generators has all that acting needs, and no critic is built."""
    save_checkpoint(tmp_path, trained)
    state = torch.load(tmp_path / FILE, weights_only=True)
    collector = {name: state["trainer"]["collector"][name] for name in ("kl_controller", "score_statistics")}
    assert state["policy"] == "trained.actor"
    actor = {name: tensor for name, tensor in state["tensors"].items() if name.startswith("trained.actor.")}
    torch.save(
        {"policy": state["policy"], "parts": None, "tensors": actor, "trainer": {"collector": collector}},
        tmp_path / FILE,
    )
    other = again(settings)
    algorithm = type(other.algorithm)(other.algorithm.config, other.algorithm.networks.factory)
    policy = load_policy(tmp_path, algorithm, other.collector)
    assert same(weights(policy), weights(trained.algorithm.networks.policy))
    assert "critic" not in vars(algorithm.networks)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_dies_while_it_saves_keeps_a_checkpoint(settings, trained, tmp_path, keep):
    """Whatever the last call to the system was before the process was killed, a whole checkpoint is there."""
    trained.config = replace(trained.config, keep_checkpoints=keep)
    save_checkpoint(tmp_path, trained)
    before = saved(tmp_path)
    list(trained.iterate())
    for function in ("replace", "fsync", *(["unlink"] if keep > 1 else [])):
        for call in (1, 2):
            if child := os.fork():
                os.waitpid(child, 0)
            else:
                _die_at(function, call)
                save_checkpoint(tmp_path, trained)
                os._exit(0)
            load_checkpoint(tmp_path, again(settings))
            written = saved(tmp_path)
            done = len(written) == len(before) and same(written, before)
            assert done or int(torch.load(tmp_path / FILE)["iteration"]) == 2
    save_checkpoint(tmp_path, trained)
    kept = [] if keep == 1 else ["checkpoint-1.pt", "checkpoint-2.pt"]
    assert names(tmp_path) == [*kept, FILE]  # what the killed ones left is gone


def _die_at(function: str, call: int) -> None:
    """Kill this process when it calls a function of `os` for the n-th time."""
    original, calls = getattr(os, function), iter(range(1, 100))

    def dying(*arguments, **options):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(os, function, dying)


@contextmanager
def full_disk(room: int):
    """No file may grow beyond this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_full_disk_keeps_the_last_checkpoint(settings, trained, tmp_path, share):
    """Where there is no room, saving raises OSError, and the checkpoint is the one before, byte for byte."""
    save_checkpoint(tmp_path, trained)
    before = (tmp_path / FILE).read_bytes()
    list(trained.iterate())
    with full_disk(int(share * len(before))), pytest.raises(OSError, match="File too large"):
        save_checkpoint(tmp_path, trained)
    assert (tmp_path / FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_an_error_that_is_not_of_the_disk_is_itself(tmp_path):
    """Only a full disk is named as one."""
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_other_words():
    """Writers in Rust report the system's error in a text, PyTorch's reports another one on top of it."""
    assert no_room(Exception("No space left on device (os error 28)")).errno == errno.ENOSPC
    try:
        try:
            raise OSError(errno.EDQUOT, "quota")
        finally:
            raise RuntimeError("unexpected pos 576 vs 534")
    except RuntimeError as error:
        assert no_room(error).errno == errno.EDQUOT
    alone = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5391168 vs 5391060")
    assert no_room(alone).errno == errno.ENOSPC  # of torch.save where it opens the file itself
    for known in (KeyboardInterrupt(), OSError(errno.EIO, "broken")):  # what stopped the write
        alone.__context__ = known
        assert no_room(alone) is None
    assert no_room(OSError(errno.ENOENT, "no file")) is None and no_room(ValueError("(os error 2)")) is None


def test_a_mask_policy_is_restored_with_the_policy(settings, tmp_path):
    """Sampling under the mask of an earlier actor needs that actor's weights too."""
    masked = settings | dict(action_mask="top_k:5", score_normalization="running")
    trainer = make_trainer(masked, iterations=2, mask_refresh=1)
    list(trainer.iterate())
    save_checkpoint(tmp_path, trainer)
    other = make_trainer(masked, iterations=2, mask_refresh=1)
    load_policy(tmp_path, other.algorithm, other.collector)
    (refreshed,), (restored,) = trainer.collector.mask_policies, other.collector.mask_policies
    assert same(weights(refreshed.model), weights(restored.model))
    assert not same(weights(restored.model), weights(make_trainer(masked).collector.mask_policies[0].model))


def test_a_replay_buffer_is_saved_without_its_empty_room(settings, tmp_path):
    """A buffer of 200 times the rows collected so far makes no checkpoint of 200 times the size."""
    sizes = []
    for size in (8, 1600):
        trainer = make_trainer(settings, learner="dqn", algorithm=dict(buffer_size=size, learning_starts=8))
        next(trainer.iterate())
        save_checkpoint(tmp_path, trainer)
        sizes.append((tmp_path / FILE).stat().st_size)
    assert sizes[1] < 1.01 * sizes[0]


# ---- several


def test_the_last_checkpoints_are_kept(settings, tmp_path):
    """Two of four, under their iterations; the last has its usual name too."""
    trainer = make_trainer(settings, iterations=3, keep_checkpoints=2)
    (tmp_path / "checkpoint-old.pt").write_text("a file of one's own", encoding="utf-8")
    save_checkpoint(tmp_path, trainer)
    states = {}
    for iteration in trainer.iterate():
        save_checkpoint(tmp_path, trainer)
        states[iteration.number] = saved(tmp_path)
    assert names(tmp_path) == ["checkpoint-2.pt", "checkpoint-3.pt", "checkpoint-old.pt", FILE]
    assert (tmp_path / "checkpoint-3.pt").read_bytes() == (tmp_path / FILE).read_bytes()
    shutil.copyfile(tmp_path / "checkpoint-2.pt", tmp_path / FILE)  # back to the second iteration
    assert same(saved(tmp_path), states[2])
    shutil.copyfile(tmp_path / "checkpoint-3.pt", tmp_path / FILE)  # and to the third, which is what it was
    assert same(saved(tmp_path), states[3])
    shutil.copyfile(tmp_path / "checkpoint-2.pt", tmp_path / FILE)
    back = make_trainer(settings, iterations=3, keep_checkpoints=2)
    load_checkpoint(tmp_path, back)
    assert back.iteration == 2
    list(back.iterate())
    save_checkpoint(tmp_path, back)
    assert same(saved(tmp_path), states[3])


def test_the_best_checkpoint_is_kept(settings, tmp_path):
    """Beside the last one, by what was measured on held-out prompts; of equal ones the first, and not one that lacks it."""
    trainer = make_trainer(settings, iterations=2, keep_checkpoints="best")
    kept = []
    for number, held_out in enumerate((None, 1.0, 0.5, 2.0, -1.0, 2.0)):
        trainer.iteration = number
        save_checkpoint(tmp_path, trainer, held_out)
        kept.append([int(name[11:-3]) for name in names(tmp_path) if name != FILE])
        assert (tmp_path / f"checkpoint-{number}.pt").read_bytes() == (tmp_path / FILE).read_bytes()
    assert kept == [[0], [1], [1, 2], [3], [3, 4], [3, 5]]


def test_a_run_keeps_its_best(settings, tmp_path):
    """What `evaluate` measures of each checkpoint decides; the score on held-out prompts less the penalty."""
    train(tmp_path / "run", settings, iterations=3, checkpoint_every=1, keep_checkpoints="best", learning_rate=0.3)
    measured = {}
    for number in (1, 2, 3):
        path = tmp_path / "run" / f"checkpoint-{number}.pt"
        if path.exists():
            measured[number] = torch.load(path, weights_only=True)["held_out"]
            shutil.copy(path, tmp_path / "run" / FILE)
            experiment, policy = load_run_policy(tmp_path / "run")
            numbers = experiment.summarize(experiment.evaluate(policy))
            beta = experiment.task.config.kl_coef
            assert measured[number] == pytest.approx(numbers["score"] - beta * numbers["kl_per_response"], rel=1e-5)
    assert 3 in measured and measured[3] <= max(measured.values()) and len(measured) <= 2


def test_keeping_fewer_removes_the_others(settings, tmp_path):
    """What is kept follows the present setting; checkpoints later than the present one are of another course."""
    trainer = make_trainer(settings, iterations=2, keep_checkpoints=3)
    for number in (0, 7, 1, 2):
        trainer.iteration = number
        save_checkpoint(tmp_path, trainer)
    assert names(tmp_path) == ["checkpoint-0.pt", "checkpoint-1.pt", "checkpoint-2.pt", FILE]
    trainer.config = replace(trainer.config, keep_checkpoints=1)
    save_checkpoint(tmp_path, trainer)
    assert names(tmp_path) == [FILE]


def test_folders_of_sharded_weights_are_kept_with_their_file(settings, tmp_path):
    """A file whose weights are in a folder beside it stays with that folder."""
    trainer = make_trainer(settings, iterations=2, keep_checkpoints=2)
    for number in range(3):
        (tmp_path / f"checkpoint-{number}").mkdir()
        trainer.iteration = number
        save_checkpoint(tmp_path, trainer)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-1.pt", "checkpoint-2", "checkpoint-2.pt", FILE]


@pytest.mark.parametrize(("keep", "left"), [(2, (2, 3)), ("best", (0, 3)), (1, ())])
def test_what_a_killed_process_left_is_removed(settings, tmp_path, keep, left):
    """Where it died before it removed the old checkpoints, the resume does, and the folders of sharded weights too."""
    trainer = make_trainer(settings, iterations=3, keep_checkpoints=4)
    for number in range(4):
        trainer.iteration = number
        (tmp_path / f"checkpoint-{number}").mkdir()
        save_checkpoint(tmp_path, trainer, held_out=-number)
    remove_surplus(tmp_path, keep)
    folders = [f"checkpoint-{number}" for number in (left or (3,))]
    assert names(tmp_path) == sorted([*folders, *(f"checkpoint-{number}.pt" for number in left), FILE])


def test_a_resumed_run_removes_what_is_left(settings, tmp_path):
    """Also where all its iterations are done, so that no later checkpoint is saved."""
    run = tmp_path / "run"
    train(run, settings, iterations=2, keep_checkpoints=2)
    (run / "summary.json").unlink()
    shutil.copy(run / "checkpoint-1.pt", run / "checkpoint-0.pt")
    resume(run)
    assert [name for name in names(run) if name.endswith(".pt")] == ["checkpoint-1.pt", "checkpoint-2.pt", FILE]


@pytest.mark.parametrize("damage", [b"", b"PK", None])
def test_a_damaged_checkpoint_is_not_the_best(settings, tmp_path, damage):
    """An earlier one that cannot be read stops no run, and makes room for the next."""
    trainer = make_trainer(settings, iterations=2, keep_checkpoints="best")
    save_checkpoint(tmp_path, trainer, 5.0)
    file = tmp_path / "checkpoint-0.pt"
    if damage is None:
        torch.save([1], file)
    else:
        file.write_bytes(damage)
    trainer.iteration = 1
    save_checkpoint(tmp_path, trainer, 1.0)
    assert names(tmp_path) == ["checkpoint-1.pt", FILE]


DAMAGES = {
    "no device": lambda state: state.pop("device"),
    "no iteration": lambda state: state.pop("iteration"),
    "iteration None": lambda state: state.update(iteration=None),
    "iteration text": lambda state: state.update(iteration="x"),
    "iteration -1": lambda state: state.update(iteration=-1),
    "iteration of another": lambda state: state.update(iteration=7),
    "no tensor": lambda state: state["tensors"].update(dict.fromkeys(state["tensors"], 5)),
    "a generator": lambda state: state["trainer"].update(generator=5),
    "all": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence(settings, trained, tmp_path, damage):
    """Whatever is missing in it or is of another kind."""
    save_checkpoint(tmp_path, trained)
    state = torch.load(tmp_path / FILE, weights_only=True)
    if DAMAGES[damage] is not None:
        DAMAGES[damage](state)
    torch.save(torch.zeros(3) if damage == "all" else state, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"does not fit this trainer: .*start a new run"):
        load_checkpoint(tmp_path, again(settings))
    if damage.startswith(("no iteration", "iteration")) and "another" not in damage:
        with pytest.raises(ValueError, match=r"does not fit this trainer: .*iteration"):
            iterations_done(tmp_path)


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_full_disk_keeps_all_that_are_kept(settings, tmp_path, share):
    """The checkpoint that does not fit leaves no part of itself, and no other is touched."""
    trainer = make_trainer(settings, iterations=2, keep_checkpoints=2)
    save_checkpoint(tmp_path, trainer)
    before, files = saved(tmp_path), names(tmp_path)
    next(trainer.iterate())
    with full_disk(int(share * (tmp_path / FILE).stat().st_size)), pytest.raises(OSError, match="File too large"):
        save_checkpoint(tmp_path, trainer)
    assert names(tmp_path) == files and same(before, saved(tmp_path))


def test_the_best_needs_scores_that_compare(settings):
    """Normalized scores mean something else at every checkpoint, wherever the normalization was set."""
    task = build_task(TextGenConfig(**settings | dict(score_normalization="running")))
    with pytest.raises(ValueError, match="less β·KL, and with score_normalization='running'"):
        TextExperiment(TrainConfig(keep_checkpoints="best"), TextConfig(), task)
