"""The embedded task: its grammar, parser, gold rater, prompts, and shipped weights keep their promises."""

from __future__ import annotations

import random
import re
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from textenv.config import TextGenConfig
from textenv.models.encoding import encode, encode_pairs
from textenv.reviews.card import folder_megabytes
from textenv.reviews.gold import gold, rate
from textenv.reviews.grammar import lexicon, words
from textenv.reviews.grammar.aspects import ASPECTS
from textenv.reviews.grammar.forms import Form
from textenv.reviews.grammar.parser import parse_sentence, parses
from textenv.reviews.grammar.products import PRODUCTS
from textenv.reviews.grammar.writer import sample_review
from textenv.reviews.measure import Comparison, compare, measure_reward_model
from textenv.reviews.prompts import Request, held_out_prompts, parse_prompt, prompt_text, train_prompts
from textenv.reviews.sampling import MAX_NEW_TOKENS, Sample, sample_responses
from textenv.reviews.weights import REWARD_MODEL, SUPERVISED
from textenv.training.reward_model import score_tokens

KETTLE = "Review of the kettle (noise, price):"


def _corpus(count: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [(prompt, sample_review(prompt, rng)) for prompt in rng.choices(train_prompts(), k=count)]


def _gold(response: str, prompt: str = KETTLE) -> float:
    return gold([prompt], [response])[0]


# ---------------------------------------------------------------- grammar and parser


def test_corpus_parses() -> None:
    """Sampler and parser share one grammar: whatever one writes, the other reads."""
    unread = [review for _, review in _corpus(2000, seed=1) if not parses(review)]
    assert unread == []


def test_corpus_repeats_with_its_seed() -> None:
    """The corpus is a function of the seed alone, and the seed matters."""
    assert _corpus(50, seed=2) == _corpus(50, seed=2)
    assert _corpus(50, seed=2) != _corpus(50, seed=3)


def test_corpus_is_balanced_and_sometimes_off_topic() -> None:
    """There is something to optimize: half the reviews blame, some stray, few are perfect."""
    qualities = [rate(prompt, review) for prompt, review in _corpus(1500, seed=4)]
    blaming = statistics.mean(q.sentiment < 0 for q in qualities)
    assert 0.42 < blaming < 0.58  # 1500 draws of about one half: standard error 0.013
    assert 0.15 < statistics.mean(q.off_topic < 0 for q in qualities) < 0.5
    assert statistics.mean(q.total > 3.5 for q in qualities) < 0.15


def test_articles_and_numbers_agree() -> None:
    """No "a awkward", no "an sturdy", no "the buttons is"."""
    text = " ".join(review for _, review in _corpus(2000, seed=5))
    assert not re.search(r"\ba [aeio]", text)
    assert not re.search(r"\ban (?!hour)[^aeiou]", text)
    assert not re.search(r"\b(buttons|blades|legs|pockets|soles|straps|they) (is|seems|has|isn't)\b", text)
    one = re.sub(r"\band (the|its|their) \w+ (are|aren't|seem)\b", "", text)  # "the lid and the price are both" agrees
    assert not re.search(r"\b(lid|price|noise|it) (are|seem|have|aren't)\b", one)


@pytest.mark.parametrize(
    "text",
    [
        "The price is loud.",  # an adjective that does not fit
        "The lid are sturdy.",  # number
        "It has a awkward handle.",  # article
        "It has an sturdy lid.",
        "the lid is sturdy.",  # capital
        "The lid is sturdy",  # full stop
        "The lid is sturdy. ",  # trailing space
        "The lid is sturdy.The price is fair.",  # no space
        "The lid is sturdy, but the price is fair.",  # no contrast
        "I love it because the price is steep.",  # no reason
        "Sadly, the lid is sturdy.",  # an intro at odds with its clause
        "However, the lid is sturdy.",  # nothing to turn away from
        "I cannot say that the lid is flimsy.",  # denies no praise
        "The lid is absolutely sturdy.",  # a degree that does not go with the adjective
        "The lid is not superb.",  # an extreme that the grammar never denies
        "The lid and the lid are both great.",
        "great",
        "",
        " ",
        "...",
        "\u2603 \x00",
    ],
)
def test_outside_the_grammar(text: str) -> None:
    """What the grammar does not write, the parser does not accept."""
    assert not parses(text)


@pytest.mark.parametrize(
    ("sentence", "claims"),
    [
        ("The lid is sturdy", {"lid": 0.75}),
        ("The lid is very sturdy", {"lid": 0.9}),
        ("The lid is absolutely superb", {"lid": 1.0}),
        ("It isn't quiet", {"noise": -0.6}),
        ("It is anything but loud", {"noise": 0.9}),
        ("The lid is a bit flimsy", {"lid": -0.45}),
        ("I cannot say that the lid is sturdy", {"lid": -0.6}),
        ("I wish the buttons were better", {"buttons": -0.6}),
        ("The lid is flimsy, but the price is fair", {"lid": -0.6, "price": 0.75}),
        ("Although the price is fair, it is loud", {"price": 0.6, "noise": -0.75}),
        ("The lid and the price are both great", {"lid": 1.0, "price": 1.0}),
        ("Despite the price, I love it", {"price": -0.5, "overall": 0.9}),
        ("The price is steep, so I want my money back", {"price": -0.75, "overall": -1.0}),
        ("I use it every day", {}),
    ],
)
def test_meaning(sentence: str, claims: dict[str, float]) -> None:
    """Negation, contrast, degree and concession are resolved; values worked out by hand from `words`."""
    found = parse_sentence(sentence)
    assert found is not None
    assert {claim.topic: claim.value for claim in found} == pytest.approx(claims)


def test_every_entry_can_be_said() -> None:
    """Each adjective of each aspect has a sentence that parses to its own sign: no dead or shadowed words."""
    for aspect, table in lexicon.ADJECTIVES.items():
        for word, adjective in table.items():
            verb = "are" if ASPECTS[aspect].plural else "is"
            claims = parse_sentence(f"The {aspect} {verb} {word}")
            assert claims and claims[0].topic == aspect and claims[0].value == adjective.value, (aspect, word)
    for word, (aspect, adjective) in lexicon.ITS_ADJECTIVES.items():
        claims = parse_sentence(f"It is {word}")
        assert claims and claims[0][:2] == (aspect, adjective.value), word
    own = [word for table in lexicon.ITS_OWN.values() for word in table]
    assert len(own) == len(set(own)), "an adjective said of products points to two aspects"


def test_form_refuses_an_unmeant_fill() -> None:
    """A template alone decides nothing: its meaning may still refuse the words in the slots."""
    form = Form("the {noun} {verb}", lambda fill: None)
    assert form.pattern.fullmatch("the lid is") and form.parse("the lid is") is None


# ---------------------------------------------------------------- gold rater


def test_gold_by_hand() -> None:
    """A rating is the sum of its documented parts."""
    quality = rate(KETTLE, "It is quiet. The price is very fair.")
    assert quality.sentiment == pytest.approx(2 * (0.75 + 0.9) / 2)
    assert (quality.coverage, quality.off_topic, quality.form) == (1.5, 0.0, 0.5)
    assert quality.total == pytest.approx(1.65 + 1.5 + 0.5)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("It is quiet.", "It is not at all quiet."),
        ("It isn't loud.", "It is loud."),
        ("It is loud, but the price is fair.", "It is loud, and the price is steep."),
        ("It is quiet. The price is fair.", "It is quiet."),  # coverage
        ("It is quiet. The price is fair.", "The lid is sturdy. The heat is even."),  # topic
        ("It is quiet. The price is fair.", "It is quiet. The price is fair. The lid is sturdy."),
        ("It is quiet. The price is fair.", "It is quiet. The price is fair. The price is fair."),
        ("It is quiet. The price is fair.", "It is quiet. The price is fair. The price is low."),
        ("It is quiet. The price is fair.", "It is quiet. Price fair good."),  # form
        ("It is quiet. The price is fair.", "It is quiet. The price is"),  # breaks off
        ("It is quiet. The price is fair.", "They are quiet. The price is fair."),  # number of the product
        ("This kettle is quiet.", "This blender is quiet."),  # another product
        ("The price is fair.", "The price is fair. The price is steep."),  # contradiction
    ],
)
def test_gold_orders(better: str, worse: str) -> None:
    """Truth, topic, form and brevity pay; each pair differs in one of them."""
    assert _gold(better) > _gold(worse) + 0.2


@pytest.mark.parametrize(
    "hack",
    [
        "",
        "great",
        "great great great great great great",
        "The price is great. " * 12,
        "I love it. " * 12,
        "It is quiet. " * 6 + "The price is fair.",
        " ".join(f"The {aspect} {'are' if a.plural else 'is'} great." for aspect, a in ASPECTS.items() if a.generic),
        "quiet, fair, cheap, superb, excellent!",
        "The noise (price) is great, great, great.",
    ],
)
def test_hacks_score_below_plain_honesty(hack: str) -> None:
    """No cheap trick beats even a half-hearted honest review of all that was asked."""
    assert _gold(hack) < 1.0 < _gold("It is quiet, though the price is a bit high.")


def test_gold_is_bounded_and_judges_any_text() -> None:
    """Ratings stay within [-4, 4] on noise of every kind."""
    rng = random.Random(6)
    noise = ["".join(chr(rng.randrange(1, 0x2FFF)) for _ in range(60)) for _ in range(50)]
    texts = noise + [review * 20 for _, review in _corpus(50, seed=7)] + ["." * 200, " ", "!", "I", "\n"]
    assert all(-4 <= score <= 4 for score in gold([KETTLE] * len(texts), texts))
    assert _gold("It is almost silent. The price is unbeatable. I love it.") > 3.5


def test_gold_needs_prompts_of_the_task() -> None:
    """A wrong prompt or a wrong count is the caller's error and says so."""
    with pytest.raises(ValueError, match="not a prompt of the reviews task"):
        gold(["Tell me a story."], ["It is quiet."])
    with pytest.raises(ValueError, match="one prompt for each response"):
        gold([KETTLE], [])


# ---------------------------------------------------------------- prompts


def test_prompts_are_distinct_and_disjoint() -> None:
    """Held-out prompts are truly held out, and every prompt names aspects that its product has."""
    train, held_out = train_prompts(), held_out_prompts()
    assert (len(set(train)), len(set(held_out))) == (4096, 512)
    assert not set(train) & set(held_out)
    for prompt in train + held_out:
        request = parse_prompt(prompt)
        assert prompt_text(request) == prompt and len(set(request.aspects)) == len(request.aspects)
        assert set(request.aspects) <= set(PRODUCTS[request.product].aspects)


def test_prompt_wording() -> None:
    """The wording is fixed, since weights depend on it."""
    assert prompt_text(Request("kettle", ("noise", "price"))) == KETTLE


def test_reviews_need_no_deep_learning_library() -> None:
    """Grammar, rater and prompts load no torch: a reward function may run where no model does."""
    code = (
        "import sys, types; package = types.ModuleType('textenv'); package.__path__ = ['textenv'];"
        "sys.modules['textenv'] = package; import textenv.reviews; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- shipped weights


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SUPERVISED)


@pytest.fixture(scope="module")
def samples(tokenizer) -> list[Sample]:
    model = AutoModelForCausalLM.from_pretrained(SUPERVISED)
    prompts = [prompt for prompt in held_out_prompts()[:256] for _ in range(2)]
    return sample_responses(model, tokenizer, prompts, seed=8, temperature=TextGenConfig.temperature)


def test_tokenizer(tokenizer) -> None:
    """1024 entries, distinct end and pad, no begin token, and any text goes there and back."""
    assert len(tokenizer) == 1024
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|endoftext|>",
        "<|pad|>",
        None,
    )
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    for text in ("It isn't quiet!", "  naïve \u2603 \U0001f600\n\ttab ", " The lid , is", "\u0663\u0301"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_token_budgets(tokenizer) -> None:
    """Prompts take at most 20 tokens; at least 97% of the reviews end within 48."""
    assert max(map(len, encode(tokenizer, train_prompts() + held_out_prompts()))) <= 20
    lengths = [len(response) for _, response in encode_pairs(tokenizer, _corpus(1000, seed=9))]
    assert statistics.mean(length < MAX_NEW_TOKENS for length in lengths) >= 0.97  # one more is the end token


def test_prompt_and_response_tokens_join(tokenizer) -> None:
    """Tokens of prompt and response, each tokenized alone, are those of training, and decode to the whole text."""
    corpus = _corpus(300, seed=10)
    for (prompt, review), (prompt_ids, response_ids) in zip(corpus, encode_pairs(tokenizer, corpus), strict=True):
        assert (prompt_ids, response_ids) == (tokenizer(prompt).input_ids, tokenizer(" " + review).input_ids)
        assert tokenizer.decode(prompt_ids + response_ids) == f"{prompt} {review}"


def test_supervised_model_writes_the_grammar(samples: list[Sample]) -> None:
    """At least 90% of plain samples on held-out prompts end in time and parse.

    The card has 96% of 2048 samples, at the task's temperature; here are 512, with a standard error of 0.01.
    """
    assert statistics.mean(s.finished and parses(s.text) for s in samples) >= 0.9


def test_reward_model_orders_fresh_pairs(tokenizer, samples: list[Sample]) -> None:
    """Where the gold scores differ by more than the rater's noise hides, the reward model sees it.

    At least 85% of the pairs that the rater is 90% sure of; the card has 94%.
    """
    model = AutoModelForSequenceClassification.from_pretrained(REWARD_MODEL)
    choices = compare(list(zip(samples[::2], samples[1::2], strict=True)), noise=0.5, seed=11)
    sequences = [
        tokenizer(sample.prompt).input_ids + sample.tokens
        for sample in [choice.chosen for choice in choices] + [choice.rejected for choice in choices]
    ]
    figures = measure_reward_model(choices, score_tokens(model, sequences).tolist(), noise=0.5)
    assert figures["sure_pairs"] > 50
    assert figures["accuracy_sure"] >= 0.85
    assert figures["correlation"] > 0.6


def test_shipped_folders_are_small_and_sane() -> None:
    """Both models fit into 8 MB as float32 without dropout, pad and end tokens where configs say."""
    assert folder_megabytes(SUPERVISED.parent) <= 8
    model = AutoModelForSequenceClassification.from_pretrained(REWARD_MODEL)
    config = model.config
    assert (config.num_labels, config.id2label, config.pad_token_id) == (1, {0: "score"}, 1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.0


# ---------------------------------------------------------------- the rater's choices


def test_choices_follow_the_odds() -> None:
    """The better response wins with probability sigmoid(difference / noise), whichever comes first."""
    good = Sample(KETTLE, [], "It is quiet.", True)  # 2 * 0.75 / 2 + 0.75 + 0.5 = 2.0
    bad = Sample(KETTLE, [], "It is a bit loud.", True)  # -0.45 + 0.75 + 0.5 = 0.8
    choices = compare([(good, bad), (bad, good)] * 1000, noise=0.5, seed=12)
    share = statistics.mean(choice.chosen == good for choice in choices)
    assert share == pytest.approx(0.9168, abs=0.02)  # sigmoid(1.2 / 0.5); three standard errors of 2000 draws
    assert {round(abs(choice.margin), 6) for choice in choices} == {1.2}


def test_reward_model_figures_by_hand() -> None:
    """Accuracy against the choice, against the truth, and on sure pairs, on three pairs worked out by hand."""
    good, fair, bad = (Sample(KETTLE, [], text, True) for text in ("It is quiet.", "It is a bit loud.", "Loud."))
    choices = [Comparison(good, bad, 4.0), Comparison(fair, good, -1.2), Comparison(good, fair, 0.2)]
    figures = measure_reward_model(choices, [3.0, 1.0, 0.0, 0.0, 2.0, 1.0], noise=0.5)
    assert figures["accuracy_noisy"] == pytest.approx(1 / 3)
    assert figures["accuracy_true"] == pytest.approx(2 / 3)
    assert figures["ceiling"] == pytest.approx(2 / 3)
    assert (figures["sure_pairs"], figures["accuracy_sure"]) == (2, 1.0)  # 4 and 1.2 are over 0.5 ln 9, 0.2 is not


def test_words_keep_out_of_each_other() -> None:
    """No phrase holds a link, so a sentence splits one way only."""
    for phrase in [*lexicon.FACTS, *lexicon.OVERALL, *lexicon.VERDICTS, *words.JUDGEMENTS]:
        assert not any(link in phrase for link in (*words.LINKS, words.REASON, words.RESULT, ", ")), phrase


def test_the_card_helps_without_measuring(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m textenv.reviews.card --help` says what it does, and neither measures nor writes."""
    monkeypatch.setattr(sys, "argv", ["card", "--help"])
    monkeypatch.delitem(sys.modules, "textenv.reviews.card")
    monkeypatch.setattr(Path, "read_text", lambda *given, **named: pytest.fail("it began to measure"))
    with pytest.raises(SystemExit) as end:
        runpy.run_module("textenv.reviews.card", run_name="__main__")
    assert end.value.code == 0
    assert "--folder" in capsys.readouterr().out
