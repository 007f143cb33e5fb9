"""The READMEs are right: their Python runs, and their flags, settings, links and names are those of the code."""

import contextlib
import dataclasses
import importlib
import io
import re
import statistics
from pathlib import Path

import pytest

from agents.__main__ import main
from agents.algorithms.registry import ALGORITHMS
from textenv import TextGenConfig

ROOT = Path(__file__).parent.parent
READMES = [ROOT / name for name in ("README.md", "benchmarks/README.md", "examples/README.md")]
SHRUNK = ["--iterations", "1", "--rollout-size", "4", "--minibatch-size", "4", "--evaluation-prompts", "4"]
HELPS = [
    ["train"],
    ["train", "--env", "CartPole-v1"],
    ["generate"],
    ["evaluate"],
    ["play"],
    ["view"],
    ["supervised"],
    ["reward-model"],
    ["dpo"],
    ["best-of-n"],
]
OTHER_PROGRAMS = {
    "--output",
    "--model",
    "--quick",
    "--smollm2",
    "--trl-python",
    "--ranks",
    "--nproc-per-node",
    "--tyro-print-completion",
}  # torchrun and tyro among them

every_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(readme, language):
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", readme.read_text(), flags=re.MULTILINE | re.DOTALL)


PYTHON = [(readme, index) for readme in READMES for index in range(len(blocks(readme, "python")))]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A folder in which `runs/mine` is a short training run."""
    folder = tmp_path_factory.mktemp("readme")
    with contextlib.chdir(folder):
        main(["train", "--run", "runs/mine", "--env-arg", "max_new_tokens=4", *SHRUNK])
    return folder


@pytest.mark.parametrize(("readme", "index"), PYTHON, ids=lambda value: str(value).rpartition("/")[2])
def test_python_runs(readme, index, run_folder, monkeypatch):
    """Every Python block runs by itself and prints something."""
    monkeypatch.chdir(run_folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(blocks(readme, "python")[index], f"{readme.name}:{index}", "exec"), {"__name__": "readme"})
    assert printed.getvalue().strip()


@pytest.fixture(scope="module")
def flags():
    """Every flag of `python -m agents`."""
    text = io.StringIO()
    for arguments in HELPS:
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            main([*arguments, "--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]+", text.getvalue())) | {"--help"}


@every_readme
def test_flags_exist(readme, flags):
    """Every flag that a README names is one of the command line's."""
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", readme.read_text()))
    assert named <= flags | OTHER_PROGRAMS


def test_settings_exist():
    """Every `NAME=VALUE` and `--env.NAME` of the README is an argument of the environment."""
    text = READMES[0].read_text()
    settings = re.findall(r"--env-arg (\w+)=", text) + re.findall(r"`(\w+)=[^`]+`", text)
    settings += [name.replace("-", "_") for name in re.findall(r"--env\.([\w-]+)", text)]
    assert len(settings) > 6 and set(settings) <= {field.name for field in dataclasses.fields(TextGenConfig)}


def test_all_algorithms_are_named():
    """The README's list of algorithms is the registry's."""
    listed = re.search(r"`--algorithm` ([\w, ]+?);", " ".join(READMES[0].read_text().split()))
    assert listed and sorted(re.findall(r"[a-z0-9]+", listed[1].replace(" or ", " "))) == sorted(ALGORITHMS)


@every_readme
def test_links_lead_somewhere(readme):
    """Every relative link and picture is a file, and a heading where it names one."""
    for target in re.findall(r"\]\(([^)#]+?(?:#[\w-]+)?)\)", readme.read_text()):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        assert (readme.parent / path).exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", (readme.parent / path).read_text(), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings]


@every_readme
def test_dotted_names_exist(readme):
    """Every `textenv.module.Name` that a README names can be imported."""
    for name in set(re.findall(r"\b(?:textenv|agents|benchmarks)(?:\.\w+)+(?::\w+)?", readme.read_text())):
        module, _, attribute = name.replace(":", ".").rpartition(".")
        if name.endswith(".NAME"):
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name


def test_the_tree_is_the_packages():
    """The annotated tree names every room of both packages, and every module at the top of textenv."""
    tree = next(text for text in blocks(READMES[0], "text") if text.startswith("textenv/"))
    words = set(re.findall(r"\w+/?", "\n".join(line[:36] for line in tree.splitlines())))
    rooms = {
        f"{path.parent.name}/" for path in [*ROOT.glob("textenv/*/__init__.py"), *ROOT.glob("agents/*/__init__.py")]
    }
    modules = {path.stem for path in ROOT.glob("textenv/*.py")} - {"__init__"}
    assert len(rooms) > 10 and rooms | modules <= words


@every_readme
def test_lines_are_wrapped(readme):
    """Prose is wrapped at 120 columns; tables and pictures are not prose."""
    assert [line for line in readme.read_text().splitlines() if len(line) > 120 and line[0] not in "|!"] == []


def test_claims_about_size():
    """The README has at most 170 lines, and what it says of the packages' size is so, within a tenth."""
    claim = re.search(
        r"about ([\d,]+) lines in about (\d+) modules, half of them under (\d+) lines and none above (\d+)",
        " ".join(READMES[0].read_text().split()),
    )
    assert claim and READMES[0].read_text().count("\n") <= 170
    lines, modules, median, longest = (int(number.replace(",", "")) for number in claim.groups())
    files = [path for package in ("textenv", "agents") for path in (ROOT / package).rglob("*.py")]
    sizes = [path.read_text().count("\n") for path in files if path.name != "__init__.py"]
    assert sum(sizes) == pytest.approx(lines, rel=0.1) and len(sizes) == pytest.approx(modules, rel=0.1)
    assert statistics.median(sizes) == pytest.approx(median, rel=0.1) and max(sizes) <= longest
