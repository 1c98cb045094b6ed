"""Reinforcement learning from AI feedback: another model says which of two answers is better, and the policy learns it.

    P(y_1 > y_2 | x) from a judge, asked in both orders (Lee et al. 2024, "RLAIF vs. RLHF", section 3.1), by written
    principles (Bai et al. 2022, "Constitutional AI", section 4), then by --feedback_mode:
    reward_model   a reward model of the preferences (recipes/reward.py), and RL with it (recipes/rl.py)
    direct         the judge's score of an answer as RL's reward (Lee et al. 2024, section 3.3, "d-RLAIF")
    preference     DPO on the preferences (recipes/dpo.py), in one or several rounds (Guo et al. 2024, "OAIF")

The figure at the end is the win rate of the new policy over the old one on held-out prompts, by the same judge. One row
of data (other formats: those of rl.py):

    {"prompt": "Write a two-line poem about rain."}

Run it on a laptop with a reward model as judge, and with a judge behind a server:

    python recipes/rlaif.py --model=outputs/sft --data=prompts.jsonl --feedback_model_type=reward_model \\
        --feedback_model_path=outputs/reward --num_training_steps=20
    python recipes/rlaif.py --model=outputs/sft --data=prompts.jsonl --feedback_mode=preference \\
        --feedback_model_type=openai --feedback_model_path=gpt-4.1-mini --max_calls=4000
"""

import sys
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, StageResult, load_model_and_tokenizer, main
from core.config import Count, DataConfig, FitConfig, Options, TrainingConfig, resolve_names
from core.data import load_rows, usable_rows
from core.errors import ConfigError
from core.files import rows_from_main_process, write_jsonl
from core.judge import PROMPT_VERSION, Judge, JudgingConfig
from core.llm_client import LLMClient, LLMClientError
from core.rewards import load_reward_model, start_reward_functions, stopping_functions
from core.rollout import RLConfig, encode_prompt, estimate_work, prompt_sequences, to_prompt
from core.runtime import is_main_process, logger
from core.sampling import generate
from recipes import a2c, dpo, grpo, ppo, reward, trpo

# -- configuration ----------------------------------------------------------------------------------------------------


RL_CONFIGS = {
    "ppo": ppo.PPOConfig,
    "a2c": a2c.A2CConfig,
    "trpo": trpo.TRPOConfig,
    "grpo": grpo.GRPOConfig,
    "rloo": grpo.GRPOConfig,
}
RL_TRAIN = {
    "ppo": ppo.train,
    "a2c": a2c.train,
    "trpo": trpo.train,
    "grpo": grpo.train,
    "rloo": grpo.train,
}


@dataclass
class RLAIFConfig(RLConfig, JudgingConfig):
    """Options of reinforcement learning from AI feedback; those of rl.py are for its modes reward_model and direct."""

    feedback_mode: Literal["reward_model", "direct", "preference"] = (
        "reward_model"  # what is made of the feedback
    )
    algorithm: Literal["ppo", "a2c", "trpo", "grpo", "rloo"] = (
        "ppo"  # the RL recipe that learns from the feedback
    )
    rl_kwargs: Options = field(
        default_factory=dict
    )  # options of that recipe's page alone, such as {clip_range: 0.1}
    num_generations: Count | None = (
        None  # completions sampled for each prompt; none: as the RL recipe's page says
    )
    num_candidates: Count = 2  # answers a prompt, two of them a pair
    num_rounds: Count = 1  # `preference`: of sampling, judging and learning
    reward_kwargs: Options = field(
        default_factory=dict
    )  # `reward_model`: options of recipes/reward.py
    preference_kwargs: Options = field(
        default_factory=dict
    )  # `preference`: options of recipes/dpo.py

    @property
    def trains_with_rl(self) -> bool:
        return self.feedback_mode != "preference"

    def __post_init__(self):
        if self.num_generations is None:
            self.num_generations = RL_CONFIGS[self.algorithm].num_generations
        super().__post_init__()

    def rl_config(self) -> RLConfig:
        """The config of the RL recipe that this one contains."""
        options = {f.name: getattr(self, f.name) for f in fields(RLConfig)}
        if self.algorithm == "rloo":
            options["advantage"] = "rloo"
        config_class = RL_CONFIGS[self.algorithm]
        return config_class(**options | resolve_names(config_class, self.rl_kwargs))

    rewarding = property(lambda self: [*self.reward, "feedback"])
    labelling = property(
        lambda self: (
            self.feedback_mode == "preference"
            or (self.feedback_mode == "reward_model" and self.feedback_model_type != "reward_model")
        )
    )

    def validate(self) -> None:
        super().validate()
        mode, kind = (
            f"feedback_mode={self.feedback_mode}",
            f"feedback_model_type={self.feedback_model_type}",
        )
        if self.reward_model_path:
            raise ConfigError(
                "reward_model_path: write feedback_model_type=reward_model and feedback_model_path"
            )
        needs = {
            "num_rounds": self.feedback_mode == "preference",
            "num_candidates": self.labelling,
            "preference_kwargs": self.feedback_mode == "preference",
            "reward_kwargs": self.feedback_mode == "reward_model" and self.labelling,
            "constitution": self.feedback_model_type != "reward_model",
            "max_verdict_tokens": self.feedback_model_type
            not in ("reward_model", "preference_model"),
        }
        if self.feedback_mode == "preference":  # then those of rl.py have no effect, but for these
            used = {
                "prompt_dataset_path",
                "max_seq_length",
                "generation_kwargs",
                "num_eval_prompts",
            }
            used |= {f.name for f in (*fields(DataConfig), *fields(FitConfig))}
            used -= {
                "learning_rate",
                "warmup_ratio",
                "lr_scheduler_type",
            }  # those of dpo.py are its own
            own = {f.name for f in fields(RLConfig)} - used
            needs |= dict.fromkeys(own, False)
        unread, like = (
            [name for name in needs if not needs[name]],
            {"algorithm": self.algorithm, "lora_r": self.lora_r},
        )
        self.refuse_unread(True, " ".join(unread), f"with {mode} and {kind}", **like)
        if self.feedback_mode == "direct" and self.feedback_model_type == "preference_model":
            raise ConfigError(
                f"{mode} needs scores, and a preference_model only compares; set "
                "feedback_model_type=local or feedback_mode=preference"
            )
        if self.num_candidates % 2:
            raise ConfigError(
                f"num_candidates={self.num_candidates}: two make a pair; write an even number"
            )
        if not self.constitution:
            raise ConfigError("constitution is empty: say in words what makes an answer better")
        if not self.save_intermediate:
            raise ConfigError(
                "save_intermediate=false would lose what is learnt between the parts; remove it"
            )
        if self.feedback_mode == "preference":
            self.preferring("parent", 1).validate()
        if self.feedback_mode == "reward_model" and self.labelling:
            self.rewarding_by("parent").validate()
        if self.trains_with_rl:  # with some reward, since the feedback is none that a page knows
            replace(
                self.rl_config(), reward=["length"], reward_length=1, reward_weights=[]
            ).validate()

    def part(
        self, config_class: type[TrainingConfig], start: str, name: str, labels: str, options: dict
    ) -> Any:
        """The config of a recipe that this one contains: what all training has in common, and its own options."""
        own = ["warmup_ratio", "lr_scheduler_type"]  # each recipe has defaults of its own
        own += ["learning_rate"] * (self.learning_rate == self.default_rates[not self.lora_r])
        given = {f.name: getattr(self, f.name) for f in fields(TrainingConfig) if f.name not in own}
        given |= {
            "model_name_or_path": start,
            "stage_name": name,
            "output_dir": str(Path(self.output_dir, name)),
            "preference_dataset_path": str(Path(self.output_dir, labels)),
            "validation_split": 0.1,
        }
        return config_class(**given | resolve_names(config_class, options))

    def preferring(self, start: str, number: int) -> dpo.DPOConfig:
        return self.part(
            dpo.DPOConfig,
            start,
            f"dpo_{number}",
            f"preferences_{number}.jsonl",
            self.preference_kwargs,
        )

    def rewarding_by(self, start: str) -> reward.RewardConfig:
        return self.part(
            reward.RewardConfig, start, "reward", "preferences_1.jsonl", self.reward_kwargs
        )


# -- the judge: what it is asked, what is read of its answer -----------------------------------------------------------
# A text from outside, a conversation or an answer, stands alone in a message of its own, between marks that it cannot
# know, since they are made of all texts together. The verdict has such a mark too.


# -- feedback ----------------------------------------------------------------------------------------------------------


def candidates(
    config: RLAIFConfig, model, tokenizer, name: str, rows: list[dict]
) -> list[list[str]]:
    """`num_candidates` answers of the policy to each prompt. They are kept in OUT/calls.jsonl like a judge's, by the
    `name` of the model."""
    policy, count = LLMClient(config, "policy", name, "local"), config.num_candidates
    policy.local = model.eval(), tokenizer
    requests = [(row["prompt"], number) for row in rows for number in range(count)]
    texts = policy.ask(
        f"answers of {name}", requests, config.sampling, PROMPT_VERSION, lambda text: text
    )
    return [
        [text for text in texts[start : start + count] if text is not None]
        for start in range(0, len(texts), count)
    ]


def label(
    config: RLAIFConfig, model, tokenizer, name: str, rows: list[dict], judge: Judge, said: dict
) -> list[dict]:
    """Preferences {"prompt", "chosen", "rejected"} between the policy's own answers. `said` takes the figures."""
    sampled, counts, pairs = candidates(config, model, tokenizer, name, rows), Counter(), []
    for row, texts in zip(rows, sampled):
        for first, second in zip(texts[::2], texts[1::2]):
            counts["equal"] += first == second
            counts["empty"] += not (first.strip() and second.strip())
            if first != second and first.strip() and second.strip():
                pairs.append((row["prompt"], first, second))
    if not pairs:
        raise RuntimeError(
            f"no two answers differ ({counts['equal']} pairs are equal); raise the temperature in "
            "generation_kwargs"
        )
    verdicts, figures = judge.compare(pairs, "comparisons")
    labelled = [
        {
            "prompt": prompt,
            "chosen": first if verdict else second,
            "rejected": second if verdict else first,
        }
        for (prompt, first, second), verdict in zip(pairs, verdicts)
        if verdict in (0.0, 1.0)
    ]
    logger.info(
        "feedback: %d preferences of %d pairs; %d ties, %d without a verdict; left out before that: %d equal "
        "and %d empty pairs",
        len(labelled),
        len(pairs),
        verdicts.count(0.5),
        verdicts.count(None),
        counts["equal"],
        counts["empty"],
    )
    if not labelled:
        first = 100 * (figures.get("position_bias", 0.0) + 0.5)
        raise RuntimeError(
            f"nothing to learn from: the judge's verdicts are {100 * figures['ties']:.0f}% ties, and it "
            f"chooses the answer shown first in {first:.0f}% of the cases; take a stronger judge, or "
            "answers that differ more"
        )
    said |= {f"feedback_{name}": value for name, value in figures.items()} | {
        "preferences": float(len(labelled))
    }
    return labelled


def run_part(stage: BaseStage, model, tokenizer, start: str) -> StageResult:
    """The result of a contained recipe; a finished one of the same fingerprint is taken as it is."""
    stage.reuse_finished = True
    result = stage.execute(model, tokenizer, StageResult("start", True, start, start))
    if not result.success:
        raise RuntimeError(f"{stage.stage_name}: {result.error_message}")
    return result


# -- training ---------------------------------------------------------------------------------------------------------


def train(
    config: RLAIFConfig,
    model,
    tokenizer,
    train_rows: list,
    eval_rows: list,
    judge: Judge,
    functions: dict,
    start: str,
) -> tuple[dict[str, float], object]:
    """(metrics, model): the policy, taught on prompts {"prompt": messages, "columns": {...}}, `start` being the folder
    or name it comes from. `functions` are further rewards for RL."""
    folder, said, metrics = Path(config.output_dir), {}, {}
    asked = (
        [row["prompt"] for row in eval_rows[: config.num_eval_prompts]] if is_main_process() else []
    )
    answer = lambda policy: [
        text for text, _ in generate(policy, tokenizer, asked, config.sampling["max_new_tokens"])
    ]
    before = answer(model)

    def labels(number: int, source: str) -> None:
        rows_from_main_process(
            folder / f"preferences_{number}.jsonl",
            lambda: label(config, model, tokenizer, source, train_rows, judge, said),
        )

    if config.feedback_mode == "preference":
        source = start
        for number in range(1, config.num_rounds + 1):
            labels(number, source)
            stage = dpo.DPOStage(config.preferring(source, number))
            result = run_part(stage, model, tokenizer, source)
            source, model = result.model_path, result.model
            if model is None:
                model, _ = load_model_and_tokenizer(
                    replace(config, model_name_or_path=source, use_4bit=False, use_8bit=False)
                )
            metrics |= {
                f"dpo_{number}_{name}": value
                for name, value in result.metrics.items()
                if "eval_" in name
            }
    else:
        if config.labelling:
            labels(1, start)
            if judge.client:
                judge.client.local = None
            result = run_part(reward.RewardStage(config.rewarding_by(start)), None, None, start)
            metrics = {
                f"reward_{name}": value for name, value in result.metrics.items() if "eval_" in name
            }
            scores = load_reward_model(replace(config, reward_model_path=str(folder / "reward")))
        else:
            scores = judge.score
        metrics |= RL_TRAIN[config.algorithm](
            config.rl_config(),
            model,
            tokenizer,
            train_rows,
            eval_rows,
            functions | {"feedback": scores},
        )

    if asked:
        both = [*zip(asked, answer(model), before, strict=True)]
        try:
            verdicts, wins = judge.win_rate(both)
        except (LLMClientError, ValueError) as error:  # what was learnt is not lost for it
            logger.error(
                "no win rate: %s. What was learnt is kept; recipes/evaluate.py compares two models too",
                error,
            )
            verdicts, wins = [None] * len(both), {}
        write_jsonl(
            folder / "win_rate.jsonl",
            [
                {"prompt": prompt, "new": new, "old": old, "win": verdict}
                for (prompt, new, old), verdict in zip(both, verdicts)
            ],
        )
        metrics |= wins
    return metrics | said | (judge.client.report() if judge.client else {}), model


class RLAIFStage(BaseStage):
    stage_name, config_class, needs_folder = "rlaif", RLAIFConfig, "rlaif"

    def load_data(self):
        config = self.config
        self.judge = Judge(config, load_model_and_tokenizer)
        self.judge.check()
        self.functions = start_reward_functions(config)
        training, evaluation, self.lineage["data"] = load_rows(config, to_prompt, None)
        self.lineage |= {
            "reference": "the model the stage starts from",
            "judge": {"model": config.feedback_model_path, "type": config.feedback_model_type},
        }
        return training, evaluation

    def sequences(self, row, tokenizer, context):
        return prompt_sequences(self.config, row, tokenizer)

    def work(self, lengths):
        return estimate_work(self.config, lengths)

    def train(self, model, tokenizer):
        config, start = self.config, self.lineage["parent"]["model"]
        limit = (
            min(config.max_seq_length, model.config.max_position_embeddings)
            - config.sampling["max_new_tokens"]
        )
        usable = lambda rows, what: (
            usable_rows(rows, lambda r: encode_prompt(r, tokenizer, limit), what) if rows else []
        )
        self.judge.load()
        rows = (
            usable(rows, what)
            for rows, what in zip(self.data, ("training data", "evaluation data"))
        )
        with stopping_functions(self.functions):
            return train(config, model, tokenizer, *rows, self.judge, self.functions, start)


if __name__ == "__main__":
    main(RLAIFStage, __doc__)
