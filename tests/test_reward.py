"""recipes/reward.py: the Bradley-Terry loss, and a folder that any program scores with."""

import json
import math

import dpo
import pytest
import reward
import torch
from test_dpo import PAIRS, pair, sigma, written

import chain
import common
import core.chat
import core.config
from core.errors import ConfigError, RowError


def config(tmp_path, **options):
    defaults = dict(
        model_name_or_path="tiny",
        preference_dataset_path="data",
        output_dir=str(tmp_path / "reward"),
        save_steps=0,
    )
    return reward.RewardConfig(**defaults | options)


@pytest.fixture
def pairs(tmp_path):
    """Cheerful answers are preferred; now and then with a margin."""
    return written(
        tmp_path,
        [
            {
                "prompt": f"Say {n}",
                "chosen": "yes " * (1 + n % 3),
                "rejected": "no " * (1 + n % 2),
                "margin": n % 2,
            }
            for n in range(24)
        ],
    )


def sequence_classifier(tokenizer, seed=0):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            num_labels=1,
            pad_token_id=1,
            eos_token_id=0,
        )
    )


def encoded(tokenizer, pairs=PAIRS):
    return [reward.encode(row, tokenizer, 256) for row in pairs]


def test_the_loss_is_the_printed_formula():
    values = reward.reward_loss(
        torch.tensor([1.5, -0.2]), torch.tensor([0.5, 0.3]), torch.tensor([0.0, 0.7]), 0.01
    )
    assert values.tolist() == pytest.approx(
        [-math.log(sigma(1)) + 0.01 * 4, -math.log(sigma(-0.5 - 0.7)) + 0.01 * 0.01], rel=1e-5
    )


@pytest.mark.parametrize("center", [0.0, 0.05])
def test_loss_and_gradient_are_those_of_stock_reward_trainer(tokenizer, tmp_path, center):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    model, rows = (
        sequence_classifier(tokenizer),
        encoded(tokenizer, [{**row, "margin": n / 4} for n, row in enumerate(PAIRS)]),
    )
    stock = RewardTrainer(
        model,
        RewardConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            center_rewards_coefficient=center or None,
            max_length=None,
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    examples = [
        {"chosen_ids": row["chosen"], "rejected_ids": row["rejected"], "margin": row["margin"]}
        for row in rows
    ]
    batch = stock.data_collator(examples)
    results = []
    for value in (
        lambda: stock.compute_loss(model, dict(batch)),
        lambda: reward.loss(model, reward.collate(rows, model.config.pad_token_id), center)[0],
    ):
        model.zero_grad()
        loss = value()
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (theirs, their_gradient), (ours, our_gradient) = results
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert torch.norm(our_gradient - their_gradient) <= 1e-5 * torch.norm(their_gradient)


def test_the_loss_does_not_mind_the_side_of_padding(tokenizer):
    model, rows = sequence_classifier(tokenizer).eval(), encoded(tokenizer)
    right, left = (
        reward.rewards(model, reward.collate(rows, model.config.pad_token_id, side))
        for side in ("right", "left")
    )
    assert len({len(row["chosen"]) for row in rows}) > 1 and torch.allclose(right, left, atol=1e-5)


def test_calibration_error_is_the_mean_gap_over_bins():
    def logit(p):
        return math.log(p / (1 - p))

    margins = torch.tensor([logit(0.72)] * 7 + [-logit(0.72)] * 3 + [logit(0.96)] * 10)
    assert reward.calibration_error(margins) == pytest.approx(0.5 * 0.02 + 0.5 * 0.04, abs=1e-5)
    assert reward.calibration_error(-margins) == pytest.approx(0.5 * 0.42 + 0.5 * 0.96, abs=1e-5)


def test_calibration_has_its_bins_from_one_half_on():
    """A confidence is never below 1/2. Within one bin, the two gaps would cancel each other."""
    right, wrong = torch.tensor([0.72, 0.78]).logit()
    margins = torch.stack([right, -wrong])
    assert reward.calibration_error(margins) == pytest.approx(0.5 * 0.28 + 0.5 * 0.78, abs=1e-5)


def test_training_centers_as_its_coefficient_says(tokenizer, tmp_path, monkeypatch):
    model, trained_with = sequence_classifier(tokenizer).eval(), []
    monkeypatch.setattr(reward, "fit", lambda *args: trained_with.append(args[-1]) or {})
    for center in (0.0, 2.0):
        settings = config(tmp_path, center_rewards_coefficient=center)
        reward.train(settings, model, tokenizer, PAIRS, [])
    batch = reward.collate(encoded(tokenizer), model.config.pad_token_id)
    chosen, rejected = reward.rewards(model, batch)
    (plain, _), (centered, _) = [loss(model, batch) for loss in trained_with]
    wanted = 2.0 * ((chosen + rejected) ** 2).mean()
    assert wanted > 1e-4 and torch.allclose(centered - plain, wanted, atol=1e-5)


def test_rows_that_are_too_long_are_left_out(tokenizer):
    with pytest.raises(RowError, match="longer than 40 tokens"):
        reward.encode(pair("a", "b " * 30, "c"), tokenizer, 40)


def test_what_the_siblings_share_is_the_same():
    pair_formats = {name: columns for name, columns in dpo.FORMATS.items() if name != "unpaired"}
    assert pair_formats == reward.FORMATS


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_r": 0}, {"use_4bit": True}, {"use_dora": True}],
    ids=["lora", "full", "4bit", "dora"],
)
def test_the_saved_folder_ranks_held_out_pairs_and_does_not_mind_the_side_of_padding(
    model_dir, pairs, tmp_path, options
):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    settings = config(
        tmp_path,
        model_name_or_path=model_dir,
        preference_dataset_path=pairs,
        validation_split=0.25,
        learning_rate=1e-2,
        num_train_epochs=4,
        **options,
    )
    stage = reward.RewardStage(settings)
    result = stage.execute()
    assert result.success, result.error_message
    figures = result.metrics
    assert (
        figures["eval_accuracy"] == 1
        and figures["eval_loss"] < 0.4
        and figures["calibration_error"] < 0.4
    )
    folder = result.artifacts["reward_model"]
    assert (
        folder == settings.output_dir
        and json.loads((tmp_path / "reward/stage.json").read_text())["artifacts"]["reward_model"]
        == folder
    )
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    texts = [
        tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False).rstrip()
        for row in stage.data[1]
        for side in ("chosen", "rejected")
    ]
    scores = []
    for side in ("left", "right"):
        batch = tokenizer(
            texts, padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt"
        )
        assert (batch["attention_mask"] == 0).any()
        scores.append(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.view(
                -1, 2
            )
        )
    alone = [
        model(
            **tokenizer(text, add_special_tokens=False, return_tensors="pt").to("cpu")
        ).logits.item()
        for text in texts
    ]
    assert torch.allclose(scores[0], scores[1], atol=1e-4) and torch.allclose(
        scores[0].flatten(), torch.tensor(alone), atol=1e-4
    )
    margins = scores[0][:, 0] - scores[0][:, 1]
    assert (margins > 0).all() and margins.mean().item() == pytest.approx(
        figures["eval_margin"], abs=1e-3
    )


def test_a_turn_never_ends_in_the_padding_token(model_dir, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.pad_token = (
        "<|im_end|>"  # as some models have it: the score would be taken before the stop token
    )
    tokenizer.save_pretrained(tmp_path / "model")
    from conftest import make_model

    make_model(tokenizer).save_pretrained(tmp_path / "model")
    model, tokenizer = reward.RewardStage(
        config(tmp_path, model_name_or_path=str(tmp_path / "model"))
    ).prepare_model_and_tokenizer(None, None)
    assert (
        tokenizer.pad_token_id not in core.chat.stop_tokens(tokenizer)
        and model.config.pad_token_id == tokenizer.pad_token_id
    )


class Judge(common.BaseStage):
    """Stands for a later stage that uses the reward model."""

    @common.dataclass
    class Config(core.config.StageConfig):
        reward_model_path: str | None = None

    stage_name, config_class = "judge", Config

    def execute(self, model=None, tokenizer=None, previous_result=None):
        return common.StageResult(
            "judge",
            True,
            previous_result.model_path,
            previous_result.tokenizer_path,
            artifacts={"judged_with": self.config.reward_model_path},
            model=model,
            tokenizer=tokenizer,
        )


def test_in_a_chain_the_policy_goes_on_and_the_reward_model_is_found_by_name(
    model_dir, data, pairs, tmp_path
):
    chain.Pipeline.register_stage("judge", Judge)
    values = {
        "model_name_or_path": model_dir,
        "output_dir": str(tmp_path / "run"),
        "stages": ["sft", "reward", "judge"],
        "stage_configs": {
            "sft": {"dataset_name_or_path": data, "max_steps": 2},
            "judge": {"reward_model_path": "stage:reward"},
            "reward": {"preference_dataset_path": pairs, "max_steps": 2},
        },
    }
    first, second, third = chain.Pipeline.from_dict(values).run()
    assert second.model_path == third.model_path == first.model_path == str(tmp_path / "run/01_sft")
    assert (
        third.artifacts["judged_with"]
        == second.artifacts["reward_model"]
        == str(tmp_path / "run/02_reward")
    )
    assert json.loads((tmp_path / "run/final/config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    assert third.model is not None and third.model.config.architectures == ["LlamaForCausalLM"]
    kept = values | {
        "stages": ["sft", "reward"],
        "output_dir": str(tmp_path / "kept"),
        "cleanup_intermediate": True,
        "save_final_model": False,
    }
    *_, last = chain.Pipeline.from_dict(kept).run()
    assert (tmp_path / "kept/01_sft/model.safetensors").exists() and last.model_path == str(
        tmp_path / "kept/01_sft"
    )
    assert (tmp_path / "kept/02_reward/model.safetensors").exists()
    for stages, named in (
        (["judge", "reward"], "stage:reward"),
        (["sft", "judge"], "stage:reward"),
        (["reward", "judge"], "stage:rewrad"),
    ):
        wrong = values | {
            "stages": stages,
            "stage_configs": {**values["stage_configs"], "judge": {"reward_model_path": named}},
        }
        with pytest.raises(ConfigError, match=f"reward_model_path={named}: no earlier stage"):
            chain.Pipeline.from_dict(wrong)


def test_a_reward_model_is_never_lost(model_dir, model, tokenizer, pairs, tmp_path):
    with pytest.raises(ConfigError, match="would lose the reward model"):
        config(tmp_path, save_intermediate=False).validate()
    stage = reward.RewardStage(
        config(tmp_path, model_name_or_path=model_dir, preference_dataset_path=pairs, max_steps=1)
    )
    with pytest.raises(ConfigError, match="set save_intermediate in the previous stage"):
        stage.execute(model, tokenizer, common.StageResult("sft", True))


def test_a_model_in_memory_alone_is_refused_with_the_remedy(tmp_path, pairs, model, tokenizer):
    stage = reward.RewardStage(config(tmp_path, preference_dataset_path=pairs))
    with pytest.raises(
        ConfigError, match="a reward model starts from a folder: set save_intermediate"
    ):
        stage.execute(model, tokenizer)
