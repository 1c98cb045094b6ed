"""Estimates of a stage's time, memory and disk space, for a dry run.

They follow from the work of the stage (core/work.py) and from measurements (core/trials.py).
"""

from __future__ import annotations

import functools
import importlib
import math
import time
from typing import Any

import torch

from core.config import TrainingConfig
from core.runtime import default_device, logger
from core.trials import Speed, computed_speed, measure_speed, memory_of_pass
from core.work import Answers, Work

SHORT_ANSWERS = 0.2  # fraction of the maximum length of answers, for the shortest run
SECONDS_AROUND = (1.0, 12.0)  # minimum and maximum, before the first step and after the last
IMPORTS = 3.0  # maximum time of a run's imports, as a multiple of the dry run's
SAVING_SPEED = 2e8  # minimum, in bytes/s
# Memory of a CPU process besides its tensors, fitted to runs of models of 0.3 to 135 million
# weights: a fraction of the weights, and holes in glibc's heap, as a fraction of what a pass holds,
# with a maximum in bytes, because large tensors are not on the heap.
WEIGHTS_AGAIN, HOLES, MOST_HOLES = 0.35, 0.55, 6e8

# Factors from the expected time to both ends of its range, by the basis of the estimate.
MEASURED, MEASURED_UNQUANTIZED, COMPUTED = (0.6, 1.8), (0.6, 3.0), (0.4, 3.0)

# Bytes of optimizer state per trained weight, if not the 8 of AdamW.
STATE_BYTES = {"sgd": 0, "adafactor": 0, "muon": 4, "adamw_8bit": 2, "paged_adamw_8bit": 2}


# -- time and memory -------------------------------------------------------------------------------


@torch.random.fork_rng()
def estimate_cost(stage: Any, model, work: Work) -> list[tuple[str, str]]:
    """[(label, text)] on the time and memory of a stage.

    `model` is the one that trains (`training_model`), on the meta device. If it cannot be run here,
    for example because its layers need a GPU kernel, memory is not estimated, and time is only
    computed.
    """
    import_seconds, libraries = import_libraries()
    memory = describe_memory(stage.config, model, work, libraries)
    speed, (low, high) = choose_speed(stage.config, model, work)

    saving = 4 * model.num_parameters() / SAVING_SPEED
    shortest = low * speed.seconds(work, SHORT_ANSWERS) + SECONDS_AROUND[0]
    longest = high * (speed.seconds(work, 1.0) + saving) + SECONDS_AROUND[1]
    longest += IMPORTS * import_seconds

    basis = speed.basis
    others = [name for name in ("judge", "teacher") if name in stage.lineage]
    others += [name for name in ("reward", "reward_model_path") if vars(stage.config).get(name)]
    if others:
        basis += f"; without the time and memory of {' and '.join(others)}"
    return [
        ("time", f"{describe_range(shortest, longest)}: {describe_work(work)}"),
        ("memory", memory),
        ("rests on", basis),
    ]


def choose_speed(config: Any, model, work: Work) -> tuple[Speed, tuple[float, float]]:
    """(speed of a model, factors from the estimated time to both ends of its range)."""
    try:
        measured = measure_speed(config, model, work)
        reason = "a pass of the model would take too long to try"
    except Exception as error:
        logger.debug("a pass cannot be tried", exc_info=True)
        measured, reason = None, cannot_be_tried(error)
    if measured is None:
        return computed_speed(config, model, reason), COMPUTED
    return measured, MEASURED_UNQUANTIZED if config.quantized else MEASURED


def describe_memory(config: Any, model, work: Work, libraries: float) -> str:
    """A text on the memory of a stage, including `libraries`."""
    try:
        memory = {"Python and libraries": libraries, **count_memory(config, model, work)}
    except Exception as error:
        logger.debug("a pass cannot be tried", exc_info=True)
        return f"not estimated: {cannot_be_tried(error)}"
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items())
    text = f"about {sum(memory.values()) / 1e9:.2f} GB: {parts}"
    if work.differentiates_twice:
        text += "; more is needed for second derivatives, which are not counted"
    return text


def cannot_be_tried(error: Exception) -> str:
    return f"a pass cannot be tried, {type(error).__name__}"


def describe_work(work: Work) -> str:
    text = f"{work.steps:,} steps, {work.tokens / 1e3:,.1f} thousand tokens forward and backward"
    if work.forward_tokens:
        text += f", {work.forward_tokens / 1e3:,.1f} forward alone"
    for answers in work.answers:
        number = answers.times * answers.at_once
        text += f", {number:,.0f} answers of at most {answers.max_new_tokens} tokens"
    return text


def describe_range(low: float, high: float) -> str:
    """A range of seconds as text, such as "3 to 5 minutes", rounded outwards."""
    unit, length = "seconds", 1.0
    if high >= 120:
        unit, length = "minutes", 60.0
    if high >= 7200:
        unit, length = "hours", 3600.0
    digits = 0 if unit == "seconds" or low / length >= 10 else 1
    scale = 10**digits
    shortest = math.floor(low / length * scale) / scale
    longest = math.ceil(high / length * scale) / scale
    return f"{shortest:.{digits}f} to {longest:.{digits}f} {unit}"


def count_memory(config: Any, model, work: Work) -> dict[str, float]:
    """{what: bytes} at a stage's memory peak."""
    num_weights = model.num_parameters()
    trained = [weight.numel() for weight in model.parameters() if weight.requires_grad]
    weights = num_weights * bytes_per_weight(config)
    optimizer = sum(trained) * STATE_BYTES.get(config.optim, 8)
    # Adam's step creates some tensors of a weight's size, for one weight at a time.
    stepping = 4 * sum(trained) + 8 * max(trained)
    largest = memory_of_pass(config, model, work)
    training = max(largest.peak(work.accumulates), stepping)
    writing = max((bytes_of_answers(model, answers) for answers in work.answers), default=0.0)
    heap = holes = 0.0
    if default_device().type == "cpu":
        heap = WEIGHTS_AGAIN * weights
        holes = min(HOLES * largest.held, MOST_HOLES)
    # The peak is in a pass, or while answers are written, which leaves no such holes.
    at_peak = training
    if training + holes < writing:
        at_peak, holes = writing, 0.0
    return {
        "weights": weights * (1 + work.copies),
        "optimizer": optimizer,
        "passes": at_peak,
        "the heap": heap + holes,
    }


def bytes_of_answers(model, answers: Answers) -> float:
    """Bytes in use while answers are written, besides the weights."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * heads * head_size * model.dtype.itemsize
    length = answers.prompt_length + answers.max_new_tokens
    logits = 4 * 4 * answers.at_once * text.vocab_size
    transposed = 0  # `fast_decoding` stores all matrices a second time
    if default_device().type == "cpu" and model.dtype == torch.float32:
        transposed = 4 * model.num_parameters()
    return answers.at_once * length * per_token + logits + transposed


def bytes_per_weight(config: TrainingConfig) -> float:
    """Average bytes per weight of the model in memory."""
    # Half a byte and the quantization constants, plus layers that are not quantized.
    if config.use_4bit:
        return 0.6
    if config.use_8bit:
        return 1
    return config.weight_dtype.itemsize


@functools.cache
def import_libraries() -> tuple[float, float]:
    """(seconds to import what a run needs and a dry run does not, bytes of this process before its
    first model); 0 bytes on a GPU."""
    import psutil

    began = time.perf_counter()
    importlib.import_module("accelerate")
    importlib.import_module("peft")
    seconds = time.perf_counter() - began
    if default_device().type == "cuda":
        return seconds, 0.0
    return seconds, float(psutil.Process().memory_info().rss)


# -- disk ------------------------------------------------------------------------------------------


def estimate_disk(config: TrainingConfig, num_weights: int, num_trained: int, steps: int) -> float:
    """Bytes of the saved model, its adapter, and the checkpoints, all in float32."""
    disk_bytes = 4 * num_weights + 4 * num_trained
    # Supervised recipes call the interval save_steps, RL recipes save_freq.
    options = vars(config)
    save_steps = options.get("save_steps", options.get("save_freq"))
    if save_steps:
        disk_bytes += 4 * num_trained  # the last checkpoint, until the stage is recorded
    if save_steps and save_steps < steps:
        # Weights and Adam's moments; one more than the limit, until the oldest is removed.
        saved = steps // save_steps
        kept = saved if config.save_total_limit is None else config.save_total_limit + 1
        disk_bytes += 12 * num_trained * kept
    return float(disk_bytes)


def describe_disk(config: TrainingConfig, disk_bytes: float) -> str:
    limit = config.save_total_limit
    checkpoints = "all checkpoints" if limit is None else f"up to {limit} checkpoints"
    return f"about {disk_bytes / 1e9:.1f} GB: the model in float32, the adapter, {checkpoints}"
