"""Measurements for a dry run's estimates, on a model like the stage's with random weights.

measure_speed   seconds of small passes, of an optimizer step and of short answers
memory_of_pass  bytes of a pass over the largest batch, with fake tensors that have no data
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.adapters import add_adapter
from core.config import TrainingConfig
from core.errors import as_config_error
from core.logprobs import TokenLogps, disable_dropout
from core.optimizers import decay_groups, new_optimizer
from core.output_layer import output_layer, output_layer_computing, positions_at_once
from core.runtime import compute_dtype, default_device
from core.sampling import SAMPLING_DEFAULTS, NoStopTokens, sample_completions
from core.screen import busy
from core.work import Answers, Work

PASS_SECONDS = 2.0  # maximum duration of the largest measured pass
ENOUGH_SECONDS = 0.3  # shorter measurements are repeated
FEW_TOKENS = 16  # in the smallest measured pass
SHARE_OF_FREE_MEMORY = 0.4  # maximum for the model of a measurement
UTILIZATION = 0.4  # typical training speed as a fraction of a matrix product's


# -- the model -------------------------------------------------------------------------------------


@torch.random.fork_rng()
def training_model(config: TrainingConfig, skeleton):
    """The model that the stage trains, on the meta device, from the `skeleton` without an adapter.
    Raises ConfigError if the adapter does not fit, or if the model cannot recompute its layers."""
    model = copy.deepcopy(skeleton).to(config.weight_dtype)
    if config.attn_implementation:
        model.set_attn_implementation(config.attn_implementation)
    model = add_adapter(model, config)
    if config.gradient_checkpointing:
        every = config.gradient_checkpointing
        with as_config_error(f"gradient_checkpointing={every}"):
            model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
            model.enable_input_require_grads()
    disable_dropout(model)
    return model.train()


def fill(model, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace each weight and buffer of a model by `make(tensor)`."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:  # keeps tied weights tied
                    filled = make(tensor)
                    if isinstance(tensor, torch.nn.Parameter):
                        filled = torch.nn.Parameter(filled, tensor.requires_grad)
                    made[id(tensor)] = filled
                if tensor is not None:
                    tensors[name] = made[id(tensor)]


def random_values(tensor: torch.Tensor) -> torch.Tensor:
    """Small random numbers, a million of them repeated: drawing more would dominate the time."""
    device = default_device()
    if tensor.dim() < 2:
        return torch.ones(tensor.shape, dtype=tensor.dtype, device=device)
    block = torch.empty(min(2**20, tensor.numel()), device=device).uniform_(-0.05, 0.05)
    repeats = math.ceil(tensor.numel() / len(block))
    values = block.to(tensor.dtype).repeat(repeats)[: tensor.numel()]
    return values.view(tensor.shape)


def forward_pass(model, config: Any, rows: int, length: int, num_scored: int) -> torch.Tensor:
    """The log-probabilities of the first `num_scored` tokens in a pass over `rows` sequences of
    `length` tokens; the others skip the output layer."""
    device, layer = model.device, output_layer(model)
    project = layer.forward
    targets = torch.zeros(num_scored, dtype=torch.long, device=device)

    def score(hidden: torch.Tensor) -> torch.Tensor:  # (rows, length, H)
        return TokenLogps.apply(project(hidden.flatten(0, 1)[:num_scored]), targets)

    ids = torch.ones((rows, length), dtype=torch.long, device=device)
    dtype = compute_dtype(config.torch_dtype)
    with (
        output_layer_computing(model, score),
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
    ):
        return model(input_ids=ids, use_cache=False).logits


# -- time ------------------------------------------------------------------------------------------


@dataclass
class Speed:
    """The speed of a model on this machine, in seconds."""

    per_pass: float  # fixed cost of a forward and backward pass
    per_token: float
    forward_per_token: float
    optimizer_step: float
    # {number of answers written at once: (seconds before the first token, seconds per token)}
    decoding: dict[int, tuple[float, float]]
    basis: str

    def seconds(self, work: Work, share_of_answers: float) -> float:
        """The time of a stage whose answers have `share_of_answers` of their maximum length."""
        share_of_tokens = work.share_fixed + (1 - work.share_fixed) * share_of_answers
        seconds = work.tokens * self.per_token + work.forward_tokens * self.forward_per_token
        seconds *= share_of_tokens
        seconds += work.passes * self.per_pass + work.steps * work.updates * self.optimizer_step
        for answers in work.answers:
            before, per_step = self.decoding.get(answers.at_once, (0.0, self.forward_per_token))
            reading = answers.prompts * answers.prompt_length * self.forward_per_token
            writing = max(1.0, share_of_answers * answers.max_new_tokens) * per_step
            seconds += answers.times * (before + reading + writing)
        return seconds


MEASURED_SPEEDS: dict[tuple, Speed] = {}  # in this process: stages of a chain are often alike


@busy("measuring a pass")
def measure_speed(config: Any, model, work: Work) -> Speed | None:
    """The speed of a model given on the meta device, None if measuring would take too long."""
    speed = flops_per_second(compute_dtype(config.torch_dtype))
    affordable = int(PASS_SECONDS * UTILIZATION * speed / (6 * model.num_parameters()))  # tokens
    num_bytes = sum(weight.nbytes for weight in model.parameters())
    num_bytes += 12 * model.num_parameters(only_trainable=True)
    if affordable < 2 * FEW_TOKENS or num_bytes > SHARE_OF_FREE_MEMORY * free_memory():
        return None
    options = (config.lora_r, config.torch_dtype, config.gradient_checkpointing, config.optim)
    key = (model.num_parameters(), model.num_parameters(only_trainable=True), *options)
    known = MEASURED_SPEEDS[key].decoding if key in MEASURED_SPEEDS else {}
    new_answers = {answers.at_once: answers for answers in work.answers}
    new_answers = {size: answers for size, answers in new_answers.items() if size not in known}
    if key in MEASURED_SPEEDS and not new_answers:
        return MEASURED_SPEEDS[key]

    model = copy.deepcopy(model)
    fill(model, random_values)
    if key not in MEASURED_SPEEDS:
        MEASURED_SPEEDS[key] = measure_model(config, model, work, affordable)
    for size, answers in new_answers.items():
        MEASURED_SPEEDS[key].decoding[size] = measure_decoding(model, answers)
    return MEASURED_SPEEDS[key]


def measure_model(config: Any, model, work: Work, affordable: int) -> Speed:
    """Measure the speed of a model, with passes of up to `affordable` tokens."""
    length = min(work.length, max(FEW_TOKENS, affordable // 3))
    rows = max(1, min(work.rows, affordable // length))

    def train_pass(rows: int, length: int) -> None:
        num_scored = max(1, int(work.share_scored * rows * length))
        logps = forward_pass(model, config, rows, length, num_scored)
        if torch.is_grad_enabled():
            logps.mean().backward()

    few = min(FEW_TOKENS, length)
    train_pass(1, few)  # the first pass allocates memory
    optimizer = new_optimizer(config, model, decay_groups(config, model))
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer.step()

    def optimizer_step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    step_seconds = seconds_of(optimizer_step)
    small = seconds_of(functools.partial(train_pass, 1, few))
    large = seconds_of(functools.partial(train_pass, rows, length))
    per_pass, per_token = line_through(few, small, rows * length, large)
    with torch.no_grad():
        forward = seconds_of(functools.partial(train_pass, rows, length))
    return Speed(
        per_pass=per_pass,
        per_token=per_token,
        forward_per_token=forward / (rows * length),
        optimizer_step=step_seconds,
        decoding={},
        basis=f"a pass forward and backward over {rows * length} tokens, {large:.2g} s here; "
        "random weights",
    )


@torch.no_grad()
def measure_decoding(model, answers: Answers) -> tuple[float, float]:
    """(seconds before the first token, seconds per token) of `answers`."""
    prompt = [1] * max(1, min(int(answers.prompt_length), FEW_TOKENS))

    def write(max_new_tokens: int) -> None:
        sampling = SAMPLING_DEFAULTS | {"max_new_tokens": max_new_tokens}
        sample_completions(model, NoStopTokens(), [prompt], sampling, repeats=answers.at_once)

    few, many = 1, 4
    few_seconds, many_seconds = seconds_of(lambda: write(few)), seconds_of(lambda: write(many))
    return line_through(few, few_seconds, many, many_seconds)


def line_through(few: float, few_seconds: float, many: float, many_seconds: float):
    """(fixed seconds, seconds per item) from two measurements, both non-negative."""
    if many <= few or many_seconds <= few_seconds:
        return 0.0, many_seconds / many
    slope = (many_seconds - few_seconds) / (many - few)
    return max(0.0, few_seconds - slope * few), slope


def seconds_of(run: Callable[[], Any]) -> float:
    """How long `run()` takes; the median of several runs if it is short."""
    times: list[float] = []
    while sum(times) < ENOUGH_SECONDS and len(times) < 5:
        began = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def synchronize() -> None:
    """Wait until a GPU has finished its work."""
    device = default_device()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def computed_speed(config: Any, model, reason: str) -> Speed:
    """The speed of a model that was not measured, for this `reason`, computed from the speed of a
    matrix product."""
    speed = flops_per_second(compute_dtype(config.torch_dtype))
    # One multiplication and addition per weight and token. A backward pass takes twice as many, or
    # the same number if only an adapter trains.
    forward = 2 * model.num_parameters() / (UTILIZATION * speed)
    per_token = forward * (2 if config.lora_r else 3)
    basis = (
        f"{UTILIZATION:.0%} of the {speed / 1e9:,.0f} GFLOP/s of a matrix product here: {reason}"
    )
    return Speed(0.0, per_token, forward, 0.0, {}, basis)


@functools.cache
def flops_per_second(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this machine, with as many threads as in training."""
    from torch.utils.benchmark import Timer

    device = default_device()
    size = 1024 if device.type == "cpu" else 4096
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    timer = Timer("a @ a", globals={"a": matrix}, num_threads=torch.get_num_threads())
    seconds = timer.timeit(12).mean
    return 2 * size**3 / seconds


# -- memory ----------------------------------------------------------------------------------------


class BytesInUse(TorchDispatchMode):
    """Counts the bytes of tensors that operations in the block create."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()  # storages that have been counted

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        inputs = {storage_of(tensor)._cdata for tensor in tensors_in((args, kwargs))}
        outputs = operation(*args, **(kwargs or {}))
        for tensor in tensors_in(outputs):
            storage = storage_of(tensor)
            # An output that is a view of an input, or a modified input, takes no memory.
            if storage._cdata not in inputs | self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return outputs

    def free(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.now -= num_bytes


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


class PassMemory(NamedTuple):
    """Bytes of a pass, besides those of the weights."""

    held: float  # after the forward pass, for the backward pass
    gradients: float
    passing: float  # temporary

    def peak(self, accumulates: bool) -> float:
        # In the backward pass, held memory shrinks while gradients grow.
        if accumulates:
            return self.held + self.gradients + self.passing
        return max(self.held, self.gradients) + self.passing


def memory_of_pass(config: Any, model, work: Work) -> PassMemory:
    """The memory of a pass of a model on the meta device over the largest batch of `work`."""
    num_layers = model.config.get_text_config().num_hidden_layers
    # Recomputation works on groups of this many layers.
    few = config.gradient_checkpointing or 1
    if num_layers <= 2 * few:
        return memory_of_layers(config, copy.deepcopy(model), work)
    first = memory_of_layers(config, with_layers(model, few), work)
    second = memory_of_layers(config, with_layers(model, 2 * few), work)
    growth = num_layers / few - 2
    held = second.held + growth * (second.held - first.held)
    gradients = second.gradients + growth * (second.gradients - first.gradients)
    return PassMemory(held, gradients, second.passing)


def with_layers(model, count: int):
    """A copy of a model with only its first `count` layers."""
    num_layers = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    (layers,) = [module for module in lists if len(module) == num_layers]
    first_layers = copy.deepcopy(torch.nn.ModuleList(layers[:count]))
    return copy.deepcopy(model, {id(layers): first_layers})


def memory_of_layers(config: Any, model, work: Work) -> PassMemory:
    """The memory of a pass of a model on the meta device; modifies the model."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = default_device()

    def without_data(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    num_scored = max(1, int(work.share_scored * work.rows * work.length))
    with FakeTensorMode():
        fill(model, without_data)
        if not work.all_logits:
            num_scored = min(num_scored, positions_at_once(model))
        with BytesInUse() as in_use:
            logps = forward_pass(model, config, work.rows, work.length, num_scored)
            held = in_use.now
            logps.mean().backward()
    gradients = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    return PassMemory(held, gradients, in_use.peak - max(held, gradients))


def free_memory() -> float:
    """Free memory of the device, in bytes."""
    import psutil

    if default_device().type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return float(free)
    return float(psutil.virtual_memory().available)
