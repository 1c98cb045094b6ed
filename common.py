"""Plumbing that the recipes share, in the order of a run: configuration, stage contract, data, model, fit, saving,
command line. No objective stands here: the mathematics of an algorithm is in its recipe. A recipe and this file,
copied together, are a working program; one that contains other recipes needs those too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Sequence

import torch
from pydantic import TypeAdapter

import yaml
from core.chat import prepare_tokenizer, stop_tokens
from core.checkpoints import (
    describe_differences,
    digest_when_imported,
    file_identity,
    fingerprinted_options,
)
from core.checks import check_encoded_rows, describe_stage
from core.cli import option_help, read_command_line
from core.config import ModelConfig, StageConfig, TrainingConfig, resolve_names
from core.errors import ConfigError, as_config_error
from core.files import atomic_folder, cached_folder, check_disk_space, file_digest, write_json
from core.hub import find_model_parts
from core.runtime import (
    compute_dtype,
    default_device,
    exit_on_signals,
    is_main_process,
    is_sharded,
    logger,
    peak_memory,
    start_logging,
    wait_for_everyone,
)
from core.statistics import before_and_after

# ---- Configuration: one flat dataclass a stage; the same fields from the command line, from YAML and from a notebook -


# ---- Stage contract --------------------------------------------------------------------------------------------------


@dataclass
class StageResult:
    """What a stage hands on. `metrics` has x and x_before for a figure taken after and before training."""

    stage_name: str
    success: bool
    model_path: str | None = None  # folder of the model; None when save_intermediate is false
    tokenizer_path: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str] = field(
        default_factory=dict
    )  # what else the stage left: name -> path
    error_message: str | None = None  # last line of the traceback; the log has all of it
    model: Any = field(
        default=None, repr=False, compare=False
    )  # live, for hand-over in memory; never saved
    tokenizer: Any = field(default=None, repr=False, compare=False)


class BaseStage:
    """One step of a chain. A subclass names itself and its config class, and defines `train`."""

    stage_name: str = ""
    config_class: type[StageConfig] = StageConfig
    needs_chat_template: bool = True  # false: the data is plain text
    task: str = "CAUSAL_LM"  # PEFT's name of what the model does; SEQ_CLS: it gives one score
    needs_folder: str = ""  # what it is called, if it takes no model that lies in memory alone
    hands_on: bool = (
        True  # false: what it makes is not for the next stage, which gets what this one was handed
    )
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

    @classmethod
    def resolve(cls, options: dict[str, Any]) -> tuple[type[BaseStage], dict[str, Any]]:
        """The stage class that runs with these options, and the options for it."""
        return cls, options

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
        whole = math.ceil(
            rows
            / (size * config.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1)))
        )
        steps = config.max_steps or math.ceil(whole * config.num_train_epochs)
        return (
            steps,
            statistics.fmean(lengths) * rows * steps / whole,
            2.0 if config.lora_r else 3.0,
            min(size, rows),
        )

    def check(self) -> None:
        """All that can be refused before a model is loaded; raises ConfigError."""
        self.validate_config()
        if self.data is None:
            self.data = self.read = self.load_data()

    def fingerprint(self) -> dict[str, Any]:
        """What decides what comes out, once checked: options, data, files and models they name, code, and the start."""
        if not self.marks:
            options = fingerprinted_options(self.config)
            texts = [
                text
                for value in options.values()
                for text in (value if isinstance(value, list) else [value])
            ]
            named = {
                text: re.sub(r"(\.py):\w+$", r"\1", text)
                for text in texts
                if isinstance(text, str) and 0 < len(text) < 256
            }
            home = sys.modules[
                type(self).__module__
            ]  # its code: of its recipe, of those this imports, and this
            text = inspect.getsource(home) if "__file__" in vars(home) else ""
            froms = [
                sys.modules.get(name)
                for name in re.findall(r"^from ([\w.]+) import", text, re.MULTILINE)
            ]
            core = (module for name, module in sys.modules.items() if name.startswith("core."))
            modules = {
                sys.modules[__name__],
                home,
                *froms,
                *core,
                *filter(inspect.ismodule, vars(home).values()),
            } - {None}
            ours = (
                Path(__file__).parent,
                Path(__file__).parent / "core",
                Path(vars(home).get("__file__", __file__)).parent,
            )
            loaded = {
                module: Path(file)
                for module in modules
                if (file := vars(module).get("__file__")) and Path(file).parent in ours
            }
            code = {file.name: file_digest(file) for file in loaded.values()}
            self.edited = sorted(
                file.name
                for module, file in loaded.items()
                if digest_when_imported(module) != code[file.name]
            )
            with contextlib.suppress(
                OSError
            ):  # what is typed at a prompt has no source; a notebook's functions have
                for name, call in vars(type(self)).items() if not text else ():
                    if inspect.isfunction(call):
                        code[f"{name}()"] = hashlib.sha256(
                            inspect.getsource(call).encode()
                        ).hexdigest()
            self.marks = {
                "options": options,
                "data": self.lineage.get("data", {}).get("sha256"),
                "start": self.start,
                "files": {
                    text: known
                    for text, path in named.items()
                    if (known := file_identity(Path(path)))
                },
                "code": dict(sorted(code.items())),
            }
        return self.marks

    def stale(self) -> str:
        """Why the stage has to run; empty if it is done, with the same fingerprint."""
        record = Path(self.config.output_dir, "stage.json")
        if not record.exists():
            return "it is not finished"
        with as_config_error(f"{record} cannot be read; delete it to run the stage again"):
            return describe_differences(
                json.loads(record.read_text(encoding="utf-8"))["fingerprint"], self.fingerprint()
            )

    def recorded(self) -> StageResult:
        """The result of a finished stage, by its stage.json; its folder may have been moved or copied since."""
        folder = Path(self.config.output_dir)
        done = json.loads((folder / "stage.json").read_text(encoding="utf-8"))

        def moved(path: str) -> str:
            way = Path(os.path.relpath(path, done["output_dir"]))
            outside = way.parts[:2] == ("..", "..")  # neither in the folder nor in one beside it
            return (
                path
                if outside or str(folder) == done["output_dir"]
                else os.path.normpath(folder / way)
            )

        artifacts, path = (
            {name: moved(at) for name, at in done["artifacts"].items()},
            done["model_path"],
        )
        return StageResult(
            done["stage"], True, path := path and moved(path), path, done["metrics"], artifacts
        )

    def begin(self) -> None:
        """Mark the folder as that of this run. Checkpoints of one with other options, or not wanted, are laid aside."""
        folder, launch = (
            Path(self.config.output_dir),
            f"{os.environ.get('WORLD_SIZE', 1)}{' sharded' * is_sharded()}",
        )
        marks = self.fingerprint() | {
            "launch": launch
        }  # other processes would take other rows, and read other files
        if (
            self.edited and not self.once
        ):  # a part of a run goes on with the code that the run began with
            raise ConfigError(
                f"{', '.join(self.edited)} changed since it was imported here; start Python anew"
            )
        if is_main_process():
            (folder / "stage.json").unlink(
                missing_ok=True
            )  # a stage is done when its stage.json says so
            mark, old = folder / "fingerprint.json", folder / "checkpoints"
            for left in (
                *folder.glob(".*.[0-9]*"),
                *folder.glob(".saving"),
                *old.glob(".*"),
            ):  # of a crash
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            resume = vars(self.config).get("resume_from_checkpoint")
            if old.exists() and (resume is False or (resume is True and mark.exists())):
                with as_config_error(f"{mark} cannot be read; move {old} away"):
                    theirs = json.loads(mark.read_text(encoding="utf-8")) if resume else {}
                    if (
                        changed := describe_differences(theirs, marks)
                        if resume
                        else "resume_from_checkpoint=false"
                    ):
                        number = next(n for n in range(1, 10**6) if not Path(f"{old}.{n}").exists())
                        old.rename(f"{old}.{number}")
                        logger.warning(
                            "the checkpoints of an earlier run are now in %s.%d: %s",
                            old,
                            number,
                            changed,
                        )
            write_json(mark, marks)
        wait_for_everyone()

    def train(self, model, tokenizer) -> dict[str, float] | tuple[dict[str, float], Any]:
        """Train `model` in place; returns the metrics, or (metrics, model) if what came out is another model."""
        raise NotImplementedError(f"{type(self).__name__} defines no train()")

    def prepare_model_and_tokenizer(
        self, model, tokenizer, previous_result: StageResult | None = None
    ):
        """The model, ready to train, and its tokenizer: those handed over, else of the stage before's folder, else of
        `model_name_or_path`. Where the stage trains, a fresh adapter alone does, or all weights if `lora_r` is 0."""
        import transformers

        config, folder = self.config, previous_result.model_path if previous_result else None
        if folder:
            config = replace(config, model_name_or_path=folder, revision=None)
        elif model is not None and (config.quantized or self.needs_folder):
            what = (
                "use_4bit and use_8bit load" if config.quantized else f"{self.needs_folder} starts"
            )
            raise ConfigError(f"{what} from a folder: set save_intermediate in the stage before")
        name = config.model_name_or_path if folder or model is None else "a model in memory"
        self.lineage["parent"] = {"model": name, "revision": config.revision}
        if model is None or config.quantized:
            model, tokenizer = load_model_and_tokenizer(config, self.needs_chat_template, self.task)
        else:
            tokenizer = tokenizer if self.hands_on else copy.deepcopy(tokenizer)
            prepare_tokenizer(tokenizer, config, self.needs_chat_template)
            dtype, model = (
                config.weight_dtype,
                merge_adapter(model),
            )  # it is handed on as it was, if it is handed on
            model = cast_weights(
                model if self.hands_on or model.dtype == dtype else copy.deepcopy(model), dtype
            )
        if self.task == "CAUSAL_LM":  # generation stops at the token that ends a turn
            model.generation_config.update(
                eos_token_id=stop_tokens(tokenizer), pad_token_id=tokenizer.pad_token_id
            )
        transformers.set_seed(config.seed)  # the adapter is the same, wherever the model came from
        return (
            add_adapter(model, config, self.task) if isinstance(config, TrainingConfig) else model
        ), tokenizer

    def save_model_and_tokenizer(self, model, tokenizer) -> str:
        return save_model(model, tokenizer, self.config.output_dir)

    def setup_logging(self) -> None:
        self.logs = start_logging(
            self.config.log_level, Path(self.config.output_dir, "training.log")
        )

    def cleanup_logging(self) -> None:
        self.logs.close()

    def execute(
        self, model=None, tokenizer=None, previous_result: StageResult | None = None
    ) -> StageResult:
        """Check, prepare, train, save. A ConfigError, which the user has to mend, passes through; any other exception
        becomes a failed result, its traceback in the log."""
        import transformers

        if previous_result and not previous_result.success:
            raise ConfigError(f"the stage before failed: {previous_result.error_message}")
        if model is not None and tokenizer is None:
            raise ConfigError(
                "a model is handed over with its tokenizer: execute(model, tokenizer)"
            )
        if self.used:
            self.data, self.marks = None if self.data is self.read else self.data, {}
        self.used, handed = (
            True,
            (model, tokenizer, previous_result.model_path if previous_result else None),
        )
        self.setup_logging()
        started, folder = time.time(), Path(self.config.output_dir)
        try:
            self.check()
            resume = vars(self.config).get("resume_from_checkpoint") is True and any(
                folder.glob("*.safetensors")
            )
            if self.once and resume and not self.stale():
                self.logger.info(
                    "%s is finished already; resume_from_checkpoint=false: run it anew", folder
                )
                return self.recorded()
            self.begin()
            if isinstance(self.config, ModelConfig):
                at: dict[str, Any] = (
                    {"model_name_or_path": handed[2], "revision": None} if handed[2] else {}
                )
                loaded = (
                    load_tokenizer(replace(self.config, **at))
                    if model is None
                    else (tokenizer, model.config)
                )
                check_encoded_rows(self, loaded[0], loaded[1].max_position_embeddings)
            transformers.set_seed(self.config.seed)
            model, tokenizer = self.prepare_model_and_tokenizer(model, tokenizer, previous_result)
            metrics = self.train(model, tokenizer)
            metrics, model = metrics if isinstance(metrics, tuple) else (metrics, model)
            if self.config.save_intermediate and is_main_process():
                if hasattr(model, "peft_config"):
                    self.artifacts["adapter"] = str(folder / "adapter")
                    with atomic_folder(folder / "adapter") as aside:
                        model.save_pretrained(aside)
                else:
                    shutil.rmtree(
                        folder / "adapter", ignore_errors=True
                    )  # of an older run in this folder
            model = merge_adapter(model)
            path = (
                self.save_model_and_tokenizer(model, tokenizer)
                if self.config.save_intermediate
                else None
            )
            if not self.hands_on:
                model, tokenizer, path = handed
            metrics = {**metrics, "seconds": round(time.time() - started, 1), **peak_memory()}
            result = StageResult(
                self.stage_name, True, path, path, metrics, self.artifacts, None, model, tokenizer
            )
            write_stage_json(
                self.config, result, {**self.lineage, "fingerprint": self.fingerprint()}
            )
            return result
        except ConfigError:
            raise
        except Exception as error:
            self.logger.debug("the failure in full", exc_info=True)
            full = f"no space left on the disk of {folder}: " * (
                shutil.disk_usage(folder).free < 2**20
            )
            result = StageResult(
                self.stage_name, False, error_message=f"{full}{type(error).__name__}: {error}"
            )
            self.logger.error(
                "%s failed: %s\nThe traceback is in %s",
                self.stage_name,
                result.error_message,
                folder / "training.log",
            )
            if not is_main_process():  # it has no log, and may be the only one that fails
                print(
                    f"process {os.environ['RANK']}: {traceback.format_exc()}",
                    file=sys.stderr,
                    flush=True,
                )
            return result
        finally:
            if model is not handed[0] and hasattr(
                model, "peft_config"
            ):  # it failed: what it was handed is as it was
                model.unload()
            self.cleanup_logging()


# ---- Data: load, detect, convert, split, encode ----------------------------------------------------------------------


# ---- Checks: what can be seen before the first step, without the model's weights ------------------------------------


def load_skeleton(config: ModelConfig) -> tuple:
    """(tokenizer, model on the meta device): all but the weights."""
    from transformers import AutoModelForCausalLM

    tokenizer, shape = load_tokenizer(config)
    with torch.device("meta"):
        return tokenizer, AutoModelForCausalLM.from_config(
            shape, trust_remote_code=config.trust_remote_code
        )


# ---- Model: load, quantize, adapter, merge ---------------------------------------------------------------------------


def cast_weights(model, dtype: torch.dtype):
    """`model` with all weights in `dtype`; buffers, such as rotary frequencies, stay as precise as they are."""
    if not all(weight.is_floating_point() for weight in model.parameters()):
        raise ConfigError(
            "a quantized model cannot be handed over; give its folder, and use_4bit or use_8bit"
        )
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def load_tokenizer(config: ModelConfig) -> tuple:
    """(tokenizer, configuration) of `model_name_or_path`, both as they lie there; no weights are read."""
    from transformers import AutoConfig, AutoTokenizer

    base, _, words = find_model_parts(config, weights=False)
    with as_config_error(f"model {config.model_name_or_path} cannot be loaded"):

        def load(auto, path: Path):
            where, more = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
            return auto.from_pretrained(where, trust_remote_code=config.trust_remote_code, **more)

        return load(AutoTokenizer, words), load(AutoConfig, base)


def load_model_and_tokenizer(
    config: ModelConfig, needs_chat_template: bool = True, task: str = "CAUSAL_LM"
):
    """(model, tokenizer) of `model_name_or_path`, quantized if asked for; an adapter is merged into its base. The
    tokenizer comes first, so that a missing chat template is said before weights are read."""
    import transformers
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    code, scores = {"trust_remote_code": config.trust_remote_code}, task == "SEQ_CLS"

    def load(base: Path, adapter: Path | None = None, task: str = task, **quantized):
        rest = {
            "dtype": config.weight_dtype,
            "attn_implementation": config.attn_implementation,
            **code,
            **quantized,
        }
        auto: Any = transformers.AutoModelForCausalLM
        if task == "SEQ_CLS":
            auto, rest = transformers.AutoModelForSequenceClassification, rest | {"num_labels": 1}
        model = auto.from_pretrained(base, use_safetensors=True, **rest)
        return PeftModel.from_pretrained(model, adapter).merge_and_unload() if adapter else model

    base, adapter, _ = find_model_parts(config)
    tokenizer, shape = load_tokenizer(config)
    kind = (
        json.loads((adapter / "adapter_config.json").read_text()).get("task_type")
        if adapter
        else task
    )
    classifies = any(
        name.endswith("ForSequenceClassification") for name in shape.architectures or ()
    )
    if not scores and (classifies or kind == "SEQ_CLS"):  # as weights, or as an adapter
        raise ConfigError(
            f"model {config.model_name_or_path} gives scores and writes nothing; give a language model"
        )
    prepare_tokenizer(tokenizer, config, needs_chat_template)
    with as_config_error(f"model {config.model_name_or_path} cannot be loaded"):
        if adapter and (
            config.quantized or scores
        ):  # they cannot take a merge, it has its own kind of model
            parts = [*sorted(base.glob("*.safetensors")), *sorted(adapter.glob("adapter_*"))]
            merge = functools.partial(load, base, adapter, kind)
            how = f"{kind} {config.weight_dtype}"
            base, adapter = (
                cached_folder(
                    "merging", parts, lambda folder: merge().save_pretrained(folder), how
                ),
                None,
            )
        if not config.quantized:
            return load(base, adapter).to(default_device()), tokenizer
        precision = (
            config.torch_dtype
            if config.bnb_4bit_compute_dtype == "auto"
            else config.bnb_4bit_compute_dtype
        )
        model = load(
            base,
            device_map={"": default_device()},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=config.use_4bit,
                load_in_8bit=config.use_8bit,
                bnb_4bit_quant_type=config.bnb_4bit_quant_type,
                bnb_4bit_compute_dtype=compute_dtype(precision),
                bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
                llm_int8_skip_modules=["score"]
                if scores
                else None,  # the head trains whole, so it stays as it is
            ),
        )
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

    targets, everywhere = (
        config.lora_target_modules,
        config.lora_target_modules in ([], ["all-linear"]),
    )
    linear = {
        name.split(".")[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    if not everywhere and not set(targets) <= linear:
        raise ConfigError(
            f"lora_target_modules={','.join(targets)}: the model's are {', '.join(sorted(linear))}"
        )
    if config.quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(
        model,
        LoraConfig(
            task_type=task,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules="all-linear" if everywhere else targets,
            bias=config.lora_bias,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
        ),
    )


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
        cast_weights(
            base,
            next(part for part in base.modules() if isinstance(part, torch.nn.Linear)).weight.dtype,
        )
        model = get_peft_model(base, lora)
        set_peft_model_state_dict(model, adapter)
    return model.merge_and_unload().requires_grad_(True)


# ---- Sampling: our own loop, since generate() is a third as fast on a CPU and keeps no log-probabilities -------------


# ---- Fit: transformers' Trainer behind one function ------------------------------------------------------------------


# ---- Asking other models: one run here, or one behind a server that speaks OpenAI's protocol -------------------------


# ---- Verifying answers -----------------------------------------------------------------------------------------------


# ---- Saving ----------------------------------------------------------------------------------------------------------


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
    folder, packages = (
        Path(config.output_dir),
        ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"),
    )
    if is_main_process():
        (folder / "stage_config.yaml").write_text(
            yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8"
        )
        write_json(
            folder / "stage.json",
            {
                "stage": result.stage_name,
                "output_dir": str(folder),
                "success": result.success,
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                **lineage,
                "model_path": result.model_path,
                "metrics": result.metrics,
                "artifacts": result.artifacts,
                "device": str(default_device()),
                "versions": {
                    "python": sys.version.split()[0],
                    **{name: version(name) for name in packages},
                },
            },
        )


# ---- Command line ----------------------------------------------------------------------------------------------------


def main(stage_class: type[BaseStage], doc: str) -> None:
    """The command line of a recipe. Exit status 0: done; 1: the stage failed; 2: the input has to be mended."""
    if {"-h", "--help"} & set(sys.argv):
        return print(f"{doc.strip()}\n\nOptions:\n{option_help(stage_class.config_class)}")
    exit_on_signals()
    try:
        words, options = read_command_line(sys.argv[1:])
        if words:
            raise ConfigError(f"unexpected word {words[0]!r}; options are written --name=value")
        with as_config_error("dry_run"):
            dry_run = TypeAdapter(bool).validate_python(options.pop("dry_run", False))
        stage_class, options = stage_class.resolve(options)
        config = stage_class.config_class(**resolve_names(stage_class.config_class, options))
        if not (config.enabled and config.save_intermediate):
            raise ConfigError(
                "enabled=false and save_intermediate=false are for the stages of a chain"
            )
        stage = stage_class(config)
        if dry_run:
            with start_logging(config.log_level):
                stage.check()
                lines, size = describe_stage(stage, *load_skeleton(stage.config))
                check_disk_space(config.output_dir, size)
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
