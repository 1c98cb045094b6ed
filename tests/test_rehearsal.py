"""What would fail at the end of a training is found before it begins."""

import shutil

import pytest
import sft
import torch
from conftest import TWO_STEPS
from peft.tuners.lora import Linear

import core.files
from core.rehearsal import rehearse_end


def run(model_dir, data, folder, **options):
    """The result of sft and whether it trained."""
    config = sft.SFTConfig(
        model_name_or_path=model_dir,
        dataset_name_or_path=data,
        output_dir=str(folder),
        **TWO_STEPS | options,
    )
    stage = sft.SFTStage(config)
    trained = []
    train = stage.train

    def train_and_note(model, tokenizer):
        trained.append(True)
        return train(model, tokenizer)

    stage.train = train_and_note
    try:
        result = stage.execute()
    except ValueError as error:
        return str(error), bool(trained)
    return result, bool(trained)


def test_an_adapter_that_cannot_be_merged(model_dir, data, tmp_path, monkeypatch):
    def merge(self, safe_merge=False, adapter_names=None):
        raise ValueError("no merge of this layer")

    monkeypatch.setattr(Linear, "merge", merge)
    message, trained = run(model_dir, data, tmp_path / "out")
    assert "after training, the adapter could not be merged into the model: no merge" in message
    assert not trained
    result, _ = run(model_dir, data, tmp_path / "whole", lora_r=0)
    assert result.success  # there is none to merge


@pytest.mark.parametrize("part", ["config", "generation_config"])
def test_a_model_that_cannot_be_saved(model_dir, data, tmp_path, monkeypatch, part):
    import transformers

    classes = {
        "config": transformers.LlamaConfig,
        "generation_config": transformers.GenerationConfig,
    }

    def save_pretrained(self, folder, **kwargs):
        raise ValueError("temperature is set and do_sample is not")

    monkeypatch.setattr(classes[part], "save_pretrained", save_pretrained)
    message, trained = run(model_dir, data, tmp_path / "out")
    assert "after training, the model could not be saved: temperature is set" in message
    assert not trained


def test_a_tokenizer_that_cannot_be_saved(model_dir, data, tmp_path, monkeypatch):
    import transformers

    def save_pretrained(self, folder, **kwargs):
        raise TypeError("not serializable")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", save_pretrained)
    result, trained = run(model_dir, data, tmp_path / "out")
    assert not result.success
    assert "not serializable" in result.error_message
    assert not trained


def test_a_disk_that_is_too_small_for_the_model(model_dir, data, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=600_000)
    monkeypatch.setattr(core.files.shutil, "disk_usage", lambda path: free)
    message, trained = run(model_dir, data, tmp_path / "out", torch_dtype="float32")
    assert "the disk has 0.0 GB left" in message
    assert not trained


def test_the_trial_changes_nothing_and_leaves_nothing(model, tokenizer, tmp_path):
    from conftest import training_config

    from core.adapters import add_adapter

    config = training_config("m", output_dir=str(tmp_path), lora_r=4)
    adapted = add_adapter(model, config, "CAUSAL_LM", [])
    with torch.no_grad():  # as of an adapter that has learned
        for weight in adapted.parameters():
            weight.add_(0.1)
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    rehearse_end(adapted, tokenizer, config)
    after = adapted.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert list(tmp_path.iterdir()) == []
