"""Names of options in other tools: in transformers, in TRL, and in older configuration files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

# Name elsewhere -> option here. A name that the config itself has takes precedence.
OTHER_NAMES = {
    "model_name": "model_name_or_path",
    "pretrained_model_name_or_path": "model_name_or_path",
    "dataset": "data",
    "dataset_name": "data",
    "dataset_name_or_path": "data",
    "data_path": "data",
    "max_length": "max_seq_length",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "lora_rank": "lora_r",
    "load_in_4bit": "use_4bit",
    "load_in_8bit": "use_8bit",
    "lr_scheduler": "lr_scheduler_type",
    "clip_grad_norm": "max_grad_norm",
    "run_name": "wandb_run_name",
    "hub_model_id": "hub_repo_id",
    "hub_private_repo": "hub_private",
}

# Stage in older files -> recipe.
OTHER_STAGES = {"trl_sft": "sft"}

# Switch elsewhere -> (option, value) that it means here if it is on.
SWITCHES = {
    "bf16": ("torch_dtype", "bfloat16"),
    "fp16": ("torch_dtype", "float16"),
    "upload_to_hub": ("push_to_hub", True),
}
ON = ("true", "1", "yes", "on")
NOTHING = ("none", "null", "false", "")
OFF = (*NOTHING, "0", "no", "off")

# Sampling options, which configs have as one option: {name elsewhere: key in SAMPLING}.
SAMPLING = "generation_kwargs"
SAMPLING_NAMES = {
    "max_new_tokens": "max_new_tokens",
    "max_completion_length": "max_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}

# The column of plain text elsewhere: {text: column} in `columns` here. Its default "text" is in
# files with any data format.
TEXT_COLUMN = "dataset_text_field"


@dataclass(frozen=True)
class NotHere:
    """An option of other tools that no config here has."""

    why: str  # what happens instead, or how to achieve it
    harmless: Sequence[str] | None = OFF  # values that change nothing; None: all


ALWAYS = "only the answers are learnt"
INTERVALS = "intervals are numbers of steps: eval_steps, save_steps, logging_steps; 0 is never"
NOT_HERE = {
    "completion_only_loss": NotHere(ALWAYS, None),
    "assistant_only_loss": NotHere(ALWAYS, None),
    "use_liger_kernel": NotHere("the recipes save that memory themselves", None),
    "packing_strategy": NotHere("packing is best-fit decreasing, bfd", (*OFF, "bfd")),
    "push_to_hub": NotHere("run, after the training: hf upload NAME/MODEL FOLDER"),
    "push_adapter_only": NotHere("run, after the training: hf upload NAME/MODEL FOLDER/adapter"),
    "hub_repo_id": NotHere("it is for push_to_hub", None),
    "hub_private": NotHere("it is for push_to_hub", None),
    "hub_commit_message": NotHere("it is for push_to_hub", None),
    "convert_to_gguf": NotHere("run llama.cpp's convert_hf_to_gguf.py on the model"),
    "gguf_quantization": NotHere("it is for convert_to_gguf", None),
    "gguf_output_path": NotHere("it is for convert_to_gguf", None),
    "eval_strategy": NotHere(INTERVALS, (*OFF, "steps")),
    "evaluation_strategy": NotHere(INTERVALS, (*OFF, "steps")),
    "save_strategy": NotHere(INTERVALS, (*OFF, "steps")),
    "logging_strategy": NotHere(INTERVALS, (*OFF, "steps")),
    "load_best_model": NotHere("write load_best_model_at_end"),
    "do_train": NotHere("a recipe always trains", ON),
    "do_eval": NotHere("held-out rows are evaluated: validation_split", None),
    "remove_unused_columns": NotHere("the log says which columns are used", None),
    "dataloader_num_workers": NotHere("all rows are in memory", None),
    "dataloader_pin_memory": NotHere("all rows are in memory", None),
    "group_by_length": NotHere("batches always have rows of similar length", None),
    "overwrite_output_dir": NotHere("resume_from_checkpoint=false trains again", None),
    "ddp_find_unused_parameters": NotHere("it is determined automatically", None),
    "logging_dir": NotHere("trackers write into output_dir", None),
    "disable_tqdm": NotHere("log_level decides what the screen shows", None),
}


def translate(
    config_class: Any, values: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """(values by field name of the config, problems, notes on options without effect).

    Unknown names are kept unchanged.
    """
    own_names = {option.name for option in fields(config_class)}
    replaced: dict[str, Any] = {}
    problems: list[str] = []
    notes: list[str] = []
    for key, value in values.items():
        name = config_class.aliases.get(key, key)
        if name not in own_names and key in OTHER_NAMES:
            name = OTHER_NAMES[key]
            name = config_class.aliases.get(name, name)
        if name not in own_names and key in SWITCHES and SWITCHES[key][0] in own_names:
            name, meant = SWITCHES[key]
            if written(value) in OFF:
                continue
            value = meant if written(value) in ON else f"{key}={value}"
        if name == TEXT_COLUMN and "columns" in own_names:
            if written(value) in (*OFF, "text"):
                continue
            name, value = "columns", {"text": value}
        if name not in own_names and name in NOT_HERE:
            judge_foreign(name, value, NOT_HERE[name], problems, notes)
            continue
        if name not in own_names:
            name = key
        if name in replaced:
            # A null or false value does not conflict with the other one.
            if written(value) in NOTHING:
                continue
            if written(replaced[name]) not in (*NOTHING, written(value)):
                problems.append(f"{name} is given twice, once under another name ({key}); keep one")
        replaced[name] = value
    return replaced, problems, notes


def judge_foreign(
    name: str, value: Any, option: NotHere, problems: list[str], notes: list[str]
) -> None:
    """Add a note on an option that no config has, or a problem if its value is not harmless."""
    if option.harmless is None or written(value) in option.harmless:
        notes.append(f"{name} has no effect: {option.why}")
    else:
        problems.append(f"{name}={value!r} is not supported: {option.why}")


def written(value: Any) -> str:
    return str(value).strip().lower()
