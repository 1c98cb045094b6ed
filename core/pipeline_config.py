"""The top level of a pipeline's YAML file, its older forms, and commands to run after the chain."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from core.config import Folder, Level, Names, Natural, Precision, Trackers
from core.errors import ConfigError
from core.options import coerce_fields, merge_sources

StageOptions = dict[str, dict[str, Any] | None]

# Options of the pipeline that every stage receives, if its config has them.
SHARED_OPTIONS = (
    "model_name_or_path",
    "revision",
    "torch_dtype",
    "trust_remote_code",
    "use_auth_token",
    "seed",
    "log_level",
    "force",
    "report_to",
    "use_wandb",
    "wandb_project",
)
FLAT_STAGE = "sft"  # the stage of a file without stages, as in older files


@dataclass
class PipelineConfig:
    """The top level of a pipeline's YAML file."""

    aliases: ClassVar[dict[str, str]] = {"model": "model_name_or_path"}
    everyday: ClassVar[tuple[str, ...]] = (
        "model_name_or_path",
        "output_dir",
        "stages",
        "dry_run",
        "from_stage",
        "until",
        "force_restart",
        "cleanup_intermediate",
    )

    # options passed to every stage
    model_name_or_path: str = ""  # model of the first stage: hub name, folder or .gguf file
    revision: str | None = None  # branch, tag or commit of a hub name
    torch_dtype: Precision = "auto"  # precision of every stage
    trust_remote_code: bool = False  # run Python code that comes with the model
    use_auth_token: bool = False  # gated models: use the login of `hf auth login` or HF_TOKEN
    seed: Natural = 42  # random seed of every stage
    log_level: Level = "info"  # minimum level of log lines on the screen
    report_to: Trackers = field(default_factory=list)  # experiment trackers of every stage
    use_wandb: bool = False  # same as report_to=wandb
    wandb_project: str | None = None  # Weights & Biases project
    # stages
    output_dir: Folder = "outputs"  # folder of the run: a subfolder per stage, final/, report.html
    stages: Names = field(default_factory=list)  # stages in order; a stage may appear twice
    stage_configs: StageOptions = field(default_factory=dict)  # options, by stage name or folder
    save_final_model: bool = True  # save the last model in OUTPUT_DIR/final
    cleanup_intermediate: bool = False  # delete the stages' models once the whole chain succeeded
    # which stages run
    dry_run: bool = False  # check every stage's config and data, print the plan, write nothing
    from_stage: str | None = None  # rerun from this stage on; the stages before must be finished
    until: str | None = None  # stop after this stage
    force_restart: bool = False  # rerun all stages, finished or not
    force: bool = False  # overwrite finished results of other options; false moves them away
    auto_resume: bool = True  # false is the same as force_restart
    enable_state_persistence: bool = True  # false is the same as force_restart; records are written
    # commands to run after the chain, only printed
    hub_token: str | None = None  # refused: log in with `hf auth login` or set HF_TOKEN
    push_to_hub: bool = False  # print the command to upload the model
    push_adapter_only: bool = False  # print the command to upload the last adapter
    hub_repo_id: str | None = None  # repository for push_to_hub
    hub_private: bool = True  # make that repository private
    hub_commit_message: str | None = None  # commit message of the push
    convert_to_gguf: bool = False  # print the command to convert the model to a .gguf file
    gguf_quantization: str | None = None  # quantization for convert_to_gguf
    gguf_output_path: str | None = None  # file for convert_to_gguf

    def __post_init__(self):
        coerce_fields(self)


def nest_flat_form(
    values: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert (values, overrides) of a file without stages, with the options of one training at the
    top level, to the form with stages. Those of other files are returned unchanged."""
    if "stages" in values or "stage_configs" in values or "stages" in overrides:
        return dict(values), dict(overrides)
    top, own = split_options(values)
    top_overrides, own_overrides = split_options(overrides)
    prefixed = {f"{FLAT_STAGE}.{name}": value for name, value in own_overrides.items()}
    nested = {**top, "stages": [FLAT_STAGE], "stage_configs": {FLAT_STAGE: own}}
    return nested, top_overrides | prefixed


def split_by_stage(
    overrides: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split options written as name or stage.name: (top-level options, {stage: its options})."""
    top_level: dict[str, Any] = {}
    per_stage: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        stage, dot, option = key.partition(".")
        if dot:
            per_stage.setdefault(stage, {})[option] = value
        else:
            top_level[key] = value
    return top_level, per_stage


def split_options(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(top-level options by field name, other options); names like stage.option are unchanged."""
    merged, *_ = merge_sources(PipelineConfig, [values])
    names = {option.name for option in fields(PipelineConfig)}
    top = {name: value for name, value in merged.items() if name in names or "." in str(name)}
    own = {name: value for name, value in merged.items() if name not in top}
    return top, own


# What llama.cpp's convert_hf_to_gguf.py writes.
GGUF_OUTPUT_TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")


def commands_after(config: PipelineConfig) -> list[str]:
    """Commands of other programs that publish or convert the final model, as the options request.
    Raises ConfigError for a secret among the options."""
    final = f"{config.output_dir}/final"
    if config.hub_token:
        raise ConfigError(
            "hub_token is refused, because others may read a secret in a file; log in with "
            "`hf auth login` or set the variable HF_TOKEN, and write use_auth_token: true"
        )
    commands = []
    if config.push_to_hub or config.push_adapter_only:
        folder = f"{config.output_dir}/NN_STAGE/adapter" if config.push_adapter_only else final
        private = "--private " if config.hub_private else ""
        message = shlex.quote(config.hub_commit_message or "model")
        repository = config.hub_repo_id or "NAME/MODEL"
        commands.append(f"hf upload {repository} {folder} {private}--commit-message={message}")
    if config.convert_to_gguf:
        file = config.gguf_output_path or "model.gguf"
        kind = (config.gguf_quantization or "q8_0").lower()
        convert = f"python llama.cpp/convert_hf_to_gguf.py {final} --outfile"
        if kind in GGUF_OUTPUT_TYPES:
            commands.append(f"{convert} {file} --outtype {kind}")
        else:  # the others are made from a converted file
            commands.append(f"{convert} {file}.f16 --outtype f16")
            commands.append(f"llama-quantize {file}.f16 {file} {kind.upper()}")
    return commands
