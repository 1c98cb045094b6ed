"""core/training.py: what the loop refuses before its first step."""

from types import SimpleNamespace

import pytest
import sft
import torch
from conftest import make_model
from families import make_family

import core.training
from core.adapters import add_adapter
from core.config import FitConfig
from core.errors import ConfigError


def test_a_frozen_model_is_an_error_not_a_success(tokenizer, model, tmp_path):
    with pytest.raises(RuntimeError, match="everything is frozen"):
        core.training.fit(
            FitConfig(model_name_or_path="m", output_dir=str(tmp_path)),
            model.requires_grad_(False),
            [{"input_ids": [1]}],
            [],
            None,
            None,
        )


def test_a_metric_that_no_evaluation_gives_is_refused_before_the_first_step(
    model_dir, data, tmp_path
):
    config = sft.SFTConfig(
        model_name_or_path=model_dir,
        dataset_name_or_path=data,
        max_steps=4,
        eval_steps=2,
        save_steps=2,
        validation_split=0.2,
        load_best_model_at_end=True,
        metric_for_best_model="exact_match",
        output_dir=str(tmp_path),
    )
    with pytest.raises(
        ConfigError,
        match="metric_for_best_model=exact_match: there are eval_loss, eval_token_accuracy",
    ):
        sft.SFTStage(config).execute()
    assert (
        not (tmp_path / "metrics.jsonl").exists()
        or "loss" not in (tmp_path / "metrics.jsonl").read_text()
    )


@pytest.mark.parametrize("asks", [True, False])
def test_the_router_loss_is_that_of_transformers(tokenizer, tmp_path, asks):
    """With labels for all tokens, transformers returns the mean loss plus the weighted router
    loss."""
    model = make_family("Mixtral", tokenizer).eval()
    model.config.output_router_logits = asks
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.5
    ids = torch.arange(3, 43).view(2, 20)
    stock = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    stock.loss.backward()
    router = model.model.layers[0].mlp.gate.weight
    expected = router.grad.clone()
    model.zero_grad()

    rows = [{"input_ids": row, "labels": row} for row in ids]
    run = SimpleNamespace(model=model, loss=sft.loss)
    loss, metrics = core.training.loss_with_router(run, sft.collate(rows))
    loss.backward()
    assert torch.allclose(loss, stock.loss, atol=1e-5)
    assert torch.allclose(router.grad, expected, atol=1e-6)
    assert ("router_loss" in metrics) == asks


def test_layers_inside_a_new_adapter_train_without_an_evaluation_before(tokenizer, tmp_path):
    """Else dropout and the recomputation of activations would be off: a loaded model evaluates."""
    config = FitConfig(model_name_or_path="m", output_dir=str(tmp_path), max_steps=1, save_steps=0)
    model = add_adapter(make_model(tokenizer).eval(), config)
    modes = []

    def loss(model, batch):
        modes.extend(module.training for module in model.modules())
        return sft.loss(model, batch)

    rows = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)}]
    core.training.fit(config, model, rows, [], sft.collate, loss)
    assert modes and all(modes)
