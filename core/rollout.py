"""Shared by a2c, ppo, trpo and grpo: options, prompts, sampling, scoring, log-probabilities.

Shapes: P prompts per step, G completions per prompt, B = P * G completions, T tokens in the longest
completion, N completion tokens in total, R rewards, V vocabulary size, H hidden size.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from core.chat import IGNORE, prompt_ids
from core.columns import CONTEXT_COLUMNS
from core.config import (
    Count,
    DataConfig,
    Natural,
    NonNegative,
    Options,
    Positive,
    Scheduler,
    Share,
    TrainingConfig,
)
from core.data import load_rows, usable_rows
from core.data_sources import DataPath
from core.errors import ConfigError, RowError, as_config_error
from core.final_answers import opens_thinking
from core.logprobs import (
    TokenLogps,
    answer_logits,
    answer_scores,
    collate_answers,
    rows_at_once,
    sharing_is_exact,
    without_adapter,
)
from core.messages import as_messages, with_context
from core.rewards import (
    REWARDS,
    ScoringConfig,
    check_answer_column,
    check_reward_arguments,
    check_reward_prompts,
    rewards_reading_answers,
    score_completions,
    weighted_total,
)
from core.runtime import compute_dtype, to_device
from core.sampling import (
    SAMPLING_DEFAULTS,
    NoStopTokens,
    check_sampling,
    decode_completions,
    sample_completions,
)

# -- configuration ---------------------------------------------------------------------------------

PROMPT_FORMATS = {  # name: required columns; if several fit, the one with the most columns wins
    "prompt": ["prompt"],
    "messages": ["messages"],
    "question": ["question"],
    "problem": ["problem"],
    "instruction": ["instruction"],
    "instruction-input": ["instruction", "input"],
}
PROMPT_OPTIONAL_COLUMNS = {form: [*CONTEXT_COLUMNS] for form in PROMPT_FORMATS}


PROMPT_ENDING = 16  # last tokens of a prompt, where the template may have opened <think>


@dataclass
class RLConfig(DataConfig, ScoringConfig, TrainingConfig):
    """Options of every RL recipe, in addition to those of loading, LoRA, optimizer and rewards."""

    aliases: ClassVar = TrainingConfig.aliases | {"data": "prompt_dataset_path"}
    formats: ClassVar = PROMPT_FORMATS
    default_rates: ClassVar = (1e-4, 1e-6)
    everyday: ClassVar[tuple[str, ...]] = (
        "model_name_or_path",
        "prompt_dataset_path",
        "output_dir",
        "reward",
        "reward_model_path",
        "num_training_steps",
        "batch_size",
        "num_generations",
        "generation_kwargs",
        "learning_rate",
        "init_kl_coef",
    )
    has_critic: ClassVar[bool] = False  # whether the algorithm learns a value function
    optimizes_policy: ClassVar[bool] = True  # false: TRPO updates the policy itself
    accumulates: ClassVar[bool] = True  # false: one step per rollout, whatever the mini-batches

    prompt_dataset_path: DataPath = ""  # file, folder or hub name, or a list: docs/data.md
    validation_split: Share = 0.05  # fraction of rows held out for evaluation
    max_seq_length: Count = 1024  # tokens of prompt and completion; longer prompts are dropped
    # reward
    missing_stop_penalty: NonNegative = 0.0  # subtracted if a completion has no stop token
    # rollout
    num_training_steps: Count = 100  # number of rollouts
    batch_size: Count = 16  # completions per step and process
    num_generations: Count = 1  # completions sampled for each prompt
    share_prompt: bool = True  # encode a prompt once for its completions, if that is exact
    # sampling; the defaults are {max_new_tokens: 64, temperature: 1, top_k: 0, top_p: 1}
    generation_kwargs: Options = field(default_factory=dict)
    mini_batch_size: Natural = 0  # completions per backward pass; 0 takes the whole batch
    # learning rate
    learning_rate: Positive | None = None  # peak rate; none: 1e-4 for LoRA, 1e-6 for all weights
    warmup_ratio: Share = 0.0  # fraction of steps used for warm-up
    lr_scheduler_type: Scheduler = "linear"  # learning-rate schedule after warm-up
    # KL to the reference (the starting model)
    init_kl_coef: NonNegative = 0.05  # weight beta of the KL penalty; 0 disables it
    # estimator: kl is k1, abs is |k1|, mse is k2, full is exact
    kl_penalty: Literal["kl", "abs", "mse", "k3", "full"] = "kl"
    kl_in: Literal["reward", "loss"] = "reward"  # part of each token's reward, or of the loss
    target_kl: Positive | None = None  # adapt beta to this KL per completion, in nats; none: fixed
    kl_horizon: Positive = 10000.0  # horizon of the adaptive KL controller, in completions
    # evaluation and checkpoints
    eval_freq: Natural = 0  # evaluate every N steps; 0 evaluates only before and after training
    num_eval_prompts: Count = 64  # maximum number of held-out prompts per evaluation
    save_freq: Natural = 50  # save a checkpoint every N steps; 0 saves none

    @property
    def sampling(self) -> dict[str, Any]:
        return SAMPLING_DEFAULTS | self.generation_kwargs

    @property
    def trains_with_rl(self) -> bool:
        """False if DPO trains instead (rlaif with feedback_mode=preference)."""
        return True

    def __post_init__(self):
        super().__post_init__()
        # From here on, no code sees the 0 that means "the whole batch".
        if self.mini_batch_size == 0:
            self.mini_batch_size = self.batch_size

    def validate(self) -> None:
        super().validate()
        if not self.rewarding:
            raise ConfigError(
                f"reward is missing: --reward=<{', '.join(REWARDS)} or path/to/file.py:function>, "
                "or --reward_model_path=<folder>"
            )
        check_sampling("generation_kwargs", self.generation_kwargs)
        if self.sampling["max_new_tokens"] >= self.max_seq_length:
            raise ConfigError(
                f"max_seq_length={self.max_seq_length} leaves no room for a prompt before "
                "max_new_tokens; raise max_seq_length or lower max_new_tokens"
            )
        self.validate_batch_sizes()
        why = "here, since every rollout makes one step"
        self.note_unread(not self.accumulates, "gradient_accumulation_steps", why)
        self.validate_kl()
        if self.trains_with_rl and self.lora_dropout:
            raise ConfigError(
                "with lora_dropout above 0, log-probabilities would not be reproducible; "
                "set lora_dropout=0"
            )
        self.note_unread(not self.validation_split, "eval_freq", "with validation_split=0")

    def validate_batch_sizes(self) -> None:
        # Check batch_size first: mini_batch_size may be derived from it.
        for whole, part in (
            ("batch_size", "num_generations"),
            ("batch_size", "mini_batch_size"),
            ("mini_batch_size", "num_generations"),
        ):
            size, divisor = getattr(self, whole), getattr(self, part)
            if size % divisor:
                raise ConfigError(f"{whole}={size} must be a multiple of {part}={divisor}")
        if not (self.trains_with_rl and self.accumulates):
            return
        num_mini_batches = self.batch_size // self.mini_batch_size
        if num_mini_batches % self.gradient_accumulation_steps:
            raise ConfigError(
                "gradient_accumulation_steps must divide batch_size / mini_batch_size"
            )

    def validate_kl(self) -> None:
        if self.kl_in == "reward" and self.kl_penalty == "full":
            raise ConfigError(
                "kl_penalty=full does not depend on the sampled token, so it cannot be part of its "
                "reward; set kl_in=loss"
            )
        if self.target_kl and not self.init_kl_coef:
            raise ConfigError("target_kl scales init_kl_coef, which is 0; set init_kl_coef above 0")
        self.note_unread(not self.target_kl, "kl_horizon", "without target_kl")


# -- data: rows to prompts -------------------------------------------------------------------------


def to_prompt(row: dict, form: str, needs_answer: bool = False) -> dict:
    """Convert a row to {"prompt": messages, "columns": its other columns, for the rewards}.

    Raises RowError without a prompt, or without an answer if `needs_answer`.
    """
    if needs_answer and row.get("answer", "") is None:
        raise RowError("without an answer")
    source = PROMPT_FORMATS[form]
    prompt = as_messages(row[source[0]], "user")
    if form == "instruction-input":
        parts = [str(part) for part in (row["instruction"], row["input"]) if part]
        prompt = as_messages("\n\n".join(parts), "user")
    prompt = with_context(prompt, row)
    # Drop answers that the data already has: the policy must not see them.
    while prompt and prompt[-1]["role"] == "assistant":
        prompt.pop()
    if not prompt:
        raise RowError("without a prompt")
    # All other columns are passed to the reward functions by name.
    columns = {name: value for name, value in row.items() if name not in source}
    return {"prompt": prompt, "columns": columns}


def encode_prompt(row: dict, tokenizer, limit: int) -> dict:
    """Add the prompt's token "ids" to a row; raises RowError if there are more than `limit`."""
    ids = prompt_ids(tokenizer, row["prompt"])
    if len(ids) > limit:
        raise RowError(
            f"whose prompt is longer than {limit} tokens, which leaves no room to answer"
        )
    return row | {"ids": ids, "opens_thinking": prompt_opens_thinking(tokenizer, ids)}


def prompt_opens_thinking(tokenizer, ids: list[int]) -> bool:
    """Whether the chat template ends the prompt inside a thinking block, so that the completion has
    only the end of that block."""
    return opens_thinking(tokenizer.decode(ids[-PROMPT_ENDING:]))


def load_prompts(
    config: RLConfig, reward_functions: dict[str, Callable]
) -> tuple[list[dict], list[dict], dict]:
    """(training rows, evaluation rows, lineage of the data), each row by `to_prompt`.

    Raises ConfigError if a reward reads a column that the data does not have.
    """
    needs_answer = bool(rewards_reading_answers(config))

    def convert(row: dict, form: str) -> dict:
        return to_prompt(row, form, needs_answer)

    training, evaluation, data_set = load_rows(
        config, convert, PROMPT_OPTIONAL_COLUMNS, passes_on=True
    )
    check_answer_column(config, training[0]["columns"])
    check_reward_arguments(config, reward_functions, training[0], "completion_ids")
    check_reward_prompts(config, [row["prompt"] for row in (*training, *evaluation)])
    return training, evaluation, data_set


def encode_prompts(
    config: RLConfig, rows: list[dict], tokenizer, limit: int, what: str
) -> list[dict]:
    """Add token ids to rows; drops those whose prompt and completion may exceed `limit` tokens."""
    max_prompt_length = limit - config.sampling["max_new_tokens"]

    def encode(row: dict) -> dict:
        return encode_prompt(row, tokenizer, max_prompt_length)

    return usable_rows(rows, encode, what) if rows else []


def prompt_sequences(
    config: RLConfig, row: dict, tokenizer, context: int
) -> tuple[list[tuple], bool]:
    """([(prompt ids, None)], False), for the checks before training."""
    limit = min(config.max_seq_length, context) - config.sampling["max_new_tokens"]
    return [(encode_prompt(row, tokenizer, limit)["ids"], None)], False


# -- rollout ---------------------------------------------------------------------------------------


@dataclass
class Policy:
    """The model that writes completions, its reference model and its reward functions."""

    config: Any  # the recipe's RLConfig, with its own options
    model: Any
    tokenizer: Any
    reward_functions: dict[str, Callable]
    reference: (
        Any  # frozen copy of the start; None if unused, or if it is the model without adapter
    )
    has_adapter: bool  # whether the model without its adapter is the run's initial model
    shares_prompts: bool  # whether one pass over a prompt serves all its completions

    def __post_init__(self):
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def autocast(self):
        dtype = compute_dtype(self.config.torch_dtype)
        return torch.autocast(self.model.device.type, dtype, enabled=dtype != torch.float32)


@dataclass
class Rollout:
    """B completions of P prompts, and the tensors computed from them.

    Tensors are on the model's device. The algorithm fills in the fields that are None at first. A
    mini-batch is a Rollout with fewer completions (`select`).
    """

    groups: list[dict]  # P of {"prompt": ids, "answers": G completions (ids), "labels": the same}
    rows: list[dict]  # B: the row of each completion's prompt
    texts: list[str]  # B
    mask: torch.Tensor  # (B, T) bool: completion tokens, including the stop token
    lengths: torch.Tensor  # (B,)
    stopped: torch.Tensor  # (B,) bool: whether the completion ended in a stop token
    sampled_logps: list[list[float]]  # B lists: log-probabilities of the tokens when sampled
    indices: torch.Tensor  # (B,): indices of these completions in the whole rollout
    seconds: float  # time for sampling and scoring
    rewards: torch.Tensor | None = None  # (B, R): each reward function's verdict; NaN: none
    scores: torch.Tensor | None = None  # (B,): weighted sum of the rewards; NaN: no verdict
    used: torch.Tensor | None = None  # (B, T): the mask as 0.0 and 1.0, all 0.0 without a verdict
    old_logps: torch.Tensor | None = None  # (B, T): under the policy that sampled
    ref_logps: torch.Tensor | None = None  # (B, T): under the reference
    entropy: torch.Tensor | None = None  # (B, T): of the policy that sampled
    hidden: torch.Tensor | None = None  # (B, T, H): what the critic reads
    values: torch.Tensor | None = None  # (B, T)
    advantages: torch.Tensor | None = None  # (B, T)
    returns: torch.Tensor | None = None  # (B, T)
    weights: torch.Tensor | None = None  # (B, T) or (B, 1): weight of each loss in the mean

    @property
    def completions(self) -> list[list[int]]:
        """B lists of token ids."""
        return [ids for group in self.groups for ids in group["answers"]]

    def select(self, prompts: torch.Tensor) -> Rollout:
        """The completions of the prompts with these indices (p,), as a mini-batch."""
        # Completions of one prompt stay together: they are compared and share a pass over it.
        num_generations = len(self.rows) // len(self.groups)
        firsts = prompts[:, None] * num_generations  # (p, 1)
        rows = (firsts + torch.arange(num_generations)).flatten()  # (b,)
        tensors: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if torch.is_tensor(value):
                tensors[f.name] = value[rows]
        places = rows.tolist()
        return replace(
            self,
            groups=[self.groups[p] for p in prompts.tolist()],
            rows=[self.rows[b] for b in places],
            texts=[self.texts[b] for b in places],
            sampled_logps=[self.sampled_logps[b] for b in places],
            **tensors,
        )

    def mini_batches(self, size: int, order: torch.Tensor | None = None) -> Iterator[Rollout]:
        """Yield mini-batches of `size` completions, with the prompts in this `order` (P,)."""
        if order is None:
            order = torch.arange(len(self.groups))
        num_generations = len(self.rows) // len(self.groups)
        for prompts in order.split(size // num_generations):
            yield self.select(prompts)


@torch.no_grad()
def sample_rollout(policy: Policy, rows: list[dict], uniforms: torch.Tensor) -> Rollout:
    """Sample completions of the rows' prompts (P,) with uniform numbers (B, max_new_tokens)."""
    began = time.perf_counter()
    num_generations = policy.config.num_generations
    prompts = [row["ids"] for row in rows]
    with policy.autocast():
        completions, sampled_logps = sample_completions(
            policy.model,
            policy.tokenizer,
            prompts,
            policy.config.sampling,
            uniforms,
            num_generations,
        )
    texts, stopped = decode_completions(policy.tokenizer, completions)
    groups, rows_of_completions = [], []
    for p, row in enumerate(rows):
        answers = completions[p * num_generations : (p + 1) * num_generations]
        groups.append({"prompt": row["ids"], "answers": answers, "labels": answers})
        rows_of_completions += [row] * num_generations
    device = policy.model.device
    # The mask includes the stop token: stopping is an action too, so it is trained.
    lengths = torch.tensor([len(ids) for ids in completions])  # (B,)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
    return Rollout(
        groups=groups,
        rows=rows_of_completions,
        texts=texts,
        mask=mask.to(device),
        lengths=lengths.to(device),
        stopped=torch.tensor(stopped).to(device),
        sampled_logps=sampled_logps,
        indices=torch.arange(len(completions)),
        seconds=time.perf_counter() - began,
    )


def score_rollout(policy: Policy, rollout: Rollout) -> None:
    """Set rollout.rewards (B, R), their sum rollout.scores (B,), and rollout.used (B, T)."""
    began = time.perf_counter()
    config, device = policy.config, policy.model.device
    rewards = score_completions(
        config, policy.reward_functions, rollout.rows, rollout.texts, rollout.completions
    )
    rollout.rewards = rewards.to(device)
    rollout.scores = weighted_total(config, rewards).to(device)
    # A completion without a verdict is not trained on; a score of 0 would mean that it was bad.
    has_verdict = ~rollout.scores.isnan()
    rollout.used = rollout.mask.float() * has_verdict[:, None]
    rollout.seconds += time.perf_counter() - began


# -- log-probabilities -----------------------------------------------------------------------------


@dataclass
class TokenOutputs:
    """Model outputs at completion tokens. Fields that were not requested are None."""

    logps: torch.Tensor  # (B, T): log-probabilities of the tokens
    entropy: torch.Tensor | None = None  # (B, T): of each token's distribution
    hidden: torch.Tensor | None = None  # (B, T, H): last-layer hidden state that predicts the token
    log_probs: torch.Tensor | None = None  # (N, V): log-probabilities of the whole vocabulary


def completion_outputs(
    policy: Policy, batch: Rollout, *extras: str, reference: bool = False
) -> TokenOutputs:
    """One pass of the policy, or of the reference, over completions with their prompts.

    `extras` names the other fields of TokenOutputs to compute. Gradients flow through entropy only
    if log_probs is requested too.
    """
    inputs = collate_answers(batch.groups, policy.shares_prompts)
    inputs = to_device(inputs, policy.model.device)
    model = policy.model
    switched_off: Any = contextlib.nullcontext()
    # With an adapter, the reference is the same model without it, and needs no memory of its own.
    if reference and policy.has_adapter:
        switched_off = without_adapter(policy.model)
    elif reference:
        model = policy.reference
    # The policy is the sampling distribution, including the temperature (Huang et al. 2024).
    temperature = policy.config.sampling["temperature"]
    wants_entropy = "entropy" in extras
    outputs = TokenOutputs(logps=None)
    with policy.autocast(), switched_off:
        if "log_probs" in extras:
            logits, hidden = answer_logits(model, inputs)  # (N, V), (N, H)
            if temperature != 1:
                logits = logits / temperature
            outputs.log_probs = logits.float().log_softmax(-1)
            targets = inputs["targets"][inputs["targets"] != IGNORE]  # (N,)
            logps = outputs.log_probs.gather(1, targets[:, None])[:, 0]  # (N,)
            entropies = [entropy_of(outputs.log_probs)] if wants_entropy else []  # (N,)
        else:
            score = partial(score_tokens, temperature=temperature, wants_entropy=wants_entropy)
            (logps, *entropies), hidden = answer_scores(model, inputs, score)  # (N,), (N, H)

    def spread(values: torch.Tensor) -> torch.Tensor:
        """(N, ...) -> (B, T, ...), 0 in padding."""
        zeros = values.new_zeros(*batch.mask.shape, *values.shape[1:])
        return zeros.index_put((batch.mask,), values)

    outputs.logps = spread(logps)
    if wants_entropy:
        outputs.entropy = spread(entropies[0])
    if "hidden" in extras:
        outputs.hidden = spread(hidden.float())
    return outputs


def score_tokens(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, wants_entropy: bool
) -> list[torch.Tensor]:
    """The log-probabilities (n,) of targets (n,) given logits (n, V), then, if wanted, the
    entropies (n,) of their distributions, without gradient."""
    if temperature != 1:
        logits = logits / temperature
    scores = [TokenLogps.apply(logits, targets)]
    if wants_entropy:
        # In chunks, to avoid a second (n, V) tensor in memory.
        chunks = logits.detach().split(rows_at_once(logits))
        scores.append(torch.cat([entropy_of(chunk.float().log_softmax(-1)) for chunk in chunks]))
    return scores


def entropy_of(log_probs: torch.Tensor) -> torch.Tensor:
    """(N, V) -> (N,), in nats."""
    return -(log_probs.exp() * log_probs).sum(-1)


@torch.no_grad()
def rollout_outputs(
    policy: Policy, rollout: Rollout, *extras: str, reference: bool = False
) -> TokenOutputs:
    """`completion_outputs` of the whole rollout, in mini-batches and without gradients."""
    parts = [
        completion_outputs(policy, batch, *extras, reference=reference)
        for batch in rollout.mini_batches(policy.config.mini_batch_size)
    ]
    outputs = TokenOutputs(logps=torch.cat([part.logps for part in parts]))
    for name in extras:
        setattr(outputs, name, torch.cat([getattr(part, name) for part in parts]))
    return outputs


def check_can_sample(policy: Policy, prompt: list[int]) -> None:
    """Raise ConfigError if a model cannot continue from its cache; tested on two tokens."""
    kind = policy.model.config.model_type
    with as_config_error(f"a model of type {kind} cannot be sampled from"), policy.autocast():
        two_tokens = SAMPLING_DEFAULTS | {"max_new_tokens": 2}
        sample_completions(policy.model, NoStopTokens(), [prompt], two_tokens)


def can_share_prompts(config: RLConfig, model, longest: dict) -> bool:
    """Whether one pass over a prompt can serve all its completions; tests the longest prompt."""
    if not config.share_prompt or config.num_generations == 1:
        return False
    length = config.sampling["max_new_tokens"]
    answer = list(itertools.islice(itertools.cycle(longest["ids"]), length))
    row = {"prompt": longest["ids"], "answers": [answer] * 2, "labels": [answer] * 2}
    return sharing_is_exact(model, row)


def sampling_gaps(rollout: Rollout) -> torch.Tensor:
    """|log pi(token) when it was sampled - log pi_old(token)|, (B, T) in nats, 0 in padding.

    Both compute the same distribution independently; if one of them mishandles attention or
    positions of a model, the ratios are wrong from the first step on.
    """
    sampled = torch.zeros_like(rollout.old_logps)
    flat_logps = list(itertools.chain.from_iterable(rollout.sampled_logps))
    sampled[rollout.mask] = torch.tensor(flat_logps, device=sampled.device)
    return (sampled - rollout.old_logps).abs() * rollout.mask


def check_sampled_logps(policy: Policy, rollout: Rollout) -> None:
    """Raise RuntimeError if sampling and training disagree on the tokens' log-probabilities."""
    gap = float(sampling_gaps(rollout).max())
    tolerance = 1e-2 if policy.model.dtype == torch.float32 else 1.0
    if gap > tolerance:
        raise RuntimeError(
            f"sampling and training disagree on a token's log-probability by {gap:.2g}; "
            "try attn_implementation=eager, and please report the model"
        )


def check_sampling_gap(policy: Policy, gap: float) -> None:
    """Raise RuntimeError if the mean sampling gap (nats per token) is more than rounding."""
    limit = 1e-3 if policy.model.dtype == torch.float32 else 0.2
    if gap > limit:
        raise RuntimeError(
            f"sampling and training disagree on the log-probabilities by {gap:.2g} nats a token "
            f"(sampling_gap, at most {limit:g}); try attn_implementation=eager, and please report "
            "the model"
        )
