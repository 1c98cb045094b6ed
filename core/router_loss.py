"""The load-balancing loss of mixtures of experts (Fedus et al. 2021, equation 4), for models whose
configuration enables it by output_router_logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from core.output_layer import unwrap_model


def router_loss_weight(model) -> float:
    """`router_aux_loss_coef` from the model's configuration; 0 if it computes no router loss."""
    config = unwrap_model(model).config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    return config.router_aux_loss_coef


@contextlib.contextmanager
def recorded_router_losses(model) -> Iterator[list[Tensor]]:
    """Record the router losses () of all passes with gradient in the block."""
    losses: list[Tensor] = []

    def record(module, inputs, output) -> None:
        loss = getattr(output, "aux_loss", None)
        if torch.is_grad_enabled() and loss is not None:
            losses.append(loss)

    handle = unwrap_model(model).register_forward_hook(record)
    try:
        yield losses
    finally:
        handle.remove()
