"""Conversations to text to tokens and labels."""

from __future__ import annotations

import functools
import json
import re
from typing import Sequence

from core.config import ModelConfig
from core.errors import ConfigError, RowError, as_config_error
from core.runtime import warn_once

IGNORE = -100  # label of a token that is not a target: the convention of transformers and torch
ROLES = {
    "human": "user",
    "gpt": "assistant",
    **{role: role for role in ("user", "assistant", "system", "tool")},
}


def as_messages(value, role: str) -> list[dict]:
    """A text, one message, or a list of them ({"role", "content"} or {"from", "value"}), as a list of messages."""
    value = {"role": role, "content": str(value)} if isinstance(value, str | int | float) else value
    turns = [value] if isinstance(value, dict) else value or [{}]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("that has neither a text nor a list of messages")
    unused = {key for turn in turns for key, said in turn.items() if said not in (None, "", [], {})}
    if unused := unused - {"role", "content", "from", "value"}:
        warn_once(f"of messages only role and content are read, not {', '.join(sorted(unused))}")
    turns = [
        (turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value"))
        for turn in turns
    ]
    if not all(isinstance(text, str) and text.strip() for _, text in turns):
        raise RowError("with an empty or missing text")
    if strangers := {str(speaker) for speaker, _ in turns} - {*ROLES}:
        raise RowError(f"with an unknown speaker ({', '.join(sorted(strangers))})")
    return [{"role": ROLES[speaker], "content": text} for speaker, text in turns]


def prepare_tokenizer(tokenizer, config: ModelConfig, needs_chat_template: bool = True) -> None:
    """Set the pad token, and the chat template that `instruction_template` describes, for all that comes after."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = (
            tokenizer.eos_token
        )  # harmless: our batches mask by length, never by token
    if config.instruction_template:
        tokenizer.chat_template = template_from_instruction(config.instruction_template, tokenizer)
    if needs_chat_template and not tokenizer.chat_template:
        example = (
            r"--instruction_template='### Instruction:\n{instruction}\n\n### Response:\n{response}'"
        )
        raise ConfigError(
            f"{config.model_name_or_path} has no chat template; say how a prompt is written, for example "
            f"{example}, or start from an instruction-tuned model"
        )


def template_from_instruction(text: str, tokenizer) -> str:
    """The Jinja chat template of an instruction template with the fields {instruction}, {input} and {response}."""
    text = text.replace("\\n", "\n")  # a shell hands \n over as two characters
    prompt, _, after = text.partition("{response}")
    # A space before the answer is tokenized with its first word, so the model has to write it.
    space, prompt = " " * (len(prompt) - len(prompt.rstrip(" "))), prompt.rstrip(" ")
    if "{instruction}" not in prompt:
        raise ConfigError(
            "instruction_template: {instruction} is missing, or stands after {response}"
        )
    places = [re.findall(r"\{\w+\}", part) for part in (prompt, after)]
    if strange := {*places[0]} - {"{instruction}", "{input}"} | {*places[1]}:
        warn_once(
            f"instruction_template: {', '.join(sorted(strange))} is text there; its places are {{instruction}}, "
            "{input} and, once and after them, {response}"
        )
    value = {"{instruction}": "{{ message['content'] }}", "{input}": "{{ message['input'] }}"}
    quoted = lambda text: "{{ " + json.dumps(text, ensure_ascii=False) + " }}"
    parts = [part for part in re.split(r"(\{instruction\}|\{input\})", prompt) if part]
    bos = (
        tokenizer.bos_token_id in tokenizer("a").input_ids
    )  # the tokenizer puts it before every text
    return "".join(
        [
            "{{ bos_token }}" if bos else "",
            "{% for message in messages %}{% if message['role'] == 'assistant' %}",
            quoted(space),
            value["{instruction}"],
            quoted(after),
            "{{ eos_token }}",
            "{% elif message['role'] == 'system' %}",
            value["{instruction}"],
            quoted("\n\n"),
            "{% else %}",
            *(value.get(part) or quoted(part) for part in parts),
            "{% endif %}{% endfor %}",
        ]
    )


@functools.cache
def training_template(tokenizer, template: str) -> str:
    """The tokenizer's own chat template, `template`, where it leaves earlier turns as they are when later ones follow;
    else TRL's version of it, which does."""
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    two, four = (tokenizer.apply_chat_template(turns[:n], tokenize=False) for n in (2, 4))
    if four.startswith(two):
        return template
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer) or template
    except ValueError as error:
        raise ConfigError(
            f"the chat template changes earlier turns; give instruction_template ({error})"
        ) from None


def render_turns(tokenizer, messages: list[dict]) -> list[tuple[str, bool]]:
    """The conversation as the model sees it, in pieces (text, is_target). Targets are what the assistant has to write,
    up to and including the stop token, which is appended where the template has none."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    stop = re.compile(f"(?:{'|'.join(map(re.escape, {*special, tokenizer.eos_token}))})(?=\\s*$)")
    template = training_template(tokenizer, tokenizer.chat_template)
    squeeze = lambda text: "".join(text.split())

    def render(turns: list[dict], prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                turns, tokenize=False, chat_template=template, add_generation_prompt=prompt
            )
        except Exception as error:  # of Jinja: a template may refuse what it does not know
            raise RowError(f"which the chat template refuses: {error}") from error

    pieces, done = [], ""
    for index in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        if not index:
            raise RowError("that begins with the assistant")
        prompt, answered = render(messages[:index], True), render(messages[: index + 1], False)
        if not answered.startswith(prompt):
            raise RowError("which the chat template renders without its generation prompt")
        if not prompt.startswith(done):
            raise RowError(
                "whose earlier turns the chat template changes; instruction_template would leave them"
            )
        found = stop.search(answered, len(prompt))
        end = found.end() if found else len(answered)
        target = answered[len(prompt) : end] + ("" if found else tokenizer.eos_token)
        before, whole = (
            answered[: found.start() if found else end],
            squeeze(messages[index]["content"]),
        )
        if (
            before[len(prompt) :].strip()
            and whole not in squeeze(answered[len(prompt) : end])
            and not (squeeze(before).endswith(whole))
        ):  # the generation prompt may begin the answer, with <think>
            raise RowError("of whose answer the chat template leaves a part out")
        pieces += [(prompt[len(done) :], False), (target, True), (answered[end:], False)]
        done = answered
    return pieces


def encode_turns(tokenizer, pieces: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of the pieces as one text that ends with the last target; labels are IGNORE elsewhere."""
    last = max((number for number, (_, target) in enumerate(pieces) if target), default=-1)
    if last < 0:
        raise RowError("without an answer")
    pieces = pieces[: last + 1]
    encoded = tokenizer(
        "".join(p for p, _ in pieces), add_special_tokens=False, return_offsets_mapping=True
    )
    ids, offsets, labels, end = encoded["input_ids"], encoded["offset_mapping"], [], 0
    for piece, target in pieces:
        end += len(piece)
        while len(labels) < len(ids) and offsets[len(labels)][0] < end:
            if offsets[len(labels)][1] > end:  # after this prompt the model could never begin so
                raise RowError("whose answer begins inside a token of the prompt")
            labels.append(ids[len(labels)] if target else IGNORE)
    return ids, labels


def stop_tokens(tokenizer) -> list[int]:
    """The tokenizer's eos, and the token that ends a turn of the chat template, which need not be the same."""
    stops = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        with as_config_error(
            "the chat template cannot be learnt, give instruction_template instead: every turn is one"
        ):
            stops.add(encode_turns(tokenizer, render_turns(tokenizer, turn))[0][-1])
    return sorted(stops)


def prompt_ids(tokenizer, prompt: list[dict]) -> list[int]:
    """The token ids of a conversation up to where the assistant begins to write."""
    *before, _, _ = render_turns(tokenizer, [*prompt, {"role": "assistant", "content": "a"}])
    return tokenizer("".join(text for text, _ in before), add_special_tokens=False).input_ids
