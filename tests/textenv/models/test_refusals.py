"""Models that cannot be right are refused by `gym.make` in a sentence of ours, with the reason and what to do."""

import json
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PhimoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.support import families, tiny
from textenv import LanguageModel, shared
from textenv.config import TextGenConfig
from textenv.generation import generate
from textenv.models.comparison import largest_difference, relative_difference
from textenv.models.decoding import decodes_from_cache
from textenv.models.loading import load_trainable_lm
from textenv.models.probe import WHOLE, check_backbone, check_causal
from textenv.models.sampling import Sampling
from textenv.task import build_task

SETTINGS = dict(reward="tests.support.oracle_models:length_reward", prompts=tiny.PROMPTS, max_prompt_tokens=16)
SETTINGS |= dict(max_new_tokens=12, device="cpu")
BERT = dict(
    vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
)


@pytest.fixture
def folder(tmp_path):
    """A saved tiny GPT-2."""
    return Path(tiny.save(tiny.language_model("gpt2"), tmp_path / "model"))


def refuse(says, folder=None, **changes):
    """`gym.make` refuses the reference in these words."""
    with pytest.raises(ValueError, match=says):
        gym.make("TextGen-v0", **SETTINGS | dict(reference=folder and str(folder)) | changes)


def edit(folder, **fields):
    """Change fields of the saved configuration; None removes one."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_bidirectional_models(tmp_path):
    """A BERT without is_decoder sees later tokens; with it, it is an ordinary causal model."""
    torch.manual_seed(0)
    for decoder in (False, True):
        model = BertLMHeadModel(BertConfig(**BERT, is_decoder=decoder, eos_token_id=tiny.END)).eval()
        saved = tiny.save(model, tmp_path / str(decoder))
        if decoder:
            gym.make("TextGen-v0", **SETTINGS, reference=saved).reset(seed=0)
        else:
            refuse(r"the reference is a BertLMHeadModel \(bert\): its logits at a token change .* is_decoder", saved)


def test_encoder_decoders(tmp_path):
    """An encoder-decoder has no causal language model inside."""
    config = T5Config(vocab_size=tiny.VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    saved = tiny.save(T5ForConditionalGeneration(config), tmp_path / "t5")
    refuse("is an encoder-decoder model .t5.*decoder-only", saved)


def test_reward_models(tmp_path):
    """A classifier whose embeddings are tied lacks no weight of a language model, and would write nonsense."""
    saved = tiny.save(GPT2ForSequenceClassification(GPT2Config(**tiny.GPT2, num_labels=1)), tmp_path / "reward")
    refuse("is a GPT2ForSequenceClassification, such as a reward model, and writes no text", saved)
    with pytest.raises(ValueError, match="such as a reward model"):
        load_trainable_lm(saved)


def test_frequencies_that_depend_on_the_length():
    """Long rotary factors hold for the whole text once it is long: refused across the limit, right below it."""
    factors = dict(short_factor=[1.0] * 4, long_factor=[3.0] * 4, rope_type="longrope", rope_theta=10000.0)
    model = families.build(
        "phi3",
        rope_parameters=factors | dict(original_max_position_embeddings=20),
        original_max_position_embeddings=20,
        sliding_window=None,
    )
    lm = shared(LanguageModel(model, tiny.tokenizer(), (tiny.END,)))
    refuse(r"switches its rotary frequencies after 20 tokens.*Lower max_prompt_tokens", reference=lm)
    gym.make("TextGen-v0", **SETTINGS | dict(reference=lm, max_new_tokens=4)).reset(seed=0)


def test_noise_in_eval_mode():
    """A model that draws noise in every mode has no log-probabilities."""
    model = tiny.language_model("llama")
    model.model.norm.register_forward_hook(lambda module, arguments, output: output + 0.1 * torch.randn_like(output))
    with pytest.raises(ValueError, match=r"the actor is a LlamaForCausalLM \(llama\): "):
        check_causal(model, "actor", 20)


def test_logits_that_are_not_finite(folder):
    """Weights of NaN are refused at once."""
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refuse(r"GPT2LMHeadModel \(gpt2\): its logits are not finite in torch.float32", folder)


@pytest.mark.parametrize("rows", [1, 3])
def test_hidden_states_that_are_not_finite(rows):
    """A critic's backbone that gives NaN is refused, be it for a whole batch or for a text alone."""
    backbone = tiny.language_model("llama").base_model
    check_backbone(backbone, "critic", 20, tiny.VOCABULARY)
    spoil = lambda _, inputs, output: output * torch.nan if len(output) == rows else output  # noqa: E731
    backbone.norm.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"the critic is a LlamaModel \(llama\): its hidden states are not finite in"):
        check_backbone(backbone, "critic", 20, tiny.VOCABULARY)


def test_distances_are_never_nan():
    """NaN, in either, is an infinite distance, which no bound admits."""
    good, bad = torch.ones(2, 3), torch.tensor([[1.0, 1.0, torch.nan], [1.0, 1.0, 1.0]])
    for measure in (largest_difference, relative_difference):
        assert measure(good, bad) == measure(bad, good) == torch.inf and measure(good, good) == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_full_memory_says_nothing_about_a_model(folder, error, monkeypatch):
    """It is no slow model and no broken file: the error stays what it is, in the comparison, the check and loading."""
    model = tiny.language_model("llama")

    def fail(*_, **__):
        raise error("full")

    def fail_with_cache(_, arguments, keywords):
        if keywords.get("past_key_values") is not None:
            fail()

    hook = model.register_forward_pre_hook(fail_with_cache, with_kwargs=True)
    with pytest.raises(error, match="full"):
        decodes_from_cache(model, 20)
    hook.remove()
    assert decodes_from_cache(model, 20)
    model.base_model.register_forward_pre_hook(fail)
    with pytest.raises(error, match="full"):
        check_causal(model, "actor", 24)
    monkeypatch.setattr(GPT2LMHeadModel, "__init__", fail)
    with pytest.raises(error, match="full"):
        gym.make("TextGen-v0", **SETTINGS, reference=str(folder))


def test_the_check_of_a_long_text_needs_little_memory():
    """Its oracle never forms all logits of a long text: gigabytes where the vocabulary is large."""
    model, sizes = families.build("llama", max_position_embeddings=300), []
    model.lm_head.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape[:-1].numel()))
    check_causal(model, "actor", 300)
    assert len(sizes) > 9 and max(sizes) <= WHOLE


@pytest.mark.parametrize("content", [b"", b"half", b'\x08\0\0\0\0\0\0\0{"a": 1', None])
def test_damaged_weights(folder, content):
    """An empty file, half a file, and a file that is no safetensors file."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    refuse("no model could be loaded from .*safetensors", folder)


def test_weights_of_another_shape(folder):
    """The configuration and the weights disagree."""
    edit(folder, n_embd=64)
    refuse("no model could be loaded from .*", folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"model_type": 3}', '{"model_type": "gpt2", "n_embd": "x"}']
)
def test_damaged_configurations(folder, content):
    """Whatever is in config.json, the error is ours."""
    (folder / "config.json").write_text(content)
    refuse("no model configuration in|no model could be loaded", folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}'])
def test_damaged_tokenizers(folder, content):
    """Whatever is in tokenizer.json, the error is ours."""
    (folder / "tokenizer.json").write_text(content)
    refuse("no tokenizer in", folder)


def test_models_that_need_their_own_code(folder):
    """Code in a model's folder is never run."""
    edit(folder, model_type="made_up", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (folder / "code.py").write_text("raise SystemExit('this code ran')\n")
    refuse("no model configuration in", folder)


def test_quantized_weights(folder):
    """Log-probabilities of quantized weights are not those of the copy that is trained."""
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refuse("holds quantized weights.*full precision", folder)


def test_folders_of_adapters(tmp_path):
    """A folder with adapters alone names the way to merge them."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "gpt2"}))
    refuse("holds an adapter .*merge_and_unload", tmp_path)


def test_live_adapters():
    """A live PEFT model would be saved without its base; merged it is welcome."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny.language_model("llama"), config).eval()
    wrap = lambda model: shared(LanguageModel(model, tiny.tokenizer(), (tiny.END,)))  # noqa: E731
    refuse(r"the reference is a \w+ with adapters.*merge_and_unload", reference=wrap(adapted))
    refuse(r"the reference is a \w+ with adapters", reference=wrap(adapted.base_model.model))
    gym.make("TextGen-v0", **SETTINGS | dict(reference=wrap(adapted.merge_and_unload()))).reset(seed=0)


def test_one_line_says_that_decoding_is_slow(caplog):
    """A model that does not decode from the cache says so once, however many decoders it gets."""
    model = families.build("bloom")
    lm = shared(LanguageModel(model, tiny.tokenizer(), (tiny.END,)))
    task = build_task(TextGenConfig(**SETTINGS | dict(reference=lm)))
    for seed in range(2):
        generate(task, model, task.prompts, Sampling(), torch.Generator().manual_seed(seed))
    assert len([record for record in caplog.records if "reads its whole text again" in record.message]) <= 1


def test_a_trained_copy_draws_no_noise():
    """Router noise, layer drop and dropout act in train mode alone; a trained copy stays in eval mode."""
    from agents.text.networks import make_actor

    model = families.build("phimoe", router_jitter_noise=0.4, attention_dropout=0.3)
    assert isinstance(model, PhimoeForCausalLM)
    task = build_task(TextGenConfig(**SETTINGS | dict(reference=shared(LanguageModel(model, tiny.tokenizer(), (1,))))))
    actor = make_actor(task)
    ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    first, second = (actor.model(input_ids=ids).logits for _ in range(2))
    assert torch.equal(first, second) and first.requires_grad
    noisy = [actor.model.train()(input_ids=ids).logits for _ in range(2)]
    assert not torch.equal(*noisy)  # what would reach the ratios
