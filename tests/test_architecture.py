"""Rooms and doors: where modules live, who may import whom, and how large things may grow, read from the source."""

import ast
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agents.presets import defaults
from agents.run import build

ROOT = Path(__file__).parent.parent
TEXTENV, AGENTS = (sorted((ROOT / package).rglob("*.py")) for package in ("textenv", "agents"))
FILES = [*TEXTENV, *AGENTS]
PROGRAMS = sorted(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MOST_MODULES = 14  # in a folder, without its __init__
MOST_LINES = 400  # of a file
MOST_FUNCTION_LINES = 60

# A module may import those of earlier lines, and those before it on its own line as far back as the bar: what stands
# on the two sides of a bar knows nothing of each other.
TEXTENV_ORDER = """
    state | kl | json_lines | unread | settings config | command
    models.token_texts | models.encoding | models.loading
    models.sampling models.language_model models.logits \
        models.comparison models.cache models.compiled models.decoding models.probe
    prompts.tokenized prompts.sources prompts.reset_options prompts.samplers | rewards.calling rewards.base \
        rewards.reward_model rewards.functions rewards.per_token rewards.ray_pool rewards.library rewards.metrics \
        rewards.normalization rewards.build
    masks.token_sets masks.masks masks.build | \
        training.files training.checkpoints training.loop training.card training.muon training.data training.supervised \
        training.supervised_job \
        training.preferences training.calibration training.reward_card training.reward_model \
        training.dpo
    reviews.grammar.words reviews.grammar.aspects reviews.grammar.products reviews.grammar.lexicon \
        reviews.grammar.forms reviews.grammar.clauses reviews.grammar.parser reviews.prompts reviews.grammar.writer \
        reviews.gold reviews.weights reviews.tokenizer reviews.sampling reviews.measure reviews.card \
        reviews.build reviews.materials
    task
    dynamics | generation
    rendering.text rendering.picture rendering.viewers
    env vector_env torchrl_env
    adapters.whole_penalty adapters.stable_baselines | conformance
"""
AGENTS_ORDER = """
    reporting.files reporting.phases
    reporting.errors
    ranks | seeds | config reporting.services reporting.trackers | reporting.plots | reporting.report | reporting.dumps \
        | reporting.record_file | reporting.alarms
    reporting.viewer
    interfaces
    objectives.advantages objectives.losses objectives.actor_critic objectives.group \
        objectives.soft_q
    algorithms.a2c | algorithms.dqn | algorithms.grpo | algorithms.ppo | algorithms.reinforce | algorithms.rloo \
        | algorithms.sac
    algorithms.registry
    replay trainer reporting.profile
    text.config text.sharding text.fingerprints text.lora text.precision text.networks text.rollout text.collector \
        text.evaluation text.samples text.policy text.records text.experiment text.shading \
        | control.config control.networks control.environments control.collector control.policy control.experiment
    domains
    presets | run_folder | checkpoint
    reporting.estimate | unread | play | baselines.order | baselines.setting | baselines.frontier
    baselines.best_of_n | baselines.pairs | baselines.results
    baselines.dpo
    run
    commands.flags commands.jobs commands.baselines | commands.policies | commands.models | commands.view
    __main__
"""
KNOW_THE_EMBEDDED_TASK = ["agents.text.evaluation", "textenv.task"]


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


def name_of(path):
    """A file's module, `__init__` included."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def doors(package, order):
    """Module -> the modules of its package that it may import."""
    allowed, earlier = {}, set()
    for line in order.strip().splitlines():
        for group in line.split("|"):
            before = set(earlier)
            for module in group.split():
                name = f"{package}.{module}"
                assert name not in allowed, f"{name} stands in the order twice"
                allowed[name] = set(before)
                before.add(name)
        earlier = set(allowed)
    return allowed


DOORS = doors("textenv", TEXTENV_ORDER) | doors("agents", AGENTS_ORDER)
MODULES = [path for path in FILES if path.stem != "__init__"]
each_file = pytest.mark.parametrize("path", FILES, ids=name_of)
each_textenv_file = pytest.mark.parametrize("path", TEXTENV, ids=name_of)


def test_the_reader_reads(tmp_path):
    """The tests below can fail: every way to import is seen."""
    assert {"torchrl", "tensordict", "torch"} <= roots(ROOT / "textenv" / "torchrl_env.py")
    assert {"textenv.state", "textenv.task"} <= imports(ROOT / "textenv" / "dynamics.py")
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


def test_the_order_is_read():
    """Earlier lines are open, and earlier names up to the bar; what is beyond it, later or oneself is not."""
    assert doors("p", "a | b c\nd e | f") == {
        "p.a": set(),
        "p.b": set(),
        "p.c": {"p.b"},
        "p.d": {"p.a", "p.b", "p.c"},
        "p.e": {"p.a", "p.b", "p.c", "p.d"},
        "p.f": {"p.a", "p.b", "p.c"},
    }


# ---- who imports whom


def test_every_module_has_its_place():
    """The order above names every module that there is, and no other: a new one is given its place."""
    assert sorted(DOORS) == sorted(map(name_of, MODULES))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_downward(path):
    """No import runs against the order, or past a bar."""
    name = name_of(path)
    assert not imports(path) & {other for other in DOORS if other.startswith(name.split(".")[0])} - DOORS[name]


@each_file
def test_packages_import_nothing(path):
    """A package's `__init__` holds its docstring, and a module imports modules; only textenv's own is a face."""
    if path.stem == "__init__" and path != ROOT / "textenv" / "__init__.py":
        assert not imports(path)
    if path in TEXTENV:
        assert "textenv" not in imports(path)


@each_textenv_file
def test_textenv_never_imports_agents(path):
    """The environment is whole without agents."""
    assert not roots(path) & {"agents", "tests", "examples", "benchmarks"}


@each_textenv_file
def test_torchrl_in_one_room(path):
    """Only torchrl_env.py imports torchrl and tensordict."""
    assert path.name == "torchrl_env.py" or not roots(path) & {"torchrl", "tensordict"}


@each_textenv_file
def test_stable_baselines_in_one_room(path):
    """Only stable_baselines.py imports stable_baselines3, and nothing imports that: it is an extra."""
    assert path.name == "stable_baselines.py" or not roots(path) & {"stable_baselines3", "sb3_contrib"}
    assert "textenv.adapters.stable_baselines" not in imports(path)


def test_the_embedded_task_is_a_default_in_two_places():
    """Its prompts, weights and gold rater stand for what is not given; all else would work without them."""
    knowing = [
        name_of(path)
        for path in FILES
        if "reviews" not in path.parts and any(name.startswith("textenv.reviews") for name in imports(path))
    ]
    assert sorted(knowing) == KNOW_THE_EMBEDDED_TASK


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_no_test_imports_another(path):
    """Shared helpers are in tests/support, and a name in a string ("tests.x:f") is the file's own."""
    assert not [name for name in imports(path) if re.match(r"tests\..*\btest_", name)]
    named = set(re.findall(r"[\"'](tests\.[\w.]*\btest_\w+)", path.read_text(encoding="utf-8")))
    assert named <= {name_of(path)}


# ---- how large


@pytest.mark.parametrize("package", ["textenv", "agents", "tests"])
def test_no_folder_is_a_heap(package):
    """A reader can take in a folder at a glance."""
    heaps = {}
    for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
        modules = [path for path in folder.glob("*.py") if path.stem != "__init__"]
        if len(modules) > MOST_MODULES:
            heaps[str(folder.relative_to(ROOT))] = len(modules)
    assert not heaps


@pytest.mark.parametrize("path", [*FILES, *PROGRAMS], ids=name_of)
def test_nothing_is_long(path):
    """Neither files nor functions, decorators and docstrings included."""
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            assert node.end_lineno - first + 1 <= MOST_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", [*FILES, *PROGRAMS], ids=name_of)
def test_text_files_name_their_encoding(path):
    """No file is read or written, and no program's output read, in whatever encoding the system has."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and reads_or_writes_text(node):
            assert "encoding" in {keyword.arg for keyword in node.keywords}, ast.unparse(node)


def reads_or_writes_text(call):
    """Whether it is `open` or a method of Path in text mode, or starts a program whose output is text."""
    constants = [word.value for word in call.args if isinstance(word, ast.Constant)]
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and not any("b" in str(mode) for mode in constants[-1:])
    name = getattr(call.func, "attr", "")
    opens = name == "open" and len(constants) == len(call.args) and not any("b" in str(mode) for mode in constants)
    return opens or name in ("read_text", "write_text") or "text" in {keyword.arg for keyword in call.keywords}


def test_tests_mirror_the_packages():
    """A room's tests are found under its own name."""
    for package in ("textenv", "agents"):
        rooms = {path.parent.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")}
        mirrored = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests" / package).rglob("*.py")}
        assert mirrored <= rooms


def test_a_ppo_iteration_enters_few_files():
    """Who reads PPO on text from prompt to update opens at most 24 files: those that one iteration enters."""
    train, text, ppo = defaults("TextGen-v0", "ppo")
    _, trainer = build(replace(train, iterations=1), replace(text, rollout_size=32), ppo)
    entered = set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("textenv", "agents"):
            entered.add(str(path.relative_to(ROOT)))

    sys.setprofile(note)
    try:
        list(trainer.iterate())
    finally:
        sys.setprofile(None)
    assert "agents/trainer.py" in entered and len(entered) <= 24, sorted(entered)
