"""The stages of a chain, built from the options and checked together before any of them runs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from core.errors import ConfigError, as_config_error, unknown_name
from core.other_names import OTHER_STAGES
from core.pipeline_config import SHARED_OPTIONS, PipelineConfig, commands_after
from core.recipe_files import (
    LINK,
    find_links,
    get_config_class,
    load_recipe,
    make_config,
    option_names,
    resolve_options,
)
from core.runtime import warn_together
from core.screen import format_table

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def recipe_names() -> list[str]:
    return [file.stem for file in RECIPES.glob("*.py")]


def short_name(folder: str) -> str:
    """`sft` for the folder `02_sft`."""
    return folder.split("_", 1)[1]


class StagePlan:
    """The stages of a config, with the folders that they write to. Knows no algorithm."""

    registry: ClassVar[dict[str, Any]] = {}  # {name: stage class} of registered stages
    base_class: ClassVar[type]  # of all stages

    @classmethod
    def register_stage(cls, name: str, stage_class: Any) -> None:
        """Make `name` usable in `stages`. The config class is the stage's `config_class`, or the
        annotation of `config` in its `__init__`."""
        cls.registry[name] = stage_class

    def __init__(
        self,
        config: PipelineConfig,
        overrides: dict[str, dict[str, Any]] | None = None,
        declared: Sequence[str] = (),
        problems: Sequence[str] = (),
        notes: Sequence[str] = (),
    ):
        """`overrides` are options by stage name or folder, which win over the config's; `declared`
        are further stage names that `stage_configs` may have options for; `problems` and `notes`
        are on the top-level options. Raises one ConfigError for all mistakes in options."""
        self.config = config
        self.overrides = overrides or {}
        self.notes = list(notes)
        for command in commands_after(config):
            self.notes.append(f"for another program, after the chain: {command}")
        if not config.stages:
            missing = "stages is missing; name at least one, for example stages: [sft]"
            raise ConfigError(*problems, missing)
        self.folders = [f"{n:02d}_{Path(name).stem}" for n, name in enumerate(config.stages, 1)]
        self.check_option_owners(declared)
        self.stages = self.build_stages(problems)
        self.enabled = {
            folder: stage
            for folder, stage in zip(self.folders, self.stages, strict=True)
            if stage.config.enabled
        }
        self.positions = self.stage_positions()
        self.check_range()
        self.check_hand_over()
        self.check_links()

    def check_option_owners(self, declared: Sequence[str]) -> None:
        """Raise ConfigError for options of stages that do not exist. `unused` lists those of stages
        that do not run."""
        here = {*self.folders, *map(short_name, self.folders)}
        known = {*here, *self.registry, *recipe_names(), *OTHER_STAGES}
        for number, name in enumerate(declared, 1):
            stem = Path(name).stem
            known |= {stem, f"{number:02d}_{stem}"}
        for name in self.config.stage_configs:
            if name not in known:
                raise ConfigError("stage_configs: " + unknown_name("stage", name, known))
        for name in self.overrides:
            if name not in here:
                raise ConfigError(unknown_name("stage", name, here))
        self.unused = sorted(self.config.stage_configs.keys() - here)

    def build_stages(self, problems: Sequence[str]) -> list[Any]:
        """Build all stages. Raises one ConfigError for all their problems, and for `problems`."""
        stages = []
        mistakes = []
        for name, folder in zip(self.config.stages, self.folders, strict=True):
            try:
                stages.append(self.build_stage(name, folder))
            except ConfigError as error:
                mistakes += [f"stage {folder}: {problem}" for problem in error.problems]
        top_mistakes = [self.explain(problem) for problem in problems]
        if top_mistakes or mistakes:
            raise ConfigError(*top_mistakes, *mistakes)
        return stages

    def build_stage(self, name: str, folder: str) -> Any:
        """Build a stage with its config. In order of precedence, options come from the command
        line, the stage, the pipeline, and the defaults."""
        stage_class = self.find_class(name)
        label = short_name(folder)
        sources = []
        for by_stage in (self.config.stage_configs, self.overrides):
            for key in (label, folder):  # options of 02_sft win over options of sft
                sources.append(by_stage.get(key) or {})
        stage_class, own, notes = resolve_options(stage_class, sources)
        if "output_dir" in own:
            raise ConfigError(
                "output_dir belongs to the top level of the YAML; "
                "the folder of a stage is numbered inside it"
            )
        if "model_name_or_path" in own and folder != self.folders[0]:
            raise ConfigError(
                "it starts from the model of the previous stage; remove model_name_or_path"
            )
        config_class = get_config_class(stage_class)
        shared = {
            option.name: getattr(self.config, option.name)
            for option in fields(config_class)
            if option.name in SHARED_OPTIONS
        }
        output_dir = str(Path(self.config.output_dir, folder))
        defaults = {"stage_name": label, "output_dir": output_dir}
        stage = stage_class(make_config(config_class, defaults | shared | own, notes))
        stage.warns_of_options = False  # `check` does it for all stages together
        if stage.config.enabled:  # a disabled stage may be incomplete
            with as_config_error("its options", ValueError):
                stage.validate_config()
        return stage

    def explain(self, problem: str) -> str:
        """A problem with a top-level option, extended by the stages that have such an option."""
        name = re.match(r"unknown option '(\w+)'", problem)
        if name is None:
            return problem
        owners = []
        for stage in self.config.stages:
            with contextlib.suppress(ConfigError):
                if name[1] in option_names(get_config_class(self.find_class(stage))):
                    owners.append(Path(stage).stem)
        if not owners:
            return problem
        place = f"stage_configs: {owners[0]}, or --{owners[0]}.{name[1]}"
        return f"{name[1]} belongs to the stages that have it ({', '.join(owners)}): {place}"

    def find_class(self, name: str) -> Any:
        """The class registered under `name`, or defined by the recipe of that name or path."""
        if name in self.registry:
            return self.registry[name]
        name = OTHER_STAGES.get(name, name)
        path = Path(name).expanduser() if name.endswith(".py") else RECIPES / f"{name}.py"
        if not path.is_file():
            raise ConfigError(unknown_name("stage", name, [*self.registry, *recipe_names()]))
        return load_recipe(path, self.base_class)

    def stage_positions(self) -> dict[str, int]:
        """{name or folder: index among the enabled stages}; a repeated name means the first one."""
        positions: dict[str, int] = {}
        for index, folder in enumerate(self.enabled):
            positions[folder] = index
            positions.setdefault(short_name(folder), index)
        return positions

    def check_range(self) -> None:
        """Raise ConfigError if from_stage or until is not an enabled stage, or no stage is left."""
        first, last = self.config.from_stage, self.config.until
        for option, name in (("from_stage", first), ("until", last)):
            if name and name not in self.positions:
                raise ConfigError(f"{option}: " + unknown_name("stage", name, self.positions))
        if first and last and self.positions[last] < self.positions[first]:
            raise ConfigError(f"until={last} comes before from_stage={first}: nothing would run")

    def check_hand_over(self) -> None:
        """Raise ConfigError if a stage needs its input model on disk but none is saved."""
        on_disk = True  # whether the input model of the next stage is in a folder
        for folder, stage in self.enabled.items():
            if not on_disk and (stage.needs_folder or stage.config.quantized):
                raise ConfigError(
                    f"stage {folder} starts from a folder: "
                    "set save_intermediate in the previous stage"
                )
            if stage.hands_on:
                on_disk = stage.config.save_intermediate

    def check_links(self) -> None:
        """Raise ConfigError for an option stage:NAME if no earlier stage has that name, or if it
        saves nothing."""
        for folder, stage in zip(self.folders, self.stages, strict=True):
            for option, name in find_links(stage.config).items():
                target = self.last_stage_before(folder, name)
                link = f"stage {folder}: {option}={LINK}{name}"
                if target is None:
                    raise ConfigError(f"{link}: no earlier stage is named {name}")
                if not target.config.save_intermediate:
                    raise ConfigError(f"{link}: that stage has save_intermediate=false")

    def last_stage_before(self, folder: str, name: str) -> Any:
        """The last enabled stage before `folder` with that name or folder."""
        named = [
            stage
            for other, stage in self.enabled.items()
            if other < folder and name in (other, short_name(other))
        ]
        return named[-1] if named else None

    def plan(self) -> str:
        """A table of the stages, the models they start from and their folders."""
        first = next(iter(self.enabled.values()), None)
        source = self.config.model_name_or_path
        if first is not None:
            source = vars(first.config).get("model_name_or_path", source)
        rows = []
        for folder, stage in zip(self.folders, self.stages, strict=True):
            output_dir = stage.config.output_dir
            if not stage.config.enabled:
                rows.append((folder, "skipped: enabled is false", output_dir))
                continue
            rows.append((folder, source, output_dir))
            if stage.hands_on:
                source = f"the model of {folder}"
        return format_table(("stage", "starts from", "folder"), rows)

    def warn_of_options(self) -> None:
        """One warning for all options that have no effect, with the stages that have them."""
        stages_of: dict[str, list[str]] = {}
        for folder, stage in self.enabled.items():
            for note in stage.config.notes:
                stages_of.setdefault(note, []).append(folder)
        notes = [f"{', '.join(folders)}: {note}" for note, folders in stages_of.items()]
        warn_together("options", self.notes + notes)
