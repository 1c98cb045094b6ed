"""The loss that keeps the experts of a mixture about equally busy (Fedus et al. 2021, equation 4),
for models whose configuration asks for it by output_router_logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from core.output_layer import unwrap_model


def router_loss_weight(model) -> float:
    """`router_aux_loss_coef` of the model's configuration; 0 where it computes no router loss."""
    config = unwrap_model(model).config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    return config.router_aux_loss_coef


@contextlib.contextmanager
def recorded_router_losses(model) -> Iterator[list[Tensor]]:
    """The router losses () of all passes with gradient inside the context."""
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
