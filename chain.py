"""Run recipes in sequence from a YAML file; each stage starts from the model of the previous one.

    python chain.py yaml/quickstart.yaml
    python chain.py pipeline.yaml --dry_run
    python chain.py pipeline.yaml --stages sft dpo --sft.learning_rate=1e-4 --output_dir=outputs/b

Options on the command line override those of the YAML file. A stage is a file in recipes/ (`sft` is
recipes/sft.py), a path to a copy of one (`research/my_dpo.py`), or a class given to
`Pipeline.register_stage`. The chain knows no algorithm.

From Python, `Pipeline.from_yaml("pipeline.yaml", output_dir="outputs/a").run()` returns a list of
StageResults.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import report
from common import BaseStage, StageResult, load_model_and_tokenizer, save_model
from core import ownership
from core.checkpoints import newest_first, remove_checkpoint
from core.checks import describe_stage
from core.cli import option_help, read_command_line
from core.command import started_by
from core.config import ModelConfig, split_names
from core.errors import ConfigError
from core.files import check_disk_space, has_weights, write_json
from core.hub import load_skeleton
from core.options import check_options, merge_sources
from core.pipeline_config import (
    SHARED_OPTIONS,
    PipelineConfig,
    nest_flat_form,
    split_by_stage,
)
from core.recipe_files import find_links
from core.run_end import describe_next_steps, describe_resumption, start_of
from core.runtime import (
    exit_on_signals,
    is_main_process,
    level_of_dry_run,
    logger,
    start_logging,
)
from core.screen import format_table
from core.stage_plan import StagePlan, short_name
from core.statistics import before_and_after
from core.yaml_files import load_yaml

# Files of a stage's folder that are not part of its model.
NOT_IN_FINAL = shutil.ignore_patterns(
    "adapter", "checkpoints*", "previous*", "runs", "wandb", "stage*", "*.jsonl", "*.log", ".*"
)


# -- pipeline --------------------------------------------------------------------------------------


class Pipeline(StagePlan):
    """The stages of a config, checked at construction: `Pipeline(PipelineConfig(...)).run()`."""

    base_class = BaseStage

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.results: list[StageResult] = []  # of the finished stages

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Pipeline:
        """The pipeline of a YAML file. `overrides` are top-level options, or options of a stage
        such as {"sft.seed": 1}."""
        return cls.from_dict(load_yaml(path), **overrides)

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> Pipeline:
        """The pipeline of a mapping with the structure of a YAML file; `overrides` as in
        `from_yaml`."""
        values, overrides = nest_flat_form(values, overrides)
        top_level, per_stage = split_by_stage(overrides)
        options, problems, notes = merge_sources(PipelineConfig, [values, top_level])
        checked, wrong = check_options(PipelineConfig, options)
        # The file may have options of stages that `--stages` leaves out: these names are valid.
        in_file, *_ = merge_sources(PipelineConfig, [values])
        declared = split_names(in_file.get("stages"))
        return cls(PipelineConfig(**checked), per_stage, declared, problems + wrong, notes)

    # ---- check ----

    def check(self) -> list[str]:
        """Check everything that needs no weights: configs and data of all stages, disk space.
        Returns lines that describe what the stages will do; raises ConfigError."""
        self.check_folder()
        lines: list[str] = []
        bytes_needed = 0.0
        # The first stage's model, without weights, stands in for the models of the others.
        skeleton = None
        for folder, stage in self.enabled.items():
            try:
                stage.check()
                if not isinstance(stage.config, ModelConfig):
                    continue
                skeleton = skeleton or load_skeleton(stage.config)
                tokenizer, model = skeleton
                with_cost = self.config.dry_run
                description, size = describe_stage(stage, tokenizer, model, with_cost)
            except ConfigError as error:
                raise ConfigError(f"stage {folder}: {error}") from None
            lines += [f"\n{folder}", *description]
            bytes_needed += size
        check_disk_space(self.config.output_dir, bytes_needed)
        return lines

    def check_folder(self) -> None:
        """Raise ConfigError if the chain would overwrite foreign files in output_dir."""
        out = Path(self.config.output_dir)
        ownership.refuse_own_inputs(self.config, [*self.folders, "final"])
        if not (out / "pipeline.json").exists():
            ownership.refuse_foreign_files(out, ["report.html"])
        final = out / "final"
        if not self.config.save_final_model:
            return
        if final.is_symlink():
            raise ConfigError(
                f"{final} is a symbolic link; remove it, or choose another output_dir"
            )
        ownership.refuse_foreign_files(final)

    # ---- run ----

    @property
    def log_path(self) -> Path:
        return Path(self.config.output_dir, "pipeline_training.log")

    def run(self) -> list[StageResult]:
        """Run the stages in order, each on the model of the previous one; stop at the first failure
        without deleting anything. With dry_run, only check and print the plan. Raises ConfigError
        before the first stage runs."""
        if self.config.dry_run:
            with start_logging(level_of_dry_run(self.config.log_level)):
                descriptions = self.check_and_show_plan()
                logger.info("%s", "\n".join(descriptions))
            return []
        with (
            ownership.locked(Path(self.config.output_dir)),
            start_logging(self.config.log_level, self.log_path),
        ):
            self.check_and_show_plan()
            finished = self.finished()
            self.results = []
            if not self.run_stages(finished):
                logger.info("%s", self.how_to_go_on())
                return self.results
            complete = len(self.results) == len(self.enabled)
            if complete and self.results:
                all_reused = len(finished) == len(self.enabled)
                self.keep_final_model(self.results[-1], all_reused)
            self.write_state(finished=complete)
            logger.info("\n%s", self.summary())
            if self.results:
                logger.info("\n%s", self.next_steps())
        return self.results

    def check_and_show_plan(self) -> list[str]:
        """Log notes on the options, `check`, then log the plan."""
        self.warn_of_options()
        descriptions = self.check()
        logger.info("%s", self.plan())
        if self.unused:
            names = ", ".join(self.unused)
            logger.info("not used, because no such stage runs: stage_configs of %s", names)
        return descriptions

    def run_stages(self, finished: Sequence[StageResult]) -> bool:
        """Fill `results` with those of finished stages, then of the stages that run now. Returns
        False if a stage fails."""
        previous: StageResult | None = None
        for number, (folder, stage) in enumerate(zip(self.folders, self.stages, strict=True), 1):
            if not stage.config.enabled:
                logger.info("\n%s skipped: enabled is false", folder)
                continue
            position = len(self.results)
            if self.config.until and position > self.positions[self.config.until]:
                break
            if position < len(finished):
                self.follow_links(stage)
                previous = finished[position]
                self.results.append(previous)
                logger.info("%s is finished already", folder)
                continue
            logger.info("\n%d/%d %s", number, len(self.stages), folder)
            self.write_state(running=folder)
            result = self.run_stage(folder, stage, previous)
            self.results.append(result)
            if not result.success:
                self.write_state(failed=folder)
                logger.error("stage %s failed; the log is %s", folder, self.log_path)
                return False
            previous = result
        return True

    def run_stage(self, folder: str, stage: BaseStage, previous: StageResult | None) -> StageResult:
        """Run one stage on the model of `previous`, which is released afterwards, so that only one
        model is in memory at a time."""
        try:
            self.follow_links(stage)
            model, tokenizer = self.load_input(stage, previous)
            result = stage.execute_and_record(model, tokenizer, previous)
        except Exception as error:  # input refused late, or a user-defined execute()
            logger.debug("the failure in full", exc_info=True)
            message = f"{type(error).__name__}: {error}"
            logger.error("%s: %s", folder, message)
            result = StageResult(stage.stage_name, False, error_message=message)
        except SystemExit:  # by a signal
            self.write_state(interrupted=folder)
            raise
        if previous is None:
            return result
        if result.success and not (result.model or result.model_path):
            # No model returned: keep the previous one.
            result = replace(
                result,
                model_path=previous.model_path,
                model=previous.model,
                tokenizer=previous.tokenizer,
            )
        previous.model = previous.tokenizer = None
        return result

    def follow_links(self, stage: BaseStage) -> None:
        """Replace option values stage:NAME by the paths of those stages' results."""
        for option, name in find_links(stage.config).items():
            kind = option.removesuffix("_path")
            setattr(stage.config, option, self.artifact(name, kind))

    def load_input(self, stage: BaseStage, previous: StageResult | None) -> tuple[Any, Any]:
        """(model, tokenizer) to pass to a stage. If there is no model in memory, a stage with a
        ModelConfig loads one by itself; for any other stage it is loaded here."""
        model, tokenizer = None, None
        if previous is not None:
            model, tokenizer = previous.model, previous.tokenizer
        source: str | None = self.config.model_name_or_path
        if previous is not None:
            source = previous.model_path if has_weights(previous.model_path) else None
        if model is not None or isinstance(stage.config, ModelConfig) or not source:
            return model, tokenizer
        options = {name: getattr(self.config, name) for name in SHARED_OPTIONS}
        options["model_name_or_path"] = source
        return load_model_and_tokenizer(ModelConfig(**options), needs_chat_template=False)

    def finished(self) -> list[StageResult]:
        """Results of the leading stages that need not run: they finished with the same options,
        data, code and start, and the model that the next stage needs still exists. Logs why the
        next stage has to run."""
        config = self.config
        folders, stages = list(self.enabled), list(self.enabled.values())
        reasons = self.reasons_to_run()
        restart = config.force_restart or not config.auto_resume
        restart = restart or not config.enable_state_persistence
        first = 0  # index of the first stage to run
        while first < len(stages) and not (restart or reasons[first]):
            first += 1
        if config.from_stage:
            wanted = self.positions[config.from_stage]
            if first < wanted and not restart:
                reason = f"{folders[first]} has to run first: {reasons[first]}"
                raise ConfigError(f"from_stage={config.from_stage}: {reason}")
            first = wanted
            restart = True

        results = [stage.recorded() for stage in stages[:first]]
        if first < len(stages) or not self.has_final():
            # A stage whose weights were deleted or never saved runs again, unless no stage up to
            # it makes a model.
            while first and not has_weights(results[first - 1].model_path):
                if not any(stage.hands_on for stage in stages[:first]):
                    break
                first -= 1

        begun_before = first > 0 or (stages and Path(stages[0].config.output_dir).exists())
        if first < len(stages) and begun_before:
            default_reason = "restart requested" if restart else "its weights are gone"
            logger.info("running from %s on: %s", folders[first], reasons[first] or default_reason)
        for stage in stages[first:]:
            if restart and "resume_from_checkpoint" in vars(stage.config):
                stage.config.resume_from_checkpoint = False
        return results[:first]

    def reasons_to_run(self) -> list[str]:
        """For each enabled stage, why it has to run, or an empty text. A stage's fingerprint
        includes a hash of all fingerprints before it, so a changed stage invalidates all later
        ones."""
        reasons = []
        start = ""
        for stage in self.enabled.values():
            stage.start = hashlib.sha256(start.encode()).hexdigest() if start else None
            start += json.dumps(stage.fingerprint(), sort_keys=True)
            reasons.append(stage.stale())
        return reasons

    def artifact(self, name: str, kind: str) -> str:
        """Path of a result of the last stage of that name: its artifact `kind`, else its only
        artifact besides the adapter, else its model. Raises ConfigError."""
        ran = zip(self.enabled, self.results, strict=False)  # later stages have no result yet
        named = [result for folder, result in ran if name in (folder, short_name(folder))]
        artifacts = named[-1].artifacts
        if kind in artifacts:
            return artifacts[kind]
        paths = [path for other, path in artifacts.items() if other != "adapter"]
        paths = paths or [named[-1].model_path]
        if len(paths) != 1 or paths[0] is None:
            names = ", ".join(artifacts) or "nothing"
            raise ConfigError(f"stage {name} produces no {kind}; it produces {names}")
        return paths[0]

    # ---- the final model ----

    def fingerprint_paths(self) -> list[Path]:
        """Fingerprint files of OUT/final and of the last stage that hands a model on, if any."""
        folders = [f"{self.config.output_dir}/final"]
        makers = [stage for stage in self.enabled.values() if stage.hands_on]
        if makers:
            folders.append(makers[-1].config.output_dir)
        return [Path(folder, "fingerprint.json") for folder in folders]

    def has_final(self) -> bool:
        """Whether OUT/final has the model of the last stage that hands one on."""
        paths = self.fingerprint_paths()
        if not all(path.exists() for path in paths):
            return False
        contents = {path.read_bytes() for path in paths}
        return len(contents) == 1 and has_weights(paths[0].parent)

    def keep_final_model(self, last: StageResult, all_reused: bool) -> None:
        """After a complete chain: save OUT/final and delete the stages' models, if the options say
        so."""
        up_to_date = all_reused and self.has_final()
        has_model = last.model or last.model_path
        if self.config.save_final_model and has_model and not up_to_date:
            self.save_final(last, Path(self.config.output_dir, "final"))
        if self.config.cleanup_intermediate and is_main_process():
            self.clean_up(last)

    def save_final(self, result: StageResult, folder: Path) -> None:
        """Save the last stage's model to OUT/final, with hard links if the file system has them."""
        if not is_main_process():
            return
        if not self.config.force and not self.has_final():
            ownership.lay_aside_model(folder)
        if result.model_path is None:
            save_model(result.model, result.tokenizer, str(folder))
            final, last = self.fingerprint_paths()
            shutil.copy(last, final)
            return
        with ownership.published(folder) as temporary:
            copy = functools.partial(
                shutil.copytree,
                result.model_path,
                temporary,
                ignore=NOT_IN_FINAL,
                dirs_exist_ok=True,
            )
            try:
                copy(copy_function=os.link)
            except shutil.Error:  # no hard links here
                copy()

    def clean_up(self, last: StageResult) -> None:
        """Delete weights and checkpoints of the stages, but those of the last model only if
        OUT/final has it. Records are kept."""
        paths = {result.model_path for result in self.results} - {None}
        if not self.config.save_final_model:
            paths.discard(last.model_path)
        for folder in map(Path, sorted(paths)):
            for place in (folder, folder / "adapter"):
                names = ownership.recorded_files(place)
                weights = [name for name in names if name.endswith(".safetensors")]
                ownership.remove_files(place, weights)
            for checkpoint in newest_first(folder / "checkpoints"):
                remove_checkpoint(checkpoint)
            ownership.remove_empty(folder / "checkpoints")
            logger.info("deleted the weights in %s", folder)

    # ---- records ----

    def write_state(self, **state: Any) -> None:
        """Write OUT/pipeline.json (plan, state, results so far, this command) and report.html."""
        if not is_main_process():
            return
        results = []
        for result in self.results:
            record = dict(vars(result))
            del record["model"], record["tokenizer"]
            results.append(record)
        plan = {}
        for folder, stage in zip(self.folders, self.stages, strict=True):
            plan[folder] = asdict(stage.config)
        values = {
            "command": started_by(),
            "state": state,
            "results": results,
            "config": asdict(self.config),
            "plan": plan,
        }
        write_json(Path(self.config.output_dir, "pipeline.json"), values)
        try:
            report.write(self.config.output_dir)
        except Exception as error:  # a failed report must not stop a run
            logger.warning("report.html was not written: %s", error)

    def summary(self) -> str:
        """A table of the metrics before and after each stage."""
        rows = []
        for folder, result in zip(self.enabled, self.results, strict=False):
            minutes = f"{result.metrics.get('seconds', 0) / 60:.1f}"
            path = str(Path(self.config.output_dir, folder))
            changes = before_and_after(result.metrics) or {"": ""}
            stage_cells = (folder, minutes, path)
            for metric, change in changes.items():
                name, time, place = stage_cells
                rows.append((name, time, metric, change, place))
                stage_cells = ("", "", "")  # only the first row of a stage names it
        return format_table(("stage", "minutes", "metric", "before -> after", "folder"), rows)

    def next_steps(self) -> str:
        """The model that the chain made, and commands to continue with."""
        ran = list(self.enabled.values())[: len(self.results)]
        makers = [stage for stage in ran if stage.hands_on]
        last = makers[-1] if makers else ran[-1]
        folder = self.config.output_dir
        model = self.results[-1].model_path
        if len(ran) == len(self.enabled) and self.has_final():
            model = f"{folder}/final"
        return describe_next_steps(last, folder, model, start_of(ran[0]))

    def how_to_go_on(self) -> str:
        """What the same command does when it is run again after a failed stage."""
        config = self.config
        failed = list(self.enabled)[len(self.results) - 1]
        restarts = {
            "from_stage": config.from_stage is not None,
            "force_restart": config.force_restart,
            "auto_resume=false": not config.auto_resume,
            "enable_state_persistence=false": not config.enable_state_persistence,
        }
        given = [option for option, is_given in restarts.items() if is_given]
        if given:
            return f"run the same command without {' and '.join(given)} to go on with {failed}"
        return describe_resumption(self.enabled[failed].config)


# -- command line ----------------------------------------------------------------------------------


def read_arguments(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(YAML file, options) from a command line. Raises ConfigError."""
    words, options = read_command_line(arguments)
    if "--stages" in arguments:
        # `--stages sft dpo`: the words after the first belong to it, except the YAML file
        files = [word for word in words if word.endswith((".yaml", ".yml"))]
        others = [word for word in words if word not in files]
        options["stages"] = ",".join([options["stages"], *others])
        words = files
    if "config" in options:
        words.append(options.pop("config"))
    if len(words) != 1:
        given = ", ".join(words) or "none"
        raise ConfigError(f"give one YAML file: python chain.py FILE; got {given}")
    return words[0], options


def main(arguments: list[str] | None = None) -> None:
    """The command line. Exit status 0: done; 1: a stage failed; 2: invalid user input."""
    if arguments is None:
        arguments = sys.argv[1:]
    exit_on_signals()
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(f"{__doc__.strip()}\n\n{option_help(PipelineConfig)}")
        return
    try:
        path, options = read_arguments(arguments)
        results = Pipeline.from_yaml(path, **options).run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # for example a full disk while a record is written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    all_succeeded = all(result.success for result in results)
    sys.exit(0 if all_succeeded else 1)


if __name__ == "__main__":
    main()
