"""core/checks.py: each silent failure, provoked by a small file, is refused before training."""

import copy
import json
import re
import subprocess
import sys

import dpo
import evaluate
import ppo
import pytest
import sft
from conftest import CHATML, ROOT

import common
import core.chat
import core.checks
import core.files
from chain import Pipeline
from core.errors import ConfigError

ROWS = [{"question": f"Say {'x' * n}", "answer": f"{n} times"} for n in range(12)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stage_on(tmp_path, rows, **options):
    settings = sft.SFTConfig(
        dataset_name_or_path=write(tmp_path / "rows.jsonl", rows),
        output_dir=str(tmp_path / "out"),
        **{"validation_split": 0.0, "model_name_or_path": "tiny"} | options,
    )
    stage = sft.SFTStage(settings)
    stage.check()
    return stage


@pytest.fixture
def own_tokenizer(tokenizer):
    """A tokenizer that a test may change."""
    return copy.deepcopy(tokenizer)


def test_what_is_seen_of_good_data(tmp_path, own_tokenizer):
    encoded = core.checks.check_encoded_rows(stage_on(tmp_path, ROWS), own_tokenizer, 512)
    lengths = [
        len(
            own_tokenizer.apply_chat_template(
                [
                    {"role": "user", "content": row["question"]},
                    {"role": "assistant", "content": row["answer"]},
                ],
                tokenize=False,
            ).strip()
        )
        for row in ROWS
    ]
    assert len(encoded.lengths) == 12 and encoded.cut == 0 and max(encoded.lengths) < max(lengths)
    shown = core.checks.highlight_targets(own_tokenizer, *encoded.example)
    assert (
        shown.count("⟦") == 1
        and "times<|im_end|>⟧" in shown
        and shown.startswith("<|im_start|>user\nSay ")
    )


def test_an_answer_that_does_not_end_is_refused(tmp_path, own_tokenizer):
    """A stage that forgets to append a stop token where the template has none is refused."""
    stage = stage_on(tmp_path, ROWS)
    encode = stage.sequences
    stage.sequences = lambda *args: (
        [(ids[:-1], labels[:-1]) for ids, labels in encode(*args)[0]],
        False,
    )
    with pytest.raises(
        ConfigError, match="the model would never stop. The row: .*<.im_start.>user"
    ):
        core.checks.check_encoded_rows(stage, own_tokenizer, 512)


def test_data_without_trained_tokens_is_refused(tmp_path, own_tokenizer):
    stage = stage_on(tmp_path, ROWS)
    encode = stage.sequences
    stage.sequences = lambda *args: (
        [(ids, [core.chat.IGNORE] * len(ids)) for ids, _ in encode(*args)[0]],
        False,
    )
    with pytest.raises(ConfigError, match="none of its tokens is a target"):
        core.checks.check_encoded_rows(stage, own_tokenizer, 512)
    own_tokenizer.chat_template = CHATML.replace(
        "message['content']", "(message['content'] if message['role'] == 'user' else '')"
    )  # the template leaves the answers out
    with pytest.raises(ConfigError, match="none of its tokens is a target"):
        core.checks.check_encoded_rows(stage_on(tmp_path, ROWS), own_tokenizer, 512)


def test_a_text_that_begins_twice_is_refused(tmp_path, own_tokenizer):
    own_tokenizer.bos_token = "<|endoftext|>"
    own_tokenizer.chat_template = "<|endoftext|><|endoftext|>" + CHATML
    with pytest.raises(ConfigError, match="begins with two bos tokens"):
        core.checks.check_encoded_rows(stage_on(tmp_path, ROWS), own_tokenizer, 512)
    own_tokenizer.chat_template = "<|endoftext|>" + CHATML
    assert core.checks.check_encoded_rows(stage_on(tmp_path, ROWS), own_tokenizer, 512)


def test_a_prompt_that_has_other_tokens_before_its_answer_keeps_those_of_its_own(tmp_path):
    """Two line breaks are one token at the end of a prompt, and two before a word, as in Llama."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: n
        for n, token in enumerate(
            ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
        )
    }
    bpe = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    own_tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    for template in (
        "{instruction}\n\n{response}",
        "{instruction}\n{response}",
        "{instruction}\n\n# {response}",
    ):
        own_tokenizer.chat_template = core.chat.template_from_instruction(template, own_tokenizer)
        stage = stage_on(tmp_path, ROWS)
        ids, labels = core.checks.check_encoded_rows(stage, own_tokenizer, 512).example
        start = labels.count(core.chat.IGNORE)
        prompt = own_tokenizer.decode(ids[:start])
        assert prompt.endswith(template[len("{instruction}") : -len("{response}")].rstrip(" "))
        assert ids[:start] == own_tokenizer(prompt).input_ids

    # A stage of one's own that tokenizes prompt and answer as one text is refused.
    own_tokenizer.chat_template = core.chat.template_from_instruction(
        "{instruction}\n\n{response}", own_tokenizer
    )
    together = own_tokenizer("a\n\nb<|endoftext|>").input_ids
    stage.sequences = lambda *_: ([(together, [core.chat.IGNORE] * 3 + together[3:])], False)
    with pytest.raises(ConfigError, match="prompt tokenizes differently without its answer"):
        core.checks.check_encoded_rows(stage, own_tokenizer, 512)


def test_a_template_that_writes_more_before_an_answer_than_it_keeps_is_refused(
    tmp_path, own_tokenizer
):
    own_tokenizer.chat_template = CHATML.replace(
        "assistant\n{% endif", "assistant\n<think>\n{% endif"
    )
    with pytest.raises(
        ConfigError, match="no usable rows .12 which .* without its generation prompt"
    ):
        core.checks.check_encoded_rows(stage_on(tmp_path, ROWS), own_tokenizer, 512)
    own_tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(
        ConfigError,
        match="set instruction_template instead. Every conversation is one which .* only one turn",
    ):
        core.chat.stop_tokens(own_tokenizer)


@pytest.mark.parametrize(
    "recipe, options",
    [
        (
            "dpo",
            dict(
                preference_dataset_path="examples/preferences.jsonl",
                reference_model_path="./nowhere",
            ),
        ),
        ("evaluate", dict(dataset_name_or_path="examples/sample_data.jsonl", baseline="./nowhere")),
        (
            "cot_distillation",
            dict(reasoning_dataset_path="examples/questions.jsonl", teacher_model_path="./nowhere"),
        ),
        (
            "rlaif",
            dict(prompt_dataset_path="examples/questions.jsonl", feedback_model_path="./nowhere"),
        ),
    ],
)
def test_another_model_that_is_not_there_is_refused_before_the_first_step(
    recipe, options, tmp_path, monkeypatch
):
    import importlib

    module = importlib.import_module(recipe)
    (stage_class,) = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and c.__module__ == recipe and issubclass(c, common.BaseStage)
    ]
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match="nowhere: no such file or folder"):
        stage_class(
            stage_class.config_class(model_name_or_path="tiny", output_dir=str(tmp_path), **options)
        ).check()


def test_rows_beyond_the_context_are_left_out_and_counted(tmp_path, own_tokenizer, caplog):
    long = {"question": "long " * 50, "answer": "yes"}
    stage = stage_on(tmp_path, [*ROWS, long])
    encoded = core.checks.check_encoded_rows(stage, own_tokenizer, 64, warn=True)
    assert len(encoded.lengths) == 12 and max(encoded.lengths) <= 64
    assert "1 of 13 rows left out: 1 with no answer that ends within 64 tokens" in caplog.text
    with pytest.raises(ConfigError, match="no usable rows .13 with no answer that ends within 2 t"):
        core.checks.check_encoded_rows(stage, own_tokenizer, 2)
    # Text is split at the context.
    text = stage_on(tmp_path, [{"text": "long " * 50}])
    assert core.checks.check_encoded_rows(text, own_tokenizer, 64)


def test_a_stage_that_ignores_the_context_is_refused(tmp_path, own_tokenizer):
    """Of a stage of one's own it is not known that it leaves such rows out."""
    stage = stage_on(tmp_path, ROWS)
    stage.sequences = lambda row, tokenizer, context: ([([5] * (context + 1), None)], False)
    with pytest.raises(ConfigError, match="longer than the model's context of 64 tokens"):
        core.checks.check_encoded_rows(stage, own_tokenizer, 64)


def test_plain_text_may_begin_and_end_anywhere(tmp_path, own_tokenizer):
    """Inside a character, after one token, with a piece of another text; but no text twice."""
    texts = [
        "\u00e9t\u00e9",
        "\u2192",
        "a",
        "Licence. " * 9 + "One.",
        "Licence. " * 9 + "Two.",
        *("ab" * n for n in range(2, 9)),
    ]
    for length in (5, 6, 7, 512):
        stage = stage_on(
            tmp_path,
            [{"text": text} for text in texts],
            max_seq_length=length,
            validation_split=0.3,
        )
        assert stage.data[1] and len(
            core.checks.check_encoded_rows(stage, own_tokenizer, 512).lengths
        ) == len(stage.data[0])
    stage.data[1].append(stage.data[0][0])
    with pytest.raises(ConfigError, match="it is in the training data too"):
        core.checks.check_encoded_rows(stage, own_tokenizer, 512)


def test_what_will_be_left_out_is_counted_before_and_refused_where_it_is_most(
    tmp_path, own_tokenizer, caplog
):
    long = [{"question": "long " * 50, "answer": "yes"}]
    for warn in (False, True):
        core.checks.check_encoded_rows(
            stage_on(tmp_path, ROWS + long, max_seq_length=64), own_tokenizer, 512, warn
        )
        assert (
            "training data: 1 of 13 rows left out: 1 with no answer that ends within 64 tokens"
            in caplog.text
        ) is warn
    with pytest.raises(
        ConfigError,
        match="training data: no usable rows .1 with no answer that ends within 64 tokens",
    ):
        core.checks.check_encoded_rows(
            stage_on(tmp_path, long, max_seq_length=64), own_tokenizer, 512
        )


def test_prompts_and_answers_that_are_cut_are_seen_as_training_sees_them(
    tmp_path, own_tokenizer, caplog
):
    settings = dict(model_name_or_path="tiny", validation_split=0.0, output_dir=str(tmp_path))
    pairs = [
        {"prompt": f"{n} " + "why " * 60, "chosen": "yes", "rejected": "no " * 60} for n in range(8)
    ]
    path = write(tmp_path / "pairs.jsonl", pairs)
    stage = dpo.DPOStage(
        dpo.DPOConfig(
            preference_dataset_path=path, max_prompt_length=40, max_seq_length=80, **settings
        )
    )
    stage.check()
    encoded = core.checks.check_encoded_rows(stage, own_tokenizer, 512)
    assert (
        encoded.cut == 8
        and max(encoded.lengths) == 80
        and "are cut at max_seq_length=80 or max_prompt_length=40" in caplog.text
    )
    shorter = core.checks.check_encoded_rows(stage, own_tokenizer, 64)
    assert shorter.cut == 8 and max(shorter.lengths) == 64
    split = dpo.DPOStage(
        dpo.DPOConfig(
            preference_dataset_path=path,
            max_prompt_length=40,
            max_seq_length=80,
            **settings | {"validation_split": 0.3},
        )
    )
    split.check()
    assert split.data[1] and core.checks.check_encoded_rows(
        split, own_tokenizer, 512
    )  # equal ends of other prompts are not the same rows
    chats = [
        {
            "messages": [
                {"role": role, "content": f"{n} {word}"}
                for word in ("a", "b " * 50)
                for role in ("user", "assistant")
            ]
        }
        for n in range(8)
    ]
    assert (
        core.checks.check_encoded_rows(
            stage_on(tmp_path, chats, max_seq_length=64), own_tokenizer, 512
        ).cut
        == 8
    )  # their first answers end


def test_a_row_on_both_sides_is_refused(tmp_path, own_tokenizer):
    twice = [row | {"source": str(n)} for row in ROWS for n in range(2)]
    settings = ppo.PPOConfig(
        model_name_or_path="tiny",
        prompt_dataset_path=write(tmp_path / "twice.jsonl", twice),
        reward=["exact"],
        output_dir=str(tmp_path / "out"),
        validation_split=0.3,
    )
    stage = ppo.PPOStage(settings)
    stage.check()
    prompts = [{str(row["prompt"]) for row in side} for side in stage.data]
    assert (
        core.checks.check_encoded_rows(stage, own_tokenizer, 512).lengths
        and all(prompts)
        and not prompts[0] & prompts[1]
    )
    stage.data[1].append(stage.data[0][0])
    with pytest.raises(
        ConfigError, match="a row of the evaluation data: it is in the training data too"
    ):
        core.checks.check_encoded_rows(stage, own_tokenizer, 512)


def test_two_pairs_may_share_an_answer(tmp_path, own_tokenizer):
    pairs = [{"prompt": "A joke?", "chosen": f"Joke {n}.", "rejected": "No."} for n in range(6)]
    config = dpo.DPOConfig(
        model_name_or_path="tiny",
        preference_dataset_path=write(tmp_path / "pairs.jsonl", pairs),
        output_dir=str(tmp_path / "out"),
        validation_split=0.3,
    )
    stage = dpo.DPOStage(config)
    stage.check()
    assert all(stage.data)
    assert len(core.checks.check_encoded_rows(stage, own_tokenizer, 512).lengths) == 4
    stage.data[1].append(stage.data[0][0])
    with pytest.raises(ConfigError, match="it is in the training data too"):
        core.checks.check_encoded_rows(stage, own_tokenizer, 512)


def test_heavy_truncation_is_reported_and_total_truncation_refused(tmp_path, own_tokenizer, caplog):
    pairs = [
        {"prompt": "a", "chosen": "yes " * (1 if n % 4 else 40), "rejected": "no"}
        for n in range(12)
    ]
    settings = dict(
        model_name_or_path="tiny",
        preference_dataset_path=write(tmp_path / "pairs.jsonl", pairs),
        validation_split=0.0,
        output_dir=str(tmp_path),
    )
    stage = dpo.DPOStage(dpo.DPOConfig(**settings, max_seq_length=60))
    stage.check()
    assert (
        core.checks.check_encoded_rows(stage, own_tokenizer, 512).cut == 3
        and "25% of the training rows are cut at max_seq_length=60" in caplog.text
    )
    for length, message in (
        (17, "100% of the training rows are cut at max_seq_length=17, so none ends"),
        (9, "no usable rows .12 whose prompt leaves no room"),
    ):
        stage = dpo.DPOStage(dpo.DPOConfig(**settings, max_seq_length=length))
        stage.check()
        with pytest.raises(ConfigError, match=message):
            core.checks.check_encoded_rows(stage, own_tokenizer, 512)


def test_too_little_disk_is_refused(tmp_path):
    core.files.check_disk_space(str(tmp_path / "not/yet/there"), 1e6)
    with pytest.raises(
        ConfigError, match="GB left, and about 1000000.0 GB will be written; make room"
    ):
        core.files.check_disk_space(str(tmp_path), 1e15)


def test_the_checks_come_before_the_weights(tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr(
        common, "load_model_and_tokenizer", lambda *_: pytest.fail("weights were read")
    )
    stage = stage_on(
        tmp_path,
        [{"question": "long " * 600, "answer": f"yes {n}"} for n in range(9)] + ROWS[:3],
        model_name_or_path=model_dir,
    )
    with pytest.raises(ConfigError, match="9 with no answer that ends within 512 tokens"):
        stage.execute()


def test_a_dry_run_of_a_recipe_and_of_a_chain_says_all_and_writes_nothing(
    tmp_path, model_dir, data
):
    pairs = write(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"Say {n}", "chosen": "yes", "rejected": "no"} for n in range(9)],
    )
    done = subprocess.run(
        [
            sys.executable,
            "recipes/dpo.py",
            f"--model={model_dir}",
            f"--data={pairs}",
            "--beta=0.2",
            "--dry_run",
            f"--output_dir={tmp_path}/o",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    options = f"model_name_or_path={model_dir}, preference_dataset_path={pairs}, beta=0.2"
    for line in (
        f"options     {options}",
        "reference   the stage's input model",
        f"data        {pairs}: 9 rows, 8 to train on and 1 to evaluate on; "
        "format prompt-chosen-rejected, since it has the columns prompt, chosen, rejected",
        "            ⟦yes<|im_end|>⟧",
        "disk        about 0.0 GB: the model in float32, the adapter, up to 2 checkpoints",
    ):
        assert line in lines, (line, done.stdout)
    for pattern in (
        r"time        \d+ to \d+ seconds: 1 steps, .* thousand tokens forward and backward, .*",
        r"memory      about .* GB: Python and libraries .*, weights .*, passes .*",
        r"rests on    a pass forward and backward over \d+ tokens, .* s here; random weights",
    ):
        assert any(re.fullmatch(pattern, line) for line in lines), (pattern, done.stdout)
    assert not (tmp_path / "o").exists() and "Warning" not in done.stdout + done.stderr


@pytest.mark.parametrize("recipe", [sft.SFTStage, evaluate.EvaluateStage])
@pytest.mark.parametrize("name", ["flash_attention_9", "kernels-community/of-nobody"])
def test_attention_that_is_not_here_is_refused_by_the_dry_run(
    tmp_path, model_dir, data, recipe, name
):
    config = recipe.config_class(
        model_name_or_path=model_dir,
        dataset_name_or_path=data,
        attn_implementation=name,
        output_dir=str(tmp_path / "o"),
    )
    stage = recipe(config)
    with pytest.raises(ConfigError, match=f"^attn_implementation={name}: "):
        common.log_dry_run(stage)


def test_a_chain_refuses_before_its_first_stage_runs(tmp_path, model_dir, data):
    pairs = write(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"{n}" + " long" * 600, "chosen": "yes", "rejected": "no"} for n in range(9)],
    )
    with pytest.raises(
        ConfigError,
        match="stage 02_dpo: training data: no usable rows .9 whose prompt leaves no room",
    ):
        Pipeline.from_dict(
            {
                "model_name_or_path": model_dir,
                "output_dir": str(tmp_path / "out"),
                "stages": ["sft", "dpo"],
                "stage_configs": {
                    "sft": {"data": data},
                    "dpo": {"data": pairs, "validation_split": 0},
                },
            }
        ).run()
    assert not (tmp_path / "out/01_sft").exists()
