"""Reinforcement learning from AI feedback: another model judges answers, and the policy learns
from its verdicts.

    P(y_1 > y_2 | x) from a judge, asked in both orders (Lee et al. 2024, "RLAIF vs. RLHF",
    section 3.1), guided by written principles (Bai et al. 2022, "Constitutional AI", section 4),
    then one of three --feedback_mode:

    reward_model   train a reward model on the preferences (recipes/reward.py), then RL with it
    direct         RL with the judge's score of an answer as the reward
                   (Lee et al. 2024, section 3.3, "d-RLAIF")
    preference     DPO on the preferences (recipes/dpo.py), in one or several rounds
                   (Guo et al. 2024, "OAIF")

--algorithm names the RL recipe: recipes/ppo.py, a2c.py, trpo.py, or grpo.py (grpo, rloo). The
final metric is the win rate of the new policy over the old one on held-out prompts, by the same
judge. One row of data (other formats: those of the RL recipes):

    {"prompt": "Write a two-line poem about rain."}

Run it on a laptop with a reward model as judge, and with a judge behind a server:

    python recipes/rlaif.py --model=outputs/sft --data=prompts.jsonl --num_training_steps=20 \\
        --feedback_model_type=reward_model --feedback_model_path=outputs/reward
    python recipes/rlaif.py --model=outputs/sft --data=prompts.jsonl --feedback_mode=preference \\
        --feedback_model_type=openai --feedback_model_path=gpt-4.1-mini --max_calls=4000
"""

import sys
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter

# A recipe runs from any directory, and as a copy in another folder of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, StageResult, load_model_and_tokenizer, main
from core.config import Count, FitConfig, Options, TrainingConfig
from core.errors import ConfigError, as_config_error
from core.files import rows_from_main_process, write_jsonl
from core.judge import PROMPT_VERSION, Judge, JudgingConfig
from core.llm_client import LLMClient, LLMClientError
from core.model_config import context_length
from core.options import resolve_names
from core.recipe_files import option_names, select_options
from core.rewards import load_reward_model, start_reward_functions, stopping_functions
from core.rollout import RLConfig, encode_prompts, load_prompts, prompt_sequences
from core.runtime import is_main_process, logger
from core.sampling import generate
from core.work import Answers, estimate_rl
from recipes import a2c, dpo, grpo, ppo, reward, trpo

# -- configuration ---------------------------------------------------------------------------------

# algorithm -> config and module of the RL recipe that implements it.
RL_CONFIGS: dict[str, type[RLConfig]] = {
    "ppo": ppo.PPOConfig,
    "a2c": a2c.A2CConfig,
    "trpo": trpo.TRPOConfig,
    "grpo": grpo.GRPOConfig,
    "rloo": grpo.GRPOConfig,
}
RL_PAGES: dict[str, Any] = {"ppo": ppo, "a2c": a2c, "trpo": trpo, "grpo": grpo, "rloo": grpo}


# The options of the RL recipes that feedback_mode=preference reads. Three of the training options
# are left out below: DPO takes its own in preference_kwargs.
READ_WITHOUT_RL = option_names(FitConfig) | {
    "prompt_dataset_path",
    "max_seq_length",
    "generation_kwargs",
    "num_eval_prompts",
}
READ_WITHOUT_RL -= {"learning_rate", "warmup_ratio", "lr_scheduler_type"}


@dataclass
class RLAIFConfig(RLConfig, JudgingConfig):
    """Options of reinforcement learning from AI feedback. Those shared with the RL recipes apply to
    the modes reward_model and direct."""

    everyday: ClassVar[tuple[str, ...]] = (
        "model_name_or_path",
        "prompt_dataset_path",
        "output_dir",
        "feedback_mode",
        "feedback_model_type",
        "feedback_model_path",
        "algorithm",
        "num_training_steps",
        "batch_size",
        "learning_rate",
        "lora_r",
        "generation_kwargs",
    )

    # learning from feedback
    algorithm: Literal["ppo", "a2c", "trpo", "grpo", "rloo"] = "ppo"  # RL algorithm
    # RL with a reward model of the feedback, RL with the judge's scores, or DPO on its preferences
    feedback_mode: Literal["reward_model", "direct", "preference"] = "reward_model"
    num_generations: Count | None = None  # completions per prompt; none: the RL recipe's default
    num_candidates: Count = 2  # answers sampled for each prompt, to be compared in pairs
    num_rounds: Count = 1  # rounds of sampling, judging and DPO in mode preference
    # options that only the RL recipe of the algorithm has, e.g. {clip_range: 0.1}
    rl_kwargs: Options = field(default_factory=dict)
    # options of recipes/reward.py for mode reward_model, e.g. {num_train_epochs: 2}
    reward_kwargs: Options = field(default_factory=dict)
    # options of recipes/dpo.py for mode preference, e.g. {beta: 0.5}
    preference_kwargs: Options = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        # GRPO and RLOO need several completions per prompt, the other algorithms only one.
        if self.num_generations is None:
            self.num_generations = RL_CONFIGS[self.algorithm].num_generations

    @property
    def trains_with_rl(self) -> bool:
        return self.feedback_mode != "preference"

    @property
    def trains_reward_model(self) -> bool:
        """False if the judge is a reward model already: then it is used directly."""
        return self.feedback_mode == "reward_model" and self.feedback_model_type != "reward_model"

    @property
    def needs_preferences(self) -> bool:
        return self.trains_reward_model or self.feedback_mode == "preference"

    @property
    def rewarding(self) -> list[str]:
        """The rewards, in the order of `reward_weights`."""
        return [*self.reward, "feedback"]

    def validate(self) -> None:
        super().validate()
        mode = f"feedback_mode={self.feedback_mode}"
        kind = f"feedback_model_type={self.feedback_model_type}"
        if self.reward_model_path:
            raise ConfigError(
                "instead of reward_model_path, set feedback_model_type=reward_model and "
                "feedback_model_path"
            )
        unread = " ".join(self.unread_options())
        like = {"algorithm": self.algorithm, "lora_r": self.lora_r}
        self.note_unread(True, unread, f"with {mode} and {kind}", **like)
        if self.feedback_mode == "direct" and self.feedback_model_type == "preference_model":
            raise ConfigError(
                f"{mode} needs scores, but a preference_model only compares; set "
                "feedback_model_type=local or feedback_mode=preference"
            )
        if self.num_candidates % 2:
            raise ConfigError(
                f"num_candidates={self.num_candidates}: answers are compared in pairs; "
                "set an even number"
            )
        if not self.constitution:
            raise ConfigError("constitution is empty: describe what makes an answer better")
        if not self.save_intermediate:
            raise ConfigError(
                "save_intermediate=false would lose what is learned between the parts; remove it"
            )
        self.validate_parts()

    def unread_options(self) -> list[str]:
        """Names of the options that are unused in this mode and with this kind of judge."""
        is_preference = self.feedback_mode == "preference"
        judge_writes = self.feedback_model_type not in ("reward_model", "preference_model")
        is_read = {
            "num_rounds": is_preference,
            "num_candidates": self.needs_preferences,
            "preference_kwargs": is_preference,
            "reward_kwargs": self.trains_reward_model,
            "rl_kwargs": self.trains_with_rl,
            "constitution": self.feedback_model_type != "reward_model",
            "max_verdict_tokens": judge_writes,
        }
        unread = [name for name, read in is_read.items() if not read]
        if not self.trains_with_rl:
            rl_names = {option.name for option in fields(RLConfig)}
            unread += sorted(rl_names - READ_WITHOUT_RL)
        return unread

    def validate_parts(self) -> None:
        """Check the configs of the contained recipes now rather than after hours of sampling."""
        parts: list[tuple[str, TrainingConfig]] = []
        if self.feedback_mode == "preference":
            parts.append(("preference_kwargs", self.dpo_config("parent", 1)))
        if self.trains_reward_model:
            parts.append(("reward_kwargs", self.reward_config("parent")))
        if self.trains_with_rl:
            # The RL recipe does not know the reward "feedback": check it with another one instead.
            rewarded = replace(
                self.rl_config(),
                reward=["length"],
                reward_length=1,
                reward_pattern="",
                reward_weights=[],
            )
            parts.append(("rl_kwargs", rewarded))
        for options, config in parts:
            config.validate()
            # Notes on options shared with the part are among those of this stage already.
            self.notes += [f"{options}: {note}" for note in config.notes if note not in self.notes]

    # Configs of the contained recipes.

    def rl_config(self) -> RLConfig:
        """The RL options of this config, and `rl_kwargs`."""
        config_class = RL_CONFIGS[self.algorithm]
        options = {option.name: getattr(self, option.name) for option in fields(RLConfig)}
        own_options = resolve_names(config_class, self.rl_kwargs)
        for name in own_options:
            if name in options:
                raise ConfigError(f"rl_kwargs: {name} is shared by all RL recipes; give it alone")
        if self.algorithm == "rloo" and own_options.setdefault("advantage", "rloo") != "rloo":
            raise ConfigError("rl_kwargs: algorithm=rloo means advantage=rloo; remove one of them")
        return config_class(**options | own_options)

    def dpo_config(self, start: str, number: int) -> dpo.DPOConfig:
        """The config of DPO in round `number`, which starts from the model at `start`."""
        name = f"dpo_{number}"
        preferences = f"preferences_{number}.jsonl"
        return self.part_config(dpo.DPOConfig, start, name, preferences, self.preference_kwargs)

    def reward_config(self, start: str) -> reward.RewardConfig:
        """The config of the reward model, which starts from the model at `start`."""
        preferences = "preferences_1.jsonl"
        return self.part_config(
            reward.RewardConfig, start, "reward", preferences, self.reward_kwargs
        )

    def part_config(
        self,
        config_class: type[TrainingConfig],
        start: str,
        name: str,
        preferences: str,
        options: dict,
    ) -> Any:
        """A config for training on a file of preferences: the training options of this config,
        overridden by `options`."""
        # Each recipe has its own defaults for these.
        not_shared = {"warmup_ratio", "lr_scheduler_type"}
        default_rate = self.default_rates[not self.lora_r]
        if self.learning_rate == default_rate:
            not_shared.add("learning_rate")
        values = {}
        for shared in fields(TrainingConfig):
            if shared.name not in not_shared:
                values[shared.name] = getattr(self, shared.name)
        values |= {
            "model_name_or_path": start,
            "stage_name": name,
            "output_dir": str(Path(self.output_dir, name)),
            "preference_dataset_path": str(Path(self.output_dir, preferences)),
            "validation_split": 0.1,
        }
        values |= resolve_names(config_class, options)
        return config_class(**values)


# -- feedback --------------------------------------------------------------------------------------


def sample_candidates(
    config: RLAIFConfig, model, tokenizer, name: str, rows: list[dict]
) -> list[list[str]]:
    """Sample `num_candidates` answers of the policy to each prompt. Like a judge's answers they are
    recorded in calls.jsonl, under the model's `name`, so that a resumed run reuses them."""
    policy = LLMClient(config, "policy", name, "local", verbatim=True)
    policy.local = (model.eval(), tokenizer)
    requests = []
    for row in rows:
        requests += [(row["prompt"], number) for number in range(config.num_candidates)]
    # Every text is a valid answer, so nothing is parsed.
    texts = policy.ask(f"answers of {name}", requests, config.sampling, PROMPT_VERSION, str)
    candidates = []
    for start in range(0, len(texts), config.num_candidates):
        group = texts[start : start + config.num_candidates]
        candidates.append([text for text in group if text is not None])
    return candidates


def pair_candidates(
    rows: list[dict], candidates: list[list[str]]
) -> tuple[list[tuple[list[dict], str, str]], Counter]:
    """([(prompt, first answer, second answer)], counts of dropped pairs). Adjacent candidates form
    a pair, unless they are equal or one of them is empty."""
    pairs = []
    left_out: Counter[str] = Counter(equal=0, empty=0)
    for row, texts in zip(rows, candidates, strict=True):
        # A missing answer can leave an odd number of texts: the last one has no partner.
        for first, second in zip(texts[::2], texts[1::2], strict=False):
            is_equal = first == second
            is_empty = not first.strip() or not second.strip()
            left_out["equal"] += is_equal
            left_out["empty"] += is_empty
            if not is_equal and not is_empty:
                pairs.append((row["prompt"], first, second))
    return pairs, left_out


def label_preferences(
    config: RLAIFConfig, model, tokenizer, name: str, rows: list[dict], judge: Judge
) -> tuple[list[dict], dict[str, float]]:
    """(preferences {"prompt", "chosen", "rejected"} between the policy's own answers, metrics).
    Raises RuntimeError if no pair has a winner."""
    candidates = sample_candidates(config, model, tokenizer, name, rows)
    pairs, left_out = pair_candidates(rows, candidates)
    if not pairs:
        raise RuntimeError(
            f"no two answers differ ({left_out['equal']} pairs are equal); "
            "raise the temperature in generation_kwargs"
        )
    # The judge sees each pair in both orders, so that the position does not decide.
    verdicts, figures = judge.compare(pairs, "comparisons")
    preferences = []
    for (prompt, first, second), verdict in zip(pairs, verdicts, strict=True):
        # A tie (0.5) or a missing verdict (None) teaches nothing.
        if verdict == 1.0:
            preferences.append({"prompt": prompt, "chosen": first, "rejected": second})
        elif verdict == 0.0:
            preferences.append({"prompt": prompt, "chosen": second, "rejected": first})
    logger.info(
        "feedback: %d preferences of %d pairs; %d ties, %d without a verdict; "
        "left out before that: %d equal and %d empty pairs",
        len(preferences),
        len(pairs),
        verdicts.count(0.5),
        verdicts.count(None),
        left_out["equal"],
        left_out["empty"],
    )
    if not preferences and not figures:
        raise RuntimeError(
            "nothing to learn from: no pair has a verdict in both orders; use a stronger judge, "
            "or raise max_verdict_tokens"
        )
    if not preferences:
        first_shown = 100 * (figures.get("position_bias", 0.0) + 0.5)
        raise RuntimeError(
            f"nothing to learn from: the judge's verdicts are {100 * figures['ties']:.0f}% ties, "
            f"and it chooses the answer shown first in {first_shown:.0f}% of the cases; use a "
            "stronger judge, or answers that differ more"
        )
    metrics = {f"feedback_{name}": value for name, value in figures.items()}
    metrics["preferences"] = float(len(preferences))
    return preferences, metrics


def write_preferences(
    config: RLAIFConfig, model, tokenizer, source: str, rows: list[dict], judge: Judge, number: int
) -> dict[str, float]:
    """Write preferences_NUMBER.jsonl, preferences between answers of the model, which was loaded
    from `source`. Returns the metrics; they are empty outside the main process."""
    metrics: dict[str, float] = {}

    def make_rows() -> list[dict]:
        preferences, figures = label_preferences(config, model, tokenizer, source, rows, judge)
        metrics.update(figures)
        return preferences

    path = Path(config.output_dir, f"preferences_{number}.jsonl")
    rows_from_main_process(path, make_rows)
    return metrics


def figures_of_round(
    config: RLAIFConfig, figures: dict[str, float], number: int
) -> dict[str, float]:
    """The figures, prefixed with the round if there are several rounds."""
    if config.num_rounds == 1:
        return figures
    return {f"round_{number}_{name}": value for name, value in figures.items()}


# -- training --------------------------------------------------------------------------------------


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
    """Train the policy on prompts {"prompt": messages, "columns": {...}}; returns (metrics, model).
    `start` is the folder or name of the initial policy, `functions` are further rewards for RL."""
    metrics: dict[str, float] = {}
    feedback: dict[str, float] = {}
    eval_prompts = []
    if is_main_process():
        eval_prompts = [row["prompt"] for row in eval_rows[: config.num_eval_prompts]]
    # Now, because the policy is trained in place.
    old_answers = answer_prompts(config, model, tokenizer, eval_prompts)

    if config.feedback_mode == "preference":
        source = start
        for number in range(1, config.num_rounds + 1):
            # 1. Sample answers of the current policy and let the judge compare them.
            figures = write_preferences(config, model, tokenizer, source, train_rows, judge, number)
            feedback |= figures_of_round(config, figures, number)
            # 2. Train on the preferences; the result is the policy of the next round.
            stage = dpo.DPOStage(config.dpo_config(source, number))
            result = run_part(stage, model, tokenizer, source)
            source = result.model_path
            model = load_if_missing(config, result)
            metrics |= evaluation_metrics(result, f"dpo_{number}")
    else:
        # 1. The reward: a reward model trained on the judge's preferences, or the judge itself.
        score = judge.score
        if config.trains_reward_model:
            feedback |= write_preferences(config, model, tokenizer, start, train_rows, judge, 1)
            score = train_reward_model(config, judge, start, metrics)
        # 2. RL with it.
        page = RL_PAGES[config.algorithm]
        rewards = functions | {"feedback": score}
        metrics |= page.train(config.rl_config(), model, tokenizer, train_rows, eval_rows, rewards)

    # Finally: do the new answers beat the old ones?
    if eval_prompts:
        new_answers = answer_prompts(config, model, tokenizer, eval_prompts)
        metrics |= measure_win_rate(config, judge, eval_prompts, new_answers, old_answers)
    metrics |= feedback
    if judge.client:
        metrics |= judge.client.report()
    return metrics, model


def answer_prompts(config: RLAIFConfig, model, tokenizer, prompts: list) -> list[str]:
    """The policy's greedy answers."""
    max_new_tokens = config.sampling["max_new_tokens"]
    return [text for text, _ in generate(model, tokenizer, prompts, max_new_tokens)]


def run_part(stage: BaseStage, model, tokenizer, start: str) -> StageResult:
    """Run a contained recipe and return its result, or its recorded result if it has already
    finished with the same fingerprint. Raises RuntimeError if it fails."""
    stage.reuse_finished = True
    result = stage.execute(model, tokenizer, StageResult("start", True, start, start))
    if not result.success:
        raise RuntimeError(f"{stage.stage_name}: {result.error_message}")
    return result


def load_if_missing(config: RLAIFConfig, result: StageResult):
    """The model of a result, loaded from disk if the result was reused."""
    if result.model is not None:
        return result.model
    # Each round saves a merged model in full precision.
    saved = replace(config, model_name_or_path=result.model_path, use_4bit=False, use_8bit=False)
    model, _ = load_model_and_tokenizer(saved)
    return model


def train_reward_model(config: RLAIFConfig, judge: Judge, start: str, metrics: dict):
    """Train a reward model on preferences_1.jsonl; returns the function that scores completions
    with it, and adds its evaluation to `metrics`."""
    if judge.client:
        judge.client.local = None  # frees the memory of a local judge
    stage = reward.RewardStage(config.reward_config(start))
    result = run_part(stage, None, None, start)
    metrics |= evaluation_metrics(result, "reward")
    folder = str(Path(config.output_dir, "reward"))
    return load_reward_model(replace(config, reward_model_path=folder))


def evaluation_metrics(result: StageResult, prefix: str) -> dict[str, float]:
    """The evaluation metrics of a contained recipe, with its name as prefix."""
    return {f"{prefix}_{name}": value for name, value in result.metrics.items() if "eval_" in name}


def measure_win_rate(
    config: RLAIFConfig, judge: Judge, prompts: list, new_answers: list, old_answers: list
) -> dict[str, float]:
    """{"win_rate", its interval, ...} of the new answers; writes the verdicts to win_rate.jsonl.
    Empty if the judge fails: that must not lose the trained model."""
    pairs = list(zip(prompts, new_answers, old_answers, strict=True))
    metrics: dict[str, float] = {}
    verdicts: list[float | None] = [None] * len(pairs)
    try:
        verdicts, metrics = judge.win_rate(pairs)
    except (LLMClientError, ValueError) as error:
        logger.error(
            "no win rate: %s. The trained model is kept; recipes/evaluate.py can compare the two",
            error,
        )
    rows = []
    for (prompt, new, old), verdict in zip(pairs, verdicts, strict=True):
        rows.append({"prompt": prompt, "new": new, "old": old, "win": verdict})
    write_jsonl(Path(config.output_dir, "win_rate.jsonl"), rows)
    return metrics


class RLAIFStage(BaseStage):
    stage_name = "rlaif"
    config_class = RLAIFConfig
    needs_folder = "rlaif"

    @classmethod
    def resolve(cls, options: dict[str, Any]) -> tuple[type[BaseStage], dict[str, Any], list[str]]:
        """Move options that only the RL recipe has, such as clip_range, into rl_kwargs; options of
        other RL recipes give a note."""
        algorithm = options.get("algorithm") or RLAIFConfig.algorithm
        algorithm = str(algorithm).lower()
        if algorithm not in RL_CONFIGS:
            return cls, options, []  # the config refuses it
        # The command line and YAML accept options of the RL recipe at top level: --clip_range=0.1.
        own_names = option_names(RLAIFConfig)
        kept = {name: value for name, value in options.items() if name in own_names}
        others = {name: value for name, value in options.items() if name not in own_names}
        if options.get("feedback_mode") == "preference":
            chosen, why = None, "with feedback_mode=preference"
        else:
            chosen, why = algorithm, f"with algorithm={algorithm}"
        others, notes = select_options(others, RL_CONFIGS, chosen, why)
        # On the command line rl_kwargs is YAML text.
        with as_config_error("rl_kwargs"):
            rl_kwargs = TypeAdapter(Options).validate_python(options.get("rl_kwargs", {}))
        moved = {}
        for name, value in others.items():
            if name not in option_names(RL_CONFIGS[algorithm]):
                kept[name] = value  # a typo, which the config refuses
            elif name in rl_kwargs:
                raise ConfigError(f"{name} is given twice, once in rl_kwargs; keep one")
            else:
                moved[name] = value
        if moved:
            kept["rl_kwargs"] = rl_kwargs | moved
        return cls, kept, notes

    def load_data(self):
        config = self.config
        self.judge = Judge(config, load_model_and_tokenizer)
        self.judge.check()
        self.functions = start_reward_functions(config)
        training, evaluation, self.lineage["data"] = load_prompts(config, self.functions)
        self.judge.check_prompts([row["prompt"] for row in (*training, *evaluation)])
        self.lineage["reference"] = "the stage's input model"
        self.lineage["judge"] = {
            "model": config.feedback_model_path,
            "type": config.feedback_model_type,
        }
        return training, evaluation

    def sequences(self, row, tokenizer, context):
        return prompt_sequences(self.config, row, tokenizer, context)

    def work(self, lengths, target_share):
        config = self.config
        if config.trains_with_rl:
            return estimate_rl(config.rl_config(), len(self.data[1]), lengths)
        # DPO on pairs of answers to each prompt, once per round.
        stage = dpo.DPOStage(config.dpo_config("parent", 1))
        pairs_per_prompt = config.num_candidates // 2
        stage.data = self.data[0] * pairs_per_prompt, []
        new_tokens = config.sampling["max_new_tokens"]
        pair_lengths = [length + new_tokens for length in lengths]
        share_fixed = sum(lengths) / sum(pair_lengths)
        work = stage.work(pair_lengths, 1 - share_fixed)
        work.share_fixed = share_fixed
        work.steps, work.passes = config.num_rounds * work.steps, config.num_rounds * work.passes
        work.tokens = config.num_rounds * work.tokens
        work.forward_tokens = config.num_rounds * work.forward_tokens
        prompts = min(config.batch_size, len(self.data[0]))
        times = config.num_rounds * len(self.data[0]) / prompts
        mean = sum(lengths) / len(lengths)
        work.answers = [Answers(times, prompts, config.num_candidates, mean, new_tokens)]
        return work

    def train(self, model, tokenizer):
        config = self.config
        self.judge.load()
        limit = min(config.max_seq_length, context_length(model.config))
        training, evaluation = self.data
        training = encode_prompts(config, training, tokenizer, limit, "training data")
        evaluation = encode_prompts(config, evaluation, tokenizer, limit, "evaluation data")
        start = self.lineage["parent"]["model"]
        with stopping_functions(self.functions):
            return train(
                config,
                model,
                tokenizer,
                training,
                evaluation,
                self.judge,
                self.functions,
                start,
            )


if __name__ == "__main__":
    main(RLAIFStage, __doc__)
