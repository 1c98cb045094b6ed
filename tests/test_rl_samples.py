"""core/rl_samples.py: what RL runs write to samples.jsonl and show on the screen, also resumed."""

import json
import os
import signal

import pytest
import torch
from test_rl import make_run, page_config, prompts, rolled, stage_of, steps_of

from core import rl_run, rl_samples
from core.runtime import start_logging


def lines_of(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def zeros(prompts, completions, **columns):
    return [0.0] * len(completions)


def with_completions(run, rollout, texts, rewards):
    """The rollout with these texts, and rewards (B, R) that are summed."""
    rollout.texts = texts
    rollout.rewards = torch.tensor(rewards)
    rollout.scores = rollout.rewards.sum(1)
    run.step = 10
    return rollout


def test_the_best_and_the_worst_of_a_rollout_are_kept(tokenizer, tmp_path):
    rows = prompts(tokenizer, "One?", "Two?", kind="sum", length="short", answer="3")
    functions = dict.fromkeys(("a/b.py:f", "length"), zeros)
    run, rows = make_run(tokenizer, tmp_path, rows, functions, num_generations=4)
    (tmp_path / "out").mkdir()
    rollout = rolled(run, rows)
    nan = float("nan")
    rewards = [[1.0, 0.5], [nan, 9.0], [2.0, 1.0], [0.0, 0.5], [1.0, 0.0]] + [[0.5, 0.5]] * 3
    rl_samples.write_best_and_worst(run, with_completions(run, rollout, list("abcdefgh"), rewards))
    best, worst = lines_of(tmp_path / "out")
    assert best == {
        "step": 10,
        "kind": "best",  # this and the length are not those of the data
        "prompt": [{"role": "user", "content": "One?"}],
        "completion": "c",
        "reward": 3.0,
        "reward_b.py:f": 2.0,
        "reward_length": 1.0,
        "length": int(rollout.lengths[2]),
        "stopped": bool(rollout.stopped[2]),
        "answer": "3",
    }
    assert (worst["kind"], worst["completion"], worst["reward"]) == ("worst", "d", 0.5)


@pytest.mark.parametrize(
    "rewards, kept",
    [
        ([float("nan")] * 8, []),
        ([float("nan")] * 7 + [1.0], [("best", "h")]),
        ([1.0] * 7 + [2.0], [("best", "h"), ("worst", "a")]),
    ],
)
def test_a_rollout_with_few_verdicts_has_few_samples(tokenizer, tmp_path, rewards, kept):
    run, rows = make_run(tokenizer, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/samples.jsonl").touch()
    columns = [[reward] for reward in rewards]
    rollout = with_completions(run, rolled(run, rows), list("abcdefgh"), columns)
    rl_samples.write_best_and_worst(run, rollout)
    assert [(line["kind"], line["completion"]) for line in lines_of(tmp_path / "out")] == kept


def test_a_held_out_answer_is_shown_on_three_short_lines(tokenizer, tmp_path, capsys, monkeypatch):
    run, _ = make_run(tokenizer, tmp_path)
    run.evaluation_rows = prompts(tokenizer, "Two\nlines? " + 200 * "x", "Another?")
    (tmp_path / "out").mkdir()
    written = ["\x1b[2J" + "y " * 300, "z"]
    monkeypatch.setattr(rl_samples, "decode_completions", lambda *_: (written, [True, False]))
    with start_logging("info"):
        metrics = rl_samples.evaluate(run)
    assert capsys.readouterr().out.splitlines() == [
        "",
        f"  prompt  Two lines? {149 * 'x'}",
        rf"  answer  \x1b[2J{78 * 'y '}",
        f"  reward  {len(written[0]) / 10:.4g}",
    ]
    lines = lines_of(tmp_path / "out")
    assert [line["kind"] for line in lines] == ["held_out"] * 2
    assert [line["completion"] for line in lines] == written
    assert metrics["eval_stopped"] == 0.5


def config_of(model_dir, tmp_path, name, **options):
    lines = [json.dumps({"prompt": f"Say {n}", "answer": str(n)}) + "\n" for n in range(12)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(lines))
    values = dict(
        model_name_or_path=model_dir,
        prompt_dataset_path=str(path),
        output_dir=str(tmp_path / name),
        algorithm="grpo",
        reward=["length"],
        reward_length=3,
        batch_size=4,
        num_generations=2,
        generation_kwargs={"max_new_tokens": 4},
        num_training_steps=12,
        eval_freq=4,
        save_freq=5,
        validation_split=0.2,
        num_eval_prompts=2,
        log_level="error",
    )
    return page_config(**values | options)


def test_samples_are_written_at_evaluations_and_every_few_steps(model_dir, tmp_path):
    assert stage_of(config_of(model_dir, tmp_path, "out")).execute().success
    kinds = [(line["step"], line["kind"]) for line in lines_of(tmp_path / "out")]
    sampled = ["best", "worst"]
    held_out = ["held_out"] * 2
    expected = {0: held_out, 4: sampled + held_out, 8: sampled + held_out, 10: sampled}
    expected[12] = sampled + held_out
    assert kinds == [(step, kind) for step, kinds in expected.items() for kind in kinds]


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("moment", ["first evaluation", "step 4", "step 7", "after the end"])
def test_a_resumed_run_has_every_sample_and_metric_once(model_dir, tmp_path, monkeypatch, moment):
    assert stage_of(config_of(model_dir, tmp_path, "whole")).execute().success
    with monkeypatch.context() as patch:
        if moment == "first evaluation":
            evaluate = rl_run.evaluate
            patch.setattr(rl_run, "evaluate", lambda run: (evaluate(run), interrupt())[0])
        elif moment == "after the end":
            patch.setattr(rl_run, "finish_trackers", lambda accelerator: 1 / 0)
        else:
            end_step = rl_run.Run.end_step

            def end_and_interrupt(run, *arguments):
                end_step(run, *arguments)
                if f"step {run.step}" == moment:
                    interrupt()

            patch.setattr(rl_run.Run, "end_step", end_and_interrupt)
        stage = stage_of(config_of(model_dir, tmp_path, "cut"))
        if moment == "after the end":
            assert not stage.execute().success
        else:
            with pytest.raises(SystemExit):
                stage.execute()
    assert not (tmp_path / "cut/stage.json").exists()

    assert stage_of(config_of(model_dir, tmp_path, "cut")).execute().success
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")
    assert steps_of(tmp_path / "cut") == steps_of(tmp_path / "whole")
