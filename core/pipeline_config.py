"""The top level of a pipeline's YAML file, and what is refused there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from core.config import Folder, Names, Precision, coerce_fields
from core.errors import ConfigError

StageOptions = dict[str, dict[str, Any] | None]

# Options of the pipeline that every stage receives, if its config has them.
SHARED_OPTIONS = (
    "model_name_or_path",
    "revision",
    "torch_dtype",
    "trust_remote_code",
    "use_auth_token",
    "log_level",
)


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

    # options handed to every stage
    model_name_or_path: str = ""  # model of the first stage: hub name, folder or .gguf file
    revision: str | None = None  # branch, tag or commit of a hub name
    torch_dtype: Precision = "auto"  # precision of every stage
    trust_remote_code: bool = False  # run Python code that comes with the model
    use_auth_token: bool = False  # gated models: use the login of `hf auth login` or HF_TOKEN
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # level of the console output
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
    auto_resume: bool = True  # false is the same as force_restart
    enable_state_persistence: bool = True  # false is the same as force_restart; records are written
    # accepted from older files, not implemented
    hub_token: str | None = None  # refused: log in by `hf auth login` or set HF_TOKEN
    push_adapter_only: bool = False  # not implemented; refused
    convert_to_gguf: bool = False  # not implemented; refused
    gguf_quantization: str | None = None  # quantization for convert_to_gguf
    gguf_output_path: str | None = None  # file for convert_to_gguf
    push_to_hub: bool = False  # not implemented; refused
    hub_repo_id: str | None = None  # repository for push_to_hub
    hub_private: bool = True  # make that repository private
    hub_commit_message: str | None = None  # commit message of the push

    def __post_init__(self):
        coerce_fields(self)


def refuse_unimplemented(config: PipelineConfig) -> None:
    """Raise ConfigError for options of older files that are not implemented, naming the command
    that does the same."""
    final = f"{config.output_dir}/final"
    if config.hub_token:
        raise ConfigError(
            "hub_token is refused, because others may read a secret in a file; log in by "
            "`hf auth login` or set the variable HF_TOKEN, and write use_auth_token: true"
        )
    if config.push_to_hub or config.push_adapter_only:
        option = "push_to_hub" if config.push_to_hub else "push_adapter_only"
        folder = f"{config.output_dir}/NN_STAGE/adapter" if config.push_adapter_only else final
        message = config.hub_commit_message or "model"
        private = "--private " if config.hub_private else ""
        raise ConfigError(
            f"{option} is not implemented; set it to false and run, after the chain: hf upload "
            f"{config.hub_repo_id or 'NAME/MODEL'} {folder} {private}--commit-message={message!r}"
        )
    if config.convert_to_gguf:
        raise ConfigError(
            "convert_to_gguf is not implemented; set it to false and run, after the chain, "
            f"llama.cpp's convert_hf_to_gguf.py {final} "
            f"--outfile {config.gguf_output_path or 'model.gguf'} "
            f"--outtype {config.gguf_quantization or 'q8_0'}"
        )
