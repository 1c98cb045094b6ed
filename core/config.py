"""Configuration: option types and the checked dataclasses that every recipe's options build on."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Mapping, Sequence, get_type_hints

import torch
from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

import yaml
from core.errors import ConfigError, unknown_name
from core.files import find_damage
from core.runtime import compute_dtype, default_device, warn_once

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]
comma_separated = BeforeValidator(
    lambda v: re.findall(r"[^,\s]+", v) if isinstance(v, str) else v or []
)
Names = Annotated[list[str], comma_separated]
Folder = Annotated[str, MinLen(1), AfterValidator(os.path.expanduser)]
Trackers = Annotated[list[Literal["tensorboard", "wandb", "trackio"]], comma_separated]
as_yaml = BeforeValidator(lambda v: yaml.safe_load(v) if isinstance(v, str) else v)
Switch = Annotated[bool | str, as_yaml]
Options = Annotated[dict[str, Any], as_yaml]
Sentences = Annotated[list[str], as_yaml]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"
]
Scheduler = Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup"]


def coerce_fields(config) -> None:
    """Coerce every field of a dataclass to its annotation ("2e-4" to 0.0002); raises ConfigError naming the field."""
    hints = get_type_hints(type(config), include_extras=True)
    for name in (f.name for f in fields(config)):
        value, rules = (
            getattr(config, name),
            ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False),
        )
        try:
            setattr(config, name, TypeAdapter(hints[name], config=rules).validate_python(value))
        except ValidationError as error:
            shown = (
                "" if re.search("token|secret|password|key", name) else f"={value!r}"
            )  # may be a secret by mistake
            raise ConfigError(f"{name}{shown}: {error.errors()[0]['msg'].lower()}") from None


def replace_aliases(config_class, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with aliases replaced by field names; raises ConfigError if an option is given by both."""
    replaced: dict[str, Any] = {}
    for key, value in values.items():
        name = config_class.aliases.get(key, key)
        if name in replaced:
            raise ConfigError(f"{name} is given twice, once by its short name; keep one")
        replaced[name] = value
    return replaced


def resolve_names(config_class, values: Mapping[str, Any]) -> dict[str, Any]:
    """`replace_aliases`; raises ConfigError with the nearest name for an unknown option."""
    names = {f.name for f in fields(config_class)}
    for key in values:
        if config_class.aliases.get(key, key) not in names:
            raise ConfigError(unknown_name("option", key, names | set(config_class.aliases)))
    return replace_aliases(config_class, values)


@dataclass
class StageConfig:
    """Options that every stage has. A stage of your own extends it: `@dataclass class MyConfig(StageConfig): ...`."""

    aliases: ClassVar[dict[str, str]] = {}  # short names, for the command line
    quantized: ClassVar[Any] = False  # whether the model's weights are: see ModelConfig

    stage_name: str = ""  # name in logs and results; empty: the name of the recipe
    output_dir: Folder = (
        "outputs"  # folder of the stage: model, tokenizer, training.log, metrics.jsonl, stage.json
    )
    enabled: bool = True  # false: a chain skips the stage, and says so
    save_intermediate: bool = True  # false: write no weights, hand the model on in memory only
    seed: Natural = 42  # of initialisation, shuffling, splits and dropout
    log_level: Literal["debug", "info", "warning", "error"] = (
        "info"  # of the lines on the screen; the log has all
    )
    report_to: Trackers = field(default_factory=list)  # tensorboard, wandb, trackio
    use_wandb: bool = False  # the same as report_to=wandb
    wandb_project: str | None = None  # project in Weights & Biases
    wandb_run_name: str | None = None  # name of the run in the trackers

    def __post_init__(self):
        coerce_fields(self)

    def refuse_unread(self, unread: bool, names: str, why: str, **like) -> None:
        """Raise ConfigError if one of `names` is `unread` and not as by default, beside the options `like`."""
        standard = type(self)(**like) if unread else self
        for name in names.split():
            if getattr(self, name) != getattr(standard, name):
                raise ConfigError(f"{name} has no effect {why}")

    def validate(self) -> None:
        """Check what no single field shows; raises ConfigError. Opens nothing."""
        coerce_fields(self)  # a notebook may have assigned fields since
        self.report_to = sorted({*self.report_to} | ({"wandb"} if self.use_wandb else set()))
        if self.wandb_project and "wandb" not in self.report_to:
            raise ConfigError("wandb_project has no effect without use_wandb=true")
        self.refuse_unread(not self.report_to, "wandb_run_name", "without report_to")
        for tracker in self.report_to:
            if not importlib.util.find_spec(tracker):
                raise ConfigError(f"report_to={tracker}: not installed; run: pip install {tracker}")


@dataclass
class ModelConfig(StageConfig):
    """Options of every stage that loads a model: where it is, its precision, its quantization by bitsandbytes."""

    aliases: ClassVar[dict[str, str]] = {"model": "model_name_or_path", "dtype": "torch_dtype"}

    model_name_or_path: str = (
        ""  # hub name, folder, adapter folder, or .gguf file (also package/file.gguf)
    )
    revision: str | None = None  # branch, tag or commit of a hub name
    torch_dtype: Precision = (
        "auto"  # auto: bfloat16 on GPUs that have it, else float16; float32 on CPU and MPS
    )
    trust_remote_code: bool = False  # true runs Python code that comes with the model
    use_auth_token: bool = (
        False  # true: gated models, with your login (`hf auth login`, or the variable HF_TOKEN)
    )
    attn_implementation: str | None = (
        None  # sdpa, eager, flash_attention_2, ...; none: the model's own choice
    )
    instruction_template: str | None = (
        None  # such as "Q: {instruction}\nA: {response}"; none: the chat template
    )
    # quantization
    use_4bit: bool = False  # QLoRA (Dettmers et al. 2023)
    use_8bit: bool = False  # LLM.int8 (Dettmers et al. 2022)
    bnb_4bit_compute_dtype: Precision = (
        "auto"  # precision of the multiplications; auto: as torch_dtype
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"  # data type of the 4-bit weights
    bnb_4bit_use_double_quant: bool = True  # quantize the quantization constants too

    def validate(self) -> None:
        super().validate()
        if not self.model_name_or_path:
            raise ConfigError(
                "model_name_or_path is missing: --model=<hub name, folder or .gguf file>"
            )
        if self.use_4bit and self.use_8bit:
            raise ConfigError("use_4bit and use_8bit exclude each other; keep one")
        names = "bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant"
        self.refuse_unread(not self.use_4bit, names, "without use_4bit=true")

    quantized = property(lambda self: self.use_4bit or self.use_8bit)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Precision in which the weights are stored."""
        return compute_dtype(self.torch_dtype)


@dataclass
class TrainingConfig(ModelConfig):
    """Options of every stage that trains: LoRA, optimizer and schedule."""

    default_rates: ClassVar[tuple[float, float]] = (
        5e-4,
        5e-5,
    )  # learning_rate for an adapter, for all weights

    # adapter by PEFT
    lora_r: Natural = 16  # rank; 0 trains all weights
    lora_alpha: Count = 32  # the adapter's output is scaled by lora_alpha / lora_r
    lora_dropout: Share = 0.0  # dropout before the adapter
    lora_target_modules: Names = field(
        default_factory=lambda: ["all-linear"]
    )  # or names, such as q_proj,v_proj
    lora_bias: Literal["none", "all", "lora_only"] = "none"  # which biases train
    use_dora: bool = False  # weight-decomposed LoRA (Liu et al. 2024)
    use_rslora: bool = False  # scale by lora_alpha / sqrt(lora_r) (Kalajdzievski 2023)
    # optimizer and schedule
    gradient_accumulation_steps: Count = 1  # micro-batches an optimizer step
    learning_rate: Positive | None = (
        None  # its peak; none: 5e-4 for an adapter, 5e-5 for all weights
    )
    weight_decay: NonNegative = 0.0  # of AdamW
    warmup_ratio: Share = 0.03  # share of the steps over which the learning rate rises
    lr_scheduler_type: Scheduler = "cosine"  # its course after that
    optim: Optimizer = "adamw_torch"  # the 8-bit and paged ones are those of bitsandbytes
    max_grad_norm: NonNegative = 1.0  # longer gradients are clipped to this norm; 0: none are
    gradient_checkpointing: Annotated[Natural, as_yaml] = (
        0  # recompute activations of every n-th layer; true: of all
    )
    # checkpoints
    save_total_limit: Count = 2  # so many checkpoints are kept
    resume_from_checkpoint: Switch = (
        True  # the newest whole checkpoint of the same run; false: none; or one's folder
    )

    def __post_init__(self):
        super().__post_init__()
        if self.learning_rate is None:
            self.learning_rate = self.default_rates[not self.lora_r]

    def validate(self) -> None:
        super().validate()
        if (self.use_4bit or self.use_8bit) and not self.lora_r:
            raise ConfigError(
                "lora_r=0 trains all weights, and quantized ones cannot train; set lora_r=16"
            )
        names = "lora_alpha lora_dropout lora_target_modules lora_bias use_dora use_rslora"
        self.refuse_unread(not self.lora_r, names, "with lora_r=0")
        if (
            not self.lora_r and self.learning_rate == self.default_rates[0]
        ):  # as `replace(config, lora_r=0)` leaves it
            warn_once(
                "learning_rate=%g is the default for an adapter; for all weights it is %g"
                % self.default_rates
            )
        flat = self.lr_scheduler_type == "constant" and self.warmup_ratio > 0
        self.refuse_unread(
            flat, "warmup_ratio", "with lr_scheduler_type=constant; constant_with_warmup has it"
        )
        if self.use_dora and self.use_8bit and default_device().type == "cpu":
            raise ConfigError("use_dora and use_8bit do not go together on a CPU; use_4bit does")
        if self.torch_dtype == "float16" and not self.lora_r:
            raise ConfigError(
                "torch_dtype=float16 with lora_r=0 underflows; write auto, bfloat16 or float32"
            )
        if isinstance(named := self.resume_from_checkpoint, str) and (
            wrong := find_damage(Path(named))
        ):
            raise ConfigError(f"resume_from_checkpoint={named}: {wrong}")

    @property
    def weight_dtype(self) -> torch.dtype:
        """Frozen weights are stored in the compute dtype. Weights that train are stored in float32 under autocast,
        since small updates vanish in 16 bits, unless a torch_dtype is asked for by name."""
        if self.torch_dtype == "auto" and not self.lora_r:
            return torch.float32
        return compute_dtype(self.torch_dtype)


@dataclass
class DataConfig(StageConfig):
    """Options of every stage that reads one data set, which the alias `data` names; its recipe knows the `formats`."""

    formats: ClassVar[Mapping[str, Sequence[str]]] = {}

    dataset_config_name: str | None = None  # configuration of a hub data set
    auto_detect_format: bool = True  # false: refuse to guess without dataset_format
    dataset_format: str = (
        "auto"  # what the columns mean, one of FORMATS in the recipe; auto: by their names
    )

    def validate(self) -> None:
        super().validate()
        if not getattr(self, name := self.aliases["data"]):
            raise ConfigError(f"{name} is missing: --data=<file, folder or hub name>")
        if self.dataset_format not in self.formats and (
            self.dataset_format,
            self.auto_detect_format,
        ) != ("auto", True):
            what = (
                "auto_detect_format=false goes with dataset_format"
                if self.dataset_format == "auto"
                else (f"dataset_format={self.dataset_format} is unknown")
            )
            raise ConfigError(f"{what}, one of: {', '.join(self.formats)}")


@dataclass
class FitConfig(DataConfig, TrainingConfig):
    """Options of every stage that trains by `fit`, on the data that `aliases` names."""

    aliases: ClassVar[dict[str, str]] = TrainingConfig.aliases | {"data": "dataset_name_or_path"}
    # options that --help shows first
    everyday: ClassVar[tuple[str, ...]] = ("model", "data", "output_dir", "learning_rate")

    validation_split: Share = 0.05  # share of the rows held out for evaluation
    num_train_epochs: Positive = 1.0  # passes over the data
    max_steps: Natural = 0  # stop after so many optimizer steps; 0: as num_train_epochs says
    per_device_train_batch_size: Count = 8  # rows a device in a micro-batch
    per_device_eval_batch_size: Count = 8  # the same in evaluation
    logging_steps: Count = 1  # a line on the screen and in metrics.jsonl every so many steps
    eval_steps: Natural = (
        0  # evaluate every so many steps; 0: before the first and after the last only
    )
    save_steps: Natural = 500  # a checkpoint every so many steps; 0: none
    load_best_model_at_end: bool = (
        False  # keep the best evaluated checkpoint instead of the last state
    )
    metric_for_best_model: str = "eval_loss"  # the figure that decides
    greater_is_better: bool | None = (
        None  # whether more of it is; none: yes, unless it ends in loss, kl or error
    )
    early_stopping_patience: Natural = (
        0  # stop after so many evaluations without improvement; 0: never
    )

    def __post_init__(self):
        super().__post_init__()
        if self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith(
                ("loss", "kl", "error")
            )

    def validate(self) -> None:
        super().validate()
        if self.torch_dtype == "float16" and default_device().type == "cpu":
            raise ConfigError(
                "torch_dtype=float16 does not train on a CPU; write auto, bfloat16 or float32"
            )
        best = self.load_best_model_at_end or self.early_stopping_patience
        if best and not self.eval_steps:
            raise ConfigError(
                "load_best_model_at_end and early_stopping_patience compare evaluations; set eval_steps"
            )
        if self.load_best_model_at_end and (
            not self.save_steps or self.save_steps % self.eval_steps
        ):
            raise ConfigError(
                f"load_best_model_at_end: save_steps must be a multiple of eval_steps={self.eval_steps}"
            )
        self.refuse_unread(
            not best,
            "metric_for_best_model greater_is_better",
            "without load_best_model_at_end=true",
        )
        if self.eval_steps and not self.validation_split:
            raise ConfigError("eval_steps needs held-out rows; set validation_split above 0")
