"""common.py: strict configuration, model loading and merging, the stage contract, saving, the command line."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
import sft
import torch
from conftest import ROOT, make_model

import chain
import common
import core.chat
import core.checkpoints
import core.config
import core.data
import core.errors
import core.files
import core.hub
import core.runtime
import core.statistics
import core.training
import core.verifiers
from common import BaseStage, StageResult
from core.config import FitConfig, StageConfig, TrainingConfig
from core.errors import ConfigError

# -- configuration ----------------------------------------------------------------------------------------------------


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
        ("model_name_or_path", 12, "12"),
        ("gradient_checkpointing", "true", 1),
        ("gradient_checkpointing", False, 0),
        ("gradient_checkpointing", "2", 2),
        ("resume_from_checkpoint", "true", True),
        ("resume_from_checkpoint", "out/checkpoint-5", "out/checkpoint-5"),
        ("lora_target_modules", None, []),
        ("num_train_epochs", 2, 2.0),
        ("revision", None, None),
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
        ("weight_decay", None),
        ("max_steps", -1),
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


def test_a_configuration_of_a_data_file_is_refused(data):
    with pytest.raises(
        ConfigError, match="dataset_config_name=main: data .* has no configurations"
    ):
        core.data.load_dataset_from_path(data, "main")


def test_a_token_is_refused_without_being_shown():
    with pytest.raises(ConfigError) as error:
        TrainingConfig(use_auth_token="hf_canary")
    assert "use_auth_token" in str(error.value) and "canary" not in str(error.value)


def test_unknown_names_get_the_nearest_valid_one():
    with pytest.raises(
        ConfigError, match="unknown option 'learnig_rate'; did you mean 'learning_rate'"
    ):
        core.config.resolve_names(sft.SFTConfig, {"learnig_rate": 1})
    with pytest.raises(ConfigError, match="model_name_or_path is given twice"):
        core.config.resolve_names(sft.SFTConfig, {"model": "a", "model_name_or_path": "b"})
    assert core.config.resolve_names(sft.SFTConfig, {"model": "a", "data": "b"}) == {
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
        ({"torch_dtype": "float16", "lora_r": 0}, "underflows"),
        ({"torch_dtype": "float16"}, "does not train on a CPU"),
        ({"use_dora": True, "use_8bit": True}, "do not go together on a CPU"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.5}, "warmup_ratio has no effect"),
        ({"load_best_model_at_end": True}, "set eval_steps"),
        (
            {"eval_steps": 3, "save_steps": 4, "load_best_model_at_end": True},
            "multiple of eval_steps=3",
        ),
        ({"auto_detect_format": False}, "goes with dataset_format"),
        ({"dataset_format": "alpacca"}, "one of: messages"),
        ({"auto_detect_format": False, "dataset_format": "alpacca"}, "one of: messages"),
        ({"num_eval_samples": 4, "validation_split": 0}, "validation_split"),
        ({"wandb_project": "p"}, "without use_wandb"),
        ({"lora_r": 0, "lora_alpha": 64}, "lora_alpha has no effect with lora_r=0"),
        ({"use_dora": True, "lora_r": 0}, "use_dora has no effect"),
        ({"bnb_4bit_quant_type": "fp4"}, "without use_4bit=true"),
        ({"max_new_tokens": 5}, "without num_eval_samples"),
        ({"metric_for_best_model": "eval_kl"}, "without load_best_model_at_end=true"),
        ({"wandb_run_name": "x"}, "without report_to"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, words):
    given = {"model_name_or_path": "m", "dataset_name_or_path": "d"} if options else {}
    with pytest.raises(ConfigError, match=words):
        sft.SFTConfig(**given | options).validate()


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="report_to=wandb: not installed; run: pip install wandb"):
        StageConfig(use_wandb=True).validate()


def test_a_config_of_ones_own_is_strict_too():
    @dataclass
    class Mine(StageConfig):
        weight: Annotated[float, common.Gt(0)] = 1.0
        mode: Literal["a", "b"] = "a"
        names: core.config.Names = field(default_factory=list)

    assert Mine(weight="3", names="x,y").names == ["x", "y"]
    with pytest.raises(ConfigError, match="^mode='c'"):
        Mine(mode="c")


# -- command line -----------------------------------------------------------------------------------------------------


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **options
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--learning_rat=1"], "did you mean 'learning_rate'"),
        (["--model=12", "--data=x.jsonl", "--seed=x"], "seed='x'"),
        (["train"], "unexpected word 'train'"),
        (["--save_intermediate=false"], "are for the stages of a chain"),
        (["--model=./nowhere", "--data=./none.jsonl"], "./none.jsonl: no such file"),
        (
            ["--model=./nowhere", "--data=examples/sample_data.jsonl", "--dry_run=perhaps"],
            "dry_run",
        ),
        (["--seed=1", "--seed=2"], "--seed was given 2 times"),
        (
            ["--dry_run=1", "--model=./nowhere", "--data=examples/sample_data.jsonl"],
            "./nowhere: no such file",
        ),
    ],
)
def test_a_mistake_exits_with_status_2_and_one_sentence(tmp_path, arguments, words):
    done = run("recipes/sft.py", f"--output_dir={tmp_path}", *arguments)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr + done.stdout


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, data):
    done = run("recipes/sft.py", f"--output_dir={data}", "--model=./nowhere", f"--data={data}")
    assert (
        done.returncode == 2
        and "cannot be written to" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


READING = {
    "a.csv": (
        "code,said\n019,None\n7,\n",
        [{"code": "019", "said": "None"}, {"code": "7", "said": ""}],
    ),
    "b.jsonl": (
        '{"a": "2024-05-20T10:00:00", "b": 1}\n{"a": "x\u2028y", "c": "z"}\n',
        [{"a": "2024-05-20T10:00:00", "b": 1, "c": None}, {"a": "x\u2028y", "b": None, "c": "z"}],
    ),
    "d.jsonl": ('\n{"a": 1} \r\n\n\t\n{"a": 2}\n \n{"a": 3}', [{"a": 1}, {"a": 2}, {"a": 3}]),
    "c.json": ('\ufeff[{"a": [1, "x"]}, {"a": "t"}]', [{"a": [1, "x"]}, {"a": "t"}]),
}


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("folder", [False, True])
def test_texts_are_read_as_they_stand(tmp_path, name, folder):
    text, rows = READING[name]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text(text, encoding="utf-8")
    assert [
        *core.data.load_dataset_from_path(
            str(tmp_path / "data" if folder else tmp_path / "data" / name)
        )
    ] == rows


def test_what_is_not_read_of_a_folder_is_said(tmp_path, caplog):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "latest.jsonl").write_text('{"text": "z"}\n')
    (tmp_path / "dev").mkdir()
    for name in ("my_test.jsonl", "dev/b.jsonl"):
        (tmp_path / name).write_text('{"text": "b"}\n')
    assert [*core.data.load_dataset_from_path(str(tmp_path))] == [{"text": "z"}, {"text": "a"}]
    assert "not for training: b.jsonl, my_test.jsonl" in caplog.text
    (tmp_path / "more.csv").write_text("text\nc\n")
    with pytest.raises(ConfigError, match=r"files of several types \(csv, json\)"):
        core.data.load_dataset_from_path(str(tmp_path))


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a": 1}\n{"a": ', "Expecting value: line 2 column"),
        ('\n{"a": 1}\n\n \n{"a": ', "Expecting value: line 5 column"),
        ("[1, 2]", "has to be an object"),
        ("", "has no rows"),
        ("\udce4", "can't decode"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=words):
        core.data.load_dataset_from_path(str(tmp_path / "a.jsonl"))


def test_a_message_that_is_none_is_a_row_left_out(caplog):
    for value in (
        [None, {"role": "user", "content": "a"}],
        ["hi", "there"],
        {"a": 1},
        5.0 + 1j,
        None,
        [],
    ):
        with pytest.raises(core.errors.RowError):
            core.chat.as_messages(value, "user")
    assert core.chat.as_messages(7, "user") == [{"role": "user", "content": "7"}]
    core.chat.as_messages({"role": "user", "content": "a", "tool_calls": [1], "name": None}, "user")
    assert "only role and content are read, not tool_calls" in caplog.text


def test_a_line_is_ended_by_a_line_feed_alone(tmp_path):
    rows = [{"step": n, "text": "a\u2028b\x85c"} for n in (1, 2, 3)]
    assert core.files.rows_from_main_process(tmp_path / "a.jsonl", lambda: rows) == rows
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"step": 1, "te')
    core.training.truncate_metrics(tmp_path / "a.jsonl", 2)
    assert [
        json.loads(line) for line in (tmp_path / "a.jsonl").read_text().split("\n")[:-1]
    ] == rows[:2]


def test_help_has_every_option_with_its_comment():
    done = run("recipes/sft.py", "--help")
    assert done.returncode == 0 and "log pi_theta" in done.stdout
    for name in (option.name for option in fields(sft.SFTConfig)):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"  --{name}=")]
        assert len(line.split("  ")[-1]) > 5, f"{name} has no comment"


def test_the_recipe_from_the_command_line_leaves_a_whole_folder(model_dir, data, tmp_path):
    out = tmp_path / "out"
    done = run(
        "recipes/sft.py",
        f"--model={model_dir}",
        f"--data={data}",
        f"--output_dir={out}",
        "--max_steps=3",
        "--validation_split=0.2",
        "--num_eval_samples=2",
        "--max_new_tokens=4",
        "--report_to=tensorboard",
        "--learning_rate=1e-2",
        env={**__import__("os").environ, "HF_TOKEN": "hf_canary"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "question-answer, 24 rows: question, answer" in done.stdout and "tokens/s" in done.stdout
    assert "Warning" not in done.stdout + done.stderr
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert (
        model.config.use_cache
        and model.generation_config.eos_token_id == [0, 2]
        and tokenizer.chat_template
    )
    stage = json.loads((out / "stage.json").read_text())
    assert (
        stage["success"] and stage["parent"]["model"] == model_dir and stage["data"]["rows"] == 24
    )
    assert stage["metrics"]["eval_loss"] < stage["metrics"]["eval_loss_before"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_s", "token_accuracy"} <= set(lines[1])
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2
    assert (
        list(out.glob("runs/events.out.tfevents*"))
        and (out / "adapter/adapter_model.safetensors").exists()
    )
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert b"hf_canary" not in written and not list(out.rglob("*.bin"))


# -- model ------------------------------------------------------------------------------------------------------------


def training_config(model_dir, **options):
    return TrainingConfig(model_name_or_path=str(model_dir), **options)


def shaken(model):
    """The PEFT model with an adapter that does something."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    return model.eval()


IDS = torch.arange(5, 45)[None]


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
    """bitsandbytes repacks the weights in evaluation on some CPUs; gradients and dequantized weights were wrong then."""
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


def test_full_training_thaws_what_a_stage_before_froze(model_dir):
    model, _ = common.load_model_and_tokenizer(training_config(model_dir))
    thawed = common.add_adapter(model.requires_grad_(False), training_config(model_dir, lora_r=0))
    assert all(parameter.requires_grad for parameter in thawed.parameters())


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


def test_a_gguf_file_is_converted_once_for_its_content(tokenizer, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    write_gguf(gguf, path, tokenizer)
    folder = core.hub.find_model(str(path), TrainingConfig())
    assert (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists()
    monkeypatch.setattr(core.hub, "convert_gguf", None)  # would fail if called again
    (tmp_path / "copy.gguf").write_bytes(path.read_bytes())
    assert core.hub.find_model(str(tmp_path / "copy.gguf"), TrainingConfig()) == folder
    (tmp_path / "somepackage").mkdir()
    (tmp_path / "somepackage/__init__.py").write_text("raise ImportError('must not be imported')")
    (tmp_path / "somepackage/tiny.gguf").write_bytes(path.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    assert core.hub.find_model("somepackage/tiny.gguf", TrainingConfig()) == folder
    loaded, _ = common.load_model_and_tokenizer(training_config(path), needs_chat_template=False)
    expected = make_model(tokenizer, tie_word_embeddings=True)
    assert torch.allclose(loaded(IDS).logits, expected(IDS).logits, atol=1e-4)
    trainable = common.add_adapter(loaded, training_config(path, lora_r=0))
    assert all(p.requires_grad for p in trainable.parameters())


def write_gguf(gguf, path, tokenizer):
    """The tiny model as llama.cpp would write it."""
    import numpy

    model, size = make_model(tokenizer, tie_word_embeddings=True), 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512), writer.add_embedding_length(size), writer.add_block_count(2)
    writer.add_feed_forward_length(128), writer.add_head_count(4), writer.add_head_count_kv(2)
    (
        writer.add_layer_norm_rms_eps(1e-6),
        writer.add_rope_dimension_count(16),
        writer.add_vocab_size(len(tokenizer)),
    )
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    (
        writer.add_tokenizer_model("gpt2"),
        writer.add_tokenizer_pre("smollm"),
        writer.add_token_list(tokens),
    )
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_eos_token_id(0), writer.add_bos_token_id(1)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, value in model.state_dict().items():
        value = value.numpy().astype(numpy.float32)
        if name == "lm_head.weight":
            continue
        if "layers." in name:
            _, _, layer, rest = name.split(".", 3)
            rest = rest.removesuffix(".weight")
            if rest in (
                "self_attn.q_proj",
                "self_attn.k_proj",
            ):  # llama.cpp interleaves the halves of a head
                heads = 4 if "q_proj" in rest else 2
                value = value.reshape(heads, 2, -1, size).swapaxes(1, 2).reshape(value.shape)
            writer.add_tensor(f"blk.{layer}.{names[rest]}.weight", value)
        else:
            writer.add_tensor(
                {
                    "model.embed_tokens.weight": "token_embd.weight",
                    "model.norm.weight": "output_norm.weight",
                }[name],
                value,
            )
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )


@pytest.mark.parametrize(
    "name, words",
    [
        ("./nowhere", "no such file or folder"),
        ("some/model", "the hub cannot be reached"),
        ("tiny.gguf", "no such file"),
        ("{file}", "is a file; give its folder"),
        ("{empty}", "cannot be loaded"),
    ],
)
def test_a_model_that_is_not_there_is_refused_at_once(tmp_path, name, words):
    (tmp_path / "empty").mkdir()
    name = name.format(file=__file__, empty=tmp_path / "empty")
    with pytest.raises(ConfigError, match=words):
        common.load_model_and_tokenizer(training_config(name))


def test_a_revision_goes_with_a_hub_name_only(model_dir):
    with pytest.raises(ConfigError, match="revision goes with a hub name"):
        core.hub.find_model(model_dir, training_config(model_dir, revision="main"))


def test_a_base_model_without_a_template_gets_a_choice_before_weights_are_read(model_dir, tmp_path):
    import shutil

    shutil.copytree(model_dir, tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink()
    (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(
        ConfigError, match="has no chat template; .*instruction_template='### Instruction"
    ):
        common.load_model_and_tokenizer(training_config(tmp_path / "base"))


def test_unknown_target_modules_are_refused_with_those_there(model_dir):
    model, _ = common.load_model_and_tokenizer(training_config(model_dir))
    with pytest.raises(ConfigError, match="query: the model's are down_proj"):
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


# -- stage contract ---------------------------------------------------------------------------------------------------


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
    with pytest.raises(ConfigError, match="set save_intermediate in the stage before"):
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

    (tmp_path / "stage.json").write_text('{"success": true}')  # of an older run
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


def test_a_frozen_model_is_an_error_not_a_success(tokenizer, model, tmp_path):
    with pytest.raises(RuntimeError, match="everything is frozen"):
        core.training.fit(
            FitConfig(model_name_or_path="m", output_dir=str(tmp_path)),
            model.requires_grad_(False),
            tokenizer,
            [{"input_ids": [1]}],
            [],
            None,
            None,
        )


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
        assert (
            core.config.weight_dtype(TrainingConfig())
            == dtype
            == core.runtime.compute_dtype("auto")
        )
        assert core.config.weight_dtype(TrainingConfig(lora_r=0)) == torch.float32
    assert (
        core.config.weight_dtype(TrainingConfig(lora_r=0, torch_dtype="bfloat16")) == torch.bfloat16
    )


def test_libraries_do_not_warn_of_what_is_meant(caplog):
    import bitsandbytes

    bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu").eval()(
        torch.randn(4, 64)
    )  # not in float16
    assert core.verifiers.numeric([""], ["It is 7.0"], ["3 + 4 #### 7"]) == [
        1.0
    ]  # without a timeout of its own
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


def test_intervals():
    """Wilson's by hand, also where all are right; the normal one beyond 0 and 1. The ends 0 and 1 are exact."""
    assert all(
        core.statistics.confidence_interval([0.0] * n)[0] == 0.0
        and core.statistics.confidence_interval([1.0] * n)[1] == 1.0
        for n in range(1, 40)
    )
    assert core.statistics.confidence_interval([1.0] * 5 + [0.0] * 5) == pytest.approx(
        (0.2366, 0.7634), abs=1e-4
    )
    assert core.statistics.confidence_interval([1.0] * 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert core.statistics.confidence_interval([2.0, 4.0]) == pytest.approx(
        (3 - 1.96, 3 + 1.96), abs=1e-3
    )
    assert (
        core.statistics.mean_with_interval("x", []) == {}
        and core.statistics.mean_with_interval("x", [0.5])["x_n"] == 1
    )


HOLES = """
import re, common, torch
held = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.ones(7_000_000)  # freed at once: from then on glibc takes blocks of this size from its heap, and keeps them
start, blocks = held(), [torch.ones(5_000_000) for _ in range(30)]
del blocks[::2]
print(held() - start)
"""


@pytest.mark.skipif(
    sys.platform != "linux"
    or "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="only where Linux has huge pages",
)
def test_freed_tensors_leave_no_holes():
    held = [
        int(
            subprocess.run(
                [sys.executable, "-c", HOLES],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | {"THP_MEM_ALLOC_ENABLE": flag},
            ).stdout
        )
        for flag in ("0", "1")
    ]
    assert held[1] < 0.7 * held[0]


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
    with pytest.raises(ConfigError, match="handed over with its tokenizer"):
        stage.execute(model)


def test_a_home_folder_is_found_in_output_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        sft.SFTConfig(output_dir="~/o").output_dir
        == chain.PipelineConfig(output_dir="~/o").output_dir
        == f"{tmp_path}/o"
    )


def test_a_stage_that_a_notebook_defines_anew_is_another(tmp_path):
    import linecache
    import types

    def stage(number):
        """As IPython runs a cell: in a module without a file, its source in linecache."""
        source = f"from common import BaseStage, StageConfig\nclass Mine(BaseStage):\n    def train(self, model, tokenizer):\n        return {{'n': {number}}}\n"
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
        and core.checkpoints.describe_differences(two, three) == "train() changed"
    )


def test_an_instruction_template_says_what_is_no_place_in_it(tokenizer, caplog):
    core.runtime.warn_once.cache_clear()
    with pytest.raises(ConfigError, match="is missing, or stands after"):
        core.chat.template_from_instruction("{response} {instruction}", tokenizer)
    core.chat.template_from_instruction("{instruction} {input} {response} {}", tokenizer)
    assert not caplog.text
    for template, said in (
        ("{context} {instruction} {response}", "{context}"),
        ("{instruction} {response} {response}", "{response}"),
    ):
        caplog.clear()
        assert (
            said in core.chat.template_from_instruction(template, tokenizer)
            and f"instruction_template: {said} is text there" in caplog.text
        )


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
    with pytest.raises(ConfigError, match="a quantized model cannot be handed over"):
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


def test_8_bit_weights_are_multiplied_alike_in_training_and_evaluation(model_dir):
    model, _ = common.load_model_and_tokenizer(training_config(model_dir, use_8bit=True))
    with torch.no_grad():
        assert torch.equal(
            *(mode()(torch.tensor([[1, 2, 3]])).logits for mode in (model.train, model.eval))
        )


def test_a_classifier_writes_nothing_and_may_start_from_a_language_models_adapter(
    model_dir, data, tmp_path
):
    import reward
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1).save_pretrained(
        tmp_path / "rm"
    )
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "rm")
    with pytest.raises(ConfigError, match="rm gives scores and writes nothing"):
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
    with pytest.raises(ConfigError, match="scorer gives scores and writes nothing"):
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
        match="metric_for_best_model=exact_match: there are eval_loss, eval_token_accuracy",
    ):
        sft.SFTStage(config).execute()
    assert (
        not (tmp_path / "metrics.jsonl").exists()
        or "loss" not in (tmp_path / "metrics.jsonl").read_text()
    )


@pytest.mark.parametrize(
    "gold, text, right",
    [
        ("72", "So it is 72.", 1),
        ("72", "**72**", 1),
        ("18", "$18", 1),
        ("18", r"\$18", 1),
        ("18", "€18", 1),
        ("-3", "- 3", 1),
        ("1e6", "1000000", 1),
        ("3.5", "3 1/2", 1),
        ("3 1/2", "3", 0),
        ("0.5", "1/2", 1),
        ("1,234", "1234", 1),
        ("5", r"\[5\]", 1),
        ("5", "A: 5", 1),
        ("12", "at 7:30 I have 12", 1),
        ("12", "12:45", 0),
        ("(1, 2)", "(7, 2)", 0),
        ("(1, 2)", "(1,2)", 1),
        ("x=2, y=3", "x=7, y=3", 0),
        (r"2\sqrt{3}", r"2\sqrt{5}", 0),
        (r"$2\sqrt{3}$", r"2\sqrt{3}", 1),
        ("2x+1", "2x+5", 0),
        ("2x+1", "1 + 2x", 1),
        (r"\sqrt{2}", r"\sqrt{2}", 1),
        (r"\frac{\pi}{2}", r"#### \pi/2", 1),
        ("{1,2}", "{2,1}", 1),
        ("10, 20", "20", 0),
        ("12345678901234", "12345678901235", 0),
        ("5", "", 0),
        ("5", "five", 0),
        ("7", "3 + 4", 1),
        ("12", "3 4", 0),
        ("8", "2**3", 1),
        ("0", "1e-7", 0),
        ("-3.5", "It is -3 1/2.", 1),
        ("0.5", r"\frac{1}{2}", 1),
    ],
)
def test_answers_are_compared_whole_as_numbers_and_formulas(gold, text, right):
    assert core.verifiers.numeric([""], [text], [gold]) == [right]


@pytest.mark.parametrize("gold", ["12:30", "7:30 pm", "2024-05-01", "A0", "B33", "x", "five"])
def test_a_text_with_numbers_in_it_is_no_number(gold):
    with pytest.raises(ValueError, match="is not a number or formula"):
        core.verifiers.numeric([""], [gold], [gold])
