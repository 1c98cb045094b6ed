"""The command line: parsing, and `--help` from the comments beside the options."""

from __future__ import annotations

import ast
import inspect
import io
import re
import shutil
import sys
import textwrap
import tokenize
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError

from core.errors import ConfigError
from core.options import MAPPINGS, SEQUENCES, plain_types
from core.recipe_files import get_config_class
from core.yaml_files import load_yaml

# ---- parsing -------------------------------------------------------------------------------------


def read_command_line(arguments: Sequence[str]) -> tuple[list[str], dict[str, str | None]]:
    """(words, options) of a command line, where options are --name=value, --name value or --name.

    All values are text: an option's annotation, not the form of the text, decides its type. Raises
    ConfigError for an option that is given twice.
    """
    import fire

    words: list[str] = []
    options: dict[str, str] = {}

    @fire.decorators.SetParseFn(str)
    def collect(*positional, **named):
        words.extend(positional)
        options.update(named)

    # Fire would silently use the last of two.
    refuse_repetition(arguments)
    fire.Fire(collect, command=list(arguments))
    nothing = ("None", "null")
    return words, {name: None if options[name] in nothing else options[name] for name in options}


def read_options_file(path: str | None) -> dict[str, Any]:
    """The options in a recipe's YAML file, {} without a file; raises ConfigError."""
    if path is None:
        return {}
    options = load_yaml(path)
    if "stages" in options or "stage_configs" in options:
        raise ConfigError(f"{path} is the file of a chain; run: python chain.py {path}")
    return options


def read_switch(name: str, value: Any) -> bool:
    """The boolean value of an option that is not in a config. Raises ConfigError."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ConfigError(f"{name}={value!r}: give true or false") from None


def refuse_repetition(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an option that is given twice, or has no name."""
    flags = [argument for argument in arguments if argument.startswith("--")]
    names = [flag.partition("=")[0].strip("-").replace("-", "_") for flag in flags]
    for name, count in Counter(names).items():
        if not name:
            raise ConfigError("an option without a name; options are written --name=value")
        if count > 1:
            raise ConfigError(f"--{name} was given {count} times; keep one")


# ---- comments of a config class ------------------------------------------------------------------

# Directives for tools, which are not help text.
PRAGMA = re.compile(r"\s*#?\s*\b(noqa|type: ignore|fmt: \w+|pragma: |pylint: ).*")
MAX_HEADING_LENGTH = 50


@dataclass
class Comment:
    """A comment in the source of a config class."""

    text: str
    column: int
    alone: bool  # no code on the same line


@dataclass
class FieldComments:
    """The comments on an option in the source."""

    beside: str  # comment on the lines of the field
    above: list[str]  # comment lines directly above


def read_comments(source: str) -> dict[int, Comment]:
    """{line number: comment} of a Python source."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            alone = token.line.strip().startswith("#")
            text = PRAGMA.sub("", token.string.lstrip("#").strip())
            comments[line] = Comment(text, column, alone)
    return comments


def read_field_comments(config_class: type) -> dict[str, FieldComments]:
    """{field: its comments} of a class, without its parents.

    Empty if there is no source, as for a class typed at a prompt.
    """
    try:
        source = textwrap.dedent(inspect.getsource(config_class))
        class_body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
        comments = read_comments(source)
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return {}
    described = {}
    for node in class_body:
        # A field has an annotation; methods and constants have none.
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            described[node.target.id] = comments_of_field(node, comments)
    return described


def comments_of_field(node: ast.AnnAssign, comments: dict[int, Comment]) -> FieldComments:
    """The comments of one field, which may span several lines."""
    last_line = node.end_lineno or node.lineno
    beside = [comments[line].text for line in range(node.lineno, last_line + 1) if line in comments]
    # A comment beside a field may continue below, indented further than the fields.
    line = last_line + 1
    while line in comments and comments[line].alone and comments[line].column > node.col_offset:
        beside.append(comments[line].text)
        line += 1
    above: list[str] = []
    line = node.lineno - 1
    while line in comments and comments[line].alone and comments[line].column == node.col_offset:
        above.insert(0, comments[line].text)
        line -= 1
    return FieldComments(" ".join(beside).strip(), above)


def as_heading(lines: Sequence[str]) -> str:
    """The comment above a field as heading, if it is one short line and not a sentence; else ""."""
    text = " ".join(lines).strip("-=# ")
    if len(lines) != 1 or len(text) > MAX_HEADING_LENGTH or text.endswith("."):
        return ""
    return text


# ---- the help text of an option ------------------------------------------------------------------

# Placeholder for values of a type.
VALUE_WORDS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
MAX_DEFAULT_LENGTH = 60
DRY_RUN = ("--dry_run", "check options, data and memory, print the plan, then stop")


def value_word(hint: Any) -> str:
    """The placeholder for an option's value, such as NUMBER; "" if the annotation is unknown."""
    members = [member for member in unwrap(hint) if member is not type(None)]
    origins = [get_origin(member) or member for member in members]
    if any(origin in MAPPINGS for origin in origins):
        return "{NAME: VALUE}"
    if any(origin in SEQUENCES for origin in origins):
        return "A,B,..."
    if Literal in origins:
        return "NAME"
    if bool in origins and str in origins:
        return "true|false|TEXT"
    if bool in origins:
        return "true|false"
    for kind, word in VALUE_WORDS.items():
        if kind in origins:
            return word
    return ""


def unwrap(hint: Any) -> list[Any]:
    """The members of an annotation, without metadata."""
    members = []
    for member in plain_types(hint):
        if get_origin(member) is Annotated:
            members.extend(unwrap(member.__origin__))
        else:
            members.append(member)
    return members


def allowed_values(hint: Any) -> str:
    """The values allowed by a Literal, or by a list of Literals; "" for other annotations."""
    for member in unwrap(hint):
        if get_origin(member) is Literal:
            return "one of " + ", ".join(map(str, get_args(member)))
        for item in get_args(member):
            if get_origin(item) is Literal:
                return "any of " + ", ".join(map(str, get_args(item)))
    return ""


def bounds(hint: Any) -> str:
    """The bounds of a number, such as "from 0 to below 1"; "" if they are obvious or absent."""
    if get_origin(hint) is not Annotated:
        parts = [bounds(member) for member in get_args(hint)]
        return next((part for part in parts if part), "")
    lower, upper = "", ""
    for rule in hint.__metadata__:
        if isinstance(rule, Gt):
            lower = f"above {rule.gt}"
        elif isinstance(rule, Ge):
            lower = f"from {rule.ge}"
        elif isinstance(rule, Lt):
            upper = f"below {rule.lt}"
        elif isinstance(rule, Le):
            upper = f"to {rule.le}"
    # A count or a size: its lower bound is obvious.
    if lower.startswith("from") and not upper:
        return ""
    if lower.startswith("from") and upper.startswith("below"):
        upper = f"to {upper}"
    return " ".join(part for part in (lower, upper) if part)


def shown_default(option: Field) -> str:
    """The default of an option as a user would write it; "" if it is empty or cannot be shown."""
    value = option.default
    if option.default_factory is not MISSING:
        try:
            value = option.default_factory()
        except Exception:  # a user-defined factory, which may fail at this point
            return ""
    if value is MISSING or value == "":
        return ""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple | set | frozenset):
        value = ",".join(str(item) for item in value)
    text = str(value).replace("\n", r"\n")
    if len(text) > MAX_DEFAULT_LENGTH:
        return text[: MAX_DEFAULT_LENGTH - 3] + "..."
    return text


def describe_option(option: Field, hint: Any, comment: str) -> str:
    """The help text of an option: its comment, allowed values and default."""
    default = shown_default(option)
    details = [allowed_values(hint), bounds(hint), f"default: {default}" if default else ""]
    details = [detail for detail in details if detail]
    if not details:
        return comment
    return f"{comment} ({'; '.join(details)})".strip()


# ---- --help --------------------------------------------------------------------------------------

COLUMN = 36  # in which help texts begin
MIN_WIDTH, MAX_WIDTH = 70, 110


def option_help(config_class: Any, without: Collection[str] = ()) -> str:
    """The options of a config class in groups, with names, explanation, allowed values and default;
    without the options in `without`.

    The first group has the options in `everyday`. Section comments between the fields are the
    headings of the other groups; options of the class itself come before those of its parents. A
    field is explained by `metadata={"help": ...}`, the comment beside it, or the comment above it.
    """
    hints = read_hints(config_class)
    names = option_names(config_class)
    options = {option.name: option for option in fields(config_class)}
    groups: dict[str, list[tuple[str, str]]] = {}
    lines: dict[str, tuple[str, str]] = {}
    for name, (heading, comment) in explain_fields(config_class).items():
        if name in without:
            continue
        left = ", ".join(names[name])
        word = value_word(hints.get(name))
        if word:
            left += f"={word}"
        lines[name] = (left, describe_option(options[name], hints.get(name), comment))
        groups.setdefault(heading, []).append(lines[name])

    everyday = [config_class.aliases.get(name, name) for name in config_class.everyday]
    first = [lines[name] for name in everyday if name in lines]
    if "dry_run" not in {*options, *without}:
        first.append(DRY_RUN)
    blocks = [format_group("common options", first)]
    for heading, group in groups.items():
        rest = [line for line in group if line not in first]
        if rest:
            blocks.append(format_group(heading, rest))
    return "\n\n".join(blocks)


def read_hints(config_class: Any) -> dict[str, Any]:
    """The annotations of the fields; {} if one cannot be resolved at runtime."""
    try:
        return get_type_hints(config_class, include_extras=True)
    except (NameError, TypeError):
        return {}


def option_names(config_class: Any) -> dict[str, list[str]]:
    """{field: its spellings, short ones first}."""
    names: dict[str, list[str]] = {option.name: [] for option in fields(config_class)}
    for alias, name in config_class.aliases.items():
        if name in names:
            names[name].append(f"--{alias}")
    for name, spellings in names.items():
        spellings.append(f"--{name}")
    return names


def explain_fields(config_class: Any) -> dict[str, tuple[str, str]]:
    """{field: (heading of its group, explanation)}, the fields of the class before its parents'."""
    help_of = {option.name: option.metadata.get("help") for option in fields(config_class)}
    explained: dict[str, tuple[str, str]] = {}
    for cls in config_class.__mro__:
        # Skip `object` and plain classes that only add methods.
        if "__dataclass_fields__" not in vars(cls):
            continue
        heading = f"{cls.__name__.removesuffix('Config')} options"
        comments = read_field_comments(cls)
        for name in inspect.get_annotations(cls):
            # A ClassVar is annotated too, but is not an option.
            if name not in help_of:
                continue
            comment = comments.get(name, FieldComments("", []))
            # A comment above is a heading only if the field is explained without it.
            text = help_of[name] or comment.beside
            if text:
                heading = as_heading(comment.above) or heading
            else:
                text = " ".join(comment.above)
            # A subclass that only changes a default keeps its parent's explanation.
            known_heading, known_text = explained.get(name, (heading, ""))
            explained[name] = (known_heading, known_text or text)
    return explained


def format_group(heading: str, lines: Sequence[tuple[str, str]]) -> str:
    """A heading and two columns, wrapped to the terminal."""
    terminal_width = shutil.get_terminal_size().columns
    width = min(max(terminal_width, MIN_WIDTH), MAX_WIDTH)
    formatted = [f"{heading}:"]
    for left, text in lines:
        start = f"  {left}"
        # A long name gets its own line.
        if len(start) > COLUMN - 2:
            formatted.append(start)
            start = ""
        wrapped = textwrap.fill(
            text,
            width,
            initial_indent=start.ljust(COLUMN),
            subsequent_indent=" " * COLUMN,
            break_long_words=False,
            break_on_hyphens=False,
        )
        # `fill` of an empty text is empty.
        formatted.append(wrapped or start.rstrip())
    return "\n".join(line for line in formatted if line)


def help_text(stage_class: Any, doc: str, arguments: Sequence[str]) -> str:
    """The docstring of a recipe and its options.

    If a recipe stands for several others, like rl.py, an option may choose the one to show:
    `--algorithm=grpo --help`.
    """
    others = [argument for argument in arguments if argument not in ("-h", "--help")]
    try:
        _, options = read_command_line(others)
    except ConfigError:
        options = {}  # show help even if the options are malformed
    if options:
        chosen, *_ = stage_class.resolve(options)
        if chosen is not stage_class:
            stage_class, doc = chosen, sys.modules[chosen.__module__].__doc__
    options_text = option_help(get_config_class(stage_class))
    return f"{(doc or '').strip()}\n\n{options_text}".strip()
