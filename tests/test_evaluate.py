"""evaluate.py: each figure by hand, its interval, and a stage that changes nothing."""

import json
import math

import dpo
import evaluate
import pytest
import torch
from conftest import make_model
from test_client import server  # noqa: F401 (a fixture)
from test_rlaif import verdict

import chain
import core.chat
import core.checks
import core.data
import core.statistics
from common import StageResult
from core.errors import ConfigError

QUESTIONS = [
    {"question": f"What is {n} + {m}?", "answer": str(n + m)} for n in range(3) for m in range(4)
]
PAIRS = [
    {"prompt": f"Say {n}", "chosen": "yes " * (1 + n % 3), "rejected": "no " * (1 + n % 2)}
    for n in range(6)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(tmp_path, **options):
    values = dict(
        model_name_or_path="tiny",
        dataset_name_or_path="data",
        output_dir=str(tmp_path / "out"),
        max_new_tokens=4,
    )
    settings = evaluate.EvaluateConfig(**values | options)
    settings.validate()
    return settings


def judged(tmp_path, model_dir, rows, **options):
    data = write(tmp_path / "data.jsonl", rows)
    result = evaluate.EvaluateStage(
        config(tmp_path, model_name_or_path=model_dir, dataset_name_or_path=data, **options)
    ).execute()
    assert result.success, result.error_message
    return result, [
        json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()
    ]


def saying(monkeypatch, *answers):
    """The models answer, one after the other, what is in these lists; the last one goes on."""
    given = list(answers)
    monkeypatch.setattr(
        evaluate,
        "generate",
        lambda model, tokenizer, prompts, *_: [
            (text, True) for text in (given.pop(0) if len(given) > 1 else given[0])
        ],
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(feedback_model_path="judge"), "name the other one with baseline"),
        (dict(reward=["numerc"]), "did you mean 'numeric'"),
        (dict(model_name_or_path=""), "model_name_or_path is missing"),
        (dict(dataset_name_or_path=""), "dataset_name_or_path is missing"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            dict(baseline="x", constitution=["Be kind."]),
            "constitution has no effect without feedback_model_path",
        ),
        (dict(max_calls=3), "max_calls has no effect"),
    ],
)
def test_options_that_the_others_leave_without_effect_are_noted(tmp_path, options, words):
    notes = config(tmp_path, **options).notes
    assert any(words in note for note in notes), notes


@pytest.mark.parametrize(
    "row, form, prompt, answers",
    [
        ({"question": "3 pm?", "answer": "15:00"}, "question-answer", "3 pm?", ["15:00"]),
        ({"instruction": "Add", "input": "3 4", "output": "7"}, "alpaca", "Add\n\n3 4", ["7"]),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "prompt-chosen-rejected",
            "a",
            ["b", "c"],
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "messages",
            "a",
            ["b"],
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", "a", []),
        ({"prompt": "a", "answer": "7"}, "prompt", "a", []),
        ({"instruction": "a", "input": "b"}, "instruction", "a\n\nb", []),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired", "a", ["b"]),
        ({"prompt": "a", "completion": "b", "label": False}, "unpaired", "a", []),
    ],
)
def test_every_format_becomes_a_prompt_with_its_answers(row, form, prompt, answers):
    optional = evaluate.OPTIONAL_COLUMNS
    assert core.columns.detect_format([*row], evaluate.FORMATS, optional=optional) == form
    found = evaluate.convert(row, form)
    assert [turn["content"] for turn in found["prompt"]] == [prompt]
    assert [side[0]["content"] for side in found["answers"]] == answers
    assert found["columns"].get("answer") == (
        row.get("answer") or (answers[0] if len(answers) == 1 else None)
    )


def test_log_probabilities_are_those_of_a_pass_of_its_own(model, tokenizer):
    """Batched by length and padded: the sum over the answer's tokens, its stop token included."""
    rows = [
        evaluate.encode(evaluate.convert(row, "prompt-chosen-rejected"), tokenizer, 512, 4)
        for row in PAIRS
    ]
    found = evaluate.answer_logps(model.eval(), rows, 3)
    for row, sides in zip(rows, found, strict=True):
        for chat, (logp, length) in zip(row["answers"], sides, strict=True):
            prompt, ((ids, labels),) = dpo.encode_answers(row["prompt"], [chat], tokenizer)
            logits = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
            alone = sum(
                logits[len(prompt) + t - 1, label].item()
                for t, label in enumerate(labels)
                if label != core.chat.IGNORE
            )
            assert (logp, length) == (
                pytest.approx(alone, abs=1e-4),
                sum(label != core.chat.IGNORE for label in labels),
            )


def test_perplexity_is_by_token_and_its_interval_holds_the_truth_in_95_of_100():
    assert evaluate.perplexity([-2.0, -8.0], [1, 4])["perplexity"] == pytest.approx(math.exp(2))
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(
        400
    ):  # longer answers are the more probable ones, a token: mean -1.5 and lengths go together
        lengths = torch.randint(1, 20, (60,), generator=generator)
        logps = -(lengths * 1.0 + 5.0 + torch.randn(60, generator=generator))
        found = evaluate.perplexity(logps.tolist(), lengths.tolist())
        inside += found["perplexity_low"] <= math.exp(1.0 + 5.0 / 10.0) <= found["perplexity_high"]
    assert 0.91 < inside / 400 < 0.985


def test_answers_are_compared_as_text_and_as_numbers(tmp_path, model_dir, monkeypatch):
    right = [row["answer"] for row in QUESTIONS]
    saying(
        monkeypatch,
        [text if n < 6 else f"It is {text}.0" if n < 9 else "100" for n, text in enumerate(right)],
    )
    result, samples = judged(tmp_path, model_dir, QUESTIONS)
    figures = result.metrics
    assert (figures["exact_match"], figures["exact_match_n"], figures["numeric_match"]) == (
        0.5,
        12,
        0.75,
    )
    low, high = core.statistics.confidence_interval([1.0] * 6 + [0.0] * 6)
    assert (figures["exact_match_low"], figures["exact_match_high"]) == (low, high)
    assert samples[7]["answer"] == f"It is {right[7]}.0" and (
        samples[7]["exact_match"],
        samples[7]["numeric_match"],
    ) == (0.0, 1.0)
    assert figures["perplexity"] > 1 and figures["perplexity_n"] == 12


@pytest.mark.parametrize(
    "text, yes",
    [
        ("7", True),
        ("1,234.50", True),
        ("so 3 of 4\n#### 72", True),
        (r"\frac{1}{2}", True),
        ("$12", True),
        ("x + 1", True),
        ("x", False),
        ("A", False),
        ("cancel the gym | Mon | 9:00 am", False),
        ("Paris", False),
        ("the 3rd of May", False),
    ],
)
def test_texts_with_a_number_in_them_are_no_numbers(text, yes):
    assert evaluate.is_number(text) is yes


def test_pairs_show_which_answer_is_the_more_probable(tmp_path, model_dir):
    pairs, turned = (
        PAIRS,
        [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS],
    )
    one, other = (
        judged(tmp_path, model_dir, rows)[0].metrics["ranking_accuracy"] for rows in (pairs, turned)
    )
    assert one + other == pytest.approx(1) and 0 <= one <= 1
    result, samples = judged(tmp_path, model_dir, pairs)
    assert "exact_match" not in result.metrics and len(samples) == 6


def test_rewards_have_a_mean_over_those_with_a_verdict(tmp_path, model_dir, monkeypatch, caplog):
    saying(monkeypatch, ["a"] * 3 + ["bbb"] * 3)
    path = tmp_path / "mine.py"
    path.write_text(
        "def f(prompts, completions, **_):\n"
        "    return [None if text == 'a' else len(text) for text in completions]\n"
    )
    result, samples = judged(
        tmp_path,
        model_dir,
        [{"prompt": f"Say {n}"} for n in range(6)],
        reward=[f"{path}:f", "length"],
        reward_length=1,
        reward_weights=[2, 1],
    )
    figures = result.metrics
    assert (figures["reward"], figures["reward_n"], figures["reward_length"]) == (7, 3, 1)
    assert samples[0]["reward"] is None and samples[4]["reward"] == 7
    assert "3 of 6 without a verdict" in caplog.text


def test_a_baseline_gets_every_figure_too_and_a_judge_compares(
    tmp_path,
    model_dir,
    tokenizer,
    monkeypatch,
    server,  # noqa: F811
):
    make_model(tokenizer, seed=1).save_pretrained(tmp_path / "old")
    tokenizer.save_pretrained(tmp_path / "old")
    saying(monkeypatch, ["old"] * 12, [f"new {n}" for n in range(12)])

    def reply(question, body):
        return verdict("A" if "new" in body["messages"][2]["content"] else "B")(question, body)

    server.reply = reply
    result, samples = judged(
        tmp_path,
        model_dir,
        QUESTIONS,
        baseline=str(tmp_path / "old"),
        feedback_model_type="api",
        feedback_model_path="judge",
        feedback_base_url=server.url,
    )
    figures = result.metrics
    assert (figures["win_rate"], figures["win_rate_n"], figures["win_rate_ties"]) == (1, 12, 0)
    assert (
        figures["perplexity_before"] != figures["perplexity"]
        and figures["perplexity_before_n"] == 12
    )
    assert (samples[3]["answer"], samples[3]["baseline"]["answer"], samples[3]["win"]) == (
        "new 3",
        "old",
        1,
    )
    assert set(core.statistics.before_and_after(figures)) == {
        "perplexity",
        "exact_match",
        "numeric_match",
        "stopped",
    }


def test_rows_that_do_not_fit_are_counted_and_samples_are_drawn_by_the_seed(
    tmp_path, model_dir, caplog
):
    rows = QUESTIONS + [
        {"question": "long " * 40, "answer": "1"},
        {"question": "a", "answer": "long " * 40},
    ]
    result, samples = judged(tmp_path, model_dir, rows, max_seq_length=80, num_eval_samples=5)
    assert (
        "2 of 14 rows left out: 1 whose prompt leaves no room for 4 tokens within 80; "
        "1 longer than 80 tokens" in caplog.text
    )
    assert result.metrics["perplexity_n"] == len(samples) == 5
    assert samples == judged(tmp_path, model_dir, rows, max_seq_length=80, num_eval_samples=5)[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_a_stage_it_hands_on_what_it_was_handed(tmp_path, model_dir, tokenizer, model, dtype):
    data = write(tmp_path / "data.jsonl", QUESTIONS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trains = [parameter.requires_grad for parameter in model.parameters()]
    settings = config(
        tmp_path, model_name_or_path="elsewhere", dataset_name_or_path=data, torch_dtype=dtype
    )
    result = evaluate.EvaluateStage(settings).execute(
        model, tokenizer, StageResult("sft", True, None, None)
    )
    assert (
        result.success
        and result.model is model
        and result.tokenizer is tokenizer
        and result.model_path is None
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert json.loads((tmp_path / "out/stage.json").read_text())["metrics"]["perplexity_n"] == 12


def test_in_a_chain_between_two_stages(tmp_path, model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "data.jsonl", QUESTIONS)
    results = chain.Pipeline.from_dict(
        {
            "model_name_or_path": model_dir,
            "output_dir": "out",
            "stages": ["evaluate", "sft", "evaluate"],
            "stage_configs": {
                "evaluate": {"dataset_name_or_path": data, "max_new_tokens": 4},
                "sft": {"dataset_name_or_path": data, "max_steps": 3, "learning_rate": 1e-2},
                "03_evaluate": {"baseline": model_dir},
            },
        }
    ).run()
    first, sft, last = results
    assert all(result.success for result in results)
    assert last.metrics["perplexity_before"] == pytest.approx(first.metrics["perplexity"], rel=1e-4)
    assert (
        last.metrics["perplexity"] < first.metrics["perplexity"]
        and last.model_path == sft.model_path
    )
    assert (tmp_path / "out/final/model.safetensors").exists()


def test_the_more_probable_answer_ranks_first_and_a_tie_is_half(tmp_path, model_dir, monkeypatch):
    logps = [
        [(-1.0, 3), (-2.0, 3)],
        [(-2.0, 3), (-1.0, 3)],
        [(-1.5, 3), (-1.5, 2)],
        [(-1.0, 9), (-2.0, 1)],
    ]
    monkeypatch.setattr(evaluate, "answer_logps", lambda *_: logps)
    result, _ = judged(tmp_path, model_dir, PAIRS[:4])
    assert result.metrics["ranking_accuracy"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)


def test_two_models_answer_the_same_prompts_though_one_has_room_for_fewer(
    tmp_path, model_dir, tokenizer
):
    make_model(tokenizer, seed=1, max_position_embeddings=64).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    rows = [
        {"question": f"q {n} " + "word " * (90 * (n in (0, 3))), "answer": str(n)} for n in range(8)
    ]
    result, samples = judged(tmp_path, model_dir, rows, baseline=str(tmp_path / "short"))
    assert [sample["expected"] for sample in samples] == ["1", "2", "4", "5", "6", "7"]
    assert result.metrics["stopped_n"] == result.metrics["stopped_before_n"] == 6
    alone, answers = judged(tmp_path, str(tmp_path / "short"), rows)
    assert [sample["baseline"]["answer"] for sample in samples] == [
        sample["answer"] for sample in answers
    ]


def test_what_cannot_be_scored_is_refused_before_a_model_is_loaded(tmp_path, model_dir, tokenizer):
    data = write(tmp_path / "data.jsonl", PAIRS)
    with pytest.raises(ConfigError, match="reward=numeric needs a column answer; found none"):
        evaluate.EvaluateStage(
            config(tmp_path, dataset_name_or_path=data, reward=["numeric"])
        ).check()
    stage = evaluate.EvaluateStage(
        config(
            tmp_path, model_name_or_path=model_dir, dataset_name_or_path=data, max_new_tokens=600
        )
    )
    stage.check()
    with pytest.raises(ConfigError, match="no room for 600 tokens within 512"):
        core.checks.check_encoded_rows(stage, tokenizer, 512)


def test_an_answer_beside_messages_is_the_expected_one_and_a_time_is_no_number():
    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is 7"}],
        "answer": "7",
    }
    assert evaluate.convert(row, "messages")["columns"]["answer"] == "7"
    numbers = ("7", "x #### 1/2", r"\frac{1}{2}", r"\\frac{1}{2}", r"\frac12", r"\\frac12")
    for text in numbers:
        assert evaluate.is_number(text), text
    for text in ("15:00", "A0", "2024-05-01"):
        assert not evaluate.is_number(text), text
