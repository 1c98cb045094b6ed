"""recipes/sft.py against stock trl.SFTTrainer: the same rows, LoRA, batch and steps, in turn.

    python benchmarks/sft.py --data=rows.jsonl --rows=64 --batch=8 --checkpointing=1

Both start from the same weights and learn the answers alone. Timed is the call that trains: for the recipe with its
tokenization, for TRL without. Counted are the rows' own tokens, not the padding. `checkpointing` recomputes
activations in both, n > 1 those of every n-th layer in the recipe and all in TRL; -1 leaves each its own default, all
for TRL and none for the recipe.
"""

import os
import time

import compare
import sft
import torch

import common

RATE = 5e-4


def prepare(model: str, data: str, rows: int, batch: int, checkpointing: int):
    config = sft.SFTConfig(
        model_name_or_path=model,
        dataset_name_or_path=data,
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
    chosen = sft.SFTStage(config).load_data()[0][:rows]
    tokens = sum(
        len(sft.encode(row, tokenizer, config.max_seq_length)[0][0]["input_ids"]) for row in chosen
    )
    return config, model, tokenizer, chosen, tokens


def recipe(**options) -> tuple[int, float]:
    config, model, tokenizer, rows, tokens = prepare(**options)
    model = common.add_adapter(model, config)
    began = time.perf_counter()
    sft.train(config, model, tokenizer, rows, [])
    return tokens, time.perf_counter() - began


def trl(**options) -> tuple[int, float]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    config, model, tokenizer, rows, tokens = prepare(**options)
    arguments = SFTConfig(
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
    data = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
    )
    trainer = SFTTrainer(
        model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora
    )
    began = time.perf_counter()
    trainer.train()
    return tokens, time.perf_counter() - began


if __name__ == "__main__":
    compare.main(
        {"recipe": recipe, "trl": trl},
        "tokens",
        {
            "model": compare.MODEL,
            "data": "examples/sample_data.jsonl",
            "rows": 64,
            "batch": 8,
            "checkpointing": 1,
        },
        "rows",
    )
