"""recipes/dpo.py against stock trl.DPOTrainer: the same pairs, LoRA, batch and steps, in turn.

    python benchmarks/dpo.py --data=pairs.jsonl --pairs=48 --checkpointing=1 --long_prompts=0

Both start from the same weights. Timed is the call that trains: for the recipe with its tokenization, for TRL
without. `checkpointing` recomputes activations in both, n > 1 those of every n-th layer in the recipe and all in
TRL; -1 leaves each its own default, all for TRL and none for the recipe. `long_prompts` puts other solved rows before
each prompt until it is three times as long as an answer.
"""

import os
import time

import compare
import dpo
import torch

import common

RATE = 5e-4


def prepare(model: str, data: str, pairs: int, batch: int, checkpointing: int, long_prompts: int):
    config = dpo.DPOConfig(
        model_name_or_path=model,
        preference_dataset_path=data,
        output_dir="outputs/benchmark",
        save_steps=0,
        per_device_train_batch_size=batch,
        gradient_checkpointing=max(0, checkpointing),
        validation_split=0.0,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        warmup_ratio=0.0,
        resume_from_checkpoint=False,
    )
    os.makedirs(config.output_dir, exist_ok=True)
    model, tokenizer = common.load_model_and_tokenizer(config)
    rows = dpo.DPOStage(config).load_data()[0]
    length = lambda messages: sum(
        len(tokenizer(message["content"]).input_ids) for message in messages
    )
    for row in rows[:pairs] if long_prompts else []:
        wanted, others = 1.5 * (length(row["chosen"]) + length(row["rejected"])), iter(rows[pairs:])
        while length(row["prompt"]) < wanted:
            other = next(others)
            row["prompt"] = other["prompt"] + other["chosen"] + row["prompt"]
    return config, model, tokenizer, rows[:pairs]


def recipe(**options) -> tuple[int, float]:
    config, model, tokenizer, rows = prepare(**options)
    model = common.add_adapter(model, config)
    began = time.perf_counter()
    dpo.train(config, model, tokenizer, rows, [])
    return len(rows), time.perf_counter() - began


def trl(**options) -> tuple[int, float]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    config, model, tokenizer, rows = prepare(**options)
    arguments = DPOConfig(
        config.output_dir,
        use_cpu=not torch.cuda.is_available(),
        bf16=compare.BF16,
        report_to="none",
        max_length=None,
        per_device_train_batch_size=config.per_device_train_batch_size,
        learning_rate=RATE,
        num_train_epochs=1,
        gradient_checkpointing=options["checkpointing"] != 0,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
    )
    trainer = DPOTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )
    began = time.perf_counter()
    trainer.train()
    return len(rows), time.perf_counter() - began


if __name__ == "__main__":
    compare.main(
        {"recipe": recipe, "trl": trl},
        "pairs",
        {
            "model": compare.MODEL,
            "data": "examples/preferences.jsonl",
            "pairs": 48,
            "batch": 8,
            "checkpointing": 1,
            "long_prompts": 0,
        },
        "pairs",
    )
