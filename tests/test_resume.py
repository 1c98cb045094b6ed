"""Stop and resume: killed at any moment, by a signal, by a full disk, with damaged checkpoints.

KILLS=20 python -m pytest tests/test_resume.py -k random    # more of them
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import grpo
import pytest
import rl
import sft
from conftest import ROOT
from test_house import files_behind

import core.checkpoints
import core.files
import core.fingerprints
import core.rl_run
import core.source_code
import core.train_state
import core.training
from chain import Pipeline
from core.errors import ConfigError
from core.recipe_files import resolve_options
from core.yaml_files import dump_yaml, load_yaml

PAIRS = [
    {"prompt": f"Say {n}", "chosen": "yes " * (1 + n % 3), "rejected": "no " * (1 + n % 2)}
    for n in range(20)
]
KILLS = int(os.environ.get("KILLS", 3))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pipeline(model_dir, data, tmp_path):
    """A function that writes a YAML of four stages, with the options given, and returns its path.

    There is a checkpoint after every other step.
    """

    def write_yaml(name="out", **changes):
        pairs = write(tmp_path / "pairs.jsonl", PAIRS)
        fit = {"max_steps": 6, "save_steps": 2, "validation_split": 0.2, "learning_rate": 1e-2}
        stages = {
            "sft": {"data": data, **fit},
            "dpo": {"data": pairs, **fit},
            "reward": {"data": pairs, **fit},
            "rl": {
                "data": pairs,
                "reward_model_path": "stage:reward",
                "algorithm": "ppo",
                "batch_size": 4,
                "save_freq": 2,
                "num_training_steps": 6,
                "generation_kwargs": {"max_new_tokens": 6},
                "validation_split": 0.2,
            },
        }
        for stage, options in changes.items():
            stages[stage] |= options
        path = tmp_path / f"{name}.yaml"
        config = {
            "model_name_or_path": model_dir,
            "output_dir": str(tmp_path / name),
            "stages": [*stages],
            "stage_configs": stages,
        }
        path.write_text(dump_yaml(config))
        return str(path)

    return write_yaml


def weights(folder):
    return hashlib.sha256((folder / "final/model.safetensors").read_bytes()).hexdigest()


# Argument vector: the repository, a YAML, a folder, the number of kills. One line of JSON per run.
FORKS = """
import json, os, random, shutil, signal, sys, time

sys.path[:0] = [sys.argv[1], sys.argv[1] + "/recipes"]
import torch, transformers, trl, peft, datasets, bitsandbytes, tensorboard
from transformers import Trainer
import chain, dpo, reward, rl, sft

torch.set_num_threads(1)
yaml, out, kills = sys.argv[2], sys.argv[3], int(sys.argv[4])
random.seed(0)
STAGES = ("01_sft", "02_dpo", "03_reward", "04_rl")

def run(number, patience=None):
    child = os.fork()
    if not child:
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        try:
            chain.main([yaml, f"--output_dir={out}/{number}"])
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        os._exit(99)
    began = time.monotonic()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        if patience is not None and time.monotonic() - began > patience:
            os.kill(child, signal.SIGKILL)
            patience = None
        time.sleep(0.002)

run("first")  # the machine's caches are cold
status, whole = run("undisturbed")
print(json.dumps(["undisturbed", status, whole]), flush=True)
for number in range(kills):
    after = 0.9 * whole * (number + random.random()) / kills  # one in every part of the run
    killed, _ = run(number, after)
    while killed == 0:  # the machine has become faster: it was at its end before
        shutil.rmtree(f"{out}/{number}")
        after /= 2
        killed, _ = run(number, after)
    finished = {name: os.path.exists(f"{out}/{number}/{name}/stage.json") for name in STAGES}
    log = os.path.getsize(f"{out}.log")
    status, _ = run(number)
    again = open(f"{out}.log").read()[log:]
    print(json.dumps([number, killed, after, finished, status, again]), flush=True)
"""


def test_a_chain_killed_at_random_moments_ends_with_the_weights_of_the_undisturbed_one(
    pipeline, tmp_path
):
    runs = tmp_path / "runs"
    command = [sys.executable, "-W", "ignore", "-c", FORKS]
    arguments = [str(ROOT), pipeline(), str(runs), str(KILLS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    undisturbed, *trials = [json.loads(line) for line in done.stdout.splitlines()]
    log = (tmp_path / "runs.log").read_text()
    assert undisturbed[1] == 0, done.stderr + log[-3000:]
    assert len(trials) == KILLS, done.stderr + log[-3000:]
    expected = weights(runs / "undisturbed")
    for number, _, after, finished, status, again in trials:
        assert status == 0, again[-3000:]
        assert weights(runs / str(number)) == expected, (number, after, again[-3000:])
        for folder, was_finished in finished.items():
            if was_finished:
                assert f"{folder} is finished already" in again
    assert [killed for _, killed, *_ in trials] == [-signal.SIGKILL] * KILLS


@pytest.fixture
def interrupted(model_dir, data, tmp_path):
    """SFT with checkpoints after steps 2 and 4 of 5, whose saving of the model failed.

    (a function that runs it in a folder, the folder of that run, that of a whole one)
    """
    options = {
        "model_name_or_path": model_dir,
        "dataset_name_or_path": data,
        "max_steps": 5,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "validation_split": 0.2,
        "save_total_limit": 3,
    }

    def full(model, tokenizer):
        raise OSError(28, "No space left on device")

    def run(folder, fails=False, keep_end=False, **more):
        config = sft.SFTConfig(**options | {"output_dir": str(tmp_path / folder)} | more)
        stage = sft.SFTStage(config)
        if fails:
            stage.save_model_and_tokenizer = full
        result = stage.execute()
        if (
            fails and not keep_end
        ):  # as if it had been lost: that of the end would make the others needless
            shutil.rmtree(tmp_path / folder / f"checkpoints/checkpoint-{config.max_steps}")
        return result

    assert run("whole").success
    result = run("cut", fails=True)
    assert not result.success
    assert "No space left on device" in result.error_message
    return run, tmp_path / "cut", tmp_path / "whole"


def same_weights(folder, other):
    one = (folder / "model.safetensors").read_bytes()
    return one == (other / "model.safetensors").read_bytes()


def test_the_best_checkpoint_of_a_run_that_was_moved_is_in_its_folder_now(interrupted, tmp_path):
    run, _, _ = interrupted
    options = {
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "learning_rate": 0.3,
        "greater_is_better": True,  # so that an early step is the best
        "max_steps": 4,
    }
    assert run("kept", **options).success
    assert not run("here", fails=True, **options).success
    state = json.loads((tmp_path / "here/checkpoints/checkpoint-3/state.json").read_text())
    assert 0 < state["progress"]["best_step"] < 3
    (tmp_path / "here").rename(tmp_path / "there")
    assert run("there", **options).success
    assert same_weights(tmp_path / "there", tmp_path / "kept")


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


def test_a_checkpoint_of_the_last_step_is_the_end(interrupted):
    """No step more is taken. The mean loss is that of all steps."""
    run, folder, whole = interrupted
    same = {"max_steps": 4, "lr_scheduler_type": "constant"}
    done = run("whole", resume_from_checkpoint=False, **same)
    assert not run("cut", fails=True, resume_from_checkpoint=False, **same).success
    result = run("cut", **same)
    assert result.success
    assert result.metrics["steps"] == 4
    assert result.metrics["train_loss"] == done.metrics["train_loss"] > 1
    assert same_weights(folder, whole)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("relative", [False, True])
def test_a_copied_run_goes_on_from_its_own_folders_and_leaves_the_others_alone(
    pipeline, tmp_path, monkeypatch, relative
):
    """Also where a relative output_dir is continued from another working directory."""
    path = pipeline(
        sft={"max_steps": 1},
        dpo={"max_steps": 1},
        reward={"max_steps": 1},
        rl={"num_training_steps": 1},
    )
    original, copy = tmp_path / "a", tmp_path / "b"
    monkeypatch.chdir(tmp_path)
    output_dir = "a" if relative else str(original)
    first = Pipeline.from_yaml(path, output_dir=output_dir, until="reward").run()
    assert all(result.success for result in first)

    shutil.copytree(original, copy)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = sorted(original.rglob("*"))
    results = Pipeline.from_yaml(path, output_dir=str(copy), cleanup_intermediate=True).run()
    assert [result.success for result in results] == [True] * 4
    assert sorted(original.rglob("*")) == before
    assert results[2].artifacts["reward_model"] == str(copy / "03_reward")
    assert results[1].artifacts["adapter"].startswith(str(copy / "02_dpo"))
    record = json.loads((copy / "04_rl/stage.json").read_text())
    assert record["parent"]["model"] == str(copy / "02_dpo")
    assert not (copy / "02_dpo/model.safetensors").exists()
    assert (copy / "final/model.safetensors").exists()


def test_a_finished_recipe_is_not_run_again_by_the_same_command(model_dir, data, tmp_path, caplog):
    folder = tmp_path / "o"
    recipe = [sys.executable, "-W", "ignore", "recipes/sft.py"]
    options = [f"--model={model_dir}", f"--data={data}", f"--output_dir={folder}"]
    command = [*recipe, *options, "--max_steps=2", "--save_steps=1"]

    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    record = (folder / "stage.json").read_bytes()
    saved_at = (folder / "model.safetensors").stat().st_mtime_ns
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == second.returncode == 0
    assert "finished already" in second.stdout
    assert "step" not in second.stdout
    assert "eval_loss" in second.stdout
    assert first.stdout.splitlines()[-1] == second.stdout.splitlines()[-1]
    assert (folder / "stage.json").read_bytes() == record
    assert (folder / "model.safetensors").stat().st_mtime_ns == saved_at

    # With other options it runs, and where its model is gone.
    for model_is_gone in (False, True):
        if model_is_gone:
            (folder / "model.safetensors").unlink()
        caplog.clear()
        config = sft.SFTConfig(
            model_name_or_path=model_dir,
            dataset_name_or_path=data,
            max_steps=2,
            save_steps=1,
            output_dir=str(folder),
            learning_rate=1e-3,
        )
        stage = sft.SFTStage(config)
        stage.reuse_finished = True
        assert stage.execute().success
        assert "finished already" not in caplog.text
        assert "step 2/2" in caplog.text


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def empty_json(file):
    file.write_text("{}")


def empty(file):
    file.write_text("")


def remove(file):
    file.unlink()


def list_in_json(file):
    file.write_text("[]")


def null_in_json(file):
    file.write_text("null")


def unlist_weights(file):
    digests = json.loads(file.read_text())
    del digests["weights.safetensors"]
    file.write_text(json.dumps(digests))


def become_a_folder(file):
    file.unlink()
    file.mkdir()


def become_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("checkpoint")


def link_to_itself(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.symlink_to(path.name)


def change_and_seal(file, **values):
    """What another version of the code has written and sealed."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    manifest = file.parent / "manifest.json"
    digests = json.loads(manifest.read_text()) | {file.name: core.files.file_digest(file)}
    manifest.write_text(json.dumps(digests))


def make_newer(file):
    change_and_seal(file, format=core.files.CHECKPOINT_FORMAT + 1)


def add_option(file):
    change_and_seal(file, an_option_of_next_year=1)


@pytest.mark.parametrize(
    "name, harm, words",
    [
        ("weights.safetensors", cut, "weights.safetensors is damaged"),
        ("weights.safetensors", flip, "weights.safetensors is damaged"),
        ("optimizer.safetensors", remove, "optimizer.safetensors is missing"),
        ("state.json", empty_json, "state.json is damaged"),
        ("manifest.json", empty, "manifest.json is damaged"),
        ("manifest.json", empty_json, "manifest.json is empty"),
        ("manifest.json", remove, "manifest.json is missing"),
        ("manifest.json", list_in_json, "manifest.json is damaged"),
        ("manifest.json", null_in_json, "manifest.json is damaged"),
        ("manifest.json", unlist_weights, "manifest.json does not list weights.safetensors"),
        ("options.json", remove, "options.json is missing"),
        ("weights.safetensors", become_a_folder, r"weights.safetensors cannot be read (Is a dir"),
        ("weights.safetensors", link_to_itself, "weights.safetensors cannot be read (Too many"),
        ("", become_a_file, "it is not a folder"),
        ("", link_to_itself, "it is not a folder"),
        ("state.json", make_newer, "it was written by a newer version of these scripts"),
        ("options.json", add_option, "it belongs to another recipe or version"),
    ],
)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_taken(
    interrupted, caplog, name, harm, words
):
    run, folder, whole = interrupted
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    harm(folder / "checkpoints/checkpoint-4" / name)
    assert run("cut").success
    assert f"checkpoint-4 is skipped: {words}" in caplog.text
    assert "resuming from" in caplog.text
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines].count(3) == 1
    assert same_weights(folder, whole)
    # What was skipped is kept, and does not count as one of the newest.
    assert os.path.lexists(folder / "checkpoints/checkpoint-4.1")


def test_folders_of_other_names_are_no_checkpoints(interrupted, caplog):
    run, folder, whole = interrupted
    newest = folder / "checkpoints/checkpoint-4"
    for name in ("checkpoint-6 copy", "checkpoint-9.1", "checkpoint-", "my-9", "checkpoint-x"):
        shutil.copytree(newest, newest.with_name(name))
    assert run("cut").success
    assert "skipped" not in caplog.text
    assert f"resuming from {newest}" in caplog.text
    assert same_weights(folder, whole)
    assert (newest.with_name("checkpoint-6 copy") / "weights.safetensors").exists()


def test_a_run_that_goes_on_from_the_middle_keeps_its_own_checkpoints(interrupted):
    """Those after it, of an earlier run, do not count as the newest ones."""
    run, folder, whole = interrupted
    middle = folder / "checkpoints/checkpoint-2"
    named = {"resume_from_checkpoint": str(middle), "save_total_limit": 1}
    assert not run("cut", fails=True, save_steps=1, **named).success
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"checkpoint-2", "checkpoint-4.1"} <= kept
    assert run("cut", save_steps=1, **named).success
    assert same_weights(folder, whole)


def test_a_checkpoint_that_is_named_has_to_be_whole(interrupted):
    run, folder, whole = interrupted
    flip(folder / "checkpoints/checkpoint-2/optimizer.safetensors")
    with pytest.raises(ConfigError, match="checkpoint-2: optimizer.safetensors is damaged; give"):
        run("cut", resume_from_checkpoint=str(folder / "checkpoints/checkpoint-2"))
    with pytest.raises(ConfigError, match="checkpoint-4 belongs to another recipe; give"):
        core.checkpoints.find_checkpoint(
            rl.RLConfig(resume_from_checkpoint=str(folder / "checkpoints/checkpoint-4"))
        )
    assert run("cut", resume_from_checkpoint=str(folder / "checkpoints/checkpoint-4")).success
    assert same_weights(folder, whole)


def test_with_other_options_it_starts_anew_and_the_old_checkpoints_are_laid_aside(
    interrupted, caplog
):
    run, folder, whole = interrupted
    assert run("cut", learning_rate=2e-2, save_steps=0).success
    assert (
        "resuming" not in caplog.text
        and "moved the checkpoints of an earlier run to" in caplog.text
        and "learning_rate 0.01 -> 0.02" in caplog.text
    )
    assert (folder / "checkpoints.1/checkpoint-4").is_dir()


def test_a_run_begun_anew_goes_on_from_its_own_checkpoints(interrupted, caplog):
    run, folder, _ = interrupted
    new = {"learning_rate": 2e-2, "max_steps": 3}
    assert not run("cut", fails=True, resume_from_checkpoint=False, **new).success
    assert (
        "moved the checkpoints of an earlier run to" in caplog.text
        and (folder / "checkpoints.1/checkpoint-4").is_dir()
    )
    assert run("cut", **new).success and "checkpoint-2" in caplog.text.split("resuming from ")[1]


def test_train_called_alone_does_not_go_on_from_a_run_with_other_options(interrupted):
    _, folder, _ = interrupted
    options = load_yaml(folder / "../whole/stage_config.yaml") | {
        "output_dir": str(folder),
        "stage_name": "",
    }
    assert core.checkpoints.find_checkpoint(sft.SFTConfig(**options)).name == "checkpoint-4"
    with pytest.raises(
        ConfigError,
        match=r"checkpoint-4 comes from a run with other options \(learning_rate 0.01 -> 0.02\)",
    ):
        core.checkpoints.find_checkpoint(sft.SFTConfig(**options | {"learning_rate": 2e-2}))
    assert (
        core.checkpoints.find_checkpoint(
            sft.SFTConfig(**options | {"learning_rate": 2e-2, "resume_from_checkpoint": False})
        )
        is None
    )


def test_a_checkpoint_whose_saving_fails_leaves_the_older_one(
    model_dir, data, tmp_path, monkeypatch
):
    """A full disk while step 4 is saved."""
    seal = core.checkpoints.seal_checkpoint
    out = tmp_path / "out"

    def full(folder, config):
        if folder.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        seal(folder, config)

    monkeypatch.setattr(core.train_state, "seal_checkpoint", full)
    options = dict(
        model_name_or_path=model_dir,
        dataset_name_or_path=data,
        max_steps=6,
        save_steps=2,
        save_total_limit=1,
    )
    result = sft.SFTStage(sft.SFTConfig(**options, output_dir=str(out))).execute()
    assert not result.success and "No space left" in result.error_message
    assert [path.name for path in (out / "checkpoints").glob("[a-z]*")] == [
        "checkpoint-2"
    ] and not core.files.find_damage(out / "checkpoints/checkpoint-2")
    monkeypatch.setattr(core.train_state, "seal_checkpoint", seal)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # of a line too there was only half
    assert sft.SFTStage(sft.SFTConfig(**options, output_dir=str(out))).execute().success


@pytest.mark.parametrize("recipe, number", [("sft", signal.SIGTERM), ("rl", signal.SIGINT)])
def test_a_signal_saves_and_the_same_command_goes_on(model_dir, data, tmp_path, recipe, number):
    own_options = {
        "sft": {"max_steps": 40, "save_steps": 0, "learning_rate": 1e-2},
        "rl": {
            "reward": "length",
            "reward_length": 3,
            "num_training_steps": 12,
            "save_freq": 0,
            "batch_size": 4,
            "generation_kwargs": {"max_new_tokens": 24},
            "validation_split": 0,
        },
    }
    options = {"model": model_dir, "data": data, **own_options[recipe]}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    door = {"sft": sft.SFTStage, "rl": rl.RLStage}[recipe]
    stage_class, resolved, _ = resolve_options(door, [options | {"output_dir": str(whole)}])
    assert stage_class(stage_class.config_class(**resolved)).execute().success

    command = [sys.executable, "-W", "ignore", f"recipes/{recipe}.py", f"--output_dir={cut}"]
    command += [f"--{name}={value}" for name, value in options.items()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step  1/"):
            process.send_signal(number)
        last = line
    assert process.wait() == 128 + number, last
    assert len([*(cut / "checkpoints").glob("[a-z]*-*")]) == 1
    assert not (cut / "stage.json").exists()

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stdout
    assert same_weights(cut, whole)


@pytest.mark.parametrize("recipe", ["sft", "grpo"])
def test_after_the_last_step_nothing_is_lost_until_the_stage_is_recorded(
    model_dir, data, tmp_path, recipe, monkeypatch, caplog
):
    """What fails or is stopped in the last evaluation, or later, goes on from the last step."""
    options = {
        "sft": {"max_steps": 3, "validation_split": 0.2},
        "grpo": {
            "reward": "length",
            "reward_length": 3,
            "num_training_steps": 3,
            "batch_size": 4,
            "num_eval_prompts": 2,
            "generation_kwargs": {"max_new_tokens": 4},
        },
    }[recipe]
    options |= {"model": model_dir, "data": data, "output_dir": str(tmp_path / "out")}
    stage_class = {"sft": sft.SFTStage, "grpo": grpo.GRPOStage}[recipe]
    stage_class, resolved, _ = resolve_options(stage_class, [options])
    module, checkpoints = {"sft": core.training, "grpo": core.rl_run}[recipe], tmp_path / "out"
    checkpoints /= "checkpoints"
    evaluate, evaluations = module.evaluate, []

    def stopped_in_the_last_one(run):
        evaluations.append(1)
        if len(evaluations) == 2:
            sys.exit(143)
        return evaluate(run)

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", stopped_in_the_last_one)
        with pytest.raises(SystemExit):
            stage_class(stage_class.config_class(**resolved)).execute()
    assert [folder.name for folder in checkpoints.iterdir()] == ["checkpoint-3"]
    assert not (checkpoints / "checkpoint-3/optimizer.safetensors").exists()

    caplog.set_level("INFO", "recipes")
    caplog.clear()
    assert stage_class(stage_class.config_class(**resolved)).execute().success
    assert "resuming from" in caplog.text and "step 1/3" not in caplog.text
    assert not checkpoints.exists()
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    evaluated = [json.loads(line)["step"] for line in lines if "eval_" in line]
    assert evaluated == [0, 3]


def test_the_end_of_a_training_goes_no_further(interrupted):
    run, folder, _ = interrupted
    assert not run("end", fails=True, keep_end=True).success
    end = folder.parent / "end/checkpoints/checkpoint-5"
    with pytest.raises(ConfigError, match="is the end of a training run, without its optimizer"):
        run("more", max_steps=7, resume_from_checkpoint=str(end))


def test_the_last_evaluation_is_logged_once(model_dir, data, tmp_path):
    config = sft.SFTConfig(
        model_name_or_path=model_dir,
        dataset_name_or_path=data,
        output_dir=str(tmp_path),
        max_steps=4,
        eval_steps=2,
        validation_split=0.2,
    )
    result = sft.SFTStage(config).execute()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    assert result.metrics["eval_loss"] == evaluations[-1]["eval_loss"]
    assert result.metrics["eval_loss_before"] == evaluations[0]["eval_loss"]


def test_a_signal_between_the_steps_ends_at_once(model_dir, data, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "recipes/sft.py",
            f"--model={model_dir}",
            f"--data={data}",
            f"--output_dir={tmp_path}/o",
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not (
        tmp_path / "o/training.log"
    ).exists():  # by then it listens, and has yet to load the model
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 143
    assert said.strip() == "stopped by SIGTERM; run the same command again to resume"


def test_a_loss_that_is_not_finite_at_step_3_stops_with_the_weights_of_step_2(
    model_dir, data, tmp_path, monkeypatch
):
    calls, loss = [], sft.loss

    def broken(model, batch):
        calls.append(model.training)
        value, metrics = loss(model, batch)
        return value * (float("nan") if sum(calls) == 3 else 1), metrics

    monkeypatch.setattr(sft, "loss", broken)
    settings = sft.SFTConfig(
        model_name_or_path=model_dir,
        dataset_name_or_path=data,
        max_steps=6,
        save_steps=1,
        validation_split=0,
        output_dir=str(tmp_path / "out"),
    )
    result = sft.SFTStage(settings).execute()
    assert (
        not result.success
        and "the loss is nan at step 3; the weights are those from before it"
        in result.error_message
    )
    assert core.checkpoints.find_checkpoint(settings).name == "checkpoint-2"


def ran(capsys):
    screen = capsys.readouterr().out
    return [
        folder for folder in ("01_sft", "02_dpo", "03_reward", "04_rl") if f"/4 {folder}" in screen
    ], screen


def test_finished_stages_are_not_run_again_and_a_change_runs_what_follows(
    pipeline, tmp_path, capsys
):
    assert all(result.success for result in Pipeline.from_yaml(pipeline()).run())
    assert ran(capsys)[0] == ["01_sft", "02_dpo", "03_reward", "04_rl"]
    wanted = weights(tmp_path / "out")

    results = Pipeline.from_yaml(pipeline()).run()
    names, screen = ran(capsys)
    assert (
        names == []
        and len(results) == 4
        and screen.count("is finished already") == 4
        and weights(tmp_path / "out") == wanted
    )
    assert "eval_loss" in screen.split("before -> after")[1]

    Pipeline.from_yaml(
        pipeline(dpo={"beta": 0.2}, sft={"save_steps": 3})
    ).run()  # a checkpoint more or less changes nothing
    names, screen = ran(capsys)
    assert names == ["02_dpo", "03_reward", "04_rl"] and "from 02_dpo on: beta 0.1 -> 0.2" in screen
    assert "01_sft is finished already" in screen and weights(tmp_path / "out") != wanted

    write(tmp_path / "pairs.jsonl", PAIRS)
    path = pipeline(dpo={"beta": 0.2})
    write(tmp_path / "pairs.jsonl", PAIRS[:-1])
    Pipeline.from_yaml(path).run()
    names, screen = ran(capsys)
    assert (
        names == ["02_dpo", "03_reward", "04_rl"] and "from 02_dpo on: its data changed" in screen
    )

    Pipeline.from_yaml(path, from_stage="reward").run()
    assert ran(capsys)[0] == ["03_reward", "04_rl"]
    with pytest.raises(ConfigError, match="02_dpo has to run first: beta 0.2 -> 0.3"):
        Pipeline.from_yaml(path, from_stage="rl", **{"dpo.beta": 0.3}).run()
    Pipeline.from_yaml(path, force_restart=True, until="dpo").run()
    assert ran(capsys)[0] == ["01_sft", "02_dpo"]
    assert json.loads((tmp_path / "out/pipeline.json").read_text())["state"] == {"finished": False}
    Pipeline.from_yaml(path, until="sft").run()  # which is finished
    assert ran(capsys)[0] == []


def test_a_changed_reward_file_is_seen(model_dir, data, tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text("def f(prompts, completions, **_): return [0.0] * len(completions)\n")
    settings = rl.RLConfig(
        model_name_or_path=model_dir,
        prompt_dataset_path=data,
        reward=[f"{judge}:f"],
        output_dir=str(tmp_path / "o"),
    )
    before = rl.RLStage(settings).fingerprint()
    judge.write_text("def f(prompts, completions, **_): return [1.0] * len(completions)\n")
    now = rl.RLStage(settings).fingerprint()
    assert core.fingerprints.describe_differences(before, now) == f"{judge}:f changed"


def test_the_code_of_a_recipe_is_what_it_imports(tmp_path):
    code = set(sft.SFTStage(sft.SFTConfig(output_dir=str(tmp_path))).fingerprint()["code"])
    assert {"recipes/sft.py", "common.py", "core/training.py", "core/runtime.py"} <= code
    assert not code & {"chain.py", "report.py", "recipes/dpo.py", "core/judge.py"}
    assert code == code_behind("recipes/sft.py")


@pytest.mark.parametrize("algorithm", rl.STAGES)
def test_the_code_of_an_rl_page_is_all_that_it_imports_and_no_more(tmp_path, algorithm):
    stage_class = rl.STAGES[algorithm]
    page = stage_class.__module__.rpartition(".")[2]
    stage = stage_class(stage_class.config_class(output_dir=str(tmp_path)))
    assert set(stage.fingerprint()["code"]) == code_behind(f"recipes/{page}.py")


def code_behind(path):
    """The files that a file of the repository imports in turn, and the package of those in core."""
    files = {file.relative_to(ROOT).as_posix() for file in files_behind(ROOT / path)}
    return files | {"core/__init__.py"}


def test_the_code_of_a_reward_function_process_counts(tmp_path):
    code = rl.grpo.GRPOStage(rl.grpo.GRPOConfig(output_dir=str(tmp_path))).fingerprint()["code"]
    assert {"recipes/grpo.py", "core/rewards.py", "core/function_server.py"} <= set(code)


# A stage that imports a room inside a function; the room imports another one.
MINE = """
from common import BaseStage, StageConfig


class Mine(BaseStage):
    stage_name = "mine"

    def prepare_model_and_tokenizer(self, model, tokenizer, previous_result=None):
        return model, tokenizer

    def train(self, model, tokenizer):
        from core.direct import VALUE

        return {"value": VALUE}

    def save_model_and_tokenizer(self, model, tokenizer):
        return self.config.output_dir
"""
CHANGE_ROOMS = """
import json, sys
from pathlib import Path
from common import StageConfig
from research.mine import Mine

stage = lambda: Mine(StageConfig(output_dir=sys.argv[1]))
assert stage().execute().success
reasons = {"none": stage().stale()}
for room in ("core/direct.py", "core/indirect.py", "core/unused.py"):
    source = Path(room).read_text()
    Path(room).write_text(source + "# changed\\n\\n\\n")
    assert not stage().stale()  # it says the same
    Path(room).write_text(source + "CHANGED = True\\n")
    reasons[room] = stage().stale()
    Path(room).write_text(source)
print(json.dumps(reasons))
"""


def test_a_change_in_a_room_that_a_recipe_reaches_makes_it_run_again(tmp_path):
    """Also in one that it reaches only through another; a room that it does not use may change."""
    home = tmp_path / "repository"
    shutil.copytree(ROOT / "core", home / "core")
    shutil.copy(ROOT / "common.py", home)
    (home / "research").mkdir()
    (home / "research/mine.py").write_text(MINE)
    (home / "core/direct.py").write_text("from core.indirect import VALUE\n")
    (home / "core/indirect.py").write_text("VALUE = 1\n")
    (home / "core/unused.py").write_text("VALUE = 2\n")
    command = [sys.executable, "-W", "ignore", "-c", CHANGE_ROOMS, str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(home)}
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "none": "",
        "core/direct.py": "core/direct.py changed",
        "core/indirect.py": "core/indirect.py changed",
        "core/unused.py": "",
    }


def test_imports_are_read_in_every_form():
    source = b"""
import a.b
from c import d
def f():
    from . import e
    from ..g import h
"""
    names = core.source_code.imported_names(source, "top.package")
    assert set(names) == {
        "a.b", "c", "c.d", "top.package", "top.package.e", "top.g", "top.g.h"
    }  # fmt: skip
    assert core.source_code.imported_names(b"def broken(:", "") == ()


def test_after_a_cleanup_nothing_is_run_again_until_something_changes(pipeline, tmp_path, capsys):
    path = pipeline()
    options = dict(cleanup_intermediate=True, stages="sft,dpo")
    assert len(Pipeline.from_yaml(path, **options).run()) == 2
    wanted, _ = weights(tmp_path / "out"), ran(capsys)
    Pipeline.from_yaml(path, **options).run()
    assert "step 1/" not in ran(capsys)[1] and weights(tmp_path / "out") == wanted
    Pipeline.from_yaml(path, **options, **{"dpo.beta": 0.3}).run()
    screen = ran(capsys)[1]
    assert "1/2 01_sft" in screen and "2/2 02_dpo" in screen  # what dpo starts from was not kept


def test_early_stopping_has_waited_as_long_after_an_interruption(
    model_dir, data, tmp_path, monkeypatch
):
    options = dict(
        model_name_or_path=model_dir,
        dataset_name_or_path=data,
        max_steps=8,
        eval_steps=1,
        save_steps=1,
        validation_split=0.2,
        early_stopping_patience=4,
        learning_rate=1e-12,
    )
    whole = sft.SFTStage(sft.SFTConfig(**options, output_dir=str(tmp_path / "whole"))).execute()
    cut = sft.SFTStage(sft.SFTConfig(**options, output_dir=str(tmp_path / "cut")))
    seal = core.checkpoints.seal_checkpoint

    def full(folder, config):
        if folder.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        seal(folder, config)

    with monkeypatch.context() as patch:
        patch.setattr(core.train_state, "seal_checkpoint", full)
        assert not cut.execute().success
    again = sft.SFTStage(sft.SFTConfig(**options, output_dir=str(tmp_path / "cut"))).execute()
    assert again.metrics["steps"] == whole.metrics["steps"] < 8
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()
