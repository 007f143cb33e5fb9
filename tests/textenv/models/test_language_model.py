"""The cached language model and the fast path, against forwards of one unpadded row at a time."""

import dataclasses
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

from tests.support import tiny
from textenv.config import TextGenConfig
from textenv.dynamics import TextDynamics
from textenv.generation import generate, response_log_probs, score_responses
from textenv.models.decoding import CachedDecoder, Decoder
from textenv.models.language_model import LanguageModel, position_limit, read, response_logits
from textenv.models.sampling import Sampling
from textenv.prompts.tokenized import PromptTokenizer, pad_token_id
from textenv.state import TextState, start
from textenv.task import build_task

# The cache adds the same float32 numbers in another order: about ten roundings of 6e-8 at logits of size 3.
TOLERANCE = 1e-5
TEXTS = ["a", "the cat sat", "two words", "it is late, so"]
R = 8


@pytest.fixture(scope="module")
def models():
    """One live language model of each architecture."""
    return {kind: tiny.language_model(kind) for kind in ("gpt2", "llama")}


@pytest.fixture
def model(models, kind):
    """The language model of the architecture under test."""
    return models[kind]


@torch.no_grad()
def plain_logits(model, ids):
    """The oracle: logits after each token of one row, without cache, padding or mask. [T, V]."""
    return model(input_ids=torch.tensor([ids])).logits[0].float()


def prompt_state(extra, texts=TEXTS, new_tokens=R):
    """The state before the first token, with `extra` columns more than the longest prompt needs."""
    prompts = PromptTokenizer(tiny.tokenizer(), tiny.VOCABULARY, max(map(len, texts)) + extra)(texts)
    return start(prompts.input_ids, prompts.attention_mask, new_tokens, tiny.PAD)


def real_ids(state, row):
    """The real tokens of a row, as a list."""
    return state.input_ids[row][state.attention_mask[row]].tolist()


def scrambled(state, seed=0):
    """The same state with random ids in every column where the mask is false."""
    noise = torch.randint(tiny.VOCABULARY, state.input_ids.shape, generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(state, input_ids=state.input_ids.where(state.attention_mask, noise))


def write(state, tokens):
    """Append one token to every row."""
    return state.append(torch.tensor(tokens), torch.ones(len(tokens), dtype=torch.bool))


def random_response(state, seed=0):
    """The state after random tokens in all R columns of each row."""
    draw = random.Random(seed)
    for _ in range(state.input_ids.shape[1] - state.prompt_width):
        state = write(state, [draw.randrange(tiny.VOCABULARY) for _ in state.length])
    return state


@pytest.mark.parametrize("extra", [0, 7, 31])
@pytest.mark.parametrize("decoder_class", [CachedDecoder, Decoder])
def test_decoded_steps_and_full_forward_equal_plain_forward(model, extra, decoder_class):
    """Next-token logits are the same token by token, by one ragged forward, and by a bare forward of each row."""
    state, draw = prompt_state(extra), random.Random(extra)
    decoder = decoder_class(model, len(TEXTS), state.input_ids.shape[1], tiny.VOCABULARY)
    decoder.restart(state, torch.arange(len(TEXTS)))
    stepped = [decoder.logits]
    for _ in range(R - 1):
        state = write(state, [draw.randrange(tiny.VOCABULARY) for _ in TEXTS])
        decoder.advance(state)
        stepped.append(decoder.logits)
    state = write(state, [draw.randrange(tiny.VOCABULARY) for _ in TEXTS])
    with torch.no_grad():
        whole = response_logits(model, state.input_ids, state.attention_mask, state.prompt_width)  # [B, R, V]
    for row, text in enumerate(TEXTS):
        expected = plain_logits(model, real_ids(state, row))[len(text) - 1 : -1]  # [R, V]
        torch.testing.assert_close(torch.stack(stepped, 1)[row], expected, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(whole[row], expected, rtol=0, atol=TOLERANCE)


def test_tolerance_detects_a_wrong_mask_or_position(model):
    """One visible pad token, or one wrong position, moves the logits by more than 1000 times the tolerance."""
    ids = [*b"the cat"]
    plain = plain_logits(model, ids)[-1]
    assert (plain_logits(model, [tiny.PAD, *ids])[-1] - plain).abs().max() > 1000 * TOLERANCE
    with torch.no_grad():
        positions = torch.tensor([[place + 1 + (place > 2) for place in range(len(ids))]])
        moved = model(input_ids=torch.tensor([ids]), position_ids=positions).logits[0, -1]
    assert (moved - plain).abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize("extra", [7, 31])
def test_ids_of_empty_columns_are_ignored(model, extra):
    """Any ids may stand where the mask is false: the logits of real columns are equal to the bit."""
    state = random_response(prompt_state(extra))
    kept = torch.arange(R) < torch.tensor([[8], [3], [1], [5]])  # [B, R]
    mask = state.attention_mask & torch.cat([state.attention_mask[:, : state.prompt_width], kept], 1)  # [B, L]
    cut = TextState.from_masks(state.input_ids, mask, kept)
    results = []
    for state in (cut, scrambled(cut, 1), scrambled(cut, 2)):
        decoder = CachedDecoder(model, len(TEXTS), state.input_ids.shape[1], tiny.VOCABULARY)
        decoder.restart(state, torch.arange(len(TEXTS)))
        first = decoder.logits
        log_probs = response_log_probs(model, state, 0.7)
        results.append((first, log_probs))
    for first, log_probs in results[1:]:
        assert torch.equal(first, results[0][0])
        assert torch.equal(log_probs, results[0][1])
    assert (log_probs != 0).sum(1).tolist() == cut.length.tolist()


def test_rows_of_different_lengths(settings, model):
    """Rows that restart at different steps get the logits that they would get alone."""
    task, draw = build_task(TextGenConfig(**settings)), random.Random(1)
    dynamics = TextDynamics(task, rows=3)
    dynamics.reset([0, 2], [1, 0])
    restarts = {3: ([1], [2]), 5: ([0], [3]), 6: ([2, 1], [1, 1])}  # row 1 stays empty until step 3
    for step in range(10):
        if step in restarts:
            dynamics.reset(*restarts[step])
        for row in range(3):
            if dynamics.running[row]:
                expected = plain_logits(model, real_ids(dynamics.state, row))[-1]
                torch.testing.assert_close(dynamics.reference.logits[row], expected, rtol=0, atol=TOLERANCE)
        tokens = torch.tensor([draw.randrange(256) for _ in range(3)])
        active = dynamics.running & torch.tensor([True, step != 7, True])  # a row may also wait a step
        transition = dynamics.step(tokens, active)
        assert (transition.reference_log_prob != 0).tolist() == active.tolist()
    assert dynamics.state.length.tolist() == [5, 3, 4]


@pytest.mark.parametrize("pad", ["<pad>", "<end>"])
def test_sampled_pad_token_is_a_token(settings, folders, kind, tmp_path, pad):
    """Masks never come from ids: a sampled pad id counts like any other token."""
    folder = tiny.save(tiny.language_model(kind), tmp_path / "model", pad=pad)
    task = build_task(TextGenConfig(**{**settings, "reference": folder, "stop_token_ids": [65]}))
    pad_id = task.tokenizer.pad_token_id
    dynamics = TextDynamics(task, rows=1)
    state = dynamics.reset([0], [1])
    prompt = real_ids(state, 0)
    written, rewards = [66, pad_id, 67, pad_id, 65], []
    for step, token in enumerate(written):
        transition = dynamics.step(torch.tensor([token]))
        assert bool(transition.terminated[0]) == (step == 4)
        rewards.append(transition.reward[0].item())
    assert real_ids(transition.state, 0) == prompt + written
    log_prob = (plain_logits(tiny.language_model(kind), prompt + written) / 0.7).log_softmax(-1)
    expected = [0.3 * log_prob[len(prompt) - 1 + step, token].item() for step, token in enumerate(written)]
    expected[-1] += transition.score[0].item()
    assert rewards == pytest.approx(expected, abs=TOLERANCE)
    scored = score_responses(task, transition.state, [tiny.PROMPTS[1]])
    assert scored.reward[0].tolist() == pytest.approx(expected + [0.0] * 7, abs=TOLERANCE)


def test_frozen_models_are_in_eval_mode(settings, folders):
    """A loaded model draws no dropout, although its configuration has some."""
    model = build_task(TextGenConfig(**{**settings, "reference": folders["gpt2"]})).reference.model
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert any(layer.p > 0 for layer in model.modules() if isinstance(layer, torch.nn.Dropout))


# ---- generation


def ragged_task(settings, **changes):
    """A task with responses of many lengths: a quarter of all ids are stop tokens."""
    return build_task(TextGenConfig(**{**settings, "stop_token_ids": list(range(75)), **changes}))


def respond(task, model, indices, seed=0, **sampling):
    """Generate responses to the prompts at these indices."""
    prompts = task.prompts.select(indices)
    return generate(task, model, prompts, Sampling(**sampling), torch.Generator().manual_seed(seed))


def test_recorded_log_probs(settings, model):
    """`generate` records the log-probability of a bare forward, whichever other rows have ended."""
    task, indices = ragged_task(settings), [0, 1, 2, 3] * 8
    generation = respond(task, model, indices, temperature=0.7)
    lengths = generation.state.length.tolist()
    assert min(lengths) == 1 and max(lengths) > 6 and len(set(lengths)) > 4  # rows left the cache at many steps
    for row, index in enumerate(indices):
        ids, prompt = real_ids(generation.state, row), tiny.PROMPTS[index]
        assert ids[: len(prompt)] == task.tokenizer(prompt).input_ids
        written = ids[len(prompt) :]
        assert len(written) == lengths[row]
        assert written == generation.state.response_ids[row, : len(written)].tolist()
        ended_early = len(written) < 12
        assert (written[-1] < 75) or not ended_early
        assert all(token >= 75 for token in written[:-1])
        log_prob = (plain_logits(model, ids) / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = [log_prob[step, token].item() for step, token in enumerate(written)]
        assert generation.log_prob[row].tolist() == pytest.approx(expected + [0.0] * (12 - len(written)), abs=TOLERANCE)
    assert torch.allclose(
        response_log_probs(model, generation.state, 0.7, tokens_per_pass=60), generation.log_prob, atol=TOLERANCE
    )


def test_rows_are_independent(settings, model):
    """Greedy responses of a batch, in which rows end at different steps, equal those of each prompt alone."""
    prompts = [text * times for text in ("a", "xy", "q ", "7b") for times in (1, 2, 3, 5)]
    task = ragged_task(settings, prompts=prompts)
    together = respond(task, model, range(16), top_k=1).state
    assert len(set(together.length.tolist())) > 2
    for row in range(16):
        alone = respond(task, model, [row], top_k=1).state
        assert real_ids(alone, 0) == real_ids(together, row)


def test_response_of_one_token(settings, model):
    """If every id is a stop token, all responses have one token, with its log-probability."""
    task = ragged_task(settings, stop_token_ids=list(range(tiny.VOCABULARY)))
    generation = respond(task, model, [0, 1, 2])
    assert generation.state.length.tolist() == [1, 1, 1]
    assert generation.state.response_mask.sum(1).tolist() == [1, 1, 1]
    assert (generation.log_prob[:, 0] < 0).all() and not generation.log_prob[:, 1:].any()
    scored = score_responses(task, generation.state, tiny.PROMPTS[:3])
    assert scored.finish_code.tolist() == [1, 1, 1] and len(scored.responses) == 3


def test_budget_of_one_token(settings, model):
    """With a budget of one token, the response ends at it: with "stop" at a stop token, else with "length"."""
    task = ragged_task(settings, max_new_tokens=1)
    generation = respond(task, model, [0, 1, 2, 3] * 8)
    assert set(generation.state.length.tolist()) == {1}
    expected = ["stop" if token < 75 else "length" for token in generation.state.response_ids[:, 0].tolist()]
    scored = score_responses(task, generation.state, tiny.PROMPTS * 8)
    assert {*expected} == {"stop", "length"} and [scored.finish_reason(row) for row in range(32)] == expected


def test_stop_token_other_than_the_end_token(settings, model):
    """`stop_token_ids` replaces the model's own end tokens: 65 ends a response, the end token does not."""
    task = ragged_task(settings, stop_token_ids=[65])
    dynamics = TextDynamics(task, rows=2)
    dynamics.reset([0, 1], [0, 1])
    first = dynamics.step(torch.tensor([65, tiny.END]))
    assert first.terminated.tolist() == [True, False]
    assert [first.finish_reason(row) for row in range(2)] == ["stop", ""]


def test_stop_token_at_the_last_column_is_a_stop(settings):
    """A stop token that is also the last token of the budget counts as a stop."""
    task = ragged_task(settings, max_new_tokens=2)
    dynamics = TextDynamics(task, rows=2)
    dynamics.reset([0, 1], [0, 1])
    dynamics.step(torch.tensor([99, 99]))
    last = dynamics.step(torch.tensor([0, 99]))
    assert last.terminated.tolist() == [True, True]
    assert [last.finish_reason(row) for row in range(2)] == ["stop", "length"]


def test_end_token_inside_the_prompt(settings, model):
    """End tokens in the prompt do not end the response."""
    task = build_task(TextGenConfig(**{**settings, "prompts": ["a<end>b<end>", "<end>"]}))
    assert task.stop_token_ids == (tiny.END,)
    assert task.prompts.input_ids[0, -1] == tiny.END
    dynamics = TextDynamics(task, rows=2)
    dynamics.reset([0, 1], [0, 1])
    assert dynamics.step(torch.tensor([65, 65])).terminated.tolist() == [False, False]
    generation = respond(task, model, [0, 1] * 4)
    assert generation.state.length.max() > 1
    assert score_responses(task, generation.state, ["a<end>b<end>", "<end>"] * 4).finish_code.min() > 0


def test_generation_is_seeded(settings, model):
    """The seed decides the tokens, whatever the state of the global generator."""
    task, generations = ragged_task(settings), []
    for seed, noise in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(noise)
        generations.append(respond(task, model, [0, 1, 2, 3], seed=seed))
    assert torch.equal(generations[0].state.input_ids, generations[1].state.input_ids)
    assert torch.equal(generations[0].log_prob, generations[1].log_prob)
    assert not torch.equal(generations[0].state.response_ids, generations[2].state.response_ids)


def test_generation_with_padding_and_without(settings, model):
    """The prompt width P changes no token."""
    narrow, wide = ragged_task(settings), ragged_task(settings, max_prompt_tokens=40)
    first, second = (respond(task, model, [0, 1, 2, 3] * 2, temperature=0.7) for task in (narrow, wide))
    assert [real_ids(first.state, row) for row in range(8)] == [real_ids(second.state, row) for row in range(8)]


def test_scoring_in_passes(settings, model):
    """The number of tokens per pass does not change the result; every row is scored."""
    task = ragged_task(settings)
    generation, texts = respond(task, model, [0, 1, 2, 3] * 3), tiny.PROMPTS * 3
    whole = score_responses(task, generation.state, texts)
    parts = score_responses(task, generation.state, texts, tokens_per_pass=60)
    for name in ("reward", "reference_log_prob", "score"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), atol=TOLERANCE), name
    assert torch.equal(whole.finish_code, parts.finish_code) and whole.responses == parts.responses
    assert len(whole.responses) == 12


def test_scoring_needs_a_text_per_row(settings, model):
    """Too few or too many prompt texts are refused."""
    task = ragged_task(settings)
    generation = respond(task, model, [0, 1, 2])
    for texts in (tiny.PROMPTS[:2], tiny.PROMPTS[:4]):
        with pytest.raises(ValueError, match=f"3 .*{len(texts)}"):
            score_responses(task, generation.state, texts)


def test_state_is_a_value():
    """append, restart and select do not change the original state."""
    state = random_response(prompt_state(2, new_tokens=3))
    fresh = prompt_state(2, new_tokens=3)
    originals: list[TextState] = [fresh, state]
    before = [(each.input_ids.clone(), each.attention_mask.clone(), each.length.clone()) for each in originals]
    write(fresh, [1, 2, 3, 4])
    restarted = state.restart(torch.tensor([1]), fresh.select(torch.tensor([1])))
    state.select(torch.tensor([0])).append(torch.tensor([0]), torch.tensor([False]))
    assert restarted.length.tolist() == [3, 0, 3, 3] and not restarted.response_mask[1].any()
    for original, (ids, mask, length) in zip(originals, before, strict=True):
        assert torch.equal(original.input_ids, ids) and torch.equal(original.attention_mask, mask)
        assert torch.equal(original.length, length)


def test_vocabulary_and_pad(model):
    """V is the width of the logits, which may exceed the tokenizer's; without a pad token the pad id is 0."""
    lm = LanguageModel(model, tiny.tokenizer(), (tiny.END,))
    assert lm.vocabulary == tiny.VOCABULARY == plain_logits(model, [1]).shape[-1] > len(tiny.tokenizer())
    pads = [pad_token_id(tiny.tokenizer(pad), lm.vocabulary) for pad in ("<pad>", None)]  # type: ignore[arg-type]
    assert pads == [tiny.PAD, 0]


def test_threads_share_a_model(model):
    """Two threads that read one model at once get the values that each gets alone: each narrows its own forward."""
    texts = [
        (torch.tensor([[*b"the cat sat"]]), torch.tensor([[4, 10]])),
        (torch.tensor([[*b"two"], [*b"cat"]]), torch.tensor([[0], [2]])),
    ]
    both = threading.Barrier(2)

    @torch.no_grad()
    def read_one(text):
        return read(model, *text)

    def wait(*_):
        both.wait(10)  # until both have put their hooks on the head

    alone = [read_one(text) for text in texts]
    meet = model.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(read_one, texts))
    meet.remove()
    for values, expected in zip(together, alone, strict=True):
        for value, right in zip(values, expected, strict=True):
            torch.testing.assert_close(value, right, rtol=0, atol=TOLERANCE)


def test_word_tables_are_no_position_tables():
    """A vocabulary as large as the number of positions, with a pad id, takes no position away; RoBERTa's pad id does."""
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=64)
    sizes |= dict(max_position_embeddings=64)
    assert position_limit(LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=5))) == 64
    assert position_limit(RobertaModel(RobertaConfig(**sizes, pad_token_id=1))) == 62
    assert (
        position_limit(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=8, n_layer=1, n_head=1))) == 64
    )
