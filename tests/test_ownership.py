"""One run in a folder; files of others stay; a finished result is never overwritten unasked."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sft
from conftest import ROOT, TWO_STEPS

import core.files
from chain import Pipeline
from core import ownership
from core.errors import ConfigError
from core.run_folder import read_run

# Holds the lock of the folder argv[1] until its input ends.
HOLDER = """
import sys
from pathlib import Path
from core.ownership import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder):
    """A process that is at work in `folder`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def config_of(model_dir, data, folder, **options):
    values = TWO_STEPS | options
    return sft.SFTConfig(
        model_name_or_path=model_dir, dataset_name_or_path=data, output_dir=str(folder), **values
    )


def train(*arguments, **options):
    """The result of sft, which ran to its end."""
    stage = sft.SFTStage(config_of(*arguments, **options))
    stage.reuse_finished = True
    result = stage.execute()
    assert result.success, result.error_message
    return result


def sft_chain(model_dir, data, out, steps=1, **options):
    """A chain of one stage."""
    values = {
        "model_name_or_path": model_dir,
        "output_dir": str(out),
        "stages": ["sft"],
        "stage_configs": {"sft": {"data": data, "max_steps": steps}},
    }
    return Pipeline.from_dict(values | options)


def names_in(folder):
    return {path.name for path in Path(folder).iterdir()}


# -- one run in a folder --------------------------------------------------------------------------


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_second_run_is_refused_until_the_first_has_ended_however_it_ends(
    model_dir, data, tmp_path, end
):
    folder = tmp_path / "out"
    holder = hold(folder)
    with pytest.raises(ConfigError) as refusal:
        train(model_dir, data, folder)
    message = str(refusal.value)
    assert f"is in use by process {holder.pid} on {socket.gethostname()};" in message
    assert "choose another output_dir" in message
    # Not even a line in its log.
    assert names_in(folder) == {".lock", ".running.json"}
    if end is None:
        holder.stdin.close()
    else:
        holder.send_signal(end)
    holder.wait()
    train(model_dir, data, folder)
    assert not (folder / ".running.json").exists()


def test_a_chain_is_refused_where_another_one_runs_but_may_be_planned(model_dir, data, tmp_path):
    folder = tmp_path / "out"
    holder = hold(folder)
    with pytest.raises(ConfigError, match="is in use by process"):
        sft_chain(model_dir, data, folder).run()
    assert sft_chain(model_dir, data, folder, dry_run=True).run() == []
    assert names_in(folder) == {".lock", ".running.json"}
    holder.kill()
    holder.wait()
    assert sft_chain(model_dir, data, folder).run()[0].success


def test_the_lock_of_a_killed_process_with_the_same_number_is_taken_over(tmp_path):
    """In a container the first process is number 1 every time."""
    process = {"pid": os.getpid(), "host": socket.gethostname()}
    (tmp_path / ".running.json").write_text(json.dumps(process))
    (tmp_path / ".lock").touch()
    with ownership.locked(tmp_path):
        pass


def test_a_block_in_the_same_process_holds_the_lock_already(tmp_path):
    with ownership.locked(tmp_path):
        with ownership.locked(tmp_path):
            pass
        assert (tmp_path / ".running.json").exists()
        probe = [sys.executable, "-c", HOLDER, str(tmp_path)]
        refused = subprocess.run(probe, cwd=ROOT, capture_output=True, text=True)
        assert f"process {os.getpid()}" in refused.stderr


def test_what_a_killed_write_left_blocks_no_later_one(tmp_path):
    folder = tmp_path / "folder"
    left = core.files.unfinished_name(folder)
    (left / "half").mkdir(parents=True)
    with core.files.atomic_folder(folder) as aside:
        core.files.write_json(aside / "a.json", 1)
    assert names_in(folder) == {"a.json"}
    left = tmp_path / ".folder.1.unfinished"
    left.mkdir()
    with ownership.published(tmp_path) as unfinished:
        core.files.write_json(unfinished / "b.json", 1)
    assert names_in(tmp_path) == {"folder", "b.json", ownership.RECORD}


# -- files of others ------------------------------------------------------------------------------


def place(path, text="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    "name",
    [
        ".venv.3.11/pyvenv.cfg",
        ".zshrc.2024-01-01",
        ".env.1/key",
        ".thesis.unfinished",
        "notes.txt",
        "data/rows.csv",
    ],
)
def test_a_folder_with_other_files_is_used_without_touching_them(model_dir, data, tmp_path, name):
    folder = tmp_path / "out"
    place(folder / name)
    train(model_dir, data, folder)
    train(model_dir, data, folder, learning_rate=1e-2)
    assert (folder / name).read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    ["someones.safetensors", "model.safetensors", "adapter/weights", "config.json", "stage.json"],
)
def test_files_that_a_run_would_write_over_are_refused_before_it_trains(
    model_dir, data, tmp_path, name
):
    folder = tmp_path / "out"
    place(folder / name)
    with pytest.raises(ConfigError, match="has files that no run made") as refusal:
        train(model_dir, data, folder)
    assert name.split("/")[0] in str(refusal.value)
    assert (folder / name).read_text() == "mine"


@pytest.mark.parametrize("option", ["model_name_or_path", "dataset_name_or_path"])
def test_an_input_in_the_output_folder_is_refused(model_dir, data, tmp_path, option):
    first = train(model_dir, data, tmp_path / "out")
    (tmp_path / "out/rationales.jsonl").write_text(Path(data).read_text())
    inputs = {"model_name_or_path": model_dir, "dataset_name_or_path": data}
    inputs[option] = first.model_path
    if option == "dataset_name_or_path":
        inputs[option] = str(tmp_path / "out/rationales.jsonl")
    stage = sft.SFTStage(sft.SFTConfig(**inputs, output_dir=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match=f"{option}=.* is inside output_dir="):
        stage.check()


def test_what_someone_puts_beside_our_files_stays(model_dir, data, tmp_path):
    folder = tmp_path / "out"
    train(model_dir, data, folder, save_steps=1, max_steps=3)
    for name in ("mine.safetensors", "adapter/notes.txt", "model.md"):
        place(folder / name)
    train(model_dir, data, folder, learning_rate=1e-2, force=True)
    for name in ("mine.safetensors", "adapter/notes.txt", "model.md"):
        assert (folder / name).read_text() == "mine"


def test_files_of_others_are_no_part_of_a_finished_result(model_dir, data, tmp_path):
    folder = tmp_path / "out"
    place(folder / "desk_config.json")
    first = train(model_dir, data, folder)
    saved = json.loads((folder / "stage.json").read_text())["files"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(saved)
    assert "desk_config.json" not in saved
    (folder / "desk_config.json").write_text("more")
    place(folder / "mine.safetensors")
    assert train(model_dir, data, folder).metrics == first.metrics
    assert not (folder / "previous.1").exists()


def test_a_model_that_is_published_takes_the_place_of_the_older_one_alone(tmp_path, caplog):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    with ownership.published(tmp_path) as unfinished:
        for name in (*shards, "model.safetensors.index.json", "tokenizer/more.json"):
            place(unfinished / name, "ours")
    place(tmp_path / "config.json")
    place(tmp_path / "extra.safetensors")
    with ownership.published(tmp_path) as unfinished:
        place(unfinished / "model.safetensors", "new")
        place(unfinished / "config.json", "new")
    assert names_in(tmp_path) == {
        ownership.RECORD,
        "model.safetensors",
        "config.json",
        "config.json.1",  # no run made it
        "extra.safetensors",
    }
    assert (tmp_path / "config.json").read_text() == "new"
    assert (tmp_path / "config.json.1").read_text() == "mine"
    assert f"moved config.json to {tmp_path / 'config.json.1'}: no run made it" in caplog.text


def test_a_record_reaches_nothing_outside_its_folder(tmp_path):
    folder = tmp_path / "out"
    place(tmp_path / "outside")
    place(folder / ownership.RECORD, json.dumps(["../outside", str(tmp_path / "outside"), "a"]))
    place(folder / "a")
    ownership.remove_recorded(folder)
    assert names_in(tmp_path) == {"outside"}


def test_a_file_in_a_checkpoint_stays_when_it_is_deleted(model_dir, data, tmp_path):
    folder = tmp_path / "out"
    checkpoint = folder / "checkpoints/checkpoint-1"
    stage = sft.SFTStage(config_of(model_dir, data, folder, save_steps=1, save_total_limit=1))
    step = stage.train

    def train_with_a_note(model, tokenizer):
        place(checkpoint / "notes.txt")
        return step(model, tokenizer)

    stage.train = train_with_a_note
    assert stage.execute().success
    kept = sorted((folder / "checkpoints").glob("checkpoint-1*"))
    assert [(path / "notes.txt").read_text() for path in kept if names_in(path) == {"notes.txt"}]


# -- OUT/final ------------------------------------------------------------------------------------


def test_a_final_or_report_of_someone_else_is_refused_before_a_stage_runs(
    model_dir, data, tmp_path
):
    out = tmp_path / "out"
    place(out / "report.html")
    with pytest.raises(ConfigError, match=r"no run made .*overwrite \(report.html\)"):
        sft_chain(model_dir, data, out).run()
    (out / "report.html").unlink()
    place(out / "final/config.json")
    with pytest.raises(ConfigError, match="final has files that no run made"):
        sft_chain(model_dir, data, out).run()
    assert not (out / "01_sft").exists()
    (out / "final/config.json").unlink()
    place(out / "final/thesis.txt")
    assert sft_chain(model_dir, data, out).run()[0].success
    assert (out / "final/thesis.txt").read_text() == "mine"
    assert (out / "final/model.safetensors").exists()

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/final").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="is a symbolic link"):
        sft_chain(model_dir, data, tmp_path / "linked").run()
    assert names_in(elsewhere) == set()


def test_the_mark_of_a_complete_folder_is_written_last(tmp_path, monkeypatch):
    """Else a folder whose weights were not moved yet would pass for the new model."""
    for content in ("old", "new"):
        if content == "new":
            monkeypatch.setattr(Path, "replace", stop_at("model.safetensors"))
        try:
            with ownership.published(tmp_path) as unfinished:
                for name in ("config.json", "fingerprint.json", "model.safetensors"):
                    place(unfinished / name, content)
        except KeyboardInterrupt:
            assert content == "new"
    assert (tmp_path / "model.safetensors").read_text() == "old"
    assert (tmp_path / "config.json").read_text() == "new"
    assert not (tmp_path / "fingerprint.json").exists()


def stop_at(name):
    """Path.replace, which ends the program before a file of that name is moved."""
    replace = Path.replace

    def replace_or_stop(path, target):
        if path.name == name:
            raise KeyboardInterrupt
        return replace(path, target)

    return replace_or_stop


def test_cleaning_up_deletes_our_weights_alone(model_dir, data, tmp_path):
    out = tmp_path / "out"
    for name in ("mine.safetensors", "adapter/mine.safetensors", "checkpoints/notes.txt"):
        assert sft_chain(model_dir, data, out).run()[0].success
        place(out / "01_sft" / name)
    assert sft_chain(model_dir, data, out, cleanup_intermediate=True).run()[0].success
    stage = out / "01_sft"
    assert not (stage / "model.safetensors").exists()
    assert not (stage / "adapter/adapter_model.safetensors").exists()
    for name in ("mine.safetensors", "adapter/mine.safetensors", "checkpoints/notes.txt"):
        assert (stage / name).read_text() == "mine"


def test_a_chain_does_not_start_from_what_it_overwrites(model_dir, data, tmp_path):
    out = str(tmp_path / "out")
    assert sft_chain(model_dir, data, out).run()[0].success
    for model in (out, f"{out}/final", f"{out}/01_sft"):
        with pytest.raises(ConfigError, match="model_name_or_path=.* is inside output_dir="):
            sft_chain(model, data, out).check()


# -- finished results -----------------------------------------------------------------------------


def test_a_finished_result_of_other_options_is_laid_aside_as_a_whole(
    model_dir, data, tmp_path, caplog
):
    folder = tmp_path / "out"
    train(model_dir, data, folder, save_steps=1, max_steps=3)
    first = (folder / "model.safetensors").read_bytes()
    place(folder / "notes.txt")
    train(model_dir, data, folder, learning_rate=1e-2)
    aside = folder / "previous.1"
    assert (aside / "model.safetensors").read_bytes() == first
    assert (folder / "model.safetensors").read_bytes() != first
    assert "the finished result in" in caplog.text
    assert "learning_rate 0.02 -> 0.01" in caplog.text
    # It is a whole stage, and of the report of the new one it is no part.
    assert {"adapter", "stage.json", "metrics.jsonl", "tokenizer.json"} <= names_in(aside)
    assert len(read_run(aside)[0]) == len(read_run(folder)[0]) == 1
    assert "notes.txt" in names_in(folder)
    # The same command again reuses; a third one has a name of its own; force asks for none.
    train(model_dir, data, folder, learning_rate=1e-2)
    assert not (folder / "previous.2").exists()
    train(model_dir, data, folder)
    assert (folder / "previous.2/stage.json").exists()
    train(model_dir, data, folder, learning_rate=3e-2, force=True)
    assert not (folder / "previous.3").exists()


def test_a_file_of_a_finished_result_that_is_another_one_now_is_kept(model_dir, data, tmp_path):
    folder = tmp_path / "out"
    train(model_dir, data, folder)
    saved = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_text("mine")
    train(model_dir, data, folder)
    assert (folder / "tokenizer.json").read_bytes() == saved
    assert (folder / "tokenizer.json.1").read_text() == "mine"


def test_laying_aside_goes_on_after_a_crash_at_any_moment(tmp_path, monkeypatch):
    model = ["config.json", "model.safetensors", "tokenizer.json"]
    records = ["metrics.jsonl", "stage_config.yaml", "stage.json", "fingerprint.json"]
    for crash_at in range(1, 10):
        folder = tmp_path / str(crash_at)
        for name in (*model, *records, "adapter/weights", "notes.txt"):
            place(folder / name, name)
        place(folder / ownership.RECORD, json.dumps(model))
        monkeypatch.setattr(Path, "rename", stop_before(crash_at))
        with contextlib.suppress(KeyboardInterrupt):
            ownership.lay_aside_result(folder, [], "other options")
        monkeypatch.undo()
        # The same command again takes the folder for its own, and goes on.
        ownership.refuse_foreign_files(folder)
        if (folder / "stage.json").exists():
            ownership.lay_aside_result(folder, [], "other options")
        assert names_in(folder) == {"previous.1", "notes.txt", "fingerprint.json"}
        aside = folder / "previous.1"
        assert names_in(aside) == {*model, *records, "adapter", ownership.RECORD}


def stop_before(number):
    """Path.rename, which ends the program before its call of that number."""
    rename = Path.rename
    calls = 0

    def rename_or_stop(path, target):
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return rename(path, target)

    return rename_or_stop


def test_the_final_model_of_other_options_is_laid_aside(model_dir, data, tmp_path):
    """Where the stages' models are deleted it is the only one."""
    out = tmp_path / "out"
    models = {}
    for steps in (1, 2):
        assert sft_chain(model_dir, data, out, steps, cleanup_intermediate=True).run()[0].success
        models[steps] = (out / "final/model.safetensors").read_bytes()
    assert models[1] != models[2]
    assert (out / "final.1/model.safetensors").read_bytes() == models[1]
    assert sft_chain(model_dir, data, out, 3, force=True).run()[0].success
    assert not (out / "final.2").exists()
