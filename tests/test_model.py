"""common.py: loading, quantization, LoRA and merging."""

import pytest
import sft
import torch
from conftest import make_model, training_config
from families import make_family
from transformers import AutoModelForCausalLM, BertGenerationConfig

import common
from core.errors import ConfigError

IDS = torch.arange(5, 45)[None]  # (1, T)


def shaken(model):
    """The PEFT model with an adapter that does something."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    return model.eval()


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": "all"}]
)
def test_the_merged_adapter_is_the_adapter(model_dir, options):
    model, _ = common.load_model_and_tokenizer(training_config(model_dir))
    model = shaken(common.add_adapter(model, training_config(model_dir, **options)))
    with torch.no_grad():
        before = model(IDS).logits
        merged = common.merge_adapter(model)
        assert torch.allclose(merged(IDS).logits, before, atol=1e-4)
    assert type(merged).__name__ == "LlamaForCausalLM" and all(
        p.requires_grad for p in merged.parameters()
    )


@pytest.mark.parametrize("bits", ["use_4bit", "use_8bit"])
def test_a_quantized_base_is_dequantized_then_merged(model_dir, tmp_path, bits):
    config = training_config(model_dir, **{bits: True})
    model, tokenizer = common.load_model_and_tokenizer(config)
    assert "bnb" in str(type(model.model.layers[0].mlp.up_proj)).lower() or "bitsandbytes" in str(
        type(model.model.layers[0].mlp.up_proj)
    )
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    quantized = model.model.layers[1].mlp.up_proj.weight
    state = getattr(model.model.layers[1].mlp.up_proj, "state", None)
    plain = dequantize_bnb_weight(quantized, state).float()
    model = shaken(common.add_adapter(model, config))
    lora = model.base_model.model.model.layers[1].mlp.up_proj
    expected = (
        plain
        + lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    )
    merged = common.merge_adapter(model)
    assert torch.allclose(merged.model.layers[1].mlp.up_proj.weight, expected, atol=1e-4)
    folder = common.save_model(merged, tokenizer, str(tmp_path))
    again, _ = common.load_model_and_tokenizer(training_config(folder))
    assert torch.equal(again(IDS).logits, merged(IDS).logits) and not hasattr(
        again.config, "quantization_config"
    )


def test_a_4_bit_model_trains_and_merges_rightly_after_an_evaluation(model_dir):
    """On some CPUs bitsandbytes repacks weights in evaluation, which made later gradients wrong."""
    config = training_config(model_dir, use_4bit=True)
    model, tokenizer = common.load_model_and_tokenizer(config)
    model = shaken(common.add_adapter(model, config))
    ((row,), _) = sft.encode(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c d"}], tokenizer, 64
    )
    with torch.no_grad():
        model(IDS)  # in eval mode: this is where the weights were repacked
    gradients = []
    for candidate in (model, None):
        if candidate is None:  # the same adapter on the dequantized base
            from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

            state, lora = get_peft_model_state_dict(model), model.peft_config["default"]
            candidate = get_peft_model(model.unload().dequantize(), lora)
            set_peft_model_state_dict(candidate, state)
        loss, _ = sft.loss(candidate.train(), sft.collate([row]))
        loss.backward()
        gradients.append({n: p.grad for n, p in candidate.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == len(gradients[1]) > 10
    for name, gradient in gradients[1].items():
        assert torch.allclose(gradients[0][name], gradient, rtol=1e-3, atol=1e-6), name


def test_8_bit_weights_are_multiplied_alike_in_training_and_evaluation(model_dir):
    model, _ = common.load_model_and_tokenizer(training_config(model_dir, use_8bit=True))
    with torch.no_grad():
        assert torch.equal(
            *(mode()(torch.tensor([[1, 2, 3]])).logits for mode in (model.train, model.eval))
        )


def test_full_training_thaws_what_a_stage_before_froze(model_dir):
    model, _ = common.load_model_and_tokenizer(training_config(model_dir))
    thawed = common.add_adapter(model.requires_grad_(False), training_config(model_dir, lora_r=0))
    assert all(parameter.requires_grad for parameter in thawed.parameters())


@pytest.mark.parametrize("bits", [{}, {"use_4bit": True}])
def test_an_adapter_folder_is_loaded_with_its_base_and_trains(model_dir, tmp_path, bits):
    config = training_config(model_dir, output_dir=str(tmp_path))
    model, _ = common.load_model_and_tokenizer(config)
    model = shaken(common.add_adapter(model, config))
    with torch.no_grad():
        expected = model(IDS).logits
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    loaded, _ = common.load_model_and_tokenizer(training_config(folder, **bits))
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, expected, atol=2.0 if bits else 1e-4)
    trainable = common.add_adapter(loaded, training_config(folder, **bits))
    assert sum(p.numel() for p in trainable.parameters() if p.requires_grad) > 0


@pytest.fixture(scope="module")
def laguna(tokenizer, tmp_path_factory):
    """A model whose layers "shared_experts" PEFT takes for "shared_expert" when it loads them."""
    folder = tmp_path_factory.mktemp("laguna")
    make_family("Laguna", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_no_part_of_an_adapter_is_lost_when_a_quantized_model_is_merged(laguna):
    config = training_config(laguna, use_4bit=True)
    model, _ = common.load_model_and_tokenizer(config)
    model = shaken(common.add_adapter(model, config))
    with torch.no_grad():
        before = model(IDS).logits
        assert torch.allclose(common.merge_adapter(model)(IDS).logits, before, atol=1e-3)


def test_an_adapter_that_does_not_fit_its_base_is_refused(laguna, tmp_path):
    model, _ = common.load_model_and_tokenizer(training_config(laguna))
    model = shaken(common.add_adapter(model, training_config(laguna)))
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="of its weights do not fit the model, such as .*shared"):
        common.load_model_and_tokenizer(training_config(tmp_path))


def test_a_classifier_writes_nothing_and_may_start_from_a_language_models_adapter(
    model_dir, data, tmp_path
):
    import reward
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1).save_pretrained(
        tmp_path / "rm"
    )
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "rm")
    with pytest.raises(ConfigError, match="rm returns scores, not text"):
        common.load_model_and_tokenizer(training_config(str(tmp_path / "rm")))
    tuned = sft.SFTStage(
        sft.SFTConfig(
            model_name_or_path=model_dir,
            dataset_name_or_path=data,
            max_steps=3,
            learning_rate=1e-2,
            output_dir=str(tmp_path / "sft"),
        )
    ).execute()
    scorer = common.add_adapter(
        AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1),
        training_config(model_dir),
        "SEQ_CLS",
    )
    scorer.save_pretrained(tmp_path / "scorer")
    with pytest.raises(ConfigError, match="scorer returns scores, not text"):
        common.load_model_and_tokenizer(training_config(str(tmp_path / "scorer")))
    for dtype in (torch.bfloat16, torch.float32):  # each merge is kept apart
        half = reward.RewardConfig(
            model_name_or_path=tuned.artifacts["adapter"],
            preference_dataset_path="d",
            torch_dtype=str(dtype)[6:],
        )
        assert common.load_model_and_tokenizer(half, task="SEQ_CLS")[0].dtype == dtype
    config = reward.RewardConfig(
        model_name_or_path=tuned.artifacts["adapter"], preference_dataset_path="d"
    )
    model, _ = common.load_model_and_tokenizer(config, task="SEQ_CLS")
    merged = AutoModelForCausalLM.from_pretrained(tuned.model_path)
    assert model.score.weight.shape[0] == 1 and all(
        torch.allclose(value, merged.model.state_dict()[name], atol=1e-6)
        for name, value in model.model.state_dict().items()
    )


def test_a_base_model_without_a_template_gets_a_choice_before_weights_are_read(model_dir, tmp_path):
    import shutil

    shutil.copytree(model_dir, tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink()
    (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(
        ConfigError, match="has no chat template; .*instruction_template='### Instruction"
    ):
        common.load_model_and_tokenizer(training_config(tmp_path / "base"))


def test_a_model_whose_tokens_see_later_ones_is_refused(tokenizer, tmp_path):
    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    for is_decoder in (False, True):
        config = BertGenerationConfig(is_decoder=is_decoder, **sizes)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        if is_decoder:
            common.load_model_and_tokenizer(training_config(tmp_path))
        else:
            with pytest.raises(ConfigError, match=r"\(bert-generation\) is not causal"):
                common.load_model_and_tokenizer(training_config(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_causal_models_pass_in_every_precision(model_dir, dtype):
    for options in ({}, {"use_4bit": True}, {"use_8bit": True}):
        common.load_model_and_tokenizer(training_config(model_dir, torch_dtype=dtype, **options))


def test_unknown_target_modules_are_refused_with_those_there(model_dir):
    model, _ = common.load_model_and_tokenizer(training_config(model_dir))
    with pytest.raises(ConfigError, match="query: the model has only down_proj"):
        common.add_adapter(model, training_config(model_dir, lora_target_modules="query"))


def test_weights_that_are_not_safetensors_are_refused(model_dir, tmp_path):
    import shutil

    shutil.copytree(model_dir, tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save(
        make_model(common.load_model_and_tokenizer(training_config(model_dir))[1]).state_dict(),
        tmp_path / "pickled/pytorch_model.bin",
    )
    with pytest.raises(ConfigError, match="safetensors"):
        common.load_model_and_tokenizer(training_config(tmp_path / "pickled"))
