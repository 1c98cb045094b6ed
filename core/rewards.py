"""Rewards of completions: verifiers and users' functions in killable processes, and reward models."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Callable, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from core import verifiers
from core.chat import encode_turns, render_turns
from core.config import ModelConfig, Names, Natural, Positive, comma_separated
from core.errors import ConfigError, as_config_error, unknown_name
from core.function_process import Subprocess
from core.llm_client import LLMClientError
from core.runtime import compute_dtype, default_device, logger

REWARDS = {  # built-in verifiers: the function, and the column or option it reads
    "numeric": (f"{verifiers.__file__}:numeric", "answer"),
    "exact": (f"{verifiers.__file__}:exact", "answer"),
    "regex": (f"{verifiers.__file__}:regex", "reward_pattern"),
    "format": (f"{verifiers.__file__}:format", "reward_pattern"),
    "length": (f"{verifiers.__file__}:length", "reward_length"),
}


@dataclass
class ScoringConfig(ModelConfig):
    """Options of rewards."""

    reward: Names = field(
        default_factory=list
    )  # numeric, exact, regex, format, length, or path/to/file.py:function
    reward_weights: Annotated[list[float], comma_separated] = field(
        default_factory=list
    )  # of their sum; none: 1
    reward_model_path: str | None = (
        None  # folder of a sequence classifier, or stage:NAME; added to the sum
    )
    reward_model_type: Literal["regression", "classification"] = (
        "regression"  # its score; or its last label's chance
    )
    reward_pattern: str = ""  # regular expression: `regex` finds it in a completion, `format` wants the whole to match
    reward_length: Natural = (
        0  # words, for `length`: 1 up to so many, falling to 0 at twice as many
    )
    reward_timeout: Positive = 60.0  # seconds that a function may take for a batch
    on_reward_error: Literal["stop", "skip"] = (
        "stop"  # a reward raises or times out: stop, or leave the row out
    )

    rewarding = property(
        lambda self: [*self.reward, *(["reward_model"] if self.reward_model_path else [])]
    )

    def validate(self) -> None:
        super().validate()
        for name in self.reward:
            if name not in REWARDS and not re.fullmatch(r".+\.py:\w+", name):
                raise ConfigError(
                    unknown_name("reward", name, [*REWARDS, "path/to/file.py:function"])
                )
            if (
                name in REWARDS
                and (needs := REWARDS[name][1]) != "answer"
                and not getattr(self, needs)
            ):
                raise ConfigError(f"reward={name} needs {needs}")
        if len({*self.reward}) < len(self.reward):
            raise ConfigError(
                "reward names a function twice; give it another weight by reward_weights"
            )
        read = {REWARDS[name][1] for name in {*self.reward} & {*REWARDS}}
        for name in {"reward_pattern", "reward_length"} - read:
            self.refuse_unread(True, name, f"with reward={','.join(self.reward)}")
        with as_config_error(f"reward_pattern={self.reward_pattern}"):
            re.compile(self.reward_pattern)
        if len(self.reward_weights or self.rewarding) != len(self.rewarding):
            raise ConfigError(f"reward_weights: give one for each of {', '.join(self.rewarding)}")
        self.refuse_unread(
            not self.reward_model_path, "reward_model_type", "without reward_model_path"
        )


def check_reward_model(path: str) -> None:
    """Refuse a folder whose model has no trained head: transformers would make one of random numbers."""
    with as_config_error(f"reward_model_path={path} is not the folder of a model"):
        kind = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))["architectures"]
    if not any(name.endswith("ForSequenceClassification") for name in kind):
        raise ConfigError(
            f"reward_model_path={path} is a {', '.join(kind)}; train one with recipes/reward.py"
        )


def load_reward_model(config: ScoringConfig) -> Callable:
    """function(prompts, completions) -> rewards by the classifier at `reward_model_path`, with its own tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = config.reward_model_path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = (
        AutoModelForSequenceClassification.from_pretrained(
            path, dtype=compute_dtype(config.torch_dtype), use_safetensors=True
        )
        .to(default_device())
        .eval()
    )
    if (config.reward_model_type == "regression") != (model.config.num_labels == 1):
        raise ConfigError(
            f"reward_model_type={config.reward_model_type}: it has {model.config.num_labels} labels"
        )

    def ids(prompt: list[dict], completion: str) -> list[int]:
        if tokenizer.chat_template:
            chat = [*prompt, {"role": "assistant", "content": completion}]
            return encode_turns(tokenizer, render_turns(tokenizer, chat))[0]
        return tokenizer("\n".join(message["content"] for message in prompt), completion).input_ids

    @torch.no_grad()
    def score(prompts: list, completions: list[str], **_) -> list[float]:
        texts = [ids(prompt, completion) for prompt, completion in zip(prompts, completions)]
        if max(map(len, texts)) > model.config.max_position_embeddings:
            raise ValueError(
                f"longer than the reward model's {model.config.max_position_embeddings} tokens"
            )
        # Models score the last token that is not padding: so pad with one that none of the texts has.
        model.config.pad_token_id = min({*range(model.config.vocab_size)} - {*sum(texts, [])})
        batch = [torch.tensor(text, device=model.device) for text in texts]
        padded = pad_sequence(batch, True, model.config.pad_token_id)
        mask = pad_sequence([torch.ones_like(text) for text in batch], True, 0)
        logits = model(input_ids=padded, attention_mask=mask).logits.float()
        return (logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, -1]).tolist()

    return score


def rewards_reading_answers(config: ScoringConfig) -> list[str]:
    """The rewards that read the column answer."""
    return [name for name in config.reward if name in REWARDS and REWARDS[name][1] == "answer"]


def check_answer_column(config: ScoringConfig, columns: dict) -> None:
    """Refuse rows of these columns for a reward that reads an answer, and there is none; raises ConfigError."""
    if (needs := rewards_reading_answers(config)) and "answer" not in columns:
        raise ConfigError(
            f"reward={needs[0]} needs a column answer; found {', '.join(columns) or 'none'}"
        )


def start_reward_functions(config: ScoringConfig) -> dict[str, Callable]:
    """{name: function(prompts, completions, **columns) -> list of numbers or None} of `reward`, and a first look at the
    reward model, which is loaded later; raises ConfigError."""
    if config.reward_model_path and not config.reward_model_path.startswith("stage:"):
        check_reward_model(config.reward_model_path)
    functions: dict[str, Callable] = {}
    for name in config.reward:
        functions[name] = function = Subprocess(
            REWARDS.get(name, (name,))[0], config.reward_timeout
        )
        function.start()
    return functions


@contextlib.contextmanager
def stopping_functions(functions: dict[str, Callable]):
    """After it no process of the functions runs."""
    try:
        yield
    finally:
        for function in functions.values():
            if isinstance(function, Subprocess):
                function.stop()


def score_completions(
    config: ScoringConfig, functions: dict[str, Callable], rows: list[dict], completions: list
) -> torch.Tensor:
    """(B, R): what each function says of each completion; NaN is no verdict. A function that fails is asked row by row
    for the one it fails at; `on_reward_error` decides whether that stops the run."""

    def ask(name: str, some: range) -> list[float]:
        asked, texts = [rows[i]["prompt"] for i in some], [completions[i] for i in some]
        columns = {key: [rows[i]["columns"][key] for i in some] for key in rows[0]["columns"]}
        options = {
            option: getattr(config, option)
            for option in ("reward_pattern", "reward_length")
            if name in REWARDS
        }
        try:
            found = functions[name](asked, texts, **columns | options)
            values = [float("nan") if value is None else float(value) for value in found]
            if float("inf") in map(abs, values):
                raise ValueError("a reward is infinite")
        except LLMClientError:  # what a judge's server says is about no single row
            raise
        except Exception as error:
            if len(some) > 1:
                return [value for i in some for value in ask(name, range(i, i + 1))]
            row = {"completion": texts[0], "prompt": asked[0], **rows[some[0]]["columns"]}
            text = f"reward {name}: {type(error).__name__}: {error}; the row: {json.dumps(row, default=str)}"
            if config.on_reward_error == "stop":
                raise RuntimeError(
                    text + ". Mend the reward, or leave such rows out: on_reward_error=skip"
                ) from error
            logger.warning("%s is left out", text)
            return [float("nan")]
        if not isinstance(found, list) or len(found) != len(some):
            raise RuntimeError(
                f"reward {name} has to return {len(some)} numbers or None, a list: {str(found)[:80]}"
            )
        return values

    return torch.tensor([ask(name, range(len(rows))) for name in functions]).T


def weighted_total(config: ScoringConfig, each: torch.Tensor) -> torch.Tensor:
    """(B,): the weighted sum of the rewards (B, R); NaN where one of them has no verdict."""
    return each @ torch.tensor(config.reward_weights or [1.0] * each.shape[1])
