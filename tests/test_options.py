"""core/options.py, core/other_names.py, core/stage_plan.py: what users write, all at once."""

import subprocess
import sys
from dataclasses import dataclass, field

import dpo
import grpo
import pytest
import sft
from conftest import ROOT

from chain import Pipeline
from common import BaseStage, StageResult, build_stage
from core.config import StageConfig
from core.errors import ConfigError, unknown_name
from core.recipe_files import make_config, resolve_options
from core.yaml_files import dump_yaml

REQUIRED = {"model": "m", "data": "d"}


def resolved(stage_class, **options):
    """(config, notes on names) of options as a user gives them."""
    stage_class, values, notes = resolve_options(stage_class, [REQUIRED | options])
    return make_config(stage_class.config_class, values, notes), notes


# -- names and values of other tools ---------------------------------------------------------------


@pytest.mark.parametrize(
    "given, name, meant",
    [
        ({"bf16": True}, "torch_dtype", "bfloat16"),
        ({"bf16": "false", "fp16": None}, "torch_dtype", "auto"),
        ({"bf16": True, "torch_dtype": "bfloat16"}, "torch_dtype", "bfloat16"),
        ({"max_length": None, "max_seq_length": 9}, "max_seq_length", 9),
        ({"max_seq_length": "none", "max_length": 9}, "max_seq_length", 9),
        ({"load_in_4bit": "true"}, "use_4bit", True),
        ({"load_in_8bit": True}, "use_8bit", True),
        ({"max_length": 99}, "max_seq_length", 99),
        ({"num_epochs": 2}, "num_train_epochs", 2.0),
        ({"warmup_steps": 7}, "warmup_steps", 7),
        ({"batch_size": 3}, "per_device_train_batch_size", 3),
        ({"lr": 1e-3}, "learning_rate", 1e-3),
        ({"save_strategy": "no"}, "save_steps", 0),
        ({"save_steps": 5, "save_strategy": "NO"}, "save_steps", 0),
        ({"neftune_noise_alpha": None}, "neftune_noise_alpha", 0.0),
        ({"neftune_noise_alpha": "false"}, "neftune_noise_alpha", 0.0),
        ({"resume_from_checkpoint": None}, "resume_from_checkpoint", True),
    ],
)
def test_an_option_is_known_by_its_usual_names(given, name, meant):
    config, notes = resolved(sft.SFTStage, **given)
    assert getattr(config, name) == meant and not notes


@pytest.mark.parametrize("alias", ["dataset", "dataset_name", "dataset_name_or_path", "data"])
def test_data_has_the_same_names_in_every_recipe(alias):
    for stage, name in (
        (sft.SFTStage, "dataset_name_or_path"),
        (dpo.DPOStage, "preference_dataset_path"),
        (grpo.GRPOStage, "prompt_dataset_path"),
    ):
        _, values, _ = resolve_options(stage, [{alias: "rows.jsonl"}])
        assert values == {name: "rows.jsonl"}


@pytest.mark.parametrize(
    "given, note",
    [
        (
            {"completion_only_loss": None},
            "completion_only_loss has no effect: only the answers are",
        ),
        ({"assistant_only_loss": False}, "assistant_only_loss has no effect"),
        ({"use_liger_kernel": True}, "use_liger_kernel has no effect"),
        ({"packing_strategy": "bfd"}, "packing_strategy has no effect"),
        ({"push_to_hub": False}, "push_to_hub has no effect: run, after the training: hf upload"),
        ({"convert_to_gguf": False}, "convert_to_gguf has no effect"),
        ({"save_strategy": "steps"}, "save_strategy has no effect: intervals are numbers"),
        ({"hub_private": True}, "hub_private has no effect"),
    ],
)
def test_an_option_of_another_tool_that_asks_for_nothing_is_noted(given, note):
    config, _ = resolved(sft.SFTStage, **given)
    config.validate()
    assert [found for found in config.notes if found.startswith(note)]


@pytest.mark.parametrize(
    "given, words",
    [
        (
            {"packing_strategy": "wrapped"},
            "packing_strategy='wrapped' is not supported: packing is",
        ),
        ({"push_to_hub": True}, "push_to_hub=True is not supported: run, after the training"),
        ({"save_strategy": "epoch"}, "save_strategy='epoch' is not supported: intervals are"),
        ({"bf16": True, "torch_dtype": "float32"}, "torch_dtype is given twice"),
        ({"bf16": "perhaps"}, "torch_dtype='bf16=perhaps'"),
    ],
)
def test_an_option_of_another_tool_that_asks_for_something_else_is_refused(given, words):
    with pytest.raises(ConfigError) as error:
        resolved(sft.SFTStage, **given)
    assert words in str(error.value)


# -- mistakes --------------------------------------------------------------------------------------


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        resolved(sft.SFTStage, learnig_rate=1, lora_r=-3, use_4bit="maybe", save_strategy="epoch")
    assert len(error.value.problems) == 4
    assert str(error.value).startswith("4 mistakes\n  ")
    assert "did you mean 'learning_rate'" in str(error.value)


def test_mistakes_of_all_stages_and_of_the_top_level_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        Pipeline.from_dict(
            {
                "model": "m",
                "stages": ["sft", "dpo"],
                "learning_rate": 1e-4,
                "force_restrat": True,
                "stage_configs": {"sft": {"lora_r": -1}, "dpo": {"bta": 1, "beta": 0}},
            }
        )
    problems = error.value.problems
    assert len(problems) == 5
    assert problems[0] == (
        "learning_rate belongs to the stages that have it (sft, dpo): "
        "stage_configs: sft, or --sft.learning_rate"
    )
    assert "did you mean 'force_restart'" in problems[1]
    assert problems[2].startswith("stage 01_sft: lora_r=-1")
    assert {problem[:13] for problem in problems[3:]} == {"stage 02_dpo:"}


@pytest.mark.parametrize(
    "name, nearest",
    [("sfd", "sft"), ("stf", "sft"), ("trainer", None), ("learnig_rate", "learning_rate")],
)
def test_only_a_name_that_is_really_near_is_proposed(name, nearest):
    sentence = unknown_name("option", name, ["sft", "learning_rate", "training_log"])
    assert ("did you mean" in sentence) == (nearest is not None)
    assert nearest is None or f"did you mean {nearest!r}" in sentence


def test_a_typo_is_refused_before_anything_is_loaded():
    command = [sys.executable, "-X", "importtime", "recipes/sft.py", "--learnig_rate=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean 'learning_rate'" in done.stderr
    assert "transformers.models" not in done.stderr


# -- values without effect -------------------------------------------------------------------------


def test_a_rate_that_cannot_move_an_adapter_is_noted():
    config, _ = resolved(dpo.DPOStage, learning_rate=5e-7)
    config.validate()
    assert config.notes == ["learning_rate=5e-07 hardly moves an adapter; try 5e-05"]
    config, _ = resolved(dpo.DPOStage, learning_rate=5e-7, lora_r=0)
    config.validate()
    assert config.notes == []


def test_notes_of_all_stages_are_one_warning(tmp_path, caplog):
    one = Pipeline.from_dict(
        {
            "model": "m",
            "stages": ["sft", "dpo"],
            "torch_dtype": "float16",
            "wandb_project": "left-over",
            "push_to_hub": True,
            "output_dir": str(tmp_path / "out"),
            "stage_configs": {
                "sft": {"data": "d", "use_liger_kernel": False},
                "dpo": {"data": "d"},
            },
        }
    )
    one.warn_of_options()
    (record,) = caplog.records
    lines = [line.strip() for line in record.getMessage().splitlines()]
    assert lines[0] == "options:"
    assert lines[1].startswith("for another program, after the chain: hf upload")
    assert lines[2:] == [
        "01_sft: use_liger_kernel has no effect: the recipes save that memory themselves",
        "01_sft, 02_dpo: wandb_project has no effect without use_wandb=true",
        "01_sft, 02_dpo: torch_dtype=float16 cannot train on a CPU; float32 is used",
    ]


# -- files -----------------------------------------------------------------------------------------


def test_a_recipe_takes_its_options_from_a_file_and_the_command_line_wins(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(dump_yaml(REQUIRED | {"lora_r": 4, "max_steps": 3, "dry_run": True}))
    stage, dry_run = build_stage(sft.SFTStage, [f"--config={path}", "--max_steps=5"])
    assert (stage.config.lora_r, stage.config.max_steps, dry_run) == (4, 5, True)
    path.write_text(dump_yaml({"stages": ["sft"]}))
    with pytest.raises(ConfigError, match="is the file of a chain; run: python chain.py"):
        build_stage(sft.SFTStage, [f"--config={path}"])


def test_a_file_without_stages_trains_sft():
    flat = {"model_name_or_path": "m", "output_dir": "o", "lora_r": 4, "dataset_name_or_path": "d"}
    one = Pipeline.from_dict(flat, **{"max_steps": "3", "seed": 7})
    (stage,) = one.stages
    assert isinstance(stage, BaseStage) and stage.stage_name == "sft"
    config = stage.config
    assert (config.lora_r, config.max_steps, config.seed) == (4, 3, 7)
    assert config.output_dir == "o/01_sft"
    with pytest.raises(ConfigError, match="stage 01_sft: unknown option 'learnig_rate'"):
        Pipeline.from_dict(flat | {"learnig_rate": 1})


def test_an_option_of_sampling_is_told_its_place():
    """A config with an option of that name, such as the temperature of distillation, takes it."""
    with pytest.raises(ConfigError) as caught:
        resolved(grpo.GRPOStage, temperature=0.7, max_completion_length=64)
    assert list(caught.value.problems) == [
        "unknown option 'temperature'; it belongs to generation_kwargs='{temperature: 0.7}'",
        "unknown option 'max_completion_length'; it belongs to "
        "generation_kwargs='{max_new_tokens: 64}'",
    ]
    with pytest.raises(ConfigError, match="unknown option 'top_p'; --help lists"):
        resolved(sft.SFTStage, top_p=0.7)


@pytest.mark.parametrize(
    "stage, given, said",
    [
        (grpo.GRPOStage, {"beta": 0.04}, "unknown option 'beta'; see init_kl_coef"),
        (grpo.GRPOStage, {"num_iterations": 2}, "unknown option 'num_iterations'; see ppo_epochs"),
        (dpo.DPOStage, {"ref_model": "m"}, "unknown option 'ref_model'; see reference_model_path"),
        (sft.SFTStage, {"use_peft": "true"}, "unknown option 'use_peft'; see lora_r"),
        (sft.SFTStage, {"lr": 1, "learning_rate": 2}, "learning_rate is given twice, as lr and as"),
        (grpo.GRPOStage, {"use_vllm": True}, "use_vllm=True is not supported: the recipe samples"),
    ],
)
def test_a_name_of_other_tools_is_told_the_option_here(stage, given, said):
    with pytest.raises(ConfigError, match=said):
        resolved(stage, **given)


def test_steps_of_reinforcement_learning_have_their_usual_names():
    given = {"max_steps": 3, "eval_steps": 2, "save_steps": 1, "reward_funcs": "exact"}
    config, notes = resolved(grpo.GRPOStage, **given, use_vllm=False)
    assert (config.num_training_steps, config.eval_freq, config.save_freq) == (3, 2, 1)
    assert config.reward == ["exact"] and ["use_vllm" in note for note in notes] == [True]


def test_the_stage_trl_sft_is_sft():
    options = {"data": "d", "packing_strategy": "bfd", "neftune_noise_alpha": 5}
    one = Pipeline.from_dict(
        {"model": "m", "stages": ["trl_sft"], "stage_configs": {"trl_sft": options}}
    )
    assert type(one.stages[0]).__name__ == "SFTStage"
    assert one.stages[0].config.neftune_noise_alpha == 5


def test_what_the_top_level_shares_reaches_every_stage_and_the_stage_wins():
    one = Pipeline.from_dict(
        {
            "model": "m",
            "seed": 7,
            "log_level": "DEBUG",
            "stages": ["sft", "reward"],
            "stage_configs": {"sft": {"data": "d"}, "reward": {"data": "d", "seed": 8}},
        }
    )
    first, second = (stage.config for stage in one.stages)
    assert (first.seed, second.seed) == (7, 8)
    assert first.log_level == second.log_level == "debug"


# -- stages with an execute of their own -----------------------------------------------------------


@dataclass
class GreetingConfig(StageConfig):
    greeting: str = field(default="hello", metadata={"help": "what is logged"})
    rate: float = field(default=1e-4)


class Greeting(BaseStage):
    """The shape of a stage as older guides write it: a property, a plain config, own execute."""

    def __init__(self, config: GreetingConfig):
        super().__init__(config)
        self.config: GreetingConfig = config

    @property
    def stage_name(self) -> str:  # type: ignore[override]
        return "greeting"

    def validate_config(self) -> None:
        if self.config.rate <= 0:
            raise ValueError("the rate must be positive")

    def execute(self, model, tokenizer, previous_result=None) -> StageResult:  # type: ignore[override]
        try:
            self.setup_logging()
            self.logger.info(self.config.greeting)
            model, tokenizer = self.prepare_model_and_tokenizer(model, tokenizer, previous_result)
            if self.config.greeting == "fail":
                raise RuntimeError("as it was told")
            model_path, tokenizer_path = self.save_model_and_tokenizer(model, tokenizer)
            return StageResult(
                stage_name=self.stage_name,
                success=True,
                model_path=model_path,
                tokenizer_path=tokenizer_path,
                metrics={"kind": self.stage_name, "rate": self.config.rate},  # type: ignore[dict-item]
            )
        except Exception as error:
            return StageResult(
                stage_name=self.stage_name,
                success=False,
                model_path="",
                tokenizer_path="",
                error_message=str(error),
            )
        finally:
            self.cleanup_logging()


class Special(Greeting):
    """Adds a token and freezes the layers."""

    def prepare_model_and_tokenizer(self, model, tokenizer, previous_result=None):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<greeting>"]})
        model.resize_token_embeddings(len(tokenizer))
        for parameter in model.base_model.parameters():
            parameter.requires_grad = False
        return model, tokenizer


@pytest.fixture
def greeting():
    Pipeline.register_stage("greeting", Greeting)
    Pipeline.register_stage("special", Special)
    yield
    Pipeline.registry.clear()


def greeting_chain(model_dir, data, tmp_path, **options):
    preferences = tmp_path / "preferences.jsonl"
    row = '{"prompt": "a %d", "chosen": "b", "rejected": "c"}\n'
    preferences.write_text("".join(row % number for number in range(12)))
    small = {"max_steps": 1, "validation_split": 0.2, "per_device_train_batch_size": 2}
    return {
        "model": model_dir,
        "output_dir": str(tmp_path / "out"),
        "stages": ["greeting", "sft", "special", "dpo"],
        "stage_configs": {
            "sft": small | {"data": data},
            "dpo": small | {"data": str(preferences)},
            "greeting": options,
        },
    }


def test_stages_with_an_execute_of_their_own_stand_in_a_chain(greeting, model_dir, data, tmp_path):
    values = greeting_chain(model_dir, data, tmp_path, rate="2e-4")
    results = Pipeline.from_dict(values).run()
    assert [result.success for result in results] == [True] * 4, results[-1].error_message
    assert [result.stage_name for result in results] == ["greeting", "sft", "greeting", "dpo"]
    assert results[0].metrics["rate"] == 2e-4
    assert results[2].model_path == str(tmp_path / "out/03_special")
    from transformers import AutoTokenizer

    final = AutoTokenizer.from_pretrained(tmp_path / "out/final")
    assert "<greeting>" in final.get_vocab()
    again = Pipeline.from_dict(values)
    again.check()
    assert len(again.finished()) == 4


def test_a_failed_result_with_empty_paths_stops_the_chain(greeting, model_dir, data, tmp_path):
    values = greeting_chain(model_dir, data, tmp_path, greeting="fail")
    (result,) = Pipeline.from_dict(values).run()
    assert not result.success and result.error_message == "as it was told"


def test_a_value_error_of_validate_config_is_a_mistake_of_the_user(greeting, model_dir):
    with pytest.raises(ConfigError, match="stage 01_greeting: .*the rate must be positive"):
        Pipeline.from_dict(
            {"model": model_dir, "stages": ["greeting"], "stage_configs": {"greeting": {"rate": 0}}}
        )
    with pytest.raises(ValueError, match="the rate must be positive"):
        Greeting(GreetingConfig(rate=-1)).validate_config()


def test_a_property_is_the_name_of_a_stage_whatever_the_config_says():
    assert Greeting(GreetingConfig(stage_name="other")).stage_name == "greeting"
