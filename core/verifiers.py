"""Verifiers: functions that compare a completion with an expected answer or pattern. Called in a process of their own."""

from __future__ import annotations

import re
from decimal import Decimal

NUMBER = re.compile(r"[-+\s\\$€£]*[\d,]*\.?\d+%?")
NOT_A_NUMBER = re.compile(
    r"\d:\d|\d-\d+-\d|(?<![\\\w])[^\W\d_]\d"
)  # a time, a date, a code: texts with numbers in them


def may_be_number(answer: str) -> bool:
    """Whether an expected answer can be a number or a formula, and is no text that has numbers in it."""
    return bool(re.search(r"[\d\\]", answer)) and not NOT_A_NUMBER.search(answer)


def parse_formula(text: str, alone: bool = True) -> list:
    """What math-verify makes of a number or formula, or of the last one in a sentence; empty without one. It looks for
    formulas between dollars, and of one without them takes the last number: so they are put around what has no words
    and is `alone`, or is LaTeX."""
    from math_verify import parse

    text = re.sub(r"^[\s*`_]+|[\s*`_]+$", "", text).removesuffix(".")  # marks of emphasis
    text = (
        f"{Decimal(text):f}" if re.fullmatch(r"[-+]?\d+(\.\d+)?[eE][-+]?\d{1,3}", text) else text
    )  # 1e6
    text = re.sub(r"(?<![\w.])(-?)(\d+) (\d+/\d+)$", r"$\1(\2+\3)$", text)  # 3 1/2
    if NUMBER.fullmatch(text):
        return parse(re.sub(r"[\s\\$€£]", "", text), parsing_timeout=None)
    sentence = re.search(r"\$|\\boxed|\\[\[(]|: |(?<!\\)\b[^\W\d_]{2,}", text)
    if not sentence and NOT_A_NUMBER.search(text):
        return []
    return parse(
        f"${text}$" if not sentence and (alone or "\\" in text) else text, parsing_timeout=None
    )


def numeric(prompts: list, completions: list[str], answer: list, **_) -> list[float]:
    """1.0 where the final answer of a completion equals the number or formula `answer` (of "... #### 72" what follows
    the hashes), else 0.0. To be called by `Subprocess`: some formulas take for ever."""
    from math_verify import verify

    def equal(text: str, gold: str) -> float:
        gold = gold.split("####")[-1].strip()
        if not may_be_number(gold) or not (wanted := parse_formula(gold)):
            raise ValueError(f"the answer {gold!r} is not a number or formula")
        found = parse_formula(text.rpartition("####")[2], alone=not NUMBER.fullmatch(gold))
        return float(verify(wanted, found, timeout_seconds=None))

    return [equal(text, str(gold)) for text, gold in zip(completions, answer)]


def exact(prompts: list, completions: list[str], answer: list, **_) -> list[float]:
    """1.0 where a completion is `answer`, but for white space around it, else 0.0."""
    return [float(text.strip() == str(gold).strip()) for text, gold in zip(completions, answer)]


def regex(prompts: list, completions: list[str], reward_pattern: str, **_) -> list[float]:
    """1.0 where the pattern is found."""
    return [float(bool(re.search(reward_pattern, text, re.DOTALL))) for text in completions]


def format(prompts: list, completions: list[str], reward_pattern: str, **_) -> list[float]:
    """1.0 where the whole completion has the form of the pattern."""
    return [
        float(bool(re.fullmatch(reward_pattern, text.strip(), re.DOTALL))) for text in completions
    ]


def length(prompts: list, completions: list[str], reward_length: int, **_) -> list[float]:
    """1.0 up to so many words, falling to 0.0 at twice as many."""
    return [min(1.0, max(0.0, 2 - len(text.split()) / reward_length)) for text in completions]
