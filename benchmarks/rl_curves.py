"""The reward of several runs of recipes/rl.py as one picture.

python benchmarks/rl_curves.py --runs=outputs/ppo,outputs/grpo --picture=benchmarks/rl.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import core.cli

WINDOW = 5  # steps over which a curve is smoothed


def main(runs: str, picture: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for folder in map(Path, runs.split(",")):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps, held_out = (
            [line for line in lines if name in line] for name in ("reward", "eval_reward")
        )
        smooth = lambda name: [
            sum(line[name] for line in steps[max(0, n - WINDOW + 1) : n + 1]) / min(n + 1, WINDOW)
            for n in range(len(steps))
        ]
        numbers = [line["step"] for line in steps]
        (curve,) = left.plot(numbers, smooth("reward"), label=folder.name)
        left.plot(
            [line["step"] for line in held_out],
            [line["eval_reward"] for line in held_out],
            "o--",
            color=curve.get_color(),
            alpha=0.6,
            linewidth=1,
            markersize=4,
        )
        right.plot(numbers, smooth("kl"), color=curve.get_color(), label=folder.name)
    left.set(xlabel="step", ylabel="reward", title="lines: sampled, dots: held-out prompts, greedy")
    right.set(xlabel="step", ylabel="KL to the reference, nats a completion")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    words, options = core.cli.read_command_line(sys.argv[1:])
    if words or set(options) != {"runs", "picture"}:
        sys.exit(__doc__)
    main(**options)
