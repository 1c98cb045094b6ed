"""What can be known before the first step, without the model's weights.

check_encoded_rows   bad rows: encodes the data as training will, and refuses what teaches nothing
describe_stage       the dry run: options, data, an example, estimates of time, memory and disk
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from core.adapters import add_adapter
from core.chat import IGNORE, prepare_tokenizer, stop_tokens
from core.config import TrainingConfig
from core.data import usable_rows
from core.errors import ConfigError
from core.model_config import check_can_score, context_length
from core.runtime import compute_dtype, default_device, logger

SIDES = ("training", "evaluation")  # of the split that `load_data` returns
MAX_ROWS_CHECKED = 2000  # rows of each side of the split that are encoded for the checks
UTILIZATION = 0.4  # of the speed of a matrix product, as is usual in training
MAX_SHARE_CUT = 0.1  # cutting more of the training rows than this is worth a warning

# What can be wrong with a row, and the remedy. Each of these would fail silently in training.
ROW_PROBLEMS = {
    "no_target": "none of its tokens is a target; the chat template leaves the answer out",
    "no_stop": "its answer does not end in a stop token, so the model would never stop",
    "double_bos": "it begins with two bos tokens; remove one from the chat template or the data",
    "prompt_differs": "its prompt tokenizes differently without its answer, so what the model "
    "learns would never occur in use; end the template's prompt in a special token or a line break",
    "too_long": "it is longer than the model's context of {context} tokens; with "
    "max_seq_length={context} such rows are left out or cut, and counted",
    "in_training_data": "it is in the training data too, so its metrics would be too good; "
    "remove one of the two",
}

# One sequence of a row: input_ids (T,), and labels (T,) or None where no token is imitated.
TokenSequence = tuple[list[int], list[int] | None]


@dataclass
class EncodedRows:
    """What the checked training rows of a stage become as tokens."""

    lengths: list[int] = field(default_factory=list)  # tokens of the longest sequence of each row
    cut: int = 0  # rows that lose some of their tokens
    with_stop: int = 0  # rows of which a target still ends in a stop token
    example: TokenSequence | None = None  # the first sequence of the first row
    keys: set = field(default_factory=set)  # to recognize a row that is on both sides of the split

    @property
    def share_cut(self) -> float:
        return self.cut / len(self.lengths) if self.lengths else 0.0


# -- bad rows ----------------------------------------------------------------------------------


def check_encoded_rows(
    stage: Any, tokenizer, context: int, warn: bool = False
) -> EncodedRows | None:
    """Encode the first rows of a stage whose data is loaded, as its training will.

    `context` is the number of tokens that the model can take. With `warn`, the rows that training
    will leave out are logged. Returns None for a stage that does not define `sequences`. Raises
    ConfigError, with the remedy, for a row that would teach nothing, or something else than meant.
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

            keys = row_keys(row, sequences, compare_tokens=is_chat and not is_cut)
            if side == "evaluation" and keys & training.keys:
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
                add_training_row(training, keys, sequences, is_cut, stops)
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
    """Which of ROW_PROBLEMS an encoded row has, None if it has none.

    Plain text (not `is_chat`) has no prompt, so a piece of it may begin and end anywhere.
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
        # A row that is cut may begin in the middle of its prompt, where the tokens differ anyway.
        if not is_cut and prompt_differs(tokenizer, ids, prompt_length=targets[0]):
            return "prompt_differs"

    _, labels = sequences[-1]
    if labels and not is_cut and labels[-1] not in stops:
        return "no_stop"
    return None


def prompt_differs(tokenizer, ids: list[int], prompt_length: int) -> bool:
    """Whether the prompt has other tokens when it stands alone, as it does in use."""
    # Some tokens do not survive the way to text and back; such a row tells nothing of its prompt.
    if retokenize(tokenizer, ids) != ids:
        return False
    prompt = ids[:prompt_length]
    return retokenize(tokenizer, prompt) != prompt


def retokenize(tokenizer, ids: list[int]) -> list[int]:
    """The tokens of the text of `ids`."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def row_keys(row, sequences: Sequence[TokenSequence], compare_tokens: bool) -> set:
    """What tells a row from others: its tokens, or its text where these are only a part of it."""
    # Two texts may share their first piece, and two long prompts the part that is not cut.
    if compare_tokens:
        return {hash(tuple(ids)) for ids, _ in sequences}
    return {str(row)}


def add_training_row(
    training: EncodedRows,
    keys: set,
    sequences: Sequence[TokenSequence],
    is_cut: bool,
    stops: Sequence[int],
) -> None:
    """Count one training row in `training`."""
    training.keys |= keys
    longest = max(len(ids) for ids, _ in sequences)
    training.lengths.append(longest)
    training.cut += is_cut
    training.with_stop += any(labels and labels[-1] in stops for _, labels in sequences)
    if training.example is None:
        training.example = sequences[0]


def check_share_cut(config: Any, training: EncodedRows) -> None:
    """Warn if many training rows are cut. Raises ConfigError if then none ends in a stop token."""
    if training.share_cut <= MAX_SHARE_CUT:
        return
    limits = []
    for name in ("max_seq_length", "max_prompt_length"):
        limit = vars(config).get(name)
        if limit:
            limits.append(f"{name}={limit}")
    summary = f"{training.share_cut:.0%} of the training rows are cut at {' or '.join(limits)}"
    if not training.with_stop:
        raise ConfigError(f"{summary}, so that none ends in a stop token; raise the limit")
    logger.warning("%s", summary)


# -- the dry run -------------------------------------------------------------------------------


def describe_stage(stage: Any, tokenizer, skeleton) -> tuple[list[str], float]:
    """(lines on what a checked stage will do, bytes that it will write).

    `skeleton` is the model without its weights, on the meta device.
    """
    lines = [labelled("options", changed_options(stage.config))]
    for kind in ("reference", "judge", "teacher"):
        if kind in stage.lineage:
            lines.append(labelled(kind, stage.lineage[kind]))
    if stage.lineage.get("data"):
        lines.append(labelled("data", describe_data(stage)))

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
    cost_lines, bytes_written = estimate_cost(stage, skeleton, encoded.lengths)
    return lines + cost_lines, bytes_written


def labelled(label: str, text: str) -> str:
    """A line of the dry run: the label in a column of 12 characters, then the text."""
    return f"{label:<12}{text}"


def changed_options(config: Any) -> str:
    """The options that differ from their defaults, as name=value."""
    # The folder and the name are no news: the plan of a chain shows both.
    defaults = type(config)()
    changed = []
    for option in fields(config):
        value = getattr(config, option.name)
        is_own_name = option.name in ("output_dir", "stage_name")
        if not is_own_name and value != getattr(defaults, option.name):
            changed.append(f"{option.name}={value}")
    return ", ".join(changed) or "the defaults"


def describe_data(stage: Any) -> str:
    """Where the data is, how it is split, and why it was read in its format."""
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
    """The distribution of the tokens in a row."""
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

    # Tokens are decoded in runs: one character may be spread over several of them.
    text = ""
    for in_target, positions in itertools.groupby(range(len(ids)), key=is_target):
        run = [ids[position] for position in positions]
        part = tokenizer.decode(run)
        text += f"⟦{part}⟧" if in_target else part
    return text


# -- estimates ---------------------------------------------------------------------------------


def estimate_cost(stage: Any, skeleton, lengths: Sequence[int]) -> tuple[list[str], float]:
    """(lines on time, memory and disk with the figures behind them, bytes that will be written).

    From the number of parameters, the rows' lengths in tokens, and the measured speed of a matrix
    product on this machine: an order of magnitude.
    """
    config = stage.config
    num_weights = skeleton.num_parameters()
    num_trained = count_trained_weights(config, skeleton)
    steps, tokens, passes, batch_rows = stage.work(lengths)
    longest = max(lengths)

    # A pass takes one multiplication and one addition for each weight and token.
    flop = 2 * num_weights * tokens * passes
    speed = matmul_speed(compute_dtype(config.torch_dtype))  # FLOP/s
    minutes = flop / (UTILIZATION * speed) / 60
    time = (
        f"about {minutes:.1f} minutes: {steps} steps, {tokens / 1e3:,.0f} thousand tokens, "
        f"{passes:g} passes, {num_weights / 1e6:,.0f} million weights: "
        f"{flop / 1e12:,.0f} TFLOP at {UTILIZATION:.0%} of the {speed / 1e9:,.0f} GFLOP/s "
        "measured here"
    )

    # While training, a weight has a gradient and the two moments of Adam, in float32.
    weights_gb = num_weights * bytes_per_weight(config) / 1e9
    optimizer_gb = 12 * num_trained / 1e9
    activations_gb = activation_bytes(config, skeleton, batch_rows, longest) / 1e9
    memory_gb = weights_gb + optimizer_gb + activations_gb
    memory = (
        f"about {memory_gb:.1f} GB: weights {weights_gb:.1f}, gradients and optimizer of "
        f"{num_trained / 1e6:,.1f} million trained weights {optimizer_gb:.1f}, activations of "
        f"{batch_rows} rows of {longest} tokens {activations_gb:.1f}"
    )

    disk_bytes = estimate_disk_bytes(config, num_weights, num_trained, steps)
    disk = (
        f"about {disk_bytes / 1e9:.1f} GB: the model in float32, the adapter, "
        f"{checkpoints_kept(config.save_total_limit)}"
    )
    lines = [labelled("time", time), labelled("memory", memory), labelled("disk", disk)]
    return lines, float(disk_bytes)


def estimate_fit(config: Any, rows: int, lengths: Sequence[int]) -> tuple[int, float, float, int]:
    """(optimizer steps, tokens, passes over a token, rows at a time) of a training by `fit` on
    `rows` rows, whose `lengths` in tokens may be those of a sample."""
    batch_size = config.per_device_train_batch_size
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rows_per_step = batch_size * config.gradient_accumulation_steps * processes
    steps_per_epoch = math.ceil(rows / rows_per_step)
    steps = config.max_steps or math.ceil(steps_per_epoch * config.num_train_epochs)
    rows_seen = rows * steps / steps_per_epoch
    tokens = statistics.fmean(lengths) * rows_seen
    # A backward pass counts as two, and as one where only an adapter trains: the gradients of the
    # weights are half of its work.
    passes = 2.0 if config.lora_r else 3.0
    return steps, tokens, passes, min(batch_size, rows)


def count_trained_weights(config: TrainingConfig, skeleton) -> int:
    """The number of weights that train: all, or those of an adapter. Raises ConfigError where the
    model takes no such adapter."""
    return add_adapter(copy.deepcopy(skeleton), config).num_parameters(only_trainable=True)


def bytes_per_weight(config: TrainingConfig) -> float:
    """Bytes that a weight of the model takes in memory, on average."""
    # Half a byte and the quantization constants, beside layers that are not quantized.
    if config.use_4bit:
        return 0.6
    if config.use_8bit:
        return 1
    return config.weight_dtype.itemsize


def activation_bytes(config: TrainingConfig, skeleton, batch_rows: int, length: int) -> float:
    """Bytes of the activations that a forward pass keeps for the backward pass."""
    model = skeleton.config.get_text_config()
    # About 30 values of the hidden size a layer, of which recomputation leaves 2.
    values_per_layer = 30.0
    if config.gradient_checkpointing:
        values_per_layer -= 28 / config.gradient_checkpointing
    hidden_values = model.hidden_size * model.num_hidden_layers * values_per_layer
    values_per_token = hidden_values + model.vocab_size
    bytes_per_value = compute_dtype(config.torch_dtype).itemsize
    return batch_rows * length * values_per_token * bytes_per_value


def estimate_disk_bytes(
    config: TrainingConfig, num_weights: int, num_trained: int, steps: int
) -> int:
    """Bytes of the saved model, its adapter, and the checkpoints, all in float32."""
    disk_bytes = 4 * num_weights + 4 * num_trained
    # Supervised recipes call the interval save_steps, those of RL save_freq.
    options = vars(config)
    save_steps = options.get("save_steps", options.get("save_freq"))
    if save_steps:
        disk_bytes += 4 * num_trained  # the end of the training, until the stage is recorded
    if save_steps and save_steps < steps:
        # Weights and Adam's moments; one more than the limit, while the oldest is not yet removed.
        saved = steps // save_steps
        kept = saved if config.save_total_limit is None else config.save_total_limit + 1
        disk_bytes += 12 * num_trained * kept
    return disk_bytes


def checkpoints_kept(limit: int | None) -> str:
    return "all checkpoints" if limit is None else f"up to {limit} checkpoints"


@functools.cache
def matmul_speed(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this machine, with as many threads as training has."""
    from torch.utils.benchmark import Timer

    device = default_device()
    size = 1024 if device.type == "cpu" else 4096
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    timer = Timer("a @ a", globals={"a": matrix}, num_threads=torch.get_num_threads())
    seconds = timer.timeit(12).mean
    return 2 * size**3 / seconds
