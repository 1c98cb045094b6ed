"""Sample answers of an RL run: samples.jsonl, and one of them on the screen.

A line of samples.jsonl has "step", "kind", "prompt", "completion", "reward", "reward_NAME" for each
of several rewards, "length", "stopped", and the columns of the prompt's row. The kinds:

    held_out       greedy answer to a held-out prompt, at every evaluation
    best, worst    the sampled completions of a step with the highest and the lowest reward, at
                   evaluations and every 10th step
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.rewards import none_for_nan, score_completions, weighted_total
from core.rollout import Rollout
from core.runtime import is_main_process, logger
from core.sampling import decode_completions, sample_completions
from core.screen import shorten

STEPS_BETWEEN_SAMPLES = 10
Answer = dict[str, Any]  # a line of samples.jsonl

# -- lines of samples.jsonl ------------------------------------------------------------------------


def reward_columns(run: Any) -> list[str]:
    """Names of the rewards in metrics.jsonl and samples.jsonl; none if there is only one reward."""
    names = [f"reward_{Path(name).name}" for name in run.reward_functions]
    return names if len(names) > 1 else []


def describe_answers(
    run: Any,
    rows: Sequence[dict],
    texts: Sequence[str],
    lengths: Sequence[int],
    stopped: Sequence[bool],
    rewards: torch.Tensor,  # (B, R)
    scores: torch.Tensor,  # (B,)
) -> list[Answer]:
    """The lines for B answers to the prompts of their rows, with kind held_out."""
    columns = reward_columns(run)
    totals = none_for_nan(scores.tolist())
    answers = []
    for b, row in enumerate(rows):
        answer = {"step": run.step, "kind": "held_out", "prompt": row["prompt"]}
        answer |= {"completion": texts[b], "reward": totals[b]}
        answer |= dict(zip(columns, none_for_nan(rewards[b].tolist()), strict=False))
        answer |= {"length": int(lengths[b]), "stopped": bool(stopped[b])}
        # A column of the data never replaces a field above.
        answers.append(answer | row["columns"] | answer)
    return answers


def write_answers(run: Any, answers: Sequence[Answer]) -> None:
    """Append lines to samples.jsonl."""
    lines = [json.dumps(answer, ensure_ascii=False, default=str) + "\n" for answer in answers]
    with open(Path(run.config.output_dir, "samples.jsonl"), "a", encoding="utf-8") as file:
        file.writelines(lines)


# -- rollouts --------------------------------------------------------------------------------------


def write_best_and_worst(run: Any, rollout: Rollout) -> None:
    """Append the best and the worst completion of a step, over all processes, to samples.jsonl."""
    from accelerate.utils import gather_object

    answers = describe_answers(
        run,
        rollout.rows,
        rollout.texts,
        rollout.lengths.tolist(),
        rollout.stopped.tolist(),
        rollout.rewards,
        rollout.scores,
    )
    of_all_processes = gather_object(best_and_worst(answers))
    if is_main_process():
        chosen = best_and_worst(of_all_processes)
        for answer, kind in zip(chosen, ("best", "worst"), strict=False):
            answer["kind"] = kind
        write_answers(run, chosen)


def best_and_worst(answers: Sequence[Answer]) -> list[Answer]:
    """The answers with the highest and the lowest reward; fewer if fewer have a verdict."""
    judged = [answer for answer in answers if answer["reward"] is not None]
    by_reward = sorted(judged, key=reward_of)
    if len(by_reward) < 2:
        return by_reward
    return [by_reward[-1], by_reward[0]]


def reward_of(answer: Answer) -> float:
    return answer["reward"]


# -- evaluation ------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(run: Any) -> dict[str, float]:
    """{"eval_reward", ...} of greedy answers to the held-out prompts of a Run (core/rl_run.py).
    The answers go to samples.jsonl, the first one to the screen."""
    from accelerate.utils import gather_object

    config, accelerator = run.config, run.accelerator
    # Each of n processes answers every n-th prompt; the answers are gathered for the metrics.
    own_rows = run.evaluation_rows[accelerator.process_index :: accelerator.num_processes]
    own_answers = []
    for start in range(0, len(own_rows), config.batch_size):
        own_answers += answer_greedily(run, own_rows[start : start + config.batch_size])
    answers = gather_object(own_answers)
    if is_main_process():
        write_answers(run, answers)
        # This is the same prompt at every evaluation.
        show_answer(answers[0])
    metrics = {}
    for name in ("reward", "length", "stopped"):
        values = [float(answer[name]) for answer in answers if answer[name] is not None]
        if values:
            metrics[f"eval_{name}"] = statistics.fmean(values)
    return metrics


def answer_greedily(run: Any, rows: list[dict]) -> list[Answer]:
    """The lines of samples.jsonl for greedy answers to the rows' prompts."""
    config = run.config
    prompts = [row["ids"] for row in rows]
    with run.autocast():
        completions, _ = sample_completions(run.model, run.tokenizer, prompts, config.sampling)
    texts, stopped = decode_completions(run.tokenizer, completions)
    lengths = [len(completion) for completion in completions]
    functions = run.reward_functions
    rewards = score_completions(config, functions, rows, texts, completions)  # (b, R)
    scores = weighted_total(config, rewards)  # (b,)
    return describe_answers(run, rows, texts, lengths, stopped, rewards, scores)


def show_answer(answer: Answer) -> None:
    """Log a prompt, its answer and the reward, one per line."""
    prompt = answer["prompt"][-1]["content"]
    shown = {
        "prompt": shorten(str(prompt)),
        "answer": shorten(answer["completion"]),
        "reward": "none" if answer["reward"] is None else f"{answer['reward']:.4g}",
    }
    lines = [f"  {name}  {text}" for name, text in shown.items()]
    logger.info("\n%s", "\n".join(lines))
