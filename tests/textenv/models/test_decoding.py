"""Decoding on the fast path: what the host waits for, slots, groups, and the compiled step."""

from __future__ import annotations

import gc
import logging
import shutil

import pytest
import torch

import textenv
from tests.support import families, tiny
from tests.support.syncs import CountSyncs
from textenv import LanguageModel, TextGenConfig, build_task
from textenv.dynamics import TextDynamics
from textenv.generation import generate, response_log_probs
from textenv.models import compiled, decoding
from textenv.models.decoding import CachedDecoder, Decoder, Decoding
from textenv.models.sampling import Sampling

# Batches of other sizes add the same float32 numbers in another order: a few roundings of 6e-8 at logits of size 3,
# and ten times that in architectures whose weights are larger.
TOLERANCE, LARGE_TOLERANCE = 1e-5, 2e-4
LONG = "regex:[a-z]{16,}"  # no stop before the budget
GROUPS = [0, 1, 1, 1, 2, 3, 0, 0, 2, 3, 1]  # prompts, some of them in groups
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler on a CPU",
)


def a_reward(prompts, responses):
    """Any."""
    return [0.0] * len(prompts)


def make_task(model, **changes):
    """A task on a live model in which a fifth of all ids ends a response."""
    reference = textenv.shared(LanguageModel(model, tiny.tokenizer(), tuple(range(60))))
    fixed = dict(reward=textenv.shared(a_reward), prompts=tiny.PROMPTS, kl_coef=0.3, temperature=0.7, device="cpu")
    return build_task(
        TextGenConfig(reference=reference, max_prompt_tokens=16, **{"max_new_tokens": 20, **fixed, **changes})
    )


def respond(task, indices, model=None, seed=0, **decoding):
    """Responses of the reference, or of another model, to the prompts of these indices."""
    model = task.reference.model if model is None else model
    prompts, sampling = task.prompts.select(indices), Sampling(temperature=0.7)
    return generate(task, model, prompts, sampling, torch.Generator().manual_seed(seed), Decoding(**decoding))


def assert_equal(generation, expected, tolerance=TOLERANCE):
    """The same tokens and masks, and log-probabilities up to rounding."""
    assert generation.state.input_ids.equal(expected.state.input_ids)
    assert generation.state.response_mask.equal(expected.state.response_mask)
    torch.testing.assert_close(generation.log_prob, expected.log_prob, rtol=0, atol=tolerance)
    if expected.allowed is not None:
        assert generation.allowed.dense(tiny.VOCABULARY).equal(expected.allowed.dense(tiny.VOCABULARY))


def assert_steps_agree(task, generation, prompts, tolerance=TOLERANCE):
    """Stepping through the same tokens shows the same log-probabilities of the reference, and ends where they end."""
    dynamics = TextDynamics(task, len(prompts))
    dynamics.reset(range(len(prompts)), prompts)
    for step in range(task.config.max_new_tokens):
        active = dynamics.running.clone()
        assert active.equal(generation.state.length > step)
        if active.any():
            found = dynamics.step(generation.state.response_ids[:, step], active).reference_log_prob
            torch.testing.assert_close(found, generation.log_prob[:, step], rtol=0, atol=tolerance)


# ---- the host


def syncs(mask, tokens, rows=4):
    """How often the host waits for responses, the longest of which has `tokens` tokens."""
    task = make_task(tiny.language_model(), action_mask=mask, max_new_tokens=tokens, stop_token_ids=[tiny.PAD])
    with CountSyncs() as counted:
        generation = respond(task, [row % 4 for row in range(rows)], look_every=8)
    assert generation.state.length.max() == tokens
    return counted.names.total()


@pytest.mark.parametrize(
    ("mask", "tokens", "each_look"),
    [(None, 40, 1), ("special", 16, 2), (["special", "top_k:250", "top_p:0.999"], 16, 2)],
)
def test_the_host_waits_at_looks_alone(mask, tokens, each_look):
    """One wait for every eight tokens, and with masks that read no text one more for their width."""
    assert syncs(mask, tokens) - syncs(mask, 8) == (tokens // 8 - 1) * each_look


def test_text_masks_wait_as_often_for_many_rows():
    """A mask that reads texts costs the same number of waits a token for two rows and for eight."""
    counts = {rows: syncs(LONG, 16, rows) - syncs(LONG, 8, rows) for rows in (2, 8)}
    assert counts[2] == counts[8] <= 4 * 8


def test_whole_texts_wait_at_looks_alone(monkeypatch):
    """So does decoding that reads whole texts, but for what the model's own forward waits for."""
    monkeypatch.setattr(decoding, "decodes_from_cache", lambda *_: False)
    model = tiny.language_model()
    with CountSyncs() as counted:
        model(input_ids=torch.zeros(4, 20, dtype=torch.long), use_cache=False)
    assert syncs(None, 16) - syncs(None, 8) == 1 + 8 * counted.names.total()


# ---- slots and groups


def check_slots(task, prompts, tolerance):
    """Eleven rows at once, or a few at a time: the same; and stepping and one forward agree."""
    whole = respond(task, prompts)
    assert len(set(whole.state.length.tolist())) > 2
    for slots, look_every in ((2, 1), (5, 8), (None, 8)):
        assert_equal(respond(task, prompts, slots=slots, look_every=look_every), whole, tolerance)
    if not task.masks:
        assert_steps_agree(task, whole, prompts, tolerance)
        teacher_forced = response_log_probs(task.reference.model, whole.state, 0.7)
        torch.testing.assert_close(whole.log_prob, teacher_forced, rtol=0, atol=tolerance)


@pytest.mark.parametrize("from_cache", [True, False])
def test_slots_change_nothing(monkeypatch, from_cache):
    """All rows at once, or two or five at a time, looked at after each step or eight: the same, as stepping has it."""
    monkeypatch.setattr(decoding, "decodes_from_cache", lambda *_: from_cache)
    check_slots(make_task(tiny.language_model()), GROUPS, TOLERANCE)


@pytest.mark.parametrize("mask", [["special", "top_k:200"], "regex:[a-z]*[qz][a-z ]*"])
def test_slots_change_nothing_under_masks(mask):
    """The same with masks, which are stored row by row."""
    check_slots(make_task(tiny.language_model(), action_mask=mask), GROUPS, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, ["special", "top_p:0.9"], "regex:[a-z]*[qz][a-z ]*"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3_text", "mistral", "mamba", "jamba", "bloom"])
def test_slots_change_nothing_in_any_architecture(name, mask):
    """The same with windows, layers of several types, recurrent states and ALiBi."""
    check_slots(make_task(families.build(name), action_mask=mask), GROUPS, LARGE_TOLERANCE)


def test_a_row_does_not_depend_on_the_others():
    """The first rows write the same whichever rows follow them."""
    task = make_task(tiny.language_model())
    few, many = respond(task, [0, 1, 2]), respond(task, [0, 1, 2] + [3] * 40)
    assert few.state.input_ids.equal(many.state.input_ids[:3])


@pytest.mark.parametrize("name", ["slots", "look_every"])
@pytest.mark.parametrize("count", [0, -1])
def test_too_few(name, count):
    """No slot, and no step between two looks, are refused in a sentence."""
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, or None .*; got {count}"):
        Decoding(**{name: count})


@pytest.mark.parametrize("kind", [CachedDecoder, Decoder])
def test_groups_are_read_once(kind):
    """Equal prompts that follow one another are one row of the forward, and all of them get its logits."""
    task = make_task(tiny.language_model())
    model, prompts = task.reference.model, task.prompts.select([0, 0, 0, 1, 2, 2, 0])
    state = textenv.state.start(prompts.input_ids, prompts.attention_mask, 20, tiny.PAD)
    decoder, sizes = kind(model, 7, task.width, task.vocabulary), []
    hook = model.register_forward_pre_hook(
        lambda module, arguments, keywords: sizes.append(len(keywords["input_ids"])), with_kwargs=True
    )
    decoder.restart(state, torch.arange(7))
    hook.remove()
    assert sizes == [4]
    for row in range(7):
        with torch.no_grad():
            alone = model(input_ids=state.input_ids[row][state.attention_mask[row]][None]).logits[0, -1]
        torch.testing.assert_close(decoder.logits[row], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("slots", [{}, dict(slots=2), dict(look_every=8), dict(slots=2, look_every=8)])
def test_an_overflow_names_its_row_and_token(slots):
    """Logits that become NaN in the middle of a response are named, though the host looks later."""
    model = tiny.language_model()
    task = make_task(model, max_new_tokens=12, stop_token_ids=[tiny.PAD])
    length = int(respond(task, [0, 1, 3, 2], **slots).state.length[3])
    assert length > 10
    with torch.no_grad():
        model.transformer.wpe.weight[len(tiny.PROMPTS[2]) + 8] = torch.nan  # no other text is as long
    with pytest.raises(ValueError, match="the largest of the policy's logits is nan at row 3, token 9: "):
        respond(task, [0, 1, 3, 2], **slots)


# ---- the compiled step


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss"])
def test_compiled_is_eager(name, caplog):
    """The compiled step gives the numbers of the plain one: ragged, refilled, masked, and after weights change."""
    torch.compiler.reset()  # it compiles one function for a few models in a process, and then no more
    task, prompts = make_task(families.build(name)), [*GROUPS, 2]
    model = task.reference.model
    masked = make_task(model, action_mask="top_k:200")
    with caplog.at_level(logging.WARNING):
        for each in (task, masked):
            for changes in ({}, dict(slots=9, look_every=8)):
                expected = respond(each, prompts)
                assert_equal(respond(each, prompts, compile=True, **changes), expected, LARGE_TOLERANCE)
        assert_steps_agree(task, respond(task, prompts, compile=True), prompts, LARGE_TOLERANCE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        changed = respond(task, prompts)
        assert not changed.state.input_ids.equal(expected.state.input_ids)
        assert_equal(respond(task, prompts, compile=True), changed, LARGE_TOLERANCE)
    assert not [record for record in caplog.records if "not compiled" in record.message]


def test_what_cannot_be_compiled_is_decoded_all_the_same(monkeypatch, caplog):
    """If compiling fails, or gives other numbers, one line says so, and the plain step is taken."""
    task = make_task(tiny.language_model())
    expected = respond(task, [0, 1, 2])

    def fails():
        raise RuntimeError("no compiler")

    def wrong():
        return lambda *arguments: compiled.read_token(*arguments).roll(1, -1)

    for compile_step, reason in ((fails, "RuntimeError"), (wrong, "compiled logits are off by")):
        compiled.say_not_compiled.cache_clear()
        compiled._free.clear()
        monkeypatch.setattr(compiled, "_compiled", compile_step)
        with caplog.at_level(logging.WARNING):
            assert_equal(respond(task, [0, 1, 2], compile=True), expected)
        said = [record.message for record in caplog.records if "is not compiled" in record.message]
        assert len(said) == 1 and reason in said[0] and "GPT2LMHeadModel" in said[0]
        caplog.clear()


class Borrower:
    """Stands for a decoder."""


def test_a_captured_step_is_lent_to_one_decoder():
    """Two decoders at a time have two caches. What one leaves, the next one gets, empty; other weights get a new one."""
    model = tiny.language_model()

    def borrow(borrower, rows=2):
        addresses = tuple(parameter.data_ptr() for parameter in model.parameters())
        return compiled._borrow(model, (rows, 8), addresses, borrower)

    first, second = Borrower(), Borrower()
    step = borrow(first)
    assert step.cache is not borrow(second).cache
    step.cache.memory[0] = (torch.full((2, 1, 9, 4), torch.nan),) * 2
    del first
    gc.collect()
    third = Borrower()
    assert borrow(third) is step and not step.cache.memory[0][0].any()
    del third
    for rows in (3, 4, 5):  # more sizes than are kept
        borrow(Borrower(), rows)
    gc.collect()
    assert [each.cache.size[0] for each in compiled._free[model]] == [4, 5]
    model.transformer.wte.weight.data = model.transformer.wte.weight.data.clone()
    borrow(Borrower(), 5)
    assert len(compiled._free[model]) == 1


def test_a_cpu_model_beside_a_gpu(monkeypatch):
    """Graphs are for models on CUDA; a model on the CPU is compiled, whatever else the machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = tiny.language_model()
    assert compiled.borrow_step(model, 2, 8, object()).pool is None
