"""Configuration of models: whether a recipe can train them, context length, stop tokens."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

from core.chat import stop_tokens
from core.config import ModelConfig, TrainingConfig
from core.errors import ConfigError, as_config_error
from core.runtime import logger

# Mamba uses the weights of layers directly, Gemma 3n clips them, and Falcon's linear layers have a
# class of their own.
NOT_QUANTIZED = {"mamba", "falcon_mamba", "falcon", "gemma3n", "gemma3n_text"}


def read_stop_tokens(folder: Path) -> list[int]:
    """The ids of tokens that end generation, from the model's generation_config.json."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return []
    stops = json.loads(file.read_text()).get("eos_token_id")
    if stops is None:
        return []
    return stops if isinstance(stops, list) else [stops]


def check_model_config(
    config: ModelConfig, tokenizer, model_config, may_grow: bool = False
) -> None:
    """Raise ConfigError for a model that no recipe can train. With an adapter or new tokens, its
    embeddings `may_grow` to the size of the tokenizer."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    name, kind = config.model_name_or_path, model_config.model_type
    # For some encoder-decoders, transformers would load only the decoder.
    is_half = type(model_config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    if model_config.is_encoder_decoder or is_half:
        raise ConfigError(
            f"model {name} ({kind}) is an encoder and a decoder; give a decoder-only language model"
        )
    # A model with its own code is not in the mapping. Some encoders are, for use as decoders.
    brings_code = bool(getattr(model_config, "auto_map", None))
    writes_text = type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING
    fills_gaps = type(model_config) in MODEL_FOR_MASKED_LM_MAPPING
    is_encoder = fills_gaps and not getattr(model_config, "is_decoder", False)
    if not brings_code and (is_encoder or not writes_text):
        raise ConfigError(
            f"model {name} ({kind}) cannot be loaded as a causal language "
            "model; give a decoder-only language model"
        )
    if config.quantized and kind in NOT_QUANTIZED:
        raise ConfigError(f"a model of type {kind} cannot be quantized; load it in 16 bits")
    num_embeddings = model_config.get_text_config().vocab_size
    if isinstance(config, TrainingConfig):
        may_grow = may_grow or bool(config.new_tokens or config.new_special_tokens)
    if len(tokenizer) > num_embeddings and not may_grow:
        missing = tokenizer.convert_ids_to_tokens(list(range(num_embeddings, len(tokenizer))))
        raise ConfigError(
            f"model {name} has embeddings for {num_embeddings} tokens, but its tokenizer has "
            f"{len(tokenizer)}; call model.resize_token_embeddings({len(tokenizer)}) and save it, "
            f"or train them: --new_tokens='{','.join(missing[:8])}'"
        )


def set_generation_config(model, tokenizer, name: str) -> None:
    """Make generation stop at the token that ends a turn, and make the config valid: many published
    models have a temperature without do_sample, which could not be saved after training."""
    generation = model.generation_config
    generation.update(eos_token_id=stop_tokens(tokenizer), pad_token_id=tokenizer.pad_token_id)
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
        with as_config_error(f"model {name}: its generation_config cannot be saved"):
            generation.validate(strict=True)
        logger.warning(
            "model %s: its generation_config has sampling options and do_sample=false, which "
            "cannot be saved; do_sample is now true",
            name,
        )


def check_can_score(model_config) -> None:
    """Raise ConfigError for a model that transformers has no sequence classifier for."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if type(model_config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ConfigError(
            f"a model of type {model_config.model_type} cannot be a reward model: transformers "
            "has no version of it that returns a score; start from another model"
        )


def check_attention(config: ModelConfig, skeleton) -> None:
    """Raise ConfigError if the attention implementation in the options is not installed, or not
    supported by this model. `skeleton` is the model on the meta device."""
    if config.attn_implementation is None:
        return
    with as_config_error(f"attn_implementation={config.attn_implementation}"):
        copy.deepcopy(skeleton).set_attn_implementation(config.attn_implementation)


def context_length(model_config) -> int:
    """The number of tokens that a model can take; sys.maxsize if it has no limit."""
    text_config = model_config.get_text_config()
    return getattr(text_config, "max_position_embeddings", None) or sys.maxsize
