"""From a chat to tokens: conversations become text, text becomes token ids and labels.

    as_messages    value of a data set        ->  messages
    render_turns   messages                   ->  pieces of text, each a target or not
    encode_turns   pieces of text             ->  input_ids (T,) and labels (T,)

Example with a ChatML tokenizer:

    messages   [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]

    pieces     [("<|im_start|>user\\n2 + 2?<|im_end|>\\n<|im_start|>assistant\\n", False),
                ("4<|im_end|>", True),  # the model learns to write this, and to stop
                ("\\n", False)]          # nothing follows the last target, so this is dropped

    input_ids  [   1, 882, 198, ...,    1, 520, 198,  19,    2]
    labels     [-100,-100,-100, ..., -100,-100,-100,  19,    2]

The text is always that of the tokenizer's chat template, and it is tokenized as a whole, as it will
be when the model is used. What cannot be rendered exactly raises RowError.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence

from core.config import ModelConfig
from core.errors import ConfigError, RowError, as_config_error
from core.runtime import warn_once

IGNORE = -100  # label of a token that is not a target, as in transformers and torch

# Role names of chat data sets, including ShareGPT's.
ROLES = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
}
MESSAGE_KEYS = {"role", "content", "from", "value"}

INSTRUCTION_TEMPLATE_EXAMPLE = (
    r"--instruction_template='### Instruction:\n{instruction}\n\n### Response:\n{response}'"
)


# -- values to messages ------------------------------------------------------------------------


def as_messages(value, role: str) -> list[dict]:
    """The messages of `value`: a text (spoken by `role`), one message, or a list of messages.

    A message is {"role": ..., "content": ...} or, in ShareGPT's form, {"from": ..., "value": ...}.
    Raises RowError if a text is missing or a speaker is unknown.
    """
    if isinstance(value, str | int | float):
        value = {"role": role, "content": str(value)}
    turns = [value] if isinstance(value, dict) else value
    if not turns:
        raise RowError("with an empty or missing text")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("that has neither a text nor a list of messages")
    warn_of_unused_keys(turns)

    messages = []
    for turn in turns:
        text = turn.get("content") or turn.get("value")
        if not isinstance(text, str) or not text.strip():
            raise RowError("with an empty or missing text")
        messages.append({"role": turn.get("role") or turn.get("from"), "content": text})

    unknown = {str(message["role"]) for message in messages} - ROLES.keys()
    if unknown:
        raise RowError(f"with an unknown speaker ({', '.join(sorted(unknown))})")
    for message in messages:
        message["role"] = ROLES[message["role"]]
    return messages


def warn_of_unused_keys(turns: list[dict]) -> None:
    """Warn once about content that is not used, such as tool calls."""
    unused = set()
    for turn in turns:
        for key, value in turn.items():
            is_empty = value in (None, "", [], {})
            if key not in MESSAGE_KEYS and not is_empty:
                unused.add(key)
    if unused:
        names = ", ".join(sorted(unused))
        warn_once(f"only the role and content of a message are used, not {names}")


# -- messages to pieces of text ----------------------------------------------------------------


def render_turns(tokenizer, messages: list[dict]) -> list[tuple[str, bool]]:
    """The conversation as the model sees it, in pieces (text, is_target).

    Targets are what the assistant has to write, up to and including its stop token. Where the chat
    template has no stop token, the tokenizer's eos_token is appended. Raises RowError for a
    conversation that the template does not render turn by turn.
    """
    template = training_template(tokenizer, tokenizer.chat_template)
    final_stop_token = final_stop_pattern(tokenizer)

    pieces = []
    rendered = ""  # the conversation up to and including the previous answer
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise RowError("that begins with the assistant")

        # The answer is what the template adds to the prompt that the model is given in use.
        prompt = apply_template(tokenizer, template, messages[:index], generation_prompt=True)
        answered = apply_template(
            tokenizer, template, messages[: index + 1], generation_prompt=False
        )
        if not answered.startswith(prompt):
            raise RowError("which the chat template renders without its generation prompt")
        if not prompt.startswith(rendered):
            raise RowError(
                "whose earlier turns the chat template changes; instruction_template keeps them"
            )

        stop = final_stop_token.search(answered, len(prompt))
        content_end = stop.start() if stop else len(answered)
        target_end = stop.end() if stop else len(answered)
        check_answer_is_whole(answered, len(prompt), content_end, target_end, message["content"])

        target = answered[len(prompt) : target_end]
        if not stop:
            target += tokenizer.eos_token
        pieces.append((prompt[len(rendered) :], False))
        pieces.append((target, True))
        pieces.append((answered[target_end:], False))
        rendered = answered
    return pieces


def apply_template(tokenizer, template: str, messages: list[dict], generation_prompt: bool) -> str:
    """The text of `messages`; with `generation_prompt`, up to where the assistant begins."""
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=template,
            add_generation_prompt=generation_prompt,
        )
    except Exception as error:  # Jinja's own, or raised by the template for what it does not know
        raise RowError(f"which the chat template refuses: {error}") from error


def final_stop_pattern(tokenizer) -> re.Pattern:
    """A pattern for a special token at the end of a text, ignoring trailing white space."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.add(tokenizer.eos_token)
    alternatives = "|".join(re.escape(token) for token in sorted(special))
    return re.compile(rf"(?:{alternatives})(?=\s*$)")


def check_answer_is_whole(
    answered: str, prompt_end: int, content_end: int, target_end: int, content: str
) -> None:
    """Raise RowError if the template shortened the answer `content`, such as by its reasoning."""
    rendered_content = answered[prompt_end:content_end]
    if not rendered_content.strip():
        return  # the template drops all of it: check_encoded_rows reports that for the whole data
    expected = without_spaces(content)
    is_in_target = expected in without_spaces(answered[prompt_end:target_end])
    # A generation prompt such as "<think>" may already contain the beginning of the answer.
    ends_with_it = without_spaces(answered[:content_end]).endswith(expected)
    if not is_in_target and not ends_with_it:
        raise RowError("whose answer the chat template shortens")


def without_spaces(text: str) -> str:
    """`text` without white space, which chat templates trim."""
    return "".join(text.split())


# -- pieces of text to tokens ------------------------------------------------------------------


def encode_turns(tokenizer, pieces: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """input_ids (T,) and labels (T,) of the pieces as one text that ends with the last target.

    A label is the token itself in a target, and IGNORE elsewhere. Raises RowError if there is no
    target, or if one token covers the end of a prompt and the beginning of its answer.
    """
    targets = [number for number, (_, is_target) in enumerate(pieces) if is_target]
    if not targets:
        raise RowError("without an answer")
    pieces = pieces[: targets[-1] + 1]

    # One call for the whole text: tokenized separately, the pieces could give different tokens.
    whole_text = "".join(text for text, _ in pieces)
    encoded = tokenizer(whole_text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids = encoded["input_ids"]  # (T,)
    offsets = encoded["offset_mapping"]  # (T, 2): first character of each token, and its end

    labels: list[int] = []
    piece_end = 0
    for text, is_target in pieces:
        piece_end += len(text)
        while len(labels) < len(input_ids):
            token_start, token_end = offsets[len(labels)]
            if token_start >= piece_end:
                break  # the token belongs to the next piece
            # At inference the prompt is tokenized alone, so the model would never see such a token.
            if token_end > piece_end:
                raise RowError("whose answer begins inside a token of the prompt")
            labels.append(input_ids[len(labels)] if is_target else IGNORE)
    return input_ids, labels


def prompt_ids(tokenizer, prompt: list[dict]) -> list[int]:
    """Token ids (T,) of a conversation up to where the assistant begins to write."""
    pieces = render_turns(tokenizer, [*prompt, {"role": "assistant", "content": "a"}])
    before_answer = pieces[:-2]  # the last two are the answer and what follows it
    text = "".join(text for text, _ in before_answer)
    return tokenizer(text, add_special_tokens=False).input_ids


def stop_tokens(tokenizer) -> list[int]:
    """Ids of the tokens that end an answer: the tokenizer's eos, and the end of a turn in the chat
    template, which may be another one."""
    stops = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        with as_config_error(
            "the chat template cannot be used for training, set instruction_template instead; "
            "every conversation is one"
        ):
            input_ids, _ = encode_turns(tokenizer, render_turns(tokenizer, chat))
        stops.add(input_ids[-1])
    return sorted(stops)


# -- chat templates ----------------------------------------------------------------------------


def prepare_tokenizer(tokenizer, config: ModelConfig, needs_chat_template: bool = True) -> None:
    """Set the pad token, and the chat template that `instruction_template` describes, in place.

    Raises ConfigError if a chat template is needed and there is none.
    """
    if tokenizer.pad_token is None:
        # Harmless: batches are masked by length, never by the value of a token.
        tokenizer.pad_token = tokenizer.eos_token
    if config.instruction_template:
        tokenizer.chat_template = template_from_instruction(config.instruction_template, tokenizer)
    if needs_chat_template and not tokenizer.chat_template:
        raise ConfigError(
            f"{config.model_name_or_path} has no chat template; describe how a prompt is written, "
            f"for example {INSTRUCTION_TEMPLATE_EXAMPLE}, or start from an instruction-tuned model"
        )


@functools.cache
def training_template(tokenizer, template: str) -> str:
    """The chat template to train with: the tokenizer's own `template`, or TRL's version of it.

    Some templates rewrite earlier turns when later ones follow (they remove the reasoning, say), so
    that the text before an answer is not the beginning of the whole. TRL's versions do not.
    """
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    one_round = tokenizer.apply_chat_template(turns[:2], tokenize=False)
    two_rounds = tokenizer.apply_chat_template(turns, tokenize=False)
    if two_rounds.startswith(one_round):
        return template
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer) or template
    except ValueError as error:
        raise ConfigError(
            f"the chat template changes earlier turns; set instruction_template ({error})"
        ) from None


def template_from_instruction(text: str, tokenizer) -> str:
    """The Jinja chat template of an instruction template.

    Its fields are {instruction}, {input} and {response}: "Q: {instruction}\\nA: {response}".
    Raises ConfigError without {instruction}; other names in braces are text, with a warning.
    """
    text = text.replace("\\n", "\n")  # a shell passes \n as two characters
    prompt, _, after_response = text.partition("{response}")
    if "{instruction}" not in prompt:
        raise ConfigError("instruction_template must contain {instruction} before {response}")
    warn_of_plain_text_fields(prompt, after_response)

    # A space before the answer is tokenized with its first word, so the model has to write it.
    stripped_prompt = prompt.rstrip(" ")
    spaces = prompt[len(stripped_prompt) :]

    instruction = "{{ message['content'] }}"
    expressions = {"{instruction}": instruction, "{input}": "{{ message['input'] }}"}
    prompt_template = ""
    for part in re.split(r"(\{instruction\}|\{input\})", stripped_prompt):
        if part:
            prompt_template += expressions.get(part) or jinja_literal(part)

    # Some tokenizers put their bos token before every text, and then expect it here too.
    adds_bos = tokenizer.bos_token_id in tokenizer("a").input_ids
    bos = "{{ bos_token }}" if adds_bos else ""
    answer = (
        f"{jinja_literal(spaces)}{instruction}{jinja_literal(after_response)}{{{{ eos_token }}}}"
    )
    system = instruction + jinja_literal("\n\n")
    return (
        f"{bos}{{% for message in messages %}}"
        f"{{% if message['role'] == 'assistant' %}}{answer}"
        f"{{% elif message['role'] == 'system' %}}{system}"
        f"{{% else %}}{prompt_template}"
        "{% endif %}{% endfor %}"
    )


def warn_of_plain_text_fields(prompt: str, after_response: str) -> None:
    """Warn of names in braces that an instruction template does not replace."""
    names_in_prompt = set(re.findall(r"\{\w+\}", prompt))
    names_after = set(re.findall(r"\{\w+\}", after_response))
    plain_text = (names_in_prompt - {"{instruction}", "{input}"}) | names_after
    if plain_text:
        warn_once(
            f"instruction_template: {', '.join(sorted(plain_text))} is used as plain text; the "
            "fields are {instruction} and {input}, followed by {response} once"
        )


def jinja_literal(text: str) -> str:
    """A Jinja expression that prints `text` as it is."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"
