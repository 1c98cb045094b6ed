"""What differs on a GPU. Without one, or unless requested, everything but the chain is skipped:

CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py
"""

import json

import dpo
import pytest
import rl
import sft
import torch
from conftest import make_model

import common
import core.sampling
from chain import Pipeline

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
SMALL = {"per_device_train_batch_size": 4, "logging_steps": 1}


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {n}", "chosen": f"{n}.", "rejected": f"no {n}"} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_sample_what_single_ones_do(tokenizer, monkeypatch, dtype):
    model, sampling = (
        make_model(tokenizer).to("cuda", dtype),
        core.sampling.SAMPLING_DEFAULTS | {"max_new_tokens": 40},
    )
    asked = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3]]
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))
    )
    chances = core.sampling.uniform_numbers(8, sampling, 0).cuda()
    found = []
    for devices in ({"cuda"}, set()):
        monkeypatch.setattr(core.sampling, "CUDA_GRAPH_DEVICES", devices)
        found.append(
            core.sampling.sample_completions(model, tokenizer, asked, sampling, chances, 4)
        )
        assert len(replays) > 30  # of the first of both alone
    pairs = [*zip(sum(found[0][1], []), sum(found[1][1], []), strict=True)]
    if dtype == torch.float32:
        assert found[0][0] == found[1][0] and len(replays) < 40
        assert all(first == pytest.approx(second, abs=1e-4) for first, second in pairs)
    assert sum(abs(first - second) for first, second in pairs[:8]) / 8 < 0.05


@on_gpu
def test_a_step_that_waits_for_a_value_is_not_recorded(tokenizer, monkeypatch):
    model, sampling = (
        make_model(tokenizer).cuda(),
        core.sampling.SAMPLING_DEFAULTS | {"max_new_tokens": 12},
    )
    expected = core.sampling.sample_completions(model, tokenizer, [[5, 6, 7]], sampling)
    model.model.norm.register_forward_hook(
        lambda *_: None if float(model.lm_head.weight[0, 0]) else None
    )
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", None)
    found = core.sampling.sample_completions(model, tokenizer, [[5, 6, 7]], sampling)
    assert found[0] == expected[0] and torch.cuda.get_sync_debug_mode() == 0


def test_a_chain_of_all_kinds_runs(model_dir, data, pairs, tmp_path):
    """bfloat16 weights, also where float32 is the default; a float32 adapter after training all
    weights; shared prompts. dpo starts at its reference exactly."""
    file = tmp_path / "chain.yaml"
    stages = {
        "sft": {
            "dataset_name_or_path": data,
            "lora_r": 0,
            "num_eval_samples": 4,
            "max_new_tokens": 8,
            **SMALL,
        },
        "evaluate": {"dataset_name_or_path": data},
        "dpo": {"preference_dataset_path": pairs, "validation_split": 0.2, **SMALL},
        "reward": {"preference_dataset_path": pairs, **SMALL},
        "rl": {
            "prompt_dataset_path": data,
            "algorithm": "ppo",
            "reward": "length",
            "reward_length": 3,
            "batch_size": 8,
            "num_training_steps": 2,
            "generation_kwargs": {"max_new_tokens": 8},
        },
    }
    dtype = {"torch_dtype": "auto" if torch.cuda.is_available() else "bfloat16"}
    config = {
        "model_name_or_path": model_dir,
        "output_dir": str(tmp_path / "out"),
        "stages": [*stages],
        "stage_configs": {name: dtype | options for name, options in stages.items()},
    }
    file.write_text(json.dumps(config))
    results = Pipeline.from_yaml(str(file)).run()
    assert len(results) == 5, results[-1].error_message
    assert all(result.success for result in results), results[-1].error_message
    assert results[2].metrics["eval_accuracy_before"] == 0.5
    assert "not exact" not in (tmp_path / "out/03_dpo/training.log").read_text()


@on_gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models_train_and_sample(model_dir, data, tmp_path, bits):
    config = sft.SFTConfig(
        model_name_or_path=model_dir,
        dataset_name_or_path=data,
        output_dir=str(tmp_path / "out"),
        num_eval_samples=4,
        max_new_tokens=8,
        **{f"use_{bits}bit": True},
        **SMALL,
    )
    result = sft.SFTStage(config).execute()
    assert result.success, result.error_message


@on_gpu
@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "trpo", "grpo", "rloo"])
def test_every_algorithm_runs(model_dir, data, tmp_path, algorithm):
    options = {
        "model_name_or_path": model_dir,
        "prompt_dataset_path": data,
        "output_dir": str(tmp_path / "out"),
        "algorithm": algorithm,
        "reward": ["length"],
        "reward_length": 3,
        "batch_size": 8,
        "num_training_steps": 3,
        "generation_kwargs": {"max_new_tokens": 8},
    }
    stage_class, options, _ = rl.RLStage.resolve(options)
    result = stage_class(stage_class.config_class(**options)).execute()
    assert result.success, result.error_message


@on_gpu
def test_the_sum_over_an_answer_is_the_same_at_every_call(model_dir, tokenizer, pairs, tmp_path):
    config = dpo.DPOConfig(
        model_name_or_path=model_dir, preference_dataset_path=pairs, output_dir=str(tmp_path)
    )
    model, _ = common.load_model_and_tokenizer(config)
    rows = [dpo.encode(row, tokenizer, config) for row in dpo.DPOStage(config).load_data()[0]]
    batch = {name: value.cuda() for name, value in dpo.collate(rows).items()}
    with torch.no_grad():
        sums = [dpo.sequence_logps(model, batch)[0] for _ in range(20)]
    assert all(torch.equal(sums[0], other) for other in sums)
