"""recipes/rl.py with algorithm=grpo against stock trl.GRPOTrainer: the same prompts, group size, lengths and LoRA.

    python benchmarks/rl.py --data=examples/questions.jsonl --prompts=4 --generations=4 --length=48 --steps=4 --kl=0.04

Both start from the same weights, and both sample every completion to its full length, so that the work is the same
whatever the policy learns. Timed is the call that trains. Each step takes `prompts` prompts with
`generations` completions of `length` tokens, and one optimizer step with the KL (k3) to the reference in the loss;
--kl=0 runs no reference in either. `checkpointing` recomputes activations in both; -1 leaves each its own default, all
for TRL and none for the recipe.
"""

import os
import time

import compare
import rl
import torch

import common
import core.chat
import core.data

RATE = 1e-5


def prepare(
    model: str,
    data: str,
    prompts: int,
    generations: int,
    length: int,
    steps: int,
    kl: float,
    checkpointing: int,
):
    config = rl.RLConfig(
        model_name_or_path=model,
        prompt_dataset_path=data,
        output_dir="outputs/benchmark",
        algorithm="grpo",
        reward=["length"],
        reward_length=10,
        batch_size=prompts * generations,
        num_generations=generations,
        save_freq=0,
        generation_kwargs={"max_new_tokens": length},
        num_training_steps=steps,
        validation_split=0.0,
        learning_rate=RATE,
        init_kl_coef=kl,
        kl_in="loss",
        kl_penalty="k3",
        resume_from_checkpoint=False,
        gradient_checkpointing=max(0, checkpointing),
    )
    os.makedirs(config.output_dir, exist_ok=True)
    model, tokenizer = common.load_model_and_tokenizer(config)
    rows = core.data.load_rows(config, rl.convert, None)[0]
    words = lambda prompts, completions, **_: [
        len({*str(text).split()}) / 10 for text in completions
    ]
    return config, model, tokenizer, rows, words


def recipe(**options) -> tuple[int, float]:
    config, model, tokenizer, rows, words = prepare(**options)
    model = common.add_adapter(model, config)
    core.chat.stop_tokens = lambda tokenizer: [-1]  # every completion has its full length
    began = time.perf_counter()
    rl.train(config, model, tokenizer, rows, [], {"words": words})
    return config.batch_size * config.num_training_steps, time.perf_counter() - began


def trl(**options) -> tuple[int, float]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    config, model, tokenizer, rows, words = prepare(**options)
    arguments = GRPOConfig(
        config.output_dir,
        use_cpu=not torch.cuda.is_available(),
        bf16=compare.BF16,
        report_to="none",
        per_device_train_batch_size=config.batch_size,
        num_generations=config.num_generations,
        learning_rate=RATE,
        max_completion_length=config.sampling["max_new_tokens"],
        max_steps=config.num_training_steps,
        generation_kwargs={"min_new_tokens": config.sampling["max_new_tokens"]},
        save_strategy="no",
        logging_steps=1,
        beta=config.init_kl_coef,
        disable_tqdm=True,
        gradient_checkpointing=options["checkpointing"] != 0,
    )
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
    )
    trainer = GRPOTrainer(
        model,
        words,
        args=arguments,
        processing_class=tokenizer,
        peft_config=lora,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
    )
    began = time.perf_counter()
    trainer.train()
    return config.batch_size * config.num_training_steps, time.perf_counter() - began


if __name__ == "__main__":
    compare.main(
        {"recipe": recipe, "trl": trl},
        "completions",
        {
            "model": compare.MODEL,
            "data": "examples/questions.jsonl",
            "prompts": 4,
            "generations": 4,
            "length": 48,
            "steps": 4,
            "kl": 0.04,
            "checkpointing": -1,
        },
        "steps",
    )
