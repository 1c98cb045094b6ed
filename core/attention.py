"""Attention for training in bfloat16 on a CPU."""

from __future__ import annotations

import torch

SHORT = 192  # sequences with fewer positions are short


def train_short_sequences_in_float32() -> None:
    """Make transformers' "sdpa" attention compute short sequences in float32 when training in
    bfloat16 on a CPU.

    For them the backward pass of torch's kernel takes three times as long in bfloat16, which is
    more than the conversion of queries, keys and values costs.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module, query, key, value, attention_mask, **options):
        dtype = query.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        trains_on_cpu = query.device.type == "cpu" and query.requires_grad
        if not trains_on_cpu or dtype != torch.bfloat16 or key.shape[-2] >= SHORT:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        with torch.autocast("cpu", enabled=False):
            output, _ = sdpa_attention_forward(
                module, query.float(), key.float(), value.float(), attention_mask, **options
            )
        return output.to(dtype), None

    AttentionInterface.register("sdpa", attend)
