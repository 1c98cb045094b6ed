"""core/optimizers.py: optimizers, what weight decay reaches, and the learning rate of each step."""

import pytest
import torch
from conftest import ROOT, make_model
from sft import SFTConfig
from transformers import Trainer, TrainingArguments, get_scheduler

from core.config import FitConfig
from core.errors import ConfigError
from core.optimizers import decay_groups, new_optimizer, schedule_factor, set_learning_rates

SCHEDULES = ("linear", "cosine", "polynomial", "constant", "constant_with_warmup")


def config(**options):
    return FitConfig(model_name_or_path="m", lora_r=0, **options)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_counts_from_one_and_no_step_has_a_rate_of_zero(name):
    warmup = 0.0 if name == "constant" else 0.3
    options = config(lr_scheduler_type=name, warmup_ratio=warmup)
    factors = [schedule_factor(options, step, 10) for step in range(10)]
    assert min(factors) > 0 and max(factors) == 1
    if warmup:
        assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])


def test_warm_up_may_be_given_in_steps():
    options = config(lr_scheduler_type="linear", warmup_ratio=0.9, warmup_steps=2)
    factors = [schedule_factor(options, step, 4) for step in range(4)]
    assert factors == pytest.approx([1 / 2, 1, 1, 1 / 2])


@pytest.mark.parametrize("name", SCHEDULES)
def test_after_warm_up_the_schedule_is_that_of_transformers(name):
    options = config(lr_scheduler_type=name, warmup_ratio=0.0 if name == "constant" else 0.2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    stock = get_scheduler(name, optimizer, 2, 10)
    for step in range(10):
        if step >= 2:
            ours = schedule_factor(options, step, 10)
            assert ours == pytest.approx(stock.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        stock.step()


def test_rates_are_set_from_the_peaks_however_often():
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": [weights[0]], "lr": 1.0}, {"params": [weights[1]], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    for factor in (0.5, 0.25):
        assert set_learning_rates(optimizer, factor) == factor
        assert [group["lr"] for group in optimizer.param_groups] == [factor, 0.1 * factor]


def test_weight_decay_reaches_what_it_reaches_in_transformers(tokenizer):
    model = make_model(tokenizer)
    decayed, others = decay_groups(config(weight_decay=0.1), model)
    wanted = set(Trainer.get_decay_parameter_names(None, model))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == wanted & set(names.values())
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize(
    "name",
    ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"),
)
def test_optimizers_are_those_of_transformers(tokenizer, name):
    model = make_model(tokenizer)
    arguments = TrainingArguments(optim=name, use_cpu=True, report_to="none", learning_rate=5e-5)
    stock_class, stock_options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    groups = decay_groups(config(optim=name), model)
    ours = new_optimizer(config(optim=name), model, groups)
    stock = stock_class(model.parameters(), **stock_options)
    assert type(ours) is type(stock)
    shared = set(stock.defaults) - {"lr"}
    assert {key: ours.defaults[key] for key in shared} == {
        key: stock.defaults[key] for key in shared
    }


def test_muon_turns_hidden_matrices_by_a_rotation_and_leaves_the_rest_to_adamw(tokenizer):
    """Jordan et al. 2024: the singular values of a step are about equal. Newton-Schulz leaves
    them between 0.5 and 1.5; Liu et al. 2025 give them the size of AdamW's step."""
    rate, decay = 1e-3, 0.1
    muon_model, adamw_model = make_model(tokenizer), make_model(tokenizer)
    adamw_model.load_state_dict(muon_model.state_dict())
    for model, name in ((muon_model, "muon"), (adamw_model, "adamw_torch_fused")):
        options = config(optim=name, learning_rate=rate, weight_decay=decay)
        optimizer = new_optimizer(options, model, decay_groups(options, model))
        tokens = torch.arange(12).view(2, 6)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    before = make_model(tokenizer).state_dict()
    for name, weight in muon_model.named_parameters():
        if weight.dim() < 2 or "embed" in name or "lm_head" in name:
            assert torch.equal(weight, adamw_model.get_parameter(name)), name
            continue
        change = weight.detach() - before[name] * (1 - rate * decay)
        size = rate * 0.2 * max(weight.shape) ** 0.5
        # Twelve tokens give a gradient of low rank: the smallest values stay small.
        singular_values = torch.linalg.svdvals(change)[:4] / size
        assert singular_values.min() > 0.5 and singular_values.max() < 1.5, name


def test_muon_is_refused_where_matrices_are_split(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="optim=muon needs every matrix whole"):
        SFTConfig(
            model_name_or_path="m", dataset_name_or_path="rows.jsonl", optim="muon"
        ).validate()


def test_no_recipe_imports_the_trainer_of_a_library():
    for path in [*ROOT.glob("recipes/*.py"), *ROOT.glob("core/*.py"), ROOT / "common.py"]:
        source = path.read_text()
        assert "import Trainer" not in source and "TrainingArguments" not in source, path
