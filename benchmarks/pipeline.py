"""chain.py's SFT -> DPO -> GRPO against the three commands of stock TRL: the same rows, LoRA, batches and steps.

    python benchmarks/pipeline.py --rows=48 --pairs=32 --steps=4 --rounds=2

Timed is what a user waits for: from the first command to the last model on the disk, imports and all, each command a
process of its own. TRL saves adapters alone and its next command would start from the base again, so that between its
commands they are merged into a model; that is not counted. Both recompute activations, as TRL does by default.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # on the CPU in both: what other processes hold of a GPU is not seen here
)

import compare
import sft

import common
import core.config
import core.files
from core.yaml_files import dump_yaml

HOME = Path("outputs/benchmark/pipeline").resolve()
REWARD = "def words(prompts, completions, **_):\n    return [len({*str(text).split()}) / 10 for text in completions]\n"


def prepare(rows: int, pairs: int) -> None:
    """The model as a folder, and the rows in the form that both read."""
    shutil.rmtree(HOME, ignore_errors=True)
    model, tokenizer = common.load_model_and_tokenizer(
        core.config.ModelConfig(model_name_or_path=compare.MODEL)
    )
    common.save_model(model, tokenizer, str(HOME / "model"))
    (HOME / "words.py").write_text(REWARD)
    said = lambda role, text: [{"role": role, "content": text}]
    read = lambda name: [
        json.loads(line) for line in Path(f"examples/{name}.jsonl").read_text().splitlines()
    ]
    chats = [sft.to_messages(row, "alpaca") for row in read("sample_data")[:rows]]
    data = {
        "sft": [{"prompt": chat[:1], "completion": chat[1:]} for chat in chats],
        "dpo": [
            {"prompt": said("user", row["prompt"])}
            | {side: said("assistant", row[side]) for side in ("chosen", "rejected")}
            for row in read("preferences")[:pairs]
        ],
        "grpo": [{"prompt": said("user", row["question"])} for row in read("questions")],
        "messages": [{"messages": chat} for chat in chats],
    }
    for name, lines in data.items():
        (HOME / "data" / name).mkdir(parents=True)
        core.files.write_jsonl(HOME / "data" / name / "train.jsonl", lines)


def recipe(rows: int, pairs: int, steps: int) -> tuple[int, float]:
    prepare(rows, pairs)
    train = dict(
        validation_split=0, save_steps=0, per_device_train_batch_size=8, gradient_checkpointing=True
    )
    (HOME / "pipeline.yaml").write_text(
        dump_yaml(
            dict(
                model_name_or_path=str(HOME / "model"),
                output_dir=str(HOME / "run"),
                stages=["sft", "dpo", "rl"],
                stage_configs=dict(
                    sft=train | dict(dataset_name_or_path=str(HOME / "data/messages")),
                    dpo=train
                    | dict(preference_dataset_path=str(HOME / "data/dpo"), learning_rate=5e-5),
                    rl=dict(
                        prompt_dataset_path=str(HOME / "data/grpo"),
                        algorithm="grpo",
                        reward=f"{HOME / 'words.py'}:words",
                        batch_size=16,
                        num_generations=4,
                        num_training_steps=steps,
                        learning_rate=5e-5,
                        init_kl_coef=0.04,
                        kl_in="loss",
                        kl_penalty="k3",
                        generation_kwargs=dict(max_new_tokens=48),
                        validation_split=0,
                        save_freq=0,
                        gradient_checkpointing=True,
                    ),
                ),
            )
        )
    )
    return rows + pairs + 16 * steps, run(
        [sys.executable, "chain.py", str(HOME / "pipeline.yaml")], Path.cwd()
    )


def trl(rows: int, pairs: int, steps: int) -> tuple[int, float]:
    prepare(rows, pairs)
    own = {
        "sft": ["--learning_rate=5e-4", "--num_train_epochs=1", "--per_device_train_batch_size=8"],
        "dpo": ["--learning_rate=5e-5", "--num_train_epochs=1", "--per_device_train_batch_size=8"],
        "grpo": [
            "--learning_rate=5e-5",
            f"--max_steps={steps}",
            "--per_device_train_batch_size=16",
            "--beta=0.04",
            "--num_generations=4",
            "--max_completion_length=48",
            "--reward_funcs=words.words",
        ],
    }
    start, seconds = HOME / "model", 0.0
    for stage, options in own.items():
        left = HOME / stage
        seconds += run(
            [
                Path(sys.executable).with_name("trl"),
                stage,
                f"--model_name_or_path={start}",
                f"--output_dir={left}",
                f"--dataset_name={HOME / 'data' / stage}",
                "--dtype=float32",
                "--bf16=False",
                "--use_cpu=True",
                "--use_peft",
                "--lora_r=16",
                "--lora_alpha=32",
                "--lora_target_modules=all-linear",
                "--report_to=none",
                "--save_strategy=no",
                "--logging_steps=1",
                *options,
            ],
            HOME,
        )
        config = core.config.ModelConfig(model_name_or_path=str(left))
        model, tokenizer = common.load_model_and_tokenizer(
            config
        )  # an adapter's folder, merged into its base
        start = HOME / f"{stage}_merged"
        common.save_model(model, tokenizer, str(start))
    return rows + pairs + 16 * steps, seconds


def run(command: list, folder: Path) -> float:
    began = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - began


if __name__ == "__main__":
    compare.main(
        {"recipe": recipe, "trl": trl},
        "rows",
        {"rows": 48, "pairs": 32, "steps": 4},
        "rows",
        in_process=False,
    )
