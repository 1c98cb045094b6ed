"""What can be known before the first step, without the model's weights: bad rows, time, memory, disk."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import statistics
import sys
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, Sequence

import torch

from core.chat import IGNORE, prepare_tokenizer, stop_tokens
from core.config import TrainingConfig
from core.data import usable_rows
from core.errors import ConfigError
from core.runtime import compute_dtype, default_device, logger

MAX_ROWS_CHECKED = 2000  # rows of a stage that are encoded for a look
ROW_PROBLEMS = {
    "silent": "none of its tokens would be learnt; the chat template leaves the answer out",
    "unstopped": "its answer does not end in a token that ends a turn, so the model would never stop",
    "doubled": "it begins with the token that begins a text twice; take one out of the chat template or the data",
    "moved": "its prompt has other tokens alone than before an answer, so the model would never meet what it learnt; "
    "let the template's prompt end in a special token or a line break",
    "beyond": "it is longer than the model's context of {context} tokens; with max_seq_length={context} such rows are "
    "left out, or cut, and counted",
    "leaked": "it is trained on too, so its figures would flatter; remove one of the two",
}


def find_row_problem(
    tokenizer, stops: Sequence[int], sequences: Sequence[tuple], cut: bool, context: int, chat: bool
) -> str:
    """Which of TROUBLES a row has, whose sequences are (input_ids, labels, or None where nothing is imitated). What no
    prompt precedes is no `chat`: a piece of it may begin and end anywhere."""
    if any(ids[:2] == [tokenizer.bos_token_id] * 2 for ids, _ in sequences):
        return "doubled"
    if max(len(ids) for ids, _ in sequences) > context:
        return "beyond"
    for ids, labels in sequences if chat else ():
        learnt = [t for t, label in enumerate(labels or ()) if label != IGNORE]
        if labels and not {ids[t] for t in learnt} - {*stops}:
            return "silent"
        text = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        again = lambda ids: tokenizer(text(ids), add_special_tokens=False).input_ids
        if learnt and not cut and again(ids) == ids and again(ids[: learnt[0]]) != ids[: learnt[0]]:
            return "moved"
    ids, labels = sequences[-1]
    return "unstopped" if chat and labels and not cut and labels[-1] not in stops else ""


def check_encoded_rows(
    stage: Any, tokenizer, context: int, say: bool = False
) -> SimpleNamespace | None:
    """Encode the first rows of a checked stage as its training will: the tokens of each, how many lose something, an
    example. None for a stage that does not say what it makes of a row. Raises ConfigError, with the remedy, for what
    would teach nothing, or other than it should. `say`: how many are left out, as the training will."""
    tokenizer = (
        tokenizer if stage.hands_on else copy.deepcopy(tokenizer)
    )  # its template is not for the next stage
    prepare_tokenizer(tokenizer, stage.config, chat := stage.needs_chat_template)
    found, stops = (
        SimpleNamespace(lengths=[], cut=0, whole=0, example=None, keys=set()),
        stop_tokens(tokenizer),
    )
    for side, rows in zip(("training", "evaluation"), stage.data or ()):
        make = lambda row: (row, stage.sequences(row, tokenizer, context))
        for row, made in (
            usable_rows(rows[:MAX_ROWS_CHECKED], make, f"{side} data", warn=say) if rows else ()
        ):
            if made is None:
                return None
            sequences, cut = made
            keys = {hash(tuple(ids)) for ids, _ in sequences} if chat and not cut else {str(row)}
            leaked = side == "evaluation" and keys & found.keys
            if (
                wrong := "leaked"
                if leaked
                else find_row_problem(tokenizer, stops, sequences, cut, context, chat)
            ):
                raise ConfigError(
                    f"a row of the {side} data: {ROW_PROBLEMS[wrong].format(context=context)}. The row: "
                    f"{tokenizer.decode(sequences[0][0])[:200]!r}"
                )
            if side == "training":
                found.keys |= keys
                found.lengths.append(max(len(ids) for ids, _ in sequences))
                found.cut += cut
                found.whole += any(labels and labels[-1] in stops for _, labels in sequences)
                found.example = found.example or sequences[0]
    if (share := found.cut / (len(found.lengths) or 1)) > 0.1:
        limits = ("max_seq_length", "max_prompt_length")
        given = [f"{name}={limit}" for name in limits if (limit := vars(stage.config).get(name))]
        said = f"{100 * share:.0f}% of the training rows are cut at {' or '.join(given)}"
        if not found.whole:
            raise ConfigError(f"{said}, so that none ends in a token that ends a turn; raise it")
        logger.warning("%s", said)
    return found


def highlight_targets(tokenizer, ids: Sequence[int], labels: Sequence[int] | None) -> str:
    """The text of a sequence, what is learnt of it in green, or between marks where the screen has no colours."""
    before, after = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    parts = itertools.groupby(range(len(ids)), lambda t: bool(labels) and labels[t] != IGNORE)
    texts = ((learnt, tokenizer.decode([ids[t] for t in places])) for learnt, places in parts)
    return "".join(f"{before}{text}{after}" if learnt else text for learnt, text in texts)


def describe_stage(stage: Any, tokenizer, shape) -> tuple[list[str], float]:
    """(lines on what a checked stage will do: options, data, an example, estimates; bytes it will write). `shape` is
    the model without its weights, on the meta device."""
    config, standard = stage.config, type(stage.config)()
    own = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name not in ("output_dir", "stage_name")
    }
    changed = (f"{name}={value}" for name, value in own.items() if value != getattr(standard, name))
    lines = ["options     " + (", ".join(changed) or "the defaults")]
    lines += [
        f"{kind:11} {stage.lineage[kind]}"
        for kind in ("reference", "judge", "teacher")
        if kind in stage.lineage
    ]
    if data := stage.lineage.get("data"):
        lines.append(
            f"data        {data['path']}: {data['rows']} rows, {len(stage.data[0])} to train on and "
            f"{len(stage.data[1])} to evaluate on; format {data['format']}, since it has the columns "
            f"{', '.join(config.formats[data['format']])}"
        )
    found = check_encoded_rows(stage, tokenizer, shape.config.max_position_embeddings, say=True)
    if not found or not found.lengths:
        return lines, 0.0
    quantile = sorted(found.lengths)
    at = lambda share: quantile[min(len(quantile) - 1, int(share * len(quantile)))]
    lines.append(
        f"tokens      a row: {at(0)} shortest, {at(0.5)} median, {at(0.9)} ninth decile, {at(0.99)} of 99%, "
        f"{at(1)} longest; {100 * found.cut / len(quantile):.1f}% are cut"
    )
    lines.append(
        "example     "
        + highlight_targets(tokenizer, *found.example).replace("\n", "\n            ")
    )
    more, size = (
        estimate_cost(stage, shape, found.lengths)
        if isinstance(config, TrainingConfig)
        else ([], 0.0)
    )
    return lines + more, size


def estimate_cost(stage: Any, shape, lengths: Sequence[int]) -> tuple[list[str], float]:
    """(lines on time, memory and disk, each with the figures behind it; bytes to be written), from the number of
    parameters, the rows' lengths, and the speed of a matrix product measured here."""
    config, weights = stage.config, shape.num_parameters()
    linear = [
        m
        for m in shape.modules()
        if isinstance(m, torch.nn.Linear) and m is not shape.get_output_embeddings()
    ]
    trained = (
        sum(config.lora_r * (m.in_features + m.out_features) for m in linear)
        if config.lora_r
        else weights
    )
    steps, tokens, passes, rows = stage.work(lengths)
    dtype = compute_dtype(config.torch_dtype)
    speed, work, size = matmul_speed(dtype), 2 * weights * tokens * passes, dtype.itemsize
    stored = {True: 0.6, False: 1 if config.use_8bit else config.weight_dtype.itemsize}[
        config.use_4bit
    ]
    model, states = weights * stored / 1e9, 12 * trained / 1e9
    wide, vocabulary, layers = (
        shape.config.hidden_size,
        shape.config.vocab_size,
        shape.config.num_hidden_layers,
    )
    kept = (
        wide * layers * (30 - 28 / (config.gradient_checkpointing or math.inf)) + vocabulary
    )  # a token, about
    activations = rows * max(lengths) * kept * size / 1e9
    keeps = vars(config).get("save_steps", vars(config).get("save_freq"))
    disk = (
        4 * weights
        + 4 * trained
        + (12 * trained * (config.save_total_limit + 1) if keeps and keeps < steps else 0)
    )
    return [
        f"time        about {work / (0.4 * speed) / 60:.1f} minutes: {steps} steps, {tokens / 1e3:,.0f} thousand "
        f"tokens, {passes:g} passes, {weights / 1e6:,.0f} million weights: {work / 1e12:,.0f} TFLOP at 40% of the "
        f"{speed / 1e9:,.0f} GFLOP/s measured here",
        f"memory      about {model + states + activations:.1f} GB: weights {model:.1f}, gradients and optimizer of "
        f"{trained / 1e6:,.1f} million that train {states:.1f}, activations of {rows} rows of {max(lengths)} tokens "
        f"{activations:.1f}",
        f"disk        about {disk / 1e9:.1f} GB: the model in float32, the adapter, up to {config.save_total_limit} "
        "checkpoints",
    ], float(disk)


def estimate_fit(config: Any, rows: int, lengths: Sequence[int]) -> tuple[int, float, float, int]:
    """(optimizer steps, tokens, passes over a token, rows at a time) of a training by `fit` on
    `rows` rows, whose `lengths` in tokens may be those of a sample."""
    batch_size = config.per_device_train_batch_size
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rows_per_step = batch_size * config.gradient_accumulation_steps * processes
    steps_per_epoch = math.ceil(rows / rows_per_step)
    steps = config.max_steps or math.ceil(steps_per_epoch * config.num_train_epochs)
    tokens = statistics.fmean(lengths) * rows * steps / steps_per_epoch
    # A backward pass counts as two, and as one where only an adapter trains: the gradients of the
    # weights are half of its work.
    passes = 2.0 if config.lora_r else 3.0
    return steps, tokens, passes, min(batch_size, rows)


@functools.cache
def matmul_speed(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here, on as many threads as training has."""
    from torch.utils.benchmark import Timer

    a = torch.randn(
        n := 1024 if default_device().type == "cpu" else 4096,
        n,
        device=default_device(),
        dtype=dtype,
    )
    return (
        2
        * n**3
        / Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads()).timeit(12).mean
    )
