"""What the columns of a data set mean: their names in a format, and unused columns.

rename_columns       the data's column names  ->  names in formats, by the option `columns`
detect_format        names in formats         ->  "alpaca", "messages", ...
check_unused         lists unused columns; refuses those that may change the meaning of a row
suggest_columns      columns of no format     ->  a mapping that may fit, to paste
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from core.errors import MAX_NAMES_LISTED, ConfigError, unknown_name
from core.runtime import logger
from core.yaml_files import inline_yaml

# Columns that join the prompt of every format that has one, by `with_context` in core/messages.py.
CONTEXT_COLUMNS = ("system", "system_prompt", "history", "tools")

# A column whose name ends in one of these words, in the singular, belongs to the prompt or the
# answer: without it, a row would mean something else.
MEANINGFUL = {
    "article",
    "audio",
    "background",
    "context",
    "document",
    "function",
    "history",
    "image",
    "input",
    "instruction",
    "knowledge",
    "passage",
    "persona",
    "reasoning",
    "system",
    "thinking",
    "tool",
    "video",
}
# Columns that say who has written the text of a row.
SPEAKERS = ("role", "speaker")
MAX_NAME_LENGTH = 40  # of a column in messages: without a header, its name may be a long text

NO_OPTIONAL_COLUMNS: Mapping[str, Sequence[str]] = {}


# -- names -----------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """A column's name in lower case, without surrounding blanks."""
    return name.strip().casefold()


def rename_columns(
    columns: Sequence[str], mapping: Mapping[str, str | None], known: set[str], any_name: bool
) -> dict[str, str | None]:
    """{column of the data: its name in a format}, None for a column to drop.

    `mapping` is the option `columns`, {name: column of the data or None}. Other columns get the
    name in `known` that they match, ignoring case and surrounding blanks, or else keep their own.
    With `any_name`, columns may be given unknown names. Raises ConfigError for a name or column
    that does not exist, and for two columns with the same name.
    """
    names: dict[str, str | None] = {}
    for name, column in mapping.items():
        if column is None:
            names[find_column(columns, name)] = None
            continue
        if name in columns and column in known and column not in columns:
            swapped = f"{{{column}: {inline_yaml(name)}}}"
            raise ConfigError(f"in columns, the name of a format comes first; write {swapped}")
        if name not in known and not any_name:
            raise ConfigError(f"columns: {unknown_name('name', name, known)}")
        found = find_column(columns, column)
        if found in names:
            raise ConfigError(f"columns names the column {found} twice; keep one")
        names[found] = name

    for column in columns:
        if column in names:
            continue
        plain = plain_name(column)
        name = plain if plain in known else column
        # A column named by the option `columns` wins over one that happens to have the name.
        names[column] = None if name in mapping else name
    by_name: dict[str, str] = {}
    for column, name in names.items():
        if name is not None and name in by_name:
            raise ConfigError(
                f"the columns {by_name[name]!r} and {column!r} both stand for {name}; choose with "
                f"--columns='{{{name}: {inline_yaml(column)}}}'"
            )
        if name is not None:
            by_name[name] = column
    return names


def find_column(columns: Sequence[str], wanted: str) -> str:
    """The column of the data with this name; raises ConfigError with the nearest name."""
    if wanted in columns:
        return wanted
    alike = [column for column in columns if plain_name(column) == plain_name(wanted)]
    if len(alike) == 1:
        return alike[0]
    raise ConfigError(f"columns: {unknown_name('column of the data', wanted, columns)}")


def known_columns(
    formats: Mapping[str, Sequence[str]], optional: Mapping[str, Sequence[str]]
) -> set[str]:
    """The names of columns, required or optional, in all formats."""
    known = set()
    for names in (*formats.values(), *optional.values()):
        known.update(names)
    return known


# -- formats ---------------------------------------------------------------------------------------


def detect_format(
    columns: Sequence[str],
    formats: Mapping[str, Sequence[str]],
    wanted: str = "auto",
    optional: Mapping[str, Sequence[str]] = NO_OPTIONAL_COLUMNS,
    mapped: Sequence[str] = (),
) -> str:
    """The name of the one format in `formats` (name -> required columns) that fits the columns.

    A format that takes all columns of another one and more is preferred, and so is one with
    `mapped` columns, which the user has named. Raises ConfigError with the columns and the known
    formats if none or several fit: it never guesses.
    """
    if wanted != "auto":
        if not set(formats[wanted]) <= set(columns):
            raise ConfigError(
                f"dataset_format={wanted} needs {', '.join(formats[wanted])}; "
                f"found {', '.join(columns)}{suggest_columns(columns, {wanted: formats[wanted]})}"
            )
        return wanted

    # All formats whose columns are present, then those that no other one contains.
    fitting = [name for name, needs in formats.items() if set(needs) <= set(columns)]

    def is_contained(name: str, other: str) -> bool:
        needs, other_needs = set(formats[name]), set(formats[other])
        if needs < other_needs:
            return True
        # {input, output} with an instruction is a row in the alpaca format.
        takes = needs | set(optional.get(name, ()))
        other_takes = other_needs | set(optional.get(other, ()))
        return needs <= other_takes and not other_needs <= takes

    candidates = []
    for name in fitting:
        if not any(is_contained(name, other) for other in fitting if other != name):
            candidates.append(name)
    with_mapped = [name for name in candidates if set(formats[name]) & set(mapped)]
    candidates = with_mapped or candidates
    if len(candidates) > 1 and "text" in candidates:
        # With other columns present, `text` is usually the same row, already rendered.
        candidates.remove("text")

    if len(candidates) > 1:
        raise ConfigError(
            f"the columns {', '.join(columns)} fit {' and '.join(candidates)}; "
            "choose with dataset_format"
        )
    if not candidates:
        known = "; ".join(f"{name} ({', '.join(needs)})" for name, needs in formats.items())
        raise ConfigError(
            f"unknown data format: the columns are {shown_names(columns)}"
            f"{suggest_columns(columns, formats)}{ask_for_header(columns)}. Known: {known}"
        )
    return candidates[0]


def ask_for_header(columns: Sequence[str]) -> str:
    """A remedy if a name looks like a cell of data: a sentence, a date, or a long text."""
    for name in columns:
        if len(name) > MAX_NAME_LENGTH or re.search(r"[.?!]$|\d{4}-\d\d", name.strip()):
            return "; if the first line of the file is not a header, add one"
    return ""


def shown_names(columns: Sequence[str]) -> str:
    """The first names, for a message; long ones suggest that a file has no header."""
    shown = []
    for name in columns[:MAX_NAMES_LISTED]:
        is_long = len(name) > MAX_NAME_LENGTH
        shown.append(f"{name[:MAX_NAME_LENGTH]}..." if is_long else name)
    num_more = len(columns) - len(shown)
    more = f" and {num_more} more" if num_more else ""
    return ", ".join(shown) + more


# -- columns that are not used ---------------------------------------------------------------------


def is_meaningful(column: str) -> bool:
    """Whether a column's name, such as context or knowledge_context, says that a row would mean
    something else without it."""
    if plain_name(column) in ("system_prompt", "system_message", "reasoning_content"):
        return True
    *_, last_word = words_of(column) or [""]
    return last_word in MEANINGFUL or last_word.removesuffix("s") in MEANINGFUL


def check_unused(
    path: str,
    columns: Sequence[str],
    data_format: str,
    formats: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]],
    has_values: Callable[[str], bool],
    passes_on: bool,
) -> list[str]:
    """The columns that the format does not use. Raises ConfigError for one that may change the
    meaning of a row, if any row has a value there. With `passes_on` it is passed to the reward
    functions instead, and a warning says that it is not part of the prompt."""
    used = {*formats[data_format], *optional.get(data_format, ())}
    unused = [name for name in columns if name not in used]
    # A plain text is usually the whole row, already rendered.
    if list(formats[data_format]) == ["text"]:
        for name in unused:
            if plain_name(name) in SPEAKERS and has_values(name):
                raise ConfigError(
                    f"data {path}: each row seems to be one message, because of its column {name}; "
                    "write each conversation as one row with a column messages, or train on the "
                    f"texts alone: --columns='{{{inline_yaml(name)}: null}}'"
                )
        return unused
    for name in unused:
        if not is_meaningful(name) or not has_values(name):
            continue
        drop = f"--columns='{{{inline_yaml(name)}: null}}'"
        if passes_on:
            logger.warning(
                "data %s: the column %s is passed to the reward functions but is not part of "
                "the prompt; %s drops it",
                path,
                name,
                drop,
            )
            continue
        others = joining_columns(data_format, formats, optional, columns)
        as_other = ""
        if others and name not in others:
            mappings = " or ".join(
                f"--columns='{{{other}: {inline_yaml(name)}}}'" for other in others
            )
            as_other = f"say what it is ({mappings}), "
        raise ConfigError(
            f"data {path}: the column {name} may change what a row means, but the format "
            f"{data_format} does not use it; {as_other}join it to another column in the data, or "
            f"say that it is not needed: {drop}"
        )
    return unused


def joining_columns(
    data_format: str,
    formats: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]],
    columns: Sequence[str],
) -> list[str]:
    """The columns that may be added to the prompt of a format and that the data does not have."""
    needs = set(formats[data_format])
    names = list(optional.get(data_format, ()))
    for other_needs in formats.values():
        if needs < set(other_needs):
            names += [name for name in other_needs if name not in needs]
    return [name for name in names if name in ("context", "input") and name not in columns]


# -- a mapping that may fit ------------------------------------------------------------------------

# Words in the names of columns that may stand for a format's column, the likeliest first.
PROMPT_WORDS = (
    "question query prompt instruction problem request inquiry enquiry ask asked customer user "
    "human client caller description body input message subject issue ticket task frage"
)
ANSWER_WORDS = (
    "reply response answer output completion solution resolution agent assistant bot target gpt "
    "support reference gold ideal result antwort"
)
CHOSEN_WORDS = "chosen preferred better good win winner winning accepted best positive"
REJECTED_WORDS = "rejected worse bad lose loser losing dispreferred worst negative"
PROMPT_COLUMNS = ("prompt", "instruction", "question", "query", "problem")
ANSWER_COLUMNS = ("response", "answer", "output", "completion", "solution")
FAMILIAR_WORDS = {
    **dict.fromkeys(PROMPT_COLUMNS, PROMPT_WORDS),
    **dict.fromkeys(ANSWER_COLUMNS, ANSWER_WORDS),
    **dict.fromkeys(("chosen", "preferred", "good_answer"), CHOSEN_WORDS),
    **dict.fromkeys(("rejected", "bad_answer"), REJECTED_WORDS),
    "messages": "messages conversation conversations chat dialog dialogue turns thread transcript",
    "text": "text content body markdown",
    "answer_a": "a first 1",
    "answer_b": "b second 2",
    "preference": "preference preferred choice winner better label",
}
# Formats that are suggested first if several fit equally well.
SUGGESTED = (
    "prompt-response",
    "prompt-chosen-rejected",
    "question-answer",
    "prompt",
    "question",
)
# Columns with these words in their names are not texts.
OTHER_WORDS = set(
    re.findall(
        r"\w+",
        "id ids idx index hitid workerid date time timestamp at created updated score rating lang "
        "language category url status priority tag tags hash uuid name email worker channel group",
    )
)


def words_of(column: str) -> list[str]:
    """The words in a column's name: customer and message for customerMessage."""
    with_gaps = re.sub(r"(?<=[a-zäöüß])(?=[A-Z])", " ", column)
    return re.findall(r"[^\W_]+", with_gaps.casefold())


def suggest_columns(columns: Sequence[str], formats: Mapping[str, Sequence[str]]) -> str:
    """The part of a message that proposes the best mapping of the columns, by their names and
    order; "" if there is none. The user decides."""
    names = [name for name in SUGGESTED if name in formats]
    names += [name for name in formats if name not in names]
    best: dict[str, str] = {}
    best_score = 0
    for name in names:
        mapping, score = match_columns(columns, formats[name])
        if score > best_score:
            best, best_score = mapping, score
    renamed = {name: column for name, column in best.items() if name != column}
    if not renamed:
        return ""
    pairs = ", ".join(f"{name}: {inline_yaml(column)}" for name, column in renamed.items())
    return f"; say which is which, for example --columns='{{{pairs}}}'"


def match_columns(columns: Sequence[str], needs: Sequence[str]) -> tuple[dict[str, str], int]:
    """({column of a format: column of the data}, score of how well the names fit, 0 if not)."""
    free = []
    for column in columns:
        is_other = OTHER_WORDS.intersection(words_of(column)) and column not in needs
        if len(column) <= MAX_NAME_LENGTH and not is_other:
            free.append(column)
    mapping: dict[str, str] = {}
    score = 0
    for name in needs:
        column = name if name in free else most_familiar(free, name)
        if column:
            mapping[name] = column
            free.remove(column)
            score += 3 if column == name else 2
    missing = [name for name in needs if name not in mapping]
    if missing and not order_tells(needs, missing, free):
        return {}, 0
    mapping |= dict(zip(missing, free, strict=False))
    return {name: mapping[name] for name in needs}, max(score, 1)


def order_tells(needs: Sequence[str], missing: Sequence[str], free: Sequence[str]) -> bool:
    """Whether the order of the `free` columns may show which of them are a format's `missing` ones:
    a prompt comes before its answer."""
    if len(needs) == 1 or not {*missing} <= {*PROMPT_COLUMNS, *ANSWER_COLUMNS}:
        return False
    # For more than a prompt and an answer, only if the table has no other columns.
    if len(needs) == 2:
        return len(free) >= len(missing)
    return len(free) == len(missing)


def most_familiar(columns: Sequence[str], name: str) -> str | None:
    """The column with the likeliest word for a format's column; None if no column has one."""
    for word in FAMILIAR_WORDS.get(name, "").split():
        for column in columns:
            if word in words_of(column):
                return column
    return None
