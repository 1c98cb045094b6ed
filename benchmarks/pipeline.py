"""chain.py's SFT -> DPO -> GRPO against three commands of stock TRL: the same rows and LoRA.

    python benchmarks/pipeline.py --rows=48 --pairs=32 --steps=4 --rounds=2

What a user waits for is timed: from the first command to the last model on disk, imports included,
each command in its own process. TRL saves adapters only, and its next command would start from the
base model again, so between its commands they are merged into a model; that is not timed. Both
recompute activations, as TRL does by default.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

# On the CPU in both: GPU memory of the subprocesses could not be measured here.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import compare
import sft

import common
from core.config import ModelConfig
from core.files import write_jsonl
from core.yaml_files import dump_yaml

HOME = Path("outputs/benchmark/pipeline").resolve()
DATA = HOME / "data"
MODEL = HOME / "model"
REWARD_FILE = HOME / "words.py"
BATCH = 8  # rows and pairs per step
COMPLETIONS = 16  # per step of GRPO
REWARD = """
def words(prompts, completions, **_):
    return [len(set(str(text).split())) / 10 for text in completions]
"""


# -- data ------------------------------------------------------------------------------------------


def read_example(name: str) -> list[dict]:
    lines = Path(f"examples/{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def message(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def demonstration(chat: list[dict]) -> dict:
    prompt, answer = chat
    return {"prompt": [prompt], "completion": [answer]}


def prompt_alone(row: dict) -> dict:
    return {"prompt": message("user", row["question"])}


def preference(row: dict) -> dict:
    return {
        "prompt": message("user", row["prompt"]),
        "chosen": message("assistant", row["chosen"]),
        "rejected": message("assistant", row["rejected"]),
    }


def write_rows(name: str, rows: list[dict]) -> None:
    folder = DATA / name
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl", rows)


def prepare(rows: int, pairs: int) -> None:
    """Write the model as a folder, the reward, and the rows in the forms that both can read."""
    shutil.rmtree(HOME, ignore_errors=True)
    config = ModelConfig(model_name_or_path=compare.MODEL)
    model, tokenizer = common.load_model_and_tokenizer(config)
    common.save_model(model, tokenizer, str(MODEL))
    REWARD_FILE.write_text(REWARD)
    instructions = read_example("sample_data")[:rows]
    preferences = read_example("preferences")[:pairs]
    chats = [sft.to_messages(row, "alpaca") for row in instructions]
    write_rows("messages", [{"messages": chat} for chat in chats])
    write_rows("sft", [demonstration(chat) for chat in chats])
    write_rows("dpo", [preference(row) for row in preferences])
    write_rows("grpo", [prompt_alone(row) for row in read_example("questions")])


def timed_run(command: list, folder: Path) -> float:
    """Seconds that a command takes; exits with its output if it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if process.returncode:
        sys.exit(process.stdout + process.stderr)
    return time.perf_counter() - began


# -- the contenders --------------------------------------------------------------------------------


def count_work(rows: int, pairs: int, steps: int) -> int:
    """Rows, pairs and completions that a chain learns from."""
    return rows + pairs + COMPLETIONS * steps


def pipeline_config(steps: int) -> dict:
    """The chain as the content of a YAML file."""
    training = {
        "validation_split": 0,
        "save_steps": 0,
        "per_device_train_batch_size": BATCH,
        "gradient_checkpointing": True,
    }
    sft_options = training | {"dataset_name_or_path": str(DATA / "messages")}
    dpo_options = training | {
        "preference_dataset_path": str(DATA / "dpo"),
        "learning_rate": 5e-5,
    }
    grpo_options = {
        "prompt_dataset_path": str(DATA / "grpo"),
        "reward": f"{REWARD_FILE}:words",
        "batch_size": COMPLETIONS,
        "num_generations": 4,
        "num_training_steps": steps,
        "learning_rate": 5e-5,
        "init_kl_coef": 0.04,
        "kl_in": "loss",
        "kl_penalty": "k3",
        "generation_kwargs": {"max_new_tokens": 48},
        "validation_split": 0,
        "save_freq": 0,
        "gradient_checkpointing": True,
    }
    return {
        "model_name_or_path": str(MODEL),
        "output_dir": str(HOME / "run"),
        "stages": ["sft", "dpo", "grpo"],
        "stage_configs": {"sft": sft_options, "dpo": dpo_options, "grpo": grpo_options},
    }


def recipe(rows: int, pairs: int, steps: int) -> tuple[int, float]:
    """(rows, pairs and completions; seconds) of chain.py."""
    prepare(rows, pairs)
    path = HOME / "pipeline.yaml"
    path.write_text(dump_yaml(pipeline_config(steps)))
    seconds = timed_run([sys.executable, "chain.py", str(path)], Path.cwd())
    return count_work(rows, pairs, steps), seconds


def trl_stages(steps: int) -> dict[str, list[str]]:
    """{TRL's command: its own options}."""
    one_epoch = ["--num_train_epochs=1", f"--per_device_train_batch_size={BATCH}"]
    grpo_options = [
        "--learning_rate=5e-5",
        f"--max_steps={steps}",
        f"--per_device_train_batch_size={COMPLETIONS}",
        "--beta=0.04",
        "--num_generations=4",
        "--max_completion_length=48",
        "--reward_funcs=words.words",
    ]
    return {
        "sft": ["--learning_rate=5e-4", *one_epoch],
        "dpo": ["--learning_rate=5e-5", *one_epoch],
        "grpo": grpo_options,
    }


TRL_OPTIONS = [
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
]


def trl(rows: int, pairs: int, steps: int) -> tuple[int, float]:
    """(rows, pairs and completions; seconds) of TRL's three commands."""
    prepare(rows, pairs)
    start, seconds = MODEL, 0.0
    program = Path(sys.executable).with_name("trl")
    for stage, options in trl_stages(steps).items():
        paths = [
            f"--model_name_or_path={start}",
            f"--output_dir={HOME / stage}",
            f"--dataset_name={DATA / stage}",
        ]
        seconds += timed_run([program, stage, *paths, *TRL_OPTIONS, *options], HOME)
        # The folder holds an adapter: loading merges it into its base.
        config = ModelConfig(model_name_or_path=str(HOME / stage))
        model, tokenizer = common.load_model_and_tokenizer(config)
        start = HOME / f"{stage}_merged"
        common.save_model(model, tokenizer, str(start))
    return count_work(rows, pairs, steps), seconds


if __name__ == "__main__":
    defaults = {"rows": 48, "pairs": 32, "steps": 4}
    contenders = {"recipe": recipe, "trl": trl}
    compare.main(compare.Benchmark(contenders, "rows", defaults, "rows", in_process=False))
