"""Reward models, function rewards, weighted sums, and the decoded texts that they receive."""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers.vector import DictInfoToList
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchrl.envs import check_env_specs
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from tests.support import tiny, tiny_tokenizers
from tests.support.episodes import written
from tests.support.tiny import sentencepiece_tokenizer
from textenv import TextGenConfig, build_task, shared
from textenv.dynamics import TextDynamics
from textenv.rewards.base import Scores, WeightedSum, read_scores
from textenv.rewards.functions import FunctionReward
from textenv.rewards.reward_model import RewardModel, last_token_scores, log_odds
from textenv.torchrl_env import TextGenTorchEnv
from textenv.vector_env import TextGenVectorEnv

# The same float32 sums in a different order, at scores of about 1.
TOLERANCE = 1e-5


def length_reward(prompts, responses):
    """Characters of the response."""
    return [len(response) for response in responses]


def prompt_reward(prompts, responses):
    """Characters of the prompt, as a tensor."""
    return torch.tensor([len(prompt) for prompt in prompts])


@torch.no_grad()
def plain_outputs(model, ids):
    """The oracle: the head's output at the last token of one unpadded row. Returns [labels]."""
    hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return model.score(hidden)


def shuffled_tokenizer():
    """Byte tokens as in `tiny.tokenizer`, with different ids: 0 is the end token, and there is no pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    raw = Tokenizer(models.BPE(vocab={"</s>": 0} | {symbol: at + 1 for at, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


def play(env, tokens, seed=0):
    """The last `info` of an episode with these tokens, and the text of its prompt."""
    env.reset(seed=seed)
    for token in tokens:
        *_, info = env.step(token)
    return info, env.unwrapped.dynamics.episode_prompts[0].text


# ---- reward models


@pytest.mark.parametrize("pad", [tiny.PAD, tiny.END, 65])
def test_last_real_token_wherever_the_padding_is(kind, pad):
    """With padding on the left, right, both sides or none, and pad = end, the score is that of the unpadded row."""
    model, row = tiny.reward_model(kind), [*b"the cat", 65, tiny.PAD, tiny.END]
    wanted = plain_outputs(model, row)
    for left, right in ((0, 0), (5, 0), (0, 5), (3, 4)):
        ids = torch.tensor([[pad] * left + row + [pad] * right])
        mask = torch.tensor([[False] * left + [True] * len(row) + [False] * right])
        with torch.no_grad():
            got = last_token_scores(model, ids, mask)[0]
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)
    assert (plain_outputs(model, row[:-1]) - wanted).abs() > 100 * TOLERANCE  # an error of one token would show


def test_score_in_the_environment(settings, kind):
    """`info["score"]` is the saved reward model's score of prompt and response, including the end token."""
    env = gym.make("TextGen-v0", **settings)
    response = [*tiny.tokenizer()(" sat").input_ids, tiny.PAD, tiny.END]
    info, prompt = play(env, response)
    wanted = plain_outputs(tiny.reward_model(kind), tiny.tokenizer()(prompt).input_ids + response)
    assert info["score"] == pytest.approx(wanted.item(), abs=TOLERANCE)


@pytest.mark.parametrize("tokens", [[*b" sat"], [*b" it", tiny.END], [tiny.END]])
def test_a_different_tokenizer_scores_text(settings, kind, tmp_path, tokens):
    """A reward model with its own tokenizer scores the decoded text, plus its own end token after a stop."""
    model, own = tiny.reward_model(kind), shuffled_tokenizer()
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    assert own("ab").input_ids != tiny.tokenizer()("ab").input_ids
    settings = {**settings, "reward": str(tmp_path), "max_new_tokens": len(tokens)}
    info, prompt = play(gym.make("TextGen-v0", **settings), tokens)
    stopped = tokens[-1] == tiny.END
    text = prompt + tiny.tokenizer().decode(tokens[:-1] if stopped else tokens)
    wanted = plain_outputs(model, own(text).input_ids + [0] * stopped)
    assert info["finish_reason"] == ("stop" if stopped else "length")
    assert info["score"] == pytest.approx(wanted.item(), abs=TOLERANCE)


def test_a_different_tokenizer_in_ragged_batches(kind):
    """Texts of different lengths in one batch get the same scores as alone."""
    model, own, tokenizer = tiny.reward_model(kind), shuffled_tokenizer(), tiny.tokenizer()
    prompts = [tokenizer(text).input_ids for text in ("a", "the cat", "it is late")]
    responses = [[tiny.END], tokenizer(" and so it goes").input_ids, tokenizer("!").input_ids]
    batch = written(prompts, responses, tokenizer, stopped=False)
    for tokens_per_pass in (1, 24, None):
        got = RewardModel(model, tokenizer=own)(replace(batch, tokens_per_pass=tokens_per_pass)).total
        for row, text in enumerate(("a", "the cat and so it goes", "it is late!")):
            wanted = plain_outputs(model, own(text).input_ids)
            assert got[row].item() == pytest.approx(wanted.item(), abs=TOLERANCE)


def test_encoder_reward_model():
    """A classifier with its own pooling (BERT) is scored by its own logits, for texts of any length in one batch."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = BertConfig(vocab_size=300, max_position_embeddings=64, num_labels=1, **sizes)
    model, own, tokenizer = BertForSequenceClassification(config).eval(), shuffled_tokenizer(), tiny.tokenizer()
    prompts, responses = [[*b"the cat"], [72]], [[*b" sat down"], [73, tiny.END]]  # the longest first
    batch = written(prompts, responses, tokenizer)
    got = RewardModel(model, tokenizer=own)(replace(batch, tokens_per_pass=1)).total
    for row, text in enumerate(batch.texts):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([own(text).input_ids])).logits[0, 0]
        assert got[row].item() == pytest.approx(wanted.item(), abs=TOLERANCE)


def ids_seen(monkeypatch, reward, batch):
    """The rows of ids that a reward model is called with, without padding."""
    seen = []

    def outputs(self, input_ids, attention_mask):
        seen.extend(row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True))
        return torch.zeros(len(input_ids), 1)

    monkeypatch.setattr(RewardModel, "_outputs", outputs)
    reward(batch)
    return seen


@pytest.mark.parametrize("kind", ["metaspace", "byte_level", "wordpiece"])
@pytest.mark.parametrize("decoder", [True, False])
def test_end_tokens_in_reward_texts(monkeypatch, kind, decoder):
    """A decoder sees its end token once, where the response stopped, though its tokenizer appends one to every text.

    An encoder sees what its tokenizer puts around a text at every response, as in its training.
    """
    own, tokenizer = getattr(tiny_tokenizers, kind)(), tiny.tokenizer()
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    encoder = BertForSequenceClassification(BertConfig(vocab_size=300, num_labels=1, **sizes)).eval()
    model = tiny.reward_model() if decoder else encoder
    prompts = [tokenizer("the cat").input_ids] * 2
    responses = [[*tokenizer(" sat on").input_ids, tiny.END], tokenizer(" sat on the mat").input_ids]
    batch = replace(written(prompts, responses, tokenizer), stopped=torch.tensor([True, False]))
    stopped, cut = ids_seen(monkeypatch, RewardModel(model, tokenizer=own), batch)
    whole = [own(text).input_ids for text in ("the cat sat on", "the cat sat on the mat")]
    assert whole[0][-1] == own.eos_token_id != whole[0][-2]
    assert [stopped, cut] == ([whole[0], whole[1][:-1]] if decoder else whole)


def test_encoder_with_the_policys_tokenizer(monkeypatch):
    """It sees the policy's tokens, with the end tokens that the tokenizer puts after every text, once."""
    tokenizer = tiny_tokenizers.wordpiece()
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = BertForSequenceClassification(BertConfig(vocab_size=300, num_labels=1, **sizes)).eval()
    whole = tokenizer("the cat sat on").input_ids
    batch = written([whole[:3], whole[:3]], [whole[3:], whole[3:-1]], tokenizer)
    batch = replace(batch, stopped=torch.tensor([True, False]))
    assert ids_seen(monkeypatch, RewardModel(model), batch) == [whole, whole]
    got = RewardModel(model)(batch).total
    assert got.shape == (2,)


def test_reward_texts_with_tokens_that_the_model_lacks():
    """A text with a token added to the reward model's tokenizer alone is named with its prompt and response."""
    own, tokenizer = shuffled_tokenizer(), tiny.tokenizer()
    own.add_tokens(["<new>"] * 1)
    model = tiny.reward_model()
    own_ids = own("<new>").input_ids
    model.resize_token_embeddings(own_ids[0])
    batch = written([tokenizer("a").input_ids], [tokenizer("<new>").input_ids], tokenizer, stopped=False)
    with pytest.raises(ValueError, match=r"reward 'rm': row 0 \(prompt 'a', response '<new>'\) has the token '<new>'"):
        RewardModel(model, tokenizer=own, name="rm")(batch)
    model.resize_token_embeddings(own_ids[0] + 1)
    assert torch.isfinite(RewardModel(model, tokenizer=own)(batch).total).all()


def test_actor_wider_than_reward_model(settings, kind, tmp_path):
    """Every id is legal: ids beyond the reward model's embedding do not break it, even if the tokenizers are equal."""
    width = {"gpt2": tiny.GPT2, "llama": tiny.LLAMA}[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(width, "vocab_size", 280)
        folder = tiny.save(tiny.reward_model(kind), tmp_path)
    info, _ = play(gym.make("TextGen-v0", **{**settings, "reward": folder}), [299, 65, tiny.END])
    assert math.isfinite(info["score"])


def test_log_odds():
    """The score is log p(label) - log(1 - p(label)): literal numbers."""
    assert log_odds(torch.tensor([[1.5]]), None).tolist() == [1.5]
    assert log_odds(torch.tensor([[1.0, 3.0]]), 1).tolist() == [2.0]
    assert log_odds(torch.tensor([[1.0, 3.0]]), 0).tolist() == [-2.0]
    odds = torch.tensor([[0.0, math.log(2), math.log(6)]])  # 1 : 2 : 6
    assert log_odds(odds, 2).tolist() == pytest.approx([math.log(6 / 3)], abs=1e-6)
    assert log_odds(odds, 0).tolist() == pytest.approx([math.log(1 / 8)], abs=1e-6)


def test_two_labels(settings, kind, tmp_path):
    """With two labels the score is the log-odds of `reward_label`; without one, the error lists the labels."""
    model = tiny.reward_model(kind, labels=2)
    model.config.id2label = {0: "bad", 1: "good"}
    settings = {**settings, "reward": tiny.save(model, tmp_path)}
    with pytest.raises(ValueError, match=r"2 labels \(\['bad', 'good'\]\), and reward_label is None.*'good'"):
        gym.make("TextGen-v0", **settings)
    with pytest.raises(ValueError, match="reward_label is 'fine'"):
        gym.make("TextGen-v0", reward_label="fine", **settings)
    for label, sign in (("good", 1), ("bad", -1)):
        info, prompt = play(gym.make("TextGen-v0", reward_label=label, **settings), [65, tiny.END])
        bad, good = plain_outputs(model, [*tiny.tokenizer()(prompt).input_ids, 65, tiny.END]).tolist()
        assert info["score"] == pytest.approx(sign * (good - bad), abs=2 * TOLERANCE)


# ---- functions and sums


def test_function_reward(settings):
    """A function, passed directly or by name, gets prompts and responses as texts; its number is the score."""
    for reward in (length_reward, "tests.textenv.rewards.test_rewards:length_reward"):
        env = gym.make("TextGen-v0", **{**settings, "reward": reward})
        info, _ = play(env, [*b" sat", tiny.END])
        assert info["score"] == 4.0 and type(info["score"]) is float


@pytest.mark.parametrize(
    "returned", [[1, 2], (1.0, 2.0), np.array([1.0, 2.0]), torch.tensor([1, 2]), [np.float32(1), torch.tensor(2.0)]]
)
def test_numbers_of_any_kind(returned):
    """Lists, tuples, arrays and tensors of numbers are scores."""
    batch = written([[65], [66]], [[67], [68]], tiny.tokenizer())
    scores = FunctionReward(lambda prompts, responses: returned, "f")(batch).total
    assert scores.dtype == torch.float32 and scores.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ([1.0], r"one number per response, 2 in all, got shape \(1,\); return a flat list"),
        ([[1.0], [2.0]], r"2 in all, got shape \(2, 1\)"),
        (1.0, r"2 in all, got shape \(\)"),
        ([1.0, math.nan], r"returned nan for row 1 \(prompt 'B', response 'D'\); return a finite number"),
        ([-math.inf, 1.0], "returned -inf for row 0"),
        ([1e300, 1.0], "returned inf for row 0"),
        (["1", "2"], "must return a list of 2 numbers, got list"),
        (np.array(["1", "2"]), "must return a list of 2 numbers, got ndarray"),
        ([1.0, None], "must return a list of 2 numbers, got list"),
        (None, "must return a list of 2 numbers, got NoneType"),
        ({"a": 1.0}, "must return a list of 2 numbers, got dict"),
    ],
)
def test_bad_function_rewards(returned, says):
    """Anything but one finite number per response raises an error with the reward's name and, where known, the row."""
    tokenizer = tiny.tokenizer()
    ids = tokenizer("ABCD").input_ids
    batch = written([ids[:1], ids[1:2]], [ids[2:3], ids[3:]], tokenizer)
    with pytest.raises(ValueError, match=f"'my_reward'.*{says}"):
        read_scores(FunctionReward(lambda prompts, responses: returned, "my_reward"), batch)


def test_functions_get_copies():
    """A function that changes its lists does not affect the next function."""

    def rude(prompts, responses):
        scores = length_reward(prompts, responses)
        prompts.clear()
        responses[:] = ["rude"] * len(scores)
        return scores

    rewards = [(1.0, FunctionReward(rude, "rude")), (10.0, FunctionReward(length_reward, "length"))]
    batch = written([[65], [66]], [[67], [68, 69]], tiny.tokenizer())
    assert WeightedSum(rewards)(batch).total.tolist() == [11.0, 22.0]
    assert batch.responses == [tiny.tokenizer().decode([67]), tiny.tokenizer().decode([68, 69])]


def test_weighted_sum(settings, folders, kind):
    """`reward={name: weight}` sums functions and models, each times its weight."""
    names = {
        "tests.textenv.rewards.test_rewards:length_reward": 0.5,
        "tests.textenv.rewards.test_rewards:prompt_reward": -2,
        folders[f"{kind}_reward"]: 3,
    }
    env = gym.make("TextGen-v0", **{**settings, "reward": names})
    info, prompt = play(env, [65, 66, tiny.END])
    alone, _ = play(gym.make("TextGen-v0", **settings), [65, 66, tiny.END])
    assert info["score"] == pytest.approx(0.5 * 2 - 2 * len(prompt) + 3 * alone["score"], abs=3 * TOLERANCE)
    assert env.unwrapped.task.reward.name.startswith("0.5·tests.textenv.rewards.test_rewards:length_reward + -2·")


def test_reward_objects_pass_through(settings, kind):
    """A reward object in `shared` is used unchanged."""
    built = WeightedSum([(2.0, FunctionReward(length_reward, "length")), (1.0, RewardModel(tiny.reward_model(kind)))])
    task = build_task(TextGenConfig(**{**settings, "reward": shared(built)}))
    assert task.reward is built


class Vowels:
    """A user's reward object, with parts that do not sum to its total."""

    name, part_names = "vowels", ("a", "e")

    def __call__(self, batch):
        parts = {letter: torch.tensor([float(text.count(letter)) for text in batch.responses]) for letter in "ae"}
        return Scores(2 * parts["a"] + parts["e"], parts)


class Broken(Vowels):
    """The same object, with changed return values."""

    def __init__(self, change):
        self.change = change

    def __call__(self, batch):
        return self.change(batch, super().__call__(batch))


def test_reward_objects(settings):
    """Any object that follows the Reward protocol is a reward, alone and in a sum, and its parts are in `info`."""
    vowels = shared(Vowels())
    env = gym.make("TextGen-v0", **{**settings, "reward": vowels})
    info, _ = play(env, [*tiny.tokenizer()("aeae").input_ids, tiny.END])
    assert info["score"] == 6.0 and info["score_parts"] == {"a": 2.0, "e": 2.0}
    assert env.unwrapped.task.reward is vowels.value
    mixed = shared(WeightedSum([(10.0, vowels.value), (1.0, FunctionReward(length_reward, "length"))]))
    info, _ = play(gym.make("TextGen-v0", **{**settings, "reward": mixed}), [*tiny.tokenizer()("ab").input_ids, 256])
    assert info["score"] == 22.0 and info["score_parts"] == {"a": 1.0, "e": 0.0, "length": 2.0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda batch, scores: scores.final, r"must return textenv.Scores .*\['a', 'e'\].*got Tensor"),
        (lambda batch, scores: Scores(scores.final, {"a": scores.final}), r"must return .*got parts \['a'\]"),
        (lambda batch, scores: Scores(scores.final[:1], scores.parts), r"final as a tensor of shape \(2,\).*\(1,\)"),
        (lambda batch, scores: Scores([1.0, 2.0], scores.parts), r"final as a tensor of shape \(2,\), got list"),
        (
            lambda batch, scores: Scores(scores.final / 0, scores.parts),
            r"returned (nan|inf) for row 11 \(prompt 'A'",
        ),
        (lambda batch, scores: Scores(scores.final, scores.parts, torch.zeros(2, 2)), "no method token_rewards"),
    ],
)
def test_bad_reward_objects(change, says):
    """The scores of a user's object are checked, and errors name the reward, also in a sum."""
    batch = written([[65], [66]], [[67], [68]], tiny.tokenizer(), rows=[11, 12])
    batch.prompts[0] = "A"
    with pytest.raises(ValueError, match=f"reward 'vowels' .*{says}"):
        WeightedSum([(1.0, Broken(change))])(batch)


def test_two_rewards_with_the_same_name():
    """Parts with equal names raise an error when the sum is built."""
    functions = [FunctionReward(length_reward, "same"), FunctionReward(prompt_reward, "same")]
    with pytest.raises(ValueError, match=r"2 rewards of a sum are named 'same'.*its own name"):
        WeightedSum([(1.0, function) for function in functions])
    with pytest.raises(ValueError, match="2 rewards of a sum are named 'same'"):
        WeightedSum([(1.0, functions[0]), (1.0, WeightedSum([(1.0, functions[1])]))])


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_parts_in_every_face(settings, folders):
    """In all faces, `info["score_parts"]` holds each reward's score, before its weight, under its name."""
    model, function = folders["gpt2_reward"], "tests.textenv.rewards.test_rewards:length_reward"
    settings = {**settings, "reward": {function: 0.5, model: 3.0}, "prompts": ["the cat"], "kl_coef": 0}
    tokens = [*tiny.tokenizer()(" sa").input_ids, tiny.END]
    info, _ = play(gym.make("TextGen-v0", **settings), tokens)
    parts = info["score_parts"]
    alone, _ = play(gym.make("TextGen-v0", **{**settings, "reward": model}), tokens)
    assert alone["score_parts"] == {model: alone["score"]}
    assert parts == {function: 3.0, model: pytest.approx(alone["score"], abs=TOLERANCE)}
    assert info["score"] == pytest.approx(0.5 * 3.0 + 3.0 * parts[model], abs=TOLERANCE)
    assert all(type(part) is float for part in parts.values())
    native, listed = TextGenVectorEnv(2, **settings), DictInfoToList(TextGenVectorEnv(2, **settings))
    torchrl_env = TextGenTorchEnv(build_task(TextGenConfig(**settings)), 2)
    check_env_specs(torchrl_env)
    native.reset(), listed.reset()
    data = torchrl_env.reset()
    for first, second in zip(tokens, [65, 65, 65, 65], strict=True):  # only row 0 ends
        *_, infos = native.step(np.array([first, second]))
        *_, rows = listed.step(np.array([first, second]))
        data = torchrl_env.step(data.set("action", torch.tensor([first, second])))["next"]
    assert rows[0]["score_parts"] == pytest.approx(parts) and "score_parts" not in rows[1]
    for name, part in parts.items():
        assert infos["score_parts"][name].tolist() == pytest.approx([part, 0.0], abs=TOLERANCE)
        assert infos["score_parts"][f"_{name}"].tolist() == [True, False]
        assert data["score_parts", name][:, 0].tolist() == pytest.approx([part, 0.0], abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_models_are_called_once_per_step(settings, monkeypatch):
    """The vector environment calls the reward model once for all rows that end in a step, and at no other time."""
    batches = []
    call = RewardModel.__call__
    monkeypatch.setattr(RewardModel, "__call__", lambda self, batch: batches.append(batch) or call(self, batch))
    env = TextGenVectorEnv(5, **{**settings, "max_new_tokens": 3})
    env.reset(seed=0)
    for tokens in ([65] * 5, [65, tiny.END, 65, tiny.END, 65], [65] * 5):
        env.step(np.array(tokens))
    assert [batch.rows for batch in batches] == [[1, 3], [0, 2, 4]]


def test_rewards_see_only_finished_responses(settings):
    """A reward is called only when episodes end, once, with only the rows that ended."""
    calls = []

    def spy(prompts, responses):
        calls.append((prompts, responses))
        return [0.0] * len(prompts)

    dynamics = TextDynamics(build_task(TextGenConfig(**{**settings, "reward": spy, "max_new_tokens": 3})), rows=3)
    dynamics.reset([0, 1, 2], [0, 1, 2])
    tokens = tiny.tokenizer()("xyz").input_ids
    dynamics.step(torch.tensor([tokens[0], tiny.END, tokens[0]]))
    dynamics.step(torch.tensor([tokens[1], 0, tokens[1]]), torch.tensor([True, False, True]))
    dynamics.step(torch.tensor([tokens[2], 0, tiny.END]), torch.tensor([True, False, True]))
    assert calls == [(["the cat"], [""]), (["a", "two words more"], ["xyz", "xy"])]


# ---- texts


def test_responses_are_exact():
    """The response text keeps its leading space and omits special tokens."""
    tokenizer = tiny.tokenizer()
    prompts = [tokenizer(text).input_ids for text in ("the cat", "a<end>b", "é")]
    responses = [
        [*tokenizer("  sat ").input_ids, tiny.END],
        [tiny.PAD, *tokenizer("x").input_ids, tiny.END],
        tokenizer("né☃\n").input_ids,
    ]
    batch = written(prompts, responses, tokenizer)
    assert batch.responses == ["  sat ", "x", "né☃\n"]
    assert batch.texts == ["the cat  sat ", "abx", "éné☃\n"]


def test_responses_of_a_tokenizer_that_strips_spaces():
    """With SentencePiece, a response starts with a space unless it continues the prompt's last word."""
    tokenizer = sentencepiece_tokenizer()
    batch = written([[2, 3], [2, 3], [2]], [[4, 1], [5, 4, 1], [1]], tokenizer)
    assert batch.responses == [" sat", "s sat", ""]
    assert batch.texts == ["the cat sat", "the cats sat", "the"]


def test_text_longer_than_the_reward_model_is_refused(folders, tmp_path):
    """A reward model with its own tokenizer never truncates a text silently: the error names the text."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["another"])  # a different vocabulary, so the model takes text
    tokenizer.model_max_length = 10
    folder = tmp_path / "short"
    tiny.reward_model("gpt2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    task = build_task(
        TextGenConfig(
            reference=folders["gpt2"],
            reward=str(folder),
            prompts=["a prompt of twenty"],
            device="cpu",
            max_prompt_tokens=20,
            max_new_tokens=2,
            kl_coef=0,
        )
    )
    dynamics = TextDynamics(task, 1)
    dynamics.reset([0], [0])
    with pytest.raises(ValueError, match="takes 10 tokens, and a prompt with its response has"):
        dynamics.step(torch.tensor([tiny.END]))
    policys = tiny.tokenizer()
    batch = written([policys(text).input_ids for text in ("another" * 3, "a prompt of")], [[tiny.END]] * 2, policys)
    with pytest.raises(ValueError, match=r"with its response has 12: row 1 \(prompt 'a prompt of'.*; lower max_prompt"):
        task.reward(batch)  # row 0 has more letters and fewer tokens
