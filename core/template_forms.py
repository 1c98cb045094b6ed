"""The forms of messages that chat templates expect, and checks for what templates leave out.

template_forms                  messages  ->  the same in the forms that templates take
check_context, check_answer     raise RowError for a part that is missing in the rendered text
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator

from core.errors import RowError
from core.messages import MARKS, REASONING_KEYS, as_json, reasoning_of


def template_forms(messages: list[dict]) -> Iterator[list[dict]]:
    """Yield the messages in the forms that templates may expect: arguments of tool calls as objects
    or as JSON text, and an empty text or None as the content beside a call."""
    plain = []
    for message in messages:
        form = {key: message[key] for key in message if key not in (*MARKS, "tools")}
        if reasoning_of(message):
            # Templates read it under one of these keys.
            form |= dict.fromkeys(REASONING_KEYS, reasoning_of(message))
        plain.append(form)
    yield plain
    yield from forms_of_tool_calls(plain)
    # Templates of vision models take lists of parts.
    yield [{**form, "content": [{"type": "text", "text": text_of(form)}]} for form in plain]


def forms_of_tool_calls(messages: list[dict]) -> Iterator[list[dict]]:
    """Yield `messages` with tool calls in the forms that templates may expect."""
    if not any("tool_calls" in message for message in messages):
        return
    for write_arguments, no_text in itertools.product((as_object, as_text), ("", None)):
        yield [form_of_tool_calls(message, write_arguments, no_text) for message in messages]


def form_of_tool_calls(message: dict, write_arguments: Callable, no_text: str | None) -> dict:
    """A message with the arguments of its calls converted by `write_arguments`, and with `no_text`
    as content if it has only calls."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = write_arguments(function["arguments"])
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "content": message["content"] or no_text, "tool_calls": calls}


def text_of(message: dict) -> str:
    """The text of a message in any of these forms."""
    content = message["content"]
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if part.get("text"))
    return content or ""


def as_object(arguments):
    return as_json(arguments, "arguments of a tool call")


def as_text(arguments) -> str:
    if isinstance(arguments, str):
        return arguments
    return json.dumps(arguments, ensure_ascii=False)


# -- what a template leaves out -------------------------------------------------------------------


def check_context(messages: list[dict], tools: list[dict] | None, context: str) -> None:
    """Raise RowError if a text, a tool call or a tool is not in the rendered `context`."""
    rendered = without_spaces(context)
    for message in messages:
        # Many templates drop thoughts of earlier turns, at inference too.
        text = text_of(message).split("</think>")[-1]
        if not is_rendered(text, rendered):
            raise RowError(f"whose {message['role']} message the chat template leaves out")
        check_tool_calls(message, rendered)
    for tool in tools or ():
        name = tool.get("function", tool).get("name", "")
        if name not in context:
            raise RowError("whose tools the chat template leaves out")


def check_answer(message: dict, opening: Callable[[], str], target: str) -> None:
    """Raise RowError if the template dropped a part of an answer, such as its reasoning. The
    generation prompt, `opening()`, may have the beginning of the answer, such as "<think>"."""
    content = text_of(message)
    rendered = without_spaces(target)
    if not is_rendered(content, rendered):
        rendered = without_spaces(opening() + target)
    if message["content"] is None and target.lstrip().startswith("None"):
        raise RowError("whose missing text the chat template writes as None")
    # If nothing is left at all, check_encoded_rows reports that for the whole data.
    if target.strip() and not is_rendered(content, rendered):
        raise RowError("whose answer the chat template shortens")
    if not is_rendered(reasoning_of(message), rendered):
        raise RowError("whose reasoning the chat template leaves out")
    check_tool_calls(message, rendered)


def check_tool_calls(message: dict, rendered: str) -> None:
    """Raise RowError if a tool call of `message` is not in `rendered`, a text without spaces."""
    for call in message.get("tool_calls", ()):
        function = call["function"]
        arguments = function["arguments"]
        # JSON text must not be quoted again.
        is_quoted = isinstance(arguments, str) and without_spaces(arguments) not in rendered
        values = [function["name"], *leaves(arguments)]
        if is_quoted or not all(is_rendered(str(value), rendered) for value in values):
            raise RowError("whose tool calls the chat template leaves out")


def leaves(value) -> list:
    """The texts and numbers inside a JSON value, without true, false and null, which templates
    write in various forms."""
    if value is None or isinstance(value, bool):
        return []
    if not isinstance(value, dict | list):
        return [value]
    found = []
    if isinstance(value, dict):
        found += value.keys()
        value = list(value.values())
    for inner in value:
        found += leaves(inner)
    return found


def is_rendered(text: str, rendered: str) -> bool:
    """Whether `rendered`, without spaces, contains the text, verbatim or as in a JSON string."""
    in_json = json.dumps(text, ensure_ascii=False)[1:-1]
    in_ascii = json.dumps(text)[1:-1]
    return any(without_spaces(form) in rendered for form in (text, in_json, in_ascii))


def without_spaces(text: str) -> str:
    """`text` without white space, which chat templates trim."""
    return "".join(text.split())
