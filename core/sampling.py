"""Sampling of completions with our own loop: on a CPU it is three times as fast as transformers'
`generate()`, and it keeps the log-probability of every sampled token.

Shapes: P prompts, B = P * repeats completions, W tokens in the longest prompt, at most T new
tokens, V vocabulary size."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from core.chat import prompt_ids, stop_tokens
from core.errors import ConfigError, unknown_name
from core.logprobs import additive_attention_mask, rows_at_once
from core.screen import show_count

CUDA_GRAPH_DEVICES = {"cuda"}  # device types on which a decoding step is recorded once and replayed
SAMPLING_DEFAULTS = {"max_new_tokens": 64, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
SMALLEST_COUNTS = {"max_new_tokens": 1, "top_k": 0}


# -- options ---------------------------------------------------------------------------------------


def check_sampling(name: str, sampling: Mapping[str, Any]) -> None:
    """Check the sampling options in the config field `name`; raises ConfigError."""
    if sampling.get("do_sample") not in (None, True):
        raise ConfigError(f"{name}: do_sample=false: completions are sampled here; remove it")
    unknown = set(sampling) - set(SAMPLING_DEFAULTS) - {"do_sample"}
    if unknown:
        message = unknown_name("option", min(unknown), SAMPLING_DEFAULTS)
        raise ConfigError(f"{name}: {message}")

    values = SAMPLING_DEFAULTS | dict(sampling)
    for option, smallest in SMALLEST_COUNTS.items():
        value = values[option]
        if not isinstance(value, int) or value < smallest:
            raise ConfigError(f"{name}: {option}={value!r} is not a count; give {smallest} or more")

    temperature, top_p = values["temperature"], values["top_p"]
    if not isinstance(temperature, int | float) or temperature <= 0:
        raise ConfigError(
            f"{name}: temperature={temperature!r}; sampling requires a temperature above 0"
        )
    if not isinstance(top_p, int | float) or not 0 < top_p <= 1:
        raise ConfigError(f"{name}: top_p={top_p!r}; give a number above 0, at most 1")


# -- one token -------------------------------------------------------------------------------------


def uniform_numbers(count: int, sampling: Mapping, seed: int) -> torch.Tensor:
    """Random numbers (count, T), uniform in (0, 1], for `sample_next_token`.

    They depend only on the seed, so the batch size does not change what is sampled."""
    generator = torch.Generator().manual_seed(seed)
    return 1 - torch.rand(count, sampling["max_new_tokens"], generator=generator)


def sample_next_token(
    logits: torch.Tensor, uniforms: torch.Tensor | None, sampling: Mapping
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a token for each row of logits (B, V); returns tokens (B,) and their log-probabilities
    (B,).

    Each token is the one at which the cumulative distribution reaches `uniforms` (B,), numbers in
    (0, 1]; without them, the most likely one. The log-probabilities include the temperature, as in
    training, but not top_k and top_p."""
    rows = rows_at_once(logits)
    tokens, logps = [], []
    for start in range(0, len(logits), rows):
        chunk = slice(start, start + rows)
        numbers = None if uniforms is None else uniforms[chunk]
        chunk_tokens, chunk_logps = sample_few(logits[chunk], numbers, sampling)
        tokens.append(chunk_tokens)
        logps.append(chunk_logps)
    return torch.cat(tokens), torch.cat(logps)


def sample_few(
    logits: torch.Tensor, uniforms: torch.Tensor | None, sampling: Mapping
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample_next_token` for few enough rows that several tensors (B, V) fit in memory."""
    logits = logits.float() / sampling["temperature"]
    probabilities = logits.softmax(-1)  # (B, V)

    if uniforms is None:
        tokens = logits.argmax(-1)
    else:
        candidates = probabilities
        # Skipped if both are off, the default: a second softmax over the vocabulary costs time.
        if sampling["top_k"] or sampling["top_p"] < 1:
            candidates = keep_likely_tokens(logits, sampling).softmax(-1)
        cumulative = candidates.cumsum(-1, dtype=torch.float64)
        # The last sum is 1 up to rounding; scaling by it keeps thresholds within the cumulative
        # distribution.
        thresholds = uniforms[:, None].double() * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, thresholds)[:, 0]

    token_probabilities = probabilities.gather(1, tokens[:, None])[:, 0]
    return tokens, token_probabilities.log()


def keep_likely_tokens(logits: torch.Tensor, sampling: Mapping) -> torch.Tensor:
    """The logits (B, V) with -inf at tokens excluded by top_k and then top_p."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    if sampling["top_k"]:
        logits = TopKLogitsWarper(sampling["top_k"])(None, logits)
    return TopPLogitsWarper(sampling["top_p"])(None, logits)


# -- preparing the model for decoding --------------------------------------------------------------


@contextlib.contextmanager
def evaluation_mode(model) -> Iterator[None]:
    """Turn off dropout, and gradient checkpointing, which does not allow a key-value cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def fast_decoding(model) -> Iterator[None]:
    """On a CPU, store the weights column-major, with the LoRA adapter merged, during sampling.

    Multiplying a few rows by such weights is three times as fast. Afterwards the weights are
    restored bitwise."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    dtypes = {weight.dtype for weight in model.parameters()}
    if model.device.type != "cpu" or dtypes != {torch.float32}:
        yield
        return

    lora_layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    # A DoRA adapter cannot simply be added, because DoRA rescales the sum; and experts have several
    # weights.
    uses_dora = any(layer.use_dora.get("default") for layer in lora_layers)
    adapts_experts = any(hasattr(layer, "parameter_name") for layer in lora_layers)
    # Disabling the adapter would disable new tokens too.
    has_new_rows = any(isinstance(m, TrainableTokensLayer) for m in model.modules())
    merges_adapter = bool(lora_layers) and not (uses_dora or adapts_experts or has_new_rows)
    if not merges_adapter:
        lora_layers = []
    base_layers = [layer.get_base_layer() for layer in lora_layers]
    linear_layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    original_data = {layer.weight: layer.weight.data for layer in [*base_layers, *linear_layers]}

    with model.disable_adapter() if merges_adapter else contextlib.nullcontext():
        try:
            if merges_adapter:
                for base, layer in zip(base_layers, lora_layers, strict=True):
                    base.weight.data = base.weight.data + layer.get_delta_weight("default")
            for weight in original_data:
                weight.data = weight.data.t().contiguous().t()
            yield
        finally:
            for weight, data in original_data.items():
                weight.data = data


def can_preallocate_kv_cache(model, cache) -> bool:
    """Whether `preallocate_kv_cache` works with the model: it needs rotary positions, full
    attention, and attention that accepts our masks."""
    from transformers.cache_utils import DynamicLayer

    takes_our_mask = model.config._attn_implementation in ("sdpa", "eager")
    has_rotary_positions = "rope_parameters" in model.config.to_dict()
    # A subclass means another kind of attention, such as a sliding window.
    has_full_attention = all(type(layer) is DynamicLayer for layer in cache.layers)
    return takes_our_mask and has_rotary_positions and has_full_attention


def preallocate_kv_cache(
    cache, repeats: int, room: int, next_slot: torch.Tensor, static_shapes: bool
) -> None:
    """Repeat each row of the key-value cache `repeats` times and append empty slots for `room`
    tokens.

    A growing cache would be copied for every token. A new token is written at `next_slot` (1,).
    With `static_shapes` attention gets all slots, and the mask has to hide the empty ones; else it
    gets only the filled slots."""
    from transformers.cache_utils import DynamicLayer

    class PreallocatedLayer(DynamicLayer):
        def __init__(self, keys: torch.Tensor, values: torch.Tensor):  # (P, heads, W, d) each
            super().__init__()
            self.is_initialized = True
            self.keys = F.pad(keys, (0, 0, 0, room)).repeat_interleave(repeats, 0)
            self.values = F.pad(values, (0, 0, 0, room)).repeat_interleave(repeats, 0)

        def update(self, keys, values, *_, **__):
            self.keys.index_copy_(2, next_slot, keys)
            self.values.index_copy_(2, next_slot, values)
            if static_shapes:
                return self.keys, self.values
            filled = next_slot + 1
            return self.keys[:, :, :filled], self.values[:, :, :filled]

    cache.layers = [PreallocatedLayer(layer.keys, layer.values) for layer in cache.layers]


def cuda_graph_steps(step: Callable[[], torch.Tensor], use_graph: bool) -> Iterator[torch.Tensor]:
    """Yield the result of `step()`, (B, V), repeatedly; with `use_graph`, replay a CUDA graph of
    it.

    Launching the operations of a step one by one takes ten times as long as the GPU needs to
    compute them. A step that waits for a value from the GPU cannot be recorded, and runs as usual.
    """
    result = None
    if use_graph:
        torch.cuda.set_sync_debug_mode("error")  # such a wait raises RuntimeError
        with contextlib.suppress(RuntimeError):
            result = step()
        torch.cuda.set_sync_debug_mode("default")

    # No graph, or a step that cannot be recorded.
    if result is None:
        while True:
            yield step()

    yield result
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    while True:
        graph.replay()
        yield result


# -- sampling --------------------------------------------------------------------------------------


@dataclass
class DecodingBatch:
    """The completions being written, and what the model needs to continue them.

    A CUDA graph reads these tensors at fixed addresses: with `static_shapes` they are only changed
    in place."""

    model: Any
    cache: Any
    cache_argument: str  # name of the model's cache argument
    rows: torch.Tensor  # (B,) index of the completion in each row of the batch
    running: torch.Tensor  # (B,) whether it has not stopped yet
    tokens: torch.Tensor  # (B,) its newest token
    positions: torch.Tensor  # (B, 1) the position of that token
    mask: torch.Tensor  # (B, W + T), or additive, (B, 1, 1, W + T)
    next_slot: torch.Tensor  # (1,) where the cache stores that token
    filled: int  # the same number, for slicing
    static_shapes: bool  # whether all shapes stay the same from token to token

    def forward(self) -> torch.Tensor:
        """Feed the newest tokens to the model; returns the logits (B, V) of the next ones."""
        mask: torch.Tensor | None
        if self.cache_argument == "cache_params":
            mask = None  # recurrent states contain no padding; only prompts need the mask
        elif self.static_shapes:
            mask = self.mask.index_fill_(-1, self.next_slot, 0)
        else:
            mask = self.mask[..., : self.filled + 1]
        output = self.model(
            input_ids=self.tokens[:, None],
            attention_mask=mask,
            position_ids=self.positions,
            use_cache=True,
            **{self.cache_argument: self.cache},
        )
        self.next_slot.add_(1)
        self.positions.add_(1)
        self.filled += 1
        return output.logits[:, -1]

    def append(self, tokens: torch.Tensor, stop_ids: torch.Tensor) -> None:
        """Append the next tokens (B,); those in `stop_ids` end their completions."""
        self.tokens.copy_(tokens)
        self.running &= ~torch.isin(self.tokens, stop_ids)

    def drop_finished(self) -> None:
        """Remove stopped completions once they are a quarter of the batch, because this copies the
        cache."""
        if self.static_shapes or self.running.sum() > len(self.rows) * 3 // 4:
            return
        remaining = self.running.nonzero()[:, 0]
        self.cache.reorder_cache(remaining)
        self.rows = self.rows[remaining]
        self.running = self.running[remaining]
        self.tokens = self.tokens[remaining]
        self.positions = self.positions[remaining]
        self.mask = self.mask[remaining]


def cache_argument(model) -> str:
    """The name of the argument and output with the model's cache."""
    from peft import PeftModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    takes_states = "cache_params" in inspect.signature(base.forward).parameters
    return "cache_params" if takes_states else "past_key_values"


def read_prompts(
    model, tokenizer, prompts: Sequence[list[int]], repeats: int, max_new_tokens: int
) -> tuple[DecodingBatch, torch.Tensor]:
    """Run one forward pass over the prompts; returns the batch of their B completions and the first
    logits (B, V)."""
    from transformers import DynamicCache

    def pad_left(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        padded = pad_sequence(rows, True, value, padding_side="left")
        return padded.to(model.device)

    prompt_tensors = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    ids = pad_left(prompt_tensors, tokenizer.pad_token_id)  # (P, W)
    mask = pad_left([torch.ones_like(prompt) for prompt in prompt_tensors], 0)  # (P, W)
    # Left padding does not count as positions (Huang et al. 2024).
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    cache = DynamicCache(config=model.config)
    name = cache_argument(model)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **{name: cache},
    )
    cache = output[name]
    width = ids.shape[1]
    next_slot = torch.tensor([width], device=model.device)

    preallocated = can_preallocate_kv_cache(model, cache)
    static_shapes = preallocated and model.device.type in CUDA_GRAPH_DEVICES
    if preallocated:
        preallocate_kv_cache(cache, repeats, max_new_tokens, next_slot, static_shapes)
    else:
        # The one row operation that every kind of cache supports, including recurrent states.
        prompts_of_rows = torch.arange(len(ids), device=model.device).repeat_interleave(repeats)
        cache.reorder_cache(prompts_of_rows)

    # Mask entries for new tokens, which are visible as soon as they exist. With static shapes all
    # slots exist from the start, so `forward` unmasks them one by one.
    mask = F.pad(mask, (0, max_new_tokens), value=not static_shapes)  # (P, W + T)
    if preallocated:
        mask = additive_attention_mask(model, mask[:, None, None] > 0)  # (P, 1, 1, W + T)

    logits = output.logits[:, -1].repeat_interleave(repeats, 0)
    rows = torch.arange(len(logits), device=model.device)
    batch = DecodingBatch(
        model=model,
        cache=cache,
        cache_argument=name,
        rows=rows,
        running=torch.ones_like(rows, dtype=torch.bool),
        tokens=torch.zeros_like(rows),
        positions=(positions[:, -1:] + 1).repeat_interleave(repeats, 0),
        mask=mask.repeat_interleave(repeats, 0),
        next_slot=next_slot,
        filled=width,
        static_shapes=static_shapes,
    )
    return batch, logits


class NoStopTokens:
    """Replaces a tokenizer, so that completions do not stop before their maximum length."""

    chat_template = None
    pad_token_id = 0
    stops_of_the_model: Sequence[int] = (-1,)
    eos_token_id = -1


@torch.no_grad()
def sample_completions(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    sampling: Mapping,
    uniforms: torch.Tensor | None = None,
    repeats: int = 1,
) -> tuple[list[list[int]], list[list[float]]]:
    """Sample `repeats` completions of each prompt (token ids); returns their ids, and the
    log-probability of each id.

    The completions of a prompt are consecutive; each includes its stop token, if it has one.
    `uniforms` (B, T), from `uniform_numbers`, choose the tokens; without them decoding is greedy. A
    prompt is read once for all its completions."""
    max_new_tokens = sampling["max_new_tokens"]
    stop_ids = torch.tensor(stop_tokens(tokenizer), device=model.device)
    completions: list[list[int]] = [[] for _ in range(len(prompts) * repeats)]
    logps: list[list[float]] = [[] for _ in range(len(prompts) * repeats)]

    with evaluation_mode(model), fast_decoding(model):
        batch, logits = read_prompts(model, tokenizer, prompts, repeats, max_new_tokens)
        forward_steps = cuda_graph_steps(batch.forward, batch.static_shapes)

        for t in range(max_new_tokens):
            # 1. Choose the next token of each completion in the batch.
            step_uniforms = None if uniforms is None else uniforms[batch.rows, t]
            tokens, token_logps = sample_next_token(logits, step_uniforms, sampling)  # (B,), (B,)

            # 2. Record it. Stopped rows may still be in the batch, but get no more tokens.
            step = (batch.rows, batch.running, tokens, token_logps)
            columns = [tensor.tolist() for tensor in step]
            for row, is_running, token, logp in zip(*columns, strict=True):
                if is_running:
                    completions[row].append(token)
                    logps[row].append(logp)

            # 3. Remove stopped completions from the batch.
            batch.append(tokens, stop_ids)
            if t + 1 == max_new_tokens or not batch.running.any():
                break
            batch.drop_finished()

            # 4. Run a forward pass over the new tokens to get the next logits.
            logits = next(forward_steps)  # (B, V)

    return completions, logps


def decode_completions(tokenizer, completions: Sequence[list[int]]) -> tuple[list[str], list[bool]]:
    """Decode completions; returns the texts without stop tokens, and whether each had one."""
    stop_ids = stop_tokens(tokenizer)
    texts, stopped = [], []
    for ids in completions:
        has_stop = ids[-1] in stop_ids
        text_ids = ids[:-1] if has_stop else ids
        texts.append(tokenizer.decode(text_ids, skip_special_tokens=True))
        stopped.append(has_stop)
    return texts, stopped


def generate(
    model, tokenizer, prompts: Sequence[list[dict]], max_new_tokens: int, batch_size: int = 16
) -> list[tuple[str, bool]]:
    """Greedy answers to conversations: for each, (text, whether it ended with a stop token)."""
    sampling = SAMPLING_DEFAULTS | {"max_new_tokens": max_new_tokens}
    answers: list[tuple[str, bool]] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        ids = [prompt_ids(tokenizer, prompt) for prompt in batch]
        completions, _ = sample_completions(model, tokenizer, ids, sampling)
        texts, stopped = decode_completions(tokenizer, completions)
        answers += zip(texts, stopped, strict=True)
        show_count("answers", len(answers), len(prompts))
    return answers
