"""recipes/custom_tokenizer.py and core/vocabulary.py: a new vocabulary, and embeddings for it."""

import json
import math
import os
import subprocess
import sys

import custom_tokenizer
import pytest
import torch
from conftest import CHATML, ROOT, make_model, make_tokenizer
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import chain
import common
from core import vocabulary
from core.chat import prompt_ids, stop_tokens
from core.errors import ConfigError

LINES = (ROOT / "examples/sample_data.jsonl").read_text().splitlines(keepends=True)
# EOS, the end of a turn, and one more of generation_config.json.
STOPS = ["<|end|>", "<|eot|>", "<think>"]
STRANGE = "Ünïcode 日本 🤖\tdef f(x):\n    return <step> \x00\x16 " + "ab" * 90


def write_corpus(tmp_path, lines=LINES, name="corpus.txt"):
    path = tmp_path / name
    path.write_text("".join(lines))
    return str(path)


def make_config(model, corpus, tmp_path, **options):
    defaults = dict(vocab_size=320, output_dir=str(tmp_path / "out"), log_level="error")
    return custom_tokenizer.CustomTokenizerConfig(
        model_name_or_path=str(model), training_corpus_path=str(corpus), **defaults | options
    )


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def llama3_tokenizer(normalizer=None):
    """Byte-level BPE as in Llama 3 and Qwen 3: added tokens at the end, one of them not
    special, and BOS by a sequence of post-processors."""
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.normalizer = normalizer
    split = pre_tokenizers.Split(r" ", "merged_with_next")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(LINES, trainers.BpeTrainer(**options))
    backend.add_special_tokens(["<|begin|>", "<|end|>", "<|eot|>"])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    begin = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    template = CHATML.replace("<|im_start|>", "<|begin|>").replace("<|im_end|>", "<|eot|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=template,
    )


def learn(old, vocab_size=500, min_frequency=2, special_tokens=()):
    """(new tokenizer, its settings) of the lines."""
    settings = vocabulary.learn_settings(old, LINES, vocab_size, min_frequency, special_tokens)
    return vocabulary.rebuild_tokenizer(old, settings, LlamaConfig()), settings


# -- mathematics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_mean_of_the_rows_of_its_pieces(dtype):
    old_rows = torch.randn(5, 3).to(dtype)
    new_rows = custom_tokenizer.transfer_rows(old_rows, [[2], [0, 1, 1, 4], [4], [3, 0]])
    assert new_rows.dtype == dtype
    assert torch.equal(new_rows[[0, 2]], old_rows[[2, 4]])  # bitwise
    wide = old_rows.double()
    by_hand = torch.stack([(wide[0] + 2 * wide[1] + wide[4]) / 4, (wide[3] + wide[0]) / 2])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert torch.allclose(new_rows[[1, 3]].double(), by_hand, atol=tolerance)


def test_pieces_are_what_the_old_tokenizer_cuts_a_token_into(tokenizer):
    new, _ = learn(tokenizer, special_tokens=["<step>"])
    pieces = custom_tokenizer.find_pieces(tokenizer, new)
    assert len(pieces) == len(new) == 500
    old_vocabulary = tokenizer.get_vocab()
    for token, new_id in new.get_vocab().items():
        if token in old_vocabulary:
            assert pieces[new_id] == [old_vocabulary[token]]
        elif token != "<step>":
            # Here the text of a token is enough; in general, a token may be half a character.
            assert pieces[new_id] == ids_of(tokenizer, new.decode([new_id]))
            assert len(pieces[new_id]) > 1
    assert pieces[new.convert_tokens_to_ids("<step>")] == ids_of(tokenizer, "<step>")


def test_what_the_old_tokenizer_cannot_write_starts_at_the_mean():
    old = llama3_tokenizer()
    settings = vocabulary.read_settings(old)
    null = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\x00")[0][0]
    # Some published vocabularies lack bytes like this one.
    settings["model"]["vocab"]["unused"] = settings["model"]["vocab"].pop(null)
    lacking = vocabulary.rebuild_tokenizer(old, settings, LlamaConfig())
    new, settings = learn(lacking)
    pieces = custom_tokenizer.find_pieces(lacking, new)
    assert pieces[new.convert_tokens_to_ids(null)] == list(range(len(lacking)))
    # The new tokenizer gives back what the old one loses.
    assert "\x00" not in lacking.decode(ids_of(lacking, STRANGE))
    vocabulary.check_new_tokenizer(lacking, new, settings, [STRANGE])


def test_bits_per_character_count_every_token(tokenizer):
    model = make_model(tokenizer)
    texts = ["Hello there, you", "日本"]
    bits = custom_tokenizer.bits_per_character(model, tokenizer, texts)
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *ids_of(tokenizer, text)]])
        with torch.no_grad():
            logps = model.eval()(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        nats -= logps.gather(-1, ids[0, 1:, None]).sum().item()
    assert bits == pytest.approx(nats / math.log(2) / sum(map(len, texts)), rel=1e-5)


# -- the vocabulary --------------------------------------------------------------------------------


def test_the_vocabulary_is_that_of_transformers_where_it_is_right(tokenizer):
    new, _ = learn(tokenizer, min_frequency=3)
    other = tokenizer.train_new_from_iterator(LINES, 500, min_frequency=3, show_progress=False)
    assert new.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()


def test_added_tokens_survive_with_new_ids():
    old = llama3_tokenizer()
    new, settings = learn(old, special_tokens=["<step>", "<step>", "<|end|>"])
    assert len(new) == 500
    names = [str(token) for token in old.added_tokens_decoder.values()]
    assert [str(token) for token in new.added_tokens_decoder.values()] == [*names, "<step>"]
    for token_id, token in new.added_tokens_decoder.items():
        assert ids_of(new, str(token)) == [token_id]
        assert token.special == (str(token) != "<think>")
    assert new.bos_token_id != old.bos_token_id
    assert new("a").input_ids == [new.bos_token_id, *ids_of(new, "a")]
    assert new.decode(ids_of(new, "a<step>"), skip_special_tokens=True) == "a"
    assert new.decode(ids_of(new, STRANGE)) == STRANGE
    vocabulary.check_new_tokenizer(old, new, settings, [STRANGE, *LINES])
    prompt = [{"role": "user", "content": "Hi"}]
    assert new.decode(prompt_ids(new, prompt)) == old.decode(prompt_ids(old, prompt))


def test_a_new_tokenizer_that_reads_otherwise_is_refused():
    # What the old one does to a text is no mistake of the new one.
    old = llama3_tokenizer(normalizers.NFC())
    new, settings = learn(old)
    vocabulary.check_new_tokenizer(old, new, settings, ["u\u0308"])

    lower, lower_settings = learn(llama3_tokenizer(normalizers.Lowercase()))
    with pytest.raises(ConfigError, match="reads 'Not So' as 'not so'"):
        vocabulary.check_new_tokenizer(old, lower, lower_settings, ["Not So"])
    smaller, _ = learn(old, vocab_size=400)
    with pytest.raises(ConfigError, match="with tokens other than"):
        vocabulary.check_new_tokenizer(old, smaller, settings, [])
    no_begin = settings | {"post_processor": None}
    without = vocabulary.rebuild_tokenizer(old, no_begin, LlamaConfig())
    with pytest.raises(ConfigError, match="with tokens other than"):
        vocabulary.check_new_tokenizer(old, without, no_begin, [])


def test_other_tokenizers_are_refused(tokenizer):
    for model, pre_tokenizer in (
        (models.WordLevel({"a": 0}, "a"), pre_tokenizers.ByteLevel()),
        (models.BPE(), pre_tokenizers.Whitespace()),
    ):
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizer
        other = PreTrainedTokenizerFast(tokenizer_object=backend)
        with pytest.raises(ConfigError, match="not byte-level BPE"):
            vocabulary.check_tokenizer(other, 400, [])


def test_a_vocabulary_below_the_alphabet_is_refused_before_a_model_is_loaded(
    tokenizer, model_dir, tmp_path, monkeypatch
):
    vocabulary.check_tokenizer(tokenizer, 256 + 3 + 1, ["<step>"])
    with pytest.raises(ConfigError, match="too small for 256 bytes and 4 added .* 260 or more"):
        vocabulary.check_tokenizer(tokenizer, 259, ["<step>"])

    monkeypatch.setattr(common, "load_model_and_tokenizer", None)
    config = make_config(model_dir, write_corpus(tmp_path), tmp_path, vocab_size=200)
    with pytest.raises(ConfigError, match="vocab_size=200 is too small"):
        custom_tokenizer.CustomTokenizerStage(config).execute()
    with pytest.raises(ConfigError, match="vocab_size=200 is too small"):
        common.log_dry_run(custom_tokenizer.CustomTokenizerStage(config))


LEARN_ELSEWHERE = """
import json, sys
sys.path[:0] = ["tests", "."]
from conftest import ROOT, make_tokenizer
from core.vocabulary import learn_settings
lines = (ROOT / "examples/sample_data.jsonl").read_text().splitlines(keepends=True)
print(json.dumps(learn_settings(make_tokenizer(), lines, 900, 2, [])))
"""


def test_every_process_learns_the_same(tokenizer):
    words = [sys.executable, "-c", LEARN_ELSEWHERE]
    environment = dict(os.environ, RAYON_NUM_THREADS="1")
    output = subprocess.check_output(words, cwd=ROOT, env=environment, text=True)
    assert json.loads(output) == vocabulary.learn_settings(tokenizer, LINES, 900, 2, [])


# -- the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_model_gets_tables_for_the_new_tokens(tmp_path, tied):
    old = llama3_tokenizer()
    # The embeddings have more rows than the tokenizer has tokens, as many published ones do.
    model = make_model(old, tie_word_embeddings=tied)
    model.resize_token_embeddings(640)
    for options in (model.config, model.generation_config):
        options.bos_token_id = old.bos_token_id
        options.eos_token_id = [*old.convert_tokens_to_ids(STOPS), 10_000]
        options.pad_token_id = old.pad_token_id
    model.save_pretrained(tmp_path / "model")
    old.save_pretrained(tmp_path / "model")
    config = make_config(
        tmp_path / "model", write_corpus(tmp_path), tmp_path, special_tokens="<step>"
    )
    result = custom_tokenizer.CustomTokenizerStage(config).execute()
    assert result.success, result.error_message

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    new = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert new.get_vocab() == result.tokenizer.get_vocab() and len(new) == 320
    assert saved.config.vocab_size == 320
    pieces = custom_tokenizer.find_pieces(old, new)
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        rows = getattr(saved, layer)().weight
        expected = custom_tokenizer.transfer_rows(getattr(model, layer)().weight, pieces)
        assert torch.equal(rows, expected)
    assert (saved.lm_head.weight is saved.model.embed_tokens.weight) == tied
    for name, value in saved.model.layers.state_dict().items():
        assert torch.equal(value, model.model.layers.state_dict()[name])

    # Every id of the options names the same token as before.
    stops = new.convert_tokens_to_ids(STOPS)
    assert saved.config.eos_token_id == stops
    assert saved.config.bos_token_id == new.convert_tokens_to_ids("<|begin|>") != old.bos_token_id
    assert saved.generation_config.bos_token_id == new.bos_token_id
    assert saved.generation_config.pad_token_id == saved.config.pad_token_id == new.pad_token_id
    assert set(saved.generation_config.eos_token_id) == set(stops)
    assert set(stop_tokens(result.tokenizer)) == set(stops)

    metrics = result.metrics
    assert (metrics["vocab_size_before"], metrics["vocab_size"]) == (604, 320)
    num_kept = sum(len(ids) == 1 for ids in pieces)
    assert metrics["kept_tokens"] == pytest.approx(num_kept / 320)
    assert metrics["chars_per_token"] < metrics["chars_per_token_before"]  # it is smaller
    assert metrics["bits_per_char"] > 0 and metrics["bits_per_char_before"] > 0


def test_a_bias_of_the_output_layer_is_transferred(tokenizer, model):
    model.lm_head = torch.nn.Linear(64, len(tokenizer), bias=True)
    old_bias = model.lm_head.bias.clone()
    custom_tokenizer.replace_embeddings(model, [[7], [3, 5]])
    by_hand = torch.stack([old_bias[7], (old_bias[3] + old_bias[5]) / 2])
    assert torch.allclose(model.lm_head.bias, by_hand)
    assert model.config.vocab_size == 2 and model.lm_head.weight.shape == (2, 64)


def test_the_same_tokenizer_learned_again_changes_nothing(tokenizer, model, tmp_path):
    config = make_config("a model", "c.txt", tmp_path)
    first, new = custom_tokenizer.train(config, model, tokenizer, LINES, LINES[:4])
    before = model(input_ids=torch.tensor([[5, 9, 300]])).logits
    second, again = custom_tokenizer.train(config, model, new, LINES, LINES[:4])
    assert again.get_vocab() == new.get_vocab() != tokenizer.get_vocab()
    assert torch.equal(model(input_ids=torch.tensor([[5, 9, 300]])).logits, before)
    assert second["kept_tokens"] == 1
    for name in ("bits_per_char", "chars_per_token", "vocab_size"):
        assert second[name] == second[f"{name}_before"] == first[name]


def test_the_row_without_a_gradient_is_that_of_the_new_padding(tokenizer, model):
    model.get_input_embeddings().padding_idx = model.config.pad_token_id = 5
    model.generation_config.bos_token_id = -1
    new, _ = learn(tokenizer, special_tokens=["<step>"])
    vocabulary.renumber_model(model, tokenizer, new)
    pad = new.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(5))
    assert model.get_input_embeddings().padding_idx == model.config.pad_token_id == pad != 5
    assert model.generation_config.bos_token_id is None


def test_a_token_of_the_options_that_is_gone_is_refused_and_the_model_stays(model, tmp_path):
    old = make_tokenizer()
    reminder = "Ġreminder"
    model.config.eos_token_id = [0, 5]
    model.generation_config.eos_token_id = old.convert_tokens_to_ids(reminder)
    options_before = model.config.to_dict()
    texts = [f"{n} other words\n" for n in range(20)]
    config = make_config("a model", "c.txt", tmp_path, special_tokens=["<step>"])
    with pytest.raises(ConfigError, match=f"token {reminder}, .* --special_tokens={reminder}"):
        custom_tokenizer.train(config, model, old, texts, texts[:4])
    assert model.config.to_dict() == options_before
    assert model.get_input_embeddings().num_embeddings == len(old)


@pytest.mark.parametrize("owner", ["config", "generation_config"])
def test_token_ids_elsewhere_are_refused(model, owner):
    vocabulary.check_model(model)
    name = {"config": "vocab_size_per_layer_input", "generation_config": "suppress_tokens"}[owner]
    setattr(getattr(model, owner), name, [400])
    with pytest.raises(ConfigError, match=f"this model has {name}"):
        vocabulary.check_model(model)


# -- the stage -------------------------------------------------------------------------------------


def test_a_finished_result_is_reused_until_the_corpus_changes(model_dir, tmp_path):
    corpus = write_corpus(tmp_path)
    config = make_config(model_dir, corpus, tmp_path)

    def execute():
        stage = custom_tokenizer.CustomTokenizerStage(config)
        stage.reuse_finished = True
        return stage.execute()

    first = execute()
    assert first.success and first.model is not None
    again = execute()
    assert again.model is None and again.metrics == first.metrics
    write_corpus(tmp_path, LINES[:-1])
    assert execute().model is not None


# As an older file has it.
OLDER_OPTIONS = {
    "vocab_size": 280,
    "tokenizer_type": "BPE",
    "min_frequency": 2,
    "special_tokens": ["<|pad|>", "<|unk|>"],
    "enabled": True,
    "load_best_model": True,
    "use_wandb": False,
    "wandb_project": None,
    "wandb_run_name": None,
}


@pytest.mark.parametrize("save_intermediate", [True, False])
def test_in_a_chain_all_weights_train_on_the_new_tokens(
    model_dir, data, tmp_path, monkeypatch, caplog, save_intermediate
):
    monkeypatch.chdir(tmp_path)
    sft_options = {"dataset_name_or_path": data, "max_steps": 3, "lora_r": 0, "save_steps": 0}
    chosen = {"training_corpus_path": data, "save_intermediate": save_intermediate}
    values = {
        "model_name_or_path": model_dir,
        "output_dir": "out",
        "stages": ["custom_tokenizer", "sft"],
        "stage_configs": {
            "custom_tokenizer": OLDER_OPTIONS | chosen,
            "sft": sft_options | {"learning_rate": 1e-2, "validation_split": 0.2},
        },
    }
    chain.Pipeline.from_dict(values, dry_run=True).run()
    assert not (tmp_path / "out").exists()
    results = chain.Pipeline.from_dict(values).run()
    assert all(result.success for result in results)
    assert "load_best_model has no effect" in caplog.text
    assert "which only lora_r=0 trains" in caplog.text
    trained = results[1].metrics
    assert trained["eval_loss"] < trained["eval_loss_before"]
    final = AutoTokenizer.from_pretrained("out/final")
    assert len(final) == 280 and final.convert_tokens_to_ids("<|pad|>") == 3
    assert AutoModelForCausalLM.from_pretrained("out/final").config.vocab_size == 280

    if save_intermediate:
        again = chain.Pipeline.from_dict(values)
        again.run()
        assert "01_custom_tokenizer is finished already" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_4bit": True}, "use_4bit and use_8bit leave the embeddings as they are"),
        ({"use_8bit": True}, "use_4bit and use_8bit leave the embeddings as they are"),
        ({"validation_split": 0}, "leaves no text to check"),
        ({"tokenizer_type": "Unigram"}, "learns a different vocabulary in each run"),
        ({"tokenizer_type": "wordpiece"}, "replaces long words with an unknown token"),
        ({"training_corpus_path": ""}, "training_corpus_path is missing"),
    ],
)
def test_what_cannot_be_done_is_refused(options, message, tmp_path):
    corpus = options.pop("training_corpus_path", "c.txt")
    with pytest.raises(ConfigError, match=message):
        make_config("m", corpus, tmp_path, **options).validate()


# -- the corpus ------------------------------------------------------------------------------------


def texts_of(path, tmp_path, **options):
    stage = custom_tokenizer.CustomTokenizerStage(make_config("m", path, tmp_path, **options))
    train_texts, eval_texts = stage.load_data()
    assert eval_texts and not set(train_texts) & set(eval_texts)
    assert stage.lineage["data"]["rows"] == len(train_texts) + len(eval_texts)
    return {*train_texts, *eval_texts}


def test_lines_of_a_text_file_keep_their_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffone\n\n  two\nthree", encoding="utf-8")
    assert texts_of(path, tmp_path) == {"one\n", "  two\n", "three"}
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="a.txt cannot be read: .*utf-8"):
        texts_of(path, tmp_path)
    with pytest.raises(ConfigError, match="missing.txt cannot be read: .*No such file"):
        texts_of(tmp_path / "missing.txt", tmp_path)
    one = write_corpus(tmp_path, ["one line\n"])
    with pytest.raises(ConfigError, match="too few texts"):
        texts_of(one, tmp_path)
    config = make_config("m", path, tmp_path, dataset_format="messages")
    config.validate()
    assert config.notes == ["dataset_format has no effect with a .txt file"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a  b", "id": "x1"}, "a  b"),
        ({"instruction": "i", "input": "j", "output": 7}, "i\n\nj\n\n7"),
        (
            {
                "messages": [
                    {"role": "system", "content": ""},
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": "a", "reasoning_content": "hm"},
                ]
            },
            "q\n\nhm\n\na",
        ),
        ({"conversations": [{"from": "human", "value": "h"}]}, "h"),
    ],
)
def test_all_texts_of_a_row_are_used(row, text):
    forms = {"text": "text", "instruction": "alpaca", "messages": "messages"}
    form = forms.get(next(iter(row)), "sharegpt")
    assert custom_tokenizer.convert(row, form) == text


def test_rows_of_a_data_set_are_a_corpus(data, tmp_path):
    assert "Say xxx 3\n\nyyyy 3." in texts_of(data, tmp_path)


def test_a_column_that_joins_the_prompt_is_part_of_the_corpus(tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"system": "Be brief.", "instruction": "Add.", "context": "1 and 2", "output": "3"}
    rows.write_text("".join(json.dumps(row | {"output": str(n)}) + "\n" for n in range(30)))
    texts = texts_of(rows, tmp_path)
    assert "Be brief.\n\nAdd.\n\n1 and 2\n\n7" in texts
