"""What the environment's docstring says is so: sections, spaces, arguments, rewards, ends, infos and examples.

The docstring is in Gymnasium's format, with two lists that are read here:

    ## Arguments
    * `name=default`: meaning. One for every setting; the default is a Python literal.

    ## Information
    * `key` (when): meaning. `when` is "reset", "every step", "last step" or two of them joined by "and", and may go
      on with ", if `condition`", a Python expression over the arguments.
"""

import ast
import doctest
import inspect
import re

import gymnasium as gym
import numpy as np
import pytest

from tests.support import tiny
from textenv import TextGenConfig
from textenv.env import TextGenEnv
from textenv.vector_env import TextGenVectorEnv

SECTIONS = [
    *("Description", "Action Space", "Observation Space", "Rewards", "Starting State", "Episode End"),
    *("Arguments", "Information", "Version History"),
]
WHEN = ("reset", "every step", "last step")
# Settings under which keys of info come and go. A setting that brings a new key is added here.
VARIATIONS = [{}, {"kl_coef": 0}, {"action_mask": "special"}]

pytestmark = pytest.mark.usefixtures("models_kept")
small = pytest.mark.parametrize("kind", ["gpt2"], indirect=True)


def sections(thing):
    """Title -> text of a docstring's sections."""
    parts = re.split(r"^## (.+)$", inspect.getdoc(thing), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def items(text):
    """What stands in backticks at the head of each list item, what follows in parentheses, and the meaning."""
    pattern = r"^\* `([^`]+)`(?: \((.+?)\))?: (.*?)(?=^\* |^```|\Z)"
    return re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL)


def arguments(thing):
    """Name -> default, as the docstring has them."""
    pairs = [head.partition("=") for head, _, _ in items(sections(thing)["Arguments"])]
    assert len({name for name, _, _ in pairs}) == len(pairs)
    return {name: ast.literal_eval(default) for name, _, default in pairs}


def signature(thing):
    """Name -> default of a constructor's own arguments."""
    parameters = inspect.signature(thing).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD}


# ---- form


def test_sections_are_gymnasiums():
    """All of Gymnasium's sections, in its order, none of them empty."""
    found = sections(TextGenEnv)
    assert list(found) == SECTIONS and all(text.strip() for text in found.values())


def test_table_is_of_the_embedded_task():
    """The table at the top shows the spaces of the environment without arguments, and how to make it."""
    rows = dict(re.findall(r"^\| (.+?) \| `(.+)` \|$", inspect.getdoc(TextGenEnv), flags=re.MULTILINE))
    env = eval(rows["import"], {"gymnasium": gym})
    assert rows["Action Space"] == str(env.action_space)
    parts = [
        re.findall(r"'\w+': .+?\)(?=, '|\)$)", text) for text in (rows["Observation Space"], str(env.observation_space))
    ]
    assert sorted(parts[0]) == sorted(parts[1]) and len(parts[0]) == 2  # Gymnasium's versions order them differently


@pytest.mark.parametrize("thing", [TextGenEnv])
def test_code_runs(thing):
    """The examples run, top to bottom, and print what they say."""
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(thing).replace("```", ""), {}, thing.__name__, None, 0)
    assert len(test.examples) > 5
    result = doctest.DocTestRunner().run(test)
    assert result.failed == 0


def test_version_history():
    """Every registered version has its line."""
    listed = re.findall(r"^\* v(\d+): .+", sections(TextGenEnv)["Version History"], flags=re.MULTILINE)
    registered = [spec.version for spec in gym.registry.values() if spec.name == "TextGen"]
    assert sorted(map(int, listed)) == sorted(registered)


# ---- arguments


def test_arguments_are_the_settings():
    """Every argument of gym.make is listed with its default, and nothing else is."""
    assert arguments(TextGenEnv) == {**vars(TextGenConfig()), **signature(TextGenEnv)}


def test_vector_arguments():
    """The vector environment lists what it has besides."""
    own = {name: getattr(value, "value", value) for name, value in signature(TextGenVectorEnv).items()}
    assert arguments(TextGenVectorEnv) == own


@pytest.mark.parametrize("thing", [TextGenEnv, TextGenVectorEnv])
def test_render_modes(thing):
    """The render modes that are named are those of the metadata."""
    meaning = {head.partition("=")[0]: text for head, _, text in items(sections(thing)["Arguments"])}["render_mode"]
    assert re.findall(r'`"(\w+)"`', meaning) == thing.metadata["render_modes"]


def length_reward(prompts, responses):
    """A reward function in the documented form."""
    return [float(len(response)) for response in responses]


def some_prompts():
    """Prompts in the documented form."""
    return ["a", "b"]


@small
@pytest.mark.parametrize(
    "given",
    [
        {"reward": "tests.textenv.test_documentation:length_reward"},
        {"reward": length_reward},
        {"reward": {"tests.textenv.test_documentation:length_reward": 0.5}},
        {"prompts": ["a", "b"]},
        {"prompts": "tests.textenv.test_documentation:some_prompts"},
        {"prompts": "JSONL"},
        *({"action_mask": mask} for mask in ("special", "top_k:5", "top_p:0.5", "words:a,b", "regex:[a-z]*")),
        {"action_mask": ["special", "top_k:5"]},
        *({"dtype": dtype} for dtype in ("float32", "bfloat16", "float16")),
        {"stop_token_ids": [65]},
    ],
    ids=lambda given: str(given)[:40],
)
def test_documented_forms_work(settings, given, tmp_path):
    """Each form of an argument that the list names makes an environment."""
    if given.get("prompts") == "JSONL":
        given = {"prompts": str(tmp_path / "prompts.jsonl")}
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    env = gym.make("TextGen-v0", **{**settings, **given})
    env.reset(seed=0)
    assert isinstance(env.step(65)[1], float)


# ---- spaces, rewards, starts and ends


@small
def test_spaces(settings):
    """Discrete(V) and Dict of Box and MultiBinary, V the width of the logits, L the sum of both budgets."""
    env = gym.make("TextGen-v0", **settings)
    width = settings["max_prompt_tokens"] + settings["max_new_tokens"]
    assert env.action_space == gym.spaces.Discrete(env.unwrapped.task.reference.model.config.vocab_size)
    wanted = dict(
        input_ids=gym.spaces.Box(0, tiny.VOCABULARY - 1, (width,), np.int64),
        attention_mask=gym.spaces.MultiBinary(width),
    )
    assert env.observation_space == gym.spaces.Dict(wanted)


@small
def test_every_id_is_legal(settings):
    """Each of the V ids can be written, pad, end and unused ones too, whatever the mask says; the next is refused."""
    env = TextGenVectorEnv(tiny.VOCABULARY, **{**settings, "action_mask": "special"})
    env.reset(seed=0)
    observation, reward, *_ = env.step(np.arange(tiny.VOCABULARY))
    assert np.isfinite(reward).all()
    assert observation["input_ids"][:, settings["max_prompt_tokens"]].tolist() == list(range(tiny.VOCABULARY))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="not a token id"):
        env.step(np.arange(tiny.VOCABULARY) + 1)


@small
def test_prompts_are_left_padded(settings):
    """Prompts end in column max_prompt_tokens - 1, responses start in the next, and the mask tells what is real."""
    env, start = gym.make("TextGen-v0", **settings), settings["max_prompt_tokens"]
    for seed in range(6):
        observation, _ = env.reset(seed=seed)
        text = tiny.tokenizer().decode(observation["input_ids"][observation["attention_mask"] == 1])
        assert text in settings["prompts"] and len(text) == observation["attention_mask"][:start].sum()
        assert observation["attention_mask"][start - len(text) : start].all()
        assert not observation["attention_mask"][start:].any()  # an empty response
        observation = env.step(77)[0]
        assert observation["input_ids"][start] == 77 and observation["attention_mask"][start] == 1
        assert not observation["attention_mask"][start + 1 :].any()


@small
def test_starting_states_are_uniform(settings):
    """Each prompt is drawn as often as the others: 400 of 1,600, within five standard deviations (17 each)."""
    env = TextGenEnv(**{**settings, "kl_coef": 0})
    env.reset(seed=0)
    lengths = [int(env.reset()[0]["attention_mask"].sum()) for _ in range(1600)]
    counts = [lengths.count(len(prompt)) for prompt in settings["prompts"]]
    assert len(set(map(len, settings["prompts"]))) == 4 and sum(counts) == 1600
    assert all(abs(count - 400) < 5 * 17.4 for count in counts)


@small
@pytest.mark.parametrize("tokens", [[70, 71, tiny.END], [70] * 12])
def test_rewards_and_ends(settings, tokens):
    """kl_coef · log π_ref at each token, the score besides at the last; a stop token or the budget terminates."""
    env = gym.make("TextGen-v0", **settings)
    env.reset(seed=0)
    for step, token in enumerate(tokens, 1):
        _, reward, terminated, truncated, info = env.step(token)
        paid = settings["kl_coef"] * info["reference_log_prob"] + (info["score"] if terminated else 0.0)
        assert reward == pytest.approx(paid, abs=2e-5)
        assert terminated == (step == len(tokens)) and not truncated
    assert info["finish_reason"] == ("stop" if tokens[-1] == tiny.END else "length")


# ---- information


def documented(config):
    """Moment -> the keys that the list promises for it, under these settings."""
    keys = {moment: set() for moment in WHEN}
    for key, when, _ in items(sections(TextGenEnv)["Information"]):
        moments, _, condition = when.partition(", if ")
        if not condition or eval(condition.strip("`"), {}, vars(config)):
            for moment in moments.split(" and "):
                keys[moment].add(key)
    return keys


@small
@pytest.mark.parametrize("variation", VARIATIONS, ids=str)
def test_information_comes_when_it_is_said_to(settings, variation):
    """Every key of info is in the list, and comes exactly when the list says."""
    settings = {**settings, **variation}
    wanted = documented(TextGenConfig(**settings))
    env = gym.make("TextGen-v0", **settings)
    assert set(env.reset(seed=0)[1]) == wanted["reset"]
    assert set(env.step(70)[4]) == wanted["every step"]
    assert set(env.step(tiny.END)[4]) == wanted["every step"] | wanted["last step"]


@small
def test_every_condition_is_tried_both_ways(settings):
    """The variations above switch every conditional key on and off, so that the test above can fail."""
    configs = [TextGenConfig(**{**settings, **variation}) for variation in VARIATIONS]
    for _, when, _ in items(sections(TextGenEnv)["Information"]):
        condition = when.partition(", if ")[2].strip("`")
        assert not condition or {bool(eval(condition, {}, vars(config))) for config in configs} == {True, False}


@small
def test_information_types(settings):
    """Floats, reasons, texts without special tokens, and masks int8 [V] that `action_masks` gives as bool."""
    env = gym.make("TextGen-v0", **{**settings, "action_mask": "special"})
    env.reset(seed=0)
    env.step(tiny.tokenizer()("h").input_ids[0])
    info = env.step(tiny.END)[4]
    assert type(info["reference_log_prob"]) is float and type(info["score"]) is float
    assert info["finish_reason"] == "stop" and info["response"] == "h"
    assert info["action_mask"].dtype == np.int8 and info["action_mask"].shape == (tiny.VOCABULARY,)
    assert np.array_equal(env.unwrapped.action_masks(), info["action_mask"] == 1)


@small
def test_score_is_the_rewards(settings):
    """`score` is what the reward gave: here a function's number."""
    env = gym.make("TextGen-v0", **{**settings, "reward": length_reward})
    env.reset(seed=0)
    env.step(70)
    assert env.step(tiny.END)[4]["score"] == 1.0
