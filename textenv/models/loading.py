"""Loads models, tokenizers and functions by name; every error states the remedy.

Loads weights from safetensors only, and never runs code from a model's folder. Frozen models are shared: a second
environment on the same folder costs no memory.
"""

from __future__ import annotations

import importlib
import os
import weakref
from collections.abc import Callable, Collection
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging


class Shared:
    """A handle that carries a live object through `gym.make` without a copy."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __copy__(self) -> Shared:
        return self

    def __deepcopy__(self, memo: dict) -> Shared:
        return self

    def __repr__(self) -> str:
        return f"shared({type(self.value).__name__})"


def unwrap(value: Any) -> Any:
    """The object in a `shared` handle; any other value unchanged."""
    return value.value if isinstance(value, Shared) else value


def load_function(name: str) -> Callable:
    """Import the callable named `"module:function"`. Raises ValueError if there is none."""
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a module may raise anything while it is imported
        reason = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{name!r} names no importable function ({reason}); write 'module:function', with the module "
            "on the Python path or in the working directory."
        ) from error
    if not callable(function):
        raise ValueError(f"{name!r} must name a function, got {type(function).__name__}.")
    return function


_frozen: weakref.WeakValueDictionary[tuple, PreTrainedModel] = weakref.WeakValueDictionary()


def load_frozen(auto_class: type, name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Like `load_model`, for a model that is not trained: loaded once per process, in eval mode, without gradients."""
    key = (auto_class, name, _stamp(name), device, dtype)
    model = _frozen.get(key)
    if model is None:
        model = load_model(auto_class, name, device, dtype).eval().requires_grad_(False)
        _frozen[key] = model
    return model


def load_model(auto_class: type, name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model from a folder or hub name."""
    model, report = load_weights(auto_class, name, load_config(name), dtype)
    refuse_random(name, model, report["missing_keys"])
    return model.to(device)  # type: ignore[arg-type]


def load_weights(
    auto_class: type, name: str, config: transformers.PretrainedConfig, dtype: torch.dtype, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model from safetensors weights. Returns it with Transformers' report of missing weights.

    options: further arguments of `from_pretrained`. Raises ValueError for pickles, and for a model that needs code from
    its folder.
    """
    with quietly():
        try:
            model, report = auto_class.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # from a damaged file anything may come, of several libraries
            raise ValueError(
                f"no model could be loaded from {name!r}: {_reason(name, error)} Give a folder or hub name that "
                "holds config.json and safetensors weights (pickles are refused: re-save with "
                "save_pretrained, which writes safetensors)."
            ) from error
    refuse_adapters(repr(name), model)
    return model, report


def refuse_adapters(subject: str, model: Any) -> None:
    """Raise ValueError for a model with adapters beside its weights, which would be trained and saved in part."""
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{subject} is a {type(model).__name__} with adapters beside its weights; call merge_and_unload() on the "
            "PEFT model, and use (or save) what it returns."
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{subject} must be a Transformers model (PreTrainedModel), got {type(model).__name__}.")


def refuse_random(name: str, model: PreTrainedModel, missing: Collection[str]) -> None:
    """Raise ValueError if weights would be random; missing: names of the weights that the checkpoint lacks."""
    if missing:
        raise ValueError(
            f"{name!r} holds no weights for {', '.join(sorted(missing)[:3])} of a "
            f"{type(model).__name__}: they would be random. Use a model that was trained as one."
        )


def load_causal_lm(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a frozen causal language model. Raises ValueError for a model that was trained as another kind."""
    _refuse_other_kinds(name, load_config(name))
    return load_frozen(AutoModelForCausalLM, name, device, dtype)


def load_trainable_lm(name: str) -> PreTrainedModel:
    """Load a causal language model to be trained: float32, in eval mode, with every dropout 0."""
    config = load_config(name)
    _refuse_other_kinds(name, config)
    switch_off_dropout(config)
    model, report = load_weights(AutoModelForCausalLM, name, config, torch.float32)
    refuse_random(name, model, report["missing_keys"])
    return model.eval()


def _refuse_other_kinds(name: str, config: transformers.PretrainedConfig) -> None:
    """Raise ValueError for what is no causal language model. A classifier of tied embeddings would load as one."""
    kinds = config.architectures or []
    if kinds and all("Classification" in kind or "QuestionAnswering" in kind for kind in kinds):
        raise ValueError(
            f"{name!r} is a {' and '.join(kinds)}, such as a reward model, and writes no text; give a causal language "
            "model, such as the one that it was trained from."
        )
    if config.is_encoder_decoder:
        raise ValueError(
            f"{name!r} is an encoder-decoder model ({config.model_type}): its decoder alone is no language model. "
            "Give a decoder-only model, such as GPT-2 or Llama."
        )


def load_classifier(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a frozen sequence-classification model. Raises ValueError if the folder has no trained head."""
    config = load_config(name)
    heads = [architecture for architecture in config.architectures or [] if "SequenceClassification" in architecture]
    if not heads:
        raise ValueError(
            f"{name!r} is not a sequence-classification model (its architectures are {config.architectures}): its "
            "head would be random. Train one with `python -m agents reward-model`."
        )
    return load_frozen(AutoModelForSequenceClassification, name, device, dtype)


def load_config(name: str) -> transformers.PretrainedConfig:
    """Load a model's configuration from a folder or hub name."""
    _refuse_run(name)
    _refuse_adapter_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # from a damaged file anything may come
        raise ValueError(
            f"no model configuration in {name!r}: {_reason(name, error)} Give a folder with a config.json, or a "
            "hub name that can be reached."
        ) from error
    kinds = config.architectures
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ValueError(
            f"the config.json of {name!r} is damaged: its architectures must be a list of names, got {kinds!r}. Save "
            "it again with save_pretrained."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{name!r} holds quantized weights, whose log-probabilities differ from those of the trained copy; give "
            "the model in full precision (float32, bfloat16 or float16)."
        )
    return config


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer from a folder or hub name."""
    _refuse_run(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer("")  # a setting of the wrong type, such as model_max_length, shows only in use
        return tokenizer
    except Exception as error:  # from a damaged file anything may come
        raise ValueError(
            f"no tokenizer in {name!r}: {_reason(name, error)} Save one beside the model with "
            "tokenizer.save_pretrained."
        ) from error


def load_stop_token_ids(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a model's responses: those of the generation config, the model config or the tokenizer."""
    return first_ids(_generation_eos(name), load_config(name).get_text_config().eos_token_id, tokenizer.eos_token_id)


def first_ids(*sources: Any) -> tuple[int, ...]:
    """The token ids of the first source that is not None: an id or several. Raises ValueError for what is no id."""
    ids = next((source for source in sources if source is not None), ())
    several = ids if isinstance(ids, list | tuple) else (ids,)
    if not all(type(each) is int and each >= 0 for each in several):
        raise ValueError(
            f"eos_token_id must be a token id or a list of them, whole numbers from 0 on, got {ids!r}; set it in the "
            "model's generation_config.json, or in its config.json."
        )
    return tuple(several)


def _generation_eos(name: str) -> Any:
    try:
        return GenerationConfig.from_pretrained(name).eos_token_id
    except Exception as error:  # from a damaged file anything may come
        if isinstance(error, OSError) and not os.path.isfile(os.path.join(name, "generation_config.json")):
            return None  # the model has none
        raise ValueError(
            f"the generation_config.json of {name!r} cannot be read ({error}); repair it, or save it again."
        ) from error


def check_room(role: str, model_config: Any, length: int) -> None:
    """Raise ValueError if a model cannot attend to `length` tokens, a whole prompt and response; role: its name."""
    text_config = model_config.get_text_config()
    room = getattr(text_config, "max_position_embeddings", None)
    if room is not None and 0 < room < length:  # XLNet says -1 for any length
        raise ValueError(
            f"max_prompt_tokens + max_new_tokens = {length}, more than the {role}'s {room} positions; lower one "
            "of them."
        )


def switch_off_dropout(config: Any) -> None:
    """Set every dropout of a model's configuration to 0, in place."""
    for field, value in config.to_dict().items():
        if isinstance(value, float) and "drop" in field:
            setattr(config, field, 0.0)


def _refuse_run(name: str) -> None:
    """Refuse the folder of a training run; its model is in the subfolder `actor`."""
    config, actor = Path(name, "config.json"), Path(name, "actor")
    if not os.path.isfile(actor / "config.json"):  # Path.is_file raises OSError for a name that is too long
        return
    if os.path.isfile(config) and b'"model_type"' in config.read_bytes():
        return
    raise ValueError(f"{name!r} is the folder of a run, not of a model; did you mean {str(actor)!r}?")


def _refuse_adapter_folder(name: str) -> None:
    if os.path.isfile(Path(name, "adapter_config.json")):
        raise ValueError(
            f"{name!r} holds an adapter (adapter_config.json), not a whole model. Merge it: "
            f"peft.PeftModel.from_pretrained(base, {name!r}).merge_and_unload().save_pretrained(folder), and give that "
            "folder."
        )


def _stamp(name: str) -> tuple:
    """Changes when the weights of a local folder change, so that a retrained model is loaded again."""
    folder = Path(name)
    return tuple(sorted((file.name, file.stat().st_mtime_ns) for file in folder.glob("*.safetensors")))


def _reason(name: str, error: Exception) -> str:
    """Why a name could not be loaded, as a sentence. Transformers mistakes a missing folder for a hub name."""
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not os.path.isdir(name):
        return "there is no such folder."
    lines = str(error).strip().splitlines() or [""]
    # Hugging Face's strict configurations name the field in the first line, and what is wrong with it in the next.
    line = " ".join(each.strip().rstrip(".") for each in lines[: 2 if lines[0].rstrip(".").endswith(":") else 1])
    return f"{line}."


@contextmanager
def quietly():
    """Hide Transformers' progress bars, for models that load or save in a moment."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


@contextmanager
def without_report():
    """Hide Transformers' table of missing weights, for callers that expect some and check the rest."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
