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
    "micro_batch_size": "per_device_train_batch_size",
    "sequence_len": "max_seq_length",
    "cutoff_len": "max_seq_length",
    "sample_packing": "packing",
    "random_state": "seed",
    "ref_model_name_or_path": "reference_model_path",
    "lora_rank": "lora_r",
    "load_in_4bit": "use_4bit",
    "load_in_8bit": "use_8bit",
    "lr_scheduler": "lr_scheduler_type",
    "clip_grad_norm": "max_grad_norm",
    "run_name": "wandb_run_name",
    "hub_model_id": "hub_repo_id",
    "hub_private_repo": "hub_private",
    # reinforcement learning
    "max_steps": "num_training_steps",
    "eval_steps": "eval_freq",
    "save_steps": "save_freq",
    "reward_funcs": "reward",
    "kl_coef": "init_kl_coef",
    "lam": "gae_lambda",
    "vf_coef": "value_loss_coef",
    "group_size": "num_generations",
}

# Options elsewhere that mean something similar, in another unit or form: the option here.
SIMILAR_NAMES = {
    "beta": "init_kl_coef",
    "epsilon": "clip_range",
    "clip_ratio": "clip_range",
    "per_device_train_batch_size": "batch_size",
    "num_iterations": "ppo_epochs",
    "total_episodes": "num_training_steps",
    "num_mini_batches": "mini_batch_size",
    "ref_model": "reference_model_path",
    "rpo_alpha": "loss_weights",
    "orpo_alpha": "beta",
    "max_completion_length": "max_seq_length",
    "val_set_size": "validation_split",
    "val_size": "validation_split",
    "flash_attention": "attn_implementation",
    "adapter": "lora_r",
    "use_peft": "lora_r",
    "lora_target_linear": "lora_target_modules",
    "use_gradient_checkpointing": "gradient_checkpointing",
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
    "response_length": "max_new_tokens",
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
    "packing_strategy": NotHere("packing is best-fit decreasing, bfd", (*OFF, "bfd", "ffd")),
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
    "dataset_num_proc": NotHere("rows are encoded by one process", None),
    "log_completions": NotHere("samples.jsonl has completions of every evaluation", None),
    "use_vllm": NotHere("the recipe samples with its own code"),
    "torch_compile": NotHere("models are not compiled"),
    "deepspeed": NotHere("run the recipe with accelerate launch, see docs/hardware.md"),
    "fsdp": NotHere("run the recipe with accelerate launch, see docs/hardware.md"),
    "use_cpu": NotHere("set CUDA_VISIBLE_DEVICES to an empty string in the environment"),
    "eval_packing": NotHere("packing is for training rows"),
    "train_on_inputs": NotHere(ALWAYS),
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
    given_as: dict[str, str] = {}
    problems: list[str] = []
    notes: list[str] = []
    for key, value in without_saving(own_names, values).items():
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
            if written(value) in (*OFF, "text", "messages", "conversations"):
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
                problems.append(
                    f"{name} is given twice, as {given_as[name]} and as {key}; keep one"
                )
        replaced[name], given_as[name] = value, key
    return replaced, problems, notes


def without_saving(own_names: set[str], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values, with save_strategy=no as an interval of 0, whatever interval is given."""
    if written(values.get("save_strategy")) != "no":
        return values
    intervals = ("save_steps", "save_freq")
    others = {key: values[key] for key in values if key not in ("save_strategy", *intervals)}
    return others | {option: 0 for option in intervals if option in own_names}


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
