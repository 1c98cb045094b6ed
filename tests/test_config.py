"""core/config.py: option types, checked dataclasses, options that contradict each other."""

import importlib.util
import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import pytest
import sft
import torch
from annotated_types import Gt, MinLen

import chain
import core.config
import core.options
import core.runtime
from core.config import FitConfig, StageConfig, TrainingConfig
from core.errors import ConfigError


@pytest.mark.parametrize(
    "name, value, meant",
    [
        ("learning_rate", "2e-4", 2e-4),
        ("max_steps", "12", 12),
        ("use_4bit", "True", True),
        ("lora_r", 8.0, 8),
        ("report_to", "tensorboard", ["tensorboard"]),
        ("lora_target_modules", ("q_proj", "v_proj"), ["q_proj", "v_proj"]),
        ("lora_target_modules", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("lora_target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("model_name_or_path", 12, "12"),
        ("gradient_checkpointing", "true", 1),
        ("gradient_checkpointing", False, 0),
        ("gradient_checkpointing", "2", 2),
        ("resume_from_checkpoint", "true", True),
        ("resume_from_checkpoint", "out/checkpoint-5", "out/checkpoint-5"),
        ("lora_target_modules", None, ["all-linear"]),
        ("num_train_epochs", 2, 2.0),
        ("revision", None, None),
        ("weight_decay", "none", 0.0),
        ("learning_rate", "null", 5e-4),
        ("max_steps", "-1", 0),
        ("eval_steps", -1, 0),
        ("max_grad_norm", None, 0.0),
        ("save_total_limit", "none", None),
        ("log_level", "INFO", "info"),
        ("lr_scheduler_type", "Cosine", "cosine"),
        ("lr_scheduler_type", "cosine_with_restarts", "cosine"),
        ("torch_dtype", "BF16", "bfloat16"),
        ("torch_dtype", "torch.float32", "float32"),
        ("report_to", "none", []),
        ("report_to", ["none"], []),
        ("wandb_project", False, None),
    ],
)
def test_values_are_coerced_by_annotation(name, value, meant):
    result = getattr(FitConfig(**{name: value}), name)
    assert result == meant and type(result) is type(meant)


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", "fast"),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("weight_decay", -1),
        ("max_steps", -2),
        ("max_steps", 1.5),
        ("per_device_train_batch_size", 0),
        ("warmup_ratio", 1.0),
        ("lora_dropout", -0.1),
        ("lr_scheduler_type", "cosin"),
        ("optim", "adam"),
        ("use_4bit", "maybe"),
        ("report_to", "tensorbored"),
        ("model_name_or_path", ["a"]),
        ("torch_dtype", "int8"),
        ("seed", True + 0.5),
    ],
)
def test_wrong_values_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name}"):
        FitConfig(**{name: value})


def test_a_number_of_tokens_is_no_secret():
    with pytest.raises(ConfigError, match="max_new_tokens=0: "):
        sft.SFTConfig(max_new_tokens=0)


def test_a_token_is_refused_without_being_shown():
    with pytest.raises(ConfigError) as error:
        TrainingConfig(use_auth_token="hf_canary")
    assert "use_auth_token" in str(error.value) and "canary" not in str(error.value)


def test_unknown_names_get_the_nearest_valid_one():
    with pytest.raises(
        ConfigError, match="unknown option 'learnig_rate'; did you mean 'learning_rate'"
    ):
        core.options.resolve_names(sft.SFTConfig, {"learnig_rate": 1})
    with pytest.raises(ConfigError, match="model_name_or_path is given twice"):
        core.options.resolve_names(sft.SFTConfig, {"model": "a", "model_name_or_path": "b"})
    assert core.options.resolve_names(sft.SFTConfig, {"model": "a", "data": "b"}) == {
        "model_name_or_path": "a",
        "dataset_name_or_path": "b",
    }


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "model_name_or_path is missing"),
        ({"dataset_name_or_path": ""}, "dataset_name_or_path is missing"),
        ({"use_4bit": True, "use_8bit": True}, "exclude each other"),
        ({"use_4bit": True, "lora_r": 0}, "lora_r=0"),
        ({"use_dora": True, "use_8bit": True}, "use_dora does not work with use_8bit on a CPU"),
        ({"load_best_model_at_end": True}, "set eval_steps"),
        (
            {"eval_steps": 3, "save_steps": 4, "load_best_model_at_end": True},
            "multiple of eval_steps=3",
        ),
        ({"auto_detect_format": False}, "requires dataset_format"),
        ({"dataset_format": "alpacca"}, "one of: messages"),
        ({"auto_detect_format": False, "dataset_format": "alpacca"}, "one of: messages"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, words):
    given = {"model_name_or_path": "m", "dataset_name_or_path": "d"} if options else {}
    with pytest.raises(ConfigError, match=words):
        sft.SFTConfig(**given | options).validate()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"torch_dtype": "float16"}, "torch_dtype=float16 cannot train on a CPU; float32 is used"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.5}, "warmup_ratio has no effect"),
        ({"num_eval_samples": 4, "validation_split": 0}, "num_eval_samples has no effect"),
        ({"wandb_project": "p"}, "without use_wandb"),
        ({"lora_r": 0, "lora_alpha": 64}, "lora_alpha has no effect with lora_r=0"),
        ({"use_dora": True, "lora_r": 0}, "use_dora has no effect"),
        ({"bnb_4bit_quant_type": "fp4"}, "without use_4bit=true"),
        ({"max_new_tokens": 5}, "without num_eval_samples"),
        ({"metric_for_best_model": "eval_kl"}, "without load_best_model_at_end=true"),
        ({"wandb_run_name": "x"}, "without report_to"),
    ],
)
def test_a_valid_option_without_effect_is_a_note(options, words):
    config = sft.SFTConfig(model_name_or_path="m", dataset_name_or_path="d", **options)
    config.validate()
    assert len(config.notes) == 1 and words in config.notes[0]
    config.validate()
    assert len(config.notes) == 1


def test_float16_for_all_weights_is_refused_where_a_gpu_would_take_it(monkeypatch):
    monkeypatch.setattr(core.config, "default_device", lambda: torch.device("cuda"))
    config = sft.SFTConfig(
        model_name_or_path="m", dataset_name_or_path="d", torch_dtype="float16", lora_r=0
    )
    with pytest.raises(ConfigError, match="underflows"):
        config.validate()


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="report_to=wandb: not installed; run: pip install wandb"):
        StageConfig(use_wandb=True).validate()


def test_a_config_of_ones_own_is_strict_too():
    @dataclass
    class Mine(StageConfig):
        weight: Annotated[float, Gt(0)] = 1.0
        mode: Literal["a", "b"] = "a"
        names: core.config.Names = field(default_factory=list)

    assert Mine(weight="3", names="x,y").names == ["x", "y"]
    with pytest.raises(ConfigError, match="^mode='c'"):
        Mine(mode="c")


@dataclass
class Containers(StageConfig):
    """Options of every kind of container."""

    sizes: list[int] = field(default_factory=list)
    bare: list = field(default_factory=list)
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[int, ...] = ()
    unique: set[str] = field(default_factory=set)
    mapping: dict[str, int] = field(default_factory=dict)
    nested: dict = field(default_factory=dict)
    rate: float | None = None
    words: list[str] | None = None
    counts: Annotated[list[int], MinLen(1)] | None = None
    text: str | None = None
    either: str | list[int] = ""
    biases: Literal["none", "all"] | None = None


@pytest.mark.parametrize(
    "name, value, meant",
    [
        ("sizes", "1,2,3", [1, 2, 3]),
        ("sizes", "[1, 2]", [1, 2]),
        ("sizes", "7", [7]),
        ("sizes", "", []),
        ("sizes", [1, "2"], [1, 2]),
        ("bare", "a, b", ["a", "b"]),
        ("pair", "3,0.5", (3, 0.5)),
        ("pair", [3, 1], (3, 1.0)),
        ("many", "[4, 5, 6]", (4, 5, 6)),
        ("unique", "a,b,a", {"a", "b"}),
        ("mapping", "{a: 1, b: 2}", {"a": 1, "b": 2}),
        ("mapping", "", {}),
        ("nested", "{a: {b: [1, 2]}}", {"a": {"b": [1, 2]}}),
        ("rate", "none", None),
        ("rate", "None", None),
        ("rate", "2e-4", 2e-4),
        ("words", "none", None),
        ("words", "a,b", ["a", "b"]),
        ("counts", "3,4", [3, 4]),
        ("text", "none", None),
        ("text", "a,b", "a,b"),
        ("either", "1,2", "1,2"),
        ("biases", "none", "none"),
        ("biases", "null", None),
    ],
)
def test_containers_are_read_from_text_by_their_annotation(name, value, meant):
    result = getattr(Containers(**{name: value}), name)
    assert result == meant and type(result) is type(meant)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("sizes", "1,x", "valid integer"),
        ("pair", "1", "Field required"),
        ("counts", "", "at least 1 item"),
        ("mapping", "{a: 1", "not valid YAML"),
        ("mapping", "a", "valid dictionary"),
        ("rate", "", "valid number"),
    ],
)
def test_a_container_that_cannot_be_read_is_refused_by_name(name, value, words):
    with pytest.raises(ConfigError, match=f"(?i)^{name}={re.escape(repr(value))}: .*{words}"):
        Containers(**{name: value})


def test_a_secret_in_a_broken_mapping_is_not_shown():
    @dataclass
    class Secretive(StageConfig):
        api_keys: dict[str, str] = field(default_factory=dict)

    with pytest.raises(ConfigError, match="^api_keys: not valid YAML") as error:
        Secretive(api_keys="{a: canary")
    assert "canary" not in str(error.value)


def test_the_default_learning_rate_goes_with_what_trains():
    assert [TrainingConfig(lora_r=r).learning_rate for r in (16, 0)] == [5e-4, 5e-5]
    assert TrainingConfig(learning_rate="1e-3", lora_r=0).learning_rate == 1e-3


def test_an_adapters_rate_that_a_changed_config_keeps_for_all_weights_is_said(caplog):
    core.runtime.warn_once.cache_clear()
    adapter = TrainingConfig(model_name_or_path="x")
    adapter.validate()
    replace(adapter, lora_r=0, learning_rate=1e-4).validate()
    assert not caplog.text
    replace(adapter, lora_r=0).validate()
    assert (
        "learning_rate=0.0005 is the default for an adapter" in caplog.text
        and "for all weights it is 5e-05" in caplog.text
    )


def test_dtypes(monkeypatch):
    assert (
        core.runtime.compute_dtype("auto") == torch.float32
        and core.runtime.compute_dtype("bfloat16") == torch.bfloat16
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has
        )
        assert TrainingConfig().weight_dtype == dtype == core.runtime.compute_dtype("auto")
        assert TrainingConfig(lora_r=0).weight_dtype == torch.float32
    assert TrainingConfig(lora_r=0, torch_dtype="bfloat16").weight_dtype == torch.bfloat16


def test_a_home_folder_is_found_in_output_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        sft.SFTConfig(output_dir="~/o").output_dir
        == chain.PipelineConfig(output_dir="~/o").output_dir
        == f"{tmp_path}/o"
    )


@pytest.mark.parametrize(
    "written, interval", [("yes", 1), (True, 1), ("on", 1), ("no", 0), (False, 0), ("2", 2), (3, 3)]
)
def test_gradient_checkpointing_is_a_switch_or_every_nth_layer(written, interval):
    config = TrainingConfig(gradient_checkpointing=written)
    assert config.gradient_checkpointing == interval
