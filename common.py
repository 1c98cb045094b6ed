"""Shared by all recipes: load, quantize, adapt, merge and save a model; the contract of a stage;
the command line. The mathematics of an algorithm is in its recipe, everything else is in core/.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core import checkpoints, ownership
from core.adapters import add_adapter, merge_saved_adapter, share_adapted
from core.chat import prepare_tokenizer
from core.checks import check_encoded_rows, describe_stage
from core.cli import help_text, read_command_line, read_options_file, read_switch
from core.config import ModelConfig, StageConfig, TrainingConfig
from core.data import load_dataset_from_path, split_dataset  # noqa: F401 (for stages of your own)
from core.errors import ConfigError, as_config_error
from core.files import cached_folder, check_disk_space, has_weights
from core.fingerprints import compute_fingerprint
from core.hub import find_model_parts, load_skeleton, load_tokenizer
from core.logprobs import check_causal
from core.model_config import check_can_score, context_length, set_generation_config
from core.new_tokens import rows_to_start, start_new_rows
from core.quantization import (
    cast_weights,
    check_quantized,
    dequantize_base,
    keep_training_mode,
    refusing_integers,
)
from core.recipe_files import get_config_class, make_config, resolve_options
from core.rehearsal import rehearse_end
from core.run_end import describe_end, describe_resumption
from core.runtime import (
    compute_dtype,
    default_device,
    exit_on_signals,
    is_main_process,
    level_of_dry_run,
    logger,
    peak_memory,
    start_logging,
    warn_together,
)
from core.screen import busy, show_controls
from core.work import Work, estimate_fit

# -- the stage contract ---------------------------------------------------------------------------


@dataclass
class StageResult:
    """The result of a stage. `metrics` has x measured after training and x_before before it."""

    stage_name: str
    success: bool
    model_path: str | None = None  # folder of the model; None when save_intermediate is false
    tokenizer_path: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)  # name -> path of other saved results
    error_message: str | None = None  # last line of the traceback; the log has all of it
    # The live objects, for handing over in memory; they are never saved.
    model: Any = field(default=None, repr=False, compare=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)


class BaseStage:
    """One step of a chain. A subclass names itself and its config class, and defines `train`."""

    stage_name: str = ""
    config_class: type[StageConfig] = StageConfig
    needs_chat_template: bool = True  # false: the data is plain text
    task: str = "CAUSAL_LM"  # PEFT task type of the model; SEQ_CLS returns one score
    needs_folder: str = ""  # label of a stage whose input must be saved on disk
    hands_on: bool = True  # false: the next stage receives this stage's input model
    config: Any  # an instance of config_class

    def __init__(self, config: StageConfig):
        self.config = config
        # A subclass may define it as a property, which takes precedence over the config.
        is_property = isinstance(type(self).stage_name, property)
        if config.stage_name and not is_property:
            self.stage_name = config.stage_name
        self.logger = logger.getChild(self.stage_name)
        self.logs = contextlib.ExitStack()  # what setup_logging opened
        self.data: Any = None  # what load_data returned
        self.lineage: dict[str, Any] = {}  # for stage.json: parent model, data, reference, ...
        self.artifacts: dict[str, str] = {}
        self.start: str | None = None  # in a chain: hash of the fingerprints of the stages before
        self.reuse_finished = False  # true: execute returns the recorded result of the same run
        self.warns_of_options = True  # false if the chain has done so
        self._fingerprint: dict[str, Any] = {}
        self._changed_code: list[str] = []  # files that changed since Python imported them
        self._executed = False
        self._loaded_data: Any = None  # what load_data read, to tell it from `data` set by hand

    @classmethod
    def resolve(cls, options: dict[str, Any]) -> tuple[type[BaseStage], dict[str, Any], list[str]]:
        """(stage class, its options, notes on options without effect) for the `options` given. A
        recipe that stands for several others chooses one of them here."""
        return cls, options, []

    # Methods that a recipe defines or extends.

    def validate_config(self) -> None:
        """Raise ConfigError for options that do not go together. Opens nothing."""
        self.config.validate()

    def load_data(self) -> Any:
        """(training rows, evaluation rows). Needs no model; a dry run calls it too."""

    def sequences(self, row, tokenizer, context: int) -> tuple[list[tuple], bool] | None:
        """Encode a row of `load_data` for checks before training: ([(input_ids, labels)], whether
        it is truncated). Labels are None if nothing is imitated. Return None to skip the checks."""

    def work(self, lengths: Sequence[int], target_share: float) -> Work:
        """The work of training on rows of these lengths, for the estimates of a dry run."""
        return estimate_fit(self.config, self.data, lengths, target_share)

    def prepare_model_and_tokenizer(
        self, model, tokenizer, previous_result: StageResult | None = None
    ):
        """(model ready to train, tokenizer): those passed in, or loaded from the folder of the
        previous stage or `model_name_or_path`. An adapter trains, or all weights if lora_r is 0.

        A stage whose config is not a ModelConfig gets what was passed in, unchanged.
        """
        import transformers

        if not isinstance(self.config, ModelConfig):
            if model is None:
                raise ConfigError(f"{self.stage_name} loads no model; pass one to execute()")
            return model, tokenizer
        previous_folder = previous_result.model_path if previous_result else None
        self._refuse_model_in_memory(model, previous_folder)
        config = self._input_config(previous_folder)
        is_named = previous_folder or model is None
        name = config.model_name_or_path if is_named else "a model in memory"
        self.lineage["parent"] = {"model": name, "revision": config.revision}

        if model is None or config.quantized:
            model, tokenizer = load_model_and_tokenizer(config, self.needs_chat_template, self.task)
        else:
            model, tokenizer = self._adopt(model, tokenizer)
        if self.task == "CAUSAL_LM":
            set_generation_config(model, tokenizer, name)
        tokenizer.new_ids = rows_to_start(model, tokenizer)
        start_new_rows(model, tokenizer.new_ids)
        # Loading may have drawn random numbers; the adapter must not depend on it.
        transformers.set_seed(config.seed)
        if isinstance(config, TrainingConfig):
            model = add_adapter(model, config, self.task, tokenizer.new_ids)
            if config.lora_r:
                self.lineage["adapter"] = {"share_of_linear_weights": share_adapted(model)}
        return model, tokenizer

    def train(self, model, tokenizer) -> dict[str, float] | tuple[dict[str, float], Any]:
        """Train `model` in place. Returns the metrics, or (metrics, model) if the result is a
        different model."""
        raise NotImplementedError(f"{type(self).__name__} does not define train()")

    def save_model_and_tokenizer(self, model, tokenizer) -> Any:
        """Save both to the stage's folder; returns (path of the model, path of the tokenizer). A
        subclass may return one folder for both, or None."""
        folder = save_model(model, tokenizer, self.config.output_dir)
        return folder, folder

    def setup_logging(self) -> None:
        log_file = Path(self.config.output_dir, "training.log")
        self.logs = start_logging(self.config.log_level, log_file)

    def cleanup_logging(self) -> None:
        self.logs.close()

    # Methods that run the stage.

    def execute(
        self, model=None, tokenizer=None, previous_result: StageResult | None = None
    ) -> StageResult:
        """Check, claim the folder, prepare, train, save, record. Raises ConfigError for what the
        user can correct; any other exception becomes a failed result, its traceback in the log."""
        if previous_result and not previous_result.success:
            raise ConfigError(f"the stage before failed: {previous_result.error_message}")
        if model is not None and tokenizer is None:
            raise ConfigError("a model needs its tokenizer: execute(model, tokenizer)")
        self._forget_last_execution()
        with ownership.locked(Path(self.config.output_dir)):
            self.setup_logging()
            try:
                return self._run(model, tokenizer, previous_result)
            except ConfigError:
                raise
            except Exception as error:
                return self._failed_result(error)
            finally:
                self.cleanup_logging()

    def _run(self, model, tokenizer, previous_result: StageResult | None) -> StageResult:
        """The steps of `execute`, in its lock and its log."""
        import transformers

        previous_folder = previous_result.model_path if previous_result else None
        input_model, input_tokenizer = model, tokenizer
        started = time.time()
        self.check()
        if self._may_reuse_result():
            return self.recorded()
        self._claim_folder()
        self._check_rows(model, tokenizer, previous_folder)

        # Whatever ran before, the same seed gives the same stage.
        transformers.set_seed(self.config.seed)
        try:
            model, tokenizer = self.prepare_model_and_tokenizer(model, tokenizer, previous_result)
            if isinstance(self.config, TrainingConfig):
                rehearse_end(model, tokenizer, self.config)
            trained = self.train(model, tokenizer)
            metrics, model = trained if isinstance(trained, tuple) else (trained, model)

            self._save_adapter(model, tokenizer)
            model = merge_adapter(model)
        finally:
            # After a failure the caller gets its model back as it was, without our adapter.
            if model is not input_model and hasattr(model, "peft_config"):
                model.unload()
        paths: tuple[str | None, str | None] = (None, None)
        if self.config.save_intermediate:
            saved = self.save_model_and_tokenizer(model, tokenizer)
            # A stage that makes no model saves none; one folder may have both.
            paths = saved if isinstance(saved, tuple) else (saved, saved)
        # What such a stage makes, a reward model or figures, is not what the chain trains.
        if not self.hands_on:
            model, tokenizer = input_model, input_tokenizer
            paths = previous_folder, previous_folder

        metrics = {**metrics, "seconds": round(time.time() - started, 1), **peak_memory()}
        result = StageResult(
            self.stage_name, True, *paths, metrics, self.artifacts, None, model, tokenizer
        )
        self._record(result)
        return result

    def execute_and_record(
        self, model=None, tokenizer=None, previous_result: StageResult | None = None
    ) -> StageResult:
        """`execute`. If a subclass overrides it, also do what ours does around training: check,
        claim the folder, record the result."""
        if type(self).execute is BaseStage.execute:
            return self.execute(model, tokenizer, previous_result)
        with ownership.locked(Path(self.config.output_dir)):
            self.check()
            self._claim_folder()
            result = self.execute(model, tokenizer, previous_result)
            if not isinstance(result, StageResult):
                raise TypeError(f"its execute() returned {result!r}, not a StageResult")
            if result.success:
                self._record(result)
        return result

    def _record(self, result: StageResult) -> None:
        lineage = {**self.lineage, "fingerprint": self.fingerprint()}
        checkpoints.write_stage_record(self.config, result, lineage)

    def check(self) -> None:
        """Raise ConfigError for everything that can be detected before a model is loaded."""
        with as_config_error(self.stage_name, ValueError):
            self.validate_config()
        if self.warns_of_options:
            warn_together("options", self.config.notes)
        ownership.refuse_own_inputs(self.config)
        ownership.refuse_foreign_files(Path(self.config.output_dir))
        if self.data is None:
            self.data = self._loaded_data = self.load_data()

    def fingerprint(self) -> dict[str, Any]:
        """What decides the result of the stage (core/fingerprints.py); call `check` first."""
        if not self._fingerprint:
            data_digest = self.lineage.get("data", {}).get("sha256")
            self._fingerprint, self._changed_code = compute_fingerprint(
                self.config, type(self), data_digest, self.start
            )
        return self._fingerprint

    def stale(self) -> str:
        """Why the stage has to run; empty if it has finished with the same fingerprint."""
        return checkpoints.find_reason_to_run(Path(self.config.output_dir), self.fingerprint())

    def recorded(self) -> StageResult:
        """The result of a finished stage, from its stage.json."""
        record = checkpoints.read_finished_stage(self.config)
        path = record["model_path"]
        return StageResult(
            record["stage"], True, path, path, record["metrics"], record["artifacts"]
        )

    def _forget_last_execution(self) -> None:
        """Reload the data in a second execution, unless a caller has set `data` by hand."""
        if self._executed:
            if self.data is self._loaded_data:
                self.data = None
            self._fingerprint = {}
        self._executed = True

    def _may_reuse_result(self) -> bool:
        """Whether the folder has the result of this same run, including weights."""
        folder = Path(self.config.output_dir)
        resume = vars(self.config).get("resume_from_checkpoint")
        may_reuse = self.reuse_finished and resume is True and has_weights(folder)
        if not may_reuse or self.stale():
            return False
        self.logger.info(
            "%s is finished already; use --resume_from_checkpoint=false to train again", folder
        )
        return True

    def _claim_folder(self) -> None:
        """Claim output_dir for this run; refuse code that changed after Python imported it."""
        fingerprint = self.fingerprint()
        # A part of a larger run (reuse_finished) continues with the code that the run began with.
        if self._changed_code and not self.reuse_finished:
            files = ", ".join(self._changed_code)
            raise ConfigError(f"{files} changed since it was imported here; restart Python")
        checkpoints.claim_run_folder(self.config, fingerprint)

    def _input_config(self, previous_folder: str | None) -> Any:
        """The config, with the previous stage's folder as its model."""
        if not previous_folder:
            return self.config
        return replace(self.config, model_name_or_path=previous_folder, revision=None)

    def _check_rows(self, model, tokenizer, previous_folder: str | None) -> None:
        """Encode the first rows as training will; raise ConfigError if nothing can be learned."""
        if not isinstance(self.config, ModelConfig):
            return
        if model is None:
            tokenizer, model_config = load_tokenizer(self._input_config(previous_folder))
        else:
            model_config = model.config
        if self.task == "SEQ_CLS":
            check_can_score(model_config)
        check_encoded_rows(self, tokenizer, context_length(model_config))

    def _refuse_model_in_memory(self, model, previous_folder: str | None) -> None:
        """Raise ConfigError if the stage reads weights from a folder and there is none."""
        if previous_folder or model is None:
            return
        if self.config.quantized:
            reader = "use_4bit and use_8bit load"
        elif self.needs_folder:
            reader = f"{self.needs_folder} starts"
        else:
            return
        raise ConfigError(f"{reader} from a folder: set save_intermediate in the previous stage")

    def _adopt(self, model, tokenizer) -> tuple:
        """Prepare the (model, tokenizer) passed in for this stage. They are copied if the next
        stage is to receive them unchanged."""
        config = self.config
        if not self.hands_on:
            tokenizer = copy.deepcopy(tokenizer)
        prepare_tokenizer(tokenizer, config, self.needs_chat_template)
        model = merge_adapter(model)
        if not self.hands_on and model.dtype != config.weight_dtype:
            model = copy.deepcopy(model)
        return cast_weights(model, config.weight_dtype), tokenizer

    def _save_adapter(self, model, tokenizer) -> None:
        """Save the adapter beside the merged model, and remove one that an earlier run saved."""
        if not self.config.save_intermediate or not is_main_process():
            return
        folder = Path(self.config.output_dir, "adapter")
        if not hasattr(model, "peft_config"):
            ownership.remove_recorded(folder)
            return
        self.artifacts["adapter"] = str(folder)
        with ownership.published(folder) as unfinished:
            model.save_pretrained(unfinished)
            if tokenizer.new_ids:  # the base model does not have them
                tokenizer.save_pretrained(unfinished)

    def _failed_result(self, error: Exception) -> StageResult:
        """Log the exception being handled and return a failed result for it."""
        folder = Path(self.config.output_dir)
        self.logger.debug("the failure in full", exc_info=True)
        message = f"{type(error).__name__}: {error}"
        if shutil.disk_usage(folder).free < 2**20:
            message = f"no space left on the disk of {folder}: {message}"
        log = folder / "training.log"
        self.logger.error("%s failed: %s\nThe traceback is in %s", self.stage_name, message, log)
        if not is_main_process():  # this process has no log, and may be the only one that fails
            trace = traceback.format_exc()
            print(show_controls(f"process {os.environ['RANK']}: {trace}"), file=sys.stderr)
        return StageResult(self.stage_name, False, error_message=message)


# -- loading --------------------------------------------------------------------------------------


@busy("loading the model")
def load_model_and_tokenizer(
    config: ModelConfig, needs_chat_template: bool = True, task: str = "CAUSAL_LM"
):
    """Load (model, tokenizer) of `model_name_or_path`, quantized if the config says so, and with
    its adapter merged if it has one. Raises ConfigError."""
    base, adapter, _ = find_model_parts(config)
    # The tokenizer comes first: a missing chat template is reported before any weights are read.
    tokenizer, model_config = load_tokenizer(config)
    adapter_task = task
    if adapter:
        settings = json.loads((adapter / "adapter_config.json").read_text())
        adapter_task = settings.get("task_type")
    architectures = model_config.architectures or []
    is_classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
    if task != "SEQ_CLS" and (is_classifier or adapter_task == "SEQ_CLS"):
        raise ConfigError(
            f"model {config.model_name_or_path} returns scores, not text; give a language model"
        )
    prepare_tokenizer(tokenizer, config, needs_chat_template)
    how = "loaded in 4 or 8 bits" if config.quantized else "loaded"
    with as_config_error(f"model {config.model_name_or_path} cannot be {how}"):
        # An adapter cannot be merged into quantized weights, or may be for another task than the
        # stage: then the merged model is saved once and loaded like any other.
        if adapter and (config.quantized or task == "SEQ_CLS"):
            base = merged_folder(config, base, adapter, adapter_task)
            adapter = None
        if config.quantized:
            model = load_quantized(config, base, task)
        else:
            model = load_weights(config, base, adapter, task).to(default_device())
        if task == "CAUSAL_LM":
            with refusing_integers(model):
                check_causal(model, config.model_name_or_path)
    return model, tokenizer


def load_weights(
    config: ModelConfig, base: Path, adapter: Path | None, task: str | None, **quantization
):
    """The model in the folder `base`, with `adapter` merged into it."""
    import transformers

    options = {
        "dtype": config.weight_dtype,
        "attn_implementation": config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
        "use_safetensors": True,  # other formats are pickles, which can run code
        **quantization,
    }
    auto_class: Any = transformers.AutoModelForCausalLM
    if task == "SEQ_CLS":
        auto_class = transformers.AutoModelForSequenceClassification
        options["num_labels"] = 1
    model = auto_class.from_pretrained(base, **options)
    if adapter is None:
        return model
    if (adapter / "tokenizer_config.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
        num_embeddings = model.get_input_embeddings().weight.shape[0]
        start_new_rows(model, range(num_embeddings, len(tokenizer)))
    return merge_saved_adapter(model, adapter)


def merged_folder(config: ModelConfig, base: Path, adapter: Path, task: str | None) -> Path:
    """The cached folder of `base` with `adapter` merged into it; created on first use."""

    def save_merged(folder: Path) -> None:
        load_weights(config, base, adapter, task).save_pretrained(folder)

    parts = [*sorted(base.glob("*.safetensors")), *sorted(adapter.glob("adapter_*"))]
    return cached_folder("merging", parts, save_merged, f"{task} {config.weight_dtype}")


# -- quantization ---------------------------------------------------------------------------------


def load_quantized(config: ModelConfig, base: Path, task: str):
    """The model in the folder `base`, its linear layers quantized by bitsandbytes."""
    from transformers import BitsAndBytesConfig

    precision = config.bnb_4bit_compute_dtype
    if precision == "auto":
        precision = config.torch_dtype
    quantization = BitsAndBytesConfig(
        load_in_4bit=config.use_4bit,
        load_in_8bit=config.use_8bit,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=compute_dtype(precision),
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        # The head of a reward model trains in full, so it is not quantized.
        llm_int8_skip_modules=["score"] if task == "SEQ_CLS" else None,
    )
    device = {"": default_device()}
    model = load_weights(
        config, base, None, task, device_map=device, quantization_config=quantization
    )
    check_quantized(model)
    for module in model.modules():
        # On some CPUs evaluation repacks 4-bit weights: then gradients do not pass, and
        # dequantizing gives noise.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        # On a CPU, products with 8-bit weights differ between training and evaluation; a merge
        # matches those of training.
        if type(module).__name__ == "Linear8bitLt" and default_device().type == "cpu":
            keep_training_mode(module)
    return model


# -- LoRA and merging -----------------------------------------------------------------------------


def merge_adapter(model):
    """The plain model with its adapter merged and all weights trainable. A quantized base is
    dequantized first: rounding after the merge would undo much of what the adapter learned."""
    if not hasattr(model, "peft_config"):
        return model
    if hasattr(model.get_base_model(), "hf_quantizer"):
        model = dequantize_base(model)
    return model.merge_and_unload().requires_grad_(True)


# -- saving ---------------------------------------------------------------------------------------


def save_model(model, tokenizer, folder: str) -> str:
    """Save both to `folder` and return it. A crash leaves no half-written file there."""
    if not is_main_process():
        return folder
    target = Path(folder)
    with ownership.published(target) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return folder


# -- the command line -----------------------------------------------------------------------------


def main(stage_class: type[BaseStage], doc: str) -> None:
    """The command line of a recipe. Exit status 0: done; 1: the stage failed; 2: invalid input."""
    exit_on_signals()
    try:
        if {"-h", "--help"} & set(sys.argv):
            print(help_text(stage_class, doc, sys.argv[1:]))
            return
        stage, dry_run = build_stage(stage_class, sys.argv[1:])
        if dry_run:
            log_dry_run(stage)
            return
        stage.reuse_finished = True
        result = stage.execute_and_record()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # For example a full disk, before logging has started.
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if not result.success:
        if is_main_process():
            print(describe_resumption(stage.config), file=sys.stderr)
        sys.exit(1)
    if is_main_process():
        print(describe_end(stage, result))


def build_stage(stage_class: type[BaseStage], arguments: Sequence[str]) -> tuple[BaseStage, bool]:
    """(stage, dry_run) from a command line; raises ConfigError."""
    words, options = read_command_line(arguments)
    if words:
        raise ConfigError(f"unexpected word {words[0]!r}; options are written --name=value")
    in_file = read_options_file(options.pop("config", None))
    dry_run = read_switch("dry_run", options.pop("dry_run", in_file.pop("dry_run", False)))
    stage_class, resolved, notes = resolve_options(stage_class, [in_file, options])
    config = make_config(get_config_class(stage_class), resolved, notes)
    if not (config.enabled and config.save_intermediate):
        raise ConfigError("enabled=false and save_intermediate=false are for the stages of a chain")
    return stage_class(config), dry_run


def log_dry_run(stage: BaseStage) -> None:
    """Check everything that needs no weights, and log what the stage would do."""
    config = stage.config
    with start_logging(level_of_dry_run(config.log_level)):
        stage.check()
        lines, bytes_written = describe_stage(stage, *load_skeleton(config))
        check_disk_space(config.output_dir, bytes_written)
        logger.info("%s", "\n".join(lines))
