"""chain.py: YAML and command line, hand-over, failure, state."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import common
import core.checkpoints
import core.config
import core.fingerprints
import core.rewards
import core.yaml_files
from chain import Pipeline
from common import BaseStage, StageResult
from core.config import StageConfig, TrainingConfig
from core.errors import ConfigError
from core.yaml_files import dump_yaml, load_yaml, parse_yaml


@dataclass
class NoteConfig(StageConfig):
    note: str = "none"  # what is written
    break_down: bool = False  # whether to fail


class NoteStage(BaseStage):
    """Passes the model on and leaves a note; its config class is only annotated."""

    stage_name = "note"

    def __init__(self, config: NoteConfig):
        super().__init__(config)

    def prepare_model_and_tokenizer(self, model, tokenizer, previous_result=None):
        return model, tokenizer

    def save_model_and_tokenizer(self, model, tokenizer):
        return None

    def train(self, model, tokenizer):
        if self.config.break_down:
            raise RuntimeError("the note broke")
        return {"length": len(self.config.note)}


@pytest.fixture(autouse=True)
def registered():
    Pipeline.register_stage("note", NoteStage)
    yield
    Pipeline.registry.clear()


@pytest.fixture
def pipeline(model_dir, data, tmp_path):
    """A function that writes a pipeline's YAML and returns its path."""

    def write(stages, configs=None, **top):
        sft = {
            "dataset_name_or_path": data,
            "validation_split": 0.2,
            "max_steps": 2,
            "learning_rate": 1e-3,
        }
        configs = {**({"sft": sft} if "sft" in stages else {}), **(configs or {})}
        values = {
            "model_name_or_path": model_dir,
            "output_dir": str(tmp_path / "out"),
            "stages": stages,
            "stage_configs": configs,
        }
        path = tmp_path / "pipeline.yaml"
        path.write_text(dump_yaml(values | top))
        return str(path)

    return write


def test_stages_run_in_order_each_on_the_model_of_the_one_before(pipeline, tmp_path, capsys):
    results = Pipeline.from_yaml(
        pipeline(["sft", "note", "sft"], {"note": {"note": "hello"}})
    ).run()
    assert [result.stage_name for result in results] == ["sft", "note", "sft"] and all(
        r.success for r in results
    )
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        "01_sft",
        "02_note",
        "03_sft",
        "final",
        "pipeline.json",
        "pipeline_training.log",
        "report.html",
    }
    assert results[1].metrics["length"] == 5
    state = json.loads((out / "pipeline.json").read_text())
    assert (
        state["state"] == {"finished": True}
        and len(state["results"]) == 3
        and state["plan"]["03_sft"]["max_steps"] == 2
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    losses = [result.metrics["eval_loss"] for result in (results[0], results[2])]
    assert results[2].metrics["eval_loss_before"] == pytest.approx(
        losses[0], abs=1e-5
    )  # it took the trained model
    final = AutoModelForCausalLM.from_pretrained(out / "final").state_dict()
    last = AutoModelForCausalLM.from_pretrained(out / "03_sft").state_dict()
    assert (
        all((final[name] == last[name]).all() for name in last)
        and AutoTokenizer.from_pretrained(out / "final").chat_template
    )
    assert not (out / "final/stage.json").exists()
    screen = capsys.readouterr().out
    assert "before -> after" in screen and "3/3 03_sft" in screen


def test_numbered_options_and_overrides_win(pipeline, tmp_path):
    path = pipeline(["sft", "sft"], {"02_sft": {"max_steps": 1, "seed": 5}}, log_level="warning")
    stages = Pipeline.from_yaml(path, **{"sft.learning_rate": "1e-4", "02_sft.seed": 6}).stages
    assert [s.config.max_steps for s in stages] == [2, 1] and [s.config.seed for s in stages] == [
        42,
        6,
    ]
    assert [s.config.learning_rate for s in stages] == [1e-4, 1e-4] and stages[
        0
    ].config.log_level == "warning"


def test_a_stage_that_is_not_enabled_is_skipped_and_said_so(pipeline, tmp_path, capsys):
    results = Pipeline.from_yaml(
        pipeline(["note", "sft"], {"sft": {"enabled": False, "data": "none"}})
    ).run()
    assert len(results) == 1 and "02_sft skipped: enabled is false" in capsys.readouterr().out


def test_a_failing_stage_stops_the_chain_and_deletes_nothing(pipeline, tmp_path, capsys):
    path = pipeline(
        ["sft", "note", "sft"], {"note": {"break_down": True}}, cleanup_intermediate=True
    )
    results = Pipeline.from_yaml(path).run()
    out = tmp_path / "out"
    assert [result.success for result in results] == [True, False] and results[
        1
    ].error_message == "RuntimeError: the note broke"
    assert (out / "01_sft/model.safetensors").exists() and (out / "01_sft/stage.json").exists()
    assert not (out / "final").exists() and not (out / "02_note/stage.json").exists()
    assert json.loads((out / "pipeline.json").read_text())["state"] == {"failed": "02_note"}
    for log in ("02_note/training.log", "pipeline_training.log"):
        assert 'raise RuntimeError("the note broke")' in (out / log).read_text()
    assert "stage 02_note failed; the log is" in capsys.readouterr().out


def test_cleanup_deletes_weights_and_keeps_records(pipeline, tmp_path):
    Pipeline.from_yaml(pipeline(["sft", "sft"], cleanup_intermediate=True)).run()
    out = tmp_path / "out"
    assert [str(path.relative_to(out)) for path in out.rglob("*.safetensors")] == [
        "final/model.safetensors"
    ]
    assert (out / "01_sft/stage.json").exists() and (out / "01_sft/metrics.jsonl").exists()


def test_a_model_kept_in_memory_reaches_final(pipeline, tmp_path):
    path = pipeline(["sft"])
    (result,) = Pipeline.from_yaml(path, **{"sft.save_intermediate": False}).run()
    assert result.model_path is None and (tmp_path / "out/final/model.safetensors").exists()
    (result,) = Pipeline.from_yaml(
        path, save_final_model=False, output_dir=str(tmp_path / "b")
    ).run()
    assert not (tmp_path / "b/final").exists()


def test_a_dry_run_opens_the_data_and_writes_nothing(pipeline, tmp_path, capsys):
    path = pipeline(["sft", "sft"])
    assert Pipeline.from_yaml(path, dry_run=True).run() == [] and not (tmp_path / "out").exists()
    screen = capsys.readouterr().out
    assert "question-answer, 24 rows" in screen and "the model of 01_sft" in screen
    with pytest.raises(ConfigError, match="stage 02_sft: data ./gone.jsonl: no such file"):
        Pipeline.from_yaml(path, **{"02_sft.data": "./gone.jsonl"}, dry_run=True).run()


@pytest.mark.parametrize(
    "top, words",
    [
        ({"stage": ["sft"]}, "unknown option 'stage'; did you mean 'stages'"),
        ({"stages": ["sfd"]}, "did you mean 'sft'"),
        ({"stages": []}, "stages is missing"),
        ({"stages": ["no/such.py"]}, "unknown stage"),
        (
            {"stage_configs": {"sft": {"data": "d", "output_dir": "x"}}},
            "output_dir belongs to the top level",
        ),
        (
            {
                "stages": ["sft", "sft"],
                "stage_configs": {"01_sft": {"data": "d"}, "02_sft": {"data": "d", "model": "x"}},
            },
            "02_sft: it starts from the model of",
        ),
        ({"stage_configs": {"stf": {}}}, "stage_configs: unknown stage 'stf'; did you mean 'sft'"),
        (
            {"stage_configs": {"sft": {"learnig_rate": 1}}},
            "stage 01_sft: unknown option 'learnig_rate'; did you mean 'learning_rate'",
        ),
        (
            {"stage_configs": {"02_sft": {"data": "d"}}},
            "stage_configs: unknown stage '02_sft'; did you mean '01_sft'",
        ),
        (
            {
                "stages": ["note", "sft"],
                "from_stage": "sft",
                "until": "note",
                "stage_configs": {"sft": {"data": "d"}},
            },
            "until=note comes before from_stage=sft",
        ),
        ({"stage_configs": {"sft": {"data": "d", "seed": -1}}}, "stage 01_sft: seed=-1"),
        ({"log_level": "loud"}, "log_level='loud'"),
    ],
)
def test_mistakes_in_the_yaml_are_refused(pipeline, top, words):
    with pytest.raises(ConfigError, match=words):
        Pipeline.from_yaml(pipeline(**{"stages": ["sft"]} | top))


def test_yaml_is_read_without_surprises(tmp_path):
    with pytest.raises(ConfigError, match="unknown option '1'"):
        Pipeline.from_dict({1: "x"})
    path = tmp_path / "a.yaml"
    path.write_text("a: 2e-4\nb: 1E5\nc: [1.5e-3, 2e4x]\n")
    assert load_yaml(path) == {"a": 2e-4, "b": 1e5, "c": [1.5e-3, "2e4x"]}
    for text, words in (
        ("a: 1\nb:\n  c: 1\n  c: 2\n", 'line 4: found duplicate key "c"'),
        ("a: [", "line 1: expected"),
        ("- a", "key: value"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: \x07", "special characters are not allowed"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_yaml(path)


def bomb(first, line):
    """YAML of nine lines, each of which stands for nine times what the line before stands for."""
    lines = [f"a0: &a0 {first}"]
    for n in range(1, 9):
        aliases = ", ".join([f"*a{n - 1}"] * 9)
        lines.append(f"a{n}: &a{n} {line.format(aliases)}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb("[x]", "[{}]"),
        bomb("{k: 1}", "{{<<: [{}]}}"),
        "a: &a " + "x" * 100_000 + "\nb: [" + ", ".join(["*a"] * 100) + "]",
        "a: &a [*a]",
        "a: &a {b: *a}",
    ],
)
def test_aliases_that_stand_for_too_much_are_refused_at_once(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigError, match="a.yaml, line 1: its aliases"):
        load_yaml(path)
    with pytest.raises(ValueError, match="its aliases"):
        parse_yaml(text)
    assert time.process_time() - began < 3


def test_aliases_and_long_files_are_read(monkeypatch):
    monkeypatch.setattr(core.yaml_files, "MAX_EXPANDED_SIZE", 1000)
    text = "base: &base {rate: 1, size: 2}\nsft: {<<: *base, size: 3}\nagain: *base"
    assert parse_yaml(text) == {
        "base": {"rate": 1, "size": 2},
        "sft": {"rate": 1, "size": 3},
        "again": {"rate": 1, "size": 2},
    }
    long = "x" * 1100  # without aliases, a file may be as long as it is
    assert parse_yaml(f"a: {long}") == {"a": long}
    with pytest.raises(ValueError, match="maximum depth"):
        parse_yaml("[" * 1000 + "]" * 1000)


@pytest.mark.parametrize("text", ["a: *sk-canary", "a: !sk-canary 1", "a: 1\na: sk-canary"])
def test_what_may_be_a_secret_is_not_in_a_message_about_yaml(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"a.yaml, line \d: found|could not") as error:
        load_yaml(path)
    assert "canary" not in str(error.value)


def test_a_copied_recipe_runs_by_its_path(pipeline, tmp_path):
    source = (
        (ROOT / "recipes/sft.py").read_text().replace("parents[1]", f"parents[1] / {str(ROOT)!r}")
    )
    (tmp_path / "my_sft.py").write_text(source.replace('"sft", SFTConfig', '"mine", SFTConfig'))
    options = load_yaml(pipeline(["sft"]))["stage_configs"]["sft"]
    path = pipeline(["note", str(tmp_path / "my_sft.py")], {"my_sft": options})
    assert Pipeline.from_yaml(path, stages="note").config.stages == [
        "note"
    ]  # my_sft's options stay without use
    results = Pipeline.from_yaml(path).run()
    assert [result.success for result in results] == [True, True] and (
        tmp_path / "out/02_my_sft/model.safetensors"
    ).exists()


MINE = """
import sys
import time

sys.path.insert(0, {root!r})

from common import BaseStage


class Mine(BaseStage):
    stage_name = "mine"

    def train(self, model, tokenizer):
        return {{"which": {which}}}

    def prepare_model_and_tokenizer(self, *_):
        return None, None

    def save_model_and_tokenizer(self, model, tokenizer):
        return self.config.output_dir
"""


def test_in_one_process_a_changed_recipe_runs_as_it_is_now_and_two_of_one_name_are_two(
    pipeline, tmp_path
):
    paths = [tmp_path / name / "mine.py" for name in "ab"]

    def write(path, which):
        path.parent.mkdir(exist_ok=True)
        path.write_text(MINE.format(root=str(ROOT), which=which))

    def build():
        return Pipeline.from_yaml(pipeline([str(path) for path in paths], save_final_model=False))

    def which(results):
        return [result.metrics["which"] for result in results]

    def fingerprint_of_first():
        return json.loads((tmp_path / "out/01_mine/stage.json").read_text())["fingerprint"]

    for number, path in enumerate(paths):
        write(path, number)
    assert which(build().run()) == [0, 1]
    write(paths[1], 2)
    before = fingerprint_of_first()
    assert which(build().run()) == [0, 2]
    assert fingerprint_of_first() == before  # of the other file, which is as it was
    again = build()
    assert which(again.run()) == which(again.run()) == [0, 2]
    assert json.loads((tmp_path / "out/pipeline.json").read_text())["state"] == {"finished": True}


def test_code_that_changed_after_it_was_imported_does_not_run(pipeline, tmp_path, monkeypatch):
    """It would leave the old code's results under the new code's fingerprint."""
    helper = tmp_path / "helper_that_changes.py"
    helper.write_text("TAGS = 1\n")
    source = (
        (ROOT / "recipes/sft.py").read_text().replace("parents[1]", f"parents[1] / {str(ROOT)!r}")
    )
    (tmp_path / "my_sft.py").write_text(
        source.replace(
            "import torch\n", "import torch\nfrom helper_that_changes import TAGS  # noqa\n", 1
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = pipeline(
        [str(tmp_path / "my_sft.py")],
        {"my_sft": {"dataset_name_or_path": str(tmp_path / "data.jsonl"), "max_steps": 1}},
    )
    assert Pipeline.from_yaml(path).run()[0].success
    helper.write_text("TAGS = 2\n")
    result = Pipeline.from_yaml(path).run()[0]
    assert (
        not result.success
        and "helper_that_changes.py changed since it was imported here; restart Python"
        in result.error_message
    )
    (part,) = Pipeline.from_yaml(path).stages
    part.check()
    part.reuse_finished = True  # as a part of a run that began before
    assert part.execute().success


def test_what_starts_from_a_folder_follows_what_leaves_one(pipeline, data):
    unsaved = {"sft": {"dataset_name_or_path": data, "save_intermediate": False}}
    for folder, stage, options in (
        ("02_reward", "reward", {}),
        ("02_dpo", "dpo", {"use_4bit": True}),
    ):
        configs = unsaved | {
            stage: {"preference_dataset_path": "examples/preferences.jsonl", **options}
        }
        with pytest.raises(
            ConfigError,
            match=f"stage {folder} starts from a folder: set save_intermediate in the "
            "previous stage",
        ):
            Pipeline.from_yaml(pipeline(["sft", stage], configs))
        Pipeline.from_yaml(pipeline([stage], configs))


def test_a_stage_that_cannot_be_imported_is_refused(pipeline, tmp_path):
    (tmp_path / "mine.py").write_text("import no_such_package\n")
    with pytest.raises(
        ConfigError, match="stage .*mine.py cannot be imported: No module named 'no_such_package'"
    ):
        Pipeline.from_yaml(pipeline([str(tmp_path / "mine.py")]))


def test_options_of_stages_that_do_not_run_are_said(pipeline, capsys):
    Pipeline.from_yaml(pipeline(["note"], {"dpo": {"beta": 0.2}})).run()
    assert "not used, because no such stage runs: stage_configs of dpo" in capsys.readouterr().out


def test_what_a_stage_is_made_of_counts(pipeline, model_dir, tmp_path, monkeypatch):
    """The chat template of its model, and a file of its own from which it imports."""
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "helper_of_mine.py").write_text("TAGS = 1\n")
    source = (
        (ROOT / "recipes/sft.py").read_text().replace("parents[1]", f"parents[1] / {str(ROOT)!r}")
    )
    (tmp_path / "my_sft.py").write_text(
        source.replace(
            "import torch\n", "import torch\nfrom helper_of_mine import TAGS  # noqa\n", 1
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = pipeline(
        [str(tmp_path / "my_sft.py")],
        {"my_sft": {"dataset_name_or_path": str(tmp_path / "data.jsonl"), "max_steps": 1}},
        model_name_or_path=str(tmp_path / "model"),
    )
    assert Pipeline.from_yaml(path).run()[0].success

    def stale():
        chain_now = Pipeline.from_yaml(path)
        chain_now.check()
        return chain_now.stages[0].stale()

    assert stale() == ""
    (tmp_path / "helper_of_mine.py").write_text("TAGS = 2\n")
    assert stale() == "helper_of_mine.py changed"
    (tmp_path / "helper_of_mine.py").write_text("TAGS = 1\n")
    with open(tmp_path / "model/chat_template.jinja", "a") as file:
        file.write("{# of another kind #}")
    assert stale() == f"{tmp_path}/model changed"


def test_the_registered_class_needs_no_config_class_attribute():
    stage = Pipeline.from_dict({"stages": ["note"], "stage_configs": {"note": {"note": 5}}}).stages[
        0
    ]
    assert isinstance(stage.config, NoteConfig) and stage.config.note == "5"


def command(*arguments):
    return subprocess.run(
        [sys.executable, "chain.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_line(pipeline, tmp_path):
    path, out = pipeline(["sft", "note", "sft"]), str(tmp_path / "elsewhere")
    for stages in (["--stages", "sft", "sft"], ["--stages=sft,sft"]):
        done = command(path, *stages, f"--output_dir={out}", "--sft.max_steps=1", "--dry_run")
        assert done.returncode == 0 and {*re.findall(r"\b\d\d_\w+", done.stdout)} == {
            "01_sft",
            "02_sft",
        }, done.stderr
    assert not os.path.exists(out)
    done = command(
        "--config",
        path,
        "--stages",
        "sft",
        f"--output_dir={out}",
        "--sft.max_steps=1",
        "--log_level",
        "info",
    )
    assert (
        done.returncode == 0
        and "step 1/1" in done.stdout
        and "Warning" not in done.stdout + done.stderr
    )
    state = json.loads(Path(out, "pipeline.json").read_text())
    assert state["plan"]["01_sft"]["max_steps"] == 1
    made_by = f"python chain.py --config {path} --stages sft --output_dir={out}"
    assert state["command"] == f"{made_by} --sft.max_steps=1 --log_level info"
    assert json.loads(Path(out, "01_sft/stage.json").read_text())["command"] == state["command"]
    assert state["command"] in Path(out, "report.html").read_text()


def test_a_chain_that_goes_on_has_its_last_command_and_finished_stages_theirs(
    pipeline, tmp_path, monkeypatch
):
    path, out = pipeline(["sft", "note"]), tmp_path / "out"
    # Under pytest-xdist the main module has no file, as in a notebook.
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "chain.py", raising=False)
    records = {}
    for words in (["--until=01_sft"], ["--api_key=sk-1"]):
        monkeypatch.setattr(sys, "argv", ["chain.py", *words])
        until = "01_sft" if "--until=01_sft" in words else None
        Pipeline.from_yaml(path, until=until).run()
        for name in ("pipeline.json", "01_sft/stage.json", "02_note/stage.json"):
            if (out / name).exists():
                records[name] = json.loads((out / name).read_text())["command"]
    assert records == {
        "pipeline.json": "python chain.py '--api_key=***'",
        "01_sft/stage.json": "python chain.py --until=01_sft",
        "02_note/stage.json": "python chain.py '--api_key=***'",
    }


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--sft.learnig_rate=1"], "did you mean 'learning_rate'"),
        (["--dryrun"], "did you mean 'dry_run'"),
        (["--dpo.seed=1"], "unknown stage 'dpo'"),
        (["--sft.seed=1", "--sft.seed=2"], "--sft.seed was given 2 times"),
        (["--", "--dry_run"], "an option without a name"),
        (["--stages", "sft", "dpoo"], "unknown stage 'dpoo'"),
        (["other.yaml"], "give one YAML file"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_status_2(pipeline, arguments, words):
    done = command(pipeline(["sft"]), *arguments)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_failed_chain_exits_with_status_1(pipeline, model_dir, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(
        "".join(json.dumps({"question": "q", "answer": f"a{n}"}) + "\n" for n in range(9))
    )
    (tmp_path / "exploding.py").write_text(
        "from recipes_under_test import *\n".replace("recipes_under_test", "sft")
        + "class Exploding(SFTStage):\n    stage_name = 'boom'\n"
        + "    def train(self, m, t):\n        raise RuntimeError('boom')\n"
    )
    options = {"exploding": {"data": str(broken)}}
    path = pipeline([str(tmp_path / "exploding.py")], options)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "recipes")}
    done = subprocess.run(
        [sys.executable, "chain.py", path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (
        done.returncode == 1 and "01_exploding failed" in done.stdout and "boom" in done.stdout
    ), done.stderr


@pytest.mark.parametrize("algorithm", ["a2c", "ppo", "trpo", "grpo", "rloo"])
def test_the_rl_pages_are_stages_by_name_and_behind_the_stage_rl(algorithm):
    page = "grpo" if algorithm == "rloo" else algorithm
    options = {"data": "examples/questions.jsonl", "reward": "numeric"}
    configs = {"rl": {**options, "algorithm": algorithm}, page: options}
    chain_of_two = Pipeline.from_dict(
        {"stages": ["rl", page], "model": "the/start", "stage_configs": configs},
        **{"rl.batch_size": "4"},
    )
    behind, by_name = chain_of_two.stages
    assert type(behind).__name__ == type(by_name).__name__ == f"{page.upper()}Stage"
    assert behind.config.batch_size == 4
    assert behind.config.stage_name == "rl" and behind.config.model_name_or_path == "the/start"
    if page == "grpo":
        assert behind.config.advantage == algorithm and by_name.config.advantage == "grpo"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"algorithm": "pp"}, "stage 01_rl: .*did you mean 'ppo'"),
        ({"data": "a", "prompt_dataset_path": "b"}, "prompt_dataset_path is given twice"),
    ],
)
def test_options_of_the_stage_rl_that_do_not_fit_are_refused(options, words):
    configs = {"rl": {"reward": "numeric", **options}}
    with pytest.raises(ConfigError, match=words):
        Pipeline.from_dict({"stages": ["rl"], "model": "m", "stage_configs": configs})


def test_an_option_of_another_page_behind_the_stage_rl_is_noted():
    options = {"algorithm": "ppo", "advantage": "rloo", "data": "d", "reward": "numeric"}
    one = Pipeline.from_dict({"stages": ["rl"], "model": "m", "stage_configs": {"rl": options}})
    assert one.stages[0].config.notes == [
        "advantage has no effect with algorithm=ppo; it belongs to grpo, rloo"
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "yaml").glob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_pipelines_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert Pipeline.from_yaml(path, dry_run=True).run() == []


SMALL = {
    "sft": dict(max_steps=2, num_eval_samples=2, max_new_tokens=4),
    "dpo": dict(max_steps=2),
    "reward": dict(max_steps=2),
    "rl": dict(
        num_training_steps=2,
        batch_size=8,
        num_generations=4,
        num_eval_prompts=4,
        generation_kwargs={"max_new_tokens": 4},
    ),
    "cot_distillation": dict(max_steps=2, num_eval_samples=2, max_new_tokens=4),
    "custom_tokenizer": dict(vocab_size=300, num_eval_samples=2),
}
SMALL["rlaif"] = SMALL["rl"]


@pytest.mark.parametrize("path", sorted((ROOT / "yaml").glob("*.yaml")), ids=lambda path: path.name)
def test_a_miniature_of_each_shipped_pipeline_runs(path, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    few = {
        f"{stage}.{option}": value
        for stage in load_yaml(path)["stages"]
        for option, value in SMALL[stage].items()
    }
    results = Pipeline.from_yaml(
        path, model_name_or_path=model_dir, output_dir=str(tmp_path / "out"), **few
    ).run()
    assert all(result.success for result in results), results[-1].error_message
    metrics = {result.stage_name: result.metrics for result in results}
    if "dpo" in metrics:
        assert metrics["dpo"]["eval_accuracy_before"] == 0.5
    if "rlaif" in metrics:
        assert (
            metrics["rlaif"]["win_rate_low"]
            <= metrics["rlaif"]["win_rate"]
            <= metrics["rlaif"]["win_rate_high"]
        )
    assert (
        "eval_loss" in capsys.readouterr().out.split("before -> after")[1]
        and (tmp_path / "out/final/model.safetensors").exists()
    )


OLDER = """
model_name_or_path: MODEL
torch_dtype: auto
trust_remote_code: false
use_auth_token: false
output_dir: OUT
stages: [sft, dpo, rlaif, rl, cot_distillation]
save_final_model: true
cleanup_intermediate: false
push_to_hub: false
hub_repo_id: me/model
hub_token: null
hub_private: true
push_adapter_only: false
convert_to_gguf: false
gguf_quantization: q4_k_m
gguf_output_path: null
enable_state_persistence: true
auto_resume: true
force_restart: false
log_level: info
stage_configs:
  sft:
    dataset_name_or_path: examples/sample_data.jsonl
    max_seq_length: 512
    per_device_train_batch_size: 4
    gradient_accumulation_steps: 2
    learning_rate: 2e-4
    num_train_epochs: 1
    warmup_ratio: 0.03
    lora_r: 16
    lora_alpha: 32
    use_4bit: false
    save_steps: 500
    logging_steps: 10
    validation_split: 0.1
  dpo:
    preference_dataset_path: examples/preferences.jsonl
    max_seq_length: 512
    max_prompt_length: 256
    beta: 0.1
    loss_type: sigmoid
    label_smoothing: 0.0
    reference_model_path: null
  rlaif:
    prompt_dataset_path: examples/questions.jsonl
    max_seq_length: 512
    feedback_model_path: JUDGE
    feedback_model_type: reward_model
    ppo_epochs: 4
    batch_size: 8
    mini_batch_size: 4
    learning_rate: 1e-5
    generation_kwargs: {max_new_tokens: 128, temperature: 0.7, top_p: 0.9}
    num_training_steps: 1000
    save_freq: 100
  rl:
    prompt_dataset_path: examples/questions.jsonl
    max_seq_length: 512
    reward_model_path: JUDGE
    reward_model_type: regression
    algorithm: ppo
    ppo_epochs: 4
    batch_size: 8
    mini_batch_size: 4
    learning_rate: 1e-5
    gamma: 1.0
    gae_lambda: 0.95
    clip_range: 0.2
    value_loss_coef: 0.5
    entropy_coef: 0.01
    kl_penalty: kl
    init_kl_coef: 0.2
    target_kl: 6.0
    generation_kwargs: {max_new_tokens: 128, temperature: 0.7}
    num_training_steps: 1000
    save_freq: 100
    eval_freq: 50
  cot_distillation:
    reasoning_dataset_path: examples/reasoning.jsonl
    teacher_model_path: MODEL
    teacher_model_type: local
    teacher_base_url: null
    teacher_api_key: null
    max_seq_length: 512
    distillation_type: both
    temperature: 2.0
    alpha: 0.5
    cot_template: "{rationale}\\nTherefore, the answer is {answer}"
    reasoning_types: [arithmetic, money]
    generate_synthetic_data: false
    num_synthetic_examples: 100
    validation_split: 0.1
    eval_reasoning_tasks: []
"""


def older(tmp_path, model_dir, **changes):
    judge = tmp_path / "judge"
    judge.mkdir(exist_ok=True)
    (judge / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    text = (
        OLDER.replace("MODEL", model_dir)
        .replace("OUT", str(tmp_path / "out"))
        .replace("JUDGE", str(judge))
    )
    return parse_yaml(text) | changes


def test_a_configuration_of_the_older_form_is_taken_as_it_is(
    tmp_path, model_dir, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    assert Pipeline.from_dict(older(tmp_path, model_dir), dry_run=True).run() == []
    screen = capsys.readouterr().out
    assert screen.count("format ") == 5 and "Therefore, the answer is" in screen


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hub_token": "hf_secret"}, "hf auth login"),
        ({"until": "sftt"}, "until: unknown stage 'sftt'; did you mean 'sft'"),
    ],
)
def test_what_would_be_unsafe_or_wrong_is_refused_with_the_remedy(
    tmp_path, model_dir, changes, words
):
    with pytest.raises(ConfigError, match=words) as caught:
        Pipeline.from_dict(older(tmp_path, model_dir, **changes))
    assert "hf_secret" not in str(caught.value)


def test_a_gguf_file_in_few_bits_takes_two_commands(tmp_path, model_dir):
    convert, quantize = Pipeline.from_dict(older(tmp_path, model_dir, convert_to_gguf=True)).notes
    assert convert.endswith("/final --outfile model.gguf.f16 --outtype f16")
    assert quantize.endswith(": llama-quantize model.gguf.f16 model.gguf Q4_K_M")


@pytest.mark.parametrize(
    "changes, command",
    [
        ({"push_to_hub": True}, "hf upload me/model .*/final --private --commit-message="),
        ({"upload_to_hub": True}, "hf upload me/model .*/final --private --commit-message="),
        ({"push_adapter_only": True}, "hf upload me/model .*/NN_STAGE/adapter"),
        (
            {"convert_to_gguf": True, "gguf_quantization": "q8_0"},
            "convert_hf_to_gguf.py .*/final --outfile model.gguf --outtype q8_0",
        ),
    ],
)
def test_for_what_other_programs_do_their_command_is_said(tmp_path, model_dir, changes, command):
    (note,) = Pipeline.from_dict(older(tmp_path, model_dir, **changes)).notes
    assert re.match(f"for another program, after the chain: .*{command}", note)


def test_every_option_of_the_pipeline_reaches_the_stages_that_have_it(pipeline):
    path = pipeline(["sft"], torch_dtype="float32", use_auth_token=True, trust_remote_code=True)
    config = Pipeline.from_yaml(path).stages[0].config
    assert isinstance(config, TrainingConfig) and config.torch_dtype == "float32"
    assert config.use_auth_token and config.trust_remote_code


def test_a_chain_in_16_bit_in_one_go_is_the_chain_stage_by_stage(pipeline, model_dir, tmp_path):
    """A model handed over in memory is that of its folder: its rotary frequencies are as
    precise."""
    stages, weights = ["sft", "sft"], {}
    path = pipeline(stages, torch_dtype="bfloat16")
    for name, untils in (("one", [None]), ("two", ["01_sft", None])):
        for until in untils:
            results = Pipeline.from_yaml(path, output_dir=str(tmp_path / name), until=until).run()
            assert all(result.success for result in results)
        weights[name] = (tmp_path / name / "final/model.safetensors").read_bytes()
    assert weights["one"] == weights["two"]
    model = common.cast_weights(
        common.load_model_and_tokenizer(core.config.ModelConfig(model_name_or_path=model_dir))[0],
        torch.bfloat16,
    )
    assert {weight.dtype for weight in model.parameters()} == {
        torch.bfloat16
    } and model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_final_is_the_model_of_the_last_stage_that_there_is_now(pipeline, tmp_path):
    configs = {"02_sft": {"learning_rate": 1e-2}}
    path = pipeline(["sft", "sft"], configs)

    def read(folder):
        return (tmp_path / "out" / folder / "model.safetensors").read_bytes()

    Pipeline.from_yaml(path).run()
    assert read("final") == read("02_sft") != read("01_sft")
    Pipeline.from_yaml(path, stages=["sft"]).run()  # nothing runs, but the last stage is another
    assert read("final") == read("01_sft")
    Pipeline.from_yaml(path, **{"02_sft.enabled": True}).run()
    assert read("final") == read("02_sft")
    before = read("final")
    Pipeline.from_yaml(path, save_final_model=False, **{"02_sft.learning_rate": 1e-3}).run()
    Pipeline.from_yaml(path, **{"02_sft.learning_rate": 1e-3}).run()
    assert read("final") == read("02_sft") != before
    (tmp_path / "out/final/model.safetensors").unlink()
    Pipeline.from_yaml(path, **{"02_sft.learning_rate": 1e-3}).run()
    assert read("final") == read("02_sft")
    Pipeline.from_yaml(path, cleanup_intermediate=True, **{"02_sft.learning_rate": 1e-3}).run()
    kept = (tmp_path / "out/final/model.safetensors").stat().st_mtime_ns
    Pipeline.from_yaml(path, **{"02_sft.learning_rate": 1e-3}).run()
    assert (
        not (tmp_path / "out/02_sft/model.safetensors").exists()
        and (tmp_path / "out/final/model.safetensors").stat().st_mtime_ns == kept
    )
    Pipeline.from_yaml(path, stages=["sft"]).run()  # whose weights are gone: it runs again
    assert read("final") == read("01_sft")


def test_final_of_a_model_that_was_never_saved_is_known_too(pipeline, data, tmp_path, monkeypatch):
    path = pipeline(
        ["sft"], {"sft": {"dataset_name_or_path": data, "max_steps": 1, "save_intermediate": False}}
    )
    Pipeline.from_yaml(path).run()
    first = (tmp_path / "out/01_sft/stage.json").read_bytes()
    assert (again := Pipeline.from_yaml(path)).has_final()
    monkeypatch.setenv("RANK", "1")
    mark = (tmp_path / "out/final/fingerprint.json").rename(tmp_path / "mark")
    again.save_final(
        StageResult("sft", True), tmp_path / "out/final"
    )  # that is the first process's work
    assert not (tmp_path / "out/final/fingerprint.json").exists()
    mark.rename(tmp_path / "out/final/fingerprint.json")
    monkeypatch.delenv("RANK")
    Pipeline.from_yaml(path).run()
    assert (tmp_path / "out/01_sft/stage.json").read_bytes() == first


def test_a_template_of_a_stage_that_hands_nothing_on_is_its_own(
    pipeline, data, tmp_path, tokenizer
):
    template = {
        "instruction_template": "Q: {instruction} A: {response}",
        "dataset_name_or_path": data,
        "max_new_tokens": 4,
    }
    results = Pipeline.from_yaml(
        pipeline(
            ["sft", "evaluate", "sft"],
            {
                "02_evaluate": template,
                "sft": {"dataset_name_or_path": data, "validation_split": 0.2, "max_steps": 1},
            },
        )
    ).run()
    assert all(result.success for result in results)
    assert (
        (tmp_path / "out/03_sft/chat_template.jinja").read_text()
        == tokenizer.chat_template
        == results[-1].tokenizer.chat_template
    )


def test_a_link_to_a_stage_that_saves_nothing_is_refused(pipeline, data):
    configs = {
        "sft": {"dataset_name_or_path": data, "save_intermediate": False},
        "evaluate": {"dataset_name_or_path": data, "baseline": "stage:sft"},
    }
    with pytest.raises(
        ConfigError,
        match="stage 02_evaluate: baseline=stage:sft: that stage has save_intermediate=false",
    ):
        Pipeline.from_yaml(pipeline(["sft", "evaluate"], configs))


def test_the_plan_starts_from_the_first_stages_own_model(pipeline, data):
    def plan(**first):
        configs = {"01_sft": first, "sft": {"dataset_name_or_path": data}}
        return Pipeline.from_yaml(pipeline(["sft", "sft"], configs)).plan()

    other = plan(model_name_or_path="other")
    assert "01_sft  other" in other and "the model of 01_sft" in other
    assert "other" not in plan()
    assert "other" not in plan(model_name_or_path="other", enabled=False)


def test_paths_of_the_home_folder(pipeline, model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(model_dir, tmp_path / "tiny")
    shutil.copy(ROOT / "recipes/sft.py", tmp_path / "my_sft.py")
    chain_of = Pipeline.from_yaml(
        pipeline(
            ["~/my_sft.py"],
            {"my_sft": {"dataset_name_or_path": "~/data.jsonl"}},
            model_name_or_path="~/tiny",
        )
    )
    (tmp_path / "my_reward.py").write_text(
        "def one(prompts, completions, **_):\n    return [1.0] * len(completions)\n"
    )
    reward = core.rewards.Subprocess("~/my_reward.py:one", 60)
    assert reward([None], ["a"]) == [1.0] and reward.stop() is None
    first = chain_of.stages[0].fingerprint()["files"]
    (tmp_path / "tiny/config.json").write_text((tmp_path / "tiny/config.json").read_text() + "\n")
    assert first["~/tiny"] and core.fingerprints.file_identity(Path("~/tiny")) != first["~/tiny"]
    with pytest.raises(ConfigError, match="output_dir=''"):
        Pipeline.from_yaml(pipeline(["sft"]), output_dir="")


@pytest.mark.parametrize(
    "made, words",
    [
        ("raise KeyError('gone')", "KeyError: 'gone'"),
        ("return None", "returned None, not a StageResult"),
    ],
)
def test_an_execute_of_ones_own_that_goes_wrong_is_a_failed_stage(pipeline, tmp_path, made, words):
    (tmp_path / "mine.py").write_text(
        "from common import BaseStage, StageResult\n"
        "class Mine(BaseStage):\n    stage_name = 'mine'\n"
        "    def execute(self, model=None, tokenizer=None, previous_result=None):\n"
        f"        {made}\n"
    )
    results = Pipeline.from_yaml(pipeline(["sft", str(tmp_path / "mine.py")])).run()
    assert (
        [result.success for result in results] == [True, False]
        and words in results[1].error_message
        and results[1].model_path is None
    )
    state = json.loads((tmp_path / "out/pipeline.json").read_text())["state"]
    assert (
        state == {"failed": "02_mine"}
        and "Traceback" in (tmp_path / "out/pipeline_training.log").read_text()
    )


def test_a_result_that_names_no_model_leaves_the_model_as_it_was(pipeline, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy\nfrom common import BaseStage, StageResult\n"
        "class Mine(BaseStage):\n    stage_name = 'mine'\n"
        "    def execute(self, model=None, tokenizer=None, previous_result=None):\n"
        "        metrics = {'a': numpy.float32(0.5), 'a_before': None}\n"
        "        return StageResult('mine', True, metrics=metrics)\n"
    )
    results = Pipeline.from_yaml(
        pipeline(["sft", str(tmp_path / "mine.py"), "sft"], {"03_sft": {"max_steps": 1}})
    ).run()
    assert all(result.success for result in results)
    assert json.loads((tmp_path / "out/03_sft/stage.json").read_text())["parent"]["model"] == str(
        tmp_path / "out/01_sft"
    )
    assert json.loads((tmp_path / "out/pipeline.json").read_text())["results"][1]["metrics"] == {
        "a": 0.5,
        "a_before": None,
    }
