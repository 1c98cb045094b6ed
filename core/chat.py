"""Encode conversations as tokens, exactly as the model sees them at inference.

    encode_conversation   messages  ->  input_ids (T,) and labels (T,), once or several times
    prompt_ids            messages  ->  input_ids (T,) up to where the assistant begins to write

For each answer to train on, the context is what a server gives the model at that point: the
messages before it, rendered by the tokenizer's chat template with the generation prompt. The target
is what the template then writes for the answer, up to and including the token that ends the turn.

    messages   [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]

    context    "<|im_start|>user\\n2 + 2?<|im_end|>\\n<|im_start|>assistant\\n"
    target     "4<|im_end|>"  # the model learns to write this, and to stop

    input_ids  [   1, 882, 198, ...,    1, 520, 198,  19,    2]
    labels     [-100,-100,-100, ..., -100,-100,-100,  19,    2]

If each context continues the answer before it, a conversation is one sequence. Some templates
rewrite earlier turns (they strip thoughts, or end the last turn differently): then each answer is a
sequence of its own. Content that a template drops or cannot render raises RowError.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from core.config import ModelConfig
from core.errors import ConfigError, RowError, as_config_error
from core.messages import is_learnt
from core.new_tokens import add_new_tokens
from core.runtime import memory_limit, time_limit, warn_once
from core.template_forms import check_answer, check_context, template_forms, text_of

IGNORE = -100  # label of a token that is not a target, as in transformers and torch
# Limits for rendering one conversation, which takes milliseconds unless the template loops.
RENDER_SECONDS = 5.0
RENDER_GIGABYTES = 2

INSTRUCTION_TEMPLATE_EXAMPLE = (
    r"--instruction_template='### Instruction:\n{instruction}\n\n### Response:\n{response}'"
)


# Rendered to see how a template ends a turn, if there is no row to use.
SHORT_CHAT = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
]


class Turn(NamedTuple):
    """An answer as text."""

    context: str  # input of the model
    target: str  # what the model has to write, up to and including the token that ends the turn


# -- conversations to tokens -------------------------------------------------------------------


def encode_conversation(
    tokenizer, messages: list[dict], tools: list[dict] | None = None, start: int = 0
) -> list[tuple[list[int], list[int]]]:
    """[(input_ids (T,), labels (T,))] for the answers in messages[start:] to train on.

    A label is the token itself in a target, and IGNORE elsewhere. An answer that begins the
    conversation is context. Raises RowError if there is no answer, or if one cannot be rendered.
    """
    chains: list[list[Turn]] = []
    for index, message in enumerate(messages):
        is_answer = message["role"] == "assistant" and index > 0
        if index < start or not is_answer or not is_learnt(message):
            continue
        turn = render_turn(tokenizer, messages, index, tools)
        if chains and turn.context.startswith("".join(chains[-1][-1])):
            chains[-1].append(turn)  # it continues the previous answer
        else:
            chains.append([turn])
    if not chains:
        raise RowError("without an answer")
    sequences = []
    for chain in chains:
        sequences += encode_chain(tokenizer, chain)
    return sequences


def encode_chain(tokenizer, turns: list[Turn]) -> list[tuple[list[int], list[int]]]:
    """[(input_ids (T,), labels (T,))] for answers that each continue the previous one.

    They form one sequence, tokenized once, if each context has the same tokens in it as alone.
    """
    ids, count_tokens = tokenize_with_counts(tokenizer, "".join(turns[-1]))
    labels = [IGNORE] * len(ids)
    for context, target in turns:
        start = count_tokens(len(context))
        end = count_tokens(len(context) + len(target))
        tail = ids_of_tail(tokenizer, context)
        if ids[:start][-len(tail) :] != tail:
            return [encode_turn(tokenizer, turn) for turn in turns]
        labels[start:end] = ids[start:end]
    return [(ids, labels)]


def tokenize_with_counts(tokenizer, text: str) -> tuple[list[int], Callable[[int], int]]:
    """(token ids (T,) of a text, function from N to the number of tokens in its first N
    characters)."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        first_characters = [begin for begin, _ in encoded.offset_mapping]
        return encoded.input_ids, functools.partial(bisect.bisect_left, first_characters)

    # Slow tokenizers do not give offsets.
    def count_tokens(length: int) -> int:
        return len(text_ids(tokenizer, text[:length]))

    return text_ids(tokenizer, text), count_tokens


def ids_of_tail(tokenizer, context: str) -> list[int]:
    """Token ids of the end of `context`, from its last special token on. Special tokens never merge
    with other text, so the ids before it do not depend on what follows."""
    begin = 0
    for mark in special_pattern(tokenizer).finditer(context):
        begin = mark.start()
    return list(cached_ids(tokenizer, len(tokenizer), context[begin:]))


@functools.lru_cache(maxsize=1024)
def cached_ids(tokenizer, num_tokens: int, text: str) -> tuple[int, ...]:
    """`text_ids`, cached: contexts have few different endings."""
    return tuple(text_ids(tokenizer, text))


def encode_turn(tokenizer, turn: Turn) -> tuple[list[int], list[int]]:
    """(input_ids (T,), labels (T,)) of an answer that would merge with its context.

    At inference, the context is tokenized alone and the model writes the answer after it. Raises
    RowError if that changes the text: some tokenizers begin every text with a space.
    """
    context_ids = text_ids(tokenizer, turn.context)
    target_ids = text_ids(tokenizer, turn.target)
    text = tokenizer.decode(context_ids + target_ids, clean_up_tokenization_spaces=False)
    if text != turn.context + turn.target:
        raise RowError("whose answer begins inside a token of the prompt")
    return context_ids + target_ids, [IGNORE] * len(context_ids) + target_ids


def text_ids(tokenizer, text: str) -> list[int]:
    """Token ids (T,) of a text that already contains its special tokens."""
    return tokenizer(text, add_special_tokens=False).input_ids


def prompt_ids(tokenizer, prompt: list[dict], tools: list[dict] | None = None) -> list[int]:
    """Token ids (T,) of a conversation up to where the assistant begins to write."""
    return text_ids(tokenizer, render_context(tokenizer, prompt, tools))


def literal_prompt_ids(tokenizer, prompt: list[dict]) -> list[int]:
    """`prompt_ids`, but special tokens inside the messages are plain text, so that they cannot open
    a turn."""
    if not any(special_pattern(tokenizer).search(text_of(message)) for message in prompt):
        return prompt_ids(tokenizer, prompt)
    with rendering():
        return tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )


def stop_tokens(tokenizer) -> list[int]:
    """Ids of the tokens that end an answer: the tokenizer's EOS, the end of a turn in the chat
    template, and those that the model came with (see core/hub.py)."""
    stops = {tokenizer.eos_token_id, *getattr(tokenizer, "stops_of_the_model", ())}
    if tokenizer.chat_template:
        try:
            rendered = apply_template(tokenizer, SHORT_CHAT)
        except RowError as error:
            raise ConfigError(
                "the chat template cannot be used for training; set instruction_template instead. "
                f"Every conversation is one {error}"
            ) from error
        stop, _ = find_end_of_turn(tokenizer, SHORT_CHAT, rendered)
        if stop:
            stops.add(tokenizer.convert_tokens_to_ids(stop))
    return sorted(stops)


# -- conversations to text ---------------------------------------------------------------------


def render_context(tokenizer, messages: list[dict], tools: list[dict] | None = None) -> str:
    """The input of the model before it writes. Raises RowError if the template drops a part."""
    tools = tools_of(messages, tools)
    check_marks(tokenizer, messages)

    def render(form: list[dict]) -> str:
        context = apply_template(tokenizer, form, tools, generation_prompt=True)
        check_context(form, tools, context)
        return context

    return first_without_error(render, template_forms(messages))


def render_turn(
    tokenizer, messages: list[dict], index: int, tools: list[dict] | None = None
) -> Turn:
    """The answer messages[index] as text. Raises RowError if the template drops a part."""
    tools = tools_of(messages, tools)
    messages = messages[: index + 1]
    check_marks(tokenizer, messages)

    def choices() -> Iterator[tuple[list[dict], str | None]]:
        for form in template_forms(messages):
            yield form, None
        # TRL's versions of some templates keep thoughts that the templates themselves drop.
        for template in training_templates(tokenizer):
            for form in template_forms(messages):
                yield form, template

    def render(choice: tuple[list[dict], str | None]) -> Turn:
        form, template = choice
        return render_last_turn(tokenizer, form, tools, template)

    return first_without_error(render, choices())


def first_without_error(render: Callable, choices: Iterable, problem: RowError | None = None):
    """The first result of `render` over `choices` without a RowError. If all fail, raises
    `problem`, or else the first error."""
    errors = [] if problem is None else [problem]
    for choice in choices:
        try:
            return render(choice)
        except RowError as error:
            errors.append(error)
    raise errors[0]


def render_last_turn(
    tokenizer, messages: list[dict], tools: list[dict] | None, template: str | None
) -> Turn:
    """The last message as text, by `template` if given, else by the tokenizer's own template."""
    earlier = messages[:-1]
    context = apply_template(tokenizer, earlier, tools, generation_prompt=True)
    check_context(earlier, tools, context)
    shown = context
    if template:
        shown = apply_template(tokenizer, earlier, tools, True, template)
    answered = apply_template(tokenizer, messages, tools, False, template)
    if not template and answered.startswith(context):
        return finish_turn(tokenizer, messages, tools, None, context, answered[len(context) :])

    opening = generation_prompt_of(tokenizer, earlier, tools, template, shown)
    problem = RowError(
        f"which the chat template renders without its generation prompt {opening!r}; start the "
        "answers with how it ends, or set instruction_template"
    )
    if not context.endswith(opening):
        raise problem

    def finish(start: int) -> Turn:
        return finish_turn(tokenizer, messages, tools, template, context, answered[start:])

    return first_without_error(finish, find_starts(tokenizer, answered, shown, opening), problem)


def finish_turn(
    tokenizer,
    messages: list[dict],
    tools: list[dict] | None,
    template: str | None,
    context: str,
    written: str,
) -> Turn:
    """The last message as a Turn of `context` and the beginning of `written`, the template's text
    after it. Raises RowError if a part of the message is missing there."""
    stop, end = find_end_of_turn(tokenizer, messages, written, tools, template)
    target = written[:end]
    opening = functools.partial(
        generation_prompt_of, tokenizer, messages[:-1], tools, None, context
    )
    check_answer(messages[-1], opening, target.removesuffix(stop))
    # Without a token that ends turns, use EOS.
    return Turn(context, target if stop else target + tokenizer.eos_token)


def find_starts(tokenizer, answered: str, shown: str, opening: str) -> list[int]:
    """Where an answer may begin in `answered`: after the text that the model was shown, or, if the
    answer changes that text, after each generation prompt, last first."""
    if answered.startswith(shown):
        return [len(shown)]
    if not special_pattern(tokenizer).search(opening):
        return []
    starts = [match.end() for match in re.finditer(re.escape(opening), answered)]
    return starts[::-1]


def apply_template(
    tokenizer,
    messages: list[dict],
    tools: list[dict] | None = None,
    generation_prompt: bool = False,
    template: str | None = None,
) -> str:
    """The text of `messages`; with `generation_prompt`, up to where the assistant begins."""
    with rendering():
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            chat_template=template,
            add_generation_prompt=generation_prompt,
        )


@contextlib.contextmanager
def rendering() -> Iterator[None]:
    """Raise RowError if a chat template fails on its input, ConfigError if it loops."""
    try:
        with time_limit(RENDER_SECONDS), memory_limit(RENDER_GIGABYTES):
            yield
    except (TimeoutError, MemoryError):
        raise ConfigError(
            f"the chat template takes more than {RENDER_SECONDS:g} s or {RENDER_GIGABYTES} GB for "
            "one conversation; give another one with chat_template_path or instruction_template"
        ) from None
    except Exception as error:  # by Jinja, or raised by the template for unsupported input
        raise RowError(f"which the chat template refuses: {error}") from error


def generation_prompt_of(
    tokenizer, messages: list[dict], tools: list[dict] | None, template: str | None, context: str
) -> str:
    """The generation prompt at the end of `context`; "" if it is unknown."""
    try:
        without = apply_template(tokenizer, messages, tools, False, template)
    except RowError:
        return ""
    return context[len(without) :] if context.startswith(without) else ""


def find_end_of_turn(
    tokenizer,
    messages: list[dict],
    written: str,
    tools: list[dict] | None = None,
    template: str | None = None,
) -> tuple[str, int]:
    """(the token that ends the last turn, or "", the index in `written` where it ends). `written`
    is the template's text for the turn."""
    content = text_of(messages[-1]).strip()
    content_end = 0
    if content and content in written:
        content_end = written.rindex(content) + len(content)
    tokens = []
    for token in special_pattern(tokenizer).finditer(written, content_end):
        # Keep only those at the end, with nothing but white space between them.
        if tokens and written[tokens[-1].end() : token.start()].strip():
            tokens = []
        tokens.append(token)
    if not tokens or written[tokens[-1].end() :].strip():
        return "", len(written)

    last = tokens[-1]
    if len(tokens) > 1:
        # After the token that ends a turn, some templates write another one at the very end.
        followed = render_followed(tokenizer, messages, tools, template)
        beginning = max(0, tokens[0].start() - len(content))
        for token in tokens:
            if written[beginning : token.end()] in followed:
                last = token
    return last.group(), last.end()


def render_followed(
    tokenizer, messages: list[dict], tools: list[dict] | None, template: str | None
) -> str:
    """The text of `messages` and one more message; "" if the template refuses that."""
    role = "tool" if messages[-1].get("tool_calls") else "user"
    try:
        return apply_template(
            tokenizer, [*messages, {"role": role, "content": "a"}], tools, False, template
        )
    except RowError:
        return ""


def special_pattern(tokenizer) -> re.Pattern:
    """A pattern that matches the special tokens of a tokenizer."""
    return cached_special_pattern(tokenizer, tokenizer.eos_token, len(tokenizer))


@functools.lru_cache(maxsize=16)
def cached_special_pattern(tokenizer, eos_token: str, num_tokens: int) -> re.Pattern:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.add(eos_token)
    # Longest first, because one token may be a prefix of another.
    by_length = sorted(special, key=lambda token: (-len(token), token))
    return re.compile("|".join(re.escape(token) for token in by_length))


@functools.lru_cache(maxsize=16)
def marks_of(tokenizer, template: str) -> frozenset[str]:
    """The special tokens that the tokenizer's chat template writes around messages."""
    marks = {tokenizer.eos_token}
    with contextlib.suppress(RowError):
        marks.update(special_pattern(tokenizer).findall(apply_template(tokenizer, SHORT_CHAT)))
    return frozenset(marks)


def tools_of(messages: list[dict], tools: list[dict] | None) -> list[dict] | None:
    """`tools`, or those in the first message."""
    return tools or (messages[0].get("tools") if messages else None)


def check_marks(tokenizer, messages: list[dict]) -> None:
    """Raise RowError for text that a template has rendered already, and warn of special tokens
    inside text."""
    for message in messages:
        text = text_of(message).strip()
        found = list(special_pattern(tokenizer).finditer(text))
        if not found:
            continue
        at_the_ends = [
            mark.group() for mark in found if mark.start() == 0 or mark.end() == len(text)
        ]
        for mark in at_the_ends:
            if mark in marks_of(tokenizer, str(tokenizer.chat_template)):
                raise RowError(f"whose texts already have the marks of the chat template ({mark})")
        warn_once(
            f"a text has the special token {found[0].group()} inside, which the model reads as such"
        )


# -- chat templates ----------------------------------------------------------------------------


def prepare_tokenizer(tokenizer, config: ModelConfig, needs_chat_template: bool = True) -> None:
    """Apply the options for special tokens, chat template and new tokens to the tokenizer, in
    place. `tokenizer.new_ids` has the ids of new tokens.

    Raises ConfigError if a chat template is needed and there is none.
    """
    tokenizer.new_ids = add_new_tokens(tokenizer, config)
    if config.eos_token:
        tokenizer.eos_token = known_token(tokenizer, "eos_token", config.eos_token)
    if config.pad_token:
        tokenizer.pad_token = known_token(tokenizer, "pad_token", config.pad_token)
    if tokenizer.pad_token is None:
        # Harmless: batches are masked by length, never by token id.
        tokenizer.pad_token = tokenizer.eos_token
    if config.instruction_template:
        tokenizer.chat_template = template_from_instruction(config.instruction_template, tokenizer)
    if config.chat_template_path:
        tokenizer.chat_template = read_chat_template(config.chat_template_path)
    if isinstance(tokenizer.chat_template, str):
        check_operations(tokenizer.chat_template)
    if needs_chat_template and not tokenizer.chat_template:
        raise ConfigError(
            f"{config.model_name_or_path} has no chat template; describe how a prompt is written, "
            f"for example {INSTRUCTION_TEMPLATE_EXAMPLE}, or start from an instruction-tuned model"
        )


def check_operations(template: str) -> None:
    """Raise ConfigError for a power in a chat template: 9**9**9 is a single operation that never
    ends and that no time limit stops."""
    import jinja2

    # Syntax errors are reported when the template is used.
    with contextlib.suppress(jinja2.TemplateSyntaxError):
        for line, kind, text in jinja2.Environment().lex(template):
            if kind == "operator" and text == "**":
                raise ConfigError(
                    f"the chat template has a power (**) in line {line}, which may take forever; "
                    "give another one with chat_template_path or instruction_template"
                )


def known_token(tokenizer, option: str, token: str) -> str:
    """Return the token if it is in the vocabulary, else raise ConfigError."""
    if token not in tokenizer.get_vocab():
        raise ConfigError(
            f"{option}={token} is not in the model's vocabulary; "
            f"add it: --new_special_tokens='{token}'"
        )
    return token


def read_chat_template(path: str) -> str:
    """The chat template in a file, or that of the model at `path`; raises ConfigError."""
    from transformers import AutoTokenizer

    if Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    with as_config_error(f"chat_template_path={path}: neither a file nor a model"):
        template = AutoTokenizer.from_pretrained(path).chat_template
    if not isinstance(template, str):
        raise ConfigError(
            f"chat_template_path={path}: that model does not have exactly one chat template"
        )
    return template


@functools.lru_cache(maxsize=16)
def training_templates(tokenizer) -> tuple[str, ...]:
    """TRL's version of the tokenizer's chat template for training, if there is one."""
    from trl.chat_template_utils import get_training_chat_template

    try:
        template = get_training_chat_template(tokenizer)
    except ValueError:  # TRL does not know it
        return ()
    return (template,) if template else ()


def template_from_instruction(text: str, tokenizer) -> str:
    """Convert an instruction template to a Jinja chat template.

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

    # Some tokenizers put BOS before every text; then the template needs it too.
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
    """Warn of names in braces that are not fields of an instruction template."""
    names_in_prompt = set(re.findall(r"\{\w+\}", prompt))
    names_after = set(re.findall(r"\{\w+\}", after_response))
    plain_text = (names_in_prompt - {"{instruction}", "{input}"}) | names_after
    if plain_text:
        warn_once(
            f"instruction_template: {', '.join(sorted(plain_text))} is used as plain text; the "
            "fields are {instruction} and {input}, followed by {response} once"
        )


def jinja_literal(text: str) -> str:
    """A Jinja expression that prints `text` verbatim."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"
