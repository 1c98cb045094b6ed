"""Sampling of completions: our own loop, since `generate()` is a third as fast on a CPU and keeps no log-probabilities."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from core.chat import prompt_ids, stop_tokens
from core.errors import ConfigError, unknown_name
from core.logprobs import additive_attention_mask

CUDA_GRAPH_DEVICES = {
    "cuda"
}  # devices on which a step of sampling is recorded, and replayed for all tokens
SAMPLING_DEFAULTS = {"max_new_tokens": 64, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def check_sampling(name: str, sampling: Mapping[str, Any]) -> None:
    """Refuse what the option `name` says of SAMPLING if it makes no sense."""
    if strange := {*sampling} - {*SAMPLING_DEFAULTS}:
        raise ConfigError(f"{name}: " + unknown_name("option", min(strange), SAMPLING_DEFAULTS))
    values = SAMPLING_DEFAULTS | dict(sampling)
    for count in ("max_new_tokens", "top_k"):
        if not isinstance(values[count], int) or values[count] < (count == "max_new_tokens"):
            raise ConfigError(f"{name}: {count}={values[count]!r} is not a count")
    numbers = all(isinstance(values[number], (int, float)) for number in ("temperature", "top_p"))
    if not numbers or values["temperature"] <= 0 or not 0 < values["top_p"] <= 1:
        raise ConfigError(
            f"{name}: temperature is a number above 0, top_p in (0, 1]: no choice without chance"
        )


@contextlib.contextmanager
def fast_decoding(model):
    """On a CPU, lie the weights column by column while tokens are sampled, with the adapter merged in: few rows times
    such weights is three times as fast. The weights come back bitwise."""
    from peft.tuners.lora import LoraLayer

    if model.device.type != "cpu" or {weight.dtype for weight in model.parameters()} != {
        torch.float32
    }:
        yield
        return
    lora = [module for module in model.modules() if isinstance(module, LoraLayer)]
    plain = bool(lora) and not any(module.use_dora.get("default") for module in lora)
    bases = [module.get_base_layer() for module in lora]
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    kept = {layer.weight: layer.weight.data for layer in (*bases, *linear)}
    with model.disable_adapter() if plain else contextlib.nullcontext():
        for base, module in zip(bases, lora) if plain else ():
            base.weight.data = base.weight.data + module.get_delta_weight("default")
        for weight in kept:
            weight.data = weight.data.t().contiguous().t()
        try:
            yield
        finally:
            for weight, data in kept.items():
                weight.data = data


def preallocate_kv_cache(model, cache, repeats: int, room: int, at: torch.Tensor) -> bool | None:
    """Lay out the key-value cache with each row `repeats` times and room for so many tokens, the next at `at` (1,): one
    that grows is copied whole at every token. Returns whether attention sees the room; None if there is none."""
    from transformers.cache_utils import DynamicLayer

    whole = model.device.type in CUDA_GRAPH_DEVICES  # so that no step changes a shape

    class Roomy(DynamicLayer):
        def __init__(self, *states):
            super().__init__()
            self.is_initialized = True
            self.keys, self.values = (
                F.pad(state, (0, 0, 0, room)).repeat_interleave(repeats, 0) for state in states
            )

        def update(self, *states, **_):
            both = self.keys, self.values
            for part, state in zip(both, states):
                part.index_copy_(2, at, state)
            return both if whole else tuple(part[:, :, : at + 1] for part in both)

    ours = (
        model.config._attn_implementation in ("sdpa", "eager")
        and "rope_parameters" in model.config.to_dict()
    )
    if not ours or not all(type(layer) is DynamicLayer for layer in cache.layers):
        return cache.batch_repeat_interleave(repeats)
    cache.layers = [Roomy(layer.keys, layer.values) for layer in cache.layers]
    return whole


def cuda_graph_steps(step: Callable[[], torch.Tensor], recorded: bool):
    """What `step()` gives, again and again; `recorded`: by a CUDA graph from the second time on, unless it waits for a
    value. To launch its operations one by one takes ten times as long as a GPU works at them."""
    result = graph = None
    if recorded:
        torch.cuda.set_sync_debug_mode("error")
        with contextlib.suppress(RuntimeError):
            result, graph = step(), torch.cuda.CUDAGraph()
        torch.cuda.set_sync_debug_mode("default")
    while graph is None:
        yield step()
    yield result
    with torch.cuda.graph(graph):
        result = step()
    while True:
        graph.replay()
        yield result


def sample_next_token(
    logits: torch.Tensor, chance: torch.Tensor | None, sampling: Mapping
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens (B,), their log-probabilities (B,)) from logits (B, V): where the cumulative distribution passes `chance`
    (B,) in (0, 1], or the likeliest if that is None. The log-probabilities know the temperature, as those of training
    do, but not top_k and top_p."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = logits.float() / sampling["temperature"]
    chances = logits.softmax(-1)
    if chance is None:
        tokens = logits.argmax(-1)
    else:
        kept = chances
        if sampling["top_k"] or sampling["top_p"] < 1:
            logits = (
                TopKLogitsWarper(sampling["top_k"])(None, logits) if sampling["top_k"] else logits
            )
            kept = TopPLogitsWarper(sampling["top_p"])(None, logits).softmax(-1)
        cumulative = kept.cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(cumulative, chance[:, None].double() * cumulative[:, -1:])[:, 0]
    return tokens, chances.gather(1, tokens[:, None])[:, 0].log()


def uniform_numbers(count: int, sampling: Mapping, seed: int) -> torch.Tensor:
    """(count, T) uniform in (0, 1], for `draw`: a function of the seed, not of how completions fall into batches."""
    return 1 - torch.rand(
        count, sampling["max_new_tokens"], generator=torch.Generator().manual_seed(seed)
    )


@torch.no_grad()
def sample_completions(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    sampling: Mapping,
    chances: torch.Tensor | None = None,
    repeats: int = 1,
) -> tuple[list[list[int]], list[list[float]]]:
    """Completions of prompts (token ids, up to and including a stop token), and their tokens' log-probabilities:
    `repeats` for each prompt, one after the other, by chances (P repeats, T), or greedy if there are none. A prompt is
    read once for all its completions, and those that have stopped leave the batch."""
    from transformers import DynamicCache

    device, steps, width = model.device, sampling["max_new_tokens"], max(map(len, prompts))
    pad = lambda rows, value: torch.tensor(
        [[value] * (width - len(row)) + row for row in rows], device=device
    )
    ids, mask = (
        pad(prompts, tokenizer.pad_token_id),
        pad([[1] * len(prompt) for prompt in prompts], 0),
    )
    positions = (mask.cumsum(1) - 1).clamp(
        min=0
    )  # padding on the left does not count (Huang et al. 2024)
    stops = torch.tensor(stop_tokens(tokenizer), device=device)
    completions, sampled = ([[] for _ in range(len(prompts) * repeats)] for _ in range(2))
    with contextlib.ExitStack() as after, fast_decoding(model):
        after.callback(model.train, model.training)
        model.eval()  # in training, layers with dropout are noise and checkpointed ones keep no cache
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            past_key_values=DynamicCache(config=model.config),
        )
        at, cache = (
            torch.tensor([width], device=device),
            output.past_key_values,
        )  # where the next token goes
        fixed = preallocate_kv_cache(model, cache, repeats, steps, at)
        mask = F.pad(mask, (0, steps), value=not fixed)  # (P, W + T)
        mask = mask if fixed is None else additive_attention_mask(model, mask[:, None, None] > 0)
        state = (output.logits[:, -1], positions[:, -1:] + 1, mask)
        logits, position, mask = (tensor.repeat_interleave(repeats, 0) for tensor in state)
        rows = torch.arange(
            len(logits), device=device
        )  # the completions that are still being written
        running, token = torch.ones_like(rows, dtype=torch.bool), torch.zeros_like(rows)

        def step() -> torch.Tensor:
            seen = mask.index_fill_(-1, at, 0) if fixed else mask[..., : width + t + 1]
            output = model(
                input_ids=token[:, None],
                attention_mask=seen,
                position_ids=position,
                use_cache=True,
                past_key_values=cache,
            )
            at.add_(1), position.add_(1)
            return output.logits[:, -1]

        following = cuda_graph_steps(step, fixed)
        for t in range(steps):
            new, logp = sample_next_token(
                logits, None if chances is None else chances[rows, t], sampling
            )
            for row, more, *values in zip(
                *(tensor.tolist() for tensor in (rows, running, new, logp))
            ):
                for found, value in zip((completions, sampled), values if more else ()):
                    found[row].append(value)
            running &= ~torch.isin(token.copy_(new), stops)
            if t + 1 == steps or not running.any():
                break
            if not fixed and running.sum() <= len(rows) * 3 // 4:
                left = running.nonzero()[:, 0]
                cache.batch_select_indices(left)
                rows, running, token, position, mask = (
                    x[left] for x in (rows, running, token, position, mask)
                )
            logits = next(following)
    return completions, sampled


def decode_completions(tokenizer, completions: Sequence[list[int]]) -> tuple[list[str], list[bool]]:
    """(texts without the stop token, whether there was one)."""
    stopped = [ids[-1] in stop_tokens(tokenizer) for ids in completions]
    return [
        tokenizer.decode(ids[: len(ids) - stop], skip_special_tokens=True)
        for ids, stop in zip(completions, stopped)
    ], stopped


def generate(
    model, tokenizer, prompts: Sequence[list[dict]], max_new_tokens: int, batch_size: int = 16
):
    """Greedy answers to conversations: a list of (text, whether the model stopped by itself)."""
    answers = []
    for start in range(0, len(prompts), batch_size):
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
        completions, _ = sample_completions(
            model, tokenizer, ids, SAMPLING_DEFAULTS | {"max_new_tokens": max_new_tokens}
        )
        answers += zip(*decode_completions(tokenizer, completions))
    return answers
