"""`--tracker`: which trackers a run has, and what happens where one of them cannot do its work.

What each of them holds after a run is in tests/test_trackers.py.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from agents.__main__ import main
from agents.commands.flags import read
from agents.commands.jobs import job_command
from agents.config import TrainConfig
from agents.reporting.trackers import Trackers, check_installed
from agents.run_folder import check_same, create, save_config

CARTPOLE = ["--env", "CartPole-v1"]


def parsed(*flags: str) -> tuple[str, ...]:
    """The trackers of a command line."""
    arguments, configs = [*CARTPOLE, *flags], []
    command = job_command(arguments, lambda config, *_: configs.append(config), "Train.", "textenv train")
    read(command, arguments, "textenv train")()
    return configs[0].tracker


def test_flags_replace_the_default(tmp_path):
    """Without flags TensorBoard; with flags those, and no other; --resume has the run's, unless it is given others."""
    assert parsed() == ("tensorboard",)
    assert parsed("--tracker", "wandb", "--tracker=mlflow") == ("wandb", "mlflow")
    assert parsed("--tracker", "none") == ("none",)
    config, settings, algorithm = [], [], []

    def keep(*parts):
        for kept, part in zip((config, settings, algorithm), parts, strict=True):
            kept.append(part)

    arguments = [*CARTPOLE, "--tracker", "trackio"]
    read(job_command(arguments, keep, "Train.", "textenv train"), arguments, "textenv train")()
    folder = tmp_path / "run"
    create(folder)
    save_config(folder, config[0], settings[0], algorithm[0], {})
    resumed = ("--resume", "--run", str(folder))
    assert parsed(*resumed) == ("trackio",)
    assert parsed(*resumed, "--tracker", "tensorboard") == ("tensorboard",)
    check_same(folder, replace(config[0], tracker=("none",)), settings[0], algorithm[0])  # may change


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["none", "wandb"], "--tracker none excludes all others, and wandb was given too; leave one out"),
        (
            ["tensorbord"],
            "tracker takes different names out of tensorboard, trackio, wandb, mlflow, none, got 'tensorb",
        ),
        (["trackio", "trackio"], "different names .* got 'trackio, trackio'"),
    ],
)
def test_bad_names_are_refused(flags, message, tmp_path, monkeypatch, capsys):
    """In a sentence, before any work."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["train", *CARTPOLE, *(f"--tracker={name}" for name in flags)])
    assert end.value.code and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        TrainConfig(tracker=tuple(flags))


def test_a_missing_package_is_told_at_once(tmp_path, monkeypatch):
    """With the way to install it, before the models are read; a folder of its name, as wandb leaves, is no package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("agents.run.build", None)
    with pytest.raises(SystemExit, match=r"^error: --tracker wandb needs a package.*pip install 'textenv\[wandb\]'"):
        main(["train", *CARTPOLE, "--tracker", "tensorboard", "--tracker", "wandb"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "some_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="--tracker some_tracker needs a package"):
        check_installed(["some_tracker"])


def test_one_that_fails_is_left_out(tmp_path):
    """Whatever it cannot do, it is told once, and the rest of the run goes on without it."""
    told: list[str] = []
    (tmp_path / "curves.png").write_bytes(b"no picture")
    with Trackers(told.append) as trackers:
        trackers.open(["tensorboard"], tmp_path, 0)
        trackers.scalars(1, {"score": 0.5})
        trackers.results(1, [tmp_path / "curves.png"], [])
        assert not trackers.opened
        trackers.scalars(2, {"score": 0.5})
    assert len(told) == 1
    assert "note: the tracker tensorboard has failed and is left out from now on (UnidentifiedImageError" in told[0]


def test_a_damaged_list_of_names(tmp_path):
    """`trackers.json` says under which names services know a run; damaged, it is refused with the remedy."""
    for content in ("{", '["a"]', '{"wandb": 3}', json.dumps({"wandb": None})):
        (tmp_path / "trackers.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"trackers\.json' is damaged; remove it"):
            Trackers(print).open(["tensorboard"], tmp_path, 0)
