"""Parse the answers of other models: text, reasoning, usage, and anything unusual."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from core.final_answers import split_thinking

# Exceptions from parsing a body that is not an answer: half an answer, a proxy's error page.
NOT_AN_ANSWER = (ValueError, LookupError, TypeError, AttributeError)

# The date or version that a server appends to a model's name: gpt-4.1-mini-2025-04-14.
VERSION_SUFFIX = re.compile(r"(-latest|-\d{3,}[\d.-]*|@.*)$")


class Answer(NamedTuple):
    """An answer, with the reasoning separated from the text."""

    text: str
    reasoning: str  # "" if there is none
    was_cut: bool  # whether the token limit cut it off


# -- from a server ---------------------------------------------------------------------------------


def parse_completion(body: str, mask: Callable[[str], str] = str) -> dict:
    """What to record of a chat completion; raises one of NOT_AN_ANSWER if `body` is none.

    {"text", "reasoning", "refusal", "tokens_in", "tokens_out", "finish", "model", "usage_missing"};
    all except text and tokens are omitted if they are not informative. A completion with usage is
    charged for, so it is an answer even without a text; then "text" is None. `mask` hides the
    key."""
    completion = json.loads(body)
    if completion.get("error"):
        raise ValueError(mask(str(completion["error"])))
    choices = completion.get("choices")
    if choices:
        choice = choices[0]
        message = choice["message"]
    elif completion.get("usage"):
        choice, message = {}, {}
    else:
        raise ValueError("no choices and no usage")

    text, reasoning = split_content(message.get("content"))
    for name in ("reasoning_content", "reasoning"):
        if not reasoning and isinstance(message.get(name), str):
            reasoning = message[name]
    if text is None and not completion.get("usage") and not reasoning:
        raise ValueError("a message without content")

    answer = {"text": None if text is None else mask(writable(text))}
    if reasoning:
        answer["reasoning"] = mask(writable(reasoning))
    if isinstance(message.get("refusal"), str) and message["refusal"]:
        answer["refusal"] = mask(writable(message["refusal"]))
    answer |= read_usage(completion.get("usage"), has_text=bool(text or reasoning))
    # "stop" is the normal case, and omitted.
    finish = choice.get("finish_reason")
    if isinstance(finish, str) and finish != "stop":
        answer["finish"] = mask(writable(finish))
    if isinstance(completion.get("model"), str):
        answer["model"] = mask(writable(completion["model"]))
    return answer


def split_content(content: Any) -> tuple[str | None, str]:
    """(text, reasoning) of a message's content: a text, or a list of parts of type "text", with
    text, and "thinking", with reasoning."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = []
    thoughts = []
    for part in parts:
        if not isinstance(part, dict):
            continue
        thinking = part.get("thinking", part.get("reasoning"))
        if isinstance(thinking, list):
            thinking, _ = split_content(thinking)
        if isinstance(thinking, str):
            thoughts.append(thinking)
        elif isinstance(part.get("text"), str):
            texts.append(part["text"])
    text = "".join(texts) if texts else None
    return text, "".join(thoughts)


def writable(text: str) -> str:
    """The text without lone surrogates, which cannot be written to a file."""
    return text.encode("utf-8", "replace").decode()


def read_usage(usage: Any, has_text: bool) -> dict:
    """{"tokens_in", "tokens_out"} from a completion's usage; with "usage_missing" if a number is
    missing or impossible, so that its cost is estimated instead."""
    counts = usage if isinstance(usage, Mapping) else {}
    tokens_in = counts.get("prompt_tokens")
    tokens_out = counts.get("completion_tokens")
    # Neither a prompt nor a text can have 0 tokens.
    is_known = is_count(tokens_in, 1) and is_count(tokens_out, 1 if has_text else 0)
    tokens = {
        "tokens_in": tokens_in if is_count(tokens_in, 0) else 0,
        "tokens_out": tokens_out if is_count(tokens_out, 0) else 0,
    }
    return tokens if is_known else tokens | {"usage_missing": True}


def is_count(value: Any, smallest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest


def is_same_model(wanted: str, answering: str) -> bool:
    """Whether the name of the answering model matches the requested one, ignoring organization,
    date or version, and case."""
    return base_name(wanted) == base_name(answering)


def base_name(model: str) -> str:
    name = model.rstrip("/").rpartition("/")[2].lower().partition(":")[0]
    return VERSION_SUFFIX.sub("", name)


# -- recorded answers ------------------------------------------------------------------------------


def read_answer(kept: Mapping) -> Answer | None:
    """The answer in a line of OUT/calls.jsonl; None if it has no text, or a content filter cut it
    off."""
    if kept["text"] is None or kept.get("finish") == "content_filter":
        return None
    thoughts, parts = split_thinking(kept["text"])
    text = "".join(parts).strip() if thoughts else kept["text"]
    if not text.strip():
        return None
    thinking = "\n\n".join(part.strip() for part in thoughts if part.strip())
    reasoning = kept.get("reasoning", "") or thinking
    return Answer(text, reasoning.strip(), was_cut(kept))


def was_cut(kept: Mapping) -> bool:
    return kept.get("finish") in ("length", "max_tokens")


# What different questions use of an answer. The functions return None if it is unusable.


def whole_text(answer: Answer) -> str | None:
    return answer.text


def finished_text(answer: Answer) -> str | None:
    """The text; None if the token limit cut it off."""
    return None if answer.was_cut else answer.text


def finished_lines(answer: Answer) -> str | None:
    """The text, without its last line if the token limit cut it off: a 10 may have become a 1."""
    return answer.text.rpartition("\n")[0] if answer.was_cut else answer.text


def whole_answer(answer: Answer) -> Answer:
    return answer
