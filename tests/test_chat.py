"""core/chat.py: messages, chat templates, and the way from a chat to tokens."""

import pytest

import core.chat
import core.errors
import core.runtime
from core.errors import ConfigError


def test_a_chat_becomes_pieces_then_tokens_as_the_docstring_shows(tokenizer):
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    pieces = core.chat.render_turns(tokenizer, core.chat.as_messages(chat, "user"))
    assert pieces == [
        ("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", False),
        ("4<|im_end|>", True),
        ("\n", False),
    ]
    for text, _ in pieces:
        assert repr(text).replace("'", '"') in core.chat.__doc__

    input_ids, labels = core.chat.encode_turns(tokenizer, pieces)  # (T,), (T,)
    assert tokenizer.decode(input_ids) == pieces[0][0] + pieces[1][0]
    answer = tokenizer("4<|im_end|>", add_special_tokens=False).input_ids
    prompt_length = len(input_ids) - len(answer)
    assert input_ids[prompt_length:] == answer
    assert labels == [core.chat.IGNORE] * prompt_length + answer
    assert core.chat.prompt_ids(tokenizer, chat[:1]) == input_ids[:prompt_length]


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
    assert "only the role and content of a message are used, not tool_calls" in caplog.text


def test_an_instruction_template_warns_of_unknown_fields(tokenizer, caplog):
    core.runtime.warn_once.cache_clear()
    with pytest.raises(ConfigError, match="must contain {instruction} before {response}"):
        core.chat.template_from_instruction("{response} {instruction}", tokenizer)
    core.chat.template_from_instruction("{instruction} {input} {response} {}", tokenizer)
    assert not caplog.text
    for template, field in (
        ("{context} {instruction} {response}", "{context}"),
        ("{instruction} {response} {response}", "{response}"),
    ):
        caplog.clear()
        assert (
            field in core.chat.template_from_instruction(template, tokenizer)
            and f"instruction_template: {field} is used as plain text" in caplog.text
        )
