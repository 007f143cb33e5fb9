"""Types of settings: NumPy scalars and paths are taken, anything else that is not declared is refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from agents.config import TrainConfig
from agents.control.config import ControlConfig
from textenv import TextGenConfig
from textenv.settings import check_types, plain


@dataclass(frozen=True)
class Settings:
    """A field of every declared type."""

    kind: ClassVar[str] = "all"
    count: int = 1
    rate: float = 0.5
    flag: bool = False
    name: str = "a"
    folder: Path = Path("x")
    maybe: str | None = None
    bound: float | None = None
    widths: tuple[int, ...] = (1,)
    mode: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        check_types(self)


def test_plain_values():
    """NumPy scalars and paths become plain at any depth; other objects are untouched."""
    one = object()
    value = {Path("a"): np.float32(0.5), "b": [np.int64(3), (np.bool_(True), one)], "c": np.str_("d")}
    assert repr(plain(value)) == repr({"a": 0.5, "b": [3, (True, one)], "c": "d"})


def test_accepted():
    """Values of the declared type, and what stands for them, arrive as the declared type."""
    given: dict[str, Any] = dict(
        count=np.int64(3), rate=2, flag=np.bool_(True), name=Path("b"), folder="y", maybe=None, widths=[np.int32(4), 5]
    )
    made = Settings(**given)
    assert repr(made) == (
        "Settings(count=3, rate=2.0, flag=True, name='b', folder=PosixPath('y'), maybe=None, bound=None, "
        "widths=(4, 5), mode='a')"
    )


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("count", 1.0, "count must be a whole number, got 1.0"),
        ("count", True, "count must be a whole number, got True"),
        ("count", "1", "count must be a whole number, got '1'"),
        ("rate", float("nan"), "rate must be a finite number, got nan"),
        ("rate", np.float64("inf"), "rate must be a finite number, got inf"),
        ("rate", 10**400, "rate must be a finite number, got 1000"),
        ("flag", 1, "flag must be True or False, got 1"),
        ("name", None, "name must be a text, got None"),
        ("folder", 3, "folder must be a path, got 3"),
        ("maybe", 3, "maybe must be a text or None, got 3"),
        ("bound", float("inf"), "bound must be a finite number or None, got inf"),
        ("widths", (1, "2"), r"widths must be a list, each item a whole number, got \(1, '2'\)"),
        ("widths", 3, "widths must be a list, each item a whole number, got 3"),
        ("mode", "c", "mode must be one of a, b, got 'c'"),
    ],
)
def test_refused(name, value, says):
    """Another type, and a number that is not finite, is named with what was meant."""
    with pytest.raises(ValueError, match=says):
        Settings(**{name: value})


def test_settings_of_runs():
    """NumPy scalars and paths in the settings of a run are those of its config.json."""
    config = TrainConfig(run=Path("runs/x"), seed=np.int64(3), learning_rate=np.float32(0.5), env_arg=["kl_coef=0"])  # type: ignore[arg-type]
    assert asdict(config) == asdict(TrainConfig(run="runs/x", seed=3, learning_rate=0.5, env_arg=("kl_coef=0",)))
    assert ControlConfig(hidden=[np.int64(8)]).hidden == (8,)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"iterations must be a whole number, got 2.5"):
        TrainConfig(iterations=2.5)  # type: ignore[arg-type]


def test_settings_of_the_environment():
    """`gym.make` takes NumPy scalars and paths for names and numbers, and the config holds plain ones.

    A path of prompts stays one: as a text it could name a function.
    """
    config = TextGenConfig(
        reference=Path("a/b"),
        reward={Path("c"): np.float32(0.5)},  # type: ignore[dict-item]
        prompts=Path("d.jsonl"),
        kl_coef=np.float64(0.5),
        max_new_tokens=np.int64(5),  # type: ignore[arg-type]
        chat=np.bool_(False),  # type: ignore[arg-type]
        stop_token_ids=(np.int64(3),),  # type: ignore[arg-type]
        score_clip=np.float32(2.0),  # type: ignore[arg-type]
    )
    names = ("reference", "reward", "prompts", "kl_coef", "max_new_tokens", "chat", "stop_token_ids", "score_clip")
    plain_ones = ["a/b", {"c": 0.5}, Path("d.jsonl"), 0.5, 5, False, (3,), 2.0]
    assert repr([getattr(config, name) for name in names]) == repr(plain_ones)
