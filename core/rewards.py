"""Rewards of completions: verifiers and user functions in killable processes, and reward models.

Shapes: B completions, R rewards for each.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from core import verifiers
from core.chat import encode_conversation
from core.config import ModelConfig, Names, Natural, Positive, comma_separated
from core.errors import ConfigError, RowError, as_config_error, unknown_name
from core.function_process import ANSWER_SECONDS, AnswerChecker, Subprocess
from core.llm_client import LLMClientError
from core.model_config import context_length
from core.recipe_files import is_link
from core.reward_calls import RewardCall, to_plain
from core.runtime import compute_dtype, default_device, logger

REWARDS = {  # built-in verifiers: the function, and the column or option it reads
    "numeric": (f"{verifiers.__file__}:numeric", "answer"),
    "exact": (f"{verifiers.__file__}:exact", "answer"),
    "regex": (f"{verifiers.__file__}:regex", "reward_pattern"),
    "format": (f"{verifiers.__file__}:format", "reward_pattern"),
    "length": (f"{verifiers.__file__}:length", "reward_length"),
}
Weights = Annotated[list[float], comma_separated]
REWARD_OPTIONS = ("reward_pattern", "reward_length")
# Not 0: a row without a verdict is excluded from averages and updates.
NO_VERDICT = float("nan")
UNSCORED_STEPS = 3  # a run stops after this many consecutive steps without any verdict


# -- options ---------------------------------------------------------------------------------------


@dataclass
class ScoringConfig(ModelConfig):
    """Options of rewards."""

    # rewards
    reward: Names = field(
        default_factory=list,  # numeric, exact, regex, format, length, or path/to/file.py:function
    )
    reward_weights: Weights = field(default_factory=list)  # weights of the sum; empty: 1 each
    reward_model_path: str | None = None  # folder of a sequence classifier, or stage:NAME
    # use its score, or the probability of its last label
    reward_model_type: Literal["regression", "classification"] = "regression"
    reward_pattern: str = ""  # regular expression that `regex` searches and `format` matches fully
    reward_length: Natural = 0  # words, for `length`: 1 up to here, falling to 0 at twice as many
    reward_timeout: Positive = 60.0  # seconds that a reward function may take for a batch
    on_reward_error: Literal["stop", "skip"] = "stop"  # if a reward fails: stop, or skip the row

    @property
    def rewarding(self) -> list[str]:
        """The names of all rewards, in the order of their columns."""
        names = list(self.reward)
        if self.reward_model_path:
            names.append("reward_model")
        return names

    def validate(self) -> None:
        super().validate()
        for name in self.reward:
            self.validate_reward(name)
        if len(set(self.reward)) < len(self.reward):
            raise ConfigError(
                "reward names a function twice; change its weight with reward_weights"
            )

        # Note options that no chosen reward reads, rather than ignoring them silently.
        options_read = {REWARDS[name][1] for name in self.reward if name in REWARDS}
        for option in REWARD_OPTIONS:
            is_unread = option not in options_read
            self.note_unread(is_unread, option, f"with reward={','.join(self.reward)}")
        with as_config_error(f"reward_pattern={self.reward_pattern}"):
            re.compile(self.reward_pattern)

        if self.reward_weights and len(self.reward_weights) != len(self.rewarding):
            raise ConfigError(f"reward_weights: give one for each of {', '.join(self.rewarding)}")
        self.note_unread(
            not self.reward_model_path, "reward_model_type", "without reward_model_path"
        )

    def validate_reward(self, name: str) -> None:
        """Check one name in `reward`, and that the option it reads is set."""
        if name not in REWARDS:
            if not re.fullmatch(r".+\.py:\w+", name):
                valid = [*REWARDS, "path/to/file.py:function"]
                raise ConfigError(unknown_name("reward", name, valid))
            return
        _, needs = REWARDS[name]
        if needs in REWARD_OPTIONS and not getattr(self, needs):
            raise ConfigError(f"reward={name} needs {needs}")


def rewards_reading_answers(config: ScoringConfig) -> list[str]:
    """Names of the rewards that read the column answer."""
    return [name for name in config.reward if name in REWARDS and REWARDS[name][1] == "answer"]


def check_answer_column(config: ScoringConfig, columns: dict) -> None:
    """Raise ConfigError if a reward reads the column answer and there is none."""
    names = rewards_reading_answers(config)
    if names and "answer" not in columns:
        known_columns = ", ".join(columns) or "none"
        raise ConfigError(f"reward={names[0]} needs a column answer; found {known_columns}")


# -- reward models ---------------------------------------------------------------------------------


def check_reward_model(path: str) -> None:
    """Raise ConfigError if the model at `path` has no trained head: transformers would create a
    random one."""
    with as_config_error(f"reward_model_path={path} is not the folder of a model"):
        # Only the configuration: weights are read when they are needed.
        text = Path(path, "config.json").read_text(encoding="utf-8")
        architectures = json.loads(text)["architectures"]
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        names = ", ".join(architectures)
        raise ConfigError(
            f"reward_model_path={path} is a {names}, not a reward model; train one "
            "with recipes/reward.py"
        )


def check_reward_prompts(config: ScoringConfig, prompts: Sequence[list[dict]]) -> None:
    """Raise ConfigError if the reward model's chat template cannot take one of the prompts."""
    if config.reward_model_path and config.on_reward_error == "stop":
        remedy = "change it, or leave such rows out with on_reward_error=skip"
        check_model_takes_prompts("reward_model_path", config.reward_model_path, prompts, remedy)


def check_model_takes_prompts(
    option: str, path: str, prompts: Sequence[list[dict]], remedy: str = "change it"
) -> None:
    """Raise ConfigError if the chat template of the reward model at `path`, the value of `option`,
    cannot take one of the prompts."""
    from transformers import AutoTokenizer

    if is_link(path) or not Path(path, "tokenizer_config.json").exists():
        return  # reported when the model is loaded
    tokenizer = AutoTokenizer.from_pretrained(path)
    # Templates depend on roles, so one prompt per sequence of roles is enough.
    by_roles = {tuple(message["role"] for message in prompt): prompt for prompt in prompts}
    for prompt in by_roles.values():
        try:
            encode_answer(tokenizer, prompt, "an answer")
        except RowError as error:
            raise ConfigError(f"{option}={path}: there is a prompt {error}; {remedy}") from error


def load_reward_model(config: ScoringConfig) -> Callable:
    """Load the classifier at `reward_model_path` as function(prompts, completions) -> rewards.

    The reward is its score, or the probability of its last label. Raises ConfigError if
    `reward_model_type` does not suit the model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = config.reward_model_path
    tokenizer = AutoTokenizer.from_pretrained(path)
    dtype = compute_dtype(config.torch_dtype)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=dtype, use_safetensors=True
    )
    model = model.to(default_device()).eval()
    num_labels = model.config.num_labels
    is_regression = config.reward_model_type == "regression"
    # A single label is an unbounded score, several are classes: the softmax of one is always 1.
    if is_regression != (num_labels == 1):
        raise ConfigError(
            f"reward_model_type={config.reward_model_type} does not fit {path}: it has "
            f"{num_labels} labels; regression is for one, classification for several"
        )

    @torch.no_grad()
    def score(prompts: list, completions: list[str], **_) -> list[float]:
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            rows.append(encode_answer(tokenizer, prompt, completion))
        max_length = context_length(model.config)
        if max(map(len, rows)) > max_length:
            raise ValueError(f"longer than the reward model's {max_length} tokens")

        # The score is taken at the last token that is not padding, so use a padding token that no
        # text contains.
        used_tokens = set().union(*rows)
        model.config.pad_token_id = min(set(range(model.config.vocab_size)) - used_tokens)
        tensors = [torch.tensor(row, device=model.device) for row in rows]
        masks = [torch.ones_like(tensor) for tensor in tensors]
        output = model(
            input_ids=pad_sequence(tensors, True, model.config.pad_token_id),  # (B, T)
            attention_mask=pad_sequence(masks, True, 0),
        )
        logits = output.logits.float()  # (B, labels)
        scores = logits[:, 0] if is_regression else logits.softmax(-1)[:, -1]
        return scores.tolist()

    return score


def encode_answer(tokenizer, prompt: list[dict], completion: str) -> list[int]:
    """Token ids of a conversation, with the reward model's chat template if it has one."""
    if tokenizer.chat_template:
        messages = [*prompt, {"role": "assistant", "content": completion}]
        ids, _ = encode_conversation(tokenizer, messages, start=len(prompt))[-1]
        return ids
    prompt_text = "\n".join(message["content"] for message in prompt)
    return tokenizer(prompt_text, completion).input_ids


# -- scoring ---------------------------------------------------------------------------------------


def start_reward_functions(config: ScoringConfig) -> dict[str, Callable]:
    """Start {name: function(prompts, completions, **columns) -> list of numbers or None}, one for
    each name in `reward`.

    Also checks the folder of the reward model, which is loaded later. Raises ConfigError."""
    if config.reward_model_path and not is_link(config.reward_model_path):
        check_reward_model(config.reward_model_path)
    functions: dict[str, Callable] = {}
    # A file that cannot be loaded is reported now, before a model is loaded.
    for name in config.reward:
        spec = REWARDS[name][0] if name in REWARDS else name
        function = Subprocess(spec, config.reward_timeout)
        if name == "numeric":
            function = AnswerChecker(spec, min(ANSWER_SECONDS, config.reward_timeout))
        function.start()
        functions[name] = function
    return functions


def check_reward_arguments(
    config: ScoringConfig, functions: dict[str, Callable], row: dict, *further: str
) -> None:
    """Raise ConfigError if a function has a parameter that is neither a column of the row nor one
    of the `further` names."""
    columns = row["columns"] | {name: [] for name in further}
    for name, function in functions.items():
        if name in REWARDS or not isinstance(function, Subprocess):
            continue
        missing = function.missing_arguments(row["prompt"], columns)
        if missing:
            known = ", ".join(["prompts", "completions", *columns])
            function.stop()
            raise ConfigError(
                f"reward={name} needs {', '.join(missing)}, but the data has no such column; "
                f"it can take {known}"
            )


@contextlib.contextmanager
def stopping_functions(functions: dict[str, Callable]) -> Iterator[None]:
    """Stop the functions' processes after the block."""
    try:
        yield
    finally:
        for name, function in functions.items():
            if isinstance(function, Subprocess):
                function.stop()
            num_slow = getattr(function, "num_slow", 0)
            if num_slow:
                logger.warning("%s: %d answers without a verdict in time", name, num_slow)


def score_completions(
    config: ScoringConfig,
    functions: dict[str, Callable],
    rows: list[dict],
    completions: list[str],
    token_ids: Sequence[list[int]] | None = None,
) -> torch.Tensor:
    """The rewards (B, R) by all functions; NaN where there is no verdict.

    A row is {"prompt", "columns"}; there is one for each completion. `token_ids` of the completions
    are passed to functions that read them. Raises RuntimeError if a function fails, unless
    `on_reward_error` is skip: then the rows at which it fails have no verdict."""
    extras = [{}] * len(rows)
    if token_ids is not None:
        extras = [{"completion_ids": list(ids)} for ids in token_ids]
    rows = [
        row | {"columns": row["columns"] | extra} for row, extra in zip(rows, extras, strict=True)
    ]
    columns = []
    for name, function in functions.items():
        columns.append(call_reward(config, name, function, rows, completions))
    return torch.tensor(columns).T


def call_reward(
    config: ScoringConfig, name: str, function: Callable, rows: list[dict], completions: list[str]
) -> list[float]:
    """The rewards by one function. If it fails, call it row by row to find the row at fault."""
    try:
        verdicts = call_function(config, name, function, rows, completions)
        check_verdicts(name, verdicts, len(rows))
        return to_rewards(verdicts)
    # The judge can no longer be queried, or the function is wrong: no single row is at fault.
    except (LLMClientError, WrongReturn):
        raise
    except Exception as error:
        if len(rows) == 1:
            handle_reward_error(config, name, error, rows[0], completions[0])
            return [NO_VERDICT]
    rewards = []
    for row, completion in zip(rows, completions, strict=True):
        rewards += call_reward(config, name, function, [row], [completion])
    return rewards


def call_function(
    config: ScoringConfig, name: str, function: Callable, rows: list[dict], completions: list[str]
) -> Any:
    """What a function returns for the rows, with arrays and tensors as lists."""
    prompts = [row["prompt"] for row in rows]
    if name == "numeric":
        texts = []
        for row, completion in zip(rows, completions, strict=True):
            texts.append(with_opened_thinking(row, completion))
        answers = [row["columns"]["answer"] for row in rows]
        return function(prompts, texts, answer=answers)

    columns: dict[str, Any] = {}
    for column in rows[0]["columns"]:
        columns[column] = [row["columns"][column] for row in rows]
    if name in REWARDS:
        columns |= {option: getattr(config, option) for option in REWARD_OPTIONS}
    if isinstance(function, Subprocess):
        return function(prompts, completions, **columns)
    return to_plain(RewardCall(function)(prompts, completions, columns))


def with_opened_thinking(row: dict, completion: str) -> str:
    """The completion, preceded by <think> if the chat template wrote that in the prompt."""
    return f"<think>{completion}" if row.get("opens_thinking") else completion


class WrongReturn(RuntimeError):
    """A reward function did not return a number or None for each completion."""


def check_verdicts(name: str, verdicts: Any, count: int) -> None:
    """Raise WrongReturn if `verdicts` is not a list of `count` numbers or None."""
    returned = ""
    if not isinstance(verdicts, list):
        returned = str(verdicts)[:80]
    elif len(verdicts) != count:
        returned = f"a list of {len(verdicts)}"
    else:
        for verdict in verdicts:
            if verdict is not None and not isinstance(verdict, int | float):
                returned = f"a list with {str(verdict)[:80]!r}"
                break
    if returned:
        raise WrongReturn(
            f"reward {name} must return a list of {count} numbers or None, not {returned}"
        )


def to_rewards(verdicts: list) -> list[float]:
    """The verdicts as numbers, NO_VERDICT for None; raises ValueError if one is infinite."""
    rewards = [NO_VERDICT if verdict is None else float(verdict) for verdict in verdicts]
    if float("inf") in map(abs, rewards):
        raise ValueError("a reward is infinite")
    return rewards


def handle_reward_error(
    config: ScoringConfig, name: str, error: Exception, row: dict, completion: str
) -> None:
    """Raise RuntimeError with the row at which a reward fails, or log it if `on_reward_error` is
    skip."""
    shown = {"completion": completion, "prompt": row["prompt"], **row["columns"]}
    shown.pop("completion_ids", None)  # redundant
    row_text = json.dumps(shown, default=str)
    message = f"reward {name}: {type(error).__name__}: {error}; the row: {row_text}"
    if config.on_reward_error == "stop":
        raise RuntimeError(
            f"{message}. Fix the reward, or skip such rows with on_reward_error=skip"
        ) from error
    logger.warning("%s is left out", message)


def stop_without_verdicts(
    names: Iterable[str], history: Sequence[Mapping[str, float]], never_scored: bool
) -> None:
    """Raise RuntimeError if no completion of the last steps has a verdict, or if none in a finished
    run had one (`never_scored`). `history` has the metrics of each step."""
    recent = history[-UNSCORED_STEPS:]
    is_unscored = not any("reward" in metrics for metrics in recent)
    if never_scored or (is_unscored and len(recent) == UNSCORED_STEPS):
        raise RuntimeError(
            f"no completion of the last {len(recent)} steps has a verdict of {', '.join(names)}: "
            "there is nothing to learn from. A reward function gives none by returning None or NaN "
            "or, with on_reward_error=skip, by raising an error; with several, each must give one"
        )


def none_for_nan(scores: Sequence[float]) -> list[float | None]:
    """The scores with None where there is no verdict, since JSON has no NaN."""
    return [None if math.isnan(score) else score for score in scores]


def weighted_total(config: ScoringConfig, rewards: torch.Tensor) -> torch.Tensor:
    """The weighted sum (B,) of rewards (B, R); NaN where one of them has no verdict."""
    num_rewards = rewards.shape[1]
    weights = config.reward_weights or [1.0] * num_rewards
    return rewards @ torch.tensor(weights)
