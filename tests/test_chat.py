"""core/chat.py: messages and chat templates."""

import pytest

import core.chat
import core.errors
import core.runtime
from core.errors import ConfigError


def test_a_message_that_is_none_is_a_row_left_out(caplog):
    for value in (
        [None, {"role": "user", "content": "a"}],
        ["hi", "there"],
        {"a": 1},
        5.0 + 1j,
        None,
        [],
    ):
        with pytest.raises(core.errors.RowError):
            core.chat.as_messages(value, "user")
    assert core.chat.as_messages(7, "user") == [{"role": "user", "content": "7"}]
    core.chat.as_messages({"role": "user", "content": "a", "tool_calls": [1], "name": None}, "user")
    assert "only role and content are read, not tool_calls" in caplog.text


def test_an_instruction_template_says_what_is_no_place_in_it(tokenizer, caplog):
    core.runtime.warn_once.cache_clear()
    with pytest.raises(ConfigError, match="is missing, or stands after"):
        core.chat.template_from_instruction("{response} {instruction}", tokenizer)
    core.chat.template_from_instruction("{instruction} {input} {response} {}", tokenizer)
    assert not caplog.text
    for template, said in (
        ("{context} {instruction} {response}", "{context}"),
        ("{instruction} {response} {response}", "{response}"),
    ):
        caplog.clear()
        assert (
            said in core.chat.template_from_instruction(template, tokenizer)
            and f"instruction_template: {said} is text there" in caplog.text
        )
