"""A conversation with a model: what has been said, and the next answer piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from core.chat import prompt_ids, stop_tokens
from core.errors import ConfigError, RowError, as_config_error
from core.files import read_jsonl, write_jsonl
from core.model_config import context_length
from core.runtime import logger
from core.sampling import cuda_graph_steps, read_prompts, sample_next_token, uniform_numbers

# Used if neither the user nor the model's generation_config.json sets a value.
SAMPLING_DEFAULTS = {"temperature": 0.7, "top_p": 1.0, "top_k": 0}
NOT_APPLIED = ("repetition_penalty", "min_p", "no_repeat_ngram_size")
INCOMPLETE = "\ufffd"  # at the end of decoded text if a token has only some bytes of a character


def choose_sampling(config: Any, generation_config: Any) -> dict[str, Any]:
    """The sampling options: from `config`, else the model's own, else SAMPLING_DEFAULTS."""
    sampling = {"max_new_tokens": config.max_new_tokens}
    for name, default in SAMPLING_DEFAULTS.items():
        choices = (getattr(config, name), getattr(generation_config, name, None), default)
        sampling[name] = next(value for value in choices if value is not None)
    for name in NOT_APPLIED:
        value = getattr(generation_config, name, None)
        if value not in (None, 0, 1):  # 1 is no penalty
            logger.warning("the model's generation_config: %s=%s is not applied", name, value)
    return sampling


@torch.no_grad()
def stream_tokens(
    model, tokenizer, prompt: list[int], sampling: Mapping[str, Any], seed: int
) -> Iterator[int]:
    """Yield the tokens of an answer as they are chosen. The caller stops at a stop token.

    The loop of `sample_completions` in core/sampling.py for one row; temperature 0 is greedy.
    """
    max_new_tokens = sampling["max_new_tokens"]
    uniforms = uniform_numbers(1, sampling, seed).to(model.device)  # (1, T)
    is_greedy = sampling["temperature"] == 0
    if is_greedy:
        sampling = {**sampling, "temperature": 1.0}

    batch, logits = read_prompts(model, tokenizer, [prompt], 1, max_new_tokens)  # logits (1, V)
    forward_steps = cuda_graph_steps(batch.forward, batch.static_shapes)
    for t in range(max_new_tokens):
        step_uniforms = None if is_greedy else uniforms[:, t]
        tokens, _ = sample_next_token(logits, step_uniforms, sampling)  # (1,)
        yield int(tokens)
        if t + 1 < max_new_tokens:
            batch.tokens.copy_(tokens)
            logits = next(forward_steps)


class Conversation:
    """`messages` has the system prompt, if there is one, then questions and answers in turn."""

    def __init__(
        self,
        name: str,  # of the model, in messages to the user
        model,
        tokenizer,
        sampling: Mapping[str, Any],  # from `choose_sampling`
        seed: int = 0,
        system: str | None = None,
    ):
        self.name = name
        self.model, self.tokenizer = model, tokenizer
        self.sampling = sampling
        self.seed = seed
        self.stop_ids = stop_tokens(tokenizer)
        self.context = context_length(model.config)
        self.start(system)

    def start(self, system: str | None) -> None:
        """Start over with a system prompt, or with that of the chat template if it has one."""
        self.system = system
        self.messages: list[dict] = [{"role": "system", "content": system}] if system else []

    def encode(self, question: str) -> list[int]:
        """Token ids (T,) of the conversation with one more question. Raises ConfigError for what
        the model cannot take."""
        messages = [*self.messages, {"role": "user", "content": question}]
        with as_config_error("the text has bytes that are not UTF-8", UnicodeEncodeError):
            "".join(message["content"] for message in messages).encode()
        try:
            prompt = prompt_ids(self.tokenizer, messages)
        except RowError as error:
            raise ConfigError(f"{self.name} cannot take a conversation {error}") from None
        if len(prompt) >= self.context:
            raise ConfigError(
                f"the conversation has {len(prompt)} tokens, but {self.name} takes {self.context}, "
                "answer included; shorten the question, or start over with /reset"
            )
        return prompt

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer piece by piece; Ctrl-C ends it. Raises ConfigError as `encode` does.

        Afterwards question and answer are in `messages`, and `note` says what is unusual about the
        answer, if anything is."""
        prompt = self.encode(question)
        room = self.context - len(prompt)
        limit = min(room, self.sampling["max_new_tokens"])
        sampling = {**self.sampling, "max_new_tokens": limit}
        self.seed += 1  # else every answer would use the same random numbers

        token_ids: list[int] = []
        text, num_shown = "", 0
        self.note = "the answer was cut off by Ctrl-C"
        try:
            for token in stream_tokens(self.model, self.tokenizer, prompt, sampling, self.seed):
                if token in self.stop_ids:
                    self.note = ""
                    break
                token_ids.append(token)
                text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
                if not text.endswith(INCOMPLETE):
                    yield text[num_shown:]
                    num_shown = len(text)
            else:
                why = "because the context is full" if limit == room else "by max_new_tokens"
                self.note = f"the answer was cut off {why}"
        except KeyboardInterrupt:
            pass
        finally:
            self.keep(question, text)
        yield text[num_shown:]

    def keep(self, question: str, text: str) -> None:
        """Add a question and its answer to `messages`, unless the answer is empty, which neither
        templates nor training accept."""
        if not text.strip():
            self.note = "no answer, so the question is not kept"
            return
        answer: dict[str, Any] = {"role": "assistant", "content": text}
        if self.note:
            answer["train"] = False  # training on it would teach the model to stop there
        self.messages += [{"role": "user", "content": question}, answer]

    def save(self, file_name: str) -> int:
        """Append the conversation to a .jsonl file; returns the number of its row. Raises
        ConfigError."""
        path = Path(file_name).expanduser().resolve()
        if path.suffix != ".jsonl":
            raise ConfigError("give the name of a .jsonl file: /save chats.jsonl")
        if not self.messages or self.messages[-1]["role"] == "system":
            raise ConfigError("the conversation has no answer yet")
        with as_config_error(f"{file_name} cannot be appended to"):
            rows = read_jsonl(path) if path.exists() else []
            rows.append({"messages": self.messages})
            write_jsonl(path, rows)
        return len(rows)
