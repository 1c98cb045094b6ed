"""recipes/grpo.py against stock trl.GRPOTrainer: the same prompts, group size, lengths and LoRA.

    python benchmarks/rl.py --data=prompts.jsonl --prompts=4 --generations=4 --length=48 --steps=4

Both start from the same weights, and both sample every completion to its full length, so that the
work is the same whatever the policy learns. The call that trains is timed. Each step takes
`prompts` prompts with `generations` completions of `length` tokens, and one optimizer step with the
KL (k3) to the reference in the loss; --kl=0 runs no reference in either. `checkpointing` recomputes
activations in both; -1 leaves each its own default, all for TRL and none for the recipe.
"""

import compare
import grpo

import common
from core import sampling
from core.rollout import load_prompts

LEARNING_RATE = 1e-5


def distinct_words(prompts: list, completions: list, **_) -> list[float]:
    """The reward: a tenth of the number of different words."""
    counts = [len(set(str(text).split())) for text in completions]
    return [count / 10 for count in counts]


def num_completions(config) -> int:
    return config.batch_size * config.num_training_steps


def no_stop_tokens(tokenizer) -> list[int]:
    """Nothing stops a completion, so that every one has its full length."""
    return [-1]


def prepare(
    model: str,
    data: str,
    prompts: int,
    generations: int,
    length: int,
    steps: int,
    kl: float,
    checkpointing: int,
) -> tuple:
    """(config, model, tokenizer, rows)."""
    config = grpo.GRPOConfig(
        model_name_or_path=model,
        prompt_dataset_path=data,
        output_dir="outputs/benchmark",
        reward=["length"],  # names the reward in the metrics; `distinct_words` is what is called
        reward_length=10,
        batch_size=prompts * generations,
        num_generations=generations,
        save_freq=0,
        generation_kwargs={"max_new_tokens": length},
        num_training_steps=steps,
        validation_split=0.0,
        learning_rate=LEARNING_RATE,
        init_kl_coef=kl,
        kl_in="loss",
        kl_penalty="k3",
        resume_from_checkpoint=False,
        gradient_checkpointing=max(0, checkpointing),
    )
    model, tokenizer = compare.load_model(config)
    rows, *_ = load_prompts(config, {})
    return config, model, tokenizer, rows


def recipe(**options) -> tuple[int, float]:
    """(completions, seconds) of the recipe."""
    config, model, tokenizer, rows = prepare(**options)
    model = common.add_adapter(model, config)
    sampling.stop_tokens = no_stop_tokens
    rewards = {"distinct_words": distinct_words}
    seconds = compare.seconds_of(grpo.train, config, model, tokenizer, rows, [], rewards)
    return num_completions(config), seconds


def trl(**options) -> tuple[int, float]:
    """(completions, seconds) of TRL."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config, model, tokenizer, rows = prepare(**options)
    length = config.sampling["max_new_tokens"]
    arguments = GRPOConfig(
        config.output_dir,
        per_device_train_batch_size=config.batch_size,
        num_generations=config.num_generations,
        learning_rate=LEARNING_RATE,
        max_completion_length=length,
        max_steps=config.num_training_steps,
        generation_kwargs={"min_new_tokens": length},
        beta=config.init_kl_coef,
        gradient_checkpointing=options["checkpointing"] != 0,
        **compare.TRL_OPTIONS,
    )
    trainer = GRPOTrainer(
        model,
        distinct_words,
        args=arguments,
        processing_class=tokenizer,
        peft_config=compare.lora_config(config),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
    )
    return num_completions(config), compare.seconds_of(trainer.train)


if __name__ == "__main__":
    defaults = {
        "model": compare.MODEL,
        "data": "examples/questions.jsonl",
        "prompts": 4,
        "generations": 4,
        "length": 48,
        "steps": 4,
        "kl": 0.04,
        "checkpointing": -1,
    }
    contenders = {"recipe": recipe, "trl": trl}
    compare.main(compare.Benchmark(contenders, "completions", defaults, doubled="steps"))
