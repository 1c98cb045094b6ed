"""core/cli.py and common.main: options, mistakes, --help, and a whole run from the command line."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, ClassVar, Literal

import pytest
import sft
from annotated_types import Ge, Le
from conftest import ROOT, read_help

import chain
from chain import Pipeline
from common import BaseStage, build_stage
from core.cli import help_text, option_help, read_command_line
from core.config import Names, Positive, StageConfig
from core.errors import ConfigError


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **options
    )


# -- parsing --------------------------------------------------------------------------------------


def test_values_are_text_whatever_they_look_like():
    words, options = read_command_line(
        ["a.yaml", "--model=12", "--rate", "2e-4", "--ratio=1:2", "--none=None", "--dry-run"]
    )
    assert words == ["a.yaml"]
    assert options == {
        "model": "12",
        "rate": "2e-4",
        "ratio": "1:2",
        "none": None,
        "dry_run": "True",
    }


@pytest.mark.parametrize("arguments", [["--seed=1", "--seed", "2"], ["--dry-run", "--dry_run"]])
def test_an_option_given_twice_is_refused(arguments):
    with pytest.raises(ConfigError, match="was given 2 times"):
        read_command_line(arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--learning_rat=1"], "did you mean 'learning_rate'"),
        (["--model=12", "--data=x.jsonl", "--seed=x"], "seed='x'"),
        (["train"], "unexpected word 'train'"),
        (["--save_intermediate=false"], "are for the stages of a chain"),
        (["--model=./nowhere", "--data=./none.jsonl"], "./none.jsonl: no such file"),
        (
            ["--model=./nowhere", "--data=examples/sample_data.jsonl", "--dry_run=perhaps"],
            "dry_run='perhaps': give true or false",
        ),
        (["--seed=1", "--seed=2"], "--seed was given 2 times"),
        (
            ["--dry_run=1", "--model=./nowhere", "--data=examples/sample_data.jsonl"],
            "./nowhere: no such file",
        ),
    ],
)
def test_a_mistake_exits_with_status_2_and_one_sentence(tmp_path, arguments, words):
    done = run("recipes/sft.py", f"--output_dir={tmp_path}", *arguments)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr + done.stdout


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, data):
    done = run("recipes/sft.py", f"--output_dir={data}", "--model=./nowhere", f"--data={data}")
    assert (
        done.returncode == 2
        and "cannot be written to" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


# -- help -----------------------------------------------------------------------------------------


def test_help_has_every_option_with_its_short_name_and_an_explanation():
    done = run("recipes/sft.py", "--help")
    assert done.returncode == 0 and "log pi_theta" in done.stdout
    entries = read_help(done.stdout)
    assert set(entries) == {option.name for option in fields(sft.SFTConfig)} | {"dry_run"}
    for name, (_, explanation) in entries.items():
        assert len(explanation.partition("(")[0].strip()) > 5, f"{name} is not explained"
    assert entries["model_name_or_path"][0] == ["model"]
    assert entries["dataset_name_or_path"][0] == ["data"]
    assert entries["optim"][1].endswith("adafactor, sgd; default: adamw_torch_fused)")


def test_the_everyday_options_come_first_and_once():
    help_text = option_help(sft.SFTConfig)
    first, *others = help_text.split("\n\n")
    names = list(read_help("\n" + first))
    assert names[:3] == ["model_name_or_path", "dataset_name_or_path", "output_dir"]
    assert {"learning_rate", "lora_r", "max_seq_length"} < set(names) and names[-1] == "dry_run"
    assert not set(names) & set(read_help("\n" + "\n".join(others)))


@pytest.mark.parametrize("columns", ["20", "80", "300"])
def test_help_is_wrapped_to_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    widest = max(len(line) for line in option_help(chain.PipelineConfig).splitlines())
    assert widest <= max(70, min(int(columns), 110))


def fail():
    raise RuntimeError("not available here")


# fmt: off
@dataclass
class Strange(StageConfig):
    """A config class by an author who comments in every way."""

    aliases: ClassVar[dict] = {"n": "bare"}
    everyday: ClassVar[tuple] = ("beside", "unknown")

    bare: int = 1
    beside: float = 0.5 # one space
    # on the line above
    above: str = "a # b"
    stated: int = field(default=3, metadata={"help": "in the metadata"})
    # limits
    bounded: Annotated[float, Ge(0), Le(1)] = 0.5  # a share
    positive: Positive | None = None  # no limit if none
    # This sentence tells why the next option exists, and is no heading.
    mode: Literal["x", "y"] = "x"  # the way,
                                   # continued below
    long: Names = field(
        default_factory=lambda: ["a", "b"]  # broken over lines
    )
    pair: tuple = (1, 2)
    mapping: dict[str, Any] = field(default_factory=dict)
    failing: list[int] = field(default_factory=fail)
    required: Any = field(default=None, kw_only=True)  # noqa: B008

    def method(self):
        local: int = 1  # no option
        return local
# fmt: on


def test_help_reads_comments_wherever_they_are():
    help_text = option_help(Strange)
    explanations = {name: text for name, (_, text) in read_help(help_text).items()}
    assert explanations["bare"] == "(default: 1)"
    assert explanations["beside"] == "one space (default: 0.5)"
    assert explanations["above"] == "on the line above (default: a # b)"
    assert explanations["stated"] == "in the metadata (default: 3)"
    assert explanations["bounded"] == "a share (from 0 to 1; default: 0.5)"
    assert explanations["positive"] == "no limit if none (above 0; default: none)"
    assert explanations["mode"] == "the way, continued below (one of x, y; default: x)"
    assert explanations["long"] == "broken over lines (default: a,b)"
    assert explanations["pair"] == "(default: 1,2)"
    assert explanations["required"] == "(default: none)"
    assert "local" not in explanations and {"mapping", "failing"} < set(explanations)
    assert "\nlimits:\n  --bounded" in help_text and "no heading" not in help_text
    assert help_text.startswith("common options:\n  --beside")
    assert read_help(help_text)["bare"][0] == ["n"]


def test_help_of_a_class_without_source():
    typed = make_dataclass(
        "Typed", [("weight", float, 1.0), ("seed", int, 7)], bases=(StageConfig,)
    )
    explanations = read_help(option_help(typed))
    assert explanations["weight"] == ([], "(default: 1.0)")
    # The parent's explanation, and the default of the class itself.
    assert explanations["seed"][1].startswith("random seed")
    assert explanations["seed"][1].endswith("(default: 7)")


def test_the_config_class_may_be_named_by_init_alone(tmp_path, capsys, monkeypatch):
    @dataclass
    class OwnConfig(StageConfig):
        margin: float = 1.0  # distance of the two

    class OwnStage(BaseStage):
        stage_name = "own"

        def __init__(self, config: OwnConfig):
            super().__init__(config)

    OwnStage.__init__.__annotations__["config"] = OwnConfig
    stage, _ = build_stage(OwnStage, ["--margin=2"])
    assert stage.config.margin == 2.0
    assert "distance of the two" in help_text(OwnStage, None, ["--help"])


# -- copies of a recipe, whatever their authors did -----------------------------------------------

COPIES = {
    "no_comment": "    margin: float = 1.0\n",
    "one_space": "    margin: float = 1.0 # distance of the two\n",
    "line_above": "    # distance of the two\n    margin: float = 1.0\n",
    "metadata": "    margin: float = field(\n"
    '        default=1.0, metadata={"help": "distance of the two"}\n    )\n',
    "containers": "    margin: tuple[float, ...] = (1.0, 2.0)  # distance of the two\n"
    "    steps: list[int] = field(default_factory=list)\n",
}


@pytest.fixture
def copies(tmp_path):
    """{name: path} of five copies of sft.py."""
    source = (ROOT / "recipes/sft.py").read_text()
    paths = {}
    for name, options in COPIES.items():
        place = re.search(r"class SFTConfig.*?\n\n", source, re.DOTALL).end()
        text = source[:place] + options + source[place:]
        text = text.replace("import dataclass\n", "import dataclass, field  # noqa\n")
        paths[name] = tmp_path / f"{name}.py"
        paths[name].write_text(text)
    return paths


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_shows_its_help_and_runs_by_path(copies, name, model_dir, data, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    shown = run(str(copies[name]), "--help", env=environment)
    assert shown.returncode == 0, shown.stderr
    _, explanation = read_help(shown.stdout)["margin"]
    assert ("distance of the two" in explanation) == (name != "no_comment")

    options = ["--max_steps=1", "--margin=3", f"--output_dir={tmp_path / 'out'}"]
    done = run(
        str(copies[name]), f"--model={model_dir}", f"--data={data}", *options, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = (tmp_path / "out/stage_config.yaml").read_text()
    assert re.search(r"margin:\s+(- )?3\.0\n", written)


def test_copies_run_in_a_chain(copies, model_dir, data, tmp_path):
    options = {"data": data, "max_steps": 1, "margin": 3}
    configs = {name: dict(options) for name in copies}
    configs["containers"] |= {"margin": "3,4", "steps": [1, 2]}
    results = Pipeline.from_dict(
        {
            "model_name_or_path": model_dir,
            "output_dir": str(tmp_path / "out"),
            "stages": [str(path) for path in copies.values()],
            "stage_configs": configs,
        }
    ).run()
    assert [result.success for result in results] == [True] * len(copies)


# -- a whole run ----------------------------------------------------------------------------------


def test_the_recipe_from_the_command_line_leaves_a_whole_folder(model_dir, data, tmp_path):
    out = tmp_path / "out"
    done = run(
        "recipes/sft.py",
        f"--model={model_dir}",
        f"--data={data}",
        f"--output_dir={out}",
        "--max_steps=3",
        "--validation_split=0.2",
        "--num_eval_samples=2",
        "--max_new_tokens=4",
        "--report_to=tensorboard",
        "--learning_rate=1e-2",
        env={**os.environ, "HF_TOKEN": "hf_canary"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "question-answer, 24 rows: question, answer" in done.stdout and "tokens/s" in done.stdout
    assert "Warning" not in done.stdout + done.stderr
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert (
        model.config.use_cache
        and model.generation_config.eos_token_id == [0, 2]
        and tokenizer.chat_template
    )
    stage = json.loads((out / "stage.json").read_text())
    assert (
        stage["success"] and stage["parent"]["model"] == model_dir and stage["data"]["rows"] == 24
    )
    assert stage["command"].startswith(f"python recipes/sft.py --model={model_dir} --data={data} ")
    assert stage["metrics"]["eval_loss"] < stage["metrics"]["eval_loss_before"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_s", "token_accuracy"} <= set(lines[1])
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2
    assert (
        list(out.glob("runs/events.out.tfevents*"))
        and (out / "adapter/adapter_model.safetensors").exists()
    )
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert b"hf_canary" not in written and not list(out.rglob("*.bin"))


@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "trpo", "grpo", "rloo"])
def test_the_door_of_rl_shows_the_options_of_the_page_that_is_chosen(algorithm):
    from core.cli import help_text
    from recipes import rl

    stage_class = rl.STAGES[algorithm]
    shown = help_text(rl.RLStage, "the door", [f"--algorithm={algorithm}", "--help"])
    assert all(f"--{field.name}" in shown for field in fields(stage_class.config_class))
    assert "the door" in help_text(rl.RLStage, "the door", ["--help"])
