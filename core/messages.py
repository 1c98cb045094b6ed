"""Convert values of a data set to messages, in the form that chat templates take.

A message is {"role": ..., "content": text}; its role is system, user, assistant or tool. If the
data has them, it also has

    "tool_calls"          [{"type": "function", "function": {"name": ..., "arguments": ...}}]
    "reasoning_content"   the assistant's reasoning before the text
    "tool_call_id", "name"
    "train"               False for an answer that is only context, not trained on
    "tools"               in the first message: the functions that the assistant may call

Data that cannot be read completely raises RowError.
"""

from __future__ import annotations

import json
import re
from typing import Any

from core.errors import RowError
from core.runtime import warn_once

# Role names of chat data sets, including ShareGPT's.
ROLES = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
}
# A conversation as one text, as in Anthropic's HH data: "\n\nHuman: ...\n\nAssistant: ...".
TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
TEXT_KEYS = ("content", "value")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
SPEAKER_KEYS = ("role", "from", "name")
TOOL_KEYS = ("tools", "tool_calls", "function_call", "tool_call_id")
MARKS = ("weight", "train")  # whether an answer is trained on
KNOWN_KEYS = {*SPEAKER_KEYS, *TEXT_KEYS, *REASONING_KEYS, *TOOL_KEYS, *MARKS}


def as_messages(value, role: str) -> list[dict]:
    """The messages of `value`: a text (spoken by `role`), one message, or a list of messages.

    A message is {"role": ..., "content": ...} or, in ShareGPT's form, {"from": ..., "value": ...}.
    A text may be messages as JSON, as in cells of a table. Raises RowError if a text is missing or
    a speaker is unknown.
    """
    if isinstance(value, str):
        value = parse_messages(value)
    if isinstance(value, str | int | float):
        value = {"role": role, "content": str(value)}
    turns = [value] if isinstance(value, dict) else value
    if not turns:
        raise RowError("with an empty or missing text")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("with neither a text nor a list of messages")
    warn_of_unused_keys(turns)

    messages = []
    tools = None
    for turn in turns:
        tools = tools or turn.get("tools")
        message = read_message(turn)
        # An empty system message means that there is none.
        if message["role"] != "system" or message["content"].strip():
            messages.append(message)
    if not messages:
        raise RowError("with an empty or missing text")
    if tools:
        messages[0]["tools"] = read_tools(tools)
    return messages


def with_context(messages: list[dict], row: dict) -> list[dict]:
    """The messages, preceded by other columns of their row: `history`, as earlier turns, and
    `system` or `system_prompt`, as the system message; and with `tools`.

    Empty columns are ignored. Raises RowError if the messages have a different system message.
    """
    system = read_system(row)
    earlier = read_history(row.get("history"))
    tools = read_tools(row["tools"]) if row.get("tools") else messages[0].get("tools")
    if not (system or earlier or tools):
        return messages

    first = {key: value for key, value in messages[0].items() if key != "tools"}
    messages = [first, *messages[1:]]
    begins_with_system = first["role"] == "system"
    if begins_with_system and system and first["content"].strip() != system.strip():
        raise RowError("whose column system differs from its system message")
    if begins_with_system:
        system_messages, turns = messages[:1], messages[1:]
    else:
        system_messages = [{"role": "system", "content": system}] if system else []
        turns = messages
    messages = system_messages + earlier + turns
    if tools:
        messages[0] = {**messages[0], "tools": tools}
    return messages


def read_system(row: dict) -> str:
    """The text of a row's column `system` or `system_prompt`; "" if there is none."""
    texts = {}
    for column in ("system", "system_prompt"):
        value = row.get(column)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise RowError(f"whose column {column} is not text")
        if value.strip():
            texts[value.strip()] = value
    if len(texts) > 1:
        raise RowError("whose columns system and system_prompt differ")
    return next(iter(texts.values()), "")


def read_history(history) -> list[dict]:
    """The turns in [[question, answer], ...], in a list of messages, or in either as JSON."""
    if not history:
        return []
    history = as_json(history, "a history")
    if not history:
        return []
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return as_messages(history, "user")
    messages = []
    for turn in history if isinstance(history, list) else [None]:
        is_pair = isinstance(turn, list | tuple) and len(turn) == 2
        if not is_pair or not all(isinstance(text, str) for text in turn):
            raise RowError("with a history that is not a list of [question, answer]")
        question, answer = turn
        messages += as_messages(question, "user") + as_messages(answer, "assistant")
    return messages


def parse_messages(value: str):
    """Parse a text that is a transcript, or messages as JSON, as in a cell of a table; other text
    is returned unchanged.

    Raises RowError for messages as Python prints them, and for messages in broken JSON.
    """
    if TRANSCRIPT_TURN.match(value):
        return split_transcript(value)
    begin = value.lstrip()
    if not begin.startswith(("[", "{")):
        return value
    try:
        parsed = json.loads(value)
    except ValueError:
        quoted = re.match(r"""\[?\s*\{\s*(['"])(role|content|from|value)\1\s*:""", begin)
        if quoted and quoted.group(1) == "'":
            raise RowError(
                "with messages as Python prints them; write them with json.dumps"
            ) from None
        if quoted:
            raise RowError("with messages that are broken JSON") from None
        return value
    turns = [parsed] if isinstance(parsed, dict) else parsed
    if turns and all(is_message(turn) for turn in turns):
        return parsed
    return value


def split_transcript(text: str) -> list[dict]:
    """The messages of a text with TRANSCRIPT_TURNs. A prompt ends where its answer begins."""
    _, *parts = TRANSCRIPT_TURN.split(text)
    turns = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": speaker, "content": content.strip()})
    if len(turns) > 1 and turns[-1] == {"role": "Assistant", "content": ""}:
        turns.pop()
    return turns


def is_message(turn) -> bool:
    """Whether a value has a known speaker and a text, or a call."""
    if not isinstance(turn, dict):
        return False
    has_content = any(key in turn for key in (*TEXT_KEYS, *TOOL_KEYS))
    return speaker_of(turn) in ROLES and has_content


def speaker_of(turn: dict) -> str:
    """Who speaks, in lower case; empty if the message does not say."""
    return str(turn.get("role") or turn.get("from") or "").strip().lower()


def warn_of_unused_keys(turns: list[dict]) -> None:
    """Warn once about unused content, such as ratings."""
    unused = set()
    for turn in turns:
        for key, value in turn.items():
            is_empty = value in (None, "", [], {})
            if key not in KNOWN_KEYS and not is_empty:
                unused.add(key)
    if unused:
        names = ", ".join(sorted(unused))
        warn_once(f"these keys of a message are not used: {names}")


def read_message(turn: dict) -> dict:
    """One message of a data set; raises RowError."""
    speaker = speaker_of(turn)
    if not speaker:
        raise RowError("with an object that is not a message, since it has no role")
    if speaker not in ROLES:
        raise RowError(f"with an unknown speaker ({speaker}); known are {', '.join(ROLES)}")
    text, reasoning = read_content(turn)
    message: dict[str, Any] = {"role": ROLES[speaker], "content": text}

    calls = turn.get("tool_calls") or turn.get("function_call")
    if speaker == "function_call":
        calls, message["content"] = text, ""
    if calls:
        message["tool_calls"] = read_tool_calls(calls)
    reasoning = reasoning or reasoning_of(turn)
    if reasoning:
        message["reasoning_content"] = reasoning
    for key in ("tool_call_id", "name"):
        if turn.get(key):
            message[key] = turn[key]
    if not is_learnt(turn):
        message["train"] = False

    # A tool may return nothing, and an assistant may call one without any text.
    may_be_empty = message["role"] in ("system", "tool") or "tool_calls" in message
    if not may_be_empty and not message["content"].strip():
        raise RowError("with an empty or missing text")
    return message


def read_content(turn: dict) -> tuple[str, str]:
    """(text, reasoning) of a message; lists of parts are joined by line breaks."""
    content = turn.get("content") or turn.get("value") or ""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise RowError("with an empty or missing text")
    texts, thoughts = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "thinking":
            thoughts.append(read_content({"content": part.get("thinking")})[0])
        else:
            raise RowError(f"with a part that is not text ({kind})")
    return "\n".join(texts), "\n".join(thoughts)


def reasoning_of(turn: dict) -> str:
    """The assistant's reasoning before the message, under any of its names; "" if none."""
    for key in REASONING_KEYS:
        if turn.get(key):
            return turn[key]
    return ""


def is_learnt(turn: dict) -> bool:
    """Whether a message is trained on, by "weight" (OpenAI, Mistral) or "train" (axolotl); true by
    default."""
    for key in MARKS:
        mark = turn.get(key)
        if mark is None:
            continue
        if mark not in (0, 1):
            raise RowError(f"with a {key} of {mark!r}; 0 is context, and 1 is learnt")
        if not mark:
            return False
    return True


def read_tool_calls(calls) -> list[dict]:
    """Tool calls in OpenAI's form. Those of ShareGPT are JSON; a single call need not be a list."""
    wrapped = []
    for call in as_list(calls, "a tool call"):
        function = as_json(call.get("function") or call, "a tool call")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("with a tool call without a name")
        arguments = function.get("arguments")
        if arguments is None:
            arguments = {}
        wrapped_call = {"type": "function", "function": {**function, "arguments": arguments}}
        if call.get("id"):
            wrapped_call["id"] = call["id"]
        wrapped.append(wrapped_call)
    return wrapped


def read_tools(tools) -> list[dict]:
    """Descriptions of functions in OpenAI's form."""
    wrapped = []
    for tool in as_list(tools, "a list of tools"):
        if "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": tool}
        wrapped.append(tool)
    return wrapped


def as_list(value, what: str) -> list[dict]:
    """`value`, which may be JSON text, as a list of dictionaries."""
    value = as_json(value, what)
    entries = value if isinstance(value, list) else [value]
    entries = [as_json(entry, what) for entry in entries]
    if not all(isinstance(entry, dict) for entry in entries):
        raise RowError(f"with {what} that is not a JSON object")
    return entries


def as_json(value, what: str):
    """`value`, parsed if it is text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(f"with {what} that is not JSON") from error
