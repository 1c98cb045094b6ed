"""a2c, ppo, trpo, grpo, rloo: the mathematics against enumeration and TRL, rollouts, rewards that
may fail."""

import copy
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, make_model
from families import make_family

import common
import core.chat
import core.config
import core.data
import core.function_process
import core.rewards
import core.sampling
from core import rl_run
from core.errors import ConfigError
from core.kl import ESTIMATORS, exact_kl, k1, k2, k3, kl_in_loss, kl_loss, next_kl_coef
from core.recipe_files import make_config, resolve_options
from core.rl_run import rollout_metrics
from core.rollout import (
    PROMPT_FORMATS,
    completion_outputs,
    encode_prompt,
    sample_rollout,
    score_rollout,
    to_prompt,
)
from recipes import a2c, grpo, ppo, rl, trpo

PAGES = {"ppo": ppo, "a2c": a2c, "trpo": trpo, "grpo": grpo, "rloo": grpo}
ALGORITHMS = tuple(PAGES)


def page_config(algorithm="ppo", **options):
    """The config of an algorithm's page."""
    stage_class, options, notes = resolve_options(rl.RLStage, [{"algorithm": algorithm} | options])
    return make_config(stage_class.config_class, options, notes)


def stage_of(config):
    """The stage of a page's config."""
    stages = {page.config_class: page for page in rl.STAGES.values()}
    return stages[type(config)](config)


# Options of two steps of any algorithm.
TWO_STEPS = dict(
    reward=["length"],
    reward_length=3,
    batch_size=8,
    generation_kwargs={"max_new_tokens": 6},
    num_training_steps=2,
    save_freq=0,
)


def config(tmp_path, **options):
    values = dict(
        model_name_or_path="tiny",
        prompt_dataset_path="data",
        output_dir=str(tmp_path / "out"),
    )
    return page_config(**TWO_STEPS | values | options)


def page_of(config):
    return sys.modules[type(config).__module__]


def prompts(tokenizer, *texts, **columns):
    rows = [{"prompt": [{"role": "user", "content": text}], "columns": columns} for text in texts]
    return [encode_prompt(row, tokenizer, 256) for row in rows]


def make_run(tokenizer, tmp_path, rows=None, functions=None, **options):
    """A `Run` on the tiny model, and prompts of different lengths."""
    settings, model = config(tmp_path, **options), make_model(tokenizer)
    settings.validate()
    model = common.add_adapter(model, settings)
    model.generation_config.update(
        eos_token_id=core.chat.stop_tokens(tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    rows = rows or prompts(
        tokenizer, "One?", "Two, a longer one?", "Three?", "And the longest of all the four?"
    )
    functions = functions or {
        "words": lambda prompts, completions, **_: [len(text) / 10 for text in completions]
    }
    return rl_run.build_run(settings, model, tokenizer, functions, rows[0]), rows


def rolled(run, rows, seed=0):
    """A rollout with its advantages, by the steps of the page's loop."""
    page = page_of(run.config)
    count = run.config.batch_size // run.config.num_generations
    uniforms = core.sampling.uniform_numbers(run.config.batch_size, run.config.sampling, seed)
    rollout = sample_rollout(run, (rows * 8)[:count], uniforms)
    score_rollout(run, rollout)
    if page is grpo:
        grpo.record_old_logps(run, rollout)
        grpo.compute_advantages(run, rollout)
    else:
        rl_run.record_old_policy(run, rollout)
        page.compute_advantages(run, rollout)
    return rollout


def update(run, rollout):
    return page_of(run.config).update(run, rollout)


def losses_of(run, rollout):
    """(losses, weights, metrics) of the whole rollout as one mini-batch."""
    page = page_of(run.config)
    rollout.weights = rollout.used
    if getattr(run.config, "advantage", "") == "rloo":
        rollout.weights = rollout.used.amax(1, keepdim=True)
    outputs = rl_run.policy_outputs(run, rollout)
    losses, metrics = page.token_losses(run, rollout, outputs)
    return losses, rollout.weights, metrics


def record_gradients(run):
    """A list that takes the gradient of all that trains, as one vector, at each optimizer step."""
    gradients = []

    def record():
        trained = (p for group in run.optimizer.param_groups for p in group["params"])
        gradients.append(trpo.flatten(p.grad for p in trained))

    run.optimizer.zero_grad = record
    return gradients


def moved(run):
    """The run with its policy away from the reference, and a critic that is not 0."""
    generator = torch.Generator().manual_seed(1)
    for parameter in run.parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    if run.value_head is not None:
        torch.nn.init.normal_(run.value_head.weight, std=0.1, generator=generator)
    return run


def likely_to_stop(run):
    """The run with a model whose completions have different lengths."""
    bias = torch.zeros(len(run.tokenizer))
    bias[2] = 4.0  # <|im_end|>
    run.model.get_output_embeddings().bias = torch.nn.Parameter(bias, requires_grad=False)
    return run


def all_but_one(prompts, completions, **_):
    return [None if n == 1 else n / 10 for n in range(len(completions))]


def unchanged(total):
    """The sum over the processes, of which there is one."""
    return total


# -- configuration and data ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(reward=[], reward_length=0), "reward is missing"),
        (dict(reward=["numerik"]), "did you mean 'numeric'"),
        (dict(reward=["regex"], reward_length=0), "reward=regex needs reward_pattern"),
        (dict(reward=["regex"], reward_length=0, reward_pattern="("), r"reward_pattern=\("),
        (dict(reward_weights=[1, 2]), "give one for each of length"),
        (dict(algorithm="grop"), "did you mean 'grpo'"),
        (dict(algorithm=""), "unknown algorithm ''"),
        (dict(algorithm=["grpo"]), "unknown algorithm"),
        (dict(algorithm="grpo", num_generations=1), "compare completions of one prompt"),
        (
            dict(batch_size=6, algorithm="grpo"),
            "batch_size=6 must be a multiple of num_generations=4",
        ),
        (dict(mini_batch_size=3), "batch_size=8 must be a multiple of mini_batch_size=3"),
        (dict(generation_kwargs={"temprature": 1}), "did you mean 'temperature'"),
        (dict(generation_kwargs={"temperature": 0}), "sampling requires a temperature above 0"),
        (dict(generation_kwargs={"max_new_tokens": "many"}), "'many' is not a count"),
        (
            dict(generation_kwargs={"max_new_tokens": 64}, max_seq_length=64),
            "leaves no room for a prompt",
        ),
        (
            dict(kl_in="loss", algorithm="trpo"),
            "takes the KL to the reference in the reward; set kl_in=reward",
        ),
        (dict(kl_penalty="full"), "set kl_in=loss"),
        (dict(target_kl=1, init_kl_coef=0), "target_kl scales init_kl_coef"),
        (dict(lora_dropout=0.1), "set lora_dropout=0"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **options).validate()


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(reward_pattern="a"), "reward_pattern has no effect"),
        (dict(eval_freq=2, validation_split=0), "eval_freq has no effect with validation_split=0"),
        (
            dict(algorithm="a2c", clip_range=0.1),
            "clip_range has no effect with algorithm=a2c; it belongs to ppo, grpo, rloo",
        ),
        (dict(algorithm="grpo", gae_lambda=0.5), "gae_lambda has no effect with algorithm=grpo"),
        (dict(algorithm="trpo", learning_rate=3e-4), "learning_rate has no effect"),
        (
            dict(algorithm="a2c", mini_batch_size=4, gradient_accumulation_steps=2),
            "gradient_accumulation_steps has no",
        ),
        (dict(algorithm="rloo", scale_rewards=False), "scale_rewards has no effect"),
        (dict(kl_horizon=5), "kl_horizon has no effect without target_kl"),
    ],
)
def test_options_that_the_others_leave_without_effect_are_noted(tmp_path, options, words):
    settings = config(tmp_path, **options)
    settings.validate()
    assert any(words in note for note in settings.notes), settings.notes


OWN_OPTIONS = {  # option: a value other than the default, the algorithms that read it
    "ppo_epochs": (2, {"ppo", "grpo", "rloo", "trpo"}),
    "clip_range": (0.3, {"ppo", "grpo", "rloo"}),
    "clip_range_value": (0.3, {"ppo"}),
    "gamma": (0.3, {"ppo", "a2c", "trpo"}),
    "gae_lambda": (0.3, {"ppo", "a2c", "trpo"}),
    "value_loss_coef": (0.3, {"ppo", "a2c"}),
    "value_learning_rate": (0.3, {"ppo", "a2c", "trpo"}),
    "whiten_rewards": (True, {"ppo", "a2c", "trpo"}),
    "whiten_advantages": (False, {"ppo", "a2c", "trpo"}),
    "max_kl": (0.5, {"ppo", "trpo"}),
    "cg_iterations": (3, {"trpo"}),
    "cg_damping": (0.3, {"trpo"}),
    "scale_rewards": (False, {"grpo"}),
    "learning_rate": (3e-4, {"ppo", "a2c", "grpo", "rloo"}),
    "entropy_coef": (0.3, {"ppo", "a2c", "grpo", "rloo"}),
    "gradient_accumulation_steps": (2, {"ppo", "grpo", "rloo"}),
}


@pytest.mark.parametrize("name", OWN_OPTIONS)
def test_every_algorithm_takes_its_own_options_and_no_others(tmp_path, name):
    value, readers = OWN_OPTIONS[name]
    for algorithm in ALGORITHMS:

        def notes_of(algorithm):
            settings = config(tmp_path, algorithm=algorithm, mini_batch_size=4, **{name: value})
            settings.validate()
            return [note for note in settings.notes if note.startswith(f"{name} has no effect")]

        assert len(notes_of(algorithm)) == (algorithm not in readers)


def test_the_door_hands_over_to_the_page():
    for algorithm, stage in rl.STAGES.items():
        given = {"algorithm": algorithm.upper(), "batch_size": 8}
        stage_class, options, notes = rl.RLStage.resolve(given)
        assert stage_class is stage and options.pop("batch_size") == 8 and not notes
        assert options == ({"advantage": "rloo"} if algorithm == "rloo" else {})
    assert rl.RLStage.resolve({})[0] is ppo.PPOStage
    with pytest.raises(ConfigError, match="algorithm=rloo means advantage=rloo; remove one"):
        rl.RLStage.resolve({"algorithm": "rloo", "advantage": "grpo"})


@pytest.mark.parametrize(
    "row, form, asked",
    [
        ({"prompt": "a", "answer": "1"}, "prompt", "a"),
        ({"question": "a", "answer": "1"}, "question", "a"),
        ({"prompt": [{"role": "user", "content": "a"}], "answer": "1"}, "prompt", "a"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ],
                "answer": "1",
            },
            "messages",
            "a",
        ),
        ({"instruction": "a", "answer": "1"}, "instruction", "a"),
        ({"instruction": "a", "input": "b", "answer": "1"}, "instruction-input", "a\n\nb"),
    ],
)
def test_formats(row, form, asked):
    assert core.columns.detect_format(list(row), PROMPT_FORMATS) == form
    assert to_prompt(row, form) == {
        "prompt": [{"role": "user", "content": asked}],
        "columns": {"answer": "1"},
    }


def test_prompts_come_over_and_over_in_a_new_order():
    rows = list(range(5))
    seen = sum((rl_run.prompts_of_step(1, rows, step, 3) for step in range(10)), [])
    epochs = [seen[start : start + 5] for start in range(0, 30, 5)]
    assert all(sorted(epoch) == rows for epoch in epochs) and len({*map(tuple, epochs)}) > 3
    assert sum((rl_run.prompts_of_step(1, rows, step, 6) for step in range(5)), []) == seen


def test_every_step_has_prompts_and_random_numbers_of_its_own(tokenizer, tmp_path):
    run, rows = make_run(tokenizer, tmp_path, batch_size=2)
    run.training_rows, asked, numbers = rows, [], []
    for run.step in range(2):
        asked += run.next_prompts()
        numbers += run.next_uniforms().flatten().tolist()
    assert sorted(row["ids"] for row in asked) == sorted(row["ids"] for row in rows)
    assert len({*numbers}) == len(numbers) == 2 * 2 * 6


# -- mathematics -----------------------------------------------------------------------------------


def test_gae_is_the_double_sum():
    torch.manual_seed(0)
    rewards, values, gamma, lam = (
        torch.randn(3, 7, dtype=torch.float64),
        torch.randn(3, 7, dtype=torch.float64),
        0.9,
        0.8,
    )
    ends = torch.tensor([7, 4, 1])
    mask = torch.arange(7) < ends[:, None]
    rewards, values = rewards * mask, values * mask
    ours = ppo.gae(rewards, values, gamma, lam)
    for row, end in enumerate(ends.tolist()):
        for t in range(7):
            wanted = 0.0
            for k in range(t, end):
                after = values[row, k + 1] if k + 1 < end else 0.0
                wanted += (gamma * lam) ** (k - t) * (
                    rewards[row, k] + gamma * after - values[row, k]
                )
            assert ours[row, t] == pytest.approx(float(wanted), abs=1e-12)
    assert ppo.gae(rewards, values, 1.0, 1.0)[0, 0] == pytest.approx(
        float(rewards[0].sum() - values[0, 0])
    )


def test_kl_estimators_by_enumeration():
    torch.manual_seed(0)
    theta = torch.randn(9, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(9, dtype=torch.float64).log_softmax(0)
    logps = theta.log_softmax(0)
    chance, kl = logps.exp().detach(), (logps.exp() * (logps - ref)).sum()

    def mean(estimate):
        return (chance * estimate(logps, ref)).sum()

    def gradient(value):
        return torch.autograd.grad(value, theta, retain_graph=True)[0]

    assert abs(mean(k1) - kl) < 1e-12 and abs(mean(k3) - kl) < 1e-12 and (k3(logps, ref) >= 0).all()
    assert abs(exact_kl(logps[None], ref[None])[0] - kl) < 1e-12
    assert (gradient(mean(k2)) - gradient(kl)).abs().max() < 1e-12
    for name in ("kl", "k3", "mse"):  # in the loss, each has the true gradient
        for old in (None, logps.detach()):
            assert (
                gradient((chance * kl_loss(name, logps, old, ref)).sum()) - gradient(kl)
            ).abs().max() < 1e-12
    other = torch.randn(9, dtype=torch.float64).log_softmax(0)  # sampled by another policy
    for name in ("kl", "k3"):
        value = (other.exp() * kl_loss(name, logps, other, ref)).sum()
        assert abs(value - kl) < 1e-12 and (gradient(value) - gradient(kl)).abs().max() < 1e-12
    assert gradient(mean(k1)).abs().max() < 1e-12  # without the ratio it teaches nothing
    forward = (ref.exp() * (ref - logps)).sum()
    assert (gradient(mean(k3)) - gradient(forward)).abs().max() < 1e-12
    # as a reward, k1 has the true gradient
    assert (
        gradient((chance * logps * k1(logps, ref).detach()).sum()) - gradient(kl)
    ).abs().max() < 1e-12
    assert (
        torch.equal(ESTIMATORS["abs"](logps, ref), (logps - ref).abs()) and ESTIMATORS["mse"] is k2
    )


def test_the_surrogate_is_clipped_on_the_side_that_gains():
    old, one = torch.zeros(1), torch.ones(1)
    for ratio, advantage, wanted, slope in (
        (1.5, 1.0, -1.2, 0.0),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 1.0, -1.1, -1.1),
        (0.9, -1.0, 0.9, 0.9),
    ):
        logps = torch.full((1,), math.log(ratio), requires_grad=True)
        value = ppo.clipped_policy_loss(logps, old, advantage * one, 0.2)
        value.sum().backward()
        assert value.item() == pytest.approx(wanted) and logps.grad.item() == pytest.approx(slope)
        stopped = ppo.is_clipped(torch.tensor([ratio]), advantage * one, 0.2)
        assert stopped.item() == (slope == 0.0)


def test_value_loss_by_hand():
    def loss(value, old, wanted):
        return float(ppo.clipped_value_loss(*map(torch.tensor, (value, old, wanted)), 0.2))

    assert loss(1.0, 0.0, 1.0) == pytest.approx(
        0.8**2 / 2
    )  # it left the old value by more than 0.2
    assert loss(0.1, 0.0, 1.0) == pytest.approx(0.9**2 / 2)
    assert loss(-1.0, 0.0, 1.0) == pytest.approx(4 / 2)


def test_whitening_is_over_the_mask():
    torch.manual_seed(0)
    values, mask = torch.randn(4, 6) * 3 + 2, torch.arange(6) < torch.tensor([6, 2, 3, 1])[:, None]
    white = ppo.whiten(values, mask.float(), True, unchanged)
    assert (
        white[mask].mean().abs() < 1e-6
        and white[mask].var(correction=0) == pytest.approx(1, abs=1e-5)
        and not white[~mask].any()
    )
    kept = ppo.whiten(values, mask.float(), False, unchanged)
    assert kept[mask].mean() == pytest.approx(float(values[mask].mean()), abs=1e-5)


def test_group_advantages():
    nan, scores = float("nan"), torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    assert torch.allclose(grpo.group_advantages(scores, scale=False), scores - 3)
    assert torch.allclose(
        grpo.group_advantages(scores, scale=True), (scores - 3) / (scores.std() + 1e-4)
    )
    assert torch.allclose(
        grpo.leave_one_out_advantages(scores),
        torch.tensor([[1 - 11 / 3, 2 - 10 / 3, 3 - 3, 6 - 2]]),
    )
    part = torch.tensor(
        [[1.0, nan, 3.0, nan], [nan] * 4, [nan, 2.0, nan, nan], [5.0] * 4]
    )  # None is no verdict, not 0
    assert grpo.group_advantages(part, scale=False).tolist() == [
        [-1, 0, 1, 0],
        [0] * 4,
        [0] * 4,
        [0] * 4,
    ]
    assert grpo.group_advantages(part, scale=True)[1:].tolist() == [[0] * 4] * 3
    assert grpo.leave_one_out_advantages(part).tolist() == [
        [-2, 0, 2, 0],
        [0] * 4,
        [0] * 4,
        [0] * 4,
    ]


def test_the_controller_by_hand():
    assert next_kl_coef(0.1, 6.6, 6.0, 0.5) == pytest.approx(0.1 * 1.05)
    assert next_kl_coef(0.1, 60.0, 6.0, 0.5) == pytest.approx(0.1 * 1.1)
    assert next_kl_coef(0.1, 0.0, 6.0, 0.5) == pytest.approx(0.1 * 0.9)
    assert next_kl_coef(0.1, 0.0, 6.0, 8.0) == pytest.approx(0.1 * 0.8)  # never below 0


def test_every_step_moves_beta_towards_its_target(tokenizer, tmp_path):
    """Half a horizon of completions is half of the largest change."""
    options = dict(target_kl=1e-3, kl_horizon=16.0, init_kl_coef=0.3, batch_size=8)
    run, rows = make_run(tokenizer, tmp_path, **options)
    data = rolled(moved(run), rows)
    assert rollout_metrics(run, data)["kl"] > 2e-3
    run.report = lambda metrics: metrics
    run.end_step(data, {})
    assert run.kl_coef == pytest.approx(0.3 * (1 + 0.2 * 8 / 16))


def test_sampling_keeps_no_graph(tokenizer):
    model, modes = make_model(tokenizer), []
    model.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    sampling = core.sampling.SAMPLING_DEFAULTS | {"max_new_tokens": 3}
    core.sampling.sample_completions(model, tokenizer, [[5, 6, 7]], sampling)
    assert modes and not any(modes)


def test_a_model_that_cannot_go_on_from_its_cache_is_refused_before_training(
    tokenizer, tmp_path, monkeypatch
):
    sizes = dict(hidden_size=32, num_attention_heads=2, dim_head=16, dim_ff=32)
    kind = transformers.CpmAntConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(kind)
    monkeypatch.setattr(sys.modules[__name__], "make_model", lambda _: model)
    with pytest.raises(ConfigError, match="^a model of type cpmant cannot be sampled from: "):
        make_run(tokenizer, tmp_path)


def test_fisher_products_and_conjugate_gradients():
    torch.manual_seed(0)
    states = torch.randn(5, 3, dtype=torch.float64)
    weights = [
        torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(4, dtype=torch.float64, requires_grad=True),
    ]
    dist = (states @ weights[0] + weights[1]).log_softmax(-1)
    slope = trpo.flatten(
        torch.autograd.grad(exact_kl(dist.detach(), dist).mean(), weights, create_graph=True)
    )
    fisher = torch.zeros(16, 16, dtype=torch.float64)  # E[grad log pi grad log pi'], the definition
    for state, action in itertools.product(range(5), range(4)):
        score = trpo.flatten(torch.autograd.grad(dist[state, action], weights, retain_graph=True))
        fisher += dist[state, action].exp().detach() / 5 * torch.outer(score, score)
    vectors = torch.eye(16, dtype=torch.float64)
    products = torch.stack([trpo.fisher_product(slope, weights, vector) for vector in vectors])
    assert (products - fisher).abs().max() < 1e-12
    damped, b = fisher + 0.1 * vectors, torch.randn(16, dtype=torch.float64)
    found = trpo.conjugate_gradient(lambda vector: damped @ vector, b, 16)
    assert (
        found - torch.linalg.solve(damped, b)
    ).abs().max() < 1e-4 and not trpo.conjugate_gradient(lambda v: v, 0 * b, 3).any()


def test_tokens_are_drawn_as_the_probabilities_say():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).repeat(20000, 1)
    chance = 1 - torch.rand(20000, generator=torch.Generator().manual_seed(0))
    plain = dict(core.sampling.SAMPLING_DEFAULTS)
    for sampling, scaled in ((plain, logits[0]), (plain | {"temperature": 2.0}, logits[0] / 2)):
        tokens, logps = core.sampling.sample_next_token(logits, chance, sampling)
        assert (torch.bincount(tokens, minlength=4) / 20000 - scaled.softmax(0)).abs().max() < 0.01
        assert torch.allclose(logps, scaled.log_softmax(0)[tokens])
    assert {*core.sampling.sample_next_token(logits, chance, plain | {"top_k": 2})[0].tolist()} == {
        1,
        3,
    }
    assert {
        *core.sampling.sample_next_token(logits, chance, plain | {"top_p": 0.7})[0].tolist()
    } == {1, 3}
    assert core.sampling.sample_next_token(logits, None, plain)[0].tolist() == [3] * 20000
    impossible = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert all(
        core.sampling.sample_next_token(impossible, torch.tensor([chance]), plain)[0] == 1
        for chance in (1e-30, 0.5, 1.0)
    )


def test_an_overflow_in_another_process_skips_the_step_in_this_one(
    tokenizer, tmp_path, monkeypatch
):
    """float16: the scaler has to see the sum of the gradients, else only the process that
    overflowed keeps its weights."""
    run, _ = make_run(tokenizer, tmp_path)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    monkeypatch.setattr(run, "sum_over_processes", lambda value: value + float("inf"))
    before = [parameter.detach().clone() for parameter in run.parameters]
    trained = [*run.parameters, *run.value_head.parameters()]
    run.scaler.scale(sum((parameter**2).sum() for parameter in trained)).backward()
    run.optimizer_step()
    assert (
        all(torch.equal(old, new) for old, new in zip(before, run.parameters, strict=True))
        and run.scaler.get_scale() == 512.0
    )


# -- rollout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_r": 0},
        {"algorithm": "grpo"},
        {"generation_kwargs": {"max_new_tokens": 6, "temperature": 0.7}},
    ],
)
def test_what_was_sampled_is_what_is_trained_on(tokenizer, tmp_path, options):
    """Left padding, the cache, merged weights, temperature and shared prompts: all give the
    log-probabilities of each completion alone, in float64 and with nothing clever."""
    run, rows = make_run(tokenizer, tmp_path, **options)
    for parameter in run.parameters:
        parameter.data += 0.05 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    before = copy.deepcopy(run.model.state_dict())
    data = rolled(run, rows)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    model, first = copy.deepcopy(run.model).double(), 0
    asked = [(group["prompt"], answer) for group in data.groups for answer in group["answers"]]
    assert len({len(prompt) for prompt, _ in asked}) > 1  # so there was padding
    for number, (prompt, answer) in enumerate(asked):
        logits = (
            model(input_ids=torch.tensor([prompt + answer])).logits[0]
            / run.config.sampling["temperature"]
        )
        alone = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(
            1, torch.tensor(answer)[:, None]
        )[:, 0]
        kept = data.mask[number]
        assert kept.sum() == len(answer) and torch.allclose(
            data.old_logps[number][kept].double(), alone, atol=1e-5
        )
        first = max(first, float((data.old_logps[number][kept].double() - alone).abs().max()))
    assert run.shares_prompts == (run.config.num_generations > 1) and first > 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_steps_of_one_shape_sample_the_same(tokenizer, monkeypatch, temperature):
    """What a GPU records: attention sees the room for tokens to come, and rows that stopped stay in
    the batch. Here the step waits for a value, halfway through, so that it is not recorded after
    all, and comes once more."""
    model, sampling = (
        make_model(tokenizer),
        core.sampling.SAMPLING_DEFAULTS | {"max_new_tokens": 40, "temperature": temperature},
    )
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait(*_):
        if modes and modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    model.model.layers[1].mlp.register_forward_hook(wait)
    asked = [
        row["ids"]
        for row in prompts(tokenizer, "One?", "Two, a longer one?", "And the longest of all?")
    ]
    for chances in (core.sampling.uniform_numbers(12, sampling, 0), None):
        found = []
        for devices in (set(), {"cpu"}):
            monkeypatch.setattr(core.sampling, "CUDA_GRAPH_DEVICES", devices)
            found.append(
                core.sampling.sample_completions(model, tokenizer, asked, sampling, chances, 4)
            )
        assert modes.pop() == "default" and modes.pop() == "error" and not modes
        assert found[0][0] == found[1][0] and len({*map(len, found[0][0])}) > (chances is not None)
        assert all(
            first == pytest.approx(second, abs=1e-5)
            for first, second in zip(found[0][1], found[1][1], strict=True)
        )


def test_padding_on_the_left_moves_no_position(tokenizer, tmp_path):
    """On a model with absolute positions: rotary ones would not mind."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(n_positions=256, n_embd=32, n_layer=2, n_head=2, eos_token_id=0, bos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), initializer_range=0.3, **sizes))
    rows = prompts(
        tokenizer, "One?", "Two, a longer one?", "Three?", "And the longest of all the four?"
    )
    run = rl_run.build_run(config(tmp_path, lora_r=0), model, tokenizer, {}, rows[0])
    completions, sampled = core.sampling.sample_completions(
        model,
        tokenizer,
        [row["ids"] for row in rows],
        run.config.sampling,
        core.sampling.uniform_numbers(4, run.config.sampling, 0),
    )
    for row, ids, logps in zip(rows, completions, sampled, strict=True):
        alone = (
            model(input_ids=torch.tensor([row["ids"] + ids]))
            .logits[0]
            .log_softmax(-1)[len(row["ids"]) - 1 : -1]
        )
        assert alone.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist() == pytest.approx(
            logps, abs=1e-4
        )


def test_completions_end_with_their_stop_token(tokenizer, tmp_path):
    run, rows = make_run(
        tokenizer,
        tmp_path,
        generation_kwargs={"max_new_tokens": 40},
        missing_stop_penalty=3.0,
        init_kl_coef=0.0,
        gae_lambda=1.0,
        whiten_advantages=False,
    )
    bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    bias.data[2] = 4.0  # <|im_end|> comes soon
    head = run.model.get_output_embeddings()
    head.bias = bias.requires_grad_(False)
    data = rolled(run, rows)
    stops, answers = (
        core.chat.stop_tokens(tokenizer),
        [answer for group in data.groups for answer in group["answers"]],
    )
    assert stops == [0, 2] and 0 < data.stopped.float().mean() < 1.1
    for answer, stopped, mask, _reward in zip(
        answers, data.stopped, data.mask, data.advantages + data.values, strict=True
    ):
        assert (
            not {*answer[:-1]} & {*stops}
            and (answer[-1] in stops) == stopped
            and mask.sum() == len(answer)
        )
    returns = data.returns[:, 0]
    assert torch.allclose(returns, data.scores - 3.0 * ~data.stopped, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_first_step_starts_at_the_old_policy(tokenizer, tmp_path, algorithm):
    run, rows = make_run(tokenizer, tmp_path, algorithm=algorithm, mini_batch_size=8)
    data = rolled(run, rows)
    assert torch.equal(data.old_logps, data.ref_logps) and rollout_metrics(run, data)["kl"] == 0
    if algorithm != "trpo":
        _, weights, metrics = losses_of(run, data)
        assert (metrics["ratio"] * weights).sum() / weights.sum() == 1
        # A2C clips nothing, so it has no such figure.
        assert ("clip_fraction" in metrics) == (algorithm != "a2c")
        if algorithm != "a2c":
            assert not metrics["clip_fraction"].any()


def test_a2c_is_one_unclipped_epoch_of_ppo(tokenizer, tmp_path):
    gradients = []
    for algorithm, options in (
        ("a2c", {}),
        ("ppo", dict(clip_range=1e9, clip_range_value=1e9, ppo_epochs=1)),
    ):
        for mini in (8, 2):
            run, rows = make_run(
                tokenizer,
                tmp_path,
                algorithm=algorithm,
                mini_batch_size=mini,
                learning_rate=1e-9,
                max_grad_norm=0,
                value_learning_rate=1e-9,
                **options,
                **({"gradient_accumulation_steps": 8 // mini} if options else {}),
            )
            torch.nn.init.normal_(run.value_head.weight, std=0.1)
            data, kept = rolled(run, rows), record_gradients(run)
            update(run, data)
            assert len(kept) == 1
            gradients.append(kept[0])
    assert gradients[0].abs().max() > 1e-4
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() < 1e-5 * gradients[0].abs().max()


@pytest.mark.parametrize("algorithm", ("grpo", "rloo"))
def test_sharing_the_prompt_and_mini_batches_change_no_gradient(tokenizer, tmp_path, algorithm):
    found = []
    for share, mini in ((True, 8), (False, 8), (True, 4)):
        run, rows = make_run(
            tokenizer,
            tmp_path,
            algorithm=algorithm,
            mini_batch_size=mini,
            gradient_accumulation_steps=8 // mini,
            max_grad_norm=0,
            kl_in="loss",
            kl_penalty="mse",
            entropy_coef=0.1,
        )
        for parameter in run.parameters:
            parameter.data += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
        run.shares_prompts = share
        data, kept = rolled(run, rows), record_gradients(run)
        update(run, data)
        found.append(kept[0])
    for other in found[1:]:
        assert (other - found[0]).abs().max() < 1e-4 * found[0].abs().max()


@pytest.mark.parametrize("algorithm", ("ppo", "a2c", "grpo", "rloo"))
def test_mini_batches_of_unequal_lengths_change_no_gradient(tokenizer, tmp_path, algorithm):
    """Also where some have no verdict: the mean is over the step, not over its mini-batches."""
    found = []
    for mini in (8, 2):
        one_step = dict(ppo_epochs=1, gradient_accumulation_steps=8 // mini)
        run, rows = make_run(
            tokenizer,
            tmp_path,
            algorithm=algorithm,
            num_generations=2,
            mini_batch_size=mini,
            max_grad_norm=0,
            functions={"some": all_but_one},
            **({} if algorithm == "a2c" else one_step),
        )
        data, kept = rolled(likely_to_stop(moved(run)), rows), record_gradients(run)
        metrics = update(run, data)
        found.append((kept[0], metrics))
    assert len({*data.lengths.tolist()}) > 2
    (whole, figures), (parts, same) = found
    assert (parts - whole).abs().max() < 1e-4 * whole.abs().max()
    assert same == pytest.approx(figures, abs=1e-5)
    assert figures["ratio"] == pytest.approx(1, abs=1e-5)  # one step, at the old policy


def learnt(tokenizer, tmp_path, algorithm, **options):
    """(gradients of each optimizer step, what has been trained), of one update."""
    epochs = {"ppo_epochs": 2} if algorithm in ("ppo", "grpo", "rloo") else {}
    defaults = dict(
        learning_rate=1e-2, max_grad_norm=0, batch_size=4, num_generations=2, warmup_ratio=0.0
    )
    rl_options = dict(algorithm=algorithm, init_kl_coef=0.3) | defaults | epochs | options
    run, rows = make_run(tokenizer, tmp_path, functions={"some": all_but_one}, **rl_options)
    data, gradients = rolled(likely_to_stop(moved(run)), rows), record_gradients(run)
    rl_run.set_learning_rates(run.optimizer, run.schedule_factor)
    update(run, data)
    return gradients, trpo.flatten(tensor.detach() for tensor in run.trained_tensors)


OF_EVERY_PAGE = {
    "init_kl_coef": 0.6,
    "kl_penalty": "abs",
    "missing_stop_penalty": 0.5,
    "generation_kwargs": {"max_new_tokens": 6, "temperature": 0.5},
    "num_generations": 4,
}
OF_AN_OPTIMIZER = {"learning_rate": 3e-3, "weight_decay": 0.5, "max_grad_norm": 1e-3}
OF_A_CRITIC = {
    "gamma": 0.5,
    "gae_lambda": 0.5,
    "whiten_rewards": True,
    "whiten_advantages": False,
    "value_learning_rate": 1e-1,
}
OF_PASSES = {"ppo_epochs": 3, "clip_range": 10.0, "mini_batch_size": 2}
OF_A_LOSS = {"kl_in": "loss", "entropy_coef": 0.1}
OF_A_GROUP = OF_EVERY_PAGE | OF_AN_OPTIMIZER | OF_PASSES | OF_A_LOSS
CHANGES = {
    "ppo": OF_A_GROUP | OF_A_CRITIC | {"clip_range_value": 1e-6, "value_loss_coef": 2.0},
    "a2c": OF_EVERY_PAGE | OF_AN_OPTIMIZER | OF_A_CRITIC | OF_A_LOSS | {"value_loss_coef": 2.0},
    "trpo": OF_EVERY_PAGE
    | OF_A_CRITIC
    | {"max_kl": 0.1, "cg_iterations": 1, "cg_damping": 5.0, "critic_epochs": 2},
    "grpo": OF_A_GROUP | {"scale_rewards": False, "advantage": "rloo"},
    "rloo": OF_A_GROUP,
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_option_of_a_page_changes_what_is_learnt(tokenizer, tmp_path, algorithm):
    gradients, weights = learnt(tokenizer, tmp_path, algorithm)
    again, same_weights = learnt(tokenizer, tmp_path, algorithm)
    assert all(map(torch.equal, gradients, again)) and torch.equal(weights, same_weights)
    for option, value in CHANGES[algorithm].items():
        others, other_weights = learnt(tokenizer, tmp_path, algorithm, **{option: value})
        is_same = len(others) == len(gradients) and all(map(torch.equal, gradients, others))
        assert not (is_same and torch.equal(weights, other_weights)), option


@pytest.mark.parametrize("algorithm", ("ppo", "a2c"))
def test_the_critic_learns_the_returns_as_much_as_its_coefficient_says(
    tokenizer, tmp_path, algorithm
):
    options = dict(algorithm=algorithm, value_loss_coef=2.0, max_grad_norm=0)
    run, rows = make_run(tokenizer, tmp_path, **options)
    data, gradients = rolled(moved(run), rows), record_gradients(run)
    update(run, data)
    errors = (data.values - data.returns)[data.mask]
    assert errors.mean().abs() > 1e-2
    of_bias = gradients[0][-1]
    assert of_bias.item() == pytest.approx(2.0 * errors.mean().item(), rel=1e-4)


def test_the_gradient_of_a_step_is_clipped_to_its_norm(tokenizer, tmp_path):
    (free, *_), _ = learnt(tokenizer, tmp_path, "a2c")
    (clipped, *_), _ = learnt(tokenizer, tmp_path, "a2c", max_grad_norm=1e-3)
    assert free.norm() > 1e-2 and clipped.norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("algorithm", ("ppo", "a2c", "grpo", "rloo"))
def test_every_step_has_its_mini_batches_in_an_order_of_its_own(
    tokenizer, tmp_path, algorithm, monkeypatch
):
    orders = []

    def record(run, batch, *more):
        orders[-1].append(batch.indices.tolist())
        return policy_outputs(run, batch, *more)

    policy_outputs = rl_run.policy_outputs
    monkeypatch.setattr(PAGES[algorithm], "policy_outputs", record)
    epochs = {} if algorithm == "a2c" else {"ppo_epochs": 2}
    run, rows = make_run(
        tokenizer,
        tmp_path,
        algorithm=algorithm,
        batch_size=16,
        num_generations=2,
        mini_batch_size=2,
        **epochs,
    )
    data = rolled(run, rows)
    for run.step in range(2):
        orders.append([])
        update(run, data)
    first, second = orders
    assert sorted(first) == sorted(second) and first[:8] != second[:8]
    # so has every pass over a rollout
    assert algorithm == "a2c" or first[:8] != first[8:]


def stock(kind, tokenizer, tmp_path, **options):
    import trl
    from datasets import Dataset

    arguments = getattr(trl, f"{kind}Config")(
        str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        disable_dropout=True,
        gradient_checkpointing=False,
        **options,
    )
    data = Dataset.from_list([{"prompt": "a"}] * 8)
    trainer = getattr(trl, f"{kind}Trainer")(
        make_model(tokenizer),
        lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.mark.parametrize("algorithm", ("grpo", "rloo"))
def test_loss_and_gradient_are_those_of_stock_trl(tokenizer, tmp_path, algorithm):
    trainer = stock(algorithm.upper(), tokenizer, tmp_path, beta=0.0)
    trainer.beta = (
        0.3 if algorithm == "grpo" else 0.0
    )  # set at construction, it would load a reference from a hub
    ours = (
        dict(kl_in="loss", kl_penalty="k3", init_kl_coef=0.3)
        if algorithm == "grpo"
        else dict(init_kl_coef=0.0)
    )
    run, rows = make_run(tokenizer, tmp_path, algorithm=algorithm, lora_r=0, ppo_epochs=2, **ours)
    data = rolled(run, rows)
    torch.manual_seed(3)
    for parameter in run.parameters:  # policy != old policy, and ratios on both sides of the clip
        parameter.data += 0.02 * torch.randn_like(parameter)
    trainer.model.load_state_dict(run.model.state_dict())
    asked = [group["prompt"] for group in data.groups for _ in range(4)]
    answers = [answer for group in data.groups for answer in group["answers"]]
    width, room = max(map(len, asked)), data.mask.shape[1]
    inputs = {
        "prompt_ids": torch.tensor([[0] * (width - len(ids)) + ids for ids in asked]),
        "prompt_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in asked]),
        "completion_ids": torch.tensor([ids + [0] * (room - len(ids)) for ids in answers]),
        "completion_mask": data.mask.long(),
        "advantages": data.advantages[:, 0],
        "num_items_in_batch": data.mask.sum(),
        "old_per_token_logps": data.old_logps,
        "old_logps": data.old_logps.sum(1),
    } | ({"ref_per_token_logps": data.ref_logps} if algorithm == "grpo" else {})
    trainer.model.train()
    wanted = trainer._compute_loss(trainer.model, inputs)
    losses, weights, metrics = losses_of(run, data)
    value = (losses * weights).sum() / weights.sum()
    assert metrics["clip_fraction"].any() and float(value) == pytest.approx(float(wanted), abs=1e-6)
    wanted.backward(), value.backward()
    theirs, mine = (
        trpo.flatten(p.grad for p in model.parameters()) for model in (trainer.model, run.model)
    )
    assert (theirs - mine).abs().max() < 1e-4 * theirs.abs().max()


def test_advantages_are_those_of_stock_trl(tokenizer, tmp_path):
    scores = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0])
    for algorithm, kind in (("grpo", "GRPO"), ("rloo", "RLOO")):
        trainer = stock(kind, tokenizer, tmp_path, beta=0.0)
        trainer.reward_funcs, values = [lambda completions, **_: scores.tolist()], []
        trainer.reward_func_names = ["scores"]
        batch = [{"prompt": "a"}] * 4 + [{"prompt": "b"}] * 4
        values = trainer._generate_and_score_completions(batch)["advantages"]
        groups = scores.view(2, 4)
        ours = (
            grpo.group_advantages(groups, scale=True)
            if algorithm == "grpo"
            else grpo.leave_one_out_advantages(groups)
        )
        assert torch.allclose(ours.flatten(), values, atol=1e-5)


def test_a_completion_without_a_verdict_teaches_nothing(tokenizer, tmp_path):
    """The gradient is that of the others alone, for every algorithm; with no verdict at all nothing
    moves."""
    for algorithm in ("ppo", "a2c", "grpo", "rloo", "trpo"):

        def silent(prompts, completions, **_):
            return [None] * len(completions)

        run, rows = make_run(tokenizer, tmp_path, functions={"silent": silent}, algorithm=algorithm)
        before = trpo.flatten(run.parameters).clone()
        data = rolled(run, rows)
        learnt = update(run, data)
        assert (
            learnt == {}
            and torch.equal(trpo.flatten(run.parameters), before)
            and not data.advantages.isnan().any()
        )

        # Nothing is known of reward, KL and entropy: no figure, no alarm, and beta stays.
        known = rollout_metrics(run, data)
        assert set(known) == {"length", "stopped", "unscored", "kl_coef"}
        run.config.target_kl = 1.0
        run.report = lambda metrics: metrics
        run.end_step(data, learnt)
        assert run.kl_coef == known["kl_coef"] and run.alarms.raised <= {"no_verdict"}

    def some(prompts, completions, **_):
        return [None if n % 4 == 0 else n / 10 for n in range(len(completions))]

    run, rows = make_run(
        tokenizer, tmp_path, functions={"some": some}, algorithm="rloo", init_kl_coef=0.0
    )
    data = rolled(run, rows)
    assert (data.used.sum(1) == 0).tolist() == [True, False, False, False] * 2
    assert torch.allclose(
        data.advantages[1:4, 0], torch.tensor([0.1 - 0.25, 0.2 - 0.2, 0.3 - 0.15])
    )


@pytest.mark.parametrize("algorithm", ("ppo", "a2c", "trpo"))
def test_rewards_of_tokens_and_their_advantages_by_hand(tokenizer, tmp_path, algorithm):
    """Each token loses its KL, the last one gets the score; gamma and lambda are told apart."""
    options = dict(gamma=0.9, gae_lambda=0.6, init_kl_coef=0.3, missing_stop_penalty=0.25)
    found = []
    for white in (False, True):
        run, rows = make_run(
            tokenizer,
            tmp_path,
            functions={"some": all_but_one},
            algorithm=algorithm,
            whiten_advantages=white,
            **options,
        )
        found.append(rolled(moved(run), rows))
    plain, white = found
    penalties = 0.3 * (plain.old_logps - plain.ref_logps)
    assert not plain.stopped.all() and penalties.abs().max() > 0.01
    for n, length in enumerate(plain.lengths.tolist()):
        values, after = [*plain.values[n, :length].tolist(), 0.0], 0.0
        for t in reversed(range(length)):
            reward = -float(penalties[n, t])
            if t == length - 1 and n != 1:
                reward += n / 10 - (0.0 if plain.stopped[n] else 0.25)
            after = reward + 0.9 * values[t + 1] - values[t] + 0.9 * 0.6 * after
            assert float(plain.advantages[n, t]) == pytest.approx(after, abs=1e-5)
            assert float(plain.returns[n, t]) == pytest.approx(after + values[t], abs=1e-5)
    # the mean and the variance are those of the tokens that are learnt from
    used = white.used > 0
    assert torch.equal(white.returns, plain.returns) and not used[1].any()
    assert white.advantages[used].mean().abs() < 1e-5 and not white.advantages[~used].any()
    assert float(white.advantages[used].var(correction=0)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("algorithm", ("grpo", "rloo"))
def test_a_group_is_compared_by_scores_less_penalties(tokenizer, tmp_path, algorithm):
    run, rows = make_run(
        tokenizer,
        tmp_path,
        functions={"some": all_but_one},
        algorithm=algorithm,
        init_kl_coef=0.3,
        missing_stop_penalty=0.25,
        **({"scale_rewards": False} if algorithm == "grpo" else {}),
    )
    data = rolled(likely_to_stop(moved(run)), rows)
    assert all(0 < group.float().mean() < 1 for group in data.stopped.view(2, 4))
    penalties = 0.3 * (data.old_logps - data.ref_logps).sum(1)
    assert penalties.abs().max() > 0.01
    scores = [n / 10 - 0.25 * (not data.stopped[n]) - float(penalties[n]) for n in range(8)]
    for n in (0, 2, 3, 4, 5, 6, 7):
        group = {0, 2, 3} if n < 4 else {4, 5, 6, 7}
        others = group - {n} if algorithm == "rloo" else group
        wanted = scores[n] - sum(scores[m] for m in others) / len(others)
        advantages = data.advantages[n, : data.lengths[n]]
        assert advantages.tolist() == pytest.approx([wanted] * len(advantages), abs=1e-5)
    assert not data.advantages[1].any() and not data.advantages[~data.mask].any()


def test_a_single_step_records_the_old_policy_on_its_way(tokenizer, tmp_path):
    """What it records is what a pass before the update would have given, row by row."""
    run, rows = make_run(
        tokenizer,
        tmp_path,
        algorithm="grpo",
        num_generations=2,
        mini_batch_size=4,
        gradient_accumulation_steps=2,
        kl_in="loss",
        learning_rate=1e-2,
    )
    data = rolled(moved(run), rows)
    with torch.no_grad():
        before = completion_outputs(run, data, "entropy")
    assert data.old_logps is None
    update(run, data)
    assert torch.allclose(data.old_logps, before.logps, atol=1e-5)
    assert torch.allclose(data.entropy, before.entropy, atol=1e-5)


@pytest.mark.parametrize("algorithm", ("ppo", "a2c", "grpo", "rloo"))
@pytest.mark.parametrize("penalty", ("k3", "full"))
def test_the_kl_in_the_loss_is_added_beta_times(tokenizer, tmp_path, algorithm, penalty):
    epochs = {} if algorithm == "a2c" else {"ppo_epochs": 2}
    run, rows = make_run(
        tokenizer, tmp_path, algorithm=algorithm, kl_in="loss", kl_penalty=penalty, **epochs
    )
    data, found = rolled(moved(run), rows), []
    moved(run)  # away from the policy that sampled too
    for run.kl_coef in (0.0, 0.5):
        losses, _, _ = losses_of(run, data)
        found.append(losses.detach())
    outputs = rl_run.policy_outputs(run, data)
    kl = kl_in_loss(run, data, outputs.logps, outputs.log_probs).detach()
    if algorithm == "rloo":
        kl = kl.sum(1, keepdim=True)
    assert kl.abs().max() > 1e-3 and torch.allclose(found[1] - found[0], 0.5 * kl, atol=1e-5)


def test_the_exact_kl_in_the_loss_is_that_of_the_policy(tokenizer, tmp_path):
    """KL(pi || pi_ref) of every token's distribution; that of (pi_ref || pi) is another one."""
    run, rows = make_run(tokenizer, tmp_path, kl_in="loss", kl_penalty="full")
    data = rolled(likely_to_stop(moved(run)), rows)
    with torch.no_grad():
        policy = completion_outputs(run, data, "log_probs")
        reference = completion_outputs(run, data, "log_probs", reference=True).log_probs
        found = kl_in_loss(run, data, policy.logps, policy.log_probs)
    wanted = (policy.log_probs.exp() * (policy.log_probs - reference)).sum(-1)
    other = (reference.exp() * (reference - policy.log_probs)).sum(-1)
    assert torch.allclose(found[data.mask], wanted, atol=1e-6) and not found[~data.mask].any()
    assert (wanted - other).abs().max() > 1e-4


def test_passes_end_early_where_the_policy_has_moved_far(tokenizer, tmp_path):
    # the KL of the first pass is 0: it is measured before its step, the only one
    for max_kl, passes in ((1e-6, 2), (1e6, 4), (None, 4)):
        options = dict(algorithm="ppo", max_kl=max_kl, learning_rate=1e-2)
        run, rows = make_run(tokenizer, tmp_path, **options)
        assert update(run, rolled(run, rows))["epochs"] == passes


def test_the_figures_of_a_rollout_by_hand(tokenizer, tmp_path):
    """Completions without a verdict count in no mean but those of lengths."""

    def tens(prompts, completions, **_):
        return [None if n == 1 else float(n // 4) for n in range(len(completions))]

    def twos(prompts, completions, **_):
        return [float(n == 3) for n in range(len(completions))]

    run, rows = make_run(
        tokenizer,
        tmp_path,
        num_generations=4,
        reward=["length", "exact"],
        reward_weights=[1.0, 2.0],
        functions={"tens": tens, "twos": twos},
    )
    data = rolled(likely_to_stop(moved(run)), rows)
    found, used, judged = rollout_metrics(run, data), data.used > 0, [0, 0, 2, 1, 1, 1, 1]
    assert len({*data.lengths.tolist()}) > 2 and not used[1].any()
    kl = k3(data.old_logps, data.ref_logps)[used].sum() / 7
    entropy = completion_outputs(run, data, "entropy").entropy[used].mean()
    errors, returns = (data.returns - data.values)[used], data.returns[used]
    data.sampled_logps = [[logp + 0.5 for logp in row] for row in data.old_logps.tolist()]
    data.sampled_logps = [
        row[:length] for row, length in zip(data.sampled_logps, data.lengths.tolist(), strict=True)
    ]
    found |= {"sampling_gap": rollout_metrics(run, data)["sampling_gap"]}
    wanted = {
        "sampling_gap": 0.5,
        "reward": 6 / 7,
        "reward_std": statistics.pstdev(judged),
        "reward_tens": 4 / 7,
        "reward_twos": 1 / 8,
        "kl": kl,
        "entropy": entropy,
        "explained_variance": 1 - errors.var(correction=0) / returns.var(correction=0),
        "zero_variance": 1 / 2,
        "unscored": 1 / 8,
        "length": sum(map(len, data.sampled_logps)) / 8,
        "stopped": sum(data.stopped.tolist()) / 8,
        "kl_coef": run.config.init_kl_coef,
    }
    assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-4)


def test_equal_rewards_teach_nothing(tokenizer, tmp_path):
    for algorithm in ("grpo", "rloo"):

        def same(prompts, completions, **_):
            return [0.7] * len(completions)

        run, rows = make_run(
            tokenizer, tmp_path, functions={"same": same}, algorithm=algorithm, weight_decay=0.0
        )
        data, before = rolled(run, rows), trpo.flatten(run.parameters).clone()
        assert (
            data.advantages.abs().max() < 1e-6 and rollout_metrics(run, data)["zero_variance"] == 1
        )
        if algorithm == "rloo":
            update(run, data)
            assert (trpo.flatten(run.parameters) - before).abs().max() < 1e-3


# -- TRPO ------------------------------------------------------------------------------------------


def test_all_weights_train_against_a_frozen_copy(tokenizer, tmp_path):
    run, rows = make_run(tokenizer, tmp_path, lora_r=0, algorithm="grpo", learning_rate=1e-2)
    data = rolled(run, rows)

    def seen(**options):
        return completion_outputs(run, data, **options).logps.detach()

    policy, reference = seen(), seen(reference=True)
    assert torch.equal(policy, reference)
    update(run, data)
    assert torch.equal(seen(reference=True), reference) and not torch.allclose(
        seen(), policy, atol=1e-3
    )


@pytest.mark.parametrize("algorithm", ("ppo", "a2c", "grpo", "rloo"))
def test_its_coefficient_raises_the_entropy(tokenizer, tmp_path, algorithm):
    """With nothing else to learn: equal rewards, or with a critic none, and no KL."""
    reward = 1.0 if algorithm in ("grpo", "rloo") else 0.0
    run, rows = make_run(
        tokenizer,
        tmp_path,
        algorithm=algorithm,
        entropy_coef=1.0,
        init_kl_coef=0,
        learning_rate=1e-2,
        functions={"equal": lambda prompts, completions, **_: [reward] * len(completions)},
    )
    with torch.no_grad():  # a model that is less sure of itself would have nothing left to gain
        run.model.get_output_embeddings().weight.mul_(20)
    data = rolled(run, rows)

    def entropy():
        return completion_outputs(run, data, "entropy").entropy.sum().item()

    before = entropy()
    update(run, data)
    assert entropy() > before * 1.01


def mean_kl(run, data, old):
    dist = completion_outputs(run, data, "log_probs").log_probs.detach()
    return float(exact_kl(old, dist).mean())


def test_no_accepted_step_leaves_the_region(tokenizer, tmp_path):
    """200 updates on random advantages, from random policies: the KL is measured here, not taken
    from the recipe."""
    run, rows = make_run(
        tokenizer,
        tmp_path,
        algorithm="trpo",
        lora_r=0,
        cg_iterations=5,
        max_kl=0.02,
        cg_damping=1e-3,
        lr_scheduler_type="constant",
        generation_kwargs={"max_new_tokens": 3},
        batch_size=4,
        ppo_epochs=1,
    )
    accepted = []
    for step in range(200):
        run.step, generator = step, torch.Generator().manual_seed(step)
        if step % 20 == 0:
            for parameter in run.parameters:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        if step % 10 == 0:
            data = rolled(run, rows, seed=step)
        data.advantages = torch.randn(data.mask.shape, generator=generator) * data.mask
        with torch.no_grad():
            output = completion_outputs(run, data, "log_probs")
        data.old_logps = output.logps
        before = [parameter.detach().clone() for parameter in run.parameters]
        learnt = update(run, data)
        moved = mean_kl(run, data, output.log_probs)
        assert moved <= 0.02 and moved == pytest.approx(learnt["policy_kl"], abs=1e-5)
        if learnt["line_search"] < 0:
            assert all(
                torch.equal(old, new) for old, new in zip(before, run.parameters, strict=True)
            )
        else:
            accepted.append(moved)
            assert learnt["improvement"] > 0
    assert len(accepted) > 150 and sum(accepted) / len(accepted) > 0.002


def test_a_step_that_leaves_the_region_is_shortened(tokenizer, tmp_path, monkeypatch):
    """It begins three times as long as the curvature says: its KL is nine times too large."""
    options = dict(algorithm="trpo", lora_r=0, max_kl=0.02, cg_damping=1e-3)
    run, rows = make_run(tokenizer, tmp_path, **options)
    data, inner = rolled(run, rows), trpo.natural_gradient
    with torch.no_grad():
        old = completion_outputs(run, data, "log_probs").log_probs

    def flatter(*args):
        direction, curvature = inner(*args)
        return direction, curvature / 9

    monkeypatch.setattr(trpo, "natural_gradient", flatter)
    learnt = update(run, data)
    assert learnt["line_search"] > 1 and 0.002 < mean_kl(run, data, old) <= 0.02


def test_a_rejected_step_restores_the_weights_bitwise(tokenizer, tmp_path, monkeypatch):
    run, rows = make_run(tokenizer, tmp_path, algorithm="trpo", max_kl=0.02)
    data, before = rolled(run, rows), [parameter.detach().clone() for parameter in run.parameters]
    solve = trpo.conjugate_gradient
    monkeypatch.setattr(
        trpo, "conjugate_gradient", lambda *args: -solve(*args)
    )  # downhill: nothing improves
    learnt = update(run, data)
    assert learnt["line_search"] == -1 and learnt["policy_kl"] == 0
    assert all(torch.equal(old, new) for old, new in zip(before, run.parameters, strict=True))
    monkeypatch.setattr(trpo, "conjugate_gradient", lambda *args: solve(*args) * float("nan"))
    update(run, data)
    assert all(torch.equal(old, new) for old, new in zip(before, run.parameters, strict=True))


def test_a_weight_that_no_token_uses_stays_and_changes_no_step(tokenizer, tmp_path):
    """Such as that of an expert that is not chosen, or of a layer behind the last hidden state."""
    steps = []
    for name in ("used", "unused"):
        run, rows = make_run(tokenizer, tmp_path / name, algorithm="trpo", lora_r=0, max_kl=0.02)
        unused = torch.nn.Parameter(torch.ones(3))
        if name == "unused":
            run.parameters = [*run.parameters, unused]
        learnt = update(run, rolled(run, rows))
        assert learnt["line_search"] >= 0 and torch.equal(unused, torch.ones(3))
        steps.append(trpo.flatten(run.model.parameters()).detach())
    assert torch.allclose(*steps, rtol=1e-5, atol=1e-7)


def test_the_longest_step_is_as_long_as_the_region(tokenizer, tmp_path, monkeypatch):
    """To second order, and annealed; what the damping leaves of it is measured as a KL here."""
    run, rows = make_run(
        tokenizer, tmp_path, algorithm="trpo", lora_r=0, max_kl=0.04, cg_damping=0.01
    )
    data, damping, max_kl = rolled(run, rows), 0.01, 0.02
    run.step = 1  # the second of two steps of a linear schedule: half of max_kl is left
    with torch.no_grad():
        old = completion_outputs(run, data, "log_probs").log_probs
    tried, set_parameters = [], trpo.set_parameters

    def record(parameters, vector):
        tried.append(vector)
        set_parameters(parameters, vector)

    monkeypatch.setattr(trpo, "set_parameters", record)
    start = trpo.flatten(run.parameters).detach().clone()
    update(run, data)
    step = 0.1 * (tried[0] - start)  # short enough for the second order to be all there is
    set_parameters(run.parameters, start + step)
    damped = damping / 2 * float(step @ step)
    assert mean_kl(run, data, old) + damped == pytest.approx(0.1**2 * max_kl, rel=0.05)


# -- the closed form -------------------------------------------------------------------------------

WORDS = ["<eos>", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def words():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<eos>")
    )
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for m in messages %}{{ m['content'] }} "
        "{% if m['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<eos>", pad_token="<eos>", chat_template=template
    )


ANSWERS = {  # all there are within so many tokens
    1: [[token] for token in range(5)],
    2: [[0]] + [[first, second] for first in range(1, 5) for second in range(5)],
}
BETA = 0.4


@torch.no_grad()
def distribution(model, prompt, answers):
    """Log-probabilities of the answers to a prompt."""
    rows = [prompt + answer + [0] * (2 - len(answer)) for answer in answers]
    logps = model(input_ids=torch.tensor(rows)).logits.double().log_softmax(-1)
    return torch.stack(
        [
            sum(logps[n, len(prompt) - 1 + t, token] for t, token in enumerate(answer))
            for n, answer in enumerate(answers)
        ]
    )


def distance_to_the_optimum(words, tmp_path, steps=150, tokens=2, **options):
    """Mean KL(pi || pi*) over the prompts after training by the recipe, pi* = pi_ref exp(r / beta)
    / Z."""
    model = make_model(words, hidden_size=32, intermediate_size=64)
    asked = ["a b", "c d", "d a d"]  # a repeated single token would look the same at each place
    generator = torch.Generator().manual_seed(5)
    rewards = {
        (text, words.decode(answer, skip_special_tokens=True)): float(
            torch.rand((), generator=generator)
        )
        for text in asked
        for answer in ANSWERS[tokens]
    }

    def table(prompts, completions, **_):
        return [
            rewards[p[0]["content"], text.strip()]
            for p, text in zip(prompts, completions, strict=True)
        ]

    rows = [{"prompt": [{"role": "user", "content": text}], "columns": {}} for text in asked]
    settings = config(
        tmp_path,
        lora_r=0,
        init_kl_coef=BETA,
        num_training_steps=steps,
        generation_kwargs={"max_new_tokens": tokens},
        **dict(batch_size=384, learning_rate=3e-3) | options,
    )
    optima = []
    for text in asked:
        reference = distribution(model, words(text).input_ids, ANSWERS[tokens])
        assert reference.exp().sum() == pytest.approx(1, abs=1e-6)
        scores = torch.tensor(
            [
                rewards[text, words.decode(answer, skip_special_tokens=True)]
                for answer in ANSWERS[tokens]
            ],
            dtype=torch.float64,
        )
        optima.append((reference + scores / BETA).log_softmax(0))
    (tmp_path / "out").mkdir(exist_ok=True)

    def policies():
        return (
            distribution(model.eval(), words(text).input_ids, ANSWERS[tokens]) for text in asked
        )

    def apart():
        return (
            sum(
                float(exact_kl(policy[None], best[None]))
                for policy, best in zip(policies(), optima, strict=True)
            )
            / 3
        )

    before = apart()
    page_of(settings).train(settings, model, words, rows, [], {"table": table})
    return before, apart()


CLOSED = {
    "ppo": dict(gae_lambda=1.0, ppo_epochs=2),
    "a2c": dict(gae_lambda=1.0),
    "trpo": dict(gae_lambda=1.0, learning_rate=None, max_kl=0.04, steps=100, mini_batch_size=192),
    "grpo": dict(num_generations=32, scale_rewards=False),
    "rloo": dict(num_generations=32),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_reaches_the_closed_form(words, tmp_path, algorithm):
    before, after = distance_to_the_optimum(
        words, tmp_path, algorithm=algorithm, **CLOSED[algorithm]
    )
    print(f"{algorithm}: KL to pi_ref exp(r/beta)/Z {before:.4f} -> {after:.5f}")
    assert before > 0.1 and after < 1e-2


def test_dividing_by_the_standard_deviation_moves_the_optimum(words, tmp_path):
    """With the KL in the loss, as in GRPO's paper; with it in the reward, the advantages vanish at
    the optimum anyway."""
    options = dict(tokens=1, algorithm="grpo", num_generations=32, kl_in="loss", kl_penalty="k3")
    before, plain = distance_to_the_optimum(words, tmp_path, scale_rewards=False, **options)
    _, divided = distance_to_the_optimum(words, tmp_path, **options)
    print(
        f"grpo, KL in the loss: {before:.4f} -> {plain:.5f}; "
        f"divided by the group's standard deviation -> {divided:.4f}"
    )
    assert plain < 1e-2 and divided > 5e-2


# -- rewards ---------------------------------------------------------------------------------------


def rewarded(config, completions, columns=(), functions=None):
    columns = columns or [{}] * len(completions)
    rows = [
        {"prompt": [{"role": "user", "content": f"ask {n}"}], "columns": row}
        for n, row in enumerate(columns)
    ]
    return core.rewards.score_completions(
        config, functions or core.rewards.start_reward_functions(config), rows, completions
    )


def test_built_in_verifiers(tmp_path):
    settings = config(
        tmp_path,
        reward=["numeric", "exact", "regex", "format", "length"],
        reward_pattern=r"is \d+",
        reward_length=4,
        reward_weights=[1, 0, 2, 0, 0.5],
    )
    answers = [{"answer": "She thinks. #### 72"}, {"answer": "0.5"}, {"answer": "7"}, {"answer": 7}]
    found = rewarded(settings, ["So the answer is 72", r"$\frac{1}{2}$", "7", "is 8"], answers)
    assert found.tolist() == [[1, 0, 1, 0, 0.75], [1, 0, 0, 0, 1], [1, 1, 0, 0, 1], [0, 0, 1, 1, 1]]
    assert core.rewards.weighted_total(settings, found).tolist() == [1 + 2 + 0.375, 1.5, 1.5, 2.5]


def test_no_process_stays_behind(model_dir, tmp_path):
    settings = config(
        tmp_path,
        model_name_or_path=model_dir,
        prompt_dataset_path=write_prompts(tmp_path),
        num_training_steps=1,
    )
    stage = stage_of(settings)
    stage.check()
    process = stage.functions["length"].process
    assert process.poll() is None
    assert stage.execute().success and process.poll() is not None


def test_rows_without_an_answer_to_compare_with_are_left_out(tmp_path, caplog):
    rows = [{"question": f"{n}?", "answer": None if n == 5 else str(n)} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = stage_of(
        config(
            tmp_path,
            reward=["numeric"],
            reward_length=0,
            prompt_dataset_path=str(tmp_path / "data.jsonl"),
        )
    )
    stage.check()
    assert (
        sum(map(len, stage.data)) == 11
        and "1 of 12 rows left out: 1 without an answer" in caplog.text
    )
    stage.functions["numeric"].stop()


def test_a_verifier_that_hangs_is_killed_and_its_row_is_shown(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "def wait(prompts, completions, **_):\n"
        "    time.sleep(60 * ('slow' in completions))\n"
        "    return [1.0] * len(completions)\n"
    )
    reward = f"{tmp_path}/mine.py:wait"
    settings = config(tmp_path, reward=[reward], reward_length=0, reward_timeout=3)
    with pytest.raises(RuntimeError, match="no answer within 3 s") as stopped:
        rewarded(settings, ["a", "slow", "b"])
    assert '"slow"' in str(stopped.value) and "ask 1" in str(stopped.value)
    settings.on_reward_error = "skip"
    found = rewarded(settings, ["a", "slow", "b"])[:, 0]
    assert found[0] == 1 and found[1].isnan() and found[2] == 1  # left out, never 0


def test_functions_of_a_file(tmp_path, caplog):
    file = tmp_path / "mine.py"
    file.write_text(
        "calls = []\ndef judge(prompts, completions, level, **columns):\n"
        "    print('noise')\n    calls.append(1)\n"
        "    if 'bad' in completions:\n        raise ValueError('I cannot read bad')\n"
        "    return [None if text == 'none' else\n"
        "            len(text) + n + len(calls) * 0 + ('ask' in p[0]['content'])\n"
        "            for p, text, n in zip(prompts, completions, level)]\n"
        "def short(prompts, completions, **columns):\n    return [1.0]\n"
        "def named(prompts, completions, **columns):\n"
        "    return {n: 0.0 for n in range(len(completions))}\n"
        "def much(prompts, completions, **columns):\n    return [float('inf')] * len(completions)\n"
        "def loud(prompts, completions, **columns):\n"
        "    import os\n    os.write(1, b'noise\\n')\n    return [1.0]\n"
    )
    for name, words in (
        ("short", "must return a list of 2 numbers or None"),
        ("named", "must return a list of 2 numbers or None, not {'0': 0.0"),
        ("much", "a reward is infinite"),
    ):
        with pytest.raises(RuntimeError, match=words):
            rewarded(config(tmp_path, reward=[f"{file}:{name}"], reward_length=0), ["a", "b"])
    assert rewarded(config(tmp_path, reward=[f"{file}:loud"], reward_length=0), ["a"]).tolist() == [
        [1.0]
    ]
    settings = config(tmp_path, reward=[f"{file}:judge"], reward_length=0)
    settings.validate()
    levels = [{"level": 10, "other": "x", "self": 1}] * 3
    found = rewarded(settings, ["ab", "none", "c"], levels)[:, 0]
    assert found[0] == 13 and found[1].isnan() and found[2] == 12
    with pytest.raises(RuntimeError, match=r"I cannot read bad.*ask 1.*on_reward_error=skip"):
        rewarded(settings, ["ab", "bad", "c"], levels)
    settings.on_reward_error = "skip"
    with caplog.at_level("WARNING"):
        found = rewarded(settings, ["ab", "bad", "c"], levels)[:, 0]
    assert found[0] == 13 and found[1].isnan() and found[2] == 12 and "bad" in caplog.text
    with pytest.raises(RuntimeError, match="1 rewards for 3 completions|short"):
        rewarded(
            config(tmp_path, reward=[f"{file}:short"], reward_length=0),
            ["a", "b", "c"],
            levels,
            {"short": lambda prompts, completions, **_: []},
        )
    for spec, words in ((f"{file}:jugde", "jugde"), (f"{tmp_path}/none.py:judge", "No such file")):
        with pytest.raises(ConfigError, match=words):
            core.function_process.Subprocess(spec, 5).start()


def test_options_of_older_files_that_change_nothing_are_accepted():
    older = dict(algorithm="grpo", gamma="1.0", num_generations=None, ppo_epochs=None, max_kl=None)
    page, options, notes = rl.RLStage.resolve(older | {"clip_range": 0.1})
    assert page is grpo.GRPOStage and not notes
    assert options == {"clip_range": 0.1, "num_generations": None, "ppo_epochs": None}
    config = page_config("grpo", model="m", data="d", **options)
    assert (config.num_generations, config.ppo_epochs) == (4, 1)
    with pytest.raises(ConfigError, match="gamma='x': input should be"):
        rl.RLStage.resolve(older | {"gamma": "x"})
    notes = rl.RLStage.resolve(older | {"gamma": 0.9})[-1]
    assert notes == ["gamma has no effect with algorithm=grpo; it belongs to ppo, a2c, trpo"]


def test_the_process_of_a_verifier_prints_no_warnings_of_its_library(capfd):
    check = core.function_process.Subprocess(core.rewards.REWARDS["numeric"][0], 60)
    try:
        assert check([None], ["It is 4."], answer=["4"]) == [1.0]
    finally:
        check.stop()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind, labels", [("regression", 1), ("classification", 2)])
def test_a_reward_model_scores_what_it_would_alone(tokenizer, tmp_path, kind, labels):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    judge = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            num_labels=labels,
            pad_token_id=1,
            **sizes,
        )
    )
    judge.save_pretrained(tmp_path / "judge")
    padded = copy.deepcopy(tokenizer)  # its texts end in what is its padding token too
    padded.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|endoftext|>")
    padded.save_pretrained(tmp_path / "judge")
    settings = config(
        tmp_path,
        reward=[],
        reward_length=0,
        reward_model_path=str(tmp_path / "judge"),
        reward_model_type=kind,
    )
    settings.validate()
    core.rewards.check_reward_model(settings.reward_model_path)
    found = rewarded(
        settings,
        ["Yes.", "No, and a longer one."],
        functions={"reward_model": core.rewards.load_reward_model(settings)},
    )[:, 0]
    for n, text in enumerate(("Yes.", "No, and a longer one.")):
        chat = f"<|im_start|>user\nask {n}<|endoftext|><|im_start|>assistant\n{text}<|endoftext|>"
        logits = judge(input_ids=torch.tensor([tokenizer(chat).input_ids])).logits[0]
        assert float(found[n]) == pytest.approx(
            float(logits[0] if labels == 1 else logits.softmax(0)[1]), abs=1e-5
        )
    with pytest.raises(RuntimeError, match="longer than the reward model's 64 tokens"):
        rewarded(
            settings,
            ["so " * 60],
            functions={"reward_model": core.rewards.load_reward_model(settings)},
        )
    other = config(
        tmp_path,
        reward=[],
        reward_length=0,
        reward_model_path=str(tmp_path / "judge"),
        reward_model_type="classification" if labels == 1 else "regression",
    )
    with pytest.raises(ConfigError, match=f"it has {labels} labels"):
        core.rewards.load_reward_model(other)


def test_a_reward_model_without_a_trained_head_is_refused(model_dir):
    with pytest.raises(
        ConfigError, match="LlamaForCausalLM, not a reward model; train one with recipes/reward.py"
    ):
        core.rewards.check_reward_model(model_dir)
    with pytest.raises(ConfigError, match="not the folder of a model"):
        core.rewards.check_reward_model("nowhere")


def test_a_reward_model_in_a_pickle_is_refused(tokenizer, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    judge = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_labels=1,
        )
    )
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    torch.save(judge.state_dict(), tmp_path / "judge/pytorch_model.bin")
    (tmp_path / "judge/model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        core.rewards.load_reward_model(
            config(tmp_path, reward=[], reward_length=0, reward_model_path=str(tmp_path / "judge"))
        )


# -- training --------------------------------------------------------------------------------------


def steps_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: value
            for name, value in line.items()
            if not name.startswith(("seconds", "completions_per"))
        }
        for line in lines
    ]


def write_prompts(tmp_path, count=12):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question": f"Say {'x' * (n % 5)} {n}?", "answer": str(n)}) + "\n"
            for n in range(count)
        )
    )
    return str(path)


def short_run(model_dir, tmp_path):
    """The options of two steps on a model and prompts that are there."""
    files = dict(model_name_or_path=model_dir, prompt_dataset_path=write_prompts(tmp_path))
    return TWO_STEPS | files | dict(reward_length=1)


@pytest.mark.parametrize(
    "algorithm, more",
    [
        *((algorithm, {}) for algorithm in ALGORITHMS),
        ("grpo", {"optim": "adamw_8bit", "lora_r": 64}),
        ("ppo", {"optim": "muon"}),
        # Options of one page alone.
        ("a2c", {"whiten_rewards": True, "value_learning_rate": 1e-2, "entropy_coef": 0.1}),
        ("ppo", {"ppo_epochs": 3, "mini_batch_size": 4, "max_kl": 0.5, "clip_range_value": 0.1}),
        ("trpo", {"critic_epochs": 2, "cg_damping": 0.2, "max_kl": 0.02}),
        (
            "grpo",
            {"ppo_epochs": 3, "num_generations": 2, "mini_batch_size": 2, "scale_rewards": False},
        ),
        ("rloo", {"ppo_epochs": 3, "num_generations": 2, "mini_batch_size": 2, "clip_range": 0.1}),
    ],
)
def test_a_run_that_was_cut_off_goes_on_exactly(model_dir, tmp_path, algorithm, more):
    """8-bit optimizers quantize the states of 4096 weights and more, and nest them."""
    values = short_run(model_dir, tmp_path) | dict(
        num_training_steps=4,
        save_freq=2,
        algorithm=algorithm,
        target_kl=0.01,
        validation_split=0.2,
        kl_horizon=50,
        seed=3,
        **more,
    )
    whole = stage_of(page_config(**values, output_dir=str(tmp_path / "whole"))).execute()
    cut = stage_of(page_config(**values, output_dir=str(tmp_path / "cut")))
    keep, rl_run.save_checkpoint = (
        rl_run.save_checkpoint,
        lambda *state, **more: (keep(*state, **more), 1 / 0),
    )
    try:
        assert not cut.execute().success
    finally:
        rl_run.save_checkpoint = keep
    assert (tmp_path / "cut/checkpoints/checkpoint-2").is_dir()
    again = stage_of(
        page_config(**values, output_dir=str(tmp_path / "cut"), resume_from_checkpoint=True)
    ).execute()
    assert whole.success and again.success, (whole.error_message, again.error_message)
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "cut")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    curve = [step for step in steps_of(tmp_path / "whole") if "kl" in step]
    assert all(step["kl"] > 0 for step in curve[1:]), "nothing was learnt, so nothing is compared"
    before = {name for name in whole.metrics if name.endswith("_before")}
    assert before and all(again.metrics[name] == whole.metrics[name] for name in before)
    assert len({step["kl_coef"] for step in steps_of(tmp_path / "whole") if "kl_coef" in step}) > 1
    samples = [
        json.loads(line) for line in (tmp_path / "whole/samples.jsonl").read_text().splitlines()
    ]
    assert (tmp_path / "cut/samples.jsonl").read_text() == (
        tmp_path / "whole/samples.jsonl"
    ).read_text()
    assert {sample["step"] for sample in samples} == {0, 4} and samples[0].keys() >= {
        "prompt",
        "completion",
        "reward",
        "answer",
    }
    assert whole.metrics["eval_reward_before"] is not None and "eval_reward" in whole.metrics


def test_a_reward_is_named_once():
    with pytest.raises(ConfigError, match="names a function twice; change its weight"):
        page_config(
            model_name_or_path="m",
            prompt_dataset_path="d",
            reward=["length", "length"],
            reward_length=2,
            reward_weights=[1, 2],
        ).validate()


def test_the_figures_of_a_step(model_dir, tmp_path):
    values = dict(
        model_name_or_path=model_dir,
        prompt_dataset_path=write_prompts(tmp_path),
        reward=["length", "regex"],
        reward_length=3,
        reward_pattern="a",
        batch_size=8,
        generation_kwargs={"max_new_tokens": 6},
        num_training_steps=1,
        save_freq=0,
        num_generations=2,
    )
    result = stage_of(page_config(**values, output_dir=str(tmp_path / "out"))).execute()
    assert result.success, result.error_message
    step = next(line for line in steps_of(tmp_path / "out") if "reward" in line)
    assert {*step} >= {
        "reward",
        "reward_std",
        "reward_length",
        "reward_regex",
        "kl",
        "entropy",
        "ratio",
        "clip_fraction",
        "explained_variance",
        "length",
        "stopped",
        "zero_variance",
        "policy_kl",
        "kl_coef",
        "value_loss",
        "policy_loss",
        "epochs",
    }
    assert step["kl"] == 0 and 0 < step["entropy"] <= math.log(400) and step["length"] <= 6


def test_a_small_task_is_learnt(model_dir, tmp_path):
    """To stop at once: the shortest completions are the best."""
    brevity = tmp_path / "brevity.py"
    brevity.write_text(
        "def brevity(prompts, completions, **_):\n"
        "    return [-float(len(text)) for text in completions]\n"
    )
    values = dict(
        model_name_or_path=model_dir,
        prompt_dataset_path=write_prompts(tmp_path),
        reward=[f"{brevity}:brevity"],
        batch_size=32,
        generation_kwargs={"max_new_tokens": 8},
        num_training_steps=40,
        save_freq=0,
        init_kl_coef=0.0,
        learning_rate=3e-3,
        lora_r=0,
        algorithm="grpo",
        validation_split=0.25,
    )
    result = stage_of(page_config(**values, output_dir=str(tmp_path / "out"))).execute()
    assert result.success, result.error_message
    assert (
        result.metrics["eval_reward"] > result.metrics["eval_reward_before"] + 3
        and "reward" not in result.metrics
    )
    sampled = [
        row["reward"]
        for row in map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
        if "reward" in row
    ]
    assert sampled[-1] > sampled[0] + 3


def test_recomputed_activations_change_nothing(model_dir, tmp_path):
    found = []
    for again in (False, True, 2):
        settings = config(
            tmp_path,
            model_name_or_path=model_dir,
            prompt_dataset_path=write_prompts(tmp_path),
            gradient_checkpointing=again,
            output_dir=str(tmp_path / str(again)),
            validation_split=0.2,
            algorithm="ppo",
        )
        result = stage_of(settings).execute()
        assert result.success, result.error_message
        found.append(steps_of(tmp_path / str(again)))
    for steps in zip(*found, strict=True):
        assert all(again == pytest.approx(steps[0], abs=1e-5, rel=1e-4) for again in steps[1:])


def test_two_processes_are_two_halves_of_one(model_dir, tmp_path):
    """Same rows, same random numbers, same curves and weights, whether one process takes the
    rollout or two."""
    algorithms, folders = {"ppo": {}, "grpo": {}, "trpo": {"cg_damping": 0.1}}, {}
    same = dict(
        model_name_or_path=model_dir,
        prompt_dataset_path=write_prompts(tmp_path),
        reward=["length"],
        reward_length=1,
        num_training_steps=3,
        save_freq=0,
        generation_kwargs={"max_new_tokens": 6},
        validation_split=0.2,
        num_generations=2,
    )
    for processes in (1, 2):
        folders[processes] = [tmp_path / f"{algorithm}{processes}" for algorithm in algorithms]
        runs = [
            same
            | own
            | {"algorithm": algorithm, "batch_size": 8 // processes, "output_dir": str(folder)}
            for (algorithm, own), folder in zip(algorithms.items(), folders[processes], strict=True)
        ]
        if processes == 1:
            assert all(stage_of(page_config(**options)).execute().success for options in runs)
    (tmp_path / "all.py").write_text(
        f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'recipes'), str(ROOT / 'tests')]}\n"
        "from core.runtime import exit_on_signals\nfrom test_rl import page_config, stage_of\n"
        "exit_on_signals()\n"
        f"assert all(stage_of(page_config(**options)).execute().success for options in {runs})\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(tmp_path / "all.py"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for one, two in zip(*folders.values(), strict=True):
        learnt = [step["kl"] for step in steps_of(one) if "kl" in step][1:]
        assert min(learnt) > 0, "nothing was learnt, so nothing is compared"
        for first, second in zip(steps_of(one), steps_of(two), strict=True):
            assert first == pytest.approx(second, abs=1e-4, rel=1e-3)


def test_no_step_follows_a_signal_that_came_during_an_evaluation(tokenizer, tmp_path, monkeypatch):
    run, rows = make_run(tokenizer, tmp_path, num_training_steps=3, eval_freq=1)
    run.evaluation_rows = rows
    saved = []
    monkeypatch.setattr(run, "save", lambda: saved.append(run.step))
    monkeypatch.setattr(run, "report", lambda metrics: metrics)

    def evaluate(run):
        if run.step == 1:
            run.signals.append(signal.SIGTERM)
        return {"eval_reward": 0.0}

    monkeypatch.setattr(rl_run, "evaluate", evaluate)
    steps = []
    for step in run.steps():
        steps.append(step)
        run.step += 1
    assert steps == [0] and saved == [1]


def test_in_a_chain_the_reward_model_of_an_earlier_stage_is_found(model_dir, tmp_path, monkeypatch):
    from chain import Pipeline

    monkeypatch.chdir(ROOT)
    stages = {
        "reward": dict(preference_dataset_path="examples/preferences.jsonl", max_steps=1, lora_r=4),
        "rl": dict(
            prompt_dataset_path="examples/questions.jsonl",
            reward_model_path="stage:reward",
            batch_size=4,
            num_training_steps=1,
            generation_kwargs={"max_new_tokens": 4},
            num_eval_prompts=4,
        ),
    }
    values = dict(
        model_name_or_path=model_dir,
        output_dir=str(tmp_path / "run"),
        stages=["reward", "rl"],
        stage_configs=stages,
    )
    assert Pipeline.from_dict(values, dry_run=True).run() == []
    first, second = Pipeline.from_dict(values).run()
    assert first.success and second.success and second.metrics["eval_reward"] != 0
    assert json.loads((tmp_path / "run/final/config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]


def test_bad_data_is_refused_before_the_model_is_loaded(tmp_path):
    path = tmp_path / "no_answers.jsonl"
    path.write_text('{"question": "a", "solution": "b"}\n')
    with pytest.raises(ConfigError, match="reward=numeric needs a column answer; found solution"):
        stage_of(
            config(
                tmp_path,
                reward=["numeric"],
                reward_length=0,
                prompt_dataset_path=str(path),
                validation_split=0,
            )
        ).check()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_step_says_how_far_sampling_is_from_training(model_dir, tmp_path, algorithm):
    values = short_run(model_dir, tmp_path) | {"algorithm": algorithm, "num_generations": 2}
    assert stage_of(page_config(**values, output_dir=str(tmp_path / "out"))).execute().success
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    gaps = [row["sampling_gap"] for row in map(json.loads, lines) if "sampling_gap" in row]
    assert len(gaps) == 2 and max(gaps) < 1e-5
    run = SimpleNamespace(model=torch.nn.Linear(1, 1))
    run.model.dtype = torch.float32
    rl_run.check_sampling_gap(run, 1e-4)
    with pytest.raises(RuntimeError, match="disagree on the log-probabilities by 0.01 nats"):
        rl_run.check_sampling_gap(run, 0.01)


def test_a_router_loss_that_rl_leaves_out_is_said(tokenizer, tmp_path, caplog):
    model = make_family("Mixtral", tokenizer)
    for asks in (False, True):
        caplog.clear()
        model.config.output_router_logits = asks
        settings = config(tmp_path, lora_r=0)
        rl_run.build_run(settings, model, tokenizer, {}, prompts(tokenizer, "a")[0])
        assert ("router loss" in caplog.text) == asks
