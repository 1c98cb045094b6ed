"""Recipes in sequence, from a YAML file, handing the model on.

    python chain.py yaml/quickstart.yaml
    python chain.py --config=pipeline.yaml --stages sft dpo --sft.learning_rate=1e-4 --output_dir=outputs/try2
    python chain.py pipeline.yaml --dry_run

What the command line does not name, the YAML decides. A stage is a file in recipes/ (`sft` is recipes/sft.py), a path
to a copy of one (`research/my_dpo.py`), or a class given to `Pipeline.register_stage`. The chain knows no algorithm.
From Python: `Pipeline.from_yaml("pipeline.yaml", output_dir="outputs/a").run()`, a list of StageResults.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Sequence, get_type_hints

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

import report
from common import BaseStage, StageResult, load_skeleton, save_model
from core.checks import describe_stage
from core.cli import option_help, read_command_line
from core.config import (
    Folder,
    ModelConfig,
    Names,
    Precision,
    StageConfig,
    coerce_fields,
    replace_aliases,
    resolve_names,
)
from core.errors import ConfigError, as_config_error, unknown_name
from core.files import atomic_folder, check_disk_space, file_digest, write_json
from core.runtime import exit_on_signals, is_main_process, logger, start_logging
from core.statistics import before_and_after

RECIPES = Path(__file__).resolve().parent / "recipes"
SHARED = (
    "model_name_or_path",
    "revision",
    "torch_dtype",
    "trust_remote_code",
    "use_auth_token",
    "log_level",
)


@dataclass
class PipelineConfig:
    """The top level of a pipeline's YAML. The first six options are handed to every stage that has them."""

    aliases: ClassVar[dict[str, str]] = {"model": "model_name_or_path"}

    model_name_or_path: str = ""  # what the first stage starts from: hub name, folder or .gguf file
    revision: str | None = None  # branch, tag or commit of a hub name
    torch_dtype: Precision = "auto"  # precision of every stage
    trust_remote_code: bool = False  # true runs Python code that comes with the model
    use_auth_token: bool = (
        False  # true: gated models, with your login (`hf auth login`, or the variable HF_TOKEN)
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # of the lines on the screen
    output_dir: Folder = "outputs"  # OUT/01_sft/, OUT/02_.../, OUT/final/, OUT/pipeline.json, OUT/pipeline_training.log
    stages: Names = field(default_factory=list)  # in order; a stage may stand twice
    stage_configs: dict[str, dict[str, Any] | None] = field(
        default_factory=dict
    )  # by name (sft) or by folder (02_sft)
    save_final_model: bool = True  # OUT/final has the last model
    cleanup_intermediate: bool = (
        False  # delete the models handed from stage to stage once the whole chain succeeded
    )
    dry_run: bool = False  # check every stage's config and data, print the plan, write nothing
    from_stage: str | None = (
        None  # run this stage and those after it again; those before it must be finished
    )
    until: str | None = None  # stop after this stage
    force_restart: bool = False  # run all again, from the start, whatever is finished
    auto_resume: bool = True  # false: the same as force_restart
    enable_state_persistence: bool = (
        True  # false: the same as force_restart; the records are written all the same
    )
    hub_token: str | None = (
        None  # refused: a token comes from `hf auth login` or the variable HF_TOKEN
    )
    push_adapter_only: bool = False  # not built; refused
    convert_to_gguf: bool = False  # not built; refused
    gguf_quantization: str | None = None  # read with convert_to_gguf only
    gguf_output_path: str | None = None  # the same
    push_to_hub: bool = False  # not built yet; refused
    hub_repo_id: str | None = None  # where to push
    hub_private: bool = True  # whether that repository is private
    hub_commit_message: str | None = None  # of the push

    def __post_init__(self):
        coerce_fields(self)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file, where 2e-4 is a number. Builds no objects. Raises ConfigError naming the line."""
    with as_config_error(f"{path} cannot be read as YAML"):
        try:
            values = YAML(typ="safe", pure=True).load(Path(path))
        except MarkedYAMLError as error:
            raise ConfigError(
                f"{path}, line {error.problem_mark.line + 1}: {error.problem}"
            ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected lines of the form key: value")
    return values


class Pipeline:
    """The stages of a config, checked at construction: `Pipeline(PipelineConfig(...)).run()`."""

    registry: ClassVar[dict[str, type[BaseStage]]] = {}

    @classmethod
    def register_stage(cls, name: str, stage_class: type[BaseStage]) -> None:
        """Make `name` usable in `stages`. The config class is the stage's `config_class`, or the annotation of
        `config` on its `__init__`."""
        cls.registry[name] = stage_class

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Pipeline:
        """The pipeline of a YAML file; `overrides` are top-level options, or a stage's as {"sft.seed": 1}."""
        return cls.from_dict(load_yaml(path), **overrides)

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> Pipeline:
        per_stage: dict[str, dict[str, Any]] = {}
        for key in [key for key in overrides if "." in key]:
            stage, option = key.split(".", 1)
            per_stage.setdefault(stage, {})[option] = overrides.pop(key)
        written, overrides = (
            resolve_names(PipelineConfig, values),
            resolve_names(PipelineConfig, overrides),
        )
        return cls(
            PipelineConfig(**written | overrides), per_stage, PipelineConfig(**written).stages
        )

    def __init__(
        self,
        config: PipelineConfig,
        overrides: dict[str, dict] | None = None,
        declared: Sequence[str] = (),
    ):
        self.config, self.overrides, self.results = config, overrides or {}, []
        refuse_unbuilt(config)
        if not config.stages:
            raise ConfigError("stages is missing; name at least one, for example stages: [sft]")
        self.folders = [f"{i:02d}_{Path(name).stem}" for i, name in enumerate(config.stages, 1)]
        here = {*self.folders, *(folder[3:] for folder in self.folders)}
        known = {
            Path(str(name)).stem for name in (*declared, *self.registry, *RECIPES.glob("*.py"))
        }
        known |= here | {f"{i:02d}_{Path(name).stem}" for i, name in enumerate(declared, 1)}
        for source, names, valid in (
            ("stage_configs: ", config.stage_configs, known),
            ("", self.overrides, here),
        ):
            for name in names:
                if name not in valid:
                    raise ConfigError(source + unknown_name("stage", name, valid))
        self.unused = sorted({*config.stage_configs} - here)
        self.stages = [
            self.stage(name, folder) for name, folder in zip(config.stages, self.folders)
        ]
        self.enabled = [
            folder for folder, stage in zip(self.folders, self.stages) if stage.config.enabled
        ]
        self.places = {
            name: n
            for n, folder in [*enumerate(self.enabled)][::-1]
            for name in (folder, folder[3:])
        }
        for option in ("from_stage", "until"):
            if (name := getattr(config, option)) and name not in self.places:
                raise ConfigError(f"{option}: " + unknown_name("stage", name, self.places))
        if (
            config.from_stage
            and config.until
            and self.places[config.until] < self.places[config.from_stage]
        ):
            raise ConfigError(
                f"until={config.until} stands before from_stage={config.from_stage}: nothing would run"
            )
        saved = True  # whether the model that a stage is handed lies in a folder too
        for folder, stage in zip(self.folders, self.stages):
            if (
                stage.config.enabled
                and not saved
                and (stage.needs_folder or stage.config.quantized)
            ):
                raise ConfigError(
                    f"stage {folder} starts from a folder: set save_intermediate in the stage before"
                )
            saved = (
                stage.config.save_intermediate if stage.config.enabled and stage.hands_on else saved
            )
            for option, name in links(stage.config).items():
                named = [
                    s
                    for f, s in zip(self.folders, self.stages)
                    if f in self.enabled and f < folder and name in (f, f[3:])
                ]
                if not named:
                    raise ConfigError(
                        f"stage {folder}: {option}=stage:{name}: no stage before it is named {name}"
                    )
                if not named[-1].config.save_intermediate:
                    raise ConfigError(
                        f"stage {folder}: {option}=stage:{name}: it sets save_intermediate=false"
                    )

    def stage(self, name: str, folder: str) -> BaseStage:
        """The stage of a name, with its config: command line over stage over pipeline over default."""
        stage_class, short = self.find_class(name), Path(name).stem
        try:
            own: dict[str, Any] = {}
            for source in (self.config.stage_configs, self.overrides):
                for key in (short, folder):
                    own |= replace_aliases(stage_class.config_class, source.get(key) or {})
            stage_class, own = stage_class.resolve(own)
            config_class = stage_class.config_class
            if config_class is StageConfig:
                config_class = get_type_hints(stage_class.__init__).get("config", StageConfig)
            own = resolve_names(config_class, own)
            if "output_dir" in own:
                raise ConfigError(
                    "output_dir goes to the top of the YAML; a stage's folder is numbered inside it"
                )
            if "model_name_or_path" in own and folder != self.folders[0]:
                raise ConfigError(
                    "it starts from the model of the stage before; remove model_name_or_path"
                )
            own["output_dir"] = str(Path(self.config.output_dir, folder))
            names = {f.name for f in fields(config_class)}
            shared = {key: getattr(self.config, key) for key in SHARED if key in names}
            config = config_class(**{"stage_name": short} | shared | own)
            config.validate()
        except ConfigError as error:
            raise ConfigError(f"stage {folder}: {error}") from None
        return stage_class(config)

    def find_class(self, name: str) -> type[BaseStage]:
        """The class registered under `name`, or defined by the recipe of that name or path."""
        if name in self.registry:
            return self.registry[name]
        path = Path(name).expanduser() if name.endswith(".py") else RECIPES / f"{name}.py"
        if not path.is_file():
            raise ConfigError(
                unknown_name(
                    "stage", name, [*self.registry, *(file.stem for file in RECIPES.glob("*.py"))]
                )
            )
        which = hashlib.sha256(
            f"{path.resolve()} {file_digest(path)}".encode()
        ).hexdigest()  # a changed file is another one
        spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}_{which[:12]}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        with as_config_error(f"stage {name} cannot be imported"):
            spec.loader.exec_module(module)
        own = [
            c for c in vars(module).values() if isinstance(c, type) and c.__module__ == spec.name
        ]
        classes = [c for c in own if issubclass(c, BaseStage)]
        if len(classes) != 1:
            raise ConfigError(
                f"stage {name}: {path} must define one subclass of BaseStage, and defines {len(classes)}"
            )
        return classes[0]

    def plan(self) -> str:
        first = next((stage.config for stage in self.stages if stage.config.enabled), self.config)
        source, rows = vars(first).get("model_name_or_path", self.config.model_name_or_path), []
        for folder, stage in zip(self.folders, self.stages):
            enabled, hands_on = stage.config.enabled, stage.config.enabled and stage.hands_on
            rows.append(
                (
                    folder,
                    source if enabled else "skipped: enabled is false",
                    stage.config.output_dir,
                )
            )
            source = f"the model of {folder}" if hands_on else source
        return table(("stage", "starts from", "folder"), rows)

    def check(self) -> list[str]:
        """Everything that can be refused before a model is loaded: configs and data of all stages, room on the disk.
        Returns what the stages will do, in lines."""
        lines, needed, loaded = [], 0.0, None
        for folder, stage in zip(self.folders, self.stages):
            if stage.config.enabled:
                try:
                    stage.check()
                    if not isinstance(stage.config, ModelConfig):
                        continue
                    more, size = describe_stage(
                        stage, *(loaded := loaded or load_skeleton(stage.config))
                    )
                except ConfigError as error:
                    raise ConfigError(f"stage {folder}: {error}") from None
                lines += [f"\n{folder}", *more]
                needed += size
        check_disk_space(self.config.output_dir, needed)
        return lines

    def run(self) -> list[StageResult]:
        """Run the stages in order, each on the model of the one before; stops at the first that fails, deleting
        nothing. With dry_run, check and print the plan only. Raises ConfigError before the first stage runs."""
        config, out = self.config, Path(self.config.output_dir)
        with start_logging(
            config.log_level, None if config.dry_run else out / "pipeline_training.log"
        ):
            lines = self.check()
            logger.info("%s", self.plan())
            if self.unused:
                logger.info(
                    "not used, since no such stage runs: stage_configs of %s",
                    ", ".join(self.unused),
                )
            if config.dry_run:
                logger.info("%s", "\n".join(lines))
                return []
            finished, self.results = [*(known := self.finished())], []
            result: StageResult | None = None
            for number, (folder, stage) in enumerate(zip(self.folders, self.stages), 1):
                if not stage.config.enabled:
                    logger.info("\n%s skipped: enabled is false", folder)
                    continue
                if config.until and len(self.results) > self.places[config.until]:
                    break
                if finished:
                    result = finished.pop(0)
                    self.results.append(result)
                    logger.info("%s is finished already", folder)
                    continue
                logger.info("\n%d/%d %s", number, len(self.stages), folder)
                self.write_state(running=folder)
                try:
                    for option, name in links(stage.config).items():
                        setattr(
                            stage.config, option, self.artifact(name, option.removesuffix("_path"))
                        )
                    current = stage.execute(
                        result and result.model, result and result.tokenizer, result
                    )
                    if not isinstance(current, StageResult):
                        raise TypeError(f"its execute() returned {current!r}, not a StageResult")
                except (
                    Exception
                ) as error:  # seen only once the model was there, or of an execute() of its own
                    logger.debug("the failure in full", exc_info=True)
                    current = StageResult(
                        stage.stage_name, False, error_message=f"{type(error).__name__}: {error}"
                    )
                    logger.error("%s: %s", folder, current.error_message)
                except SystemExit:  # by a signal
                    self.write_state(interrupted=folder)
                    raise
                if (
                    result and current.success and not (current.model or current.model_path)
                ):  # it left the model alone
                    current = replace(
                        current,
                        model_path=result.model_path,
                        model=result.model,
                        tokenizer=result.tokenizer,
                    )
                if result:
                    result.model = result.tokenizer = None  # one model in memory at a time
                self.results.append(current)
                if not current.success:
                    self.write_state(failed=folder)
                    logger.error(
                        "stage %s failed; the log is %s", folder, out / "pipeline_training.log"
                    )
                    return self.results
                result = current
            if len(self.results) == len(self.enabled):
                kept = len(known) == len(self.results) and self.has_final()
                if (
                    config.save_final_model
                    and result
                    and not kept
                    and (result.model or result.model_path)
                ):
                    self.save_final(result, out / "final")
                if config.cleanup_intermediate and is_main_process():
                    self.clean_up(result)
            self.write_state(finished=len(self.results) == len(self.enabled))
            logger.info("\n%s", self.summary())
        return self.results

    def finished(self) -> list[StageResult]:
        """The results of the stages, from the first on, that need not run: they are done with the same options, data,
        code and start, and their model is there for what follows. Says why the next one has to run."""
        config, running = (
            self.config,
            [(f, s) for f, s in zip(self.folders, self.stages) if s.config.enabled],
        )
        start, reasons = "", []
        for _, stage in running:
            stage.start = hashlib.sha256(start.encode()).hexdigest() if start else None
            start += json.dumps(stage.fingerprint(), sort_keys=True)
            reasons.append(stage.stale())
        anew = config.force_restart or not (config.auto_resume and config.enable_state_persistence)
        first = next((n for n, reason in enumerate(reasons) if reason or anew), len(running))
        if config.from_stage:
            if first < (wanted := self.places[config.from_stage]) and not anew:
                why = f"{running[first][0]} has to run first: {reasons[first]}"
                raise ConfigError(f"from_stage={config.from_stage}: {why}")
            first, anew = wanted, True
        results = [stage.recorded() for _, stage in running[:first]]
        kept = lambda path: path and any(Path(path).glob("*.safetensors"))
        if first < len(running) or not self.has_final():
            while (
                first
                and not kept(results[first - 1].model_path)
                and any(s.hands_on for _, s in running[:first])
            ):
                first -= 1  # its weights were not kept
        if 0 < first < len(running) or (
            first < len(running) and Path(running[0][1].config.output_dir).exists()
        ):
            why = reasons[first] or ("as asked" if anew else "its weights are gone")
            logger.info("from %s on: %s", running[first][0], why)
        for _, stage in running[first:]:
            if anew and "resume_from_checkpoint" in vars(stage.config):
                stage.config.resume_from_checkpoint = False
        return results[:first]

    def artifact(self, stage: str, name: str) -> str:
        """What the last stage of that name left: its artifact `name`, its only one but the adapter, or its model."""
        result = [
            made
            for folder, made in zip(self.enabled, self.results)
            if stage in (folder, folder[3:])
        ][-1]
        left = [path for kind, path in result.artifacts.items() if kind != "adapter"] or [
            result.model_path
        ]
        left = [result.artifacts[name]] if name in result.artifacts else left
        if len(left) != 1 or left[0] is None:
            raise ConfigError(
                f"stage {stage} leaves no {name}, but {', '.join(result.artifacts) or 'nothing'}"
            )
        return left[0]

    def marks(self) -> list[Path]:
        """What tells whose model OUT/final has, and whose the last stage that hands one on has left."""
        makers = [
            stage.config.output_dir
            for stage in self.stages
            if stage.config.enabled and stage.hands_on
        ]
        return [
            Path(folder, "fingerprint.json")
            for folder in (f"{self.config.output_dir}/final", *makers[-1:])
        ]

    def has_final(self) -> bool:
        same = (
            all(file.exists() for file in self.marks())
            and len({file.read_bytes() for file in self.marks()}) == 1
        )
        return same and any(self.marks()[0].parent.glob("*.safetensors"))

    def save_final(self, result: StageResult, folder: Path) -> None:
        """OUT/final: the last stage's model, by hard links where the file system has them."""
        if not is_main_process():
            return
        if result.model_path is None:
            save_model(result.model, result.tokenizer, str(folder))
            shutil.copy(*self.marks()[::-1])
            return
        records = shutil.ignore_patterns(
            "adapter", "checkpoints*", "runs", "wandb", "stage*", "*.jsonl", "*.log", ".*"
        )
        with atomic_folder(folder) as aside:
            try:
                shutil.copytree(
                    result.model_path,
                    aside,
                    ignore=records,
                    copy_function=os.link,
                    dirs_exist_ok=True,
                )
            except shutil.Error:  # no hard links here
                shutil.copytree(result.model_path, aside, ignore=records, dirs_exist_ok=True)

    def clean_up(self, last: StageResult | None) -> None:
        """Delete weights and checkpoints of the stages; the last model's only when OUT/final has it. Records stay."""
        kept = {None} if self.config.save_final_model else {None, last and last.model_path}
        for folder in map(Path, sorted({result.model_path for result in self.results} - kept)):
            for file in [*folder.glob("*.safetensors"), *folder.glob("adapter/*.safetensors")]:
                file.unlink()
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            logger.info("deleted the weights in %s", folder)

    def write_state(self, **state: Any) -> None:
        """OUT/pipeline.json and OUT/report.html: the plan, where the chain stands, and the results so far."""
        if is_main_process():
            results = [
                {k: v for k, v in vars(r).items() if k not in ("model", "tokenizer")}
                for r in self.results
            ]
            plan = {
                folder: asdict(stage.config) for folder, stage in zip(self.folders, self.stages)
            }
            state = {
                "state": state,
                "results": results,
                "config": asdict(self.config),
                "plan": plan,
            }
            write_json(Path(self.config.output_dir, "pipeline.json"), state)
            try:
                report.write(self.config.output_dir)
            except Exception as error:  # a page must not cost a run
                logger.warning("no report: %s", error)

    def summary(self) -> str:
        rows = []
        for folder, result in zip(self.enabled, self.results):
            minutes, where = (
                f"{result.metrics.get('seconds', 0) / 60:.1f}",
                str(Path(self.config.output_dir, folder)),
            )
            for name, change in (before_and_after(result.metrics) or {"": ""}).items():
                rows.append((folder, minutes, name, change, where))
                folder = minutes = where = ""
        return table(("stage", "minutes", "figure", "before -> after", "folder"), rows)


def refuse_unbuilt(config: PipelineConfig) -> None:
    """Refuse, with what to do instead, the options of older configuration files that are not built."""
    final, name = f"{config.output_dir}/final", config.hub_repo_id or "NAME/MODEL"
    options = (
        "--private " * config.hub_private
        + f"--commit-message={config.hub_commit_message or 'model'!r}"
    )
    folder = f"{config.output_dir}/NN_STAGE/adapter" if config.push_adapter_only else final
    if config.hub_token:
        raise ConfigError(
            "hub_token is refused: a secret in a file is read by others. Log in by `hf auth login`, or "
            "set the variable HF_TOKEN, and write use_auth_token: true"
        )
    if config.push_to_hub or config.push_adapter_only:
        raise ConfigError(
            f"{'push_to_hub' if config.push_to_hub else 'push_adapter_only'} is not built yet; set it to "
            f"false and run, after the chain: hf upload {name} {folder} {options}"
        )
    if config.convert_to_gguf:
        raise ConfigError(
            "convert_to_gguf is not built yet; set it to false and run, after the chain, llama.cpp's "
            f"convert_hf_to_gguf.py {final} --outfile {config.gguf_output_path or 'model.gguf'} "
            f"--outtype {config.gguf_quantization or 'q8_0'}"
        )


def links(config: StageConfig) -> dict[str, str]:
    """{option: stage} of the options written as stage:NAME, which stand for what that stage leaves."""
    return {
        key: value[6:]
        for key, value in vars(config).items()
        if isinstance(value, str) and value[:6] == "stage:"
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in [head, *rows]
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def main(arguments: list[str] | None = None) -> None:
    """The command line. Exit status 0: done; 1: a stage failed; 2: the input has to be mended."""
    arguments = sys.argv[1:] if arguments is None else arguments
    exit_on_signals()
    if not arguments or {"-h", "--help"} & set(arguments):
        return print(f"{__doc__.strip()}\n\nOptions:\n{option_help(PipelineConfig)}")
    try:
        words, options = read_command_line(arguments)
        if "--stages" in arguments:  # `--stages sft dpo`: the words after the first belong to it
            files = [word for word in words if word.endswith((".yaml", ".yml"))]
            options["stages"] = ",".join(
                [options["stages"], *(word for word in words if word not in files)]
            )
            words = files
        words += [options.pop("config")] if "config" in options else []
        if len(words) != 1:
            raise ConfigError(
                f"give one YAML file, python chain.py FILE; got {', '.join(words) or 'none'}"
            )
        results = Pipeline.from_yaml(words[0], **options).run()
    except ConfigError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except OSError as error:  # such as a full disk, while a record is written
        sys.exit(print(f"error: {error}", file=sys.stderr) or 1)
    sys.exit(not all(result.success for result in results))


if __name__ == "__main__":
    main()
