"""Plumbing that the recipes share, in the order of a run: configuration, stage contract, data, model, fit, saving,
command line. No objective stands here: the mathematics of an algorithm is in its recipe. A recipe and this file,
copied together, are a working program; one that contains other recipes needs those too.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import csv
import ctypes
import difflib
import functools
import glob
import hashlib
import http.client
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, TimeoutError as FutureTimeout, as_completed
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Callable, ClassVar, Iterable, Literal, Mapping, Sequence, get_type_hints

import torch
import torch.nn.functional as F
import yaml
from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# transformers.Trainer, trl and peft take 5 to 9 s to import: only where they are used, so that --help answers at once.

IGNORE = -100  # label of a token that is not a target: the convention of transformers and torch
logger = logging.getLogger("recipes")
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing|Synchronization debug mode")  # of peft; of `replayed`
for noisy in ("bitsandbytes.autograd", "bitsandbytes.backends.cpu.ops", "math_verify"):  # they warn at every layer of
    logging.getLogger(noisy).setLevel(logging.ERROR)  # every step, of a kernel not needed, of timeouts `Subprocess` has


class ConfigError(ValueError):
    """Input that the user has to mend: one sentence that says what is wrong and what to write instead."""


class AskingError(RuntimeError):
    """Another model is not asked any further: it refuses, a limit is reached, or too many answers are missing."""


class RowError(ValueError):
    """A row that cannot be used. The reason is counted and said, and the row left out."""


def lean_memory() -> None:
    """On Linux, lay large tensors on huge pages, give them back when freed (glibc would keep the holes), and let the
    heap grow by 128 MB, so that it has such pages too. THP_MEM_ALLOC_ENABLE=0 in the environment: all as it was."""
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    wanted = os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1") == "1"
    if wanted and pages.exists() and "[never]" not in pages.read_text():
        with contextlib.suppress(AttributeError):  # musl has no mallopt
            for option, size in ((-3, 2**24), (-2, 2**27), (-1, 2**27)):  # mmap threshold, top pad, trim threshold
                ctypes.CDLL(None).mallopt(option, size)


lean_memory()


@contextlib.contextmanager
def refusing(what: str):
    """Turn whatever a library raises about the user's input into a ConfigError that begins with `what`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ConfigError(f"{what}: {reason[:400]}") from error


# ---- Configuration: one flat dataclass a stage; the same fields from the command line, from YAML and from a notebook -

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]
comma_separated = BeforeValidator(lambda v: re.findall(r"[^,\s]+", v) if isinstance(v, str) else v or [])
Names = Annotated[list[str], comma_separated]
Folder = Annotated[str, MinLen(1), AfterValidator(os.path.expanduser)]
Trackers = Annotated[list[Literal["tensorboard", "wandb", "trackio"]], comma_separated]
as_yaml = BeforeValidator(lambda v: yaml.safe_load(v) if isinstance(v, str) else v)
Switch = Annotated[bool | str, as_yaml]
Options = Annotated[dict[str, Any], as_yaml]
Sentences = Annotated[list[str], as_yaml]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"]
Scheduler = Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup"]


def coerce_fields(config) -> None:
    """Coerce every field of a dataclass to its annotation ("2e-4" to 0.0002); raises ConfigError naming the field."""
    hints = get_type_hints(type(config), include_extras=True)
    for name in (f.name for f in fields(config)):
        value, rules = getattr(config, name), ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)
        try:
            setattr(config, name, TypeAdapter(hints[name], config=rules).validate_python(value))
        except ValidationError as error:
            shown = "" if re.search("token|secret|password|key", name) else f"={value!r}"  # may be a secret by mistake
            raise ConfigError(f"{name}{shown}: {error.errors()[0]['msg'].lower()}") from None


def resolve_names(config_class, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with aliases replaced by field names; raises ConfigError with the nearest name for an unknown key."""
    names, resolved = {f.name for f in fields(config_class)}, {}
    for key, value in values.items():
        name = config_class.aliases.get(key, key)
        if name not in names:
            raise ConfigError(unknown("option", key, names | set(config_class.aliases)))
        if name in resolved:
            raise ConfigError(f"{name} is given twice, once by its short name; keep one")
        resolved[name] = value
    return resolved


def unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    """One sentence on an unknown name, with the nearest valid one."""
    near = difflib.get_close_matches(str(name), valid := sorted(valid), n=1)
    return f"unknown {kind} {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(valid)}")


@dataclass
class StageConfig:
    """Options that every stage has. A stage of your own extends it: `@dataclass class MyConfig(StageConfig): ...`."""

    aliases: ClassVar[dict[str, str]] = {}  # short names, for the command line
    quantized: ClassVar[Any] = False  # whether the model's weights are: see ModelConfig

    stage_name: str = ""  # name in logs and results; empty: the name of the recipe
    output_dir: Folder = "outputs"  # folder of the stage: model, tokenizer, training.log, metrics.jsonl, stage.json
    enabled: bool = True  # false: a chain skips the stage, and says so
    save_intermediate: bool = True  # false: write no weights, hand the model on in memory only
    seed: Natural = 42  # of initialisation, shuffling, splits and dropout
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # of the lines on the screen; the log has all
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

    model_name_or_path: str = ""  # hub name, folder, adapter folder, or .gguf file (also package/file.gguf)
    revision: str | None = None  # branch, tag or commit of a hub name
    torch_dtype: Precision = "auto"  # auto: bfloat16 on GPUs that have it, else float16; float32 on CPU and MPS
    trust_remote_code: bool = False  # true runs Python code that comes with the model
    use_auth_token: bool = False  # true: gated models, with your login (`hf auth login`, or the variable HF_TOKEN)
    attn_implementation: str | None = None  # sdpa, eager, flash_attention_2, ...; none: the model's own choice
    instruction_template: str | None = None  # such as "Q: {instruction}\nA: {response}"; none: the chat template
    # quantization
    use_4bit: bool = False  # QLoRA (Dettmers et al. 2023)
    use_8bit: bool = False  # LLM.int8 (Dettmers et al. 2022)
    bnb_4bit_compute_dtype: Precision = "auto"  # precision of the multiplications; auto: as torch_dtype
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"  # data type of the 4-bit weights
    bnb_4bit_use_double_quant: bool = True  # quantize the quantization constants too

    def validate(self) -> None:
        super().validate()
        if not self.model_name_or_path:
            raise ConfigError("model_name_or_path is missing: --model=<hub name, folder or .gguf file>")
        if self.use_4bit and self.use_8bit:
            raise ConfigError("use_4bit and use_8bit exclude each other; keep one")
        names = "bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant"
        self.refuse_unread(not self.use_4bit, names, "without use_4bit=true")

    quantized = property(lambda self: self.use_4bit or self.use_8bit)


@dataclass
class TrainingConfig(ModelConfig):
    """Options of every stage that trains: LoRA, optimizer and schedule."""

    default_rates: ClassVar[tuple[float, float]] = (5e-4, 5e-5)  # learning_rate for an adapter, for all weights

    # adapter by PEFT
    lora_r: Natural = 16  # rank; 0 trains all weights
    lora_alpha: Count = 32  # the adapter's output is scaled by lora_alpha / lora_r
    lora_dropout: Share = 0.0  # dropout before the adapter
    lora_target_modules: Names = field(default_factory=lambda: ["all-linear"])  # or names, such as q_proj,v_proj
    lora_bias: Literal["none", "all", "lora_only"] = "none"  # which biases train
    use_dora: bool = False  # weight-decomposed LoRA (Liu et al. 2024)
    use_rslora: bool = False  # scale by lora_alpha / sqrt(lora_r) (Kalajdzievski 2023)
    # optimizer and schedule
    gradient_accumulation_steps: Count = 1  # micro-batches an optimizer step
    learning_rate: Positive | None = None  # its peak; none: 5e-4 for an adapter, 5e-5 for all weights
    weight_decay: NonNegative = 0.0  # of AdamW
    warmup_ratio: Share = 0.03  # share of the steps over which the learning rate rises
    lr_scheduler_type: Scheduler = "cosine"  # its course after that
    optim: Optimizer = "adamw_torch"  # the 8-bit and paged ones are those of bitsandbytes
    max_grad_norm: NonNegative = 1.0  # longer gradients are clipped to this norm; 0: none are
    gradient_checkpointing: Annotated[Natural, as_yaml] = 0  # recompute activations of every n-th layer; true: of all
    # checkpoints
    save_total_limit: Count = 2  # so many checkpoints are kept
    resume_from_checkpoint: Switch = True  # the newest whole checkpoint of the same run; false: none; or one's folder

    def __post_init__(self):
        super().__post_init__()
        if self.learning_rate is None:
            self.learning_rate = self.default_rates[not self.lora_r]

    def validate(self) -> None:
        super().validate()
        if (self.use_4bit or self.use_8bit) and not self.lora_r:
            raise ConfigError("lora_r=0 trains all weights, and quantized ones cannot train; set lora_r=16")
        names = "lora_alpha lora_dropout lora_target_modules lora_bias use_dora use_rslora"
        self.refuse_unread(not self.lora_r, names, "with lora_r=0")
        if not self.lora_r and self.learning_rate == self.default_rates[0]:  # as `replace(config, lora_r=0)` leaves it
            say_once("learning_rate=%g is the default for an adapter; for all weights it is %g" % self.default_rates)
        flat = self.lr_scheduler_type == "constant" and self.warmup_ratio > 0
        self.refuse_unread(flat, "warmup_ratio", "with lr_scheduler_type=constant; constant_with_warmup has it")
        if self.use_dora and self.use_8bit and default_device().type == "cpu":
            raise ConfigError("use_dora and use_8bit do not go together on a CPU; use_4bit does")
        if self.torch_dtype == "float16" and not self.lora_r:
            raise ConfigError("torch_dtype=float16 with lora_r=0 underflows; write auto, bfloat16 or float32")
        if isinstance(named := self.resume_from_checkpoint, str) and (wrong := damage(Path(named))):
            raise ConfigError(f"resume_from_checkpoint={named}: {wrong}")


@dataclass
class DataConfig(StageConfig):
    """Options of every stage that reads one data set, which the alias `data` names; its recipe knows the `formats`."""

    formats: ClassVar[Mapping[str, Sequence[str]]] = {}

    dataset_config_name: str | None = None  # configuration of a hub data set
    auto_detect_format: bool = True  # false: refuse to guess without dataset_format
    dataset_format: str = "auto"  # what the columns mean, one of FORMATS in the recipe; auto: by their names

    def validate(self) -> None:
        super().validate()
        if not getattr(self, name := self.aliases["data"]):
            raise ConfigError(f"{name} is missing: --data=<file, folder or hub name>")
        if self.dataset_format not in self.formats and (self.dataset_format, self.auto_detect_format) != ("auto", True):
            what = "auto_detect_format=false goes with dataset_format" if self.dataset_format == "auto" else (
                f"dataset_format={self.dataset_format} is unknown")
            raise ConfigError(f"{what}, one of: {', '.join(self.formats)}")


@dataclass
class FitConfig(DataConfig, TrainingConfig):
    """Options of every stage that trains by `fit`, on the data that `aliases` names."""

    aliases: ClassVar[dict[str, str]] = TrainingConfig.aliases | {"data": "dataset_name_or_path"}

    validation_split: Share = 0.05  # share of the rows held out for evaluation
    num_train_epochs: Positive = 1.0  # passes over the data
    max_steps: Natural = 0  # stop after so many optimizer steps; 0: as num_train_epochs says
    per_device_train_batch_size: Count = 8  # rows a device in a micro-batch
    per_device_eval_batch_size: Count = 8  # the same in evaluation
    logging_steps: Count = 1  # a line on the screen and in metrics.jsonl every so many steps
    eval_steps: Natural = 0  # evaluate every so many steps; 0: before the first and after the last only
    save_steps: Natural = 500  # a checkpoint every so many steps; 0: none
    load_best_model_at_end: bool = False  # keep the best evaluated checkpoint instead of the last state
    metric_for_best_model: str = "eval_loss"  # the figure that decides
    greater_is_better: bool | None = None  # whether more of it is; none: yes, unless it ends in loss, kl or error
    early_stopping_patience: Natural = 0  # stop after so many evaluations without improvement; 0: never

    def __post_init__(self):
        super().__post_init__()
        if self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "kl", "error"))

    def validate(self) -> None:
        super().validate()
        if self.torch_dtype == "float16" and default_device().type == "cpu":
            raise ConfigError("torch_dtype=float16 does not train on a CPU; write auto, bfloat16 or float32")
        best = self.load_best_model_at_end or self.early_stopping_patience
        if best and not self.eval_steps:
            raise ConfigError("load_best_model_at_end and early_stopping_patience compare evaluations; set eval_steps")
        if self.load_best_model_at_end and (not self.save_steps or self.save_steps % self.eval_steps):
            raise ConfigError(f"load_best_model_at_end: save_steps must be a multiple of eval_steps={self.eval_steps}")
        self.refuse_unread(not best, "metric_for_best_model greater_is_better", "without load_best_model_at_end=true")
        if self.eval_steps and not self.validation_split:
            raise ConfigError("eval_steps needs held-out rows; set validation_split above 0")


# ---- Stage contract --------------------------------------------------------------------------------------------------
# Options that do not change what comes out of a stage: with others, a run goes on from the same checkpoints.
OUTSIDE = frozenset("""stage_name output_dir enabled save_intermediate log_level report_to use_wandb wandb_project
    wandb_run_name resume_from_checkpoint save_steps save_freq save_total_limit use_auth_token max_calls max_cost
    input_price output_price call_timeout max_missing""".split())


@dataclass
class StageResult:
    """What a stage hands on. `metrics` has x and x_before for a figure taken after and before training."""

    stage_name: str
    success: bool
    model_path: str | None = None  # folder of the model; None when save_intermediate is false
    tokenizer_path: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)  # what else the stage left: name -> path
    error_message: str | None = None  # last line of the traceback; the log has all of it
    model: Any = field(default=None, repr=False, compare=False)  # live, for hand-over in memory; never saved
    tokenizer: Any = field(default=None, repr=False, compare=False)


class BaseStage:
    """One step of a chain. A subclass names itself and its config class, and defines `train`."""

    stage_name: str = ""
    config_class: type[StageConfig] = StageConfig
    needs_chat_template: bool = True  # false: the data is plain text
    task: str = "CAUSAL_LM"  # PEFT's name of what the model does; SEQ_CLS: it gives one score
    needs_folder: str = ""  # what it is called, if it takes no model that lies in memory alone
    hands_on: bool = True  # false: what it makes is not for the next stage, which gets what this one was handed
    config: Any  # an instance of config_class

    def __init__(self, config: StageConfig):
        self.config = config
        self.stage_name = config.stage_name or self.stage_name
        self.logger = logger.getChild(self.stage_name)
        self.data: Any = None  # what load_data returned
        self.lineage: dict[str, Any] = {}  # what stage.json says beside the figures: parent, data
        self.artifacts: dict[str, str] = {}
        self.start: str | None = None  # in a chain: the fingerprints of the stages before
        self.marks: dict[str, Any] = {}
        self.edited: list[str] = []  # files of its code that are not what was imported
        self.once = False  # true: `execute` returns what is recorded of a finished run, as the command line wants it
        self.used = False  # true: it ran, and what it `read` may have changed since
        self.read: Any = None

    def validate_config(self) -> None:
        self.config.validate()

    def load_data(self) -> Any:
        """Open the stage's data: (training rows, evaluation rows). Needs no model; a dry run calls it too."""

    def sequences(self, row, tokenizer, context: int) -> tuple[list[tuple], bool] | None:
        """([(input_ids, labels)], whether something is cut off): what becomes of a row of `load_data`, for the checks
        before training; labels None where tokens are not imitated. None: this stage is not looked at."""

    def work(self, lengths: Sequence[int]) -> tuple[int, float, float, int]:
        """(steps, tokens, passes over a token, backward ones counted twice, rows at a time) of rows so long, about."""
        config = self.config
        rows, size = len(self.data[0]), config.per_device_train_batch_size
        whole = math.ceil(rows / (size * config.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))))
        steps = config.max_steps or math.ceil(whole * config.num_train_epochs)
        return steps, statistics.fmean(lengths) * rows * steps / whole, 2.0 if config.lora_r else 3.0, min(size, rows)

    def check(self) -> None:
        """All that can be refused before a model is loaded; raises ConfigError."""
        self.validate_config()
        if self.data is None:
            self.data = self.read = self.load_data()

    def fingerprint(self) -> dict[str, Any]:
        """What decides what comes out, once checked: options, data, files and models they name, code, and the start."""
        if not self.marks:
            options = options_of(self.config)
            texts = [text for value in options.values() for text in (value if isinstance(value, list) else [value])]
            named = {text: re.sub(r"(\.py):\w+$", r"\1", text) for text in texts
                     if isinstance(text, str) and 0 < len(text) < 256}
            home = sys.modules[type(self).__module__]  # its code: of its recipe, of those this imports, and this
            text = inspect.getsource(home) if "__file__" in vars(home) else ""
            froms = [sys.modules.get(name) for name in re.findall(r"^from ([\w.]+) import", text, re.MULTILINE)]
            modules = {sys.modules[__name__], home, *froms, *filter(inspect.ismodule, vars(home).values())} - {None}
            ours = (Path(__file__).parent, Path(vars(home).get("__file__", __file__)).parent)
            loaded = {module: Path(file) for module in modules
                      if (file := vars(module).get("__file__")) and Path(file).parent in ours}
            code = {file.name: digest(file) for file in loaded.values()}
            self.edited = sorted(file.name for module, file in loaded.items() if as_loaded(module) != code[file.name])
            with contextlib.suppress(OSError):  # what is typed at a prompt has no source; a notebook's functions have
                for name, call in vars(type(self)).items() if not text else ():
                    if inspect.isfunction(call):
                        code[f"{name}()"] = hashlib.sha256(inspect.getsource(call).encode()).hexdigest()
            self.marks = {"options": options, "data": self.lineage.get("data", {}).get("sha256"), "start": self.start,
                          "files": {text: known for text, path in named.items() if (known := identity(Path(path)))},
                          "code": dict(sorted(code.items()))}
        return self.marks

    def stale(self) -> str:
        """Why the stage has to run; empty if it is done, with the same fingerprint."""
        record = Path(self.config.output_dir, "stage.json")
        if not record.exists():
            return "it is not finished"
        with refusing(f"{record} cannot be read; delete it to run the stage again"):
            return differences(json.loads(record.read_text(encoding="utf-8"))["fingerprint"], self.fingerprint())

    def recorded(self) -> StageResult:
        """The result of a finished stage, by its stage.json; its folder may have been moved or copied since."""
        folder = Path(self.config.output_dir)
        done = json.loads((folder / "stage.json").read_text(encoding="utf-8"))

        def moved(path: str) -> str:
            way = Path(os.path.relpath(path, done["output_dir"]))
            outside = way.parts[:2] == ("..", "..")  # neither in the folder nor in one beside it
            return path if outside or str(folder) == done["output_dir"] else os.path.normpath(folder / way)

        artifacts, path = {name: moved(at) for name, at in done["artifacts"].items()}, done["model_path"]
        return StageResult(done["stage"], True, path := path and moved(path), path, done["metrics"], artifacts)

    def begin(self) -> None:
        """Mark the folder as that of this run. Checkpoints of one with other options, or not wanted, are laid aside."""
        folder, launch = Path(self.config.output_dir), f"{os.environ.get('WORLD_SIZE', 1)}{' sharded' * sharded()}"
        marks = self.fingerprint() | {"launch": launch}  # other processes would take other rows, and read other files
        if self.edited and not self.once:  # a part of a run goes on with the code that the run began with
            raise ConfigError(f"{', '.join(self.edited)} changed since it was imported here; start Python anew")
        if is_main_process():
            (folder / "stage.json").unlink(missing_ok=True)  # a stage is done when its stage.json says so
            mark, old = folder / "fingerprint.json", folder / "checkpoints"
            for left in (*folder.glob(".*.[0-9]*"), *folder.glob(".saving"), *old.glob(".*")):  # of a crash
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            resume = vars(self.config).get("resume_from_checkpoint")
            if old.exists() and (resume is False or (resume is True and mark.exists())):
                with refusing(f"{mark} cannot be read; move {old} away"):
                    theirs = json.loads(mark.read_text(encoding="utf-8")) if resume else {}
                    if changed := differences(theirs, marks) if resume else "resume_from_checkpoint=false":
                        number = next(n for n in range(1, 10**6) if not Path(f"{old}.{n}").exists())
                        old.rename(f"{old}.{number}")
                        logger.warning("the checkpoints of an earlier run are now in %s.%d: %s", old, number, changed)
            write_json(mark, marks)
        wait_for_everyone()

    def train(self, model, tokenizer) -> dict[str, float] | tuple[dict[str, float], Any]:
        """Train `model` in place; returns the metrics, or (metrics, model) if what came out is another model."""
        raise NotImplementedError(f"{type(self).__name__} defines no train()")

    def prepare_model_and_tokenizer(self, model, tokenizer, previous_result: StageResult | None = None):
        """The model, ready to train, and its tokenizer: those handed over, else of the stage before's folder, else of
        `model_name_or_path`. Where the stage trains, a fresh adapter alone does, or all weights if `lora_r` is 0."""
        import transformers

        config, folder = self.config, previous_result.model_path if previous_result else None
        if folder:
            config = replace(config, model_name_or_path=folder, revision=None)
        elif model is not None and (config.quantized or self.needs_folder):
            what = "use_4bit and use_8bit load" if config.quantized else f"{self.needs_folder} starts"
            raise ConfigError(f"{what} from a folder: set save_intermediate in the stage before")
        name = config.model_name_or_path if folder or model is None else "a model in memory"
        self.lineage["parent"] = {"model": name, "revision": config.revision}
        if model is None or config.quantized:
            model, tokenizer = load_model_and_tokenizer(config, self.needs_chat_template, self.task)
        else:
            tokenizer = tokenizer if self.hands_on else copy.deepcopy(tokenizer)
            prepare_tokenizer(tokenizer, config, self.needs_chat_template)
            dtype, model = weight_dtype(config), merge_adapter(model)  # it is handed on as it was, if it is handed on
            model = cast(model if self.hands_on or model.dtype == dtype else copy.deepcopy(model), dtype)
        if self.task == "CAUSAL_LM":  # generation stops at the token that ends a turn
            model.generation_config.update(eos_token_id=stop_tokens(tokenizer), pad_token_id=tokenizer.pad_token_id)
        transformers.set_seed(config.seed)  # the adapter is the same, wherever the model came from
        return (add_adapter(model, config, self.task) if isinstance(config, TrainingConfig) else model), tokenizer

    def save_model_and_tokenizer(self, model, tokenizer) -> str:
        return save_model(model, tokenizer, self.config.output_dir)

    def setup_logging(self) -> None:
        self.logs = start_logging(self.config.log_level, Path(self.config.output_dir, "training.log"))

    def cleanup_logging(self) -> None:
        self.logs.close()

    def execute(self, model=None, tokenizer=None, previous_result: StageResult | None = None) -> StageResult:
        """Check, prepare, train, save. A ConfigError, which the user has to mend, passes through; any other exception
        becomes a failed result, its traceback in the log."""
        import transformers

        if previous_result and not previous_result.success:
            raise ConfigError(f"the stage before failed: {previous_result.error_message}")
        if model is not None and tokenizer is None:
            raise ConfigError("a model is handed over with its tokenizer: execute(model, tokenizer)")
        if self.used:
            self.data, self.marks = None if self.data is self.read else self.data, {}
        self.used, handed = True, (model, tokenizer, previous_result.model_path if previous_result else None)
        self.setup_logging()
        started, folder = time.time(), Path(self.config.output_dir)
        try:
            self.check()
            resume = vars(self.config).get("resume_from_checkpoint") is True and any(folder.glob("*.safetensors"))
            if self.once and resume and not self.stale():
                self.logger.info("%s is finished already; resume_from_checkpoint=false: run it anew", folder)
                return self.recorded()
            self.begin()
            if isinstance(self.config, ModelConfig):
                at: dict[str, Any] = {"model_name_or_path": handed[2], "revision": None} if handed[2] else {}
                loaded = load_tokenizer(replace(self.config, **at)) if model is None else (tokenizer, model.config)
                look(self, loaded[0], loaded[1].max_position_embeddings)
            transformers.set_seed(self.config.seed)
            model, tokenizer = self.prepare_model_and_tokenizer(model, tokenizer, previous_result)
            metrics = self.train(model, tokenizer)
            metrics, model = metrics if isinstance(metrics, tuple) else (metrics, model)
            if self.config.save_intermediate and is_main_process():
                if hasattr(model, "peft_config"):
                    self.artifacts["adapter"] = str(folder / "adapter")
                    with written_aside(folder / "adapter") as aside:
                        model.save_pretrained(aside)
                else:
                    shutil.rmtree(folder / "adapter", ignore_errors=True)  # of an older run in this folder
            model = merge_adapter(model)
            path = self.save_model_and_tokenizer(model, tokenizer) if self.config.save_intermediate else None
            if not self.hands_on:
                model, tokenizer, path = handed
            metrics = {**metrics, "seconds": round(time.time() - started, 1), **peak_memory()}
            result = StageResult(self.stage_name, True, path, path, metrics, self.artifacts, None, model, tokenizer)
            write_stage_json(self.config, result, {**self.lineage, "fingerprint": self.fingerprint()})
            return result
        except ConfigError:
            raise
        except Exception as error:
            self.logger.debug("the failure in full", exc_info=True)
            full = f"no space left on the disk of {folder}: " * (shutil.disk_usage(folder).free < 2**20)
            result = StageResult(self.stage_name, False, error_message=f"{full}{type(error).__name__}: {error}")
            self.logger.error("%s failed: %s\nThe traceback is in %s", self.stage_name, result.error_message,
                              folder / "training.log")
            if not is_main_process():  # it has no log, and may be the only one that fails
                print(f"process {os.environ['RANK']}: {traceback.format_exc()}", file=sys.stderr, flush=True)
            return result
        finally:
            if model is not handed[0] and hasattr(model, "peft_config"):  # it failed: what it was handed is as it was
                model.unload()
            self.cleanup_logging()


def options_of(config: StageConfig) -> dict[str, Any]:
    """The options that decide what comes out of a stage, as JSON gives them back."""
    options = {name: value for name, value in asdict(config).items() if name not in OUTSIDE}
    return json.loads(json.dumps(options, default=str))


def identity(path: Path) -> Any:
    """What tells whether a file or the folder of a model is still the same one; None for what is not there."""
    path = path.expanduser()
    kinds = ("*.safetensors", "*config.json", "tokenizer*", "chat_template*", "vocab*", "*.model")  # not its records
    files = sorted(file for kind in kinds for file in path.glob(kind)) if path.is_dir() else [path] * path.is_file()
    if path.is_file() and path.stat().st_size < 2**24:
        return digest(path)
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files] or None


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


as_loaded = functools.cache(lambda module: digest(Path(module.__file__)))  # as it was when it was first asked for


def differences(old: Mapping, new: Mapping) -> str:
    """What is not the same in two fingerprints, in words; empty if all is."""
    said = []
    for part in new:
        if isinstance(new[part], dict):
            both = {key: (old[part].get(key), new[part].get(key)) for key in sorted({**old[part], **new[part]})}
            said += [f"{key} {before!r} -> {now!r}" if part == "options" else f"{key} changed"
                     for key, (before, now) in both.items() if before != now]
        elif (before := old.get(part)) != new[part]:
            said.append({"data": "its data changed", "start": "a stage before it changed",
                         "launch": f"processes {before} -> {new[part]}"}[part])
    return "; ".join(said)


def wait_for_everyone() -> None:
    """Until all processes are here."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState

        PartialState(cpu=default_device().type == "cpu").wait_for_everyone()


def sharded() -> bool:
    """Whether the processes hold the model in parts while they train: launched with FSDP or DeepSpeed."""
    return any(os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true" for kind in ("FSDP", "DEEPSPEED"))


def exit_on_signals() -> None:
    """SIGINT and SIGTERM end the program with status 130 and 143 (see `deferred_signals`), gloo's threads before it."""
    def leave(number, _):
        print(f"stopped by {signal.Signals(number).name}; the same command goes on", file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    atexit.register(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())


@contextlib.contextmanager
def deferred_signals():
    """Within it SIGINT and SIGTERM only come into the list that it yields, so that a loop can save first; after it the
    program ends with status 130 or 143. A second signal does not wait."""
    came: list[int] = []

    def wait(number, _):
        if came:
            sys.exit(128 + number)
        came.append(number)
        logger.warning("%s: a checkpoint is saved after this step, then the run ends; the same command goes on",
                       signal.Signals(number).name)

    mine = threading.current_thread() is threading.main_thread()  # signals come to no other
    old = {number: signal.signal(number, wait) for number in (signal.SIGINT, signal.SIGTERM) if mine}
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    if came:
        sys.exit(128 + came[0])


def is_main_process() -> bool:
    """True in the one process that writes and logs, also under `accelerate launch`."""
    return int(os.environ.get("RANK", 0)) == 0


def start_logging(level: str, path: Path | None = None) -> contextlib.ExitStack:
    """Until closed: our own tidy lines on the screen, and those and all that libraries say in the file at `path`."""
    import transformers

    stack, main, root = contextlib.ExitStack(), is_main_process(), logging.getLogger()
    handler: logging.Handler = logging.NullHandler()  # without any, Python prints what libraries warn of
    if main and path:
        with refusing(f"output_dir={path.parent} cannot be written to"):
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers = [(root, handler)]
    if main and not logger.handlers:  # within a chain the screen is set up already
        handlers.append((logger, logging.StreamHandler(sys.stdout)))
        handlers[-1][1].setLevel(level.upper())
    for target, handler in handlers:
        target.addHandler(handler)
        stack.callback(handler.close)
        stack.callback(target.removeHandler, handler)
    logger.setLevel(logging.DEBUG)
    logging.raiseExceptions = False  # a full disk is said once, by what fails
    logging.captureWarnings(True)
    stack.callback(logging.captureWarnings, False)
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.disable_progress_bar()
    return stack


# ---- Data: load, detect, convert, split, encode ----------------------------------------------------------------------
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_text(file: Path) -> list[dict]:
    """The rows of a .json, .jsonl or .csv file, texts as they stand: `datasets` would make dates of some."""
    if file.suffix == ".csv":
        csv.field_size_limit(2**31 - 1)  # an answer may be long
        with open(file, encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(itertools.dropwhile(lambda line: not line.strip(), lines), strict=True)
            for number, row in enumerate(rows := [*table], 1):
                if None in row:
                    raise ConfigError(f"data {file}: row {number} has more cells than the header; quote its commas")
            if twice := [name for name, count in Counter(table.fieldnames).items() if count > 1]:
                raise ConfigError(f"data {file}: several columns are named {twice[0]}")
            return rows
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip()[:1] != "[":  # lines; so joined, an error names the right one
        text = "[" + re.sub(r"(?<=\S)(?=\s*\n\s*\S)", ",", text) + "]"
    rows = json.loads(text, parse_constant=lambda name: None)  # NaN is no text
    if not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"data {file}: a row has to be an object, {{\"column\": value, ...}}")
    return rows


def load_dataset_from_path(path: str, config_name: str | None = None, split: str = "train"):
    """A `datasets.Dataset` from a .json, .jsonl, .csv or .parquet file, a folder of such files (or one written by
    `save_to_disk`), or a hub name. Raises ConfigError with the remedy."""
    import datasets

    datasets.disable_progress_bars()
    local = Path(path).expanduser()
    with refusing(f"data {path} cannot be read"):
        if config_name and (local.is_file() or (local / "state.json").exists()):
            raise ConfigError(f"dataset_config_name={config_name}: data {path} has no configurations; remove it")
        if local.is_file() and local.suffix not in READERS:
            raise ConfigError(f"data {path}: expected a file of type {', '.join(READERS)}")
        files = [local] if local.is_file() else sorted(  # without .ipynb_checkpoints and the like
            file for file in local.rglob("[!.]*") if file.suffix in READERS and not file.stem.startswith("dataset_info")
            and not any(part.startswith(".") for part in file.relative_to(local).parts))
        name = re.compile(r"(^|[\W_])(test|testing|valid|validation|val|dev|eval|evaluation)([\W_]|$)")
        later = [file for file in files if len(files) > 1 and name.search(str(file.relative_to(local)))]
        if files and len(later) == len(files):
            raise ConfigError(f"data {path}: by their names none of its files is for training; give one of them")
        if (local / "dataset_dict.json").exists():
            raise ConfigError(f"data {path} holds several data sets; give one's folder, such as {local / 'train'}")
        if (local / "state.json").exists():
            dataset = datasets.load_from_disk(str(local))
        elif len(kinds := {READERS[file.suffix] for file in files}) > 1:
            raise ConfigError(f"data {path} has files of several types ({', '.join(sorted(kinds))}); keep one of them")
        elif files and "parquet" not in kinds and not config_name:
            rows = [row for file in files if file not in later for row in read_text(file)]
            names = dict.fromkeys(name for row in rows for name in row)
            columns = {name: [row.get(name) for row in rows] for name in names}
            dataset = datasets.Dataset.from_dict(columns, on_mixed_types="use_json")
            mixed = {name: datasets.Json() for name in names if {int, float} <= {*map(type, columns[name])}}
            if mixed:  # 7 stays 7 beside 7.5
                dataset = datasets.Dataset.from_dict(columns, datasets.Features(dataset.features | mixed))
        elif files and not config_name and split == "train":
            read = [glob.escape(str(file)) for file in files if file not in later]
            dataset = datasets.load_dataset("parquet", data_files=read, split="train")
        elif local.is_dir() or hub_answers("data", path):
            dataset = datasets.load_dataset(str(local) if local.is_dir() else path, config_name, split=split)
        else:
            raise ConfigError(f"data {path}: no such file or folder here, and the hub cannot be reached")
        if later:
            logger.warning("data %s: not read, by name not for training: %s", path, ", ".join(f.name for f in later))
    if not len(dataset):
        raise ConfigError(f"data {path} has no rows")
    return dataset


def hub_answers(kind: str, name: str) -> bool:
    """Whether the hub can be reached (its client would retry for half a minute). Refuses what can only be a path."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in (*READERS, ".gguf", ".txt"):
        raise ConfigError(f"{kind} {name}: no such file or folder")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return False
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5).close()
    except OSError as error:
        return hasattr(error, "code")  # an HTTPError has one: it is an answer
    return True


def detect_format(columns: Sequence[str], formats: Mapping[str, Sequence[str]], wanted: str = "auto") -> str:
    """The name of the one format among `formats` (name -> required columns) whose columns are all there; of several,
    one that contains the others. Raises ConfigError with the columns found and the formats known, never guesses."""
    if wanted != "auto" and not set(formats[wanted]) <= set(columns):
        raise ConfigError(f"dataset_format={wanted} needs {', '.join(formats[wanted])}; found {', '.join(columns)}")
    fitting = [name for name, needs in formats.items() if set(needs) <= set(columns) and wanted in ("auto", name)]
    fitting = [a for a in fitting if not any(set(formats[a]) < set(formats[b]) for b in fitting)]
    # A column `text` beside others is the same row once more, already rendered.
    fitting = [name for name in fitting if name != "text"] or fitting
    if len(fitting) > 1:
        raise ConfigError(f"the columns {', '.join(columns)} fit {' and '.join(fitting)}; choose by dataset_format")
    if not fitting:
        known = "; ".join(f"{name} ({', '.join(needs)})" for name, needs in formats.items())
        raise ConfigError(f"unknown data format: the columns are {', '.join(columns)}. Known: {known}")
    return fitting[0]


say_once = functools.cache(logger.warning)
SPEAKERS = {"human": "user", "gpt": "assistant", **{role: role for role in ("user", "assistant", "system", "tool")}}


def as_messages(value, role: str) -> list[dict]:
    """A text, one message, or a list of them ({"role", "content"} or {"from", "value"}), as a list of messages."""
    value = {"role": role, "content": str(value)} if isinstance(value, str | int | float) else value
    turns = [value] if isinstance(value, dict) else value or [{}]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("that has neither a text nor a list of messages")
    unused = {key for turn in turns for key, said in turn.items() if said not in (None, "", [], {})}
    if unused := unused - {"role", "content", "from", "value"}:
        say_once(f"of messages only role and content are read, not {', '.join(sorted(unused))}")
    turns = [(turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")) for turn in turns]
    if not all(isinstance(text, str) and text.strip() for _, text in turns):
        raise RowError("with an empty or missing text")
    if strangers := {str(speaker) for speaker, _ in turns} - {*SPEAKERS}:
        raise RowError(f"with an unknown speaker ({', '.join(sorted(strangers))})")
    return [{"role": SPEAKERS[speaker], "content": text} for speaker, text in turns]


def usable_rows(rows: Iterable, convert: Callable, what: str, say: bool = True) -> list:
    """`[convert(row) for row in rows]` without the rows for which it raises RowError: those are counted, and the
    counts said if `say`. Raises ConfigError when they are the majority, or nothing is there."""
    kept, reasons = [], Counter()
    for row in rows:
        try:
            kept.append(convert(row))
        except RowError as error:
            reasons[str(error)] += 1
    said = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    if len(kept) < max(1, reasons.total()):
        raise ConfigError(f"{what}: {len(kept) or 'no'} usable rows ({said or 'it is empty'})")
    if reasons and say:
        logger.warning("%s: %d of %d rows left out: %s", what, reasons.total(), reasons.total() + len(kept), said)
    return kept


def split_dataset(rows: Sequence, validation_split: float, seed: int) -> tuple[list, list]:
    """(training rows, evaluation rows), shuffled by `seed`; `validation_split` is the share held out, at most, and at
    least the rows of one prompt. Those that ask the same (a "prompt", a "question", a conversation up to its end) stay
    on one side; if all do, equal rows."""
    dump, groups = functools.partial(json.dumps, sort_keys=True, default=str), {}
    asked = lambda row: row.get("prompt", row.get("question", row)) if isinstance(row, dict) else row
    keys = [dump(row[:-1] if isinstance(row, list) else asked(row)) for row in rows]
    for key, row in zip(keys if len({*keys}) > 1 else map(dump, rows), rows):
        groups.setdefault(key, []).append(row)
    members = list(groups.values())
    training, evaluation, wanted = [], [], math.ceil(len(rows) * validation_split)
    wanted = wanted and max(wanted, min(map(len, members)))
    for group in torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist():
        fits = len(evaluation) + len(members[group]) <= wanted
        (evaluation if fits else training).extend(members[group])
    return training, evaluation


def read_rows(config: DataConfig, convert: Callable, optional: Mapping[str, Sequence[str]] | None = {}) -> tuple:
    """(rows, what was found) of the configured data set, each as `convert(row, format)` makes it. Columns are reported;
    besides the format's own, only its `optional` ones are used, or all if that is None."""
    dataset = load_dataset_from_path(path := getattr(config, config.aliases["data"]), config.dataset_config_name)
    form = detect_format(dataset.column_names, config.formats, config.dataset_format)
    known = dataset.column_names if optional is None else [*config.formats[form], *optional.get(form, ())]
    used, ignored = (", ".join(c for c in dataset.column_names if (c in known) is use) for use in (True, False))
    note, say = (f" (not used: {ignored})", logger.warning) if ignored else ("", logger.info)
    say("data %s: %s, %d rows: %s%s", path, form, len(dataset), used, note)
    rows = usable_rows(dataset, lambda row: convert(row, form), "data")
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
    return rows, {"path": path, "format": form, "rows": len(rows), "sha256": digest}


def load_rows(config, convert: Callable, optional: Mapping[str, Sequence[str]] | None = {}) -> tuple:
    """(training rows, evaluation rows, what was found): `read_rows`, split as `validation_split` says."""
    rows, found = read_rows(config, convert, optional)
    training, evaluation = split_dataset(rows, config.validation_split, config.seed)
    if not training:
        raise ConfigError(f"data {found['path']}: validation_split={config.validation_split} leaves no row to train on")
    return training, evaluation, found


def prepare_tokenizer(tokenizer, config: ModelConfig, needs_chat_template: bool = True) -> None:
    """Set the pad token, and the chat template that `instruction_template` describes, for all that comes after."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: our batches mask by length, never by token
    if config.instruction_template:
        tokenizer.chat_template = as_chat_template(config.instruction_template, tokenizer)
    if needs_chat_template and not tokenizer.chat_template:
        example = r"--instruction_template='### Instruction:\n{instruction}\n\n### Response:\n{response}'"
        raise ConfigError(f"{config.model_name_or_path} has no chat template; say how a prompt is written, for example "
                          f"{example}, or start from an instruction-tuned model")


def as_chat_template(text: str, tokenizer) -> str:
    """The Jinja chat template of an instruction template with the fields {instruction}, {input} and {response}."""
    text = text.replace("\\n", "\n")  # a shell hands \n over as two characters
    prompt, _, after = text.partition("{response}")
    # A space before the answer is tokenized with its first word, so the model has to write it.
    space, prompt = " " * (len(prompt) - len(prompt.rstrip(" "))), prompt.rstrip(" ")
    if "{instruction}" not in prompt:
        raise ConfigError("instruction_template: {instruction} is missing, or stands after {response}")
    places = [re.findall(r"\{\w+\}", part) for part in (prompt, after)]
    if strange := {*places[0]} - {"{instruction}", "{input}"} | {*places[1]}:
        say_once(f"instruction_template: {', '.join(sorted(strange))} is text there; its places are {{instruction}}, "
                 "{input} and, once and after them, {response}")
    value = {"{instruction}": "{{ message['content'] }}", "{input}": "{{ message['input'] }}"}
    quoted = lambda text: "{{ " + json.dumps(text, ensure_ascii=False) + " }}"
    parts = [part for part in re.split(r"(\{instruction\}|\{input\})", prompt) if part]
    bos = tokenizer.bos_token_id in tokenizer("a").input_ids  # the tokenizer puts it before every text
    return "".join([
        "{{ bos_token }}" if bos else "", "{% for message in messages %}{% if message['role'] == 'assistant' %}",
        quoted(space), value["{instruction}"], quoted(after), "{{ eos_token }}",
        "{% elif message['role'] == 'system' %}", value["{instruction}"], quoted("\n\n"),
        "{% else %}", *(value.get(part) or quoted(part) for part in parts), "{% endif %}{% endfor %}",
    ])


@functools.cache
def training_template(tokenizer, template: str) -> str:
    """The tokenizer's own chat template, `template`, where it leaves earlier turns as they are when later ones follow;
    else TRL's version of it, which does."""
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    two, four = (tokenizer.apply_chat_template(turns[:n], tokenize=False) for n in (2, 4))
    if four.startswith(two):
        return template
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer) or template
    except ValueError as error:
        raise ConfigError(f"the chat template changes earlier turns; give instruction_template ({error})") from None


def render_turns(tokenizer, messages: list[dict]) -> list[tuple[str, bool]]:
    """The conversation as the model sees it, in pieces (text, is_target). Targets are what the assistant has to write,
    up to and including the stop token, which is appended where the template has none."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    stop = re.compile(f"(?:{'|'.join(map(re.escape, {*special, tokenizer.eos_token}))})(?=\\s*$)")
    template = training_template(tokenizer, tokenizer.chat_template)
    squeeze = lambda text: "".join(text.split())

    def render(turns: list[dict], prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template,
                                                 add_generation_prompt=prompt)
        except Exception as error:  # of Jinja: a template may refuse what it does not know
            raise RowError(f"which the chat template refuses: {error}") from error

    pieces, done = [], ""
    for index in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        if not index:
            raise RowError("that begins with the assistant")
        prompt, answered = render(messages[:index], True), render(messages[: index + 1], False)
        if not answered.startswith(prompt):
            raise RowError("which the chat template renders without its generation prompt")
        if not prompt.startswith(done):
            raise RowError("whose earlier turns the chat template changes; instruction_template would leave them")
        found = stop.search(answered, len(prompt))
        end = found.end() if found else len(answered)
        target = answered[len(prompt) : end] + ("" if found else tokenizer.eos_token)
        before, whole = answered[: found.start() if found else end], squeeze(messages[index]["content"])
        if before[len(prompt) :].strip() and whole not in squeeze(answered[len(prompt) : end]) and not (
                squeeze(before).endswith(whole)):  # the generation prompt may begin the answer, with <think>
            raise RowError("of whose answer the chat template leaves a part out")
        pieces += [(prompt[len(done) :], False), (target, True), (answered[end:], False)]
        done = answered
    return pieces


def encode_turns(tokenizer, pieces: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of the pieces as one text that ends with the last target; labels are IGNORE elsewhere."""
    last = max((number for number, (_, target) in enumerate(pieces) if target), default=-1)
    if last < 0:
        raise RowError("without an answer")
    pieces = pieces[: last + 1]
    encoded = tokenizer("".join(p for p, _ in pieces), add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets, labels, end = encoded["input_ids"], encoded["offset_mapping"], [], 0
    for piece, target in pieces:
        end += len(piece)
        while len(labels) < len(ids) and offsets[len(labels)][0] < end:
            if offsets[len(labels)][1] > end:  # after this prompt the model could never begin so
                raise RowError("whose answer begins inside a token of the prompt")
            labels.append(ids[len(labels)] if target else IGNORE)
    return ids, labels


# ---- Checks: what can be seen before the first step, without the model's weights ------------------------------------
SEEN = 2000  # rows of a stage that are encoded for a look
TROUBLES = {
    "silent": "none of its tokens would be learnt; the chat template leaves the answer out",
    "unstopped": "its answer does not end in a token that ends a turn, so the model would never stop",
    "doubled": "it begins with the token that begins a text twice; take one out of the chat template or the data",
    "moved": "its prompt has other tokens alone than before an answer, so the model would never meet what it learnt; "
             "let the template's prompt end in a special token or a line break",
    "beyond": "it is longer than the model's context of {context} tokens; with max_seq_length={context} such rows are "
              "left out, or cut, and counted",
    "leaked": "it is trained on too, so its figures would flatter; remove one of the two",
}


def trouble(tokenizer, stops: Sequence[int], sequences: Sequence[tuple], cut: bool, context: int, chat: bool) -> str:
    """Which of TROUBLES a row has, whose sequences are (input_ids, labels, or None where nothing is imitated). What no
    prompt precedes is no `chat`: a piece of it may begin and end anywhere."""
    if any(ids[:2] == [tokenizer.bos_token_id] * 2 for ids, _ in sequences):
        return "doubled"
    if max(len(ids) for ids, _ in sequences) > context:
        return "beyond"
    for ids, labels in sequences if chat else ():
        learnt = [t for t, label in enumerate(labels or ()) if label != IGNORE]
        if labels and not {ids[t] for t in learnt} - {*stops}:
            return "silent"
        text = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        again = lambda ids: tokenizer(text(ids), add_special_tokens=False).input_ids
        if learnt and not cut and again(ids) == ids and again(ids[: learnt[0]]) != ids[: learnt[0]]:
            return "moved"
    ids, labels = sequences[-1]
    return "unstopped" if chat and labels and not cut and labels[-1] not in stops else ""


def look(stage: BaseStage, tokenizer, context: int, say: bool = False) -> SimpleNamespace | None:
    """Encode the first rows of a checked stage as its training will: the tokens of each, how many lose something, an
    example. None for a stage that does not say what it makes of a row. Raises ConfigError, with the remedy, for what
    would teach nothing, or other than it should. `say`: how many are left out, as the training will."""
    tokenizer = tokenizer if stage.hands_on else copy.deepcopy(tokenizer)  # its template is not for the next stage
    prepare_tokenizer(tokenizer, stage.config, chat := stage.needs_chat_template)
    found, stops = SimpleNamespace(lengths=[], cut=0, whole=0, example=None, keys=set()), stop_tokens(tokenizer)
    for side, rows in zip(("training", "evaluation"), stage.data or ()):
        make = lambda row: (row, stage.sequences(row, tokenizer, context))
        for row, made in usable_rows(rows[:SEEN], make, f"{side} data", say) if rows else ():
            if made is None:
                return None
            sequences, cut = made
            keys = {hash(tuple(ids)) for ids, _ in sequences} if chat and not cut else {str(row)}
            leaked = side == "evaluation" and keys & found.keys
            if wrong := "leaked" if leaked else trouble(tokenizer, stops, sequences, cut, context, chat):
                raise ConfigError(f"a row of the {side} data: {TROUBLES[wrong].format(context=context)}. The row: "
                                  f"{tokenizer.decode(sequences[0][0])[:200]!r}")
            if side == "training":
                found.keys |= keys
                found.lengths.append(max(len(ids) for ids, _ in sequences))
                found.cut += cut
                found.whole += any(labels and labels[-1] in stops for _, labels in sequences)
                found.example = found.example or sequences[0]
    if (share := found.cut / (len(found.lengths) or 1)) > 0.1:
        limits = ("max_seq_length", "max_prompt_length")
        given = [f"{name}={limit}" for name in limits if (limit := vars(stage.config).get(name))]
        said = f"{100 * share:.0f}% of the training rows are cut at {' or '.join(given)}"
        if not found.whole:
            raise ConfigError(f"{said}, so that none ends in a token that ends a turn; raise it")
        logger.warning("%s", said)
    return found


def coloured(tokenizer, ids: Sequence[int], labels: Sequence[int] | None) -> str:
    """The text of a sequence, what is learnt of it in green, or between marks where the screen has no colours."""
    before, after = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    parts = itertools.groupby(range(len(ids)), lambda t: bool(labels) and labels[t] != IGNORE)
    texts = ((learnt, tokenizer.decode([ids[t] for t in places])) for learnt, places in parts)
    return "".join(f"{before}{text}{after}" if learnt else text for learnt, text in texts)


def describe(stage: BaseStage, tokenizer, shape) -> tuple[list[str], float]:
    """(lines on what a checked stage will do: options, data, an example, estimates; bytes it will write). `shape` is
    the model without its weights, on the meta device."""
    config, standard = stage.config, type(stage.config)()
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("output_dir", "stage_name")}
    changed = (f"{name}={value}" for name, value in own.items() if value != getattr(standard, name))
    lines = ["options     " + (", ".join(changed) or "the defaults")]
    lines += [f"{kind:11} {stage.lineage[kind]}" for kind in ("reference", "judge", "teacher") if kind in stage.lineage]
    if data := stage.lineage.get("data"):
        lines.append(f"data        {data['path']}: {data['rows']} rows, {len(stage.data[0])} to train on and "
                     f"{len(stage.data[1])} to evaluate on; format {data['format']}, since it has the columns "
                     f"{', '.join(config.formats[data['format']])}")
    found = look(stage, tokenizer, shape.config.max_position_embeddings, say=True)
    if not found or not found.lengths:
        return lines, 0.0
    quantile = sorted(found.lengths)
    at = lambda share: quantile[min(len(quantile) - 1, int(share * len(quantile)))]
    lines.append(f"tokens      a row: {at(0)} shortest, {at(0.5)} median, {at(0.9)} ninth decile, {at(0.99)} of 99%, "
                 f"{at(1)} longest; {100 * found.cut / len(quantile):.1f}% are cut")
    lines.append("example     " + coloured(tokenizer, *found.example).replace("\n", "\n            "))
    more, size = estimate(stage, shape, found.lengths) if isinstance(config, TrainingConfig) else ([], 0.0)
    return lines + more, size


def estimate(stage: BaseStage, shape, lengths: Sequence[int]) -> tuple[list[str], float]:
    """(lines on time, memory and disk, each with the figures behind it; bytes to be written), from the number of
    parameters, the rows' lengths, and the speed of a matrix product measured here."""
    config, weights = stage.config, shape.num_parameters()
    linear = [m for m in shape.modules() if isinstance(m, torch.nn.Linear) and m is not shape.get_output_embeddings()]
    trained = sum(config.lora_r * (m.in_features + m.out_features) for m in linear) if config.lora_r else weights
    steps, tokens, passes, rows = stage.work(lengths)
    dtype = compute_dtype(config.torch_dtype)
    speed, work, size = matmul_speed(dtype), 2 * weights * tokens * passes, dtype.itemsize
    stored = {True: 0.6, False: 1 if config.use_8bit else weight_dtype(config).itemsize}[config.use_4bit]
    model, states = weights * stored / 1e9, 12 * trained / 1e9
    wide, vocabulary, layers = shape.config.hidden_size, shape.config.vocab_size, shape.config.num_hidden_layers
    kept = wide * layers * (30 - 28 / (config.gradient_checkpointing or math.inf)) + vocabulary  # a token, about
    activations = rows * max(lengths) * kept * size / 1e9
    keeps = vars(config).get("save_steps", vars(config).get("save_freq"))
    disk = 4 * weights + 4 * trained + (12 * trained * (config.save_total_limit + 1) if keeps and keeps < steps else 0)
    return [
        f"time        about {work / (0.4 * speed) / 60:.1f} minutes: {steps} steps, {tokens / 1e3:,.0f} thousand "
        f"tokens, {passes:g} passes, {weights / 1e6:,.0f} million weights: {work / 1e12:,.0f} TFLOP at 40% of the "
        f"{speed / 1e9:,.0f} GFLOP/s measured here",
        f"memory      about {model + states + activations:.1f} GB: weights {model:.1f}, gradients and optimizer of "
        f"{trained / 1e6:,.1f} million that train {states:.1f}, activations of {rows} rows of {max(lengths)} tokens "
        f"{activations:.1f}",
        f"disk        about {disk / 1e9:.1f} GB: the model in float32, the adapter, up to {config.save_total_limit} "
        "checkpoints",
    ], float(disk)


@functools.cache
def matmul_speed(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here, on as many threads as training has."""
    from torch.utils.benchmark import Timer

    a = torch.randn(n := 1024 if default_device().type == "cpu" else 4096, n, device=default_device(), dtype=dtype)
    return 2 * n**3 / Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads()).timeit(12).mean


def check_disk(folder: str, needed: float) -> None:
    """Refuse a run for which the disk has no room; raises ConfigError."""
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise ConfigError(f"output_dir={folder}: the disk has {free / 1e9:.1f} GB left, and about {needed / 1e9:.1f} "
                          "GB will be written; make room, save fewer checkpoints, or take another disk")


def skeleton(config: ModelConfig) -> tuple:
    """(tokenizer, model on the meta device): all but the weights."""
    from transformers import AutoModelForCausalLM

    tokenizer, shape = load_tokenizer(config)
    with torch.device("meta"):
        return tokenizer, AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code)


# ---- Model: load, quantize, adapter, merge ---------------------------------------------------------------------------
def default_device() -> torch.device:
    """This process's GPU, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def peak_memory() -> dict[str, float]:
    """{"peak_gb": the most that this process has held}, of a GPU if there is one; {} on Windows, which does not say."""
    if torch.cuda.is_available():
        return {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
    if importlib.util.find_spec("resource") is None:
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)}


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of a Precision here: by default the fast one of the GPU, and float32 on CPU and MPS."""
    if precision == "auto" and torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32 if precision == "auto" else getattr(torch, precision)


def weight_dtype(config: ModelConfig) -> torch.dtype:
    """Frozen weights lie in the compute dtype; weights that train lie in float32 under autocast, since small updates
    vanish in 16 bits, unless a torch_dtype is asked for by name."""
    all_train = isinstance(config, TrainingConfig) and not config.lora_r
    return compute_dtype("float32" if config.torch_dtype == "auto" and all_train else config.torch_dtype)


def cast(model, dtype: torch.dtype):
    """`model` with all weights in `dtype`; buffers, such as rotary frequencies, stay as precise as they are."""
    if not all(weight.is_floating_point() for weight in model.parameters()):
        raise ConfigError("a quantized model cannot be handed over; give its folder, and use_4bit or use_8bit")
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


@contextlib.contextmanager
def written_aside(folder: Path):
    """A folder beside `folder` that takes its place when the block ends without an error."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        yield aside
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def cached(kind: str, files: Sequence[Path], build: Callable[[Path], None] | None, how: str = "") -> Path | None:
    """A folder that `build(folder)` fills once for the content of `files`; without `build` None where it is not."""
    content = hashlib.sha256(b"".join(bytes.fromhex(digest(file)) for file in files) + how.encode()).hexdigest()
    folder = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "recipes" / kind / content[:32]
    if not folder.exists():
        if build is None:
            return None
        logger.info("%s %s once, kept in %s", kind, files[0].name, str(folder).replace(str(Path.home()), "~"))
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            with written_aside(folder) as aside:
                build(aside)
        while not folder.exists():  # one process of a machine builds; a barrier would time out
            time.sleep(1)
    return folder


def find_model(name: str, config: ModelConfig, weights: bool = True) -> Path:
    """The folder of a model: as named, downloaded from the hub, or converted from a .gguf file, also of an installed
    package. Without `weights` none are converted or downloaded. Raises ConfigError when there is no such model."""
    from huggingface_hub import snapshot_download

    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        spec = importlib.util.find_spec(path.parts[0]) if path.parts[0].isidentifier() else None
        homes = spec.submodule_search_locations or [] if spec else []
        found = [file for file in (path, *(Path(home, *path.parts[1:]) for home in homes)) if file.is_file()]
        if found:
            build = lambda folder: convert_gguf(found[0], folder)
            return cached("converting", found[:1], build if weights else None) or found[0]
    if path.exists():
        if path.is_dir() and not config.revision:
            return path
        wrong = "is a file; give its folder" if path.is_file() else "is a folder, and revision goes with a hub name"
        raise ConfigError(f"model {name} {wrong}")
    files = ["*.json", "*.jinja", "*.model", "*.txt"] + ["model*.safetensors", "adapter_model.safetensors"] * weights
    files += ["*.py"] if config.trust_remote_code else []
    ask: dict[str, Any] = {"revision": config.revision, "token": config.use_auth_token or None, "allow_patterns": files}
    online = hub_answers("model", name)
    with refusing(f"model {name}: no such folder, and {'the hub says' if online else 'the hub cannot be reached'}"):
        return Path(snapshot_download(name, local_files_only=not online, **ask))


def check_model(name: str | None) -> None:
    """Refuse another model than the stage's own that is not there; stage:NAME is not there yet."""
    if name and not name.startswith("stage:"):
        find_model(name, ModelConfig(model_name_or_path=name), weights=False)


def find_parts(config: ModelConfig, weights: bool = True) -> tuple[Path, Path | None, Path]:
    """(model, adapter on it or None, tokenizer) of `model_name_or_path`: where they lie, as `find_model` says."""
    folder = find_model(config.model_name_or_path, config, weights)
    if not (folder / "adapter_config.json").exists():
        return folder, None, folder
    with refusing(f"model {config.model_name_or_path} cannot be loaded"):
        name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        base = find_model(name, replace(config, revision=None), weights)
    return base, folder, folder if (folder / "tokenizer_config.json").exists() else base


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as float32 safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its progress bars
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    del model.config.quantization_config  # the weights are plain by now; save_pretrained goes by this field
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_tokenizer(config: ModelConfig) -> tuple:
    """(tokenizer, configuration) of `model_name_or_path`, both as they lie there; no weights are read."""
    from transformers import AutoConfig, AutoTokenizer

    base, _, words = find_parts(config, weights=False)
    with refusing(f"model {config.model_name_or_path} cannot be loaded"):
        def load(auto, path: Path):
            where, more = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
            return auto.from_pretrained(where, trust_remote_code=config.trust_remote_code, **more)

        return load(AutoTokenizer, words), load(AutoConfig, base)


def load_model_and_tokenizer(config: ModelConfig, needs_chat_template: bool = True, task: str = "CAUSAL_LM"):
    """(model, tokenizer) of `model_name_or_path`, quantized if asked for; an adapter is merged into its base. The
    tokenizer comes first, so that a missing chat template is said before weights are read."""
    import transformers
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    code, scores = {"trust_remote_code": config.trust_remote_code}, task == "SEQ_CLS"

    def load(base: Path, adapter: Path | None = None, task: str = task, **quantized):
        rest = {"dtype": weight_dtype(config), "attn_implementation": config.attn_implementation, **code, **quantized}
        auto: Any = transformers.AutoModelForCausalLM
        if task == "SEQ_CLS":
            auto, rest = transformers.AutoModelForSequenceClassification, rest | {"num_labels": 1}
        model = auto.from_pretrained(base, use_safetensors=True, **rest)
        return PeftModel.from_pretrained(model, adapter).merge_and_unload() if adapter else model

    base, adapter, _ = find_parts(config)
    tokenizer, shape = load_tokenizer(config)
    kind = json.loads((adapter / "adapter_config.json").read_text()).get("task_type") if adapter else task
    classifies = any(name.endswith("ForSequenceClassification") for name in shape.architectures or ())
    if not scores and (classifies or kind == "SEQ_CLS"):  # as weights, or as an adapter
        raise ConfigError(f"model {config.model_name_or_path} gives scores and writes nothing; give a language model")
    prepare_tokenizer(tokenizer, config, needs_chat_template)
    with refusing(f"model {config.model_name_or_path} cannot be loaded"):
        if adapter and (config.quantized or scores):  # they cannot take a merge, it has its own kind of model
            parts = [*sorted(base.glob("*.safetensors")), *sorted(adapter.glob("adapter_*"))]
            merge = functools.partial(load, base, adapter, kind)
            how = f"{kind} {weight_dtype(config)}"
            base, adapter = cached("merging", parts, lambda folder: merge().save_pretrained(folder), how), None
        if not config.quantized:
            return load(base, adapter).to(default_device()), tokenizer
        precision = config.torch_dtype if config.bnb_4bit_compute_dtype == "auto" else config.bnb_4bit_compute_dtype
        model = load(base, device_map={"": default_device()}, quantization_config=BitsAndBytesConfig(
            load_in_4bit=config.use_4bit, load_in_8bit=config.use_8bit, bnb_4bit_quant_type=config.bnb_4bit_quant_type,
            bnb_4bit_compute_dtype=compute_dtype(precision),
            bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
            llm_int8_skip_modules=["score"] if scores else None,  # the head trains whole, so it stays as it is
        ))
    for module in model.modules():
        # On some CPUs an evaluation repacks 4-bit weights: then no gradient passes, and dequantizing gives noise.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        # On a CPU 8-bit weights are multiplied otherwise in training than in evaluation; what is merged is the former.
        if type(module).__name__ == "Linear8bitLt" and default_device().type == "cpu":
            module.train = lambda mode=True, module=module: module
    return model, tokenizer


def add_adapter(model, config: TrainingConfig, task: str = "CAUSAL_LM"):
    """`model` under a fresh adapter that alone trains, or `model` itself with all weights trainable if lora_r is 0."""
    if not config.lora_r:
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    targets, everywhere = config.lora_target_modules, config.lora_target_modules in ([], ["all-linear"])
    linear = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if not everywhere and not set(targets) <= linear:
        raise ConfigError(f"lora_target_modules={','.join(targets)}: the model's are {', '.join(sorted(linear))}")
    if config.quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, LoraConfig(
        task_type=task, r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        target_modules="all-linear" if everywhere else targets, bias=config.lora_bias,
        use_dora=config.use_dora, use_rslora=config.use_rslora,
    ))


def merge_adapter(model):
    """The plain model with its adapter merged, all weights trainable again. A quantized base is dequantized first:
    rounding after the merge would undo much of what the adapter learnt."""
    if not hasattr(model, "peft_config"):
        return model
    if hasattr(model.get_base_model(), "hf_quantizer"):
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        adapter, lora = get_peft_model_state_dict(model), model.peft_config["default"]
        base = model.unload().dequantize()
        base.is_loaded_in_4bit = base.is_loaded_in_8bit = False  # dequantize() leaves the mark on
        cast(base, next(part for part in base.modules() if isinstance(part, torch.nn.Linear)).weight.dtype)
        model = get_peft_model(base, lora)
        set_peft_model_state_dict(model, adapter)
    return model.merge_and_unload().requires_grad_(True)


def stop_tokens(tokenizer) -> list[int]:
    """The tokenizer's eos, and the token that ends a turn of the chat template, which need not be the same."""
    stops = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        with refusing("the chat template cannot be learnt, give instruction_template instead: every turn is one"):
            stops.add(encode_turns(tokenizer, render_turns(tokenizer, turn))[0][-1])
    return sorted(stops)


def prompt_ids(tokenizer, prompt: list[dict]) -> list[int]:
    """The token ids of a conversation up to where the assistant begins to write."""
    *before, _, _ = render_turns(tokenizer, [*prompt, {"role": "assistant", "content": "a"}])
    return tokenizer("".join(text for text, _ in before), add_special_tokens=False).input_ids


# ---- Sampling: our own loop, since generate() is a third as fast on a CPU and keeps no log-probabilities -------------
RECORDING = {"cuda"}  # devices on which a step of sampling is recorded, and replayed for all tokens
SAMPLING = {"max_new_tokens": 64, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def check_sampling(name: str, sampling: Mapping[str, Any]) -> None:
    """Refuse what the option `name` says of SAMPLING if it makes no sense."""
    if strange := {*sampling} - {*SAMPLING}:
        raise ConfigError(f"{name}: " + unknown("option", min(strange), SAMPLING))
    values = SAMPLING | dict(sampling)
    for count in ("max_new_tokens", "top_k"):
        if not isinstance(values[count], int) or values[count] < (count == "max_new_tokens"):
            raise ConfigError(f"{name}: {count}={values[count]!r} is not a count")
    numbers = all(isinstance(values[number], (int, float)) for number in ("temperature", "top_p"))
    if not numbers or values["temperature"] <= 0 or not 0 < values["top_p"] <= 1:
        raise ConfigError(f"{name}: temperature is a number above 0, top_p in (0, 1]: no choice without chance")


@contextlib.contextmanager
def fast_decoding(model):
    """On a CPU, lie the weights column by column while tokens are sampled, with the adapter merged in: few rows times
    such weights is three times as fast. The weights come back bitwise."""
    from peft.tuners.lora import LoraLayer

    if model.device.type != "cpu" or {weight.dtype for weight in model.parameters()} != {torch.float32}:
        yield
        return
    lora = [module for module in model.modules() if isinstance(module, LoraLayer)]
    plain = bool(lora) and not any(module.use_dora.get("default") for module in lora)
    bases = [module.get_base_layer() for module in lora]
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    kept = {layer.weight: layer.weight.data for layer in (*bases, *linear)}
    with model.disable_adapter() if plain else contextlib.nullcontext():
        for base, module in zip(bases, lora) if plain else ():
            base.weight.data = base.weight.data + module.get_delta_weight("default")
        for weight in kept:
            weight.data = weight.data.t().contiguous().t()
        try:
            yield
        finally:
            for weight, data in kept.items():
                weight.data = data


def with_room(model, cache, repeats: int, room: int, at: torch.Tensor) -> bool | None:
    """Lay out the key-value cache with each row `repeats` times and room for so many tokens, the next at `at` (1,): one
    that grows is copied whole at every token. Returns whether attention sees the room; None if there is none."""
    from transformers.cache_utils import DynamicLayer

    whole = model.device.type in RECORDING  # so that no step changes a shape

    class Roomy(DynamicLayer):
        def __init__(self, *states):
            super().__init__()
            self.is_initialized = True
            self.keys, self.values = (F.pad(state, (0, 0, 0, room)).repeat_interleave(repeats, 0) for state in states)

        def update(self, *states, **_):
            both = self.keys, self.values
            for part, state in zip(both, states):
                part.index_copy_(2, at, state)
            return both if whole else tuple(part[:, :, : at + 1] for part in both)

    ours = model.config._attn_implementation in ("sdpa", "eager") and "rope_parameters" in model.config.to_dict()
    if not ours or not all(type(layer) is DynamicLayer for layer in cache.layers):
        return cache.batch_repeat_interleave(repeats)
    cache.layers = [Roomy(layer.keys, layer.values) for layer in cache.layers]
    return whole


def replayed(step: Callable[[], torch.Tensor], recorded: bool):
    """What `step()` gives, again and again; `recorded`: by a CUDA graph from the second time on, unless it waits for a
    value. To launch its operations one by one takes ten times as long as a GPU works at them."""
    result = graph = None
    if recorded:
        torch.cuda.set_sync_debug_mode("error")
        with contextlib.suppress(RuntimeError):
            result, graph = step(), torch.cuda.CUDAGraph()
        torch.cuda.set_sync_debug_mode("default")
    while graph is None:
        yield step()
    yield result
    with torch.cuda.graph(graph):
        result = step()
    while True:
        graph.replay()
        yield result


def draw(logits: torch.Tensor, chance: torch.Tensor | None, sampling: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens (B,), their log-probabilities (B,)) from logits (B, V): where the cumulative distribution passes `chance`
    (B,) in (0, 1], or the likeliest if that is None. The log-probabilities know the temperature, as those of training
    do, but not top_k and top_p."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = logits.float() / sampling["temperature"]
    chances = logits.softmax(-1)
    if chance is None:
        tokens = logits.argmax(-1)
    else:
        kept = chances
        if sampling["top_k"] or sampling["top_p"] < 1:
            logits = TopKLogitsWarper(sampling["top_k"])(None, logits) if sampling["top_k"] else logits
            kept = TopPLogitsWarper(sampling["top_p"])(None, logits).softmax(-1)
        cumulative = kept.cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(cumulative, chance[:, None].double() * cumulative[:, -1:])[:, 0]
    return tokens, chances.gather(1, tokens[:, None])[:, 0].log()


def random_numbers(count: int, sampling: Mapping, seed: int) -> torch.Tensor:
    """(count, T) uniform in (0, 1], for `draw`: a function of the seed, not of how completions fall into batches."""
    return 1 - torch.rand(count, sampling["max_new_tokens"], generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(model, tokenizer, prompts: Sequence[list[int]], sampling: Mapping, chances: torch.Tensor | None = None,
           repeats: int = 1) -> tuple[list[list[int]], list[list[float]]]:
    """Completions of prompts (token ids, up to and including a stop token), and their tokens' log-probabilities:
    `repeats` for each prompt, one after the other, by chances (P repeats, T), or greedy if there are none. A prompt is
    read once for all its completions, and those that have stopped leave the batch."""
    from transformers import DynamicCache

    device, steps, width = model.device, sampling["max_new_tokens"], max(map(len, prompts))
    pad = lambda rows, value: torch.tensor([[value] * (width - len(row)) + row for row in rows], device=device)
    ids, mask = pad(prompts, tokenizer.pad_token_id), pad([[1] * len(prompt) for prompt in prompts], 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # padding on the left does not count (Huang et al. 2024)
    stops = torch.tensor(stop_tokens(tokenizer), device=device)
    completions, sampled = ([[] for _ in range(len(prompts) * repeats)] for _ in range(2))
    with contextlib.ExitStack() as after, fast_decoding(model):
        after.callback(model.train, model.training)
        model.eval()  # in training, layers with dropout are noise and checkpointed ones keep no cache
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1,
                       past_key_values=DynamicCache(config=model.config))
        at, cache = torch.tensor([width], device=device), output.past_key_values  # where the next token goes
        fixed = with_room(model, cache, repeats, steps, at)
        mask = F.pad(mask, (0, steps), value=not fixed)  # (P, W + T)
        mask = mask if fixed is None else attend(model, mask[:, None, None] > 0)
        state = (output.logits[:, -1], positions[:, -1:] + 1, mask)
        logits, position, mask = (tensor.repeat_interleave(repeats, 0) for tensor in state)
        rows = torch.arange(len(logits), device=device)  # the completions that are still being written
        running, token = torch.ones_like(rows, dtype=torch.bool), torch.zeros_like(rows)

        def step() -> torch.Tensor:
            seen = mask.index_fill_(-1, at, 0) if fixed else mask[..., : width + t + 1]
            output = model(input_ids=token[:, None], attention_mask=seen, position_ids=position, use_cache=True,
                           past_key_values=cache)
            at.add_(1), position.add_(1)
            return output.logits[:, -1]

        following = replayed(step, fixed)
        for t in range(steps):
            new, logp = draw(logits, None if chances is None else chances[rows, t], sampling)
            for row, more, *values in zip(*(tensor.tolist() for tensor in (rows, running, new, logp))):
                for found, value in zip((completions, sampled), values if more else ()):
                    found[row].append(value)
            running &= ~torch.isin(token.copy_(new), stops)
            if t + 1 == steps or not running.any():
                break
            if not fixed and running.sum() <= len(rows) * 3 // 4:
                left = running.nonzero()[:, 0]
                cache.batch_select_indices(left)
                rows, running, token, position, mask = (x[left] for x in (rows, running, token, position, mask))
            logits = next(following)
    return completions, sampled


def read(tokenizer, completions: Sequence[list[int]]) -> tuple[list[str], list[bool]]:
    """(texts without the stop token, whether there was one)."""
    stopped = [ids[-1] in stop_tokens(tokenizer) for ids in completions]
    return [tokenizer.decode(ids[: len(ids) - stop], skip_special_tokens=True)
            for ids, stop in zip(completions, stopped)], stopped


def generate(model, tokenizer, prompts: Sequence[list[dict]], max_new_tokens: int, batch_size: int = 16):
    """Greedy answers to conversations: a list of (text, whether the model stopped by itself)."""
    answers = []
    for start in range(0, len(prompts), batch_size):
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
        completions, _ = sample(model, tokenizer, ids, SAMPLING | {"max_new_tokens": max_new_tokens})
        answers += zip(*read(tokenizer, completions))
    return answers


# ---- Fit: transformers' Trainer behind one function ------------------------------------------------------------------
def unwrapped(model):
    """The model that DDP or DeepSpeed hides. (accelerate's extract_model_from_parallel searches every module too.)"""
    return dict(model.named_children()).get("module", model)


@contextlib.contextmanager
def without_adapter(model):
    """As peft's disable_adapter(), which takes stock of all layers besides."""
    (tuner := unwrapped(model).base_model).disable_adapter_layers()
    try:
        yield
    finally:
        tuner.enable_adapter_layers()


def logits_at(model, mask: torch.Tensor, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits (N, V) and last hidden states (N, H) of the N positions where `mask` (B, T) is true, by a forward pass
    of `model` (DDP and FSDP included) whose vocabulary projection sees no other position."""
    head, hidden = unwrapped(model).get_output_embeddings(), []

    def select(_, args) -> tuple:
        hidden.append(args[0][mask])
        return tuple(hidden)

    hook = head.register_forward_pre_hook(select)
    try:
        return model(**inputs, use_cache=False).logits, hidden[0]
    finally:
        hook.remove()


def collate_answers(rows: Sequence[dict], share_prompt: bool = True) -> dict[str, torch.Tensor]:
    """A batch of B rows, each a "prompt" with G "answers" (token ids, with their "labels"), (B, T): the prompt, then
    the answers side by side, all continuing the prompt's positions; or (G B, T) if `share_prompt` is false: the prompt
    before each of them.

    "branch" is 0 in a prompt, 1 ... G in the answers, -1 in padding. "targets" has at each position the token to
    predict there, "sequence" which of the G B answers it belongs to. A branch begins with the prompt's last token,
    since that predicts the answer's first."""
    sequences, number = [], 0
    for row in rows:
        *prompt, last = row["prompt"]
        start = len(prompt)
        trunk = torch.tensor([prompt, range(start), [0] * start, [0] * start, [IGNORE] * start], dtype=torch.long)
        branches = [
            torch.tensor([[last, *ids[:-1]], range(start, start + len(ids)), [branch] * len(ids),
                          [number + branch - 1] * len(ids), labels])
            for branch, (ids, labels) in enumerate(zip(row["answers"], row["labels"]), 1)
        ]
        number += len(branches)
        groups = [[trunk, *branches]] if share_prompt else [[trunk, branch] for branch in branches]
        sequences += [torch.cat(group, 1) for group in groups]
    names, padding = ("input_ids", "position_ids", "branch", "sequence", "targets"), (0, 0, -1, 0, IGNORE)
    columns = zip(*sequences)
    batch = {name: pad_sequence(list(tensors), True, pad) for name, tensors, pad in zip(names, columns, padding)}
    batch |= {"num_tokens": (batch["branch"] >= 0).sum(), "num_items": torch.tensor(len(rows))}
    return batch if share_prompt else batch | {"attention_mask": (batch["branch"] >= 0).long()}


def attend(model, seen: torch.Tensor) -> torch.Tensor:
    """What is added to attention's scores: 0 where `seen` says that a position may look, else -inf. Of a dtype that
    attention need not convert once more in every layer."""
    kind, dtype = seen.device.type, next(model.parameters()).dtype
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def answer_logits(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits_at` the N positions of a batch of `collate_answers` that have a target."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
    if "attention_mask" not in inputs:  # a position sees what lies before it in its prompt and in its own branch
        query, key = batch["branch"][:, :, None], batch["branch"][:, None, :]
        inputs["attention_mask"] = attend(model, ((query == key) | (key == 0)).tril()[:, None])  # (B, 1, T, T)
    return logits_at(model, batch["targets"] != IGNORE, **inputs)


@torch.no_grad()
def sharing_is_exact(model, row: dict) -> bool:
    """Whether one pass over the prompt of `row` gives the answers the logits that a pass for each of them gives."""
    if model.config._attn_implementation in ("sdpa", "eager"):  # others do not take a mask of our own
        batches = [collate_answers([row], share) for share in (True, False)]
        batches = [{name: value.to(model.device) for name, value in batch.items()} for batch in batches]
        together, apart = (answer_logits(model, batch)[0].float() for batch in batches)
        if (together - apart).std(-1).mean() < (1e-4 if model.dtype == torch.float32 else 0.1) * apart.std(-1).mean():
            return True
    logger.info("prompts are encoded once an answer: once for all its answers is not exact with this model's attention")
    return False


class TokenLogps(torch.autograd.Function):
    """log softmax(logits)[target] of logits (N, V) and targets (N,): (N,) in float32. It works in chunks, and the
    gradient takes the place of the logits, which are spent by then: a second (N, V) tensor is never made."""

    at_once = staticmethod(lambda logits: 32 if logits.device.type == "cpu" else 1024)  # rows; fewer fit a CPU's cache

    @staticmethod
    def forward(ctx, logits, targets):
        norms = torch.cat([chunk.float().logsumexp(-1) for chunk in logits.split(TokenLogps.at_once(logits))])
        ctx.save_for_backward(logits, targets, norms)
        return logits.gather(-1, targets[:, None])[:, 0].float() - norms

    @staticmethod
    def backward(ctx, grads):
        logits, *rest = ctx.saved_tensors
        parts = (tensor.split(TokenLogps.at_once(logits)) for tensor in (logits, *rest, grads))
        for chunk, target, norm, grad in zip(*parts):
            chunk.copy_((chunk.float() - norm[:, None]).exp_().mul_(-grad[:, None]))
            chunk.scatter_add_(-1, target[:, None], grad[:, None].to(chunk.dtype))
        return logits, None


def seal(folder: Path, config: TrainingConfig) -> None:
    """Write down whose checkpoint it is and, last of all, the hashes of its files, once they lie on the disk."""
    write_json(folder / "options.json", options_of(config))
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())
    write_json(folder / "manifest.json", {file.relative_to(folder).as_posix(): digest(file) for file in files})


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint; empty if it is whole."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        broken = [name for name, known in files.items() if digest(folder / name) != known]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError:
        return "manifest.json is damaged"
    return f"{', '.join(broken)} is damaged" if broken else "" if files else "manifest.json is empty"


def newest_checkpoint(config: TrainingConfig) -> Path | None:
    """The checkpoint to go on from, as resume_from_checkpoint says. A broken one is named and passed over."""
    if isinstance(named := config.resume_from_checkpoint, str):
        if json.loads(Path(named, "options.json").read_text(encoding="utf-8")).keys() != options_of(config).keys():
            raise ConfigError(f"resume_from_checkpoint={named} is of another recipe")
        return Path(named)
    found = Path(config.output_dir, "checkpoints").glob("[a-z]*-*") if config.resume_from_checkpoint else ()
    for folder in sorted(found, key=lambda folder: -int(folder.name.rpartition("-")[2])):
        if not (wrong := damage(folder)):
            theirs, ours = json.loads((folder / "options.json").read_text(encoding="utf-8")), options_of(config)
            if changed := differences({"options": theirs}, {"options": ours}):
                raise ConfigError(f"{folder} is of a run with other options ({changed}); take another output_dir, or "
                                  "resume_from_checkpoint=False to start anew")
            logger.info("going on from %s", folder)
            return folder
        logger.warning("%s is passed over: %s", folder, wrong)
    return None


def keep_steps(path: Path, step: int) -> None:
    """Keep of a .jsonl what came up to `step`: what an interrupted run wrote after its checkpoint comes once more."""
    old = re.findall(r".*\n", path.read_text(encoding="utf-8")) if step and path.exists() else []
    with replacing(path) as file:
        file.writelines(line for line in old if json.loads(line)["step"] <= step)


def say_step(folder: Path, step: int, steps: int, logs: Mapping[str, float], left_to_the_file: str) -> None:
    """A line in metrics.jsonl, and on the screen one without the figures that `left_to_the_file` names."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, **logs}) + "\n")
    words = {"learning_rate": "lr {:.2g}", "tokens_per_s": "{:,.0f} tokens/s"}
    shown = [words.get(name, f"{name} {{:.4g}}").format(value) for name, value in logs.items()
             if not re.fullmatch(left_to_the_file, name)]
    logger.info("step %*d/%d  %s", len(str(steps)), step, steps, "  ".join(shown))


def make_whole(model, shell) -> None:
    """Undo in place what FSDP2 or ZeRO-3 made of `model` since `shell`, its copy without weights: every process has all
    weights, no module is wrapped, and what saves, merges or samples need not know that they were in parts."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else the next model would be taken apart as it is loaded
    for part, place in zip(model.parameters(), shell.parameters(), strict=True):
        zero3 = hasattr(part, "ds_id")
        with importlib.import_module("deepspeed").zero.GatheredParameters(part) if zero3 else contextlib.nullcontext():
            whole = part.full_tensor() if hasattr(part, "full_tensor") else part.data.clone()
        if place.is_meta:
            torch.utils.swap_tensors(place, torch.nn.Parameter(whole.detach(), place.requires_grad))
        else:
            place.data = whole
    model.__class__, model.__dict__ = type(shell), vars(shell)


def fit(config: FitConfig, model, tokenizer, train_rows: Sequence[dict], eval_rows: Sequence[dict],
        collate: Callable[[list], dict], loss: Callable[[Any, dict], tuple[torch.Tensor, dict]]) -> dict[str, float]:
    """Train `model` in place by transformers' Trainer; returns the figures after training, and as x_before those from
    before it.

    A row has "input_ids". `collate(rows)` returns a batch of tensors, among them "num_tokens", for the speed, and
    "num_items": over how many items (tokens, pairs, ...) `loss(model, batch) -> (loss, metrics)` takes its means. So
    the loss of a step is the mean over all its items, however they fall into micro-batches and processes. A loss or a
    gradient that is not finite stops the run before it reaches the weights.
    """
    from peft.helpers import disable_input_dtype_casting
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_pt_utils import LengthGroupedSampler
    from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

    folder, device, dtype = Path(config.output_dir), default_device(), compute_dtype(config.torch_dtype)
    world = int(os.environ.get("WORLD_SIZE", 1))
    together = world * config.per_device_train_batch_size  # rows of a micro-batch
    sums: Counter[str] = Counter()  # since the last logged step: metrics times items, items, tokens, seconds

    def require_finite(what: str, value, state) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(f"the {what} is {float(value)} at step {state.global_step + 1}; the weights are "
                                     "as before it. Lower learning_rate, or look for a broken row")

    class ByLength(LengthGroupedSampler):
        """Steps of rows of about the same length, so with little padding, also where the rows are few. The longest come
        first: if memory is short, it shows at once."""

        def __len__(self):  # the last step is filled up with nothing, else processes would be given rows twice
            return math.ceil(len(self.lengths) / together) * together if world > 1 else len(self.lengths)

        def __iter__(self):
            # A function of seed and epoch alone: a resumed run sees the batches the interrupted one would have seen.
            # (set_epoch would not do: accelerate hands it to no sampler that is split and resumed within an epoch.)
            self.generator.manual_seed(config.seed + int(trainer.state.epoch))
            rows = len(self.lengths)
            chance = 0.9 + 0.2 * torch.rand(rows, generator=self.generator)  # so that batches mix anew
            longest, *others = (torch.tensor(self.lengths) * chance).argsort(descending=True).split(self.batch_size)
            rest = [others.pop()] if others and len(others[-1]) < self.batch_size else []
            order = torch.randperm(len(others), generator=self.generator).tolist()
            order = torch.cat([longest, *(others[index] for index in order), *rest]).tolist()
            return iter(order + [rows] * (len(self) - rows))

    def filled(rows: list) -> dict:
        """A batch; of no rows one that weighs nothing, so that every process has one."""
        there = [row for row in rows if row is not None]
        return collate(there or [train_rows[0]]) | {"weight": torch.tensor(bool(there))}

    class FitTrainer(Trainer):
        loss_is_scaled_for_ga = True
        floating_point_ops = lambda self, inputs: 0  # their sum is not read, and each takes a count of all weights

        def _run_epoch(self, **kwargs):
            if self.state.global_step < self.state.max_steps:  # from its last step on a run would take one more
                super()._run_epoch(**kwargs)

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            items = torch.tensor(sum(int(batch["num_items"] * batch["weight"]) for batch in batches), device=device)
            return batches, self.accelerator.reduce(items, "sum")

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            value, metrics = loss(model, inputs)
            require_finite("loss", value.detach(), self.state)
            items, tokens = (int(inputs[name] * inputs["weight"]) for name in ("num_items", "num_tokens"))
            sums.update({name: float(metric) * items for name, metric in metrics.items()})
            sums.update(items=items, tokens=tokens)
            # gradients are averaged over processes, not summed: hence the last factor
            return value * items / num_items_in_batch * self.accelerator.num_processes

        def _get_grad_norm(self, model, grad_norm=None):
            norm = super()._get_grad_norm(model, grad_norm)
            if norm is not None and self.accelerator.scaler is None:  # float16's scaler skips such steps itself
                require_finite("gradient's norm", norm, self.state)
            return norm

        def _get_train_sampler(self, train_dataset=None):
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            return ByLength(size, lengths=[len(row["input_ids"]) for row in train_rows], generator=torch.Generator())

        def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None,
                            metric_key_prefix="eval"):
            self.model_wrapped.eval()
            totals: Counter[str] = Counter()
            rows, size, world = self.eval_dataset, self.args.eval_batch_size, self.args.world_size
            batches = [rows[start : start + size] for start in range(0, len(rows), size)]
            # As many rounds for every process, else they would wait for each other; what comes twice weighs nothing.
            for number in range(self.args.process_index, math.ceil(len(batches) / world) * world, world):
                batch = self._prepare_inputs(collate(batches[number % len(batches)]))
                with torch.no_grad(), self.compute_loss_context_manager():
                    value, metrics = loss(self.model_wrapped, batch)
                items = int(batch["num_items"]) * (number < len(batches))
                totals.update({k: float(v) * items for k, v in {"loss": value, **metrics}.items()}, items=items)
            *found, items = self.accelerator.reduce(torch.tensor([*totals.values()], device=device), "sum").tolist()
            means = {f"{metric_key_prefix}_{name}": total / items for name, total in zip(totals, found)}
            if not {name := config.metric_for_best_model, f"eval_{name}"} & {*means}:
                raise ConfigError(f"metric_for_best_model={name}: there are {', '.join(sorted(means))}")
            return EvalLoopOutput(None, None, means, len(eval_rows))

        def log(self, logs, start_time=None):
            if "loss" in logs:
                of_all = self.accelerator.reduce(torch.tensor([*sums.values()], device=self.args.device), "sum")
                totals = dict(zip(sums, of_all.tolist()))
                seconds, tokens, items = (totals.pop(name) for name in ("seconds", "tokens", "items"))
                logs |= {name: total / items for name, total in totals.items()}
                logs["tokens_per_s"] = round(tokens * self.accelerator.num_processes / seconds, 1)
                sums.clear()
            super().log({k: v for k, v in logs.items() if not k.endswith(("_runtime", "_per_second"))}, start_time)

        def _determine_best_metric(self, metrics, trial):
            best = super()._determine_best_metric(metrics, trial)
            self.control.should_save |= best and config.load_best_model_at_end  # whatever save_steps says
            return best

        def _save_checkpoint(self, model, trial):
            """Aside, then sealed, then renamed: a crash leaves the older ones as they are."""
            home, aside = Path(self.args.output_dir), Path(self.args.output_dir, ".saving")
            name, best = f"checkpoint-{self.state.global_step}", self.state.best_global_step
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self.args.output_dir = str(aside)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(home)
            self.accelerator.wait_for_everyone()
            self.state.best_model_checkpoint = str(home / f"checkpoint-{best}") if best else None
            if self.args.should_save:
                self.state.save_to_json(str(aside / name / "trainer_state.json"))
                seal(aside / name, config)
                shutil.rmtree(home / name, ignore_errors=True)
                (aside / name).rename(home / name)
                aside.rmdir()
                rotate_checkpoints(str(home), self.args.save_total_limit, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()

        def _save(self, output_dir=None, state_dict=None):
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                Path(output_dir, "training_args.bin").unlink()  # a pickle that nothing reads

    class Progress(TrainerCallback):
        """metrics.jsonl, the lines on the screen, and the clock."""

        def on_train_begin(self, args, state, control, **_):
            if state.is_world_process_zero:
                keep_steps(folder / "metrics.jsonl", state.global_step)

        def on_step_begin(self, args, state, control, **_):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            sums["seconds"] += time.perf_counter() - self.began
            if trainer.accelerator.reduce(torch.tensor(len(signals), device=device), "sum"):
                signals or signals.append(signal.SIGTERM)  # to one process or to all: they save and end together
                control.should_save = control.should_training_stop = True
                return
            if state.global_step >= state.max_steps:
                control.should_log = True  # the last step shows, also where logging_steps passes it over
                if state.global_step % (config.save_steps or 1):
                    control.should_save = False  # the stage saves the finished model itself

        def on_log(self, args, state, control, logs=None, **_):
            if state.is_world_process_zero and "train_loss" not in logs:
                say_step(folder, state.global_step, state.max_steps, logs, "epoch|grad_norm|.*_(logps|reward)")

    checkpoint = newest_checkpoint(config)
    os.environ |= {"TENSORBOARD_LOGGING_DIR": str(folder / "runs"), "WANDB_DIR": str(folder)}
    os.environ |= {"WANDB_PROJECT": config.wandb_project} if config.wandb_project else {}
    names = {f.name for f in fields(TrainingArguments)} & {f.name for f in fields(FitConfig)}
    same = {name: getattr(config, name) for name in names - {"resume_from_checkpoint", "log_level"}}
    args = TrainingArguments(**same | {
        "output_dir": str(folder / "checkpoints"), "run_name": config.wandb_run_name or config.output_dir,
        "max_steps": config.max_steps or -1, "warmup_steps": config.warmup_ratio,  # below 1 it is a share
        "activation_checkpointing": bool(config.gradient_checkpointing), "report_to": config.report_to or "none",
        "activation_checkpointing_kwargs": {"use_reentrant": False, "every_n_layers": config.gradient_checkpointing},
        "eval_strategy": "steps" if eval_rows and config.eval_steps else "no", "eval_steps": config.eval_steps or None,
        "eval_on_start": bool(eval_rows and not checkpoint), "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500, "logging_nan_inf_filter": False, "disable_tqdm": True,
        "ddp_find_unused_parameters": False,  # what trains has a part in every loss
        "restore_callback_states_from_checkpoint": True,  # how long early stopping has waited
        "bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda", "remove_unused_columns": False, "gradient_checkpointing": None,
    })
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are for `accelerate launch`, never for DataParallel
    counts = [model.num_parameters(only_trainable=only) for only in (True, False)]
    if not counts[0]:
        raise RuntimeError("no parameter of the model trains: everything is frozen")
    callbacks = [Progress(), *(EarlyStoppingCallback(count) for count in [config.early_stopping_patience] if count)]
    evaluated = sorted(eval_rows, key=lambda row: len(row["input_ids"])) or None  # by length: little padding
    trainer = FitTrainer(model, args, filled, [*train_rows, None], evaluated, tokenizer, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    logger.info("training %s of %s parameters on %s rows, on %s in %s", *(f"{n:,}" for n in (*counts, len(train_rows))),
                device.type, str(dtype).removeprefix("torch."))
    # FSDP2 and ZeRO-3 change the model itself; DDP wraps it. Quantized weights, no floats, are passed over by them.
    empty = lambda w: torch.nn.Parameter(torch.empty_like(w, device="meta"), w.requires_grad)
    copies = lambda: {id(w): empty(w) if w.is_floating_point() else w for w in model.parameters()}
    shell = copy.deepcopy(model, copies()) if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else None
    with deferred_signals() as signals, disable_input_dtype_casting(model):  # autocast does it, with fewer copies
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.config.use_cache = True  # the Trainer's False would be saved with the model
    if is_main_process():
        with contextlib.suppress(OSError):
            Path(args.output_dir).rmdir()  # stays unless no checkpoint was saved
    history = trainer.state.log_history
    before = next((logs for logs in history if "eval_loss" in logs), {})
    after = trainer.evaluate() if eval_rows else {}
    for name in {"forward", "_original_forward", "_is_accelerate_prepared"} & vars(model).keys():
        delattr(model, name)  # accelerate's autocast, else it stays, and the mark that would keep it from coming again
    if shell is not None:
        make_whole(model, shell)
    if "wandb" in config.report_to and is_main_process():
        importlib.import_module("wandb").finish()  # else the next stage's steps would go into this stage's run
    figures = {name: value for name, value in after.items() if not name.endswith(("_runtime", "_per_second", "epoch"))}
    speeds = [logs["tokens_per_s"] for logs in history if "tokens_per_s" in logs]
    losses = [logs["loss"] for logs in history if "loss" in logs]  # also of the part before a run was interrupted
    figures |= {"train_loss": statistics.fmean(losses), "steps": trainer.state.global_step}
    figures |= {"tokens_per_s": statistics.median(speeds)} if speeds else {}
    return figures | {f"{name}_before": before[name] for name in figures if name in before}


# ---- Asking other models: one run here, or one behind a server that speaks OpenAI's protocol -------------------------
PROVIDERS = {  # kind: (where it is, the environment variable of its key)
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "anthropic": ("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY"),
}


@dataclass
class AskingConfig(StageConfig):
    """Options of every stage that asks another model."""

    max_calls: Natural = 0  # answers of a server that this output_dir may gather, over all its runs; 0: no limit
    max_cost: NonNegative = 0.0  # dollars that they may cost, but for calls under way; 0: no limit
    input_price: NonNegative = 0.0  # dollars for a million tokens sent
    output_price: NonNegative = 0.0  # dollars for a million tokens received
    max_missing: Share = 0.1  # the stage stops if a larger share of the answers is missing or cannot be read
    concurrency: Count = 8  # calls to a server at a time; for a model run here, the batch
    call_timeout: Positive = 120.0  # seconds to wait for an answer of a server

    def validate(self) -> None:
        super().validate()
        if self.max_cost and not (self.input_price or self.output_price):
            raise ConfigError("max_cost needs input_price and output_price, dollars for a million tokens")
        for role in (name.removesuffix("_base_url") for name in vars(self) if name.endswith("_base_url")):
            kind, variable = vars(self)[f"{role}_model_type"], vars(self)[f"{role}_api_key"]
            if variable and not os.environ.get(variable):  # also where nothing is asked in the end
                raise ConfigError(f"{role}_api_key names the environment variable that holds the key. A key itself is "
                                  "refused: options are written to files and shown in the list of processes")
            names = f"{role}_base_url {role}_api_key max_calls max_cost call_timeout"
            why = f"with {role}_model_type={kind}: it is for servers"
            self.refuse_unread(kind not in ("api", *PROVIDERS), names, why)


class Client:
    """Another model: of a folder, hub name or .gguf file, run here, or by `kind` (api, openai, anthropic) one behind a
    server at `url`, whose key is in the environment `variable`. An answer is appended to OUT/calls.jsonl the moment it
    comes, under a hash of model, messages, parameters and prompt version; what stands there is not asked again."""

    def __init__(self, config: AskingConfig, role: str, path: str, kind: str, url: str | None = None,
                 variable: str | None = None):
        self.config, self.role, self.path, self.kind, self.figures = config, role, path, kind, Counter()
        home, usual = PROVIDERS.get(self.kind, (None, None))
        self.remote, self.url, self.variable = self.kind == "api" or home is not None, url or home, variable or usual
        self.secret = os.environ.get(self.variable or "", "")
        rank = "" if is_main_process() else f"-{os.environ['RANK']}"  # every process writes a file of its own
        self.local: Any = None  # (model, tokenizer)
        self.server: Any = None  # an openai.OpenAI
        self.calls = Path(config.output_dir, f"calls{rank}.jsonl")
        self.trouble, self.refusal, self.halted = "", "", False

    def check(self) -> None:
        """Refuse what cannot be asked, before any model is loaded; raises ConfigError."""
        role = self.role
        if not self.path:
            raise ConfigError(f"{role}_model_path is missing: a folder, hub name or .gguf file; of a server, the "
                              "model's name there")
        if not self.remote:
            return check_model(self.path)
        if self.variable and not re.fullmatch("[!-~]+", self.secret):
            wrong = "has a space, a line break or a letter beyond ASCII in it" if self.secret else "is not set"
            usual = f" {self.variable}" * (self.variable in (known for _, known in PROVIDERS.values()))  # or a key?
            raise ConfigError(f"{role}_api_key names the environment variable that holds the key, and{usual} {wrong}")
        if not re.match("https?://", self.url or ""):
            raise ConfigError(f"{role}_base_url says where the server is, for example http://localhost:8000/v1")
        if re.search(r"//[^/]*@|[?]", self.url):
            kind = "query" if "?" in self.url else "password"
            raise ConfigError(f"{role}_base_url has a {kind} in it; name its environment variable by {role}_api_key")
        try:
            urllib.request.urlopen(self.url, timeout=10).close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            if not hasattr(error, "code"):  # an HTTPError has one: something answers
                raise ConfigError(f"{role}_base_url={self.url} does not answer: {error}") from None

    def ask(self, what: str, requests: Sequence[tuple[list[dict], int]], sampling: Mapping, version: str,
            parse: Callable[[str], Any] | Sequence[Callable], choices: Sequence[str] = ()) -> list:
        """`parse(answer)` for each (messages, number), or one of them for each; None without an answer, or if it makes
        nothing of it. `number` tells several answers to equal messages apart; temperature 0 is greedy; `version`
        is that of the prompts. With `choices` a model run here answers by their probabilities, as JSON.
        Raises AskingError when too many are missing, a limit is reached, or the server refuses."""
        known = self.read_calls()
        keys = [self.key([messages, number, dict(sampling), version, [*choices]]) for messages, number in requests]
        wanted = {key: request for key, request in zip(keys, requests) if key not in known}
        spent = self.spent(known)
        room = self.config.max_calls - len(known) if self.remote and self.config.max_calls else len(wanted)
        room = 0 if 0 < self.config.max_cost < spent else room
        todo = dict([*wanted.items()][: max(0, room)])
        logger.info("%s: %d answers, %d of them known from before", what, len(requests), len(requests) - len(wanted))
        self.figures.update(calls_cached=len({*keys}) - len(wanted))
        ask = self.ask_server if self.remote else functools.partial(self.ask_here, choices=choices)
        failed, self.halted, self.refusal = 0, False, ""
        with open(self.calls, "a", encoding="utf-8") as out, tqdm(total=len(todo), desc=what, disable=None) as bar:
            for key, answer in ask(todo, sampling) if todo else ():
                bar.update()
                if answer is None:
                    failed += 1
                    self.halted |= failed > self.config.max_missing * len(requests)  # it will not get better
                    continue
                out.write(json.dumps({"key": key, "role": self.role, **answer}, ensure_ascii=False) + "\n")
                out.flush()
                known[key] = answer
                self.figures.update(calls=1, tokens_in=answer["tokens_in"], tokens_out=answer["tokens_out"])
                spent += self.spent({key: answer})
                self.halted |= 0 < self.config.max_cost < spent
                if not answer["tokens_in"] and (self.config.input_price or self.config.output_price):
                    self.refusal, self.halted = "does not say how many tokens it took; set the prices to 0", True
        again = "What came is kept; run the same command to go on"
        if self.refusal:
            raise AskingError(f"{self.url} {self.refusal}. {again}")
        if 0 < self.config.max_cost < spent and not {*keys} <= known.keys():
            raise AskingError(f"max_cost={self.config.max_cost:g} is reached: {spent:.2f} dollars. {again}, with more")
        if len(todo) < len(wanted):
            raise AskingError(f"max_calls={self.config.max_calls} is reached. {again}, with more")
        texts = [known[key]["text"] if key in known else None for key in keys]
        parsers = [parse] * len(texts) if callable(parse) else parse
        found = [None if text is None else parse(text) for text, parse in zip(texts, parsers, strict=True)]
        absent, missing = sum(text is None for text in texts), sum(value is None for value in found)
        self.figures.update(missing=missing)
        if missing:
            unread = next((text for text, value in zip(texts, found) if text is not None and value is None), None)
            said = f"{what}: {missing} of {len(found)} missing: {absent} without an answer" + (
                f" ({self.trouble})" if self.trouble else "") + (
                f", {missing - absent} that cannot be read, such as {unread[-160:]!r}" if unread is not None else "")
            if missing > self.config.max_missing * len(found):
                raise AskingError(f"{said}. That is more than max_missing={self.config.max_missing:g}. {again}")
            logger.warning(said)
        return found

    def key(self, request: list) -> str:
        options = ("seed", "instruction_template", "torch_dtype", "use_4bit", "use_8bit", "revision")
        here = [] if self.remote else [identity(Path(self.path)), *map(vars(self.config).get, options)]
        whole = [self.role, self.path, self.url, here, *request]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]

    def read_calls(self) -> dict[str, dict]:
        """{key: answer} of OUT/calls.jsonl, those of other processes too; a line that a crash cut off is removed."""
        self.calls.touch()
        files = {file: file.read_bytes() for file in self.calls.parent.glob("calls*.jsonl")}
        ends = {file: whole.rfind(b"\n") + 1 for file, whole in files.items()}
        os.truncate(self.calls, ends[self.calls])  # others may be writing at theirs
        lines = (json.loads(line) for file, whole in files.items() for line in whole[: ends[file]].splitlines())
        return {line.pop("key"): line for line in lines if line["role"] == self.role}

    def spent(self, answers: Mapping[str, dict]) -> float:
        """Dollars."""
        prices = {"tokens_in": self.config.input_price, "tokens_out": self.config.output_price}
        return sum(answer[name] * price for answer in answers.values() for name, price in prices.items()) / 1e6

    def ask_server(self, todo: Mapping[str, tuple], sampling: Mapping) -> Iterable[tuple[str, dict | None]]:
        """(key, answer or None) as they come. The library tries again after 408, 409, 429, 5xx and timeouts, when
        Retry-After says; what it gives up is missing. Whatever else the server refuses ends the asking."""
        import openai

        if self.server is None:
            self.server = openai.OpenAI(api_key=self.secret or "none", base_url=self.url, max_retries=8,
                                        timeout=self.config.call_timeout)
        create, limit = self.server.chat.completions.with_raw_response.create, (
            "max_completion_tokens" if self.kind == "openai" else "max_tokens")
        options = {"temperature": sampling["temperature"], limit: sampling["max_new_tokens"]}
        options |= {"top_p": sampling["top_p"]} if sampling["top_p"] < 1 else {}
        clean = lambda text: text.replace(self.secret, "***") if len(self.secret) > 7 else text  # a server may send it

        def call(messages: list[dict]) -> dict | None:
            for attempt in range(8):
                if self.halted:
                    return None
                try:
                    answer = json.loads(clean(create(model=self.path, messages=messages, **options).text))
                    if answer.get("error"):
                        raise ValueError(answer["error"])
                    used = answer.get("usage") or {}  # what is charged for is an answer, also without a text
                    said = answer["choices"][0]["message"] if answer.get("choices") or not used else {}
                    text = said.get("content") if used else said["content"]
                    parts = text if isinstance(text, list) else [{"text": text}]
                    texts = [part["text"] for part in parts if isinstance(part, dict)
                             and isinstance(part.get("text"), str)]
                    text = "".join(texts) if texts else None
                    if text is None:
                        self.trouble = "an answer has no text; it stays in calls.jsonl and is not asked again"
                    return {"text": text and text.encode("utf-8", "replace").decode(),
                            "tokens_in": int(used.get("prompt_tokens") or 0),
                            "tokens_out": int(used.get("completion_tokens") or 0)}
                except (ValueError, LookupError, TypeError, AttributeError) as error:  # half an answer, or another page
                    self.trouble = f"not an answer: {str(error)[:200]}"
                    time.sleep(min(8, 0.5 * 2**attempt))
                except openai.APIStatusError as error:
                    words = " ".join(clean(error.response.text).split())[:300]  # error.message has OpenAI's form alone
                    self.trouble = f"{error.status_code}: {words or error.message}"
                    if error.status_code not in (408, 409, 429) and error.status_code < 500:
                        self.refusal, self.halted = f"refuses: {self.trouble}", True
                    return None
                except openai.APIConnectionError as error:
                    self.trouble = str(error.__cause__ or error)
                    return None
            return None

        pool = ThreadPoolExecutor(self.config.concurrency)
        try:
            futures = {pool.submit(call, messages): key for key, (messages, _) in todo.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            self.halted = True  # what is under way is not tried again
            pool.shutdown(wait=False, cancel_futures=True)

    def ask_here(self, todo: Mapping[str, tuple], sampling: Mapping, choices: Sequence[str]):
        """(key, answer) from a model run here; its random numbers come from the request, whatever the batch."""
        model, tokenizer = self.load()
        ids = {key: prompt_ids(tokenizer, messages) for key, (messages, _) in todo.items()}
        seed = lambda key: int(hashlib.sha256(json.dumps([self.config.seed, *todo[key]]).encode()).hexdigest()[:12], 16)
        keys, size = sorted(ids, key=lambda key: len(ids[key])), self.config.concurrency
        longest = model.config.max_position_embeddings - (0 if choices else sampling["max_new_tokens"])
        for some in (keys[start : start + size] for start in range(0, len(keys), size)):
            fit = [key for key in some if len(ids[key]) <= longest]
            if len(fit) < len(some):
                self.trouble = f"longer than the {longest} tokens that the model has room for"
                yield from ((key, None) for key in some if key not in fit)
            if not fit:
                continue
            prompts = [ids[key] for key in fit]
            if choices:
                texts, counts = [json.dumps(chances) for chances in self.choose(prompts, choices)], [1] * len(fit)
            else:
                numbers = torch.cat([random_numbers(1, sampling, seed(key)) for key in fit])
                greedy = sampling["temperature"] == 0
                rest = dict(sampling) | ({"temperature": 1.0} if greedy else {})
                completions, _ = sample(model, tokenizer, prompts, rest, None if greedy else numbers.to(model.device))
                texts, counts = read(tokenizer, completions)[0], [len(completion) for completion in completions]
            for key, text, count in zip(fit, texts, counts):
                yield key, {"text": text, "tokens_in": len(ids[key]), "tokens_out": count}

    def load(self) -> tuple:
        """(model, tokenizer), to be run here."""
        if self.local is None:
            model, tokenizer = load_model_and_tokenizer(ModelConfig(model_name_or_path=self.path))
            self.local = model.requires_grad_(False).eval(), tokenizer
        return self.local

    @torch.no_grad()
    def choose(self, prompts: list[list[int]], choices: Sequence[str]) -> list[list[float]]:
        """Of each prompt, the probabilities of the choices, each one token, as the next one: they add up to 1."""
        model, tokenizer = self.local
        tokens = [tokenizer(choice, add_special_tokens=False).input_ids for choice in choices]
        if any(len(ids) != 1 for ids in tokens):
            raise RuntimeError(f"the tokenizer of {self.path} has no single token for each of {', '.join(choices)}")
        rows = [{"prompt": ids, "answers": [[ids[-1]]], "labels": [[ids[-1]]]} for ids in prompts]
        batch = {name: value.to(model.device) for name, value in collate_answers(rows, share_prompt=False).items()}
        logits, _ = answer_logits(model, batch)
        return logits[:, sum(tokens, [])].float().softmax(-1).tolist()

    def report(self) -> dict[str, float]:
        """{"feedback_calls", ...}: answers asked for, known from before, missing; tokens; dollars."""
        names = ("calls", "calls_cached", "missing", "tokens_in", "tokens_out")
        found = {name: float(self.figures[name]) for name in names}
        found |= {"cost": self.spent(self.read_calls())} if self.config.input_price or self.config.output_price else {}
        return {f"{self.role}_{name}": value for name, value in found.items()}


# ---- Verifying answers -----------------------------------------------------------------------------------------------
class Subprocess:
    """`path/to/file.py:function`, called in a process of its own, which is killed when a call takes more than `timeout`
    seconds: verifiers hang on answers that nobody thought of. Arguments and results travel as JSON. A call raises
    TimeoutError, or RuntimeError with the function's own words; the next call starts anew."""

    def __init__(self, spec: str, timeout: float):
        self.spec, self.timeout = spec, timeout
        self.process: Any = None  # a Popen while it runs
        self.reader = ThreadPoolExecutor(1)

    def __call__(self, /, *args, **kwargs) -> Any:  # a column may be named self
        self.start()
        self.process.stdin.write(json.dumps([args, kwargs], default=str) + "\n")
        self.process.stdin.flush()
        return self.read(self.timeout)

    def start(self) -> None:
        """Start the process, unless it runs; raises ConfigError if the file or the function is not there."""
        if self.process is None:
            path, _, name = self.spec.rpartition(":")
            code = "import sys; sys.path.insert(0, sys.argv[1]); import common; common.serve(*sys.argv[2:])"
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(Path(__file__).parent), os.path.expanduser(path), name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True)
            with refusing(f"{self.spec} cannot be called"):
                self.read(300)

    def read(self, timeout: float) -> Any:
        try:
            line = self.reader.submit(self.process.stdout.readline).result(timeout)
        except FutureTimeout:
            line = None
        if not line:
            self.stop()
            raise TimeoutError(f"no answer within {timeout:g} s") if line is None else RuntimeError("the process died")
        if "error" in (answer := json.loads(line)):
            raise RuntimeError(answer["error"])
        return answer["result"]

    def verdict(self, text: str, **columns) -> Any:
        """What the function says of one text; None where it fails or takes too long: some formulas take for ever."""
        try:
            return self([None], [text], **columns)[0]
        except (TimeoutError, RuntimeError) as error:
            logger.warning("%r cannot be compared: %s", text[-80:], error)
            return None

    def stop(self) -> None:
        """End the process; the next call starts another."""
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None


def serve(path: str, name: str) -> None:
    """The other side of `Subprocess`: answer each line on stdin by a line on stdout."""
    out = open(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints, or a C library under it, is not an answer
    say = lambda **answer: print(json.dumps(answer, default=float), file=out, flush=True)
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:
        return say(error=f"{type(error).__name__}: {error}")
    say(result="ready")
    for line in sys.stdin:
        args, kwargs = json.loads(line)
        try:
            say(result=function(*args, **kwargs))
        except Exception as error:
            say(error=f"{type(error).__name__}: {error}")


NUMBER = re.compile(r"[-+\s\\$€£]*[\d,]*\.?\d+%?")
NO_NUMBER = re.compile(r"\d:\d|\d-\d+-\d|(?<![\\\w])[^\W\d_]\d")  # a time, a date, a code: texts with numbers in them


def may_be_number(answer: str) -> bool:
    """Whether an expected answer can be a number or a formula, and is no text that has numbers in it."""
    return bool(re.search(r"[\d\\]", answer)) and not NO_NUMBER.search(answer)


def formula(text: str, alone: bool = True) -> list:
    """What math-verify makes of a number or formula, or of the last one in a sentence; empty without one. It looks for
    formulas between dollars, and of one without them takes the last number: so they are put around what has no words
    and is `alone`, or is LaTeX."""
    from math_verify import parse

    text = re.sub(r"^[\s*`_]+|[\s*`_]+$", "", text).removesuffix(".")  # marks of emphasis
    text = f"{Decimal(text):f}" if re.fullmatch(r"[-+]?\d+(\.\d+)?[eE][-+]?\d{1,3}", text) else text  # 1e6
    text = re.sub(r"(?<![\w.])(-?)(\d+) (\d+/\d+)$", r"$\1(\2+\3)$", text)  # 3 1/2
    if NUMBER.fullmatch(text):
        return parse(re.sub(r"[\s\\$€£]", "", text), parsing_timeout=None)
    sentence = re.search(r"\$|\\boxed|\\[\[(]|: |(?<!\\)\b[^\W\d_]{2,}", text)
    if not sentence and NO_NUMBER.search(text):
        return []
    return parse(f"${text}$" if not sentence and (alone or "\\" in text) else text, parsing_timeout=None)


def numeric(prompts: list, completions: list[str], answer: list, **_) -> list[float]:
    """1.0 where the final answer of a completion equals the number or formula `answer` (of "... #### 72" what follows
    the hashes), else 0.0. To be called by `Subprocess`: some formulas take for ever."""
    from math_verify import verify

    def equal(text: str, gold: str) -> float:
        gold = gold.split("####")[-1].strip()
        if not may_be_number(gold) or not (wanted := formula(gold)):
            raise ValueError(f"the answer {gold!r} is not a number or formula")
        found = formula(text.rpartition("####")[2], alone=not NUMBER.fullmatch(gold))
        return float(verify(wanted, found, timeout_seconds=None))

    return [equal(text, str(gold)) for text, gold in zip(completions, answer)]


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Ends of the confidence interval of the mean of values: Wilson's where all lie between 0 and 1 (Wilson 1927; with
    values in between it is too wide, never too narrow), else the mean +- z standard errors."""
    n, mean, z = len(values), statistics.fmean(values), statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    if 0 <= min(values) and max(values) <= 1:
        centre, spread = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2)
        low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
        return low * (mean > 0), high if mean < 1 else 1.0  # no rounding where the ends are known
    error = z * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return mean - error, mean + error


def with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """{name: mean, name_low, name_high: its 95% interval, name_n: of how many}; empty without values."""
    if not values:
        return {}
    low, high = interval(values)
    return {name: statistics.fmean(values), f"{name}_low": low, f"{name}_high": high, f"{name}_n": len(values)}


def exact(prompts: list, completions: list[str], answer: list, **_) -> list[float]:
    """1.0 where a completion is `answer`, but for white space around it, else 0.0."""
    return [float(text.strip() == str(gold).strip()) for text, gold in zip(completions, answer)]


# ---- Saving ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path: Path):
    """A text file, written aside, flushed and renamed: a reader, or a crash, meets the old one or the new one whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    with replacing(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as file:
        number = lambda value: float(value) if hasattr(value, "__float__") else str(value)  # of NumPy or torch
        json.dump(value, file, indent=2, ensure_ascii=False, default=number)


def made_by_main(path: Path, make: Callable[[], list[dict]]) -> list[dict]:
    """The rows that `make()` returns in the main process, kept at `path`; others wait for it: a barrier times out."""
    if is_main_process():
        path.unlink(missing_ok=True)
    wait_for_everyone()  # till an older run's file is gone
    if is_main_process():
        write_rows(path, make())
    while not path.exists():
        time.sleep(1)
    return [json.loads(line) for line in path.read_bytes().splitlines()]  # of a text it would split at U+2028 too


def save_model(model, tokenizer, folder: str) -> str:
    """Save both into `folder`, beside what else lies there: written aside, flushed, renamed. Returns `folder`."""
    target, aside = Path(folder), Path(folder, ".saving")
    if is_main_process():
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        for old in target.glob("*.safetensors*"):  # an older model may have had more files
            old.unlink()
        for file in aside.iterdir():
            with open(file, "rb+") as stream:
                os.fsync(stream.fileno())
            file.replace(target / file.name)
        aside.rmdir()
    return folder


def write_stage_json(config: StageConfig, result: StageResult, lineage: dict) -> None:
    """The stage's resolved config, and last of all stage.json: what was made from what, with which versions."""
    folder, packages = Path(config.output_dir), ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")
    if is_main_process():
        (folder / "stage_config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
        write_json(folder / "stage.json", {
            "stage": result.stage_name, "output_dir": str(folder), "success": result.success,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **lineage, "model_path": result.model_path,
            "metrics": result.metrics, "artifacts": result.artifacts, "device": str(default_device()),
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
        })


# ---- Command line ----------------------------------------------------------------------------------------------------
def read_command_line(arguments: Sequence[str]) -> tuple[list[str], dict[str, str | None]]:
    """(words, options) of a command line, all as text: the config's annotations say what a value is, not its looks."""
    import fire

    flags = Counter(word.partition("=")[0].strip("-").replace("-", "_") for word in arguments if word[:2] == "--")
    if wrong := [f"--{name} stands {count} times" for name, count in flags.items() if count > 1 or not name]:
        raise ConfigError(f"{wrong[0]}; an option is written once, as --name=value")
    found: list = []
    cli = fire.decorators.SetParseFn(str)(lambda *words, **options: found.extend((list(words), options)))
    fire.Fire(cli, command=list(arguments))
    return found[0], {key: None if value in ("None", "null") else value for key, value in found[1].items()}


def option_help(config_class: Any) -> str:
    """The options of a config class: name, default, and the comment beside it in the source."""
    source = "".join(inspect.getsource(cls) for cls in reversed(config_class.__mro__) if hasattr(cls, "aliases"))
    comments, lines = dict(re.findall(r"^    (\w+): .*  # (.*)$", source, re.M)), []
    for f in fields(config_class):
        default = f.default if f.default_factory is MISSING else ",".join(f.default_factory())
        default = str(default).replace("\n", r"\n") if len(str(default)) < 60 else "..."
        lines.append(f"{f'  --{f.name}={default}':<46}  {comments[f.name]}")
    short = ", ".join(f"--{alias} is --{name}" for alias, name in config_class.aliases.items())
    return "\n".join([*lines, f"\n{short}"])


def main(stage_class: type[BaseStage], doc: str) -> None:
    """The command line of a recipe. Exit status 0: done; 1: the stage failed; 2: the input has to be mended."""
    config_class = stage_class.config_class
    if {"-h", "--help"} & set(sys.argv):
        return print(f"{doc.strip()}\n\nOptions:\n{option_help(config_class)}")
    exit_on_signals()
    try:
        words, options = read_command_line(sys.argv[1:])
        if words:
            raise ConfigError(f"unexpected word {words[0]!r}; options are written --name=value")
        with refusing("dry_run"):
            dry_run = TypeAdapter(bool).validate_python(options.pop("dry_run", False))
        config = config_class(**resolve_names(config_class, options))
        if not (config.enabled and config.save_intermediate):
            raise ConfigError("enabled=false and save_intermediate=false are for the stages of a chain")
        stage = stage_class(config)
        if dry_run:
            with start_logging(config.log_level):
                stage.check()
                lines, size = describe(stage, *skeleton(stage.config))
                check_disk(config.output_dir, size)
                return logger.info("%s", "\n".join(lines))
        stage.once = True
        result = stage.execute()
    except ConfigError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except OSError as error:  # such as a full disk, before there is a log
        sys.exit(print(f"error: {error}", file=sys.stderr) or 1)
    if not result.success:
        sys.exit(1)
    if is_main_process():
        changes = (f" {name} {change}" for name, change in before_and_after(result.metrics).items())
        print("done:", config.output_dir, *changes)


def before_and_after(metrics: Mapping[str, float]) -> dict[str, str]:
    """{name: "before -> after"} of the metrics taken both before and after training."""
    pairs = {name: (metrics[f"{name}_before"], value) for name, value in metrics.items() if f"{name}_before" in metrics}
    return {name: f"{before:.3f} -> {after:.3f}" for name, (before, after) in pairs.items()
            if isinstance(before, int | float) and isinstance(after, int | float)}
