"""A new vocabulary for a tokenizer, learned from texts by byte-level BPE.

    check_tokenizer                      refuses tokenizers that would lose characters
    learn_settings, rebuild_tokenizer    the same tokenizer with another vocabulary
    check_new_tokenizer                  refuses a tokenizer that changes text
    renumber_model                       updates token ids in a model's options

Everything else in the tokenizer stays: normalizer, pre-tokenizer, decoder, post-processor, chat
template, and all added tokens, with new ids. transformers' `train_new_from_iterator` drops added
tokens that are not special, such as <think>, and keeps old ids inside a sequence of
post-processors.

`settings` are the content of a tokenizer.json: {"added_tokens", "pre_tokenizer", "model", ...}.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.chat import text_ids
from core.errors import ConfigError
from core.files import write_json
from core.screen import busy

NUM_BYTES = 256  # the alphabet: no text is unknown
# Generation options that contain token ids in various forms.
LISTS_OF_IDS = ("bad_words_ids", "begin_suppress_tokens", "sequence_bias", "suppress_tokens")


# -- checks before anything is learned -------------------------------------------------------------


def check_tokenizer(tokenizer, vocab_size: int, special_tokens: Sequence[str]) -> None:
    """Raise ConfigError unless `tokenizer` is byte-level BPE, and bytes and added tokens fit into
    the new vocabulary."""
    settings = read_settings(tokenizer, special_tokens) if tokenizer.is_fast else {}
    is_bpe = bool(settings) and settings["model"]["type"] == "BPE"
    # ByteLevel may be one of several pre-tokenizers.
    if not is_bpe or '"ByteLevel"' not in json.dumps(settings["pre_tokenizer"]):
        raise ConfigError(
            "the tokenizer of this model is not byte-level BPE, so a new vocabulary could lack "
            "characters; start from a model whose tokenizer is, such as Llama 3, Qwen or SmolLM"
        )
    num_added = len(settings["added_tokens"])
    smallest = NUM_BYTES + num_added
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab_size={vocab_size} is too small for {NUM_BYTES} bytes and {num_added} added "
            f"tokens; set it to {smallest} or more"
        )


def check_model(model) -> None:
    """Raise ConfigError for a model that uses token ids that would not be renumbered."""
    text_config = model.config.get_text_config().to_dict()
    tables = [name for name, value in text_config.items() if "vocab_size" in name and value]
    tables.remove("vocab_size")
    lists = [name for name in LISTS_OF_IDS if getattr(model.generation_config, name, None)]
    if tables or lists:
        raise ConfigError(
            f"this model has {', '.join(tables + lists)}, so it uses token ids besides its "
            "embeddings and output layer, which are all that is transferred; start from another one"
        )


# -- settings --------------------------------------------------------------------------------------


def read_settings(tokenizer, special_tokens: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a fast tokenizer with further special tokens, which have no ids yet."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    known = {token["content"] for token in settings["added_tokens"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for content in dict.fromkeys(special_tokens):
        if content not in known:
            settings["added_tokens"].append({"content": content, **flags, "special": True})
    return settings


def renumber_post_processor(part: dict[str, Any] | None, ids: dict[str, int]) -> None:
    """Renumber the tokens that the post-processor puts around a text, in place."""
    if part is None:
        return
    for inner in part.get("processors", ()):  # of a sequence
        renumber_post_processor(inner, ids)
    for token in part.get("special_tokens", {}).values():  # of a template
        token["ids"] = [ids[content] for content in token["tokens"]]


# -- learning --------------------------------------------------------------------------------------


@busy("learning the vocabulary")
def learn_settings(
    tokenizer,
    texts: Sequence[str],
    vocab_size: int,
    min_frequency: int,
    special_tokens: Sequence[str],
) -> dict[str, Any]:
    """The settings of `tokenizer` with a vocabulary learned from `texts` and further special
    tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    settings = read_settings(tokenizer, special_tokens)
    learner = Tokenizer(models.BPE())
    learner.normalizer = tokenizer.backend_tokenizer.normalizer
    learner.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[token["content"] for token in settings["added_tokens"]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)

    learned = json.loads(learner.to_str())["model"]
    model = settings["model"]  # its other options stay
    model["vocab"], model["merges"] = learned["vocab"], learned["merges"]
    model["unk_token"] = None  # no byte is unknown
    for token in settings["added_tokens"]:
        token["id"] = model["vocab"][token["content"]]
    renumber_post_processor(settings["post_processor"], model["vocab"])
    return settings


def rebuild_tokenizer(tokenizer, settings: dict[str, Any], model_config):
    """`tokenizer` with other settings, as transformers loads it from a saved folder."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        model_config.save_pretrained(folder)  # the model type decides the tokenizer class
        write_json(folder / "tokenizer.json", settings)
        loaded = AutoTokenizer.from_pretrained(folder)
    loaded.name_or_path = tokenizer.name_or_path
    return loaded


def check_new_tokenizer(old, new, settings: dict[str, Any], texts: Sequence[str]) -> None:
    """Raise ConfigError unless `new` has the tokens in its `settings`, puts the same tokens around
    texts as `old`, and decodes texts at least as faithfully."""
    around_old = old.convert_ids_to_tokens(old("").input_ids)
    around_new = new.convert_ids_to_tokens(new("").input_ids)
    if new.get_vocab() != settings["model"]["vocab"] or around_new != around_old:
        raise ConfigError(
            f"transformers loads the new tokenizer, a {type(new).__name__}, with tokens other than "
            "its own; start from another model"
        )
    for text in texts:
        decoded = new.decode(text_ids(new, text), clean_up_tokenization_spaces=False)
        decoded_old = old.decode(text_ids(old, text), clean_up_tokenization_spaces=False)
        if decoded not in (text, decoded_old):
            raise ConfigError(
                f"the new tokenizer reads {text[:80]!r} as {decoded[:80]!r}; start from another "
                "model"
            )


# -- the ids in the options of a model -------------------------------------------------------------


def new_ids_of(old_ids: Sequence[int], old_tokenizer, new_tokenizer) -> list[int]:
    """The new ids of tokens, without numbers that are not token ids, such as -1. Raises ConfigError
    for a token that no longer exists."""
    vocabulary = new_tokenizer.get_vocab()
    ids = []
    for old_id in old_ids:
        if not 0 <= old_id < len(old_tokenizer):
            continue
        token = old_tokenizer.convert_ids_to_tokens(old_id)
        if token not in vocabulary:
            raise ConfigError(
                f"the model's options name the token {token}, which the new vocabulary lacks; "
                f"keep it: --special_tokens={token}"
            )
        ids.append(vocabulary[token])
    return ids


def renumber_model(model, old_tokenizer, new_tokenizer) -> None:
    """Update eos_token_id, pad_token_id and the like, in the configs of `model` and of generation,
    and the stop tokens, to the new ids of their tokens, in place."""
    stops = getattr(old_tokenizer, "stops_of_the_model", ())
    new_tokenizer.stops_of_the_model = new_ids_of(stops, old_tokenizer, new_tokenizer)
    text_config = model.config.get_text_config()
    changes = []
    for owner in (model.config, text_config, model.generation_config):
        for name, value in owner.to_dict().items():
            if not name.endswith("_token_id") or value is None:
                continue
            old_ids = value if isinstance(value, list) else [value]
            new_ids = new_ids_of(old_ids, old_tokenizer, new_tokenizer)
            single_id = new_ids[0] if new_ids else None
            changes.append((owner, name, new_ids if isinstance(value, list) else single_id))
    # Only now, so that the model is unchanged if a token no longer exists.
    for owner, name, new_value in changes:
        setattr(owner, name, new_value)
    embeddings = model.get_input_embeddings()
    if embeddings.padding_idx is not None:  # the row there gets no gradient
        embeddings.padding_idx = text_config.pad_token_id
