"""Convert what a user writes to option values: names, spellings, types, and error messages.

    merge_sources   options from several places, under the names of the config's fields
    check_options   their names and values, all at once
    coerce_fields   the values of one dataclass, by the annotations

An annotation decides what a text means. The conventions of other tools are understood too: None,
`none` or -1 for a default, capitals, and the names in core/other_names.py.
"""

from __future__ import annotations

import collections.abc
import functools
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from core.errors import ConfigError, unknown_name
from core.other_names import SAMPLING, SAMPLING_NAMES, SIMILAR_NAMES, translate
from core.yaml_files import parse_yaml

MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
SEQUENCES = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
SECRET_NAMES = re.compile("secret|password|key|auth|api|token(?!s)")
VALIDATION = ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)
NOTHING = ("none", "null")


@dataclass(frozen=True)
class Spellings:
    """Other spellings of the values of an option: `Annotated[..., Spellings({"bf16": ...})]`."""

    values: Mapping[str, Any]


# ---- annotations ---------------------------------------------------------------------------------


def plain_types(hint: Any) -> Iterator[Any]:
    """The members of an annotation: `Annotated[list[int], ...] | None` gives list[int] and None.

    A member with its own parser of text, such as Names, keeps its annotation.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for member in get_args(hint):
            yield from plain_types(member)
    elif origin is Annotated and not any(isinstance(m, BeforeValidator) for m in hint.__metadata__):
        yield from plain_types(hint.__origin__)
    else:
        yield hint


def choices_of(members: list[Any]) -> list[Any]:
    """The values allowed by the Literals among the members."""
    choices = []
    for member in members:
        if get_origin(member) is Literal:
            choices += get_args(member)
    return choices


def spellings_of(hint: Any) -> Mapping[str, Any]:
    """{other spelling in lower case: the value that it stands for} of an annotation."""
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Spellings):
            return mark.values
    return {}


def smallest_is_0(hint: Any) -> bool:
    """Whether an annotation is a number with minimum 0."""
    return get_origin(hint) is Annotated and Ge(0) in hint.__metadata__


def default_of(option: Field) -> Any:
    """The default of a field; MISSING if it has none."""
    if option.default_factory is not MISSING:
        return option.default_factory()
    return option.default


# ---- text to values ------------------------------------------------------------------------------


def read_value(hint: Any, option: Field, value: Any) -> Any:
    """`value` in the form that the annotation `hint` expects: the default that it stands for, a
    choice in its own capitalization, or the None, list or mapping that a text means. Else
    unchanged."""
    members = list(plain_types(hint))
    choices = choices_of(members)
    spellings = spellings_of(hint)
    if str(value).lower() in spellings:
        return spellings[str(value).lower()]
    if str(value).lower() == "false" and str not in members:
        value = False  # text from the command line
    if means_nothing(members, choices, value):
        value = None
    if means_default(hint, members, option, value):
        return default_of(option)
    if not isinstance(value, str):
        return value
    for choice in choices:
        if isinstance(choice, str) and choice.lower() == value.lower():
            return choice
    if str in members:
        return value
    return read_container(members, value)


def means_nothing(members: list[Any], choices: list[Any], value: Any) -> bool:
    """Whether a value is a word for None, or is false although the option is not a boolean.

    If an option has "none" among its choices, it means that choice.
    """
    if bool in members or value in choices:
        return value in NOTHING and str in members and bool in members
    is_word = isinstance(value, str) and value.lower() in NOTHING
    is_plain_text = str in members and type(None) not in members
    if is_word:
        return not is_plain_text
    # For a number, false is 0, which may be out of bounds.
    is_number = int in members or float in members
    return value is False and not is_number


def means_default(hint: Any, members: list[Any], option: Field, value: Any) -> bool:
    """Whether a value that the annotation does not allow stands for the default, as in other tools:
    None if nothing is chosen, and -1 if 0 disables something."""
    default = default_of(option)
    if default is MISSING:
        return False
    if value is None:
        return type(None) not in members
    return int in members and smallest_is_0(hint) and default == 0 and str(value) == "-1"


def read_container(members: list[Any], value: str) -> Any:
    """Parse a text as the list or mapping among the members of an annotation; else return it
    unchanged."""
    # YAML syntax is parsed as YAML; a plain list may also be written a,b,c.
    origins = [get_origin(member) or member for member in members]
    if any(origin in MAPPINGS for origin in origins):
        return parse_yaml(value) or {}
    if any(origin in SEQUENCES for origin in origins):
        if value.strip().startswith("["):
            return parse_yaml(value)
        parts = [part.strip() for part in value.split(",")]
        return [part for part in parts if part]
    return value


# ---- one dataclass -------------------------------------------------------------------------------


@functools.cache
def field_readers(config_class: type) -> dict[str, TypeAdapter]:
    """{field: validator and converter of its values}, by the annotations of a dataclass."""
    hints = get_type_hints(config_class, include_extras=True)
    readers = {}
    for option in fields(config_class):
        hint = hints[option.name]
        from_text = BeforeValidator(functools.partial(read_value, hint, option))
        annotation: Any = Annotated[hint, from_text]
        readers[option.name] = TypeAdapter(annotation, config=VALIDATION)
    return readers


def check_values(config_class: type, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """({field: converted value}, problems with the others), by the annotations of a dataclass."""
    readers = field_readers(config_class)
    converted, problems = {}, []
    for name, value in values.items():
        try:
            converted[name] = readers[name].validate_python(value)
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            # A secret may have been given to the wrong option, for example use_auth_token.
            shown = "" if SECRET_NAMES.search(name) else f"={value!r}"
            problems.append(f"{name}{shown}: {message[:1].lower()}{message[1:]}")
    return converted, problems


def coerce_fields(config: Any) -> None:
    """Convert every field of a dataclass to its annotation ("2e-4" to 0.0002), in place.

    Raises ConfigError naming the fields. pydantic's dataclasses would do this too, but only for
    classes with pydantic's decorator: recipes use the decorator of the standard library.
    """
    names = [option.name for option in fields(config)]
    values = {name: getattr(config, name) for name in names}
    converted, problems = check_values(type(config), values)
    if problems:
        raise ConfigError(*problems)
    for name, value in converted.items():
        setattr(config, name, value)


# ---- names and values ----------------------------------------------------------------------------


def resolve_names(config_class: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` by field name. Raises ConfigError for unknown names, and for two names of one
    field."""
    replaced, problems, _ = merge_sources(config_class, [values])
    problems += unknown_names(config_class, replaced)
    if problems:
        raise ConfigError(*problems)
    return replaced


def merge_sources(
    config_class: Any, sources: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Merge several sources, later ones winning: (options by field name, problems, notes on options
    without effect). Unknown names are kept unchanged."""
    merged: dict[str, Any] = {}
    problems: list[str] = []
    notes: list[str] = []
    for source in sources:
        # Per source: an alias in one and the name in another are valid, and the later one wins.
        values, wrong, without_effect = translate(config_class, source)
        merged |= values
        problems += wrong
        notes += without_effect
    return merged, problems, notes


def unknown_names(config_class: Any, values: Mapping[str, Any]) -> list[str]:
    """A message for each name that is not an option, with the nearest one."""
    names = {option.name for option in fields(config_class)}
    known = names | set(config_class.aliases)
    sentences = []
    for name, value in values.items():
        if name in names:
            continue
        if name in SAMPLING_NAMES and SAMPLING in names:
            inner = f"{{{SAMPLING_NAMES[name]}: {value}}}"
            sentences.append(f"unknown option {name!r}; it belongs to {SAMPLING}='{inner}'")
        elif SIMILAR_NAMES.get(name) in names:
            sentences.append(f"unknown option {name!r}; see {SIMILAR_NAMES[name]}")
        else:
            sentences.append(unknown_name("option", name, known))
    return sentences


def check_options(config_class: Any, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(checked values by field name, problems with the others): checks names and values."""
    names = {option.name for option in fields(config_class)}
    known = {name: value for name, value in values.items() if name in names}
    converted, problems = check_values(config_class, known)
    return converted, unknown_names(config_class, values) + problems
