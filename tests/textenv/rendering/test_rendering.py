"""Rendering: colored text, live text, images and videos, in every face."""

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
    NEGATIVE_COLORS,
    POSITIVE_COLORS,
    PROMPT_COLOR,
    EpisodeView,
    TextStreamer,
    ansi,
    color,
    make_view,
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
    """Unset NO_COLOR, as in a normal terminal."""
    monkeypatch.delenv("NO_COLOR", raising=False)


def ids_of(text):
    """A text as tokens, one per byte."""
    return tiny.tokenizer()(text).input_ids


def written(prompt, response):
    """A state of one row, with prompt padding and unused token budget."""
    ids = torch.tensor([[tiny.PAD, tiny.PAD, *ids_of(prompt)]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, :2] = False
    state = start(ids, mask, len(response) + 3, tiny.PAD)
    for token in response:
        state = state.append(torch.tensor([token]), torch.tensor([True]))
    return state


def play(env, tokens):
    """Reset with a seed and step through tokens."""
    env.reset(seed=0)
    for token in tokens:
        env.step(token)


# ---- text from tokens


def byte_fallback_tokenizer():
    """Byte tokens as in SentencePiece: every byte of an incomplete character decodes to a replacement."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("fallback", [False, True])
def test_streaming_never_splits_a_character(fallback, kind):
    """With one token per byte, each character is returned with its last byte, and the pieces concatenate to the text."""
    tokenizer = byte_fallback_tokenizer() if fallback else tiny.tokenizer()
    ids = list(BYTES.encode()) if fallback else ids_of(BYTES)
    streamer = TextStreamer(tokenizer, ids[:2])
    pieces = [streamer.add(token) for token in ids[2:]]
    assert "".join(pieces) == BYTES[2:] and streamer.flush() == ""
    lengths = [len(character.encode()) for character in BYTES[2:]]
    wanted = [piece for character, n in zip(BYTES[2:], lengths, strict=True) for piece in [""] * (n - 1) + [character]]
    assert pieces == wanted


def test_invalid_bytes_become_replacements(kind):
    """Streamed random bytes give the same text as decoding them at once."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(256, size=12).tolist()
        streamer = TextStreamer(tiny.tokenizer(), [])
        streamed = "".join(streamer.add(token) for token in ids) + streamer.flush()
        assert streamed == printable(tiny.tokenizer().decode(ids))


def test_control_codes_are_displayed(kind):
    """A model's escape sequences cannot control the terminal; line breaks and tabs are kept."""
    state = written("a", ids_of("\x1b[2J\x07\r\n\tb\x7f"))
    text = ansi(state, 0, tiny.tokenizer())
    assert CODE.sub("", text) == "a^[[2J^G^M\n\tb^?"
    assert printable("\x9b1m") == "\ufffd1m"
    assert "\x1b" not in ansi(written("\x1b", []), 0, tiny.tokenizer()).replace(f"\x1b[38;5;{PROMPT_COLOR}m", "")[:2]


# ---- colors


def test_ansi_colors_each_token_by_its_value(kind):
    """Hand-computed: gray prompt, blue for negative, red for positive, three strengths, no color near zero."""
    state = written("it", ids_of("abcdefg"))
    values = [-3.0, -1.0, -0.4, 0.0, 0.4, 2.0, 3.0]  # shares of 3: 1, ⅓, 0.13, 0, 0.13, ⅔, 1
    weak, _, strong = NEGATIVE_COLORS
    wanted = (
        f"\x1b[38;5;{PROMPT_COLOR}mit\x1b[0m\x1b[38;5;{strong}ma\x1b[0m\x1b[38;5;{weak}mb\x1b[0mcde"
        f"\x1b[38;5;{POSITIVE_COLORS[1]}mf\x1b[0m\x1b[38;5;{POSITIVE_COLORS[2]}mg\x1b[0m"
    )
    assert ansi(state, 0, tiny.tokenizer(), values) == wanted
    for row in (torch.tensor(values), np.array(values), [*values, 9.0, 9.0]):  # a row of [R] may be longer
        scale = None if len(row) == 7 else 3.0
        assert ansi(state, 0, tiny.tokenizer(), row, scale) == wanted
    assert ansi(state, 0, tiny.tokenizer()) == f"\x1b[38;5;{PROMPT_COLOR}mit\x1b[0mabcdefg"
    assert ansi(state, 0, tiny.tokenizer(), [0.0] * 7).endswith("\x1b[0mabcdefg")
    assert shade(float("inf"), 1.0) == POSITIVE_COLORS[2] and shade(-float("inf"), 1.0) == NEGATIVE_COLORS[2]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1.0, 2.0], "values must have one number for each of the response's 3 tokens, got 2"),
        ([1.0, float("nan"), 0.0], "values must be numbers, got NaN at token 1"),
    ],
)
def test_bad_values(values, says, kind):
    """Too few values, or NaN, raise an error."""
    with pytest.raises(ValueError, match=says):
        ansi(written("it", ids_of("abc")), 0, tiny.tokenizer(), values)


def test_no_color(monkeypatch, kind):
    """NO_COLOR disables color, as no-color.org specifies; an empty value does not."""
    state = written("it", ids_of("abc"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert ansi(state, 0, tiny.tokenizer(), [1, 2, 3]) == "itabc"
    monkeypatch.setenv("NO_COLOR", "")
    assert ansi(state, 0, tiny.tokenizer(), [1, 2, 3]).startswith("\x1b[38")


@pytest.mark.parametrize("code", [PROMPT_COLOR, *NEGATIVE_COLORS, *POSITIVE_COLORS])
def test_colors_are_legible_on_black_and_on_white(code, kind):
    """The contrast by WCAG's formula, with xterm's 256 colors, is above the 3 to 1 that it requires of large text."""
    if code >= 232:
        levels = [8 + 10 * (code - 232)] * 3
    else:
        levels = [[0, 95, 135, 175, 215, 255][(code - 16) // step % 6] for step in (36, 6, 1)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in (x / 255 for x in levels)]
    luminance = sum(weight * level for weight, level in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    assert (luminance + 0.05) / 0.05 >= 3.4 and 1.05 / (luminance + 0.05) >= 3.4


# ---- the environment


def test_ansi_mode_colors_by_surprise(settings):
    """A token is redder the less likely it is under the reference; without a reference there is no color."""
    settings = {**settings, "prompts": ["the cat"]}
    env = gym.make("TextGen-v0", render_mode="ansi", **settings)
    gray = f"\x1b[38;5;{PROMPT_COLOR}mthe cat\x1b[0m"
    env.reset(seed=0)
    assert env.render() == gray
    wanted = gray
    for letter in "sat":
        info = env.step(ids_of(letter)[0])[4]
        wanted += color(letter, shade(-info["reference_log_prob"], viewers.MAX_SURPRISE))
    assert CODE.sub("", env.render()) == "the catsat"
    assert env.render().replace("\x1b[0m\x1b[38;5;160m", "") == wanted.replace("\x1b[0m\x1b[38;5;160m", "")
    assert shade(0.9, viewers.MAX_SURPRISE) is None and shade(2.0, viewers.MAX_SURPRISE) == POSITIVE_COLORS[0]
    bare = gym.make("TextGen-v0", render_mode="ansi", **{**settings, "kl_coef": 0})
    play(bare, ids_of("sat"))
    assert bare.render() == gray + "sat"
    env.reset()
    assert env.render() == gray  # nothing remains of the last episode


def test_no_viewer_without_a_render_mode(settings):
    """Without a render mode there is no viewer, and `render` returns None."""
    for env in (gym.make("TextGen-v0", **settings).unwrapped, TextGenVectorEnv(2, **settings)):
        env.reset(seed=0)
        assert env.viewer is None and env.render() is None
        env.close()


def test_gymnasium_checker_in_every_mode(settings, capsys):
    """Gymnasium's checker passes without warnings in every render mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in viewers.VIEWERS:
            check_env(gym.make("TextGen-v0", render_mode=mode, **settings).unwrapped)
    capsys.readouterr()


class Terminal(io.StringIO):
    """A terminal that records each flushed piece."""

    def __init__(self):
        super().__init__()
        self.flushed = []

    def isatty(self):
        return True

    def flush(self):
        self.flushed.append(self.getvalue())
        self.seek(0)
        self.truncate()


def test_human_mode_in_a_pipe(settings, capsys):
    """A pipe gets plain text, one line per episode: prompt, tokens, score and finish reason. `render` returns None."""
    env = gym.make("TextGen-v0", render_mode="human", **{**settings, "prompts": ["the cat"]})
    env.reset(seed=0)
    for token in ids_of(" sat €"):
        env.step(token)
        assert env.render() is None
    score = env.step(tiny.END)[4]["score"]
    env.reset()
    env.step(ids_of("x")[0])
    env.reset()  # in the middle of an episode: also starts a new line
    env.close()
    wanted = f"the cat sat €  [score {score:+.2f}, stop]\nthe catx\nthe cat\n"
    assert capsys.readouterr().out == wanted


def test_human_mode_in_a_terminal(settings, monkeypatch):
    """Each token is flushed when it arrives, in color, in whole characters, at the rate of render_fps."""
    terminal, naps = Terminal(), []
    env = gym.make("TextGen-v0", render_mode="human", **{**settings, "prompts": ["the cat"]})
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr(viewers.time, "sleep", naps.append)
    play(env, [*ids_of("a€"), tiny.END])
    env.close()
    pieces = [CODE.sub("", piece) for piece in terminal.flushed]
    assert pieces[:6] == ["the cat", "a", "", "", "€", ""] and pieces[6].startswith("  [score ") and pieces[7] == "\n"
    assert terminal.flushed[0] == color("the cat", PROMPT_COLOR) and "38;5;1" in terminal.flushed[1]
    assert naps == [1 / env.metadata["render_fps"]] * 5


def test_human_mode_equals_ansi_mode(settings, monkeypatch):
    """Text and colors of the human mode equal those of the ansi mode."""
    tokens = [*ids_of("€ no"), 7, 200, 299]
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", terminal)
        patch.setattr(viewers.time, "sleep", lambda seconds: None)
        play(gym.make("TextGen-v0", render_mode="human", **settings), tokens)
    env = gym.make("TextGen-v0", render_mode="ansi", **settings)
    play(env, tokens)
    written_text = "".join(terminal.flushed)
    assert CODE.sub("", written_text) == CODE.sub("", env.render())
    joined = re.sub(r"\x1b\[0m(\x1b\[38;5;\d+m)", r"\1", written_text)
    assert re.sub(r"(\x1b\[38;5;\d+m)([^\x1b]*)\1", r"\1\2", joined).count("m€") == env.render().count("m€") == 1


@pytest.mark.parametrize(
    ("encoding", "wanted"), [("ascii", b"caf? ?!\n"), ("latin-1", b"caf\xe9 ?!\n"), ("utf-8", "café 日!\n".encode())]
)
def test_human_mode_in_any_encoding(settings, monkeypatch, encoding, wanted):
    """A character that standard output cannot encode becomes a question mark, and does not stop a step."""
    env = gym.make("TextGen-v0", render_mode="human", **{**settings, "prompts": ["café "]})
    out = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding=encoding))
    play(env, ids_of("日!"))
    env.close()
    assert out.getvalue() == wanted


def test_human_mode_without_a_console(settings, monkeypatch):
    """Without a standard output, nothing is written and nothing fails."""
    env = gym.make("TextGen-v0", render_mode="human", **settings)
    monkeypatch.setattr("sys.stdout", None)
    play(env, [*ids_of("a"), tiny.END])
    assert env.render() is None
    env.close()


def test_vector_env_has_no_human_mode(settings):
    """Several rows cannot write into one terminal: the error says what to use instead."""
    with pytest.raises(ValueError, match=r"one of \['ansi', 'rgb_array'\], got 'human'; .*use gym.make"):
        TextGenVectorEnv(2, render_mode="human", **settings)


@pytest.mark.parametrize("autoreset_mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize("mode", ["ansi", "rgb_array"])
def test_vector_frames_are_those_of_single_environments(settings, mode, autoreset_mode):
    """A tuple with one frame per row, as a SyncVectorEnv of singles renders, across ends and resets."""
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
        for got, expected in zip(frames, wanted, strict=True):
            assert np.array_equal(got, expected) if mode == "rgb_array" else got == expected
        ends += int(ended.sum())
        if autoreset_mode == "Disabled" and ended.any():
            for env in (native, sync):
                env.reset(options={"reset_mask": ended.copy()})
    assert ends > 2


# ---- images


def make_frames(settings, tokens):
    """All frames of one episode."""
    env = gym.make("TextGen-v0", render_mode="rgb_array_list", **settings)
    play(env, tokens)
    return env.render()


def test_rgb_array_frames(settings):
    """uint8 [H, W, 3], one size, sides that codecs accept; each token and the score change the frame."""
    frames = make_frames({**settings, "prompts": ["the cat"]}, [*ids_of("sat"), tiny.END])
    assert len(frames) == 5
    assert all(frame.dtype == np.uint8 and frame.shape == frames[0].shape for frame in frames)
    height, width, channels = frames[0].shape
    assert channels == 3 and height % picture.BLOCK == width % picture.BLOCK == 0
    assert all((first != second).any() for first, second in itertools.pairwise(frames))
    assert all(frame.flags.writeable for frame in frames)


def count_pixels(image, color):
    """The number of pixels of exactly this color."""
    return int((image == np.array(color, dtype=np.uint8)).all(-1).sum())


def test_image_colors(kind):
    """The prompt is gray, the response is dark on the color of its values; without values there is no color."""
    plain = picture.draw(EpisodeView(prompt="prompt", pieces=()), 4)
    assert count_pixels(plain, picture.GRAY) > 20 and not count_pixels(plain, picture.INK)
    colored = picture.draw(
        EpisodeView(prompt="", pieces=("aaaa", " bbbb", " cccc"), values=(-2.0, 0.0, 2.0), scale=2.0), 4
    )
    assert (
        count_pixels(colored, picture.BLUE) > 100
        and count_pixels(colored, picture.RED) > 100
        and count_pixels(colored, picture.INK) > 20
    )
    bare = picture.draw(EpisodeView(prompt="", pieces=("aaaa", " bbbb")), 4)
    assert (
        not count_pixels(bare, picture.BLUE)
        and not count_pixels(bare, picture.RED)
        and count_pixels(bare, picture.INK) > 20
    )
    assert picture.tint(0.0, 2.0) == picture.PAPER and picture.tint(-9.0, 2.0) == picture.BLUE
    red, blue = picture.tint(1.0, 2.0), picture.tint(-1.0, 2.0)
    assert red[0] > red[2] and blue[2] > blue[0]


def test_image_wraps_words_and_scrolls(kind):
    """Long text wraps between words, and if there are too many lines the last ones are shown."""
    lines = [span.line for span in picture._layout(EpisodeView(prompt="", pieces=[" word"] * 40))]
    assert lines[0] == 0 and lines == sorted(lines) and 1 < lines[-1] < 6
    spans = list(picture._layout(EpisodeView(prompt="", pieces=["x" * 300])))
    assert max(span.left + 20 for span in spans) < picture.WIDTH - picture.MARGIN and spans[-1].line > 1
    split = list(picture._layout(EpisodeView(prompt="a " * 40, pieces=["good", "ness"] * 20)))
    assert {len({span.line for span in split if span.text in ("good", "ness")})} != {1}
    indented = list(picture._layout(EpisodeView(prompt="", pieces=["if x:\n", "    y"])))
    assert indented[-1].left > 10 and indented[-1].line == 1  # indentation is kept
    long = EpisodeView(prompt="\n".join(f"first {number}" for number in range(30)), pieces=("end",))
    tail = EpisodeView(prompt="\n".join(f"first {number}" for number in range(26, 30)), pieces=("end",))
    assert np.array_equal(picture.draw(long, 4), picture.draw(tail, 4))


@pytest.mark.parametrize(
    "text", ["你好世界", "Привет", "مرحبا", "😀", "e\u0301\u200d\u202e", "\u2028x", "\x00", "\ufffd", ""]
)
def test_any_text_can_be_drawn(text, kind):
    """Any alphabet, joiner, separator, control code and the empty text can be drawn."""
    view = make_view(written("p", ids_of(text)), 0, tiny.tokenizer(), [float("inf")] * len(ids_of(text)))
    assert picture.draw(view, 4).shape == picture.draw(EpisodeView(prompt="", pieces=()), 4).shape
    assert paint(view)


def test_footer_items_do_not_overlap(kind):
    """There is empty space between the footer items and before the legend, even for token budgets of four digits."""
    items = ("token 1024 of 1024", "reward -1234.56", "score -123.45, length")
    view = EpisodeView(prompt="", pieces=("a",), values=(-1.0,), scale=6.0, unit=viewers.UNIT, footer=items)
    footer = picture.draw(view, 4)[-picture.FOOTER + 16 :]
    legend = picture.draw(dataclasses.replace(view, footer=()), 4)[-picture.FOOTER + 16 :]
    inked = [(image != np.array(picture.PAPER)).any((0, 2)) for image in (footer, legend)]  # by column
    starts = [picture.MARGIN + index * picture.FOOTER_ITEM for index in range(3)] + [int(inked[1].argmax())]
    assert all(not inked[0][start - 6 : start].any() and inked[0][start : start + 6].any() for start in starts)


def test_every_frame_has_the_size_of_the_first(settings):
    """The image size depends only on the token budgets, not on the text."""
    shapes = {frame.shape for frame in make_frames(settings, [*ids_of("\n\n\n\n\n\n\n\n\n\n"), 299, 255])}
    assert len(shapes) == 1
    assert (
        picture.lines_for(28)
        == picture.MIN_LINES
        < picture.lines_for(200)
        < picture.lines_for(10**6)
        == picture.MAX_LINES
    )


# ---- Gymnasium's rendering wrappers


def test_lists_of_frames(settings):
    """`ansi_list` and `rgb_array_list` collect one frame per step, and one for the reset."""
    for mode, type_ in (("ansi_list", str), ("rgb_array_list", np.ndarray)):
        env = gym.make("TextGen-v0", render_mode=mode, **settings)
        play(env, ids_of("ab"))
        frames = env.render()
        assert [type(frame) for frame in frames] == [type_] * 3 and env.render() == []


def test_add_render_observation(settings):
    """Pixels as the observation, alone or together with the tokens."""
    env = AddRenderObservation(gym.make("TextGen-v0", render_mode="rgb_array", **settings), render_only=False)
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space and set(observation) == {"pixels", "input_ids", "attention_mask"}
    assert np.array_equal(observation["pixels"], env.unwrapped.render())
    alone = AddRenderObservation(gym.make("TextGen-v0", render_mode="rgb_array", **settings))
    assert np.array_equal(alone.reset(seed=0)[0], observation["pixels"])


def test_human_rendering_window(settings, monkeypatch):
    """Gymnasium's HumanRendering shows the images in a window of the same size."""
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = HumanRendering(gym.make("TextGen-v0", render_mode="rgb_array", **settings))
    play(env, ids_of("a"))
    frame = env.env.render()
    shown = pygame.surfarray.array3d(env.window).transpose(1, 0, 2)
    assert np.array_equal(shown, frame)
    env.close()


def test_record_video(settings, tmp_path):
    """RecordVideo writes one video per episode, of the image's size, with a frame per token and one for the prompt."""
    pytest.importorskip("moviepy")
    from moviepy.video.io.VideoFileClip import VideoFileClip

    env = gym.make("TextGen-v0", render_mode="rgb_array", **settings)
    height, width, _ = picture.draw(EpisodeView(prompt="", pieces=()), picture.lines_for(28)).shape
    env = RecordVideo(env, str(tmp_path / "videos"), episode_trigger=lambda episode: True)
    play(env, [*ids_of("abcd"), tiny.END])
    env.close()
    (video,) = (tmp_path / "videos").iterdir()
    with VideoFileClip(str(video)) as clip:
        assert (clip.size, clip.fps, clip.n_frames) == ([width, height], env.metadata["render_fps"], 6)


def test_record_vector_video(settings, tmp_path):
    """The vector RecordVideo tiles all rows in one video; under NEXT_STEP each episode of row 0 is one video."""
    pytest.importorskip("moviepy")
    from moviepy.video.io.VideoFileClip import VideoFileClip

    native = gym.make_vec("TextGen-v0", num_envs=4, render_mode="rgb_array", **{**settings, "max_new_tokens": 3})
    height, width, _ = picture.draw(EpisodeView(prompt="", pieces=()), picture.MIN_LINES).shape
    env = RecordVectorVideo(native, str(tmp_path / "videos"), episode_trigger=lambda episode: True)
    env.reset(seed=0)
    for _ in range(7):  # three tokens, an automatic reset, three tokens
        env.step(np.full(4, 65))
    env.close()
    for video in sorted((tmp_path / "videos").iterdir()):
        with VideoFileClip(str(video)) as clip:
            assert (clip.size, clip.n_frames) == ([2 * width, 2 * height], 4)
    assert len(list((tmp_path / "videos").iterdir())) == 2
