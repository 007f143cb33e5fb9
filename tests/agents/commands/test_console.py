"""The command `textenv` runs our agents from every folder, and a package that took their place is named."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

from textenv import command

ROOT = Path(__file__).parents[3]
REWARD = "def helpful(prompts, responses):\n    return [float(len(text)) for text in responses]\n"
# What `python -m agents` does where an editable install's finder knows our modules and the path has another package.
STARTED = f"""
import agents, runpy
agents.__path__.append({str(ROOT / "agents")!r})
runpy.run_module("agents", run_name="__main__", alter_sys=True)
"""
SIZES = ["--rollout-size", "4", "--minibatch-size", "4", "--iterations", "1", "--evaluation-prompts", "2"]


def script(folder: Path) -> Path:
    """What pip writes for the console script of pyproject.toml."""
    target = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]["textenv"]
    module, _, function = target.partition(":")
    path = folder / "bin" / "textenv"
    path.parent.mkdir()
    lines = [f"#!{sys.executable}", "import sys", f"from {module} import {function}", f"sys.exit({function}())"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def environment() -> dict[str, str]:
    """One thread, and our packages."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(words: list[object], folder: Path) -> subprocess.CompletedProcess:
    """A command in a folder."""
    return subprocess.run(
        list(map(str, words)), cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture
def project(folders, tmp_path) -> tuple[Path, list[str]]:
    """A user's folder with a package `agents` and a reward of their own, and flags for a small run."""
    folder = tmp_path / "project"
    (folder / "agents").mkdir(parents=True)
    (folder / "agents" / "__init__.py").write_text("raise ImportError('not this one')\n", encoding="utf-8")
    (folder / "my_rewards.py").write_text(REWARD, encoding="utf-8")
    tiny_task = ["--env.reference", folders["gpt2"], "--env.reward", "my_rewards:helpful", "--env.device", "cpu"]
    tiny_task += ["--env.prompts", '["a", "b", "c", "d"]', "--env.max-prompt-tokens", "8", "--env.max-new-tokens", "4"]
    return folder, tiny_task


@pytest.mark.slow
def test_a_folder_of_the_same_name(project, tmp_path):
    """The command trains beside a folder `agents/`, finds functions there, and says that the folder is hidden."""
    folder, task = project
    ended = run([script(tmp_path), "train", "--run", "run", *task, *SIZES], folder)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("note: ") == 1 and f"{str(folder / 'agents')!r} has the name of a package" in ended.stderr
    assert (folder / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_the_program_is_called_as_it_was(tmp_path):
    """Help, errors and shell completion name the program that was typed."""
    name = script(tmp_path)
    assert run([name, "train", "--help"], tmp_path).stdout.startswith("usage: textenv train ")
    assert "See textenv train --help." in run([name, "train", "--iterations", "0"], tmp_path).stderr
    assert "usage: python -m agents train" in run([sys.executable, "-m", "agents", "train", "-h"], tmp_path).stdout
    completion = run([name, "--tyro-print-completion", "bash"], tmp_path).stdout
    assert "textenv" in completion and "--env.kl-coef" in completion


@pytest.mark.slow
def test_under_torchrun(project, tmp_path):
    """`torchrun --no-python textenv train` is one run by two processes; one of them tells."""
    folder, task = project
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    ended = run([*start, "--", script(tmp_path), "train", "--run", "run", *task, *SIZES], folder)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("results in run/") == 1 and ended.stderr.count("note: ") == 1


# ---- another distribution


def install(site: Path, name: str, files: dict[str, str]) -> None:
    """Write files as pip does, with their hashes, over whatever is there."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    rows = []
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(content, encoding="utf-8")
        digest = urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).decode().rstrip("=")
        rows.append(f"{path},sha256={digest},{len(content)}")
    (info / "RECORD").write_text("\n".join(rows) + "\n", encoding="utf-8")


OURS = {"agents/__init__.py": '"""Ours."""\n', "agents/run.py": "ours = 1\n", "agents/seeds.py": "ours = 2\n"}


@pytest.mark.parametrize(
    ("theirs", "replaced"),
    [
        ({"agents/__init__.py": '"""Theirs."""\n', "agents/run.py": "theirs = 1\n"}, "agents/__init__.py"),
        ({"agents/run.py": "theirs = 1\n"}, "agents/run.py"),
        ({"agents/guardrail.py": "theirs = 1\n"}, None),
        ({"agents/run.py": "ours = 1\n"}, None),
    ],
    ids=["package", "module", "beside", "equal"],
)
def test_a_distribution_that_replaces_ours_is_named(tmp_path, monkeypatch, theirs, replaced):
    """Where both write into one folder, what is installed later wins; files beside ours do no harm."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    install(tmp_path, "textenv", OURS)
    command.check_whole(tmp_path / "agents")
    install(tmp_path, "openai-agents", theirs)
    if replaced is None:
        command.check_whole(tmp_path / "agents")
        return
    with pytest.raises(
        ValueError, match=rf"'openai-agents' has a package 'agents' too, and has replaced {replaced}"
    ) as told:
        command.check_whole(tmp_path / "agents")
    assert "pip uninstall openai-agents" in str(told.value)


def test_a_file_of_ones_own_is_nobody_elses(tmp_path, monkeypatch):
    """A file that its user has edited is not called another distribution's."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    install(tmp_path, "textenv", OURS)
    (tmp_path / "agents" / "run.py").write_text("edited = 1\n", encoding="utf-8")
    command.check_whole(tmp_path / "agents")


@pytest.mark.parametrize("name", ["openai-agents", None], ids=["distribution", "own"])
def test_a_package_that_comes_first_is_named(tmp_path, monkeypatch, capsys, name):
    """An editable install lends `python -m agents` to another package: refused, with the command that works."""
    files = {"agents/__init__.py": "", "agents/run.py": "theirs = 1\n"}
    site, ours = tmp_path / "site", tmp_path / "ours" / "agents"
    site.mkdir()
    install(site, name or "mine", files)
    if name is None:
        shutil.rmtree(site / "mine-1.0.dist-info")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    spec = importlib.machinery.PathFinder.find_spec("agents", [str(site)])
    monkeypatch.setitem(sys.modules, "agents", importlib.util.module_from_spec(spec))
    with pytest.raises(
        ValueError, match=r"comes before the package 'agents' of textenv.* Run `textenv` instead"
    ) as told:
        command.check_first(ours)
    command._tell_hidden(ours)
    for text in (str(told.value), capsys.readouterr().err):
        assert str(site / "agents") in text and ("'openai-agents'" in text) == (name is not None)
    command.check_first(site / "agents")


@pytest.mark.slow
def test_python_m_in_a_folder_with_such_a_package(project):
    """`python -m agents` beside a folder `agents/` without a program is told to use `textenv`."""
    folder, task = project
    (folder / "agents" / "__init__.py").write_text("", encoding="utf-8")
    ended = run([sys.executable, "-c", STARTED, "train", "--estimate", *task], folder)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.startswith(f"error: {str(folder / 'agents')!r} comes before the package")
