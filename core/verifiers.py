"""Verifiers: functions that compare a completion with an expected answer or pattern.

They are called in a separate process (core/function_process.py), because some expressions never
finish."""

from __future__ import annotations

import re
from decimal import Decimal

from core.final_answers import find_final_answer

NUMBER = re.compile(r"[-+\s\\$€£]*[\d,]*\.?\d+%?")
SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d+)?[eE][-+]?\d{1,3}")  # 1e6
MIXED_FRACTION = re.compile(r"(?<![\w.])(-?)(\d+) (\d+/\d+)$")  # 3 1/2
EMPHASIS = re.compile(r"^[\s*`_]+|[\s*`_]+$")  # Markdown emphasis at both ends
CURRENCY = re.compile(r"[\s\\$€£]")
SENTENCE = re.compile(r"\$|\\boxed|\\[\[(]|: |(?<!\\)\b[^\W\d_]{2,}")  # words, or marked formulas
# Texts that contain numbers: a time, a date, a code.
NOT_A_NUMBER = re.compile(r"\d:\d|\d-\d+-\d|(?<![\\\w])[^\W\d_]\d")


def may_be_number(answer: str) -> bool:
    """Whether an expected answer can be a number or a formula, rather than a text that contains
    numbers."""
    has_digit_or_latex = re.search(r"[\d\\]", answer)
    is_text_with_numbers = NOT_A_NUMBER.search(answer)
    return bool(has_digit_or_latex and not is_text_with_numbers)


def parse_formula(text: str, alone: bool = True) -> list:
    """Parse a number or formula, or the last one in a sentence, with math-verify; empty if there is
    none.

    math-verify looks for formulas between dollars, and takes the last number of a text without
    dollars. So a text without words is put between dollars if it is expected to be a formula
    (`alone`), or is LaTeX."""
    from math_verify import parse

    text = EMPHASIS.sub("", text).removesuffix(".").replace("−", "-")
    if SCIENTIFIC.fullmatch(text):
        text = f"{Decimal(text):f}"
    text = MIXED_FRACTION.sub(r"$\1(\2+\3)$", text)
    # A plain number needs no dollars; currency signs and spaces would hide it.
    if NUMBER.fullmatch(text):
        return parse(CURRENCY.sub("", text), parsing_timeout=None)

    # A single letter is a variable; a word of two or more letters makes a sentence.
    is_sentence = bool(SENTENCE.search(text))
    if not is_sentence and NOT_A_NUMBER.search(text):
        return []
    if not is_sentence and (alone or "\\" in text):
        text = f"${text}$"
    return parse(text, parsing_timeout=None)


def numeric(prompts: list, completions: list[str], answer: list, **_) -> list[float]:
    """1.0 if the final answer of a completion (core/final_answers.py) equals the number or formula
    in `answer`, which may be at its end, as in "... #### 72"; else 0.0.

    Raises ValueError if `answer` is not a number or formula."""
    scores = []
    for text, expected in zip(completions, answer, strict=True):
        score = numeric_score(text, str(expected))
        scores.append(score)
    return scores


def numeric_score(text: str, expected: str) -> float:
    from math_verify import verify

    expected = find_final_answer(expected)
    expected_value = parse_formula(expected) if may_be_number(expected) else []
    if not expected_value:
        raise ValueError(f"the answer {expected!r} is not a number or formula")
    # If a number is expected, take the last number of an answer without words.
    value = parse_formula(find_final_answer(text), alone=not NUMBER.fullmatch(expected))
    # Without math-verify's timeouts, which need signals: the process is killed from outside.
    return float(verify(expected_value, value, timeout_seconds=None))


def exact(prompts: list, completions: list[str], answer: list, **_) -> list[float]:
    """1.0 if a completion equals `answer`, ignoring surrounding white space, else 0.0."""
    scores = []
    for text, expected in zip(completions, answer, strict=True):
        is_equal = text.strip() == str(expected).strip()
        scores.append(float(is_equal))
    return scores


def regex(prompts: list, completions: list[str], reward_pattern: str, **_) -> list[float]:
    """1.0 if the pattern is found, else 0.0."""
    pattern = re.compile(reward_pattern, re.DOTALL)
    matches = [pattern.search(text) for text in completions]
    return [float(match is not None) for match in matches]


def format(prompts: list, completions: list[str], reward_pattern: str, **_) -> list[float]:
    """1.0 if the whole completion matches the pattern, else 0.0."""
    pattern = re.compile(reward_pattern, re.DOTALL)
    matches = [pattern.fullmatch(text.strip()) for text in completions]
    return [float(match is not None) for match in matches]


def length(prompts: list, completions: list[str], reward_length: int, **_) -> list[float]:
    """1.0 up to `reward_length` words, falling to 0.0 at twice as many."""
    scores = []
    for text in completions:
        words = text.split()
        score = 2 - len(words) / reward_length
        score = min(1.0, max(0.0, score))
        scores.append(score)
    return scores
