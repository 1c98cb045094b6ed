"""Configuration: option types, and the validated dataclasses that every recipe's options extend.

An option is a field of a dataclass, with a comment that `--help` shows. Its annotation decides how
a value is read, whether it comes from the command line, from YAML or from Python (core/options.py):

    sizes: list[int] = field(default_factory=list)  # --sizes=1,2,3 or --sizes="[1, 2, 3]"
    rate: float | None = None  # --rate=2e-4 or --rate=none
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import AfterValidator, BeforeValidator, Field

from core.data_sources import ColumnNames, DataSource, list_sources
from core.errors import ConfigError
from core.files import find_damage
from core.options import Spellings, coerce_fields
from core.runtime import compute_dtype, default_device, is_sharded, warn_once
from core.yaml_files import parse_yaml

# ---- text to values ------------------------------------------------------------------------------


def split_names(value: Any) -> Any:
    """The names in a text, separated by commas or spaces; None is an empty list."""
    if isinstance(value, str) and value.strip().startswith("["):
        return parse_yaml(value)
    if isinstance(value, str):
        return re.findall(r"[^,\s]+", value)
    return value or []


def split_trackers(value: Any) -> Any:
    """The names in a text, in lower case; "none" means no tracker."""
    names = split_names(value)
    if not isinstance(names, list):
        return names
    names = [str(name).lower() for name in names]
    return [name for name in names if name != "none"]


def read_layer_interval(value: Any) -> Any:
    """A number, or a boolean: true means every layer, false none."""
    switches = {"true": 1, "yes": 1, "on": 1, "false": 0, "no": 0, "off": 0}
    return switches.get(str(value).lower(), value)


# ---- option types --------------------------------------------------------------------------------

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]
comma_separated = BeforeValidator(split_names)
as_yaml = BeforeValidator(parse_yaml)
Names = Annotated[list[str], comma_separated]
Folder = Annotated[str, MinLen(1), AfterValidator(os.path.expanduser)]
Trackers = Annotated[
    list[Literal["tensorboard", "wandb", "trackio"]], BeforeValidator(split_trackers)
]
Switch = Annotated[bool | str, Field(union_mode="left_to_right")]
LayerInterval = Annotated[Natural, BeforeValidator(read_layer_interval)]
Options = Annotated[dict[str, Any], as_yaml]
Sentences = Annotated[list[str], as_yaml]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Spellings(
        {
            "fp32": "float32",
            "float": "float32",
            "bf16": "bfloat16",
            "fp16": "float16",
            "half": "float16",
            "torch.float32": "float32",
            "torch.bfloat16": "bfloat16",
            "torch.float16": "float16",
        }
    ),
]
Optimizer = Annotated[
    Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "muon",
        "adafactor",
        "sgd",
    ],
    Spellings({"adamw": "adamw_torch", "adamw_hf": "adamw_torch", "adamw_bnb_8bit": "adamw_8bit"}),
]
Scheduler = Annotated[
    Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup"],
    # There is only one cycle, so nothing restarts.
    Spellings({"cosine_with_restarts": "cosine"}),
]
Level = Annotated[
    Literal["debug", "info", "warning", "error"],
    Spellings({"warn": "warning", "critical": "error"}),
]
# None disables clipping, like 0.
GradientNorm = Annotated[float, Ge(0), Spellings({"none": 0.0, "null": 0.0})]

# ---- options of every stage --------------------------------------------------------------------


@dataclass
class StageConfig:
    """Options of every stage. Extend it for your own: `@dataclass class MyConfig(StageConfig)`."""

    aliases: ClassVar[dict[str, str]] = {}  # short names of options
    everyday: ClassVar[tuple[str, ...]] = ("output_dir",)  # options that --help shows first
    quantized: ClassVar[Any] = False  # whether the weights are quantized, see ModelConfig

    # the stage and its logs
    stage_name: str = ""  # name in logs and results; empty uses the recipe's name
    output_dir: Folder = "outputs"  # folder for the model, tokenizer, metrics and logs of the stage
    enabled: bool = True  # false skips the stage in a chain
    save_intermediate: bool = True  # false saves no weights and passes the model on in memory
    force: bool = False  # overwrite a finished result of other options; false moves it away
    seed: Natural = 42  # random seed of initialization, shuffling, splits and dropout
    log_level: Level = "info"  # minimum level of log lines on the screen
    report_to: Trackers = field(default_factory=list)  # experiment trackers
    use_wandb: bool = False  # same as report_to=wandb
    wandb_project: str | None = None  # Weights & Biases project
    wandb_run_name: str | None = None  # name of the run in the trackers

    def __post_init__(self):
        coerce_fields(self)
        self.notes_on_names: list[str] = []  # on options of other tools, see core/other_names.py
        self.notes: list[str] = []  # on options without effect; filled by `validate`

    def note_unread(self, unread: bool, names: str, why: str, **like) -> None:
        """If `unread`, add a note for each option in `names` that differs from its default: it has
        no effect.

        `like` are options on which the defaults of others depend.
        """
        if not unread:
            return
        defaults = type(self)(**like)
        for name in names.split():
            if getattr(self, name) != getattr(defaults, name):
                self.notes.append(f"{name} has no effect {why}")

    def validate(self) -> None:
        """Check the options together; raises ConfigError. Opens no file except a named checkpoint.

        Afterwards `notes` says which options have no effect.
        """
        coerce_fields(self)  # a notebook may have assigned fields since
        self.notes = list(vars(self).get("notes_on_names", ()))
        trackers = set(self.report_to)
        if self.use_wandb:
            trackers.add("wandb")
        self.report_to = sorted(trackers)
        uses_wandb = "wandb" in self.report_to
        self.note_unread(not uses_wandb, "wandb_project", "without use_wandb=true")
        self.note_unread(not self.report_to, "wandb_run_name", "without report_to")
        for tracker in self.report_to:
            if not importlib.util.find_spec(tracker):
                raise ConfigError(f"report_to={tracker}: not installed; run: pip install {tracker}")


@dataclass
class ModelConfig(StageConfig):
    """Options of every stage that loads a model: source, precision, quantization."""

    aliases: ClassVar[dict[str, str]] = {"model": "model_name_or_path", "dtype": "torch_dtype"}
    everyday: ClassVar[tuple[str, ...]] = ("model", "data", *StageConfig.everyday)

    # model
    model_name_or_path: str = ""  # hub name, folder of a model or adapter, or .gguf file
    revision: str | None = None  # branch, tag or commit of a hub name
    torch_dtype: Precision = "auto"  # auto: bfloat16 or float16 on a GPU, float32 on CPU and MPS
    trust_remote_code: bool = False  # run the Python code that comes with the model
    use_auth_token: bool = False  # use your login, for gated models (`hf auth login` or HF_TOKEN)
    attn_implementation: str | None = None  # sdpa, eager, flash_attention_2; none: model's choice
    # prompt format such as "Q: {instruction}\nA: {response}"; none uses the chat template
    instruction_template: str | None = None
    chat_template_path: str | None = None  # chat template: .jinja file, or a model that has one
    eos_token: str | None = None  # token that ends a turn; none: the tokenizer's own
    pad_token: str | None = None  # padding token; none: the tokenizer's own
    # quantization by bitsandbytes
    use_4bit: bool = False  # load the weights in 4 bits, for QLoRA (Dettmers et al. 2023)
    use_8bit: bool = False  # load the weights in 8 bits, LLM.int8 (Dettmers et al. 2022)
    bnb_4bit_compute_dtype: Precision = "auto"  # precision of 4-bit matmuls; auto uses torch_dtype
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"  # data type of the 4-bit weights
    bnb_4bit_use_double_quant: bool = True  # quantize the quantization constants too

    def validate(self) -> None:
        super().validate()
        if not self.model_name_or_path:
            raise ConfigError(
                "model_name_or_path is missing: --model=<hub name, folder or .gguf file>"
            )
        if self.instruction_template and self.chat_template_path:
            raise ConfigError(
                "instruction_template and chat_template_path both say how a prompt is written; "
                "keep one"
            )
        if self.use_4bit and self.use_8bit:
            raise ConfigError("use_4bit and use_8bit exclude each other; keep one")
        names = "bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant"
        self.note_unread(not self.use_4bit, names, "without use_4bit=true")
        if default_device().type == "cpu":
            self.replace_float16()

    def replace_float16(self) -> None:
        """Replace float16 by float32 on a CPU, which has no float16 arithmetic."""
        for name in ("torch_dtype", "bnb_4bit_compute_dtype"):
            if getattr(self, name) == "float16":
                setattr(self, name, "float32")
                if name == "torch_dtype" or self.use_4bit:
                    note = f"{name}=float16 cannot train on a CPU; float32 is used"
                    self.notes.append(note)
                    self.notes_on_names.append(note)  # a second `validate` finds float32

    @property
    def quantized(self) -> bool:  # type: ignore[override]
        """Whether the weights are loaded in 4 or 8 bits."""
        return self.use_4bit or self.use_8bit

    @property
    def weight_dtype(self) -> torch.dtype:
        """Precision in which the weights are stored."""
        return compute_dtype(self.torch_dtype)


def all_linear() -> list[str]:
    """PEFT's name for every linear layer except the output layer."""
    return ["all-linear"]


@dataclass
class TrainingConfig(ModelConfig):
    """Options of every stage that trains: LoRA, optimizer, schedule, checkpoints."""

    # Default learning rates for an adapter and for all weights; full training needs a lower one.
    default_rates: ClassVar[tuple[float, float]] = (5e-4, 5e-5)
    everyday: ClassVar[tuple[str, ...]] = (*ModelConfig.everyday, "learning_rate", "lora_r")

    # LoRA
    lora_r: Natural = 16  # rank of the LoRA adapter; 0 trains all weights
    lora_alpha: Count = 32  # the adapter's output is scaled by lora_alpha / lora_r
    lora_dropout: Share = 0.0  # dropout before the adapter
    lora_target_modules: Names = field(default_factory=all_linear)  # or q_proj,v_proj,...
    lora_bias: Literal["none", "all", "lora_only"] = "none"  # biases to train
    use_dora: bool = False  # weight-decomposed LoRA (Liu et al. 2024)
    use_rslora: bool = False  # scale by lora_alpha / sqrt(lora_r) (Kalajdzievski 2023)
    # new tokens; their rows of the embeddings train even with an adapter
    new_tokens: Names = field(default_factory=list)  # tokens to add, e.g. <step>,</step>
    new_special_tokens: Names = field(default_factory=list)  # the same, omitted from decoded text
    # optimizer and schedule
    gradient_accumulation_steps: Count = 1  # micro-batches per optimizer step
    learning_rate: Positive | None = None  # peak rate; none: 5e-4 for LoRA, else 5e-5
    weight_decay: NonNegative = 0.0  # decoupled weight decay of AdamW
    warmup_ratio: Share = 0.03  # fraction of steps used for warm-up
    warmup_steps: Natural = 0  # steps used for warm-up; 0 uses warmup_ratio
    lr_scheduler_type: Scheduler = "cosine"  # learning-rate schedule after warm-up
    optim: Optimizer = "adamw_torch_fused"  # optimizer; 8-bit and paged: bitsandbytes
    max_grad_norm: GradientNorm = 1.0  # maximum gradient norm; 0 disables clipping
    gradient_checkpointing: LayerInterval = 0  # recompute every Nth layer; true is every layer
    # checkpoints
    save_total_limit: Count | None = 2  # number of checkpoints to keep; none: all
    resume_from_checkpoint: Switch = True  # true: newest intact one; false: start over; or a folder

    def __post_init__(self):
        super().__post_init__()
        if self.learning_rate is None:
            adapter_rate, full_rate = self.default_rates
            self.learning_rate = adapter_rate if self.lora_r else full_rate

    def validate(self) -> None:
        super().validate()
        self.check_adapter()
        self.check_precision()
        self.note_unread(bool(self.warmup_steps), "warmup_ratio", "beside warmup_steps")
        why = "with lr_scheduler_type=constant; constant_with_warmup uses it"
        is_flat = self.lr_scheduler_type == "constant"
        self.note_unread(is_flat, "warmup_ratio warmup_steps", why)
        if isinstance(self.resume_from_checkpoint, str):
            damage = find_damage(Path(self.resume_from_checkpoint))
            if damage:
                raise ConfigError(
                    f"resume_from_checkpoint={self.resume_from_checkpoint}: {damage}; give the "
                    "folder of an intact checkpoint, or true for the newest one"
                )

    def check_adapter(self) -> None:
        """Check the options of LoRA; raises ConfigError."""
        if self.quantized and not self.lora_r:
            raise ConfigError(
                "lora_r=0 trains all weights, and quantized weights cannot train; set lora_r=16"
            )
        names = "lora_alpha lora_dropout lora_target_modules lora_bias use_dora use_rslora"
        self.note_unread(not self.lora_r, names, "with lora_r=0")
        # `replace(config, lora_r=0)` keeps the rate that __post_init__ chose for an adapter.
        if not self.lora_r and self.learning_rate == self.default_rates[0]:
            adapter_rate, full_rate = self.default_rates
            warn_once(
                f"learning_rate={adapter_rate:g} is the default for an adapter; "
                f"for all weights it is {full_rate:g}"
            )

    def check_precision(self) -> None:
        """Raise ConfigError for combinations that do not work."""
        if self.use_dora and self.use_8bit and default_device().type == "cpu":
            raise ConfigError("use_dora does not work with use_8bit on a CPU; set use_4bit")
        if self.torch_dtype == "float16" and not self.lora_r:
            raise ConfigError(
                "torch_dtype=float16 with lora_r=0 underflows; use auto, bfloat16 or float32"
            )

    @property
    def weight_dtype(self) -> torch.dtype:
        """Precision in which the weights are stored.

        Frozen weights have the compute dtype. Trained weights are float32 under autocast, because
        small updates vanish in 16 bits, unless torch_dtype names another precision.
        """
        if self.torch_dtype == "auto" and not self.lora_r:
            return torch.float32
        return compute_dtype(self.torch_dtype)


@dataclass
class DataConfig(StageConfig):
    """Options of every stage that reads data, from the option with the alias `data`."""

    formats: ClassVar[Mapping[str, Sequence[str]]] = {}  # {format: its columns}, of the recipe

    # data
    dataset_config_name: str | None = None  # configuration of a hub data set
    auto_detect_format: bool = True  # false refuses to guess the format without dataset_format
    dataset_format: str = "auto"  # name of the data's format; auto detects it from the columns
    # the data's columns by their names in a format, e.g. {prompt: customer_message, response:
    # agent_reply}; {context: null} drops a column that is not needed
    columns: ColumnNames = field(default_factory=dict)

    def data_sources(self) -> list[DataSource]:
        """The data sets to read; raises ConfigError for an invalid entry."""
        value = getattr(self, self.aliases["data"])
        return list_sources(value, self.columns, self.dataset_format, self.dataset_config_name)

    def validate(self) -> None:
        super().validate()
        path_option = self.aliases["data"]
        if not getattr(self, path_option):
            raise ConfigError(f"{path_option} is missing: --data=<file, folder or hub name>")
        sources = self.data_sources()
        known = ", ".join(self.formats)
        for source in sources:
            if source.format == "auto" and not self.auto_detect_format:
                raise ConfigError(
                    f"auto_detect_format=false requires dataset_format, one of: {known}"
                )
            if source.format != "auto" and source.format not in self.formats:
                raise ConfigError(f"dataset_format={source.format} is unknown, one of: {known}")


@dataclass
class FitConfig(DataConfig, TrainingConfig):
    """Options of every stage that trains with `fit`."""

    aliases: ClassVar[dict[str, str]] = TrainingConfig.aliases | {"data": "dataset_name_or_path"}
    everyday: ClassVar[tuple[str, ...]] = (
        *ModelConfig.everyday,
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "learning_rate",
        "lora_r",
        "max_seq_length",
    )

    # training and evaluation
    validation_split: Share = 0.05  # fraction of rows held out for evaluation
    streaming: bool = False  # read only as many rows as max_steps needs, from data of any size
    num_train_epochs: Positive = 1.0  # passes over the training data
    max_steps: Natural = 0  # stop after N optimizer steps; 0 uses num_train_epochs
    per_device_train_batch_size: Count = 8  # rows per device in a micro-batch
    per_device_eval_batch_size: Count = 8  # rows per device in an evaluation batch
    logging_steps: Count = 1  # log metrics every N steps
    eval_steps: Natural = 0  # evaluate every N steps; 0 evaluates only before and after training
    early_stopping_patience: Natural = 0  # stop after N evaluations without improvement; 0: never
    # checkpoints
    save_steps: Natural = 500  # save a checkpoint every N steps; 0 saves none
    load_best_model_at_end: bool = False  # keep the best evaluated checkpoint, not the last state
    metric_for_best_model: str = "eval_loss"  # metric that decides which checkpoint is best
    greater_is_better: bool | None = None  # none: true unless the metric ends in loss, kl or error

    def __post_init__(self):
        super().__post_init__()
        if self.greater_is_better is None:
            smaller_is_better = self.metric_for_best_model.endswith(("loss", "kl", "error"))
            self.greater_is_better = not smaller_is_better

    def validate(self) -> None:
        super().validate()
        if self.streaming and not self.max_steps:
            raise ConfigError("streaming=true reads as many rows as max_steps takes; set max_steps")
        if self.optim == "muon" and is_sharded():
            raise ConfigError(
                "optim=muon needs every matrix whole, but FSDP and DeepSpeed split them; "
                "launch with yaml/accelerate/ddp.yaml, or use adamw_torch_fused"
            )
        compares_evaluations = self.load_best_model_at_end or self.early_stopping_patience
        if compares_evaluations and not self.eval_steps:
            raise ConfigError(
                "load_best_model_at_end and early_stopping_patience compare evaluations; "
                "set eval_steps"
            )
        # The best checkpoint must have been saved when it was evaluated.
        if self.load_best_model_at_end and (
            not self.save_steps or self.save_steps % self.eval_steps
        ):
            raise ConfigError(
                "load_best_model_at_end: save_steps must be a multiple of "
                f"eval_steps={self.eval_steps}"
            )
        names = "metric_for_best_model greater_is_better"
        self.note_unread(not compares_evaluations, names, "without load_best_model_at_end=true")
        if compares_evaluations and not self.validation_split:
            raise ConfigError(
                "load_best_model_at_end and early_stopping_patience need held-out rows; "
                "set validation_split above 0"
            )
        self.note_unread(not self.validation_split, "eval_steps", "with validation_split=0")
