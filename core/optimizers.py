"""Optimizers and learning-rate schedules, by their names in the options `optim` and
`lr_scheduler_type`.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from core.config import TrainingConfig

ADAM_DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
# Normalization weights and biases have no weight decay.
NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|[._])norm($|\.)", re.IGNORECASE)


def new_optimizer(
    config: TrainingConfig, model, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The optimizer named by `optim`, for parameter groups with "lr" and "weight_decay"."""
    if config.optim in ("adamw_8bit", "paged_adamw_8bit"):
        return new_8bit_optimizer(model, groups, is_paged=config.optim.startswith("paged"))
    if config.optim == "adafactor":
        from transformers.optimization import Adafactor

        # Use the learning rate of the option, not Adafactor's own.
        return Adafactor(groups, scale_parameter=False, relative_step=False)
    if config.optim == "sgd":
        return torch.optim.SGD(groups)
    if config.optim == "muon":
        return MuonWithAdamW(split_hidden_matrices(model, groups))
    # With None, torch chooses the implementation.
    fused = True if config.optim == "adamw_torch_fused" else None
    return torch.optim.AdamW(groups, **ADAM_DEFAULTS, fused=fused)


def new_8bit_optimizer(model, groups: list[dict[str, Any]], is_paged: bool):
    """AdamW with 8-bit moments (Dettmers et al. 2022), except those of embeddings."""
    import bitsandbytes

    # Moments of rare tokens are too uneven for 8 bits.
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return bitsandbytes.optim.AdamW(groups, **ADAM_DEFAULTS, optim_bits=8, is_paged=is_paged)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for groups with "is_hidden", fused AdamW for the others.

    Muon's step is scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable", equation 4),
    so one learning rate serves both.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, {})
        self.muon = torch.optim.Muon(self.groups_of(True), adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(self.groups_of(False), **ADAM_DEFAULTS, fused=True)

    def groups_of(self, is_hidden: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["is_hidden"] == is_hidden]

    @torch.no_grad()
    def step(self, closure=None):
        # Sharding and loading replace this optimizer's groups and state.
        self.muon.param_groups = self.groups_of(True)
        self.adamw.param_groups = self.groups_of(False)
        for part in (self.muon, self.adamw):
            part.state = self.state
            part.step()


def split_hidden_matrices(model, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split each group in two: "is_hidden" are the matrices inside `model`, without embeddings and
    output layer."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    at_the_ends = {id(weight) for end in ends if end is not None for weight in end.parameters()}
    inside = {id(weight) for weight in model.parameters() if weight.dim() == 2} - at_the_ends
    split = []
    for group in groups:
        for is_hidden in (True, False):
            chosen = [weight for weight in group["params"] if (id(weight) in inside) == is_hidden]
            split.append({**group, "params": chosen, "is_hidden": is_hidden})
    return split


def decay_groups(config: TrainingConfig, model) -> list[dict[str, Any]]:
    """The parameter groups of all trained weights: matrices with weight decay, others without."""
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
    """The factor of the learning rate at step 0, 1, ...; above 0 at every step.

    Warm-up rises linearly and reaches 1 at its last step. After that, "linear" and "polynomial"
    decay linearly and "cosine" by half a cosine wave, to 0 after the last step.
    """
    if config.lr_scheduler_type == "constant":
        return 1.0
    num_warmup_steps = config.warmup_steps or math.ceil(config.warmup_ratio * num_steps)
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
        # The first call records the peak.
        group.setdefault("peak_lr", group["lr"])
        group["lr"] = group["peak_lr"] * factor
    return optimizer.param_groups[0]["lr"]
