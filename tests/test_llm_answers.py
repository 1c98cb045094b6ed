"""core/llm_answers.py: parsing answers of other models: reasoning, usage, unusual answers."""

import json

import pytest

from core.llm_answers import (
    Answer,
    finished_lines,
    finished_text,
    is_same_model,
    parse_completion,
    read_answer,
)

USAGE = {"prompt_tokens": 10, "completion_tokens": 5}


def completion(message, finish="stop", **parts):
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return json.dumps({"model": "big", "choices": [choice], "usage": USAGE} | parts)


THOUGHTS = "Hmm, 98 or 99?"


@pytest.mark.parametrize(
    "message",
    [
        {"content": "7", "reasoning_content": THOUGHTS},
        {"content": "7", "reasoning": THOUGHTS},
        {"content": "7", "reasoning_content": None, "reasoning": THOUGHTS},
        {"content": f"<think>\n{THOUGHTS}\n</think>\n\n7"},
        {"content": f"{THOUGHTS}\n</think>\n\n7"},  # the template has opened the block
        {"content": f"<thinking>{THOUGHTS}</thinking>7"},
        {"content": f"[THINK]{THOUGHTS}[/THINK]7"},
        {"content": f"◁think▷{THOUGHTS}◁/think▷7"},
        {"content": f"<seed:think>{THOUGHTS}</seed:think>7"},
        {"content": [{"type": "thinking", "thinking": THOUGHTS}, {"type": "text", "text": "7"}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHTS}]},
                {"type": "text", "text": "7"},
            ]
        },
    ],
)
def test_reasoning_is_kept_apart_from_the_answer(message):
    kept = parse_completion(completion(message))
    assert read_answer(kept) == Answer("7", THOUGHTS, False)


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "reasoning_content": "The verdict is A"},
        {"content": "", "reasoning": "The verdict is A"},
        {"content": "<think>The verdict is A"},  # the token limit came
        {"content": "<think>The verdict is A</think>\n"},
        {"content": [{"type": "thinking", "thinking": "The verdict is A"}]},
    ],
)
def test_reasoning_alone_is_no_answer(message):
    assert read_answer(parse_completion(completion(message, finish="length"))) is None


def test_a_text_without_reasoning_stays_as_it_is():
    text = " <b>7</b>\n "
    assert read_answer(parse_completion(completion({"content": text}))) == Answer(text, "", False)


def test_several_blocks_are_all_reasoning():
    text = "<think>one</think>First 7.\n<think>two</think>Then 8."
    answer = read_answer({"text": text})
    assert answer.reasoning == "one\n\ntwo"
    assert answer.text == "First 7.\nThen 8."


def test_what_the_token_limit_ended_is_marked_and_not_read_to_its_end():
    """A 10 may have become a 1."""
    kept = parse_completion(completion({"content": "Good.\nScore: 1"}, finish="length"))
    assert kept["finish"] == "length"
    answer = read_answer(kept)
    assert answer.was_cut
    assert finished_text(answer) is None
    assert finished_lines(answer) == "Good."
    assert "finish" not in parse_completion(completion({"content": "7"}))


def test_what_a_filter_ended_is_no_answer():
    kept = parse_completion(completion({"content": "Some of it"}, finish="content_filter"))
    assert read_answer(kept) is None
    assert kept["tokens_in"] == 10  # it was paid for


@pytest.mark.parametrize(
    "wanted, answering",
    [
        ("gpt-4.1-mini", "gpt-4.1-mini-2025-04-14"),
        ("gpt-4", "gpt-4-0613"),
        ("claude-sonnet-4-latest", "claude-sonnet-4-20250514"),
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("qwen3-8b", "Qwen/Qwen3-8B"),
        ("/models/tiny/", "tiny@main"),
        ("deepseek/deepseek-r1:free", "deepseek/deepseek-r1"),
    ],
)
def test_a_date_or_an_organization_makes_no_other_model(wanted, answering):
    assert is_same_model(wanted, answering)


@pytest.mark.parametrize(
    "wanted, answering",
    [
        ("gpt-4o", "gpt-4o-mini"),
        ("gpt-4.1", "gpt-4"),
        ("Qwen3-8B", "Qwen3-4B"),
        ("Qwen3-8B", "Llama-3-8B"),
    ],
)
def test_another_model_is_noticed(wanted, answering):
    assert not is_same_model(wanted, answering)
