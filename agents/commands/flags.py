"""Flags: how a command line is read, and what is said where it cannot be.

Tyro makes the flags of dataclasses and explains them by their comments. Those of the text environment, such as
`--env.kl-coef 0.05`, are its `TextGenConfig`; their texts become `env_arg`, where all of a run's arguments for the
environment are. A command reads its flags first and runs afterwards, so that a mistake in them costs nothing.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from agents.algorithms.registry import ALGORITHMS
from agents.baselines.best_of_n import BestOfNConfig
from agents.baselines.dpo import DPOConfig
from agents.baselines.setting import SettingConfig
from agents.config import TrainConfig, parsed_value
from agents.control.config import ControlConfig
from agents.domains import CONTROL, TEXT, domain_of
from agents.reporting.errors import is_ours
from agents.text.config import TextConfig
from textenv.config import TextGenConfig
from textenv.training.dpo import PreferenceConfig
from textenv.training.loop import LoopConfig
from textenv.training.reward_model import RewardConfig
from textenv.training.supervised import SupervisedConfig

PREFIX = "--env."
FIELDS = {field.name: field for field in fields(TextGenConfig)}
SWITCHES = {name for name, field in FIELDS.items() if field.type == "bool"}  # flags without a value
RUN = (TrainConfig, TextConfig, ControlConfig, *(settings for settings, _ in ALGORITHMS.values()))
# The settings of each command, beside those of an environment.
SETTINGS: dict[str, tuple[type, ...]] = {
    "train": RUN,
    "profile": RUN,
    "supervised": (SupervisedConfig, LoopConfig),
    "reward-model": (RewardConfig, LoopConfig),
    "dpo": (DPOConfig, SettingConfig, PreferenceConfig, LoopConfig),
    "best-of-n": (BestOfNConfig, SettingConfig),
}
WITHOUT_ENVIRONMENT = ("supervised", "reward-model")
Environment = Annotated[TextGenConfig, tyro.conf.arg(name="env")]  # of a command's parameter, for these flags
REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _as_in_env_arg(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Settings that may be mappings or lists are one text: JSON, as the values of --env-arg, or a name."""
    union = typing.get_origin(info.type) in (typing.Union, types.UnionType)
    members = typing.get_args(info.type) if union else (info.type,)
    if Any not in members and not {typing.get_origin(member) for member in members} & {Mapping, Sequence, dict, list}:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME|JSON" if str in members else "JSON",
        instance_from_str=lambda texts: texts[0] if str in members else parsed_value(texts[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [value if isinstance(value, str) else _shown(value)],
    )


def _shown(value: Any) -> str:
    try:
        return "None" if value is None else json.dumps(value)
    except TypeError:  # a live object, of a registered environment
        return type(value).__name__


def run_command(
    commands: Mapping[str, Callable[..., Any]], arguments: Sequence[str], prog: str, description: str
) -> None:
    """Run the command that the first argument names. Help and shell completion are of all of them."""
    name = arguments[0] if arguments else "-"
    if name in commands:
        read(commands[name], arguments[1:], f"{prog} {name}")()
        return
    if not name.startswith("-"):
        close = difflib.get_close_matches(name, commands, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(commands)}."
        raise ValueError(f"no command {name!r}; {hint} See {prog} --help.")
    with REGISTRY:
        tyro.extras.subcommand_cli_from_dict(
            dict(commands), args=list(arguments), prog=prog, description=description, console_outputs=_is_first()
        )


def _is_first() -> bool:
    """Of torchrun's processes one says what is wrong."""
    return os.environ.get("RANK", "0") == "0"


def read(command: Callable[..., Any], arguments: Sequence[str], prog: str) -> Callable[[], Any]:
    """The command with what its arguments say, ready to be called.

    Raises ValueError for a value that its settings refuse. Anything else that is wrong ends in tyro's own words.
    """

    @functools.wraps(command)
    def later(*positional: Any, **named: Any) -> Callable[[], Any]:
        return functools.partial(command, *positional, **named)

    first, said = _is_first(), io.StringIO()
    try:
        with REGISTRY, contextlib.redirect_stderr(said):
            return tyro.cli(later, args=list(arguments), prog=prog, console_outputs=first)
    except SystemExit as end:
        if not first:
            raise
        # Tyro names such an error after the dataclass, and the sentence of ours names the setting.
        if (refused := _refusal(end)) is not None:
            refused.add_note(f"See {prog} --help.")
            raise refused from None
        sys.stderr.write(said.getvalue())
        raise


def _refusal(end: SystemExit) -> ValueError | None:
    """The ValueError of our own settings behind tyro's exit."""
    error: BaseException | None = end
    while error is not None:
        if isinstance(error, ValueError) and is_ours(error):
            return error
        error = error.__context__
    return None


# ---- reading a few flags before the others, which depend on them


def values_of(arguments: Sequence[str], name: str) -> list[str]:
    """All values of a flag, in either spelling: `--env-arg A --env_arg=B`."""
    return [value for flag, value in _pairs(arguments) if flag == name and value is not None]


def of_environment(arguments: Sequence[str]) -> dict[str, str]:
    """The values of `--env.NAME VALUE` by name, as texts; the last one counts."""
    found = {}
    for flag, value in _pairs(arguments):
        prefix, dot, name = flag.partition(".")
        if prefix != "env" or not dot:
            continue
        if name.removeprefix("no_") in SWITCHES:
            found[name.removeprefix("no_")] = json.dumps(not name.startswith("no_"))
        elif name in FIELDS and value is not None:
            found[name] = value
    return found


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Every flag, without dashes in front and with underscores in its name, and the text after it."""
    for argument, following in zip_longest(arguments, arguments[1:]):
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            yield flag.removeprefix("--").replace("-", "_"), value if equals else following


# ---- the text environment's settings


def refuse_twice(arguments: Sequence[str]) -> None:
    """Raise ValueError for a setting that is given by `--env-arg` and by `--env.NAME`."""
    by_item = [item.partition("=")[0] for item in values_of(arguments, "env_arg")]
    for name, value in of_environment(arguments).items():
        if name in by_item:
            raise ValueError(
                f"{name} is given twice, as --env-arg {name}=... and as {_flag_of(name)} {value}; leave one of them "
                "out."
            )


def _flag_of(name: str) -> str:
    return PREFIX + name.replace("_", "-")


# ---- settings in errors


def flags_named(arguments: Sequence[str], sentence: str) -> str:
    """The flags of the settings that an error calls by their names, as a sentence; empty if there are none.

    arguments: of the command line, which may be wrong. A setting of one word is meant where the sentence begins with
    it, or says NAME=VALUE.
    """
    command, sentence = arguments[0] if arguments else "", re.sub(r"'[^']*'", "''", sentence)  # no names in quotes
    own = [field.name for settings in SETTINGS.get(command, ()) for field in fields(settings)]
    flags = {name: f"--{name.replace('_', '-')}" for name in own}
    with contextlib.suppress(Exception):  # the environment may be what is wrong
        named = (values_of(arguments, "env") or [TrainConfig.env])[-1]
        if command in SETTINGS and command not in WITHOUT_ENVIRONMENT and domain_of(named) is TEXT:
            flags |= {name: _flag_of(name) for name in FIELDS}
    found = [
        flags[name]
        for name in re.findall(r"\b[a-z][a-z0-9_]*", sentence)
        if name in flags and ("_" in name or f"{name}=" in sentence or sentence.startswith(f"{name} "))
    ]
    missing = [flag for flag in dict.fromkeys(found) if flag not in sentence]
    return f"On the command line: {', '.join(missing)}." if missing else ""


# ---- settings in the wrong place


def refuse_misplaced(
    arguments: Sequence[str], classes: Sequence[type], env: str, algorithm: str | None, prog: str
) -> None:
    """Raise ValueError for a flag that this command line lacks and another one has. It says where the setting goes.

    classes: the settings that the command line has. algorithm: None for a command that has none to choose.
    """
    known = {field.name for settings in classes for field in fields(settings)}
    for flag, value in _pairs(arguments):
        name = flag.removeprefix("no_")
        if known & {flag, name}:
            continue
        where = _place(flag, name, value, env, algorithm)
        if where is not None:
            raise ValueError(f"--{flag.replace('_', '-')} {where}. See {prog} --help.")


def _place(flag: str, name: str, value: str | None, env: str, algorithm: str | None) -> str | None:
    """Where a setting goes that is none of this command line's; None of an unknown one."""
    text = domain_of(env) is TEXT
    prefix, dot, setting = flag.partition(".")
    if prefix == "env" and dot and not text:
        return f"is for text environments, and {env} is none; give its arguments as --env-arg {setting}=VALUE"
    if name in FIELDS:
        if not text:
            return f"is a setting of text environments, and {env} is none; see --env"
        alone = name in SWITCHES or value is None
        return f"is a setting of the environment: write {_flag_of(flag)}{'' if alone else f' {value}'}"
    having = sorted(
        other for other, (settings, _) in ALGORITHMS.items() if name in {field.name for field in fields(settings)}
    )
    if having and algorithm is not None:
        return f"is a setting of {', '.join(having)}, and this run's algorithm is {algorithm}; see --algorithm"
    for domain, settings, what in (
        (TEXT, TextConfig, "text"),
        (CONTROL, ControlConfig, "environments other than text"),
    ):
        if domain_of(env) is not domain and name in {field.name for field in fields(settings)}:
            return f"is a setting for {what}, and this run's environment is {env}; see --env"
    return None
