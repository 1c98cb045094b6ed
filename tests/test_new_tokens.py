"""core/new_tokens.py: tokens that a stage adds, through training, merging, saving and loading."""

import json

import dpo
import grpo
import pytest
import reward
import sft
import torch
from conftest import TWO_STEPS, make_model, training_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from core.errors import ConfigError

TOKENS = ["<step>", "</step>"]
IDS = torch.tensor([[5, 400, 9, 401, 11]])


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model_folder(request, tokenizer, tmp_path):
    folder = tmp_path / "model"
    make_model(tokenizer, tie_word_embeddings=request.param).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"Say {n}", "answer": f"<step>{n}</step> {n}."} for n in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_sft(model_folder, tmp_path, name="out", **options):
    config = sft.SFTConfig(
        model_name_or_path=model_folder,
        dataset_name_or_path=write_rows(tmp_path),
        output_dir=str(tmp_path / name),
        **TWO_STEPS | {"new_tokens": TOKENS} | options,
    )
    result = sft.SFTStage(config).execute()
    assert result.success, result.error_message
    return result


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("options", [{}, {"lora_r": 0, "learning_rate": 1e-3}, {"use_4bit": True}])
def test_new_tokens_are_learnt_saved_and_read_by_plain_transformers(
    model_folder, tmp_path, options, monkeypatch
):
    trained = {}

    def merge(model, merge_adapter=common.merge_adapter):
        trained["logits"] = logits_of(model)
        return merge_adapter(model)

    monkeypatch.setattr(common, "merge_adapter", merge)
    result = run_sft(model_folder, tmp_path, **options)
    saved = AutoModelForCausalLM.from_pretrained(result.model_path)
    tokenizer = AutoTokenizer.from_pretrained(result.model_path)
    assert tokenizer("<step>").input_ids == [400]
    assert torch.equal(logits_of(saved), logits_of(result.model))
    assert torch.allclose(logits_of(saved), trained["logits"], atol=5e-5)
    start = AutoModelForCausalLM.from_pretrained(model_folder)
    for end in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(start, end)().weight, getattr(saved, end)().weight
        assert after.shape[0] == 402
        moved = (after[400:] - before.mean(0)).abs().amax(1)
        assert moved.min() > 0 and moved.max() < 0.2
        if options.get("lora_r", 1):
            assert torch.equal(before, after[:400])  # no other row trains


def test_an_adapter_on_new_tokens_loads_on_its_base(model_folder, tmp_path):
    result = run_sft(model_folder, tmp_path)
    loaded, tokenizer = common.load_model_and_tokenizer(
        training_config(str(tmp_path / "out/adapter"))
    )
    assert torch.allclose(logits_of(loaded), logits_of(result.model), atol=5e-5)
    assert tokenizer("</step>").input_ids == [401]


def test_a_later_stage_has_the_tokens_and_does_not_add_them_again(model_folder, tmp_path):
    first = run_sft(model_folder, tmp_path)
    second = run_sft(first.model_path, tmp_path, "second")
    saved = AutoModelForCausalLM.from_pretrained(second.model_path)
    assert saved.config.vocab_size == 402
    weight = AutoModelForCausalLM.from_pretrained(first.model_path).get_input_embeddings().weight
    assert torch.equal(saved.get_input_embeddings().weight, weight)


@pytest.mark.parametrize("recipe", ["dpo", "reward", "grpo"])
def test_every_training_recipe_takes_new_tokens(model_folder, tmp_path, recipe):
    path = tmp_path / "rows.jsonl"
    if recipe == "grpo":
        rows = [{"prompt": f"Say <step>{n}"} for n in range(8)]
        more = dict(num_training_steps=2, batch_size=4, num_generations=2, reward=["length"])
        more |= dict(reward_length=3, generation_kwargs={"max_new_tokens": 6}, save_freq=0)
        more |= dict(prompt_dataset_path=str(path), log_level="error")
        stage, config = grpo.GRPOStage, grpo.GRPOConfig
    else:
        rows = [
            {"prompt": f"Say {n}", "chosen": f"<step>{n}", "rejected": f"{n}</step>"}
            for n in range(8)
        ]
        more = dict(**TWO_STEPS, preference_dataset_path=str(path))
        stage, config = {
            "dpo": (dpo.DPOStage, dpo.DPOConfig),
            "reward": (reward.RewardStage, reward.RewardConfig),
        }[recipe]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config(
        model_name_or_path=model_folder,
        output_dir=str(tmp_path / "out"),
        new_special_tokens=TOKENS,
        **more,
    )
    result = stage(settings).execute()
    assert result.success, result.error_message
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode([5, 400], skip_special_tokens=True) == tokenizer.decode([5])


def test_tokens_that_a_tokenizer_has_without_embeddings_can_be_trained(model_folder, tmp_path):
    grown = AutoTokenizer.from_pretrained(model_folder)
    grown.add_tokens(TOKENS)
    grown.save_pretrained(model_folder)
    with pytest.raises(ConfigError, match="has 402; .* --new_tokens='<step>,</step>'"):
        run_sft(model_folder, tmp_path, new_tokens=[])
    result = run_sft(model_folder, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(result.model_path)
    start = AutoModelForCausalLM.from_pretrained(model_folder).get_input_embeddings().weight
    moved = (saved.get_input_embeddings().weight[400:] - start.mean(0)).abs().amax(1)
    assert moved.min() > 0 and saved.config.vocab_size == 402
