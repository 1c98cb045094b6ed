"""Optimizers and learning-rate schedules, by the names that the options `optim` and
`lr_scheduler_type` give them.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from core.config import TrainingConfig

ADAM_DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
# Normalization weights and biases are not pulled towards 0.
NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|[._])norm($|\.)", re.IGNORECASE)


def new_optimizer(
    config: TrainingConfig, model, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The optimizer that `optim` names, over parameter groups with "lr" and "weight_decay"."""
    if config.optim in ("adamw_8bit", "paged_adamw_8bit"):
        return new_8bit_optimizer(model, groups, is_paged=config.optim.startswith("paged"))
    if config.optim == "adafactor":
        from transformers.optimization import Adafactor

        # The learning rate is that of the option, not one of its own.
        return Adafactor(groups, scale_parameter=False, relative_step=False)
    if config.optim == "sgd":
        return torch.optim.SGD(groups)
    # None leaves the choice of the kernel to torch.
    fused = True if config.optim == "adamw_torch_fused" else None
    return torch.optim.AdamW(groups, **ADAM_DEFAULTS, fused=fused)


def new_8bit_optimizer(model, groups: list[dict[str, Any]], is_paged: bool):
    """AdamW with its moments in 8 bits (Dettmers et al. 2022), but for those of embeddings."""
    import bitsandbytes

    # Moments of rare tokens are too uneven for 8 bits.
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return bitsandbytes.optim.AdamW(groups, **ADAM_DEFAULTS, optim_bits=8, is_paged=is_paged)


def decay_groups(config: TrainingConfig, model) -> list[dict[str, Any]]:
    """The parameter groups of all that trains: matrices with weight decay, the rest without."""
    decayed, not_decayed = [], []
    norms = set()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            norms.update(id(parameter) for parameter in module.parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if NOT_DECAYED.search(name) or id(parameter) in norms:
            not_decayed.append(parameter)
        else:
            decayed.append(parameter)
    rate = config.learning_rate
    return [
        {"params": decayed, "lr": rate, "weight_decay": config.weight_decay},
        {"params": not_decayed, "lr": rate, "weight_decay": 0.0},
    ]


def schedule_factor(config: TrainingConfig, step: int, num_steps: int) -> float:
    """What the learning rate of step 0, 1, ... is multiplied by; above 0 in every step.

    Warm-up rises in equal parts to 1, which its last step has. From there "linear" and
    "polynomial" fall in a straight line and "cosine" in half a wave, to reach 0 after the last
    step.
    """
    if config.lr_scheduler_type == "constant":
        return 1.0
    num_warmup_steps = math.ceil(config.warmup_ratio * num_steps)
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    if config.lr_scheduler_type == "constant_with_warmup":
        return 1.0
    steps_after_warmup = num_steps - num_warmup_steps
    if config.lr_scheduler_type == "cosine":
        progress = (step - num_warmup_steps) / steps_after_warmup
        return 0.5 * (1 + math.cos(math.pi * progress))
    return (num_steps - step) / steps_after_warmup


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set the rate of each group to `factor` times its peak; returns that of the first group."""
    for group in optimizer.param_groups:
        # The first call finds the peak; what it sets is not taken for it later.
        group.setdefault("peak_lr", group["lr"])
        group["lr"] = group["peak_lr"] * factor
    return optimizer.param_groups[0]["lr"]
