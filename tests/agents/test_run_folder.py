"""The life of a run folder: locked, lengthened, resumed, read from elsewhere, and whole on any terminal."""

from __future__ import annotations

import errno
import io
import json
import locale
import os
import resource
import shutil
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from transformers import AutoModelForCausalLM

from agents import run_folder
from agents.__main__ import main
from agents.reporting import report
from agents.reporting.files import tell_a_full_disk_once
from agents.reporting.viewer import read_report
from agents.text.evaluation import Evaluation
from agents.text.experiment import describe_gain
from agents.text.fingerprints import of_weights
from agents.text.samples import make_summary
from agents.trainer import Trainer
from tests.support import tiny
from tests.support.learning import make_trainer, same
from tests.support.runs import flags, resume, rows, saved, stop_after, train
from textenv.training.files import locked


@pytest.fixture(scope="module", autouse=True)
def without_pictures():
    """Pictures take most of the time of a small run, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.reporting.plots.draw_curves", lambda *_: None)
        patch.setattr("agents.reporting.plots.draw_credit", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def settings(folders) -> dict:
    """Arguments of `gym.make` for a small task."""
    models = dict(reference=folders["gpt2"], reward=folders["gpt2_reward"], prompts=tiny.PROMPTS)
    return models | dict(max_prompt_tokens=16, max_new_tokens=4, device="cpu")


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory) -> Path:
    """A finished run of one iteration, with constant learning rates."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder, settings, iterations=1, schedule="constant")
    return folder


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def refused(capsys, *arguments: str) -> str:
    """The sentence with which a command ends."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    capsys.readouterr()
    return str(end.value.code)


# ---- longer runs


def test_a_run_with_constant_rates_may_be_lengthened(settings, folder, tmp_path):
    """One iteration lengthened to three ends as three iterations do, to the bit; a stop on the way changes nothing."""
    train(tmp_path / "whole", settings, iterations=3, schedule="constant")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_iterate", stop_after(Trainer._iterate, 2, KeyboardInterrupt))
        with pytest.raises(SystemExit):
            resume(folder, "--iterations", "3")
    resume(folder)  # the new length is the run's now
    assert same(saved(tmp_path / "whole"), saved(folder))
    assert [row["iteration"] for row in rows(folder)] == [1, 2, 3]
    assert json.loads((folder / "summary.json").read_bytes())["iterations"] == 3


def test_an_earlier_checkpoint_is_no_finished_run(settings, tmp_path):
    """Taken back to an earlier checkpoint and stopped, a run that was finished says no longer that it is."""
    run = tmp_path / "run"
    train(run, settings, iterations=2, keep_checkpoints=2, checkpoint_every=1)
    assert read_report(run, running=True).summary is not None
    shutil.copy(run / "checkpoint-1.pt", run / "checkpoint.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_iterate", stop_after(Trainer._iterate, 1, KeyboardInterrupt))
        with pytest.raises(SystemExit):
            resume(run)
    report = read_report(run, running=True)
    assert report.summary is None and report.running
    resume(run)
    assert read_report(run, running=True).summary is not None


@pytest.mark.parametrize(("name", "job"), [("this", None), ("this", "another"), ("none", "none another-machine 17")])
def test_a_start_again_removes_nothing_of_others(settings, tmp_path, monkeypatch, capsys, name, job):
    """Where torchrun starts the processes again, a folder that they have not written is refused, and stays.

    A torchrun with a fixed address gives no id: "none".
    """
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
    model = tmp_path / "model"
    tiny.save(tiny.language_model(), model)
    if job is not None:
        (model / "config.json").write_text(json.dumps({"job": job}))
    before = contents(model)
    assert "already exists" in refused(capsys, "train", "--run", str(model), *flags(settings))
    assert contents(model) == before


def test_what_may_not_change(settings, folder, tmp_path, capsys):
    """A linear schedule depends on the length, and no run gets shorter; the folder stays as it is."""
    resume(folder, "--iterations", "2")
    linear = tmp_path / "linear"
    shutil.copytree(folder, linear)
    config = json.loads((linear / "config.json").read_bytes())
    config["train"]["schedule"] = "linear"
    run_folder.write_json(linear / "config.json", config)
    before = [(path / "config.json").read_bytes() for path in (folder, linear)]
    message = refused(capsys, "train", "--resume", "--run", str(linear), "--iterations", "4")
    assert "fall linearly to zero at iteration 2" in message and "--schedule constant" in message
    message = refused(capsys, "train", "--resume", "--run", str(folder), "--iterations", "1")
    assert "has 2 iterations, which can only grow" in message
    assert before == [(path / "config.json").read_bytes() for path in (folder, linear)]


def test_a_finished_run_has_nothing_to_do(folder, capsys, monkeypatch):
    """Resuming it says so: nothing is measured or written, and TensorBoard gets no empty file."""
    files = contents(folder)
    monkeypatch.setattr("agents.text.experiment.evaluate", None)
    resume(folder)
    assert "is finished, with 1 iterations" in capsys.readouterr().out
    assert files == contents(folder)


def contents(folder: Path) -> dict:
    """When each file of a folder was last written, but for the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_run_killed_before_its_summary_gets_one(folder):
    """All iterations are done and the summary is missing or half there: resuming writes it, and no metric again."""
    summary = json.loads((folder / "summary.json").read_bytes())
    for damaged in (b"", b"[]"):
        (folder / "summary.json").write_bytes(damaged)
        resume(folder)
        assert json.loads((folder / "summary.json").read_bytes()) == summary
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert len(events.Scalars("score")) == 1 and "samples/text_summary" in events.Tags()["tensors"]


def test_a_run_killed_while_it_writes_its_page(folder):
    """It has no summary yet, so it is not finished: resuming writes both, and no part of a file stays."""
    (folder / "summary.json").unlink()
    for place in (folder, folder / "rollouts"):
        place.mkdir(exist_ok=True)
        (place / "part.json.new").write_text("[")

    def stop(*_: object) -> Path:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.reporting.viewer.write_page", stop)
        with pytest.raises(SystemExit):
            resume(folder)
    assert not (folder / "summary.json").exists()
    resume(folder)
    assert (folder / "summary.json").exists()
    assert "finished, 1 iterations" in (folder / "report.html").read_text(encoding="utf-8")
    assert not list(folder.rglob("*.new"))


def test_an_optimizer_of_ones_own(settings):
    """An optimizer set from Python follows the linear schedule from its own rate."""
    trainer = make_trainer(settings, iterations=2)
    parameters = [parameter for group in trainer.parameters.values() for parameter in group]
    trainer.optimizer = torch.optim.SGD(parameters, lr=0.5)
    used = []
    for _ in trainer.iterate():
        used += [group["lr"] for group in trainer.optimizer.param_groups]
    assert used == [0.5, 0.25]


# ---- what a run was started with


def test_changed_models_and_prompts_are_noticed(tmp_path, capsys):
    """The name is the same and the content is not: no resume, and a word before numbers that depend on it."""
    inputs = tmp_path / "inputs"
    tiny.save(tiny.language_model(), inputs / "model")
    tiny.save(tiny.reward_model(), inputs / "reward")
    write_prompts(inputs / "prompts.jsonl", tiny.PROMPTS)
    names = dict(reference=inputs / "model", reward=inputs / "reward", prompts=inputs / "prompts.jsonl")
    run = str(tmp_path / "run")
    train(Path(run), {name: str(path) for name, path in names.items()} | dict(device="cpu", max_new_tokens=4))
    Path(run, "summary.json").unlink()  # so that there is something to resume
    shutil.copytree(inputs, tmp_path / "kept")
    for overwrite, name, told in (
        (lambda: change_one_weight(inputs / "model"), "reference", ["evaluate"]),
        (lambda: exchange_two_tokens(inputs / "model"), "tokenizer", ["evaluate", "generate"]),
        (lambda: tiny.save(tiny.reward_model(seed=5), inputs / "reward"), "reward model 1", ["evaluate", "generate"]),
        (lambda: write_prompts(inputs / "prompts.jsonl", [*tiny.PROMPTS, "more"]), "prompts", []),
    ):
        overwrite()
        message = refused(capsys, "train", "--resume", "--run", run)
        assert "with another content of: " in message and name in message
        for command, *more in (["evaluate"], ["generate", "--prompt", "a", "--samples", "1"]):
            main([command, "--run", run, *more])
            err = capsys.readouterr().err
            assert (name in err, "note: changed since the run was started: " in err) == (command in told,) * 2
        shutil.rmtree(inputs)
        shutil.copytree(tmp_path / "kept", inputs)
    resume(Path(run))


def write_prompts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")


def change_one_weight(folder: Path) -> None:
    """By one unit in the last place."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    weight = model.get_input_embeddings().weight.detach().view(-1)
    weight[7] = torch.nextafter(weight[7], torch.tensor(torch.inf))
    model.save_pretrained(folder)


def exchange_two_tokens(folder: Path) -> None:
    """The ids of x and y, which no prompt has."""
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    run_folder.write_json(folder / "tokenizer.json", tokenizer)


def test_a_fingerprint_is_of_everything():
    """One weight by one unit in the last place, two weights exchanged, a shape, a type, a name: each counts."""
    base = {"a": torch.arange(6.0), "b": torch.tensor(1.0)}
    swapped = base["a"].clone()
    swapped[:2] = swapped[:2].flip(0)
    last_place = base["a"].clone()
    last_place[3] = torch.nextafter(last_place[3], torch.tensor(9.0))
    variants = [
        *(base | {"a": other} for other in (swapped, last_place, base["a"].view(2, 3), base["a"].double())),
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
    ]
    hashes = [of_weights(Held(state)) for state in [base, *variants]]
    assert len(set(hashes)) == len(hashes) and of_weights(Held(dict(reversed(base.items())))) == hashes[0]
    assert of_weights(Held({"a": torch.zeros(3, dtype=torch.bfloat16)})) != of_weights(Held({"a": torch.zeros(3)}))


class Held(torch.nn.Module):
    """Holds tensors of any type under given names."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def state_dict(self, *_, **__):
        return self.state


# ---- two at once


def test_a_second_process_is_refused_while_the_first_lives(folder, capsys):
    """While one process trains in a folder, no other resumes there; when it has died, the way is free."""
    ready, waiting = os.pipe()
    if not (child := os.fork()):
        with locked(folder):
            os.write(waiting, b"1")
            signal.pause()
    os.read(ready, 1)
    files = contents(folder)
    message = refused(capsys, "train", "--resume", "--run", str(folder), "--iterations", "2")
    assert "another process is training in" in message and files == contents(folder)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    resume(folder, "--iterations", "2")
    assert len(rows(folder)) == 2


def test_a_run_holds_its_folder_from_the_first_to_the_last(settings, tmp_path, capsys, monkeypatch):
    """A new run and a resumed one both hold the folder while they train, and let go of it at the end."""
    seen = []
    original = Trainer._iterate

    def watched(trainer, watch):
        seen.append(refused(capsys, "train", "--resume", "--run", str(tmp_path / "run")))
        return original(trainer, watch)

    monkeypatch.setattr(Trainer, "_iterate", watched)
    train(tmp_path / "run", settings, iterations=1, schedule="constant")
    resume(tmp_path / "run", "--iterations", "2")
    assert len(seen) == 2 and all("another process is training in" in message for message in seen)
    with locked(tmp_path / "run"):
        pass


# ---- damage


DAMAGES = {
    "cut": lambda text: text[:-20],
    "no JSON": lambda text: text.replace(b'"iteration": 1', b'"iteration": "1', 1),
    "no UTF-8": lambda text: b"\xff\xfe\x00" + text,
    "no rows": lambda text: b"[1, 2]\n7\nnull\n{}\n" + b"[" * 100_000 + b"\n" + text,
    "half a row": lambda text: text.replace(b"\n", b"\r\n") + b'{"iteration": 2, "sc',
    "twice": lambda text: text + text,
    "a text": lambda text: text.replace(b"}", b', "length": "x", "entropy": [], "kl": NaN}'),
    "an iteration too far": lambda text: text + b'{"iteration": 30000000, "score": 1.0}\n',
    "empty": lambda text: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_left_of_damaged_metrics(tmp_path, damage):
    """Whatever metrics.jsonl holds, it opens; rows that can be read are kept, once, and the others are counted."""
    row = {"iteration": 1, "score": 0.5}
    (tmp_path / "metrics.jsonl").write_bytes(DAMAGES[damage](json.dumps(row).encode() + b"\n"))
    scalars = report.Scalars(tmp_path, resume_at=1, total=1)
    lost = damage in ("cut", "no JSON", "no UTF-8", "empty")
    assert (scalars.rows, scalars.lost, scalars.reported) == (([], 1, 0) if lost else ([row], 0, 1))
    assert rows(tmp_path) == scalars.rows


def test_damaged_metrics_stop_no_resume(folder, capsys):
    """The run goes on, and says what is lost."""
    (folder / "metrics.jsonl").write_bytes(DAMAGES["no UTF-8"](b"}{"))
    resume(folder, "--iterations", "2")
    assert [row["iteration"] for row in rows(folder)] == [2]
    assert "the metrics of 1 iterations are lost" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b"9", b'{"import_from": 5}', b'{"import_from": [5]}'])
def test_a_damaged_configuration_is_one_sentence(folder, capsys, content):
    """However it is damaged; what a field should be is not guessed."""
    file = folder / "config.json"
    whole = json.loads(file.read_bytes())
    file.write_bytes(json.dumps(whole | json.loads(content)).encode() if content[:1] == b"{" else content)
    for command in (["evaluate"], ["train", "--resume"]):
        message = refused(capsys, *command, "--run", str(folder))
        assert "is not a configuration that this version can read" in message
    assert not run_folder.is_of_this_job(folder)


def test_a_folder_that_may_not_be_written_is_one_sentence(folder, capsys):
    """Such as one whose lock cannot be opened; an error of the work itself stays what it is."""
    with pytest.raises(PermissionError), locked(folder):
        raise PermissionError
    (folder / ".lock").unlink(missing_ok=True)
    (folder / ".lock").mkdir()  # root may write whatever its mode says
    message = refused(capsys, "train", "--resume", "--run", str(folder), "--iterations", "2")
    assert "cannot be locked" in message and "make it writable" in message


def test_a_full_disk_is_named_and_the_run_goes_on_later(settings, folder, tmp_path, monkeypatch):
    """A disk that fills up ends the run in a sentence; with room again it ends as it would have, to the bit."""
    train(tmp_path / "whole", settings, iterations=2, schedule="constant")
    before, limits = saved(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    original = Trainer._iterate

    def filling(trainer, watch):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        return original(trainer, watch)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(Trainer, "_iterate", filling)
        resume(folder, "--iterations", "2")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written: File too large. Make room on that disk. The last checkpoint is good" in str(end.value)
    assert same(before, saved(folder))
    resume(folder)
    assert same(saved(tmp_path / "whole"), saved(folder))


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # what would be a traceback
def test_a_full_disk_in_a_thread_is_told_once(folder, monkeypatch):
    """TensorBoard writes in a thread of its own. Where that meets the full disk first, the sentence is all there is."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(RecordWriter, "write", full)
        resume(folder, "--iterations", "2")
    assert "cannot be written: No space left on device. Make room on that disk. The last" in str(end.value)
    resume(folder)


def test_a_thread_tells_what_is_no_full_disk(capsys, monkeypatch):
    """Other errors of threads are printed as ever."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    tell_a_full_disk_once()
    tell_a_full_disk_once()
    for error in (OSError(errno.ENOSPC, "full"), ZeroDivisionError("by zero")):
        thread = threading.Thread(target=_raise, args=(error,))
        thread.start()
        thread.join()
    written = capsys.readouterr().err
    assert "ZeroDivisionError: by zero" in written
    assert "full" not in written
    assert written.count("Traceback") == 1


def _raise(error: BaseException) -> None:
    raise error


# ---- from elsewhere


def test_a_run_is_measured_from_another_folder_without_its_prompts(tmp_path, monkeypatch, capsys):
    """Relative names and functions are found where the run was started; the prompts that it trained on may be gone."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    tiny.save(tiny.language_model(), home / "model")
    prompts = [{"prompt": text, "bonus": index} for index, text in enumerate([*tiny.PROMPTS, "é è", "日本"])]
    lines = "".join(json.dumps(row) + "\n" for row in prompts)
    (home / "prompts.jsonl").write_text(lines, encoding="utf-8")
    (home / "rewards_at_home.py").write_text(
        "def bonus_of(prompts, responses, bonus):\n    return [float(b) for b in bonus]\n"
    )
    settings = dict(reference="model", reward="rewards_at_home:bonus_of", prompts="prompts.jsonl", device="cpu")
    monkeypatch.setattr(sys, "path", [str(home), *sys.path])
    monkeypatch.chdir(home)
    train(Path("run"), settings | dict(max_new_tokens=4), iterations=1)
    main(["evaluate", "--run", "run", "--output", "here.json"])
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", sys.path[1:])
    monkeypatch.delitem(sys.modules, "rewards_at_home")
    (home / "prompts.jsonl").unlink()
    capsys.readouterr()
    main(["evaluate", "--run", str(home / "run"), "--output", "there.json"])
    assert "note:" not in capsys.readouterr().err
    assert json.loads(Path("there.json").read_bytes()) == json.loads((home / "here.json").read_bytes())
    assert (
        json.loads((home / "run/summary.json").read_bytes())["score_after"]
        == json.loads(Path("there.json").read_bytes())["score"]
    )
    message = refused(capsys, "generate", "--run", str(home / "run"), "--prompt", "a")
    assert "bonus" in message  # a prompt of one's own has no such field
    (home / "run/summary.json").unlink()
    assert "no prompts file at 'prompts.jsonl'" in refused(capsys, "train", "--resume", "--run", str(home / "run"))


def test_generate_works_from_another_folder(tmp_path, monkeypatch, capsys):
    """The same, for a reward that needs nothing but text."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    tiny.save(tiny.language_model(), home / "model")
    tiny.save(tiny.reward_model(), home / "scores")
    write_prompts(home / "prompts.jsonl", tiny.PROMPTS)
    settings = dict(reference="model", reward={"scores": 2.0}, prompts="prompts.jsonl", device="cpu", max_new_tokens=4)
    monkeypatch.chdir(home)
    train(Path("run"), settings, iterations=1)
    generating = ("generate", "--prompt", "a", "--samples", "2", "--run")
    capsys.readouterr()
    main([*generating, "run"])
    here = capsys.readouterr().out
    (home / "prompts.jsonl").unlink()
    monkeypatch.chdir(elsewhere)
    main([*generating, str(home / "run")])
    assert capsys.readouterr() == (here, "")  # and no word of a change
    shutil.move(home / "run", elsewhere / "moved")
    main([*generating, "moved"])
    assert capsys.readouterr().out == here


def test_a_run_on_a_device_that_is_not_here_is_measured(folder, capsys):
    """A run whose settings name a GPU is measured on the CPU of a machine without one; training on is refused."""
    config = json.loads((folder / "config.json").read_bytes())
    config["train"]["env_arg"].append("device=cuda:7")
    run_folder.write_json(folder / "config.json", config)
    main(["evaluate", "--run", str(folder)])
    main(["generate", "--run", str(folder), "--prompt", "a", "--samples", "1", "--color", "advantage"])
    assert "[score" in capsys.readouterr().out
    message = refused(capsys, "train", "--resume", "--run", str(folder), "--iterations", "2")
    assert "device must be 'auto', 'cpu' or a 'cuda[:N]' of this machine" in message


def test_an_output_that_cannot_be_written_is_refused_at_once(folder, capsys):
    """Before anything is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.text.experiment.evaluate", None)
        message = refused(capsys, "evaluate", "--run", str(folder), "--output", str(folder / "no/numbers.json"))
        assert "which is no folder; create it first" in message
        os.mkfifo(folder / "pipe")
        for name in (folder / "pipe", "/dev/null"):
            message = refused(capsys, "evaluate", "--run", str(folder), "--output", str(name))
            assert "is a device or a pipe; choose another name" in message
        message = refused(capsys, "evaluate", "--run", str(folder), "--output", str(folder / ("a" * 253)))
        assert "File name too long; choose another --output" in message
    assert (folder / "pipe").is_fifo()


def test_an_output_that_is_a_link_stays_one(folder, tmp_path):
    """The numbers are in the file that it leads to, which may not be there yet."""
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "numbers.json")
    for _ in range(2):
        main(["evaluate", "--run", str(folder), "--output", str(link)])
        assert link.is_symlink() and "score" in json.loads((tmp_path / "numbers.json").read_bytes())


# ---- terminals


@contextmanager
def terminal(encoding: str, monkeypatch):
    """Standard output in an encoding without arrows, and a system whose files would be ASCII."""
    before, output = locale.setlocale(locale.LC_CTYPE), io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        locale.setlocale(locale.LC_CTYPE, "C")
        try:
            assert locale.getencoding() == "ANSI_X3.4-1968"
            yield output
        finally:
            locale.setlocale(locale.LC_CTYPE, before)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_arrows_loses_nothing(settings, tmp_path, monkeypatch, encoding):
    """A run ends with its result printed and written, and files in UTF-8, where terminal and system lack UTF-8."""
    texts = ["café →", "naïve", "日本語", "plain"]
    with terminal(encoding, monkeypatch) as output:
        train(tmp_path / "run", settings | dict(prompts=texts), iterations=1)
        main(["generate", "--run", str(tmp_path / "run"), "--prompt", "日", "--samples", "1"])
        printed = output.buffer.getvalue().decode(encoding)
    assert "\\u2192" in printed and "tokens in" in printed and "] \\u65e5" in printed
    assert json.loads((tmp_path / "run/summary.json").read_bytes())["iterations"] == 1
    held_out = json.loads((tmp_path / "run/held_out.jsonl").read_bytes())["prompt"]
    assert held_out in texts and held_out in (tmp_path / "run/samples.md").read_text(encoding="utf-8")


def test_a_prompt_in_a_locale_without_utf8(folder, capsys):
    """Python passes bytes that the locale lacks as surrogates; the policy gets the characters that were typed."""
    for typed in ("é", "é".encode().decode("ascii", "surrogateescape")):
        main(["generate", "--run", str(folder), "--prompt", typed, "--samples", "1"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and "] é" in first


def test_equal_scores_have_no_standard_deviation():
    """Where all scores are equal, the result is not a gain of half a billion standard deviations."""

    def measured(scores):
        rest = dict(gold=None, kl=[0.0] * 3, length=[1] * 3, stopped=[True] * 3)
        return Evaluation(prompts=["a"] * 3, responses=["b"] * 3, score=scores, **rest)

    for equal in (0.0, 0.7, 1e6):
        summary = make_summary(measured([equal] * 3), measured([equal + 5.0] * 3))
        assert describe_gain(summary) == "all scores were equal before"
    summary = make_summary(measured([0.0, 1.0, 2.0]), measured([2.0, 3.0, 4.0]))
    assert describe_gain(summary) == "+2.4 standard deviations"
