"""core/work.py, trials.py and estimates.py: what a dry run says of time, memory and disk space."""

import copy
import re

import pytest
import torch
from conftest import make_model

import core.estimates
import core.trials
from core.config import FitConfig, TrainingConfig
from core.estimates import count_memory, describe_range, estimate_cost
from core.trials import BytesInUse, PassMemory, Speed, line_through, memory_of_pass, training_model
from core.work import Answers, Work, estimate_fit


@pytest.fixture
def skeleton(tokenizer):
    with torch.device("meta"):
        return make_model(tokenizer, num_hidden_layers=6)


def work_of(**changes):
    values = dict(
        steps=10,
        passes=20,
        tokens=1000,
        forward_tokens=100,
        rows=4,
        length=50,
        share_scored=0.3,
    )
    return Work(**(values | changes))


# -- what a stage computes -------------------------------------------------------------------------


def test_the_work_of_a_fit_counts_steps_passes_and_tokens():
    config = FitConfig(
        num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    work = estimate_fit(config, ([0] * 20, []), [10] * 20, 0.5)
    assert (work.steps, work.passes, work.accumulates) == (6, 12, True)
    assert work.tokens == pytest.approx(2 * 20 * 10 * 1.1)
    assert (work.rows, work.length, work.forward_tokens) == (4, 10, 0)


def test_a_short_training_begins_with_the_longest_rows():
    config = FitConfig(max_steps=1, per_device_train_batch_size=2)
    work = estimate_fit(config, ([0] * 4, [0] * 2), [10, 10, 30, 30], 0.5)
    assert work.tokens == pytest.approx(60 * 1.1)
    # Evaluations before and after training.
    assert work.forward_tokens == pytest.approx(2 * 2 * 20 * 1.1)


# -- time ------------------------------------------------------------------------------------------


def test_seconds_add_up_and_short_answers_take_less():
    speed = Speed(1.0, 0.01, 0.001, 0.5, {8: (2.0, 0.1)}, "")
    answers = Answers(times=3, prompts=8, repeats=1, prompt_length=10, max_new_tokens=20)
    work = work_of(answers=[answers])
    expected = 20 * 1.0 + 1000 * 0.01 + 100 * 0.001 + 10 * 0.5 + 3 * (2 + 80 * 0.001 + 20 * 0.1)
    assert speed.seconds(work, 1.0) == pytest.approx(expected)
    assert speed.seconds(work, 0.5) == pytest.approx(expected - 3 * 10 * 0.1)


@pytest.mark.parametrize(
    "low, high, text",
    [
        (2.4, 9.2, "2 to 10 seconds"),
        (61, 150, "1.0 to 2.5 minutes"),
        (7000, 7300, "1.9 to 2.1 hours"),
    ],
)
def test_a_range_is_rounded_outwards(low, high, text):
    assert describe_range(low, high) == text


def test_a_line_through_noise_is_not_negative():
    assert line_through(2, 3.0, 6, 7.0) == (1.0, 1.0)
    assert line_through(2, 1.0, 6, 7.0) == (0.0, 1.5)
    assert line_through(2, 8.0, 6, 7.0) == (0.0, pytest.approx(7 / 6))


class OneStage:
    def __init__(self, config, **lineage):
        self.config, self.lineage = config, lineage


def costs_of(skeleton, work):
    """{label: text} on a stage of the default options."""
    config = TrainingConfig()
    return dict(estimate_cost(OneStage(config), training_model(config, skeleton), work))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"lora_r": 0}, {"gradient_checkpointing": 2}])
def test_a_pass_is_measured(skeleton, options, precision):
    config = TrainingConfig(torch_dtype=precision, **options)
    work = work_of(answers=[Answers(2, 2, 1, 10, 4)])
    state = torch.get_rng_state()
    lines = dict(estimate_cost(OneStage(config, judge={}), training_model(config, skeleton), work))
    assert list(lines) == ["time", "memory", "rests on"]
    assert lines["rests on"].startswith("a pass forward and backward over"), lines
    assert lines["rests on"].endswith("without the time and memory of judge")
    assert re.match(r"about [\d.]+ GB: Python and libraries", lines["memory"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.is_meta for weight in skeleton.parameters())


def test_a_model_that_is_too_slow_is_computed(skeleton, monkeypatch):
    monkeypatch.setattr(core.trials, "PASS_SECONDS", 0.0)
    monkeypatch.setattr(core.trials, "measure_model", pytest.fail)
    lines = costs_of(skeleton, work_of())
    assert "GFLOP/s of a matrix product" in lines["rests on"]
    assert lines["memory"].startswith("about")


def test_a_model_that_cannot_be_tried_ends_no_dry_run(skeleton, monkeypatch):
    def fail(*_):
        raise NotImplementedError("a kernel")

    monkeypatch.setattr(core.trials, "forward_pass", fail)
    lines = costs_of(skeleton, work_of())
    assert lines["memory"] == "not estimated: a pass cannot be tried, NotImplementedError"
    assert "matrix product" in lines["rests on"]


# -- memory ----------------------------------------------------------------------------------------


def test_bytes_in_use_are_those_of_new_tensors_that_live():
    with BytesInUse() as in_use:
        first = torch.zeros(100)
        view = first.view(10, 10)
        view.add_(1)
        second = first + 1  # 400 bytes more
        del first, view
        assert in_use.now == 400
        del second
    assert (in_use.now, in_use.peak) == (0, 800)


@pytest.mark.parametrize("options", [{}, {"lora_r": 0}, {"gradient_checkpointing": 1}])
def test_few_layers_tell_the_memory_of_all(skeleton, options):
    config = TrainingConfig(torch_dtype="float32", **options)
    model = training_model(config, skeleton)
    work = work_of()
    estimated = memory_of_pass(config, model, work)
    whole = core.trials.memory_of_layers(config, copy.deepcopy(model), work)
    assert estimated.held == pytest.approx(whole.held, rel=0.01)
    assert estimated.gradients == whole.gradients
    assert estimated.peak(False) == pytest.approx(whole.peak(False), rel=0.1)


def test_memory_without_data_is_that_of_a_real_pass(skeleton):
    config = TrainingConfig(torch_dtype="float32")
    model = training_model(config, skeleton)
    work = work_of(share_scored=1.0)
    real = copy.deepcopy(model)
    core.trials.fill(real, core.trials.random_values)
    with BytesInUse() as in_use:
        core.trials.forward_pass(real, config, 4, 50, 200).mean().backward()
    assert memory_of_pass(config, model, work).peak(False) == pytest.approx(in_use.peak, rel=0.1)


def test_at_the_peak_is_a_pass_or_the_writing_of_answers(skeleton):
    model = training_model(TrainingConfig(), skeleton)
    answers = Answers(times=1, prompts=2000, repeats=1, prompt_length=500, max_new_tokens=500)
    quiet = count_memory(TrainingConfig(), model, work_of())
    writing = count_memory(TrainingConfig(), model, work_of(answers=[answers]))
    assert writing["passes"] > 1e8 > quiet["passes"]
    if core.estimates.default_device().type == "cpu":
        assert writing["the heap"] < quiet["the heap"]


def test_memory_of_second_derivatives_is_said_to_be_missing(skeleton):
    work = work_of(differentiates_twice=True)
    lines = costs_of(skeleton, work)
    assert lines["memory"].endswith("second derivatives, which are not counted")


def test_gradients_of_earlier_passes_stay_in_memory():
    memory = PassMemory(held=5, gradients=3, passing=1)
    assert (memory.peak(accumulates=False), memory.peak(accumulates=True)) == (6, 9)
