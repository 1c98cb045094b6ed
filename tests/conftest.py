"""A tiny random model, made on the spot: the tests need no network and no downloads."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the network is broken
# The tests run in float32 on a CPU; test_gpu.py has those for a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# On a model this small, threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Options of a training of two steps that says nothing.
TWO_STEPS = dict(
    max_steps=2,
    per_device_train_batch_size=4,
    validation_split=0.2,
    learning_rate=2e-2,
    save_steps=0,
    log_level="error",
)

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Converted models and data sets are cached in a folder of the test session."""
    folder = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HOME"] = folder
    os.environ["HF_DATASETS_CACHE"] = folder


@pytest.fixture(scope="session")
def tokenizer(own_cache):
    return make_tokenizer()


def make_tokenizer():
    """A byte-level BPE of 400 tokens. Its turns end in <|im_end|>, but its eos is <|endoftext|>.

    Code that takes the eos for the end of a turn fails on it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    lines = (ROOT / "examples/sample_data.jsonl").read_text().splitlines()
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def make_model(tokenizer, seed=0, **changes):
    """A random Llama of two layers; `changes` are options of its LlamaConfig."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        max_position_embeddings=512,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
        **sizes | changes,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture(scope="session")
def model_dir(tokenizer, tmp_path_factory):
    """A folder with the tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    """A .jsonl of 24 question-answer rows of different lengths."""
    lines = []
    for n in range(24):
        row = {"question": f"Say {'x' * (n % 7)} {n}", "answer": f"{'y' * (1 + n % 5)} {n}."}
        lines.append(json.dumps(row) + "\n")
    path = tmp_path / "data.jsonl"
    path.write_text("".join(lines))
    return str(path)


def training_config(model_dir, **options):
    """A TrainingConfig for the model at `model_dir`."""
    from core.config import TrainingConfig

    return TrainingConfig(model_name_or_path=str(model_dir), **options)


def read_help(text):
    """{option: (its other names, explanation)} of a help text."""
    entries = {}
    for entry in re.split(r"\n  (?=--)", text)[1:]:
        names, _, explanation = re.sub(r"\n\n.*", "", entry, flags=re.DOTALL).partition(" ")
        while names.endswith(",") or explanation.startswith("VALUE}"):
            more, _, explanation = explanation.partition(" ")
            names += more
        *aliases, name = re.findall(r"--([\w.]+)", names)
        entries[name] = (aliases, " ".join(explanation.split()))
    return entries
