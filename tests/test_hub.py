"""core/hub.py: where a model is found, and GGUF files."""

import json

import pytest
import torch
import transformers
from conftest import make_model, training_config

import common
import core.hub
from core.config import TrainingConfig
from core.errors import ConfigError

IDS = torch.arange(5, 45)[None]  # (1, T)


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


def test_a_model_that_needs_a_library_is_refused_without_its_weights(model_dir, monkeypatch):
    """As Gemma 3n needs timm."""

    def fail(*_, **__):
        raise ImportError("pip install timm")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", fail)
    with pytest.raises(ConfigError, match="cannot be loaded: pip install timm"):
        core.hub.load_skeleton(training_config(model_dir))


def test_a_revision_goes_with_a_hub_name_only(model_dir):
    with pytest.raises(ConfigError, match="revision is only for a hub name"):
        core.hub.find_model(model_dir, training_config(model_dir, revision="main"))


@pytest.mark.parametrize("name", ["../outside.safetensors", "{outside}", "a/b.safetensors"])
def test_an_index_that_names_weights_outside_of_its_folder_is_refused(tokenizer, tmp_path, name):
    folder = tmp_path / "model"
    make_model(tokenizer).save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    config = training_config(folder)
    common.load_model_and_tokenizer(config)  # several files of its own are fine
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    tensor, file = next(iter(content["weight_map"].items()))
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((folder / file).read_bytes())
    content["weight_map"][tensor] = name.format(outside=outside)
    index.write_text(json.dumps(content))
    for load in (common.load_model_and_tokenizer, core.hub.load_tokenizer):
        with pytest.raises(ConfigError, match="names weights outside of its folder"):
            load(config)

    # So is that of the base of an adapter.
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"base_model_name_or_path": str(folder)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="names weights outside of its folder"):
        core.hub.load_tokenizer(training_config(adapter))

    index.write_text('{"weight_map": []}')
    with pytest.raises(ConfigError, match="is not an index of weights"):
        core.hub.load_tokenizer(config)
