"""attention.py: short sequences attend in float32 where a CPU trains in bfloat16."""

import pytest
import torch
from conftest import make_model

from core.attention import SHORT, train_short_sequences_in_float32


@pytest.fixture
def attended(monkeypatch):
    """The dtype in which each call of torch's attention computes."""
    train_short_sequences_in_float32()
    seen = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, **options):
        autocasts = torch.is_autocast_enabled("cpu")
        seen.append(torch.get_autocast_dtype("cpu") if autocasts else query.dtype)
        return inner(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    return seen


def gradient_of(model, length, dtype, mask=None):
    model.zero_grad()
    ids = torch.arange(2 * length).view(2, length) % 300
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=ids, attention_mask=mask).logits
    logits.float().square().mean().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


@pytest.mark.parametrize(
    "mask",
    [None, torch.tensor([[1] * 20, [0] * 4 + [1] * 16]), torch.zeros(2, 1, 20, 20).bfloat16()],
    ids=["causal", "padding", "additive"],
)
def test_short_sequences_attend_in_float32_and_learn_the_same(tokenizer, attended, mask):
    model = make_model(tokenizer)
    found = gradient_of(model, 20, torch.bfloat16, mask)
    assert set(attended) == {torch.float32}
    attended.clear()
    whole = mask.float() if mask is not None and mask.is_floating_point() else mask
    wanted = gradient_of(model, 20, torch.float32, whole)
    assert torch.norm(found - wanted) < 0.02 * torch.norm(wanted)


def test_what_torch_does_as_fast_is_left_to_it(tokenizer, attended):
    model = make_model(tokenizer)
    gradient_of(model, SHORT, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.ones(1, 9, dtype=torch.long))
    assert set(attended) == {torch.bfloat16}
    attended.clear()
    gradient_of(model, 20, torch.float32)
    assert set(attended) == {torch.float32}
