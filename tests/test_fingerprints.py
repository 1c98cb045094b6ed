"""What makes a finished stage run again, and what does not."""

import importlib
import json
import os
import shutil
import sys
import time
from dataclasses import fields
from pathlib import Path

import cot_distillation
import custom_tokenizer
import dpo
import evaluate
import grpo
import pytest
import reward
import rlaif
import sft
from conftest import ROOT

import core.checkpoints
import core.digests
import core.fingerprints
from chain import Pipeline
from common import BaseStage
from core.config import StageConfig
from core.digests import content_digest, file_identity
from core.errors import ConfigError
from core.fingerprints import (
    EVALUATION_OPTIONS,
    NOT_FINGERPRINTED,
    describe_differences,
    fingerprinted_options,
    identify_named_files,
)
from core.recipe_files import get_config_class, load_recipe
from core.source_code import source_digest
from core.yaml_files import dump_yaml

LEFT_OUT = NOT_FINGERPRINTED | EVALUATION_OPTIONS.keys()
STEPS = dict(max_steps=4, validation_split=0.2, learning_rate=1e-2, lora_dropout=0.1)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rewrite_unseen(path, change):
    """Change the bytes of a file, but not its size or its time of modification."""
    status = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def flip_last_byte(content):
    return content[:-1] + bytes([content[-1] ^ 1])


# -- the table of options --------------------------------------------------------------------------

CONFIG_CLASSES = {
    path.stem: get_config_class(load_recipe(path, BaseStage))
    for path in sorted((ROOT / "recipes").glob("*.py"))
}
OF_EVERY_STAGE = {
    "stage_name",
    "output_dir",
    "enabled",
    "save_intermediate",
    "force",
    "log_level",
    "report_to",
    "use_wandb",
    "wandb_project",
    "wandb_run_name",
    "use_auth_token",
    "auto_detect_format",
}
OF_CALLS = {"max_calls", "max_cost", "input_price", "output_price", "call_timeout", "max_missing"}
OF_TRAINING = {"resume_from_checkpoint", "save_total_limit"}
OF_FIT = OF_TRAINING | {
    "logging_steps",
    "eval_steps",
    "save_steps",
    "per_device_eval_batch_size",
    "metric_for_best_model",
    "greater_is_better",
}
OF_ANSWERS = {"num_eval_samples", "max_new_tokens"}
OF_RL = OF_TRAINING | {"eval_freq", "num_eval_prompts", "save_freq"}
# What each recipe has that changes no result, as its defaults are. A new option is in none of these
# sets, so it is part of the fingerprint until somebody decides otherwise.
CHANGES_NOTHING = {
    "sft": OF_FIT | OF_ANSWERS,
    "dpo": OF_FIT | OF_ANSWERS,
    "reward": OF_FIT,
    "cot_distillation": OF_FIT
    | OF_ANSWERS
    | OF_CALLS
    | {"teacher_api_key", "eval_reasoning_tasks"},
    "a2c": OF_RL,
    "ppo": OF_RL,
    "trpo": OF_RL,
    "grpo": OF_RL,
    "rl": OF_RL,
    "rlaif": OF_RL | OF_CALLS | {"feedback_api_key"},
    "custom_tokenizer": {"resume_from_checkpoint", "num_eval_samples", "load_best_model"},
    "evaluate": OF_CALLS | {"feedback_api_key"},
}


@pytest.mark.parametrize("recipe", CONFIG_CLASSES)
def test_every_option_is_in_the_fingerprint_or_in_the_table(recipe):
    config_class = CONFIG_CLASSES[recipe]
    names = {option.name for option in fields(config_class)}
    compared = fingerprinted_options(config_class()).keys()
    left_out = names - compared
    assert left_out == CHANGES_NOTHING[recipe] | OF_EVERY_STAGE
    assert compared <= names and left_out <= LEFT_OUT


def test_the_table_has_no_name_that_no_recipe_has():
    names = set()
    for config_class in CONFIG_CLASSES.values():
        names.update(option.name for option in fields(config_class))
    assert names >= LEFT_OUT


COMPARE = {"load_best_model_at_end": True, "eval_steps": 2, "save_steps": 2}


@pytest.mark.parametrize(
    "config_class, where, counts",
    [
        (sft.SFTConfig, COMPARE, {"eval_steps", "metric_for_best_model", "greater_is_better"}),
        (sft.SFTConfig, COMPARE, {"per_device_eval_batch_size"}),
        (reward.RewardConfig, {"early_stopping_patience": 1}, {"eval_steps"}),
        (dpo.DPOConfig, {"precompute_ref_log_probs": True}, {"per_device_eval_batch_size"}),
        (
            cot_distillation.CoTConfig,
            {"distillation_type": "logits", "on_policy_share": 0.5},
            {"max_new_tokens"},
        ),
        (
            cot_distillation.CoTConfig,
            {"generate_synthetic_data": True},
            {"eval_reasoning_tasks"},
        ),
        (evaluate.EvaluateConfig, {}, {"num_eval_samples", "max_new_tokens"}),
    ],
)
def test_an_option_of_evaluation_counts_where_it_changes_the_result(config_class, where, counts):
    assert counts <= fingerprinted_options(config_class(**where)).keys()


def test_what_decides_that_an_option_counts_is_itself_compared():
    before = {"options": fingerprinted_options(sft.SFTConfig())}
    now = {"options": fingerprinted_options(sft.SFTConfig(**COMPARE))}
    assert describe_differences(before, now) == "load_best_model_at_end False -> True"
    other = {"options": fingerprinted_options(sft.SFTConfig(**COMPARE | {"eval_steps": 1}))}
    assert describe_differences(now, other) == "eval_steps 2 -> 1"


def test_the_options_of_the_parts_of_rlaif_are_of_the_same_table():
    def options(**part):
        return fingerprinted_options(
            rlaif.RLAIFConfig(feedback_mode="preference", preference_kwargs=part)
        )

    assert options(beta=0.3, logging_steps=5, eval_steps=2) == options(beta=0.3)
    assert options(beta=0.3) != options(beta=0.4)
    assert options(**COMPARE) != options(**COMPARE | {"eval_steps": 1})
    lengths = rlaif.RLAIFConfig(generation_kwargs={"max_new_tokens": 9})
    assert fingerprinted_options(lengths)["generation_kwargs"] == {"max_new_tokens": 9}


OWN_STAGE = """
from dataclasses import dataclass
from common import BaseStage
from core.config import StageConfig

@dataclass
class MineConfig(StageConfig):
    max_new_tokens: int = 3  # of what it trains on
    logging_steps: int = 3

class Mine(BaseStage):
    config_class = MineConfig
"""


def test_an_option_of_ones_own_counts_whatever_its_name(tmp_path):
    (tmp_path / "mine.py").write_text(OWN_STAGE)
    config_class = load_recipe(tmp_path / "mine.py", BaseStage).config_class
    assert fingerprinted_options(config_class()) == {"seed": 42, "max_new_tokens": 3}


# -- real runs: other values, the same weights -----------------------------------------------------

# Another value of every option that can have one here. wandb is not installed.
OTHER_VALUES = {
    "force": True,
    "stage_name": "another",
    "log_level": "error",
    "report_to": ["tensorboard"],
    "use_auth_token": True,
    "wandb_project": "another",
    "wandb_run_name": "another",
    "logging_steps": 3,
    "resume_from_checkpoint": False,
    "save_steps": 1,
    "save_freq": 1,
    "save_total_limit": None,
    "eval_steps": 1,
    "eval_freq": 1,
    "per_device_eval_batch_size": 1,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
    "num_eval_prompts": 2,
    "num_eval_samples": 3,
    "max_new_tokens": 5,
    "max_calls": 1000,
    "max_cost": 9.0,
    "input_price": 1.0,
    "output_price": 1.0,
    "call_timeout": 9.0,
    "max_missing": 0.5,
    "teacher_api_key": "PATH",
    "feedback_api_key": "PATH",
    "load_best_model": True,
}
NO_OTHER_VALUE = {"output_dir", "enabled", "save_intermediate", "use_wandb", "auto_detect_format"}
PAIRS = [
    {"prompt": f"Say {n}", "chosen": "yes " * (1 + n % 3), "rejected": "no " * (1 + n % 2)}
    for n in range(20)
]
REASONS = [
    {"question": f"Add {n}", "rationale": f"It is {n}.", "answer": str(n)} for n in range(20)
]
REWARD = """
def f(prompts, completions, **_):
    return [len(text) % 3 for text in completions]
"""


def rl_options(pairs):
    return dict(
        data=pairs,
        batch_size=4,
        num_training_steps=3,
        generation_kwargs={"max_new_tokens": 6},
        validation_split=0.2,
        learning_rate=1e-2,
    )


@pytest.fixture(scope="module")
def runs(model_dir, tmp_path_factory):
    """{recipe: (stage class, options of a short run)}."""
    folder = tmp_path_factory.mktemp("runs")
    pairs = write(folder / "pairs.jsonl", PAIRS)
    reasons = write(folder / "reasons.jsonl", REASONS)
    more = write(folder / "more.jsonl", [{"question": "Add 50", "answer": "50"}])
    chats = write(
        folder / "chats.jsonl", [{"prompt": p["prompt"], "response": p["chosen"]} for p in PAIRS]
    )
    texts = [{"text": f"text number {n} of a corpus about numbers"} for n in range(200)]
    corpus = write(folder / "corpus.jsonl", texts)
    scores = folder / "scores"
    options = dict(preference_dataset_path=pairs, output_dir=str(scores), max_steps=2)
    judge = reward.RewardStage(reward.RewardConfig(model_name_or_path=model_dir, **options))
    assert judge.execute().success
    (folder / "judge.py").write_text(REWARD)
    rl = rl_options(pairs)
    return {
        "sft": (sft.SFTStage, {"data": chats, "neftune_noise_alpha": 5.0, **STEPS}),
        "dpo": (dpo.DPOStage, {"data": pairs, **STEPS, "lora_dropout": 0.0}),
        "reward": (reward.RewardStage, {"data": pairs, **STEPS}),
        "cot_distillation": (
            cot_distillation.CoTDistillationStage,
            {"data": reasons, **STEPS, "eval_reasoning_tasks": [more]},
        ),
        "grpo": (grpo.GRPOStage, {**rl, "reward": [f"{folder}/judge.py:f"]}),
        "rlaif": (
            rlaif.RLAIFStage,
            {
                **rl,
                "feedback_mode": "direct",
                "feedback_model_type": "reward_model",
                "feedback_model_path": str(scores),
            },
        ),
        "custom_tokenizer": (
            custom_tokenizer.CustomTokenizerStage,
            {"data": corpus, "vocab_size": 300, "validation_split": 0.2},
        ),
    }


def execute(stage_class, model_dir, folder, options):
    """(bytes of the weights, fingerprint) of a run."""
    aliases = stage_class.config_class.aliases
    named = {aliases.get(name, name): value for name, value in options.items()}
    named = {"model_name_or_path": model_dir, "output_dir": str(folder)} | named
    stage = stage_class(stage_class.config_class(**named))
    result = stage.execute()
    assert result.success, result.error_message
    return (folder / "model.safetensors").read_bytes(), stage.fingerprint()


@pytest.mark.parametrize(
    "recipe", ["sft", "dpo", "reward", "cot_distillation", "grpo", "rlaif", "custom_tokenizer"]
)
def test_other_values_of_what_is_left_out_give_the_same_weights(recipe, runs, model_dir, tmp_path):
    stage_class, options = runs[recipe]
    names = CHANGES_NOTHING[recipe] | OF_EVERY_STAGE
    assert names - OTHER_VALUES.keys() - {"eval_reasoning_tasks"} == names & NO_OTHER_VALUE
    others = {name: OTHER_VALUES[name] for name in names & OTHER_VALUES.keys()}
    if "eval_reasoning_tasks" in options:
        others["eval_reasoning_tasks"] = []
    plain, fingerprint = execute(stage_class, model_dir, tmp_path / "plain", options)
    varied, same = execute(stage_class, model_dir, tmp_path / "varied", options | others)
    assert varied == plain
    assert same == fingerprint
    another = {"seed": 1}
    changed, other = execute(stage_class, model_dir, tmp_path / "seed", options | another)
    assert changed != plain and "seed 42 -> 1" in describe_differences(fingerprint, other)


# -- finished stages and checkpoints under other options -------------------------------------------


@pytest.fixture
def chain(model_dir, data, tmp_path):
    """A function that runs sft and dpo in a chain, with the options given; returns the results."""
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    fit = {"max_steps": 4, "save_steps": 2, "validation_split": 0.2, "learning_rate": 1e-2}
    path = tmp_path / "chain.yaml"
    config = {
        "model_name_or_path": model_dir,
        "output_dir": str(tmp_path / "out"),
        "stages": ["sft", "dpo"],
        "stage_configs": {"sft": {"data": data, **fit}, "dpo": {"data": pairs, **fit}},
    }
    path.write_text(dump_yaml(config))

    def run(**options):
        results = Pipeline.from_yaml(path, **options).run()
        assert all(result.success for result in results)
        return results

    return run


def final_weights(tmp_path):
    return (tmp_path / "out/final/model.safetensors").read_bytes()


def finished_times(tmp_path):
    return [
        json.loads((tmp_path / "out" / stage / "stage.json").read_text())["finished"]
        for stage in ("01_sft", "02_dpo")
    ]


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_finished_chain_stays_finished_under_other_display_options(chain, tmp_path, capsys):
    chain()
    times, weights = finished_times(tmp_path), final_weights(tmp_path)
    time.sleep(1)
    capsys.readouterr()
    others = {"sft.eval_steps": 1, "sft.logging_steps": 2, "dpo.num_eval_samples": 3}
    chain(**others)
    screen = capsys.readouterr().out
    assert finished_times(tmp_path) == times and final_weights(tmp_path) == weights
    assert "step 1/" not in screen
    assert "01_sft were measured with other options: eval_steps 0 -> 1" in screen
    assert "02_dpo were measured with other options: num_eval_samples 0 -> 3" in screen
    chain(**others, **{"dpo.beta": 0.7})
    assert "running from 02_dpo on: beta 0.1 -> 0.7" in capsys.readouterr().out


@pytest.mark.parametrize("named", [False, True])
def test_a_checkpoint_goes_on_under_other_display_options(
    named, runs, model_dir, tmp_path, monkeypatch, capsys
):
    stage_class, options = runs["sft"]
    plain, _ = execute(stage_class, model_dir, tmp_path / "plain", options)
    save = core.training.save

    def save_and_fail(run, **kwargs):
        save(run, **kwargs)
        raise RuntimeError("the power is gone")

    monkeypatch.setattr(core.training, "save", save_and_fail)
    out = tmp_path / "out"
    with pytest.raises(AssertionError, match="the power is gone"):
        execute(stage_class, model_dir, out, options | {"save_steps": 2})
    monkeypatch.undo()
    others = {"eval_steps": 1, "logging_steps": 3, "save_steps": 0, "num_eval_samples": 2}
    if named:
        others["resume_from_checkpoint"] = str(out / "checkpoints/checkpoint-2")
    resumed, _ = execute(stage_class, model_dir, out, options | others)
    assert resumed == plain
    screen = capsys.readouterr().out
    assert "step 1/4" not in screen.split("the power is gone")[1]
    assert (
        "checkpoint-2 were measured with other options: eval_steps 0 -> 1; num_eval_samples 0 -> 2"
        in screen
    )


def test_other_versions_of_the_libraries_are_warned_of(chain, tmp_path, monkeypatch, capsys):
    chain()
    times = finished_times(tmp_path)
    real = core.checkpoints.version

    def other_version(name):
        return "0.0.1" if name == "peft" else real(name)

    capsys.readouterr()
    chain()
    assert "was made with" not in capsys.readouterr().out
    monkeypatch.setattr(core.checkpoints, "version", other_version)
    time.sleep(1)
    chain()
    screen = capsys.readouterr().out
    assert screen.count(f"was made with peft {real('peft')}, here 0.0.1") == 2
    assert finished_times(tmp_path) == times


def test_a_checkpoint_of_other_versions_is_warned_of(
    runs, model_dir, tmp_path, monkeypatch, capsys
):
    stage_class, options = runs["sft"]
    out = tmp_path / "out"
    execute(stage_class, model_dir, out, options | {"save_steps": 2})
    (out / "stage.json").unlink()
    monkeypatch.setattr(core.checkpoints, "version", lambda name: "0.0.1")
    capsys.readouterr()
    execute(stage_class, model_dir, out, options | {"save_steps": 2})
    screen = capsys.readouterr().out
    assert "checkpoint-4 was made with torch " in screen and ", here 0.0.1" in screen


# -- the files of a finished stage -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("model.safetensors", flip_last_byte, "model.safetensors is not the file that was saved"),
        ("tokenizer.json", flip_last_byte, "tokenizer.json is not the file that was saved"),
        ("model.safetensors", lambda content: content[:-9], "is not the file that was saved"),
        ("config.json", None, "config.json is missing"),
    ],
)
def test_a_damaged_result_is_seen_and_made_again(name, damage, words, chain, tmp_path, capsys):
    """It is not handed to the next stage, nor reported as finished."""
    chain()
    weights = final_weights(tmp_path)
    file = tmp_path / "out/01_sft" / name
    saved = file.read_bytes()
    if damage is None:
        file.unlink()
    elif len(damage(saved)) == len(saved):
        rewrite_unseen(file, damage)
    else:
        file.write_bytes(damage(saved))
    with pytest.raises(ConfigError, match=f"01_sft has to run first: .*{words}"):
        chain(from_stage="dpo")
    capsys.readouterr()
    chain()
    screen = capsys.readouterr().out
    assert "running from 01_sft on: " in screen and words in screen
    assert "resuming from" in screen and "step 1/4" not in screen
    assert file.read_bytes() == saved and final_weights(tmp_path) == weights


def test_a_damaged_result_of_a_recipe_alone_is_made_again(runs, model_dir, tmp_path, caplog):
    caplog.set_level("INFO", "recipes")
    stage_class, options = runs["reward"]
    options = {stage_class.config_class.aliases.get(name, name): options[name] for name in options}

    def run():
        config = stage_class.config_class(
            model_name_or_path=model_dir, output_dir=str(tmp_path / "out"), **options
        )
        stage = stage_class(config)
        stage.reuse_finished = True
        assert stage.execute().success
        is_reused = "is finished already" in caplog.text
        caplog.clear()
        return is_reused

    assert not run() and run()
    file = tmp_path / "out/model.safetensors"
    saved = file.read_bytes()
    rewrite_unseen(file, flip_last_byte)
    assert not run() and file.read_bytes() == saved
    assert run()


def test_weights_that_were_cleaned_up_are_no_damage(chain, tmp_path, capsys):
    chain(cleanup_intermediate=True)
    times = finished_times(tmp_path)
    time.sleep(1)
    chain(cleanup_intermediate=True)
    assert finished_times(tmp_path) == times


# -- folders of an older version -------------------------------------------------------------------


def age_fingerprint(record):
    """What versions before wrote: no form, every option but a few, hashes of the code's bytes."""
    record = record.get("fingerprint", record)
    del record["form"]
    record["options"] |= {"eval_steps": 0, "logging_steps": 1}
    record["code"] = dict.fromkeys(record["code"], "0" * 64)


def test_a_folder_of_an_older_version_runs_again_and_says_why(chain, tmp_path, capsys):
    chain()
    weights = final_weights(tmp_path)
    for stage in ("01_sft", "02_dpo"):
        folder = tmp_path / "out" / stage
        edit_json(folder / "stage.json", age_fingerprint)
        edit_json(folder / "stage.json", lambda record: record.pop("files"))
        edit_json(folder / "stage.json", lambda record: record.pop("evaluation"))
        edit_json(folder / "fingerprint.json", age_fingerprint)
    capsys.readouterr()
    chain()
    screen = capsys.readouterr().out
    assert "running from 01_sft on: an older version recorded its files and code" in screen
    assert "the finished result in" in screen
    assert (tmp_path / "out/01_sft/previous.1/stage.json").exists()
    assert final_weights(tmp_path) == weights
    capsys.readouterr()
    chain()
    assert "running from" not in capsys.readouterr().out


def test_options_of_an_older_version_are_compared_by_their_values():
    older = {"options": fingerprinted_options(sft.SFTConfig()) | {"eval_steps": 3}}
    now = {"options": fingerprinted_options(sft.SFTConfig(lora_r=4)), "form": 2}
    words = "an older version recorded its files and code in another format; lora_r 16 -> 4"
    assert describe_differences(older, now) == words


def test_a_named_checkpoint_of_an_older_version_is_taken(tmp_path):
    options = fingerprinted_options(sft.SFTConfig()) | {"eval_steps": 3, "logging_steps": 1}
    (tmp_path / "options.json").write_text(json.dumps(options))
    assert core.checkpoints.check_named_checkpoint(tmp_path, sft.SFTConfig()) == tmp_path
    assert core.checkpoints.check_named_checkpoint(tmp_path, sft.SFTConfig(**COMPARE)) == tmp_path
    with pytest.raises(ConfigError, match="belongs to another recipe"):
        core.checkpoints.check_named_checkpoint(tmp_path, dpo.DPOConfig())


# -- code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        b"def f(x):\n    return x+1  # one more\n",
        b"def f(x):\n    '''Add one.'''\n    return x + 1\n",
        b"'''A page.'''\n\n\ndef f(\n    x,\n):\n    return (x + 1)\n",
        b"# -*- coding: utf-8 -*-\r\ndef f(x):\r\n    return x + 1\r\n",
    ],
)
def test_comments_and_formatting_are_not_what_code_says(source):
    assert source_digest(source) == source_digest(b"def f(x):\n    return x + 1\n")


@pytest.mark.parametrize(
    "one, other",
    [
        ("x + 1", "x + 2"),
        ("x + 1", "x - 1"),
        ("f(a, b)", "f(b, a)"),
        ("'a'", "b'a'"),
        ("True", "1"),
        ("1", "1.0"),
        ("None", "..."),
        ("x = 'text'", "'text'"),
        ("def f(x=None): pass", "def f(x): pass"),
        ("def f(x, /): pass", "def f(x): pass"),
        ("def f(*, x): pass", "def f(x): pass"),
        ("f'{x!r}'", "f'{x!s}'"),
        ("a[1:]", "a[:1]"),
        ("if a: b\nelse: c", "if a: b"),
        ("f(**x)", "f(x)"),
        ("lambda: 1", "lambda: 2"),
        ("def broken(:", "def  broken(:"),  # nobody knows what it says
    ],
)
def test_what_code_says_counts(one, other):
    assert source_digest(one.encode()) != source_digest(other.encode())


def test_docstrings_count_where_a_file_reads_them():
    code = "def prompt(): '''{}'''\nTEXT = prompt.__doc__\n"
    assert source_digest(code.format("a").encode()) != source_digest(code.format("b").encode())
    page = "'''{}'''\nmain(Stage, __doc__)\n"
    assert source_digest(page.format("a").encode()) == source_digest(page.format("b").encode())


JUDGE = """
import words
import package.inner
import json

def f(prompts, completions, **_):
    import late
    return [words.SCORE + package.inner.SCORE + late.SCORE] * len(completions)
"""
MODULES = [
    "judge.py",
    "words.py",
    "late.py",
    "package/__init__.py",
    "package/inner.py",
    "package/deep.py",
    "package/first.py",
    "package/sub/__init__.py",
]


def test_every_module_of_a_reward_file_counts(tmp_path):
    judge = tmp_path / "judge.py"
    (tmp_path / "package/sub").mkdir(parents=True)
    for name in MODULES:
        (tmp_path / name).write_text("SCORE = 1\n")
    judge.write_text(JUDGE)
    (tmp_path / "package/__init__.py").write_text("from .first import SCORE\n")
    (tmp_path / "package/inner.py").write_text("from . import deep\nfrom .sub import SCORE\n")
    (tmp_path / "not_imported.py").write_text("SCORE = 1\n")

    def identity():
        return identify_named_files({"reward": [f"{judge}:f"]})

    before = identity()
    assert set(before[f"{judge}:f"]) == set(MODULES)
    for name in (*MODULES, "not_imported.py"):
        file = tmp_path / name
        source = file.read_text()
        file.write_text(f"# a comment\n\n{source}")
        assert identity() == before
        file.write_text(f"{source}SCORE = 2\n")
        assert (identity() == before) == (name == "not_imported.py")
        file.write_text(source)
    assert identity() == before


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_module_of_a_package_beside_a_page_counts(is_loaded, tmp_path, monkeypatch):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/__init__.py").write_text("")
    (tmp_path / "parts/one.py").write_text("VALUE = 1\n")
    page = "def late():\n    import parts.one\n"
    (tmp_path / "mine.py").write_text(page + OWN_STAGE)
    stage_class = load_recipe(tmp_path / "mine.py", BaseStage)
    if is_loaded:
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("parts", "parts.one"):
            monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
    code = stage_class(StageConfig(output_dir=str(tmp_path))).fingerprint()["code"]
    assert {"mine.py", "parts/__init__.py", "parts/one.py"} <= set(code)


# -- files and models ------------------------------------------------------------------------------


@pytest.fixture
def model_copy(model_dir, tmp_path):
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_model_of_equal_sizes_and_times_is_another(name, model_copy):
    before = file_identity(model_copy)
    rewrite_unseen(model_copy / name, flip_last_byte)
    assert file_identity(model_copy) != before
    rewrite_unseen(model_copy / name, flip_last_byte)
    assert file_identity(model_copy) == before


def test_a_copy_of_a_model_is_the_same_model(model_dir, model_copy):
    os.utime(model_copy / "model.safetensors", (0, 0))
    assert file_identity(model_copy) == file_identity(Path(model_dir))


@pytest.mark.parametrize("name", ["merges.txt", "added_tokens.json", "special_tokens_map.json"])
def test_every_file_of_a_tokenizer_counts(name, model_copy):
    (model_copy / name).write_text("a")
    before = file_identity(model_copy)
    (model_copy / name).write_text("b")
    assert file_identity(model_copy) != before


def test_the_base_of_an_adapter_counts(model_copy, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"base_model_name_or_path": str(model_copy)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    before = file_identity(adapter)
    rewrite_unseen(model_copy / "model.safetensors", flip_last_byte)
    assert file_identity(adapter) != before
    gguf = tmp_path / "base.gguf"
    gguf.write_bytes(b"1")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(gguf)}))
    before = file_identity(adapter)
    gguf.write_bytes(b"2")
    assert file_identity(adapter) != before
    # On the hub, of itself, or broken: no error here.
    for text in ('{"base_model_name_or_path": "org/name"}', "{}", "[]", "{", "null"):
        (adapter / "adapter_config.json").write_text(text)
        assert file_identity(adapter)
    settings = {"base_model_name_or_path": str(adapter)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert file_identity(adapter)


def test_a_model_at_a_long_path_counts(model_dir, tmp_path):
    folder = tmp_path / ("a" * 100) / ("b" * 100) / ("c" * 100)
    shutil.copytree(model_dir, folder)
    assert len(str(folder)) > 300
    options = {"model_name_or_path": str(folder)}
    before = identify_named_files(options)
    assert set(before) == {str(folder)}
    rewrite_unseen(folder / "model.safetensors", flip_last_byte)
    assert identify_named_files(options) != before


def test_a_text_that_is_no_path_is_none():
    texts = ["~nobody at all", "zero\0byte", "x" * 5000, "", "{rationale}\n#### {answer}"]
    assert identify_named_files({"texts": texts}) == {}


# -- digests that are remembered -------------------------------------------------------------------


@pytest.fixture
def large_file(tmp_path, monkeypatch):
    """A file that is taken for large; it was written long ago by the clock of this test."""
    monkeypatch.setattr(core.digests, "SMALL_BYTES", 10)
    monkeypatch.setattr(core.digests, "SETTLED_SECONDS", -1.0)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    file = tmp_path / "large"
    file.write_bytes(b"a" * 100)
    return file


def test_the_digest_of_a_large_file_is_remembered(large_file, monkeypatch):
    first = content_digest(large_file)
    core.digests._known_digests.clear()  # as in another process
    monkeypatch.setattr(core.digests, "file_digest", None)
    assert content_digest(large_file) == first


def test_a_file_that_is_written_to_is_read_again(large_file):
    first = content_digest(large_file)
    time.sleep(0.02)  # the clock of the file system
    rewrite_unseen(large_file, flip_last_byte)
    core.digests._known_digests.clear()
    second = content_digest(large_file)
    assert second != first
    time.sleep(0.02)
    rewrite_unseen(large_file, flip_last_byte)
    assert content_digest(large_file) == first
    other = large_file.with_name("other")
    other.write_bytes(b"b" * 100)
    os.utime(other, ns=(large_file.stat().st_atime_ns, large_file.stat().st_mtime_ns))
    other.replace(large_file)
    assert content_digest(large_file) not in (first, second)


def test_a_file_that_was_just_written_is_not_remembered(large_file, monkeypatch):
    """Two writes within a tick of the file system's clock cannot be told apart by time."""
    monkeypatch.setattr(core.digests, "SETTLED_SECONDS", 2.0)
    first = content_digest(large_file)
    version = core.digests.version_of(large_file)
    large_file.write_bytes(b"b" * 100)
    monkeypatch.setattr(core.digests, "version_of", lambda path: version)
    assert content_digest(large_file) != first


def test_a_damaged_note_in_the_cache_is_not_believed(large_file):
    first = content_digest(large_file)
    core.digests._known_digests.clear()
    (note,) = (large_file.parent / "cache/recipes/digests").iterdir()
    note.write_text("nonsense")
    assert content_digest(large_file) == first


def test_without_a_cache_a_file_is_read(large_file, tmp_path, monkeypatch):
    (tmp_path / "no_folder").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no_folder"))
    assert content_digest(large_file) == core.files.file_digest(large_file)
