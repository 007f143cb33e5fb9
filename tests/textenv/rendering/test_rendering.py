"""What people see: text in color, live typing, pictures and videos, in every face."""

import dataclasses
import io
import itertools
import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import AddRenderObservation, HumanRendering, RecordVideo
from gymnasium.wrappers.vector import RecordVideo as RecordVectorVideo
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.support import tiny
from textenv.rendering import picture, viewers
from textenv.rendering.text import (
    ABOVE,
    BELOW,
    PROMPT,
    EpisodeView,
    TextStreamer,
    ansi,
    color,
    make_page,
    paint,
    printable,
    shade,
)
from textenv.state import start
from textenv.vector_env import TextGenVectorEnv

pytestmark = [pytest.mark.parametrize("kind", ["gpt2"], indirect=True), pytest.mark.usefixtures("models_kept")]
CODE = re.compile(r"\x1b\[[0-9;]*m")
BYTES = "a π €\n😀 ß"  # characters of one, two, three and four bytes


@pytest.fixture(autouse=True)
def colors(monkeypatch):
    """As in a terminal without NO_COLOR."""
    monkeypatch.delenv("NO_COLOR", raising=False)


def ids_of(text):
    """A text as tokens, one a byte."""
    return tiny.tokenizer()(text).input_ids


def written(prompt, response):
    """A state of one row, with some bytes of prompt padding and room left."""
    ids = torch.tensor([[tiny.PAD, tiny.PAD, *ids_of(prompt)]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, :2] = False
    state = start(ids, mask, len(response) + 3, tiny.PAD)
    for token in response:
        state = state.append(torch.tensor([token]), torch.tensor([True]))
    return state


def play(env, tokens):
    """Steps through tokens after a seeded reset."""
    env.reset(seed=0)
    for token in tokens:
        env.step(token)


# ---- text from tokens


def byte_fallback_tokenizer():
    """Bytes as tokens in SentencePiece's manner: every byte of an unfinished character decodes to a replacement."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("fallback", [False, True])
def test_typing_never_shows_half_a_character(fallback, kind):
    """Every byte is a token; each character comes whole, with its last byte, and the sum is the text."""
    tokenizer = byte_fallback_tokenizer() if fallback else tiny.tokenizer()
    ids = list(BYTES.encode()) if fallback else ids_of(BYTES)
    typewriter = TextStreamer(tokenizer, ids[:2])
    pieces = [typewriter.type(token) for token in ids[2:]]
    assert "".join(pieces) == BYTES[2:] and typewriter.rest() == ""
    lengths = [len(character.encode()) for character in BYTES[2:]]
    wanted = [piece for character, n in zip(BYTES[2:], lengths, strict=True) for piece in [""] * (n - 1) + [character]]
    assert pieces == wanted


def test_broken_bytes_come_out_as_replacements(kind):
    """Random bytes are typed as the decoder's whole text has them, however they come."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(256, size=12).tolist()
        typewriter = TextStreamer(tiny.tokenizer(), [])
        typed = "".join(typewriter.type(token) for token in ids) + typewriter.rest()
        assert typed == printable(tiny.tokenizer().decode(ids))


def test_control_codes_are_shown_not_obeyed(kind):
    """A model that writes escape sequences cannot clear the screen of whoever watches; lines and tabs stay."""
    state = written("a", ids_of("\x1b[2J\x07\r\n\tb\x7f"))
    text = ansi(state, 0, tiny.tokenizer())
    assert CODE.sub("", text) == "a^[[2J^G^M\n\tb^?"
    assert printable("\x9b1m") == "\ufffd1m"
    assert "\x1b" not in ansi(written("\x1b", []), 0, tiny.tokenizer()).replace(f"\x1b[38;5;{PROMPT}m", "")[:2]


# ---- colors


def test_ansi_colors_each_token_by_its_number(kind):
    """Worked by hand: gray prompt, blue below zero, red above, three strengths, none near zero."""
    state = written("it", ids_of("abcdefg"))
    values = [-3.0, -1.0, -0.4, 0.0, 0.4, 2.0, 3.0]  # shares of 3: 1, ⅓, 0.13, 0, 0.13, ⅔, 1
    weak, _, strong = BELOW
    wanted = (
        f"\x1b[38;5;{PROMPT}mit\x1b[0m\x1b[38;5;{strong}ma\x1b[0m\x1b[38;5;{weak}mb\x1b[0mcde"
        f"\x1b[38;5;{ABOVE[1]}mf\x1b[0m\x1b[38;5;{ABOVE[2]}mg\x1b[0m"
    )
    assert ansi(state, 0, tiny.tokenizer(), values) == wanted
    for given in (torch.tensor(values), np.array(values), [*values, 9.0, 9.0]):  # a row of [R] may be longer
        scale = None if len(given) == 7 else 3.0
        assert ansi(state, 0, tiny.tokenizer(), given, scale) == wanted
    assert ansi(state, 0, tiny.tokenizer()) == f"\x1b[38;5;{PROMPT}mit\x1b[0mabcdefg"
    assert ansi(state, 0, tiny.tokenizer(), [0.0] * 7).endswith("\x1b[0mabcdefg")
    assert shade(float("inf"), 1.0) == ABOVE[2] and shade(-float("inf"), 1.0) == BELOW[2]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1.0, 2.0], "values must hold a number for each of the response's 3 tokens, got 2"),
        ([1.0, float("nan"), 0.0], "values must be numbers, got NaN at token 1"),
    ],
)
def test_bad_values(values, says, kind):
    """Too few numbers, or NaN, are refused."""
    with pytest.raises(ValueError, match=says):
        ansi(written("it", ids_of("abc")), 0, tiny.tokenizer(), values)


def test_no_color(monkeypatch, kind):
    """NO_COLOR takes all color away, as no-color.org asks; an empty one does not."""
    state = written("it", ids_of("abc"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert ansi(state, 0, tiny.tokenizer(), [1, 2, 3]) == "itabc"
    monkeypatch.setenv("NO_COLOR", "")
    assert ansi(state, 0, tiny.tokenizer(), [1, 2, 3]).startswith("\x1b[38")


@pytest.mark.parametrize("code", [PROMPT, *BELOW, *ABOVE])
def test_colors_are_legible_on_black_and_on_white(code, kind):
    """Contrast by WCAG's formula, with xterm's values of the 256 colors: 3 to 1 is what it asks of large text."""
    if code >= 232:
        levels = [8 + 10 * (code - 232)] * 3
    else:
        levels = [[0, 95, 135, 175, 215, 255][(code - 16) // step % 6] for step in (36, 6, 1)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in (x / 255 for x in levels)]
    luminance = sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    assert (luminance + 0.05) / 0.05 >= 3.4 and 1.05 / (luminance + 0.05) >= 3.4


# ---- the environment


def test_ansi_mode_colors_by_surprise(settings):
    """A token is the redder, the less likely the reference found it; without a reference there is no color."""
    settings = {**settings, "prompts": ["the cat"]}
    env = gym.make("TextGen-v0", render_mode="ansi", **settings)
    gray = f"\x1b[38;5;{PROMPT}mthe cat\x1b[0m"
    env.reset(seed=0)
    assert env.render() == gray
    wanted = gray
    for letter in "sat":
        info = env.step(ids_of(letter)[0])[4]
        wanted += color(letter, shade(-info["reference_log_prob"], viewers.SURPRISE))
    assert CODE.sub("", env.render()) == "the catsat"
    assert env.render().replace("\x1b[0m\x1b[38;5;160m", "") == wanted.replace("\x1b[0m\x1b[38;5;160m", "")
    assert shade(0.9, viewers.SURPRISE) is None and shade(2.0, viewers.SURPRISE) == ABOVE[0]
    bare = gym.make("TextGen-v0", render_mode="ansi", **{**settings, "kl_coef": 0})
    play(bare, ids_of("sat"))
    assert bare.render() == gray + "sat"
    env.reset()
    assert env.render() == gray  # nothing is left of the last episode


def test_nothing_is_kept_without_a_render_mode(settings):
    """No render mode, no viewer: None is rendered, and a step does nothing more than before."""
    for env in (gym.make("TextGen-v0", **settings).unwrapped, TextGenVectorEnv(2, **settings)):
        env.reset(seed=0)
        assert env.viewer is None and env.render() is None
        env.close()


def test_gymnasium_checker_in_every_mode(settings, capsys):
    """Gymnasium's checker has nothing to warn of, in any render mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in viewers.VIEWERS:
            check_env(gym.make("TextGen-v0", render_mode=mode, **settings).unwrapped)
    capsys.readouterr()


class Terminal(io.StringIO):
    """A terminal that remembers each piece that was flushed to it."""

    def __init__(self):
        super().__init__()
        self.flushed = []

    def isatty(self):
        return True

    def flush(self):
        self.flushed.append(self.getvalue())
        self.seek(0)
        self.truncate()


def test_human_mode_types_into_a_pipe(settings, capsys):
    """Plain text into a file: prompt, tokens, score and reason at the end, a line an episode; render gives None."""
    env = gym.make("TextGen-v0", render_mode="human", **{**settings, "prompts": ["the cat"]})
    env.reset(seed=0)
    for token in ids_of(" sat €"):
        env.step(token)
        assert env.render() is None
    score = env.step(tiny.END)[4]["score"]
    env.reset()
    env.step(ids_of("x")[0])
    env.reset()  # in the middle: a new line all the same
    env.close()
    wanted = f"the cat sat €  [score {score:+.2f}, stop]\nthe catx\nthe cat\n"
    assert capsys.readouterr().out == wanted


def test_human_mode_types_live_into_a_terminal(settings, monkeypatch):
    """Each token is flushed as it comes, in color, whole characters only, and paced by render_fps."""
    terminal, naps = Terminal(), []
    env = gym.make("TextGen-v0", render_mode="human", **{**settings, "prompts": ["the cat"]})
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr(viewers.time, "sleep", naps.append)
    play(env, [*ids_of("a€"), tiny.END])
    env.close()
    pieces = [CODE.sub("", one) for one in terminal.flushed]
    assert pieces[:6] == ["the cat", "a", "", "", "€", ""] and pieces[6].startswith("  [score ") and pieces[7] == "\n"
    assert terminal.flushed[0] == color("the cat", PROMPT) and "38;5;1" in terminal.flushed[1]
    assert naps == [1 / env.metadata["render_fps"]] * 5


def test_human_mode_types_what_ansi_shows(settings, monkeypatch):
    """The typed text and colors are those of the ansi mode, for the same tokens."""
    tokens = [*ids_of("€ no"), 7, 200, 299]
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", terminal)
        patch.setattr(viewers.time, "sleep", lambda seconds: None)
        play(gym.make("TextGen-v0", render_mode="human", **settings), tokens)
    env = gym.make("TextGen-v0", render_mode="ansi", **settings)
    play(env, tokens)
    typed = "".join(terminal.flushed)
    assert CODE.sub("", typed) == CODE.sub("", env.render())
    joined = re.sub(r"\x1b\[0m(\x1b\[38;5;\d+m)", r"\1", typed)
    assert re.sub(r"(\x1b\[38;5;\d+m)([^\x1b]*)\1", r"\1\2", joined).count("m€") == env.render().count("m€") == 1


@pytest.mark.parametrize(
    ("encoding", "wanted"), [("ascii", b"caf? ?!\n"), ("latin-1", b"caf\xe9 ?!\n"), ("utf-8", "café 日!\n".encode())]
)
def test_human_mode_writes_what_the_encoding_has(settings, monkeypatch, encoding, wanted):
    """A letter that standard output cannot encode is a question mark; it never stops a step."""
    env = gym.make("TextGen-v0", render_mode="human", **{**settings, "prompts": ["café "]})
    out = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding=encoding))
    play(env, ids_of("日!"))
    env.close()
    assert out.getvalue() == wanted


def test_human_mode_without_a_console(settings, monkeypatch):
    """Where there is no standard output at all, nothing is shown and nothing fails."""
    env = gym.make("TextGen-v0", render_mode="human", **settings)
    monkeypatch.setattr("sys.stdout", None)
    play(env, [*ids_of("a"), tiny.END])
    assert env.render() is None
    env.close()


def test_vector_env_has_no_human_mode(settings):
    """Sixty-four rows cannot type into one terminal: refused, with what to do instead."""
    with pytest.raises(ValueError, match=r"one of \['ansi', 'rgb_array'\], got 'human'; .*use gym.make"):
        TextGenVectorEnv(2, render_mode="human", **settings)


@pytest.mark.parametrize("autoreset_mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize("mode", ["ansi", "rgb_array"])
def test_vector_frames_are_those_of_single_environments(settings, mode, autoreset_mode):
    """A tuple, one frame a row, as SyncVectorEnv of singles renders, over ends and resets."""
    settings = {**settings, "stop_token_ids": list(range(75)), "max_new_tokens": 4}
    native = TextGenVectorEnv(2, render_mode=mode, autoreset_mode=autoreset_mode, **settings)
    single = [lambda: gym.make("TextGen-v0", render_mode=mode, **settings)] * 2
    sync = SyncVectorEnv(single, autoreset_mode=autoreset_mode)
    ends = 0
    for env in (native, sync):
        env.reset(seed=1)
    for actions in np.random.default_rng(0).integers(tiny.VOCABULARY, size=(10, 2)):
        ended = native.step(actions)[2]
        sync.step(actions)
        frames, wanted = native.render(), sync.render()
        assert isinstance(frames, tuple) and len(frames) == 2
        for one, other in zip(frames, wanted, strict=True):
            assert np.array_equal(one, other) if mode == "rgb_array" else one == other
        ends += int(ended.sum())
        if autoreset_mode == "Disabled" and ended.any():
            for env in (native, sync):
                env.reset(options={"reset_mask": ended.copy()})
    assert ends > 2


# ---- pictures


def make_pictures(settings, tokens):
    """All frames of one episode."""
    env = gym.make("TextGen-v0", render_mode="rgb_array_list", **settings)
    play(env, tokens)
    return env.render()


def test_rgb_array_frames(settings):
    """uint8 [H, W, 3], one size throughout, sides that codecs take; each token and the score change the frame."""
    frames = make_pictures({**settings, "prompts": ["the cat"]}, [*ids_of("sat"), tiny.END])
    assert len(frames) == 5
    assert all(frame.dtype == np.uint8 and frame.shape == frames[0].shape for frame in frames)
    height, width, channels = frames[0].shape
    assert channels == 3 and height % picture.BLOCK == width % picture.BLOCK == 0
    assert all((one != other).any() for one, other in itertools.pairwise(frames))
    assert all(frame.flags.writeable for frame in frames)


def find(image, wanted):
    """How many pixels are of exactly this color."""
    return int((image == np.array(wanted, dtype=np.uint8)).all(-1).sum())


def test_picture_colors(kind):
    """Prompt letters gray, response letters dark on the color of their number; none without numbers."""
    plain = picture.draw(EpisodeView(prompt="prompt", pieces=()), 4)
    assert find(plain, picture.GRAY) > 20 and not find(plain, picture.INK)
    colored = picture.draw(
        EpisodeView(prompt="", pieces=("aaaa", " bbbb", " cccc"), values=(-2.0, 0.0, 2.0), scale=2.0), 4
    )
    assert find(colored, picture.BLUE) > 100 and find(colored, picture.RED) > 100 and find(colored, picture.INK) > 20
    bare = picture.draw(EpisodeView(prompt="", pieces=("aaaa", " bbbb")), 4)
    assert not find(bare, picture.BLUE) and not find(bare, picture.RED) and find(bare, picture.INK) > 20
    assert picture.tint(0.0, 2.0) == picture.PAPER and picture.tint(-9.0, 2.0) == picture.BLUE
    red, blue = picture.tint(1.0, 2.0), picture.tint(-1.0, 2.0)
    assert red[0] > red[2] and blue[2] > blue[0]


def test_picture_wraps_words_and_scrolls(kind):
    """Long text goes on in the next line between words, and of too many lines the last ones are seen."""
    lines = [mark.line for mark in picture._lay_out(EpisodeView(prompt="", pieces=[" word"] * 40))]
    assert lines[0] == 0 and lines == sorted(lines) and 1 < lines[-1] < 6
    marks = list(picture._lay_out(EpisodeView(prompt="", pieces=["x" * 300])))
    assert max(mark.left + 20 for mark in marks) < picture.WIDTH - picture.MARGIN and marks[-1].line > 1
    split = list(picture._lay_out(EpisodeView(prompt="a " * 40, pieces=["good", "ness"] * 20)))
    assert {len({mark.line for mark in split if mark.text in ("good", "ness")})} != {1}
    indented = list(picture._lay_out(EpisodeView(prompt="", pieces=["if x:\n", "    y"])))
    assert indented[-1].left > 10 and indented[-1].line == 1  # a line's own spaces stay
    long = EpisodeView(prompt="\n".join(f"first {number}" for number in range(30)), pieces=("end",))
    tail = EpisodeView(prompt="\n".join(f"first {number}" for number in range(26, 30)), pieces=("end",))
    assert np.array_equal(picture.draw(long, 4), picture.draw(tail, 4))


@pytest.mark.parametrize(
    "text", ["你好世界", "Привет", "مرحبا", "😀", "e\u0301\u200d\u202e", "\u2028x", "\x00", "\ufffd", ""]
)
def test_any_text_can_be_drawn(text, kind):
    """No alphabet, joiner, separator or emptiness stops a picture."""
    page = make_page(written("p", ids_of(text)), 0, tiny.tokenizer(), [float("inf")] * len(ids_of(text)))
    assert picture.draw(page, 4).shape == picture.draw(EpisodeView(prompt="", pieces=()), 4).shape
    assert paint(page)


def test_facts_stand_apart(kind):
    """Between the facts of the footer is paper, from top to bottom, for budgets of four digits too."""
    facts = ("token 1024 of 1024", "reward -1234.56", "score -123.45, length")
    page = EpisodeView(prompt="", pieces=("a",), values=(-1.0,), scale=6.0, unit=viewers.UNIT, footer=facts)
    footer = picture.draw(page, 4)[-picture.FOOTER + 16 :]
    legend = picture.draw(dataclasses.replace(page, footer=()), 4)[-picture.FOOTER + 16 :]
    inked = [(image != np.array(picture.PAPER)).any((0, 2)) for image in (footer, legend)]  # by column
    starts = [picture.MARGIN + index * picture.FACT for index in range(3)] + [int(inked[1].argmax())]
    assert all(not inked[0][start - 6 : start].any() and inked[0][start : start + 6].any() for start in starts)


def test_every_frame_has_the_size_of_the_first(settings):
    """Whatever is written, the picture's size depends on the token budgets alone."""
    shapes = {frame.shape for frame in make_pictures(settings, [*ids_of("\n\n\n\n\n\n\n\n\n\n"), 299, 255])}
    assert len(shapes) == 1
    assert picture.lines_for(28) == picture.FEWEST < picture.lines_for(200) < picture.lines_for(10**6) == picture.MOST


# ---- Gymnasium's wrappers of rendering


def test_lists_of_frames(settings):
    """`ansi_list` and `rgb_array_list` collect a frame a step, and the reset's."""
    for mode, type_ in (("ansi_list", str), ("rgb_array_list", np.ndarray)):
        env = gym.make("TextGen-v0", render_mode=mode, **settings)
        play(env, ids_of("ab"))
        frames = env.render()
        assert [type(frame) for frame in frames] == [type_] * 3 and env.render() == []


def test_add_render_observation(settings):
    """Pixels as an observation, alone or beside the tokens."""
    env = AddRenderObservation(gym.make("TextGen-v0", render_mode="rgb_array", **settings), render_only=False)
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space and set(observation) == {"pixels", "input_ids", "attention_mask"}
    assert np.array_equal(observation["pixels"], env.unwrapped.render())
    alone = AddRenderObservation(gym.make("TextGen-v0", render_mode="rgb_array", **settings))
    assert np.array_equal(alone.reset(seed=0)[0], observation["pixels"])


def test_human_rendering_window(settings, monkeypatch):
    """Gymnasium's HumanRendering shows the pictures in a window of their size."""
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = HumanRendering(gym.make("TextGen-v0", render_mode="rgb_array", **settings))
    play(env, ids_of("a"))
    frame = env.env.render()
    shown = pygame.surfarray.array3d(env.window).transpose(1, 0, 2)
    assert np.array_equal(shown, frame)
    env.close()


def test_record_video(settings, tmp_path):
    """RecordVideo writes a film of each episode: the picture's size, a frame a token and one for the prompt."""
    pytest.importorskip("moviepy")
    from moviepy.video.io.VideoFileClip import VideoFileClip

    env = gym.make("TextGen-v0", render_mode="rgb_array", **settings)
    height, width, _ = picture.draw(EpisodeView(prompt="", pieces=()), picture.lines_for(28)).shape
    env = RecordVideo(env, str(tmp_path / "films"), episode_trigger=lambda episode: True)
    play(env, [*ids_of("abcd"), tiny.END])
    env.close()
    (film,) = (tmp_path / "films").iterdir()
    with VideoFileClip(str(film)) as clip:
        assert (clip.size, clip.fps, clip.n_frames) == ([width, height], env.metadata["render_fps"], 6)


def test_record_vector_video(settings, tmp_path):
    """The vector RecordVideo puts all rows into one film; under NEXT_STEP an episode of row 0 is a film."""
    pytest.importorskip("moviepy")
    from moviepy.video.io.VideoFileClip import VideoFileClip

    native = gym.make_vec("TextGen-v0", num_envs=4, render_mode="rgb_array", **{**settings, "max_new_tokens": 3})
    height, width, _ = picture.draw(EpisodeView(prompt="", pieces=()), picture.FEWEST).shape
    env = RecordVectorVideo(native, str(tmp_path / "films"), episode_trigger=lambda episode: True)
    env.reset(seed=0)
    for _ in range(7):  # three tokens, an automatic reset, three tokens
        env.step(np.full(4, 65))
    env.close()
    for film in sorted((tmp_path / "films").iterdir()):
        with VideoFileClip(str(film)) as clip:
            assert (clip.size, clip.n_frames) == ([2 * width, 2 * height], 4)
    assert len(list((tmp_path / "films").iterdir())) == 2
