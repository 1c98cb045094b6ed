"""What a run prints at its end: its results, and commands to continue with."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from core.checkpoints import newest_first
from core.command import CREDENTIALS, MASK
from core.config import StageConfig
from core.files import has_weights
from core.screen import format_table
from core.statistics import before_and_after

ROOT = Path(__file__).resolve().parents[1]
# Formats of data that recipes/evaluate.py does not read.
NOT_EVALUATED = ("text",)
NUM_EVAL_SAMPLES = 100  # rows of the printed evaluation, which takes minutes
# Configs whose options the evaluation has too, by name: imports would make the code of rewards and
# judges part of every recipe's fingerprint.
TAKEN_OVER = ("DataConfig", "ScoringConfig", "JudgingConfig")
# Options that the evaluation does not take over from training, besides those of every stage: it
# loads another model, which is saved unquantized.
NOT_TAKEN_OVER = (
    "model_name_or_path",
    "revision",
    "use_4bit",
    "use_8bit",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
)


def describe_end(stage: Any, result: Any) -> str:
    """What a recipe prints after success, when run on its own."""
    folder = stage.config.output_dir
    parts = [f"done: {folder}"]
    changes = list(before_and_after(result.metrics).items())
    if changes:
        parts.append(format_table(("metric", "before -> after"), changes))
    parts.append(describe_next_steps(stage, folder, result.model_path, start_of(stage)))
    return "\n\n".join(parts)


def describe_next_steps(stage: Any, folder: str, model: str | None, start: str) -> str:
    """Aligned lines: the result, and commands to look at it, talk to it, and evaluate it.

    `stage` made the model, which started as `start` and is in the folder `model` if it was saved.
    `folder` is that of the whole run: of the stage itself, or of a chain.
    """
    own_folder = stage.config.output_dir
    answers = Path(own_folder, "samples.jsonl")
    was_saved = stage.hands_on and model and has_weights(model)
    lines = {}
    if stage.task == "SEQ_CLS":
        lines["reward model"] = shlex.quote(own_folder)
        lines["report"] = report_line(folder)
        lines["use it"] = rl_command(stage)
    elif was_saved:
        lines["model"] = shlex.quote(model)
        lines["report"] = report_line(folder)
        lines["talk to it"] = script_command("chat.py", model)
        if can_be_evaluated(stage):
            lines["evaluate it"] = evaluation_command(stage, folder, model, start)
    else:
        if answers.exists():
            lines["answers"] = shlex.quote(str(answers))
        lines["report"] = report_line(folder)
    width = max(map(len, lines))
    text = "\n".join(f"{name:{width}}  {content}" for name, content in lines.items())
    if "evaluate it" in lines:
        text += "\nMost of these rows were trained on: other rows show better what was learned."
    return text


def describe_resumption(config: StageConfig) -> str:
    """What the same command does when it is run again after a failure."""
    folder = Path(config.output_dir)
    checkpoints: list[Path] = []
    # A stage may train in subfolders, as rlaif does.
    for place in folder.glob("**/checkpoints"):
        of_another_result = place.relative_to(folder).parts[0].startswith("previous.")
        if not of_another_result:
            checkpoints += newest_first(place)
    if checkpoints and vars(config).get("resume_from_checkpoint") is True:
        newest = max(checkpoints, key=modification_time)
        return f"run the same command again to go on from {newest}"
    return "run the same command again to start this stage over"


def modification_time(path: Path) -> float:
    return path.stat().st_mtime


# -- commands --------------------------------------------------------------------------------------


def script_command(script: str, *arguments: str) -> str:
    """A command that runs a script of this project, quoted for the shell."""
    path = script if Path.cwd() == ROOT else str(ROOT / script)
    return shlex.join(["python", path, *arguments])


def recipe_command(name: str, options: Mapping[str, Any]) -> str:
    """A command that runs a recipe, without empty options."""
    arguments = []
    for option, value in options.items():
        if value not in (None, ""):
            text = CREDENTIALS.sub(MASK, as_text(value))
            arguments.append(f"--{option}={text}")
    return script_command(f"recipes/{name}.py", *arguments)


def report_line(folder: str) -> str:
    """The report that a chain has written, or else the command to write it."""
    page = Path(folder, "report.html")
    if Path(folder, "pipeline.json").exists() and page.exists():
        return shlex.quote(str(page))
    return script_command("report.py", folder)


def evaluation_command(stage: Any, folder: str, model: str, start: str) -> str:
    """The command that compares the model with its start, on the data that it was trained on."""
    config = stage.config
    options = {
        "model": model,
        "data": data_of(stage),
        "baseline": start,
        # Beside the run's folder, whose records it would otherwise replace.
        "output_dir": f"{Path(folder)}-evaluation",
        "num_eval_samples": NUM_EVAL_SAMPLES,
    }
    sampling = getattr(config, "sampling", vars(config))
    options["max_new_tokens"] = sampling.get("max_new_tokens")
    return recipe_command("evaluate", options | options_taken_over(config))


def rl_command(stage: Any) -> str:
    """The command that trains a policy with a reward model."""
    config = stage.config
    has_prompts = "prompt" in config.formats.get(data_format(stage), ())
    options = {
        "model": config.model_name_or_path,
        "data": data_of(stage) if has_prompts else "PROMPTS.jsonl",
        # Data of pairs may have messages too.
        "dataset_format": "prompt" if has_prompts else None,
        "reward_model_path": config.output_dir,
        "output_dir": f"{Path(config.output_dir)}-grpo",
    }
    return recipe_command("grpo", options)


# -- options ---------------------------------------------------------------------------------------


def start_of(stage: Any) -> str:
    """The model that a stage starts from, by its config; empty if it loads none."""
    return getattr(stage.config, "model_name_or_path", "")


def data_of(stage: Any) -> Any:
    """The value of a stage's data option; None if it has no such option."""
    option = stage.config.aliases.get("data")
    return getattr(stage.config, option) if option else None


def data_format(stage: Any) -> str | None:
    return stage.lineage.get("data", {}).get("format")


def can_be_evaluated(stage: Any) -> bool:
    """Whether recipes/evaluate.py can read the data of a stage."""
    return bool(data_of(stage)) and data_format(stage) not in NOT_EVALUATED


def options_taken_over(config: StageConfig) -> dict[str, Any]:
    """The options that recipes/evaluate.py has too and that differ from their defaults: how model
    and data are read, the rewards, the judge."""
    names: set[str] = set()
    for config_class in type(config).__mro__:
        if config_class.__name__ in TAKEN_OVER:
            names |= {option.name for option in fields(config_class)}
    names -= {option.name for option in fields(StageConfig)}
    names -= set(NOT_TAKEN_OVER)
    defaults = vars(type(config)())
    chosen = {}
    for name, value in vars(config).items():
        if name in names and value != defaults[name]:
            chosen[name] = value
    return chosen


def as_text(value: Any) -> str:
    """An option's value in command-line form: words separated by commas, anything else as YAML."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        items = [str(item) for item in value]
        if all(re.fullmatch(r"[\w./:-]+", item) for item in items):
            return ",".join(items)
    return json.dumps(value, ensure_ascii=False)
