"""common.py: the stage contract, from a model that is handed over to the folder that is left."""

import json
import sys
from pathlib import Path

import pytest
import sft
import torch
from conftest import training_config

import common
import core.fingerprints
from common import BaseStage, StageResult
from core.config import StageConfig, TrainingConfig
from core.errors import ConfigError


class Stage(BaseStage):
    stage_name, config_class = "probe", TrainingConfig

    def train(self, model, tokenizer):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.01
        return {"figure": 1.0}


def stage_config(model_dir, folder, **options):
    return training_config(model_dir, output_dir=str(folder), **options)


@pytest.mark.parametrize("options", [{}, {"lora_r": 0}, {"use_4bit": True}])
def test_stages_hand_the_model_on_trainable(model_dir, tmp_path, options):
    first = Stage(stage_config(model_dir, tmp_path / "1", **options)).execute()
    assert (
        first.success
        and Path(first.model_path, "stage.json").exists()
        and first.metrics["figure"] == 1.0
    )
    weights = first.model.state_dict()
    second = Stage(stage_config(model_dir, tmp_path / "2", **options)).execute(
        first.model, first.tokenizer, first
    )
    third = Stage(stage_config("unused", tmp_path / "3", **options)).execute(previous_result=second)
    assert second.success and third.success
    stage = json.loads((tmp_path / "3/stage.json").read_text())
    assert stage["parent"]["model"] == second.model_path
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(second.model_path).state_dict()
    assert any(
        not torch.equal(
            saved[name], AutoModelForCausalLM.from_pretrained(first.model_path).state_dict()[name]
        )
        for name in weights
    )


def test_without_save_intermediate_the_model_is_handed_on_in_memory(model_dir, tmp_path):
    first = Stage(stage_config(model_dir, tmp_path / "1", save_intermediate=False)).execute()
    assert (
        first.model_path is None
        and not list((tmp_path / "1").rglob("*.safetensors"))
        and first.model is not None
    )
    second = Stage(stage_config(model_dir, tmp_path / "2")).execute(
        first.model, first.tokenizer, first
    )
    assert second.success
    with pytest.raises(ConfigError, match="set save_intermediate in the previous stage"):
        Stage(stage_config(model_dir, tmp_path / "3", use_4bit=True)).execute(
            first.model, first.tokenizer, first
        )


def test_a_folder_used_again_keeps_no_adapter_of_the_older_run(model_dir, tmp_path):
    assert Stage(stage_config(model_dir, tmp_path)).execute().artifacts["adapter"] == str(
        tmp_path / "adapter"
    )
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    assert Stage(stage_config(model_dir, tmp_path, lora_r=0)).execute().artifacts == {}
    assert not (tmp_path / "adapter").exists()


def test_a_failed_stage_leaves_its_traceback_and_no_result(model_dir, tmp_path, capsys):
    class Failing(Stage):
        def train(self, model, tokenizer):
            raise RuntimeError("out of luck")

    assert Stage(stage_config(model_dir, tmp_path, seed=1)).execute().success  # an older run
    capsys.readouterr()
    result = Failing(stage_config(model_dir, tmp_path)).execute()
    assert (
        not result.success
        and result.error_message == "RuntimeError: out of luck"
        and result.model is None
    )
    assert not (tmp_path / "stage.json").exists() and not (tmp_path / "model.safetensors").exists()
    log = (tmp_path / "training.log").read_text()
    assert "Traceback (most recent call last)" in log and "raise RuntimeError" in log
    screen = capsys.readouterr().out
    assert "probe failed: RuntimeError: out of luck" in screen and "Traceback (most" not in screen


def test_a_save_that_fails_leaves_no_stage_json_and_the_old_model(model_dir, tmp_path, monkeypatch):
    first = Stage(stage_config(model_dir, tmp_path)).execute()
    old = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(
        type(first.tokenizer),
        "save_pretrained",
        lambda *_: (_ for _ in ()).throw(OSError("disk full")),
    )
    again = Stage(stage_config(model_dir, tmp_path)).execute()
    assert not again.success and "disk full" in again.error_message
    assert (tmp_path / "model.safetensors").read_bytes() == old and not (
        tmp_path / "stage.json"
    ).exists()


def test_a_custom_stage_that_overrides_execute(tmp_path):
    class Custom(BaseStage):
        stage_name = "custom"

        def execute(self, model=None, tokenizer=None, previous_result=None):
            self.setup_logging()
            self.logger.info("nothing to train")
            self.cleanup_logging()
            return StageResult(self.stage_name, True, model=model, tokenizer=tokenizer)

    result = Custom(StageConfig(output_dir=str(tmp_path))).execute("model", "tokenizer")
    assert result.model == "model" and "nothing to train" in (tmp_path / "training.log").read_text()
    assert "model=" not in repr(result)


def test_the_same_stage_again_reads_its_options_and_data_again(tmp_path, model_dir, data):
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({"question": f"{n}?", "answer": f"no {n}"}) + "\n" for n in range(9))
    )
    stage = sft.SFTStage(
        sft.SFTConfig(
            model_name_or_path=model_dir,
            dataset_name_or_path=data,
            max_steps=1,
            output_dir=str(tmp_path / "o"),
        )
    )
    assert stage.execute().success and stage.lineage["data"]["rows"] == 24
    stage.config.dataset_name_or_path = str(tmp_path / "other.jsonl")
    assert stage.execute().success
    found = json.loads((tmp_path / "o/stage.json").read_text())
    assert found["data"]["rows"] == 9 and found["fingerprint"]["options"][
        "dataset_name_or_path"
    ].endswith("other.jsonl")


def test_a_model_handed_to_a_stage_that_fails_is_as_it_was(tmp_path, model, tokenizer, data):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stage = sft.SFTStage(
        sft.SFTConfig(
            model_name_or_path="tiny",
            dataset_name_or_path=data,
            max_steps=1,
            output_dir=str(tmp_path / "o"),
        )
    )
    train, stage.train = stage.train, lambda *_: 1 / 0
    failed = stage.execute(model, tokenizer)
    assert not failed.success and "ZeroDivisionError" in failed.error_message
    assert (
        all(value.equal(before[name]) for name, value in model.state_dict().items())
        and before.keys() == model.state_dict().keys()
    )
    stage.train = train
    assert stage.execute(model, tokenizer).success
    assert (
        json.loads((tmp_path / "o/stage.json").read_text())["parent"]["model"]
        == "a model in memory"
    )  # not the one of the options
    with pytest.raises(ConfigError, match="the stage before failed: ZeroDivisionError"):
        stage.execute(previous_result=failed)


def test_a_model_without_its_tokenizer_is_refused(tmp_path, model, data):
    stage = sft.SFTStage(
        sft.SFTConfig(
            model_name_or_path="tiny", dataset_name_or_path=data, output_dir=str(tmp_path)
        )
    )
    with pytest.raises(ConfigError, match="a model needs its tokenizer"):
        stage.execute(model)


def test_a_callers_own_adapter_stays_where_the_stage_refuses_its_input(tmp_path, model, tokenizer):
    model = common.add_adapter(model, training_config("tiny"))
    before = len(list(model.named_modules()))
    with pytest.raises(ConfigError, match="no such file"):
        sft.SFTStage(
            sft.SFTConfig(
                model_name_or_path="tiny",
                dataset_name_or_path="./none.jsonl",
                output_dir=str(tmp_path),
            )
        ).execute(model, tokenizer)
    assert len(list(model.named_modules())) == before and model.peft_config


def test_data_that_was_set_by_hand_stays(tmp_path, model_dir, data):
    stage = sft.SFTStage(
        sft.SFTConfig(
            model_name_or_path=model_dir,
            dataset_name_or_path=data,
            max_steps=1,
            output_dir=str(tmp_path),
        )
    )
    stage.check()
    stage.data = stage.data[0][:5], stage.data[1]
    mine = stage.data
    assert stage.execute().success and stage.execute().success and stage.data is mine


def test_a_quantized_model_cannot_be_handed_over(tmp_path, model_dir, data):
    model, tokenizer = common.load_model_and_tokenizer(training_config(model_dir, use_4bit=True))
    with pytest.raises(ConfigError, match="a quantized model cannot be passed in"):
        sft.SFTStage(
            sft.SFTConfig(
                model_name_or_path="tiny", dataset_name_or_path=data, output_dir=str(tmp_path)
            )
        ).execute(model, tokenizer)


@pytest.mark.parametrize("bits", ["use_4bit", "use_8bit"])
def test_what_a_quantized_stage_in_16_bit_hands_on_runs(model_dir, data, tmp_path, bits):
    result = sft.SFTStage(
        sft.SFTConfig(
            model_name_or_path=model_dir,
            dataset_name_or_path=data,
            max_steps=1,
            torch_dtype="bfloat16",
            output_dir=str(tmp_path),
            **{bits: True},
        )
    ).execute()
    assert result.success and {weight.dtype for weight in result.model.parameters()} == {
        torch.bfloat16
    }
    assert result.model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_stage_that_a_notebook_defines_anew_is_another(tmp_path):
    import linecache
    import types

    def stage(number):
        """As IPython runs a cell: in a module without a file, its source in linecache."""
        source = (
            "from common import BaseStage, StageConfig\n"
            "class Mine(BaseStage):\n"
            "    def train(self, model, tokenizer):\n"
            f"        return {{'n': {number}}}\n"
        )
        module = sys.modules["a_notebook"] = types.ModuleType("a_notebook")
        linecache.cache[f"<cell {number}>"] = (
            len(source),
            None,
            source.splitlines(True),
            f"<cell {number}>",
        )
        exec(compile(source, f"<cell {number}>", "exec"), vars(module))
        return module.Mine(StageConfig(output_dir=str(tmp_path)))

    one, two, three = (stage(number).fingerprint() for number in (1, 1, 2))
    assert (
        one == two != three
        and core.fingerprints.describe_differences(two, three) == "train() changed"
    )
