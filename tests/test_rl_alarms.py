"""core/rl_alarms.py: alarms of an RL run are raised beyond chance, once each, with a remedy."""

from types import SimpleNamespace

import pytest
import torch
from test_rl import likely_to_stop, make_run, rolled, update

from core import rl_alarms
from core.rl_alarms import Alarms, equal_rewards


def raised(caplog, values, target_kl=None):
    """The alarms on rollouts with these {name: values of completions}."""
    run = SimpleNamespace(
        config=SimpleNamespace(target_kl=target_kl, sampling={"max_new_tokens": 64}),
        before={"entropy": 2.0},
        alarms=Alarms(),
    )
    rollouts = [values] if isinstance(values, dict) else values
    caplog.clear()
    with caplog.at_level("WARNING"):
        for of_rollout in rollouts:
            rl_alarms.raise_alarms(run, of_rollout)
    return [record.getMessage() for record in caplog.records]


def ones(count, of):
    return [1.0] * count + [0.0] * (of - count)


def spread(mean, of=32):
    """Values around a mean; their interval is mean +- 0.352 for 32 of them."""
    return [mean - 1.0, mean + 1.0] * (of // 2)


INTERVAL = 1.96 * 1.016 / 32**0.5  # of spread(), to each side


@pytest.mark.parametrize(
    "name, inside, outside, message",
    [
        (
            "kl",
            spread(20.0 + INTERVAL - 0.01),
            spread(20.0 + INTERVAL + 0.01),
            "the policy is leaving the reference: KL 20.4 nats per completion. "
            "Raise init_kl_coef, set target_kl, or lower learning_rate",
        ),
        (
            "entropy",
            [value / 10 for value in spread(2.0 - INTERVAL + 0.01)],
            [value / 10 for value in spread(2.0 - INTERVAL - 0.01)],
            "entropy has collapsed: 0.164 nats per token. "
            "Lower learning_rate, raise init_kl_coef or entropy_coef",
        ),
        (
            "equal",
            ones(59, of=64),
            ones(60, of=64),
            "60 of the last 64 prompts have completions of equal reward: nothing to learn from. "
            "Choose prompts neither too easy nor too hard, or raise num_generations",
        ),
        (
            "cut",
            ones(59, of=64),
            ones(60, of=64),
            "60 of the last 64 answers were cut at max_new_tokens=64; nothing is learned about "
            "stopping: raise it (generation_kwargs={max_new_tokens: 128}), or start from a model "
            "that answers briefly",
        ),
    ],
)
def test_an_alarm_is_raised_beyond_its_interval_once(caplog, name, inside, outside, message):
    assert raised(caplog, {name: inside}) == []
    assert raised(caplog, {name: outside}) == [message]
    assert raised(caplog, [{name: outside}] * 3) == [message]


@pytest.mark.parametrize(
    "name, worst, enough",
    [("kl", 99.0, 32), ("entropy", 0.0, 32), ("equal", 1.0, 22), ("cut", 1.0, 22)],
)
def test_few_values_raise_none(caplog, name, worst, enough):
    """However bad they are; those of several rollouts are counted together."""
    assert raised(caplog, {name: [worst] * (enough - 1)}) == []
    assert len(raised(caplog, {name: [worst] * enough})) == 1
    assert raised(caplog, [{name: [worst] * 7}] * 3) == []
    assert len(raised(caplog, [{name: [worst] * 8}] * 4)) == 1


def test_one_completion_far_out_is_no_alarm(caplog):
    """The estimator of the KL has a long tail."""
    assert raised(caplog, {"kl": [1e6] + [0.1] * 63}) == []


def test_old_values_are_forgotten(caplog):
    early, late = {"cut": [1.0] * 21}, {"cut": [0.0] * 64}
    assert raised(caplog, [early, late, early]) == []
    assert raised(caplog, [late, {"cut": [1.0] * 64}]) == [
        "all of the last 64 answers were cut at max_new_tokens=64; nothing is learned about "
        "stopping: raise it (generation_kwargs={max_new_tokens: 128}), or start from a model that "
        "answers briefly"
    ]


def test_a_kl_is_compared_with_its_target(caplog):
    values = {"kl": [3.0] * 32}
    assert raised(caplog, values) == []
    assert len(raised(caplog, values, target_kl=0.2)) == 1


def test_prompts_without_a_verdict_are_not_of_equal_reward():
    nan = float("nan")
    groups = torch.tensor([[1.0, 1.0], [1.0, 0.0], [nan, 1.0]])
    assert equal_rewards(groups).tolist() == [True, False, True]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_what_the_alarms_look_at_are_the_figures_of_the_completions(tokenizer, tmp_path, algorithm):
    def some(prompts, completions, **_):
        return [None if n < 4 else 1.0 for n in range(len(completions))]

    options = {"algorithm": algorithm, "num_generations": 4, "init_kl_coef": 0.1}
    run, rows = make_run(tokenizer, tmp_path, functions={"some": some}, **options)
    rollout = rolled(likely_to_stop(run), rows)
    update(run, rollout)
    values = rl_alarms.rollout_values(run, rollout)
    assert values["cut"] == [float(not stopped) for stopped in rollout.stopped.tolist()]
    assert 0 < sum(values["cut"]) < 8
    assert values["equal"] == [1.0]  # of the other prompt nothing is known
    for b in range(4):
        length = int(rollout.lengths[4 + b])
        mean_entropy = float(rollout.entropy[4 + b, :length].mean())
        assert values["entropy"][b] == pytest.approx(mean_entropy)
    assert len(values["entropy"]) == len(values["kl"]) == 4
    assert all(0 <= kl < 1e-4 for kl in values["kl"])  # the policy is at its start


def test_steps_without_a_verdict_are_counted_and_warned_of_once(tokenizer, tmp_path, caplog):
    def silent(prompts, completions, **_):
        return [None] * len(completions)

    run, rows = make_run(tokenizer, tmp_path, functions={"silent": silent}, algorithm="ppo")
    with caplog.at_level("WARNING"):
        for _ in range(3):
            update(run, rolled(run, rows))
        run.finish()
    first, total = [record.getMessage() for record in caplog.records]
    assert first.startswith("step 1 skipped: no completion was scored. ")
    assert total == "optimizer steps skipped because no completion was scored: 3"
