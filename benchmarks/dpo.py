"""recipes/dpo.py against stock trl.DPOTrainer: the same pairs, LoRA, batch and steps, in turn.

    python benchmarks/dpo.py --data=pairs.jsonl --pairs=48 --checkpointing=1 --long_prompts=0

Both start from the same weights. The call that trains is timed: for the recipe with its
tokenization, for TRL without. `checkpointing` recomputes activations in both, n > 1 those of every
n-th layer in the recipe and all in TRL; -1 leaves each its own default, all for TRL and none for
the recipe. `long_prompts` puts other solved rows before each prompt until it is three times as long
as an answer.
"""

import compare
import dpo

import common

LEARNING_RATE = 5e-4


def count_tokens(tokenizer, messages: list[dict]) -> int:
    count = 0
    for message in messages:
        ids = tokenizer(message["content"]).input_ids
        count += len(ids)
    return count


def lengthen_prompts(tokenizer, rows: list[dict], others: list[dict]) -> None:
    """Put solved `others` before each prompt until it is three times as long as an answer."""
    for row in rows:
        length = count_tokens(tokenizer, row["chosen"] + row["rejected"]) / 2
        solved_rows = iter(others)
        while count_tokens(tokenizer, row["prompt"]) < 3 * length:
            solved = next(solved_rows)
            row["prompt"] = solved["prompt"] + solved["chosen"] + row["prompt"]


def prepare(
    model: str, data: str, pairs: int, batch: int, checkpointing: int, long_prompts: int
) -> tuple:
    """(config, model, tokenizer, pairs)."""
    config = dpo.DPOConfig(
        model_name_or_path=model,
        preference_dataset_path=data,
        output_dir="outputs/benchmark",
        save_steps=0,
        per_device_train_batch_size=batch,
        gradient_checkpointing=max(0, checkpointing),
        validation_split=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_ratio=0.0,
        resume_from_checkpoint=False,
    )
    model, tokenizer = compare.load_model(config)
    rows, _ = dpo.DPOStage(config).load_data()
    rows, others = rows[:pairs], rows[pairs:]
    if long_prompts:
        lengthen_prompts(tokenizer, rows, others)
    return config, model, tokenizer, rows


def recipe(**options) -> tuple[int, float]:
    """(pairs, seconds) of the recipe."""
    config, model, tokenizer, rows = prepare(**options)
    model = common.add_adapter(model, config)
    return len(rows), compare.seconds_of(dpo.train, config, model, tokenizer, rows, [])


def trl(**options) -> tuple[int, float]:
    """(pairs, seconds) of TRL."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config, model, tokenizer, rows = prepare(**options)
    arguments = DPOConfig(
        config.output_dir,
        max_length=None,
        per_device_train_batch_size=config.per_device_train_batch_size,
        learning_rate=LEARNING_RATE,
        num_train_epochs=1,
        gradient_checkpointing=options["checkpointing"] != 0,
        **compare.TRL_OPTIONS,
    )
    trainer = DPOTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=compare.lora_config(config),
    )
    return len(rows), compare.seconds_of(trainer.train)


if __name__ == "__main__":
    defaults = {
        "model": compare.MODEL,
        "data": "examples/preferences.jsonl",
        "pairs": 48,
        "batch": 8,
        "checkpointing": 1,
        "long_prompts": 0,
    }
    contenders = {"recipe": recipe, "trl": trl}
    compare.main(compare.Benchmark(contenders, "pairs", defaults, doubled="pairs"))
