"""Plot reward and KL of several RL runs as one picture.

python benchmarks/rl_curves.py --runs=outputs/ppo,outputs/grpo --picture=benchmarks/rl.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WINDOW = 5  # steps of the moving average


def read_metrics(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric in a run's metrics.jsonl."""
    steps, values = [], []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if name in metrics:
            steps.append(metrics["step"])
            values.append(metrics[name])
    return steps, values


def moving_average(values: list[float]) -> list[float]:
    """The mean of each value and up to WINDOW - 1 before it."""
    smooth = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - WINDOW) : end]
        smooth.append(sum(window) / len(window))
    return smooth


def plot_runs(folders: list[Path], picture: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for folder in folders:
        steps, rewards = read_metrics(folder, "reward")
        (line,) = left.plot(steps, moving_average(rewards), label=folder.name)
        color = line.get_color()
        eval_steps, eval_rewards = read_metrics(folder, "eval_reward")
        look = {"color": color, "alpha": 0.6, "linewidth": 1, "markersize": 4}
        left.plot(eval_steps, eval_rewards, "o--", **look)
        steps, kl = read_metrics(folder, "kl")
        right.plot(steps, moving_average(kl), color=color, label=folder.name)
    left.set(xlabel="step", ylabel="reward", title="lines: sampled, dots: held-out prompts, greedy")
    right.set(xlabel="step", ylabel="KL to the reference, nats per completion")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", required=True, help="folders of the runs, separated by commas")
    parser.add_argument("--picture", required=True, help="path of the picture to write")
    arguments = parser.parse_args()
    plot_runs([Path(run) for run in arguments.runs.split(",")], arguments.picture)
