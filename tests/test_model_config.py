"""core/model_config.py, core/adapters.py: which models can be trained, and which weights train."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model, training_config
from families import make_family
from transformers import AutoConfig

import common
import core.chat
import core.hub
import core.rewards
from core.adapters import add_adapter, layers_without_adapter, share_adapted
from core.errors import ConfigError
from core.model_config import check_can_score, context_length


@pytest.mark.parametrize(
    "kind, said",
    [
        ("t5", "is an encoder and a decoder"),
        ("bart", "is an encoder and a decoder"),
        ("bert", "cannot be loaded as a causal language model"),
        ("vit", "cannot be loaded as a causal language model"),
    ],
)
def test_a_model_that_writes_no_text_is_refused_by_its_configuration(
    tokenizer, tmp_path, kind, said
):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"model {tmp_path} .{kind}. {said}"):
        core.hub.load_tokenizer(training_config(str(tmp_path)))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(model_dir, tokenizer, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["<a>", "<b>"])
    grown.save_pretrained(folder)
    with pytest.raises(ConfigError, match="embeddings for 400 tokens, but its tokenizer has 402"):
        core.hub.load_tokenizer(training_config(str(folder)))


def test_generation_stops_where_the_model_says_and_can_be_saved(model_dir, tmp_path, caplog):
    """Published models list several stop tokens, and have a temperature beside do_sample=false."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    generation = {"do_sample": False, "temperature": 0.6, "eos_token_id": [0, 7]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    config = training_config(str(folder), output_dir=str(tmp_path / "out"))
    model, tokenizer = common.BaseStage(config).prepare_model_and_tokenizer(None, None)
    assert core.chat.stop_tokens(tokenizer) == [0, 2, 7]  # 2 is <|im_end|>
    assert "do_sample is now true" in caplog.text
    saved = common.save_model(common.merge_adapter(model), tokenizer, config.output_dir)
    written = json.loads(Path(saved, "generation_config.json").read_text())
    assert written["eos_token_id"] == [0, 2, 7] and written["do_sample"]


def test_the_context_is_that_of_the_text_model_and_may_have_no_limit():
    whole = AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 77})
    assert context_length(whole) == 77
    assert context_length(AutoConfig.for_model("gpt2", n_positions=33)) == 33
    assert context_length(AutoConfig.for_model("mamba")) > 10**9


def test_a_model_without_a_form_that_scores_is_no_reward_model():
    check_can_score(AutoConfig.for_model("llama"))
    with pytest.raises(ConfigError, match="granite cannot be a reward model"):
        check_can_score(AutoConfig.for_model("granite"))


@pytest.mark.parametrize(
    "family, share",
    [
        *(("Llama 3", 1), ("GPT-2", 1), ("Mixtral", 1), ("DeepSeek-V3", 1), ("GPT-OSS", 1)),
        *(("Granite-MoE", 1), ("Gemma 3", 1), ("Mamba", 0.59), ("Jamba", 0.93)),
    ],
)
def test_an_adapter_reaches_experts_and_says_what_it_does_not_reach(tokenizer, family, share):
    model = add_adapter(make_family(family, tokenizer), training_config("m"))
    assert share_adapted(model) == pytest.approx(share, abs=0.01)
    assert "vision" not in " ".join(n for n, p in model.named_parameters() if p.requires_grad)


def test_rows_of_new_tokens_are_no_part_of_that_share(tokenizer):
    assert share_adapted(add_adapter(make_model(tokenizer), training_config("m"), new_ids=[7])) == 1


def test_layers_whose_weights_are_read_directly_get_no_adapter(tokenizer):
    """An adapter on them would have no effect, on some devices."""
    left = {name.split(".")[-1] for name in layers_without_adapter(make_family("Mamba", tokenizer))}
    assert left == {"x_proj", "dt_proj", "out_proj"}


def test_without_an_adapter_a_vision_tower_stays_as_it_is(tokenizer):
    model = add_adapter(make_family("Gemma 3", tokenizer), training_config("m", lora_r=0))
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen and all("vision" in name or "projector" in name for name in frozen)


@pytest.mark.parametrize(
    "family, options, said",
    [
        (
            "Llama 3",
            {"lora_target_modules": "query"},
            "query: the model has only down_proj, .*q_proj",
        ),
        ("GPT-OSS", {"lora_dropout": 0.1}, "does not fit the model: an adapter on experts"),
        ("Mixtral", {"use_dora": True}, "does not fit the model: an adapter on experts"),
    ],
)
def test_a_target_that_cannot_be_is_refused(tokenizer, family, options, said):
    with pytest.raises(ConfigError, match=said):
        add_adapter(make_family(family, tokenizer), training_config("m", **options))


def test_a_linear_layer_that_is_no_plain_product_gets_no_adapter(tokenizer):
    """Such as a router, and DeepSeek-V4's grouped projection."""
    model = make_family("DeepSeek-V4", tokenizer)
    left = {name.split(".")[-1] for name in layers_without_adapter(model)}
    assert left == {"o_a_proj"}
    adapted = add_adapter(model, training_config("m"))
    assert adapted(torch.ones(1, 4).long()).logits.shape == (1, 4, len(tokenizer))
    with pytest.raises(ConfigError, match="o_a_proj: the model has only"):
        options = {"lora_target_modules": "o_a_proj"}
        add_adapter(make_family("DeepSeek-V4", tokenizer), training_config("m", **options))
    left = layers_without_adapter(make_family("Llama 4", tokenizer))
    assert any(name.endswith("router") for name in left)


def test_names_of_the_users_own_are_taken(tokenizer):
    for family, name in (("GPT-2", "c_attn"), ("GPT-OSS", "gate_up_proj"), ("Mixtral", "q_proj")):
        model = make_family(family, tokenizer)
        adapted = add_adapter(model, training_config("m", lora_target_modules=name))
        assert 0 < share_adapted(adapted) < 1


def test_an_output_layer_that_is_the_embeddings_too_is_no_target(tokenizer):
    config = training_config("m", lora_target_modules="lm_head")
    with pytest.raises(ConfigError, match="lm_head: this layer is also the input embeddings"):
        add_adapter(make_model(tokenizer, tie_word_embeddings=True), config)
    add_adapter(make_model(tokenizer), config)


def test_a_prompt_that_a_reward_model_cannot_take_is_refused_before_training(tokenizer, tmp_path):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + strict.chat_template
    )
    strict.save_pretrained(tmp_path)
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    config = core.rewards.ScoringConfig(reward=[], reward_model_path=str(tmp_path))
    with pytest.raises(ConfigError, match="a prompt which the chat template refuses: no system"):
        core.rewards.check_reward_prompts(config, [prompt[1:], prompt])
    config.on_reward_error = "skip"
    core.rewards.check_reward_prompts(config, [prompt])
