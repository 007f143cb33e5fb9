"""Rooms and doors (DESIGN §4): who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "textenv").rglob("*.py"))

# Each module may import those of earlier lines, and those before it on its own line.
ORDER = [
    *("state", "kl", "sampling", "samplers", "config", "calling", "loading"),
    *(
        "prompts",
        "prompt_sources",
        "rewards",
        "token_texts",
        "language_model",
        "token_sets",
        "masks",
        "mask_building",
        "reward_model",
    ),
    *("score_normalisation", "function_rewards", "token_rewards", "scores", "metrics", "reward_building"),
    "task",
    *("dynamics", "generation", "options"),
    *("render", "picture", "viewers", "env", "vector_env", "torchrl_env", "wrappers"),
    "conformance",
]


def imports(path):
    """Every module that a file imports, at the top or inside a function, with dots resolved."""
    found = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found


def roots(path):
    """The top-level packages that a file imports."""
    return {name.partition(".")[0] for name in imports(path)}


def test_the_reader_reads(tmp_path):
    """The test below can fail: every way to import is seen."""
    assert {"torchrl", "tensordict", "torch"} <= roots(ROOT / "textenv" / "torchrl_env.py")
    assert {"textenv.state", "textenv.task"} <= imports(ROOT / "textenv" / "dynamics.py")
    file = ROOT / "textenv" / "reviews" / "__init__.py"
    source = (
        "def f():\n    import agents.x as y\n    from .. import task\n    from ..env import a\n    from . import b\n"
    )
    tree_file = tmp_path / "textenv" / "reviews" / "made_up.py"
    tree_file.parent.mkdir(parents=True)
    tree_file.write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "ROOT", tmp_path)
        seen = imports(tree_file)
    assert {"agents.x", "textenv.task", "textenv.env", "textenv.env.a", "textenv.reviews.b"} <= seen
    assert file in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_textenv_never_imports_agents(path):
    """The environment is whole without agents."""
    assert not roots(path) & {"agents", "tests", "examples", "benchmarks"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torchrl_in_one_room(path):
    """Only torchrl_env.py imports torchrl and tensordict."""
    assert path.name == "torchrl_env.py" or not roots(path) & {"torchrl", "tensordict"}


@pytest.mark.parametrize("name", ORDER)
def test_import_direction(name):
    """No import runs against the order of the core."""
    path = ROOT / "textenv" / f"{name}.py"
    if not path.exists():
        pytest.skip("not written yet")
    later = {f"textenv.{other}" for other in ORDER[ORDER.index(name) :]}
    assert not imports(path) & later


def test_every_room_is_on_the_plan():
    """A new module of the core is given its place in the order, or is one of those outside it."""
    outside = {"__init__", "stable_baselines", "supervised", "reward_training"}
    assert {path.stem for path in (ROOT / "textenv").glob("*.py")} <= {*ORDER, *outside}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_stable_baselines_in_one_room(path):
    """Only stable_baselines.py imports stable_baselines3, and nothing imports that: it is an extra."""
    assert path.name == "stable_baselines.py" or not roots(path) & {"stable_baselines3", "sb3_contrib"}
    assert "textenv.stable_baselines" not in imports(path)
