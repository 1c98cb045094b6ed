"""recipes/sft.py against stock trl.SFTTrainer: the same rows, LoRA, batch and steps, in turn.

    python benchmarks/sft.py --data=rows.jsonl --rows=64 --batch=8 --checkpointing=1

Both start from the same weights and learn the answers only. The call that trains is timed: for the
recipe with its tokenization, for TRL without. The rows' own tokens are counted, not the padding.
`checkpointing` recomputes activations in both, n > 1 those of every n-th layer in the recipe and
all in TRL; -1 leaves each its own default, all for TRL and none for the recipe.
"""

import compare
import sft

import common

LEARNING_RATE = 5e-4


def prepare(model: str, data: str, rows: int, batch: int, checkpointing: int) -> tuple:
    """(config, model, tokenizer, conversations, number of tokens)."""
    config = sft.SFTConfig(
        model_name_or_path=model,
        dataset_name_or_path=data,
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
    training_rows, _ = sft.SFTStage(config).load_data()
    conversations = training_rows[:rows]
    num_tokens = 0
    for conversation in conversations:
        sequences, _ = sft.encode(conversation, tokenizer, config.max_seq_length)
        num_tokens += len(sequences[0]["input_ids"])
    return config, model, tokenizer, conversations, num_tokens


def to_prompt_completion(conversation: list[dict]) -> dict:
    """A conversation as TRL reads it, whose last turn is the answer."""
    *prompt, answer = conversation
    return {"prompt": prompt, "completion": [answer]}


def recipe(**options) -> tuple[int, float]:
    """(tokens, seconds) of the recipe."""
    config, model, tokenizer, conversations, num_tokens = prepare(**options)
    model = common.add_adapter(model, config)
    return num_tokens, compare.seconds_of(sft.train, config, model, tokenizer, conversations, [])


def trl(**options) -> tuple[int, float]:
    """(tokens, seconds) of TRL."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config, model, tokenizer, conversations, num_tokens = prepare(**options)
    arguments = SFTConfig(
        config.output_dir,
        max_length=None,
        per_device_train_batch_size=config.per_device_train_batch_size,
        learning_rate=LEARNING_RATE,
        num_train_epochs=1,
        gradient_checkpointing=options["checkpointing"] != 0,
        **compare.TRL_OPTIONS,
    )
    rows = [to_prompt_completion(conversation) for conversation in conversations]
    dataset = Dataset.from_list(rows)
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=compare.lora_config(config),
    )
    return num_tokens, compare.seconds_of(trainer.train)


if __name__ == "__main__":
    defaults = {
        "model": compare.MODEL,
        "data": "examples/sample_data.jsonl",
        "rows": 64,
        "batch": 8,
        "checkpointing": 1,
    }
    contenders = {"recipe": recipe, "trl": trl}
    compare.main(compare.Benchmark(contenders, "tokens", defaults, doubled="rows"))
