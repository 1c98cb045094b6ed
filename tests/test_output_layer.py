"""core/output_layer.py: scores computed in chunks equal those from all logits at once."""

import contextlib

import cot_distillation as cot
import dpo
import evaluate
import pytest
import sft
import torch
from conftest import make_model
from test_dpo import config as dpo_config
from test_dpo import encoded
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import common
import core.output_layer
from core.logprobs import TokenLogps
from core.output_layer import deferred_logits, returns_its_logits, scores_at

VOCABULARY = 50
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=0,
)


def plain(tied=False, **changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, **changes)).eval()


def capped(cap=2.0):
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=cap)).eval()


def scaled_up():
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)).eval()


def scaled_down():
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).eval()


@pytest.fixture
def seen(monkeypatch):
    """How many positions each call of the score had, with chunks of up to 8."""
    monkeypatch.setattr(core.output_layer, "MAX_LOGITS", {"cpu": 8 * VOCABULARY})
    return []


def a_batch():
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (3, 12))
    mask = torch.rand(3, 12) < 0.7
    targets = torch.randint(VOCABULARY, (int(mask.sum()),))
    weights = torch.randn(len(targets))
    return ids, mask, targets, weights


def scores_and_gradients(model, seen):
    """The results of scores_at, and the gradients that they send to the model's weights."""
    ids, mask, targets, weights = a_batch()

    def score(logits, targets):
        seen.append(len(logits))
        return [TokenLogps.apply(logits, targets), logits.argmax(-1)]

    model.zero_grad()
    (logps, best), hidden = scores_at(model, mask, score, targets, input_ids=ids)
    (logps * weights).sum().backward()
    return logps.detach(), best, hidden.detach(), weights_of(model)


def by_hand(model):
    ids, mask, targets, weights = a_batch()
    model.zero_grad()
    logits = model(input_ids=ids).logits[mask]
    logps = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    (logps * weights).sum().backward()
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][mask]
    return logps.detach(), logits.argmax(-1), hidden.detach(), weights_of(model)


def weights_of(model):
    return [w.grad.clone() for w in model.parameters() if w.grad is not None]


def require_equal(found, wanted, tolerance=1e-5):
    for ours, theirs in zip(found[:3], wanted[:3], strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=0, atol=tolerance)
    assert len(found[3]) == len(wanted[3]) > 0
    for ours, theirs in zip(found[3], wanted[3], strict=True):
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.norm()))


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_scores_in_chunks_are_those_of_all_logits(seen, tied, frozen):
    model = plain(tied)
    model.get_output_embeddings().requires_grad_(not frozen)
    num_positions = int(a_batch()[1].sum())
    assert num_positions > 16
    require_equal(scores_and_gradients(model, seen), by_hand(model))
    assert max(seen) == 8
    # A layer that trains has its logits computed a second time, for the backward pass.
    assert sum(seen) == num_positions * (1 if frozen else 2)


@pytest.mark.parametrize("make", [capped, scaled_up, scaled_down])
def test_logits_that_the_model_changes_afterwards_are_scored_as_it_returns_them(make, seen):
    model = make()
    ids, mask, *_ = a_batch()
    assert not returns_its_logits(model, ids)
    require_equal(scores_and_gradients(model, seen), by_hand(model))
    assert seen == [int(mask.sum())]


def test_a_cap_that_is_not_set_caps_nothing(seen):
    model = capped(None)
    assert returns_its_logits(model, a_batch()[0])
    require_equal(scores_and_gradients(model, seen), by_hand(model))
    assert max(seen) == 8


def test_the_try_on_one_token_leaves_random_numbers_and_gradients_alone():
    model = plain(attention_dropout=0.5).train()
    ids, *_ = a_batch()
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    returns_its_logits(model, ids)
    assert torch.equal(torch.rand(4), wanted)
    assert all(weight.grad is None for weight in model.parameters())


def test_the_output_layer_is_itself_again_after_a_failure():
    model = plain()
    ids, mask, targets, _ = a_batch()
    before = model(input_ids=ids).logits

    def broken(logits, targets):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        scores_at(model, mask, broken, targets, input_ids=ids)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("make", [capped, lambda: capped(None)])
def test_deferred_logits_are_the_logits_whatever_autocast_is_on(make):
    model = make()
    ids, mask, *_ = a_batch()
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[mask]
    states, project = deferred_logits(model, mask, input_ids=ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.cat([project(part) for part in states.split(5)])
    assert torch.allclose(found, wanted, atol=1e-6) and not found.requires_grad


def test_autocast_reaches_the_chunks(seen):
    """bfloat16 logits in chunks have the gradient of bfloat16 logits at once."""
    model = plain()
    model.get_output_embeddings().requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        found = scores_and_gradients(model, seen)
        core.output_layer.MAX_LOGITS["cpu"] = 2**24
        wanted = scores_and_gradients(model, seen)
    require_equal(found, wanted, tolerance=1e-2)


# -- recipes ---------------------------------------------------------------------------------------


def with_and_without_chunks(monkeypatch, function, *args):
    """What `function` returns with all logits at once, and in chunks of one position."""
    results = []
    for max_logits in (2**24, 1):
        monkeypatch.setattr(core.output_layer, "MAX_LOGITS", {"cpu": max_logits})
        results.append(function(*args))
    return results


def loss_and_gradient(loss, model, *args):
    model.zero_grad()
    value, metrics = loss(model, *args)
    value.backward()
    gradient = torch.cat([gradient.flatten() for gradient in weights_of(model)])
    return [value.detach(), gradient, *(metrics[name].float() for name in sorted(metrics))]


def require_close(results):
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture
def adapted(tokenizer, tmp_path):
    """A model with an adapter that is not the identity any more."""
    settings = dpo_config(tmp_path)
    model = common.add_adapter(make_model(tokenizer), settings)
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def sft_batch(tokenizer):
    sequences = []
    for question, answer in (("Why?", "Because of it."), ("3 + 4", "7")):
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        sequences += sft.encode(messages, tokenizer, 256)[0]
    return sft.collate(sequences)


def test_sft_in_chunks(tokenizer, adapted, monkeypatch):
    batch = sft_batch(tokenizer)
    args = (loss_and_gradient, sft.loss, adapted, batch)
    require_close(with_and_without_chunks(monkeypatch, *args))


@pytest.mark.parametrize("share", [True, False])
def test_dpo_in_chunks(tokenizer, tmp_path, adapted, monkeypatch, share):
    settings = dpo_config(tmp_path)
    batch = dpo.collate(encoded(tokenizer, tmp_path), share)
    args = (loss_and_gradient, dpo.loss, adapted, batch, settings)
    require_close(with_and_without_chunks(monkeypatch, *args))


def test_the_kl_of_dpo_is_measured_at_fewer_tokens_of_a_large_vocabulary(
    tokenizer, tmp_path, model, monkeypatch
):
    batch = dpo.collate(encoded(tokenizer, tmp_path))
    _, distributions = dpo.sequence_logps(model, batch)
    monkeypatch.setattr(dpo, "MAX_KL_NUMBERS", 3 * len(tokenizer))
    logps, fewer = dpo.sequence_logps(model, batch)
    assert len(distributions) > 3 >= len(fewer) > 1
    assert torch.allclose(fewer[0], distributions[0])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_in_chunks(tokenizer, tmp_path, adapted, monkeypatch, temperature):
    from test_cot_distillation import config

    settings = config(
        tmp_path,
        distillation_type="both",
        temperature=temperature,
        beta=0.3,
        teacher_model_path="x",
    )
    teacher = make_model(tokenizer, seed=5).eval()
    loss = cot.make_distillation_loss(settings, teacher, tokenizer)
    batch = sft_batch(tokenizer)
    args = (loss_and_gradient, loss, adapted.train(), batch)
    require_close(with_and_without_chunks(monkeypatch, *args))


def test_the_policy_of_rl_in_chunks(tokenizer, adapted, monkeypatch):
    """Log-probabilities with their gradient, entropy, and the hidden states that a critic reads."""
    from types import SimpleNamespace

    from core.rollout import completion_outputs

    groups = [
        {"prompt": [5, 6, 7], "answers": [[8, 9, 10], [11]], "labels": [[8, 9, 10], [11]]},
        {"prompt": [5, 6], "answers": [[7, 7], [9, 3]], "labels": [[7, 7], [9, 3]]},
    ]
    lengths = torch.tensor([3, 1, 2, 2])
    batch = SimpleNamespace(groups=groups, mask=torch.arange(3) < lengths[:, None])
    config = SimpleNamespace(sampling={"temperature": 0.7})
    policy = SimpleNamespace(
        model=adapted, config=config, shares_prompts=True, autocast=contextlib.nullcontext
    )

    def run():
        adapted.zero_grad()
        outputs = completion_outputs(policy, batch, "entropy", "hidden")
        (outputs.logps.sum() + outputs.hidden.square().mean()).backward()
        gradient = torch.cat([gradient.flatten() for gradient in weights_of(adapted)])
        return [outputs.logps.detach(), outputs.entropy, outputs.hidden.detach(), gradient]

    results = with_and_without_chunks(monkeypatch, run)
    require_close(results)
    assert not results[1][1].requires_grad
    whole = completion_outputs(policy, batch, "entropy", "log_probs")
    assert torch.allclose(whole.logps, results[1][0], atol=1e-5)
    assert torch.allclose(whole.entropy, results[1][1], atol=1e-5)


def test_evaluation_in_chunks(tokenizer, adapted, monkeypatch):
    sides = []
    for answer in ([7, 8], [9, 4, 4]):
        sides.append({"prompt": [5, 6], "answers": [answer], "labels": [answer]})
    rows = [{"sides": sides}]
    results = with_and_without_chunks(monkeypatch, evaluate.answer_logps, adapted, rows, 2)
    require_close([torch.tensor(result) for result in results])
