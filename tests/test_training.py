"""core/training.py: what the loop refuses before its first step, and the order of its batches."""

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
        match="metric_for_best_model=exact_match is unknown, one of: "
        "eval_loss, eval_token_accuracy",
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


def test_every_epoch_has_its_batches_in_another_order():
    lengths = 2 ** torch.arange(3, 13).repeat_interleave(4)  # ten batches, whatever is blurred
    orders = []
    for seed in (1, 2):
        steps = core.training.steps_of_epoch(lengths, 4, seed)
        orders.append([int(lengths[rows].float().mean()) for rows in steps])
    first, second = orders
    falling = sorted(first, reverse=True)
    assert falling == sorted(second, reverse=True) and first[0] == second[0] == falling[0]
    assert first != second and falling not in orders


def test_every_epoch_has_its_rows_in_other_batches():
    lengths = torch.arange(100, 300)
    epochs = [core.training.steps_of_epoch(lengths, 10, seed) for seed in (1, 2)]
    first, second = ({frozenset(rows.tolist()) for rows in steps} for steps in epochs)
    assert not first & second


BASE = dict(max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=0)
CHANGES = {  # what changes the weights after three steps
    "seed": 7,
    "lora_r": 4,
    "lora_alpha": 4,
    "lora_dropout": 0.5,
    "lora_target_modules": ["q_proj"],
    "lora_bias": "all",
    "use_dora": True,
    "use_rslora": True,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-3,
    "weight_decay": 0.5,
    "warmup_ratio": 0.9,
    "warmup_steps": 3,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_steps": 2,
    "per_device_train_batch_size": 3,
    "max_seq_length": 27,
    "packing": True,
    "neftune_noise_alpha": 5.0,
}


def test_every_option_of_a_training_changes_what_is_learnt(tokenizer, tmp_path):
    conversations = []
    for n in range(8):
        chat = [{"role": "user", "content": f"Say {n}"}]
        chat.append({"role": "assistant", "content": "so " * (1 + n % 4)})
        conversations.append(chat)

    def learnt(**options):
        values = dict(model_name_or_path="m", dataset_name_or_path="d") | BASE | options
        config = sft.SFTConfig(output_dir=str(tmp_path), **values)
        config.validate()
        model = make_model(tokenizer, attention_bias=True)
        torch.manual_seed(config.seed)
        model = add_adapter(model, config)
        sft.train(config, model, tokenizer, conversations, [])
        trained = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
        return torch.cat([*trained, model(torch.arange(5, 25)[None]).logits.detach().flatten()])

    plain = learnt()
    assert torch.equal(plain, learnt())
    for option, value in CHANGES.items():
        assert not torch.equal(plain, learnt(**{option: value})), option


def test_a_gradient_is_clipped_to_its_norm(tokenizer, tmp_path):
    rows = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)}]
    changes = []
    for max_grad_norm in (0, 1e-3):
        config = FitConfig(
            model_name_or_path="m",
            output_dir=str(tmp_path),
            lora_r=0,
            max_steps=1,
            save_steps=0,
            optim="sgd",
            learning_rate=0.5,
            lr_scheduler_type="constant",
            max_grad_norm=max_grad_norm,
        )
        model = make_model(tokenizer)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        core.training.fit(config, model, rows, [], sft.collate, sft.loss)
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        changes.append((after - before).norm().item())
    free, clipped = changes
    assert free > 1e-2 and clipped == pytest.approx(0.5 * 1e-3, rel=1e-2)
