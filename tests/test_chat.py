"""core/chat.py: messages, chat templates, and the way from a chat to tokens."""

import copy
import signal

import pytest

import core.chat
import core.errors
import core.messages
import core.runtime
from core.config import ModelConfig
from core.errors import ConfigError
from core.messages import as_messages, with_context


def test_a_chat_becomes_tokens_as_the_docstring_shows(tokenizer):
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    context, target = core.chat.render_turn(tokenizer, core.messages.as_messages(chat, "user"), 1)
    assert (context, target) == (
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n",
        "4<|im_end|>",
    )
    for text in (context, target):
        assert repr(text).replace("'", '"') in core.chat.__doc__

    [(input_ids, labels)] = core.chat.encode_conversation(tokenizer, chat)  # (T,), (T,)
    assert tokenizer.decode(input_ids) == context + target
    answer = tokenizer("4<|im_end|>", add_special_tokens=False).input_ids
    prompt_length = len(input_ids) - len(answer)
    assert input_ids[prompt_length:] == answer
    assert labels == [core.chat.IGNORE] * prompt_length + answer
    assert core.chat.prompt_ids(tokenizer, chat[:1]) == input_ids[:prompt_length]


def test_a_message_that_is_none_is_a_row_left_out():
    for value in (
        [None, {"role": "user", "content": "a"}],
        ["hi", "there"],
        {"a": 1},
        5.0 + 1j,
        None,
        [],
    ):
        with pytest.raises(core.errors.RowError):
            as_messages(value, "user")
    assert as_messages(7, "user") == [{"role": "user", "content": "7"}]


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    "turn, read",
    [
        ({"from": "gpt", "value": "b"}, {"role": "assistant", "content": "b"}),
        ({"role": "developer", "content": "b"}, {"role": "system", "content": "b"}),
        ({"role": "tool", "content": ""}, {"role": "tool", "content": ""}),
        (
            {"role": "user", "content": [{"type": "text", "text": "b"}, "c"]},
            {"role": "user", "content": "b\nc"},
        ),
        (
            {"role": "assistant", "content": "b", "weight": 0, "reasoning": "c"},
            {"role": "assistant", "content": "b", "reasoning_content": "c", "train": False},
        ),
        (
            {"role": "assistant", "content": "b", "weight": 1, "train": None, "name": ""},
            {"role": "assistant", "content": "b"},
        ),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "c"}, "b"]},
            {"role": "assistant", "content": "b", "reasoning_content": "c"},
        ),
        (
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
                ],
            },
        ),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "i", "function": {"name": "f"}}],
            },
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": {}}, "id": "i"}
                ],
            },
        ),
    ],
)
def test_messages_are_read_in_the_forms_that_data_sets_have(turn, read):
    assert as_messages([USER, turn], "user") == [USER, read]


@pytest.mark.parametrize(
    "turn, said",
    [
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "a part that is not text .image_url",
        ),
        ({"role": "narrator", "content": "b"}, "an unknown speaker .narrator.; known are user, "),
        ({"text": "b"}, "an object that is not a message, since it has no role"),
        ({"role": "assistant", "content": None}, "an empty or missing text"),
        ({"role": "assistant", "content": "b", "weight": 0.5}, "a weight of 0.5"),
        (
            {"role": "assistant", "content": "b", "tool_calls": [1]},
            "a tool call that is not a JSON object",
        ),
        ({"from": "function_call", "value": "f(x)"}, "a tool call that is not JSON"),
    ],
)
def test_a_message_that_would_lose_a_part_is_refused(turn, said):
    with pytest.raises(core.errors.RowError, match=said):
        as_messages([USER, turn], "user")


def test_speakers_are_read_in_any_case():
    turns = [{"from": "Human", "value": "a"}, {"from": "ChatGPT", "value": "b"}]
    assert as_messages(turns, "user") == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


@pytest.mark.parametrize("end", ["", "\n\nAssistant:"])
def test_a_transcript_is_a_conversation(end):
    """In the form of Anthropic's HH data; a prompt of it ends where the answer begins."""
    text = "\n\nHuman: One?\n\nAssistant: a\n\nb\n\nHuman: Two?" + end
    assert as_messages(text, "user") == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "a\n\nb"},
        {"role": "user", "content": "Two?"},
    ]
    assert as_messages("Human: One?", "user") == [{"role": "user", "content": "Human: One?"}]


def test_an_empty_system_message_is_none_and_tools_stay(caplog):
    core.runtime.warn_once.cache_clear()
    system = {"role": "system", "content": " ", "rating": 5}
    tools = '[{"name": "f"}]'
    assert with_context(as_messages([system, USER], "user"), {"tools": tools}) == [
        USER | {"tools": [{"type": "function", "function": {"name": "f"}}]}
    ]
    assert "these keys of a message are not used: rating" in caplog.text


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


# -- tokens and templates by option ----------------------------------------------------------------

TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"


def test_a_chat_template_comes_from_a_file_or_from_another_model(tokenizer, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATE)
    assert core.chat.read_chat_template(str(file)) == TEMPLATE
    tokenizer.save_pretrained(tmp_path / "other")
    assert core.chat.read_chat_template(str(tmp_path / "other")) == tokenizer.chat_template
    with pytest.raises(ConfigError, match="neither a file nor a model"):
        core.chat.read_chat_template(str(tmp_path / "none"))
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="that model does not have exactly one chat template"):
        core.chat.read_chat_template(str(tmp_path / "plain"))
    config = ModelConfig(model_name_or_path="m", chat_template_path=str(file))
    core.chat.prepare_tokenizer(plain, config)
    assert plain.chat_template == TEMPLATE
    config.instruction_template = "{instruction}"
    with pytest.raises(ConfigError, match="keep one"):
        config.validate()


def test_the_tokens_that_end_a_turn_and_fill_a_batch_can_be_chosen(tokenizer):
    own = copy.deepcopy(tokenizer)
    config = ModelConfig(model_name_or_path="m", eos_token="<|im_end|>", pad_token="<|im_start|>")
    core.chat.prepare_tokenizer(own, config)
    assert (own.eos_token, own.pad_token) == ("<|im_end|>", "<|im_start|>")
    assert own.eos_token_id in core.chat.stop_tokens(own)
    for name in ("eos_token", "pad_token"):
        unknown = ModelConfig(model_name_or_path="m", **{name: "<none>"})
        with pytest.raises(ConfigError, match=f"{name}=<none> is not in the model's vocabulary"):
            core.chat.prepare_tokenizer(copy.deepcopy(tokenizer), unknown)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set x = namespace(s='spam' * 9) %}"
        "{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}",
        "{{ 'a' | center(99999999999) }}",
    ],
)
def test_a_template_that_loops_or_fills_the_memory_is_stopped(tokenizer, template, monkeypatch):
    monkeypatch.setattr(core.chat, "RENDER_SECONDS", 0.5)
    monkeypatch.setattr(core.chat, "RENDER_GIGABYTES", 0.3)
    looping = copy.deepcopy(tokenizer)
    looping.chat_template += template
    with pytest.raises(ConfigError, match="the chat template takes more than 0.5 s or 0.3 GB"):
        core.chat.prompt_ids(looping, [{"role": "user", "content": "Hi"}])
    with pytest.raises(ConfigError, match="the chat template takes more than"):
        core.chat.literal_prompt_ids(looping, [{"role": "user", "content": "<|im_end|>"}])
    # Both limits end with the block.
    assert core.chat.prompt_ids(tokenizer, [{"role": "user", "content": "Hi"}])
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert len(bytearray(400_000_000)) == 400_000_000


def test_a_template_with_a_power_or_a_long_range_is_refused(tokenizer):
    """No signal ends one long operation."""
    endless = copy.deepcopy(tokenizer)
    endless.chat_template += "\n{{ 9**9**9 }}"
    with pytest.raises(ConfigError, match=r"has a power \(\*\*\) in line 5"):
        core.chat.prepare_tokenizer(endless, ModelConfig(model_name_or_path="m"))
    endless.chat_template = "{% for i in range(1000000000) %}{% endfor %} not a power: **"
    core.chat.prepare_tokenizer(endless, ModelConfig(model_name_or_path="m"))
    with pytest.raises(ConfigError, match="Range too big"):
        core.chat.stop_tokens(endless)
