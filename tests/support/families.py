"""A tiny random model of every causal architecture of the installed Transformers that can be built from its config."""

from __future__ import annotations

import warnings

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support import tiny

LIMIT = 3_000_000  # parameters; what stays larger is not built
WINDOW = 8  # of sliding and chunked attention: texts in the tests are longer

_SIZES: dict[str, object] = {
    name: size
    for size, fields in (
        (tiny.VOCABULARY, "vocab_size vocab_size_per_layer_input"),
        (128, "max_position_embeddings n_positions max_seq_len n_ctx"),
        (48, "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dff"),
        (32, "hidden_size n_embd d_model dim embed_dim embedding_size word_embed_proj_dim lru_width"),
        (16, "moe_intermediate_size shared_expert_intermediate_size mamba_d_head"),
        (8, "head_dim v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim d_kv"),
        (
            8,
            "kv_lora_rank q_lora_rank mamba_d_state state_size mamba_chunk_size chunk_size hidden_size_per_layer_input",
        ),
        (WINDOW, "sliding_window window_size attention_chunk_size attention_window_size"),
        (4, "num_hidden_layers n_layer n_layers num_layers decoder_layers"),
        (
            4,
            "num_attention_heads n_head n_heads num_heads decoder_attention_heads mamba_n_heads linear_num_value_heads",
        ),
        (4, "num_experts n_routed_experts num_local_experts qk_rope_head_dim rotary_dim mamba_dt_rank time_step_rank"),
        (2, "encoder_layers encoder_attention_heads num_key_value_heads num_kv_heads n_shared_experts"),
        (2, "num_experts_per_tok linear_num_key_heads"),
        (1, "n_group topk_group first_k_dense_replace max_window_layers mamba_n_groups n_groups"),
        (True, "use_sliding_window is_decoder"),
        (tiny.END, "eos_token_id bos_token_id"),
        (tiny.PAD, "pad_token_id"),
    )
    for name in fields.split()
}
_LATENT = dict(head_dim=4, num_key_value_heads=4, qk_nope_head_dim=4)  # multi-head latent attention
# What the sizes above do not fit.
_CHANGES: dict[str, dict] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "minicpm3", "youtu"), _LATENT),
    # The padding id is the first of the positions, so it must be small.
    **{name: dict(pad_token_id=1) for name in ("camembert", "data2vec-text", "prophetnet", "roberta", "xglm", "xmod")},
    **{name: dict(pad_token_id=1) for name in ("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl")},
    "bamba": dict(attn_layer_indices=[1, 3]),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma3n_text": dict(
        num_kv_shared_layers=0,
        laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "mamba2": dict(num_heads=8, head_dim=8),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "zaya": dict(num_experts_per_tok=1),
}


def names() -> list[str]:
    """The model types that Transformers maps to a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def sizes(name: str) -> dict[str, object]:
    """Small values of the fields that a model type's configuration has."""
    known = CONFIG_MAPPING[name]().to_dict()
    return {field: size for field, size in _SIZES.items() if field in known} | _CHANGES.get(name, {})


def config(name: str, **changes: object) -> PreTrainedConfig:
    """The tiny configuration of a model type. Raises whatever its class raises for sizes that do not fit."""
    if "text_config" in CONFIG_MAPPING[name]().to_dict():
        raise ValueError("a composite configuration, of which the text part has a model type of its own")
    return CONFIG_MAPPING[name](**sizes(name) | changes)


def build(name: str, **changes: object) -> PreTrainedModel:
    """A model in eval mode, whose weights are large enough that positions and masks show in its logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configuration = config(name, **changes)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(configuration).parameters())
        if size > LIMIT:
            raise ValueError(f"{size} parameters")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configuration).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model
