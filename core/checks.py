"""Checks before the first step that need no model weights.

check_encoded_rows   encodes the data as training will, and refuses rows that would fail silently
describe_stage       the dry run: options, data, an example, estimates of time, memory and disk
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from core.chat import IGNORE, prepare_tokenizer, stop_tokens
from core.config import TrainingConfig
from core.data import usable_rows
from core.errors import ConfigError
from core.estimates import describe_disk, estimate_cost, estimate_disk
from core.model_config import check_attention, check_can_score, context_length
from core.runtime import logger
from core.trials import training_model

SIDES = ("training", "evaluation")  # of the split that `load_data` returns
MAX_ROWS_CHECKED = 2000  # rows of each side of the split that are encoded for the checks
MAX_SHARE_CUT = 0.1  # warn if a larger fraction of the training rows is cut

# Problems of a row, with the remedy. Each of these would fail silently in training.
ROW_PROBLEMS = {
    "no_target": "none of its tokens is a target: the chat template leaves the answer out",
    "no_stop": "its answer does not end in a stop token, so the model would never stop",
    "double_bos": "it begins with two bos tokens; remove one from the chat template or the data",
    "prompt_differs": "its prompt tokenizes differently without its answer, so what the model "
    "learns would never occur in use; end the template's prompt in a special token or a line break",
    "too_long": "it is longer than the model's context of {context} tokens; with "
    "max_seq_length={context} such rows are left out or cut, and counted",
    "in_training_data": "it is in the training data too, so its metrics would be too good; "
    "remove one of the two",
}

# One sequence of a row: input_ids (T,), and labels (T,) or None if no token is imitated.
TokenSequence = tuple[list[int], list[int] | None]


@dataclass
class EncodedRows:
    """The checked training rows of a stage, as tokens."""

    lengths: list[int] = field(default_factory=list)  # tokens in the longest sequence of each row
    targets: list[int] = field(default_factory=list)  # target tokens in the same sequences
    cut: int = 0  # rows that lose some of their tokens
    with_stop: int = 0  # rows with a target that still ends in a stop token
    example: TokenSequence | None = None  # the first sequence of the first row
    keys: set = field(default_factory=set)  # to detect rows on both sides of the split

    @property
    def share_cut(self) -> float:
        return self.cut / len(self.lengths) if self.lengths else 0.0

    @property
    def target_share(self) -> float:
        return sum(self.targets) / sum(self.lengths)


# -- bad rows ----------------------------------------------------------------------------------


def check_encoded_rows(
    stage: Any, tokenizer, context: int, warn: bool = False
) -> EncodedRows | None:
    """Encode the first rows of a stage, whose data is loaded, as training will.

    `context` is the number of tokens that the model can take. With `warn`, the rows that training
    will leave out are logged. Returns None for a stage that does not define `sequences`. Raises
    ConfigError, with the remedy, for a row that would teach nothing or the wrong thing.
    """
    if not stage.hands_on:
        tokenizer = copy.deepcopy(tokenizer)  # the next stage must not get this chat template
    is_chat = stage.needs_chat_template
    prepare_tokenizer(tokenizer, stage.config, is_chat)
    stops = stop_tokens(tokenizer)

    def encode(row):
        return row, stage.sequences(row, tokenizer, context)

    # The training rows come first: the evaluation rows are compared with them.
    training = EncodedRows()
    for side, rows in zip(SIDES, stage.data or (), strict=False):
        if not rows:
            continue
        for row, encoded in usable_rows(rows[:MAX_ROWS_CHECKED], encode, f"{side} data", warn):
            if encoded is None:
                return None
            sequences, is_cut = encoded

            key = row_key(row, sequences, compare_tokens=is_chat and not is_cut)
            if side == "evaluation" and key in training.keys:
                problem = "in_training_data"
            else:
                problem = find_row_problem(tokenizer, stops, sequences, is_cut, context, is_chat)
            if problem:
                explanation = ROW_PROBLEMS[problem].format(context=context)
                first_ids, _ = sequences[0]
                beginning = tokenizer.decode(first_ids)[:200]
                raise ConfigError(
                    f"a row of the {side} data: {explanation}. The row: {beginning!r}"
                )

            if side == "training":
                add_training_row(training, key, sequences, is_cut, stops)
    check_share_cut(stage.config, training)
    return training


def find_row_problem(
    tokenizer,
    stops: Sequence[int],
    sequences: Sequence[TokenSequence],
    is_cut: bool,
    context: int,
    is_chat: bool,
) -> str | None:
    """The key in ROW_PROBLEMS of an encoded row's problem, None if it has none.

    Plain text (not `is_chat`) has no prompt, and its pieces may begin and end anywhere.
    """
    bos = tokenizer.bos_token_id
    if any(ids[:2] == [bos, bos] for ids, _ in sequences):
        return "double_bos"
    if max(len(ids) for ids, _ in sequences) > context:
        return "too_long"
    if not is_chat:
        return None

    for ids, labels in sequences:
        if not labels:
            continue
        targets = [position for position, label in enumerate(labels) if label != IGNORE]
        target_ids = {ids[position] for position in targets}
        if target_ids <= set(stops):
            return "no_target"
        # A row that is cut may begin inside its prompt, where the tokens differ anyway.
        if not is_cut and prompt_differs(tokenizer, ids, prompt_length=targets[0]):
            return "prompt_differs"

    _, labels = sequences[-1]
    if labels and not is_cut and labels[-1] not in stops:
        return "no_stop"
    return None


def prompt_differs(tokenizer, ids: list[int], prompt_length: int) -> bool:
    """Whether the prompt tokenizes differently on its own, as it does at inference."""
    # Some tokens do not survive decoding and encoding; such a row says nothing about its prompt.
    if retokenize(tokenizer, ids) != ids:
        return False
    prompt = ids[:prompt_length]
    return retokenize(tokenizer, prompt) != prompt


def retokenize(tokenizer, ids: list[int]) -> list[int]:
    """The tokens of the text of `ids`."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def row_key(row, sequences: Sequence[TokenSequence], compare_tokens: bool) -> int:
    """A key that identifies a row: its tokens, or its text if the tokens are incomplete."""
    # Two texts may share their first piece, and two long prompts the part that is kept. Two pairs
    # may share one of their answers.
    if compare_tokens:
        return hash(tuple(tuple(ids) for ids, _ in sequences))
    return hash(str(row))


def add_training_row(
    training: EncodedRows,
    key: int,
    sequences: Sequence[TokenSequence],
    is_cut: bool,
    stops: Sequence[int],
) -> None:
    """Count one training row in `training`."""
    training.keys.add(key)
    ids, labels = max(sequences, key=sequence_length)
    training.lengths.append(len(ids))
    training.targets.append(sum(label != IGNORE for label in labels or ()))
    training.cut += is_cut
    training.with_stop += any(labels and labels[-1] in stops for _, labels in sequences)
    if training.example is None:
        training.example = sequences[0]


def sequence_length(sequence: TokenSequence) -> int:
    return len(sequence[0])


def check_share_cut(config: Any, training: EncodedRows) -> None:
    """Warn if many training rows are cut; raise ConfigError if then none ends in a stop token."""
    if training.share_cut <= MAX_SHARE_CUT:
        return
    limits = []
    for name in ("max_seq_length", "max_prompt_length"):
        limit = vars(config).get(name)
        if limit:
            limits.append(f"{name}={limit}")
    summary = f"{training.share_cut:.0%} of the training rows are cut at {' or '.join(limits)}"
    if not training.with_stop:
        raise ConfigError(f"{summary}, so none ends in a stop token; raise the limit")
    logger.warning("%s", summary)


# -- the dry run -------------------------------------------------------------------------------


def describe_stage(
    stage: Any, tokenizer, skeleton, with_cost: bool = True
) -> tuple[list[str], float]:
    """(lines on what a checked stage will do, bytes that it will write).

    `skeleton` is the model without its weights, on the meta device. `with_cost` adds estimates of
    time and memory, which take some seconds to measure.
    """
    lines = [labelled("options", changed_options(stage.config))]
    for kind in ("reference", "judge", "teacher"):
        if kind in stage.lineage:
            lines.append(labelled(kind, stage.lineage[kind]))
    if stage.lineage.get("data"):
        lines.append(labelled("data", describe_data(stage)))

    check_attention(stage.config, skeleton)
    if stage.task == "SEQ_CLS":
        check_can_score(skeleton.config)
    context = context_length(skeleton.config)
    encoded = check_encoded_rows(stage, tokenizer, context, warn=True)
    if encoded is None or not encoded.lengths or encoded.example is None:
        return lines, 0.0
    lines.append(labelled("tokens", describe_lengths(encoded)))
    example = highlight_targets(tokenizer, *encoded.example)
    lines.append(labelled("example", example.replace("\n", "\n" + labelled("", ""))))

    if not isinstance(stage.config, TrainingConfig):
        return lines, 0.0
    work = stage.work(encoded.lengths, encoded.target_share)
    model = training_model(stage.config, skeleton)
    num_trained = model.num_parameters(only_trainable=True)
    bytes_written = estimate_disk(stage.config, skeleton.num_parameters(), num_trained, work.steps)
    if with_cost:
        lines += [labelled(*line) for line in estimate_cost(stage, model, work)]
    lines.append(labelled("disk", describe_disk(stage.config, bytes_written)))
    return lines, bytes_written


def labelled(label: str, text: str) -> str:
    """A line of the dry run: the label in a column of 12 characters, then the text."""
    return f"{label:<12}{text}"


def changed_options(config: Any) -> str:
    """The options that differ from their defaults, as name=value."""
    # Without folder and name, which the plan of a chain shows already.
    defaults = type(config)()
    changed = []
    for option in fields(config):
        value = getattr(config, option.name)
        is_own_name = option.name in ("output_dir", "stage_name")
        if not is_own_name and value != getattr(defaults, option.name):
            changed.append(f"{option.name}={value}".replace("\n", "\\n"))
    return ", ".join(changed) or "the defaults"


def describe_data(stage: Any) -> str:
    """Where the data is, how it is split, and why its format was chosen."""
    data = stage.lineage["data"]
    num_training, num_evaluation = [len(rows) for rows in stage.data[:2]]
    described = []
    for name in data["format"].split(", "):
        columns = ", ".join(stage.config.formats[name])
        described.append(f"format {name}, since it has the columns {columns}")
    return (
        f"{data['path']}: {data['rows']} rows, {num_training} to train on and {num_evaluation} to "
        f"evaluate on; {'; '.join(described)}"
    )


def describe_lengths(encoded: EncodedRows) -> str:
    """The distribution of the number of tokens per row."""
    lengths = sorted(encoded.lengths)

    def quantile(share: float) -> int:
        index = int(share * len(lengths))
        return lengths[min(index, len(lengths) - 1)]

    figures = [
        f"minimum {lengths[0]}",
        f"median {quantile(0.5)}",
        f"90th percentile {quantile(0.9)}",
        f"99th percentile {quantile(0.99)}",
        f"maximum {lengths[-1]}",
    ]
    return f"per row: {', '.join(figures)}; {encoded.share_cut:.1%} of the rows are cut"


def highlight_targets(tokenizer, ids: Sequence[int], labels: Sequence[int] | None) -> str:
    """The text of a sequence with its targets in ⟦ ⟧."""

    def is_target(position: int) -> bool:
        return bool(labels) and labels[position] != IGNORE

    # Decode runs of tokens, because one character may span several tokens.
    text = ""
    for in_target, positions in itertools.groupby(range(len(ids)), key=is_target):
        run = [ids[position] for position in positions]
        part = tokenizer.decode(run)
        text += f"⟦{part}⟧" if in_target else part
    return text
