"""cot_distillation.py: which chains are kept, what the student learns, the divergence of TRL."""

import json
import math

import cot_distillation as cot
import pytest
import torch
from conftest import make_model
from test_client import CANARY, server  # noqa: F401 (a fixture)

import core.errors
import core.llm_client
from core import rationales
from core.errors import ConfigError
from core.function_process import AnswerChecker


def config(tmp_path, **options):
    values = dict(
        model_name_or_path="tiny",
        reasoning_dataset_path="data",
        output_dir=str(tmp_path / "out"),
        max_new_tokens=8,
        num_eval_samples=4,
        per_device_train_batch_size=2,
        max_steps=2,
        save_steps=0,
    )
    settings = cot.CoTConfig(**values | options)
    settings.validate()
    return settings


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# -- configuration and data ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (
            dict(distillation_type="both", teacher_model_type="api"),
            "needs teacher_model_type=local",
        ),
        (dict(cot_template="{answer} {rationale}"), "cot_template needs"),
        (dict(cot_template="{rationale} {answer}"), "then a marker"),
        (dict(generation_kwargs={"max_tokens": 3}), "did you mean 'max_new_tokens'"),
        (
            dict(eval_reasoning_tasks=["gsm8k"]),
            "no such file; tasks of the harness need: pip install lm-eval",
        ),
    ],
)
def test_bad_options_are_refused_with_the_remedy(tmp_path, options, words, monkeypatch):
    monkeypatch.setattr(cot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(alpha=0.3), "alpha has no effect with distillation_type=response"),
        (
            dict(distillation_type="logits", alpha=0.3),
            "alpha has no effect with distillation_type=logits",
        ),
        (dict(beta=0.3), "beta has no effect"),
        (
            dict(num_synthetic_examples=3),
            "num_synthetic_examples has no effect with generate_synthetic_data=false",
        ),
        (
            dict(generation_kwargs={"top_k": 5}, teacher_model_type="openai"),
            "top_k has no effect on a teacher behind a server",
        ),
    ],
)
def test_options_that_the_others_leave_without_effect_are_noted(tmp_path, options, words):
    notes = config(tmp_path, **options).notes
    assert any(words in note for note in notes), notes


@pytest.mark.parametrize(
    "form, row, wanted",
    [
        ("question", {"question": " Why? "}, ("Why?", None, None)),
        ("question-answer", {"question": "2+2?", "answer": "4"}, ("2+2?", None, "4")),
        (
            "question-answer",
            {"question": "2+2?", "answer": "2+2 = <<2+2=4>>4\n#### 4"},
            ("2+2?", "2+2 = 4", "4"),
        ),
        (
            "question-answer",
            {"question": "2+2?", "answer": r"So it is $\boxed{\frac{8}{2}}$."},
            ("2+2?", r"So it is $\boxed{\frac{8}{2}}$.", r"\frac{8}{2}"),
        ),
        (
            "question-answer",
            {"question": "2+2?", "answer": r"$\boxed{4}$"},
            ("2+2?", None, r"$\boxed{4}$"),
        ),
        (
            "question-rationale-answer",
            {"question": "q", "rationale": "r", "answer": "4"},
            ("q", "r", "4"),
        ),
        (
            "question-reasoning-answer",
            {"question": "q", "reasoning": "", "answer": "4"},
            ("q", None, "4"),
        ),
        (
            "problem-solution-answer",
            {"problem": "q", "solution": "r", "answer": 4},
            ("q", "r", "4"),
        ),
        ("prompt", {"prompt": "q"}, ("q", None, None)),
        (
            "instruction-output",
            {"instruction": "q", "output": "4", "input": "x"},
            ("q\n\nx", None, "4"),
        ),
    ],
)
def test_rows(form, row, wanted):
    found = cot.convert(row, form)
    assert (found["question"], found["rationale"], found["answer"]) == wanted


def test_rows_that_cannot_be_used():
    for row, words in (
        ({"question": " "}, "empty or missing question"),
        ({"question": "q", "rationale": "r", "answer": ""}, "no answer"),
    ):
        with pytest.raises(core.errors.RowError, match=words):
            cot.convert(row, "question-rationale-answer" if "rationale" in row else "question")


def test_types_select_rows_or_are_said(tmp_path, caplog):
    rows = [{"type": "time"}, {"type": "money"}, {"type": None}]
    assert [
        *cot.select_reasoning_types(config(tmp_path, reasoning_types=["money"]), rows, rows[:1])
    ] == [
        [{"type": "money"}],
        [],
    ]
    with pytest.raises(ConfigError, match="unknown type 'moneey'; did you mean 'money'"):
        cot.select_reasoning_types(config(tmp_path, reasoning_types=["moneey"]), rows)
    of_space = config(tmp_path, reasoning_types=["space"])
    assert cot.select_reasoning_types(of_space, rows) == (rows,)
    assert "reasoning_types=space has no effect: the data has time, money" in caplog.text
    assert (
        "by space reasoning"
        in rationales.rationale_prompt(config(tmp_path, reasoning_types=["space"]), "q")[0][
            "content"
        ]
    )


# -- what is kept ----------------------------------------------------------------------------------


def test_the_vote():
    assert (
        rationales.majority_vote(["4", "4", "5"]) == "4"
        and rationales.majority_vote([None, "4", "4"]) == "4"
    )
    for undecided in ([], [None], ["4"], ["4", "5"], ["4", "4", "5", "5"], [None, None]):
        assert rationales.majority_vote(undecided) is None


def chains(server, texts):  # noqa: F811
    """Let the server answer the nth question about q with the nth text, in the order of asking."""
    left = {question: list(answers) for question, answers in texts.items()}
    server.reply = lambda question, body: left[question.split("\n")[0]].pop(0)


def collected(server, tmp_path, rows, texts, **options):  # noqa: F811
    settings = config(
        tmp_path,
        teacher_model_type="api",
        teacher_base_url=server.url,
        teacher_model_path="big",
        concurrency=1,
        **options,
    )
    (tmp_path / "out").mkdir(exist_ok=True)
    chains(server, texts)
    teacher = core.llm_client.LLMClient(settings, "teacher", "big", "api", server.url)
    return rationales.collect_rationales(
        settings, teacher, [cot.convert(row, form) for row, form in rows]
    ), teacher


def test_only_chains_that_lead_to_the_answer_are_kept(server, tmp_path, caplog):  # noqa: F811
    caplog.set_level("INFO", "recipes")
    rows = [
        ({"question": "gold", "answer": "1,000"}, "question-answer"),
        ({"question": "none", "answer": "3"}, "question-answer"),
        ({"question": "vote"}, "question"),
        ({"question": "split"}, "question"),
        (
            {"question": "ready", "rationale": "as it is", "answer": "8"},
            "question-rationale-answer",
        ),
    ]
    kept, teacher = collected(
        server,
        tmp_path,
        rows,
        {
            "gold": [
                "Ten times 100.\n#### 1000",
                "ten  times 100.\n#### 1000",
                "Else.\n#### 1000.0",
                "Wrong.\n#### 100",
            ],
            "none": ["a\n#### 4", "b\n#### 5", "c\n#### 33", "Three is 3, so\n#### 2"],
            "vote": ["x\n#### 1/2", "y\n#### 0.5", "z\n#### 2", "no number"],
            "split": ["x\n#### 1", "y\n#### 1", "z\n#### 2", "w\n#### 2"],
        },
    )
    assert [(row["question"], row["rationale"]) for row in kept] == [
        ("ready", "as it is"),
        ("gold", "Ten times 100."),
        ("gold", "Else."),
        ("vote", "x"),
        ("vote", "y"),
    ]
    assert (
        "16 chains for 4 questions, 5 with the right answer, 4 of them distinct; "
        "2 questions (50%) have one" in caplog.text
    )
    assert teacher.figures["questions_with_rationale"] == 2


REASONED = {"content": "#### 7", "reasoning_content": "Hmm, 3 and 4."}
BOTH = {"content": "Three and four.\n#### 7", "reasoning": "Hmm, 3 and 4."}
INSIDE = {"content": "<think>\nHmm, 3 and 4. #### 99?\n</think>\n\nThree and four.\n#### 7"}
THOUGHTS = "Hmm, 3 and 4. #### 99?"


@pytest.mark.parametrize(
    "reply, source, rationale",
    [
        (REASONED, "auto", "Hmm, 3 and 4."),
        (REASONED, "answer", None),
        (REASONED, "reasoning", "Hmm, 3 and 4."),
        (REASONED, "both", "Hmm, 3 and 4."),
        (BOTH, "auto", "Three and four."),
        (BOTH, "answer", "Three and four."),
        (BOTH, "reasoning", "Hmm, 3 and 4."),
        (BOTH, "both", "Hmm, 3 and 4.\n\nThree and four."),
        (INSIDE, "auto", "Three and four."),
        (INSIDE, "reasoning", THOUGHTS),
        (INSIDE, "both", f"{THOUGHTS}\n\nThree and four."),
        ({"content": "7", "reasoning": "Hmm, 3 and 4."}, "auto", "Hmm, 3 and 4."),
        ({"content": "7"}, "auto", None),
        ({"content": "**#### 7**"}, "auto", None),
        ({"content": "Three and four.\n\n**#### 7**"}, "auto", "Three and four."),
        ({"content": "3 + 4 = 7"}, "auto", "3 + 4 = 7"),
        # The reasoning is right, and the answer is not.
        ({"content": "#### 8", "reasoning_content": "3 and 4 are 7.\n#### 7"}, "auto", None),
        ({"content": None, "reasoning_content": "3 and 4 are 7.\n#### 7"}, "auto", None),
        ({"content": "<think>3 and 4 are 7.\n#### 7"}, "auto", None),
    ],
)
def test_reasoning_is_learnt_by_option_and_never_by_accident(
    server,  # noqa: F811
    tmp_path,
    reply,
    source,
    rationale,
):
    rows = [
        ({"question": "3 + 4?", "answer": "7"}, "question-answer"),
        ({"question": "r", "rationale": "ready", "answer": "8"}, "question-rationale-answer"),
    ]
    options = dict(num_rationales=1, rationale_source=source)
    try:
        kept, _ = collected(server, tmp_path, rows, {"3 + 4?": [reply]}, **options)
    except core.llm_client.LLMClientError as error:
        assert "1 without an answer" in str(error) and rationale is None
        return
    learnt = [row["rationale"] for row in kept if row["question"] == "3 + 4?"]
    assert learnt == ([] if rationale is None else [rationale])


@pytest.mark.parametrize(
    "text, answer, is_alone",
    [
        ("7", "7", True),
        ("**7.**", "7", True),
        (r"\boxed{7}", "7", True),
        ("<answer>7</answer>", "7", True),
        ("The final answer is 1000.", "1,000", True),
        ("So the answer is Paris.", "paris", True),
        ("3 + 4 = 7", "7", False),
        ("Three and four make 7.", "7", False),
        ("Paris is in France", "Paris", False),
    ],
)
def test_an_answer_alone_has_no_steps(text, answer, is_alone):
    assert rationales.is_answer_alone(text, answer) is is_alone


@pytest.mark.parametrize(
    "text, finish, words",
    [
        ("#### 4", "stop", "2 answers are right, but without the steps to them"),
        ("We begin with 4", "length", "the token limit ended all 2 answers of the teacher"),
        ("I think\n#### 5", "stop", "no chain of the teacher leads to a right answer"),
    ],
)
def test_why_there_is_nothing_to_learn(server, tmp_path, text, finish, words):  # noqa: F811
    choice = {"message": {"content": text}, "finish_reason": finish}
    server.instead = {"choices": [choice]}
    rows = [({"question": "2 + 2?", "answer": "4"}, "question-answer")]
    with pytest.raises(RuntimeError, match=f"nothing to learn from: {words}"):
        collected(server, tmp_path, rows, {"2 + 2?": ["", ""]}, num_rationales=2)


def test_what_the_token_limit_ended_is_not_learnt(server, tmp_path, caplog):  # noqa: F811
    """A 42 may have become a 4."""
    rows = [
        ({"question": "2 + 2?", "answer": "4"}, "question-answer"),
        ({"question": "r", "rationale": "ready", "answer": "8"}, "question-rationale-answer"),
    ]
    message = {"content": "Two and two.\n#### 4"}
    server.instead = {"choices": [{"message": message, "finish_reason": "length"}]}
    kept, _ = collected(server, tmp_path, rows, {"2 + 2?": ["", ""]}, num_rationales=2)
    assert [row["rationale"] for row in kept] == ["ready"]
    assert "the 2 that the token limit ended are left out" in caplog.text


def test_exact_answers(server, tmp_path):  # noqa: F811
    kept, _ = collected(
        server,
        tmp_path,
        [
            ({"question": "capital", "answer": "Paris"}, "question-answer"),
            ({"question": "vote"}, "question"),
        ],
        {
            "capital": ["France.\n#### Paris", "#### paris", "b\n#### London"],
            "vote": ["a\n#### x", "b\n#### x", "c\n#### y"],
        },
        answer_check="exact",
        num_rationales=3,
    )
    assert [(row["question"], row["rationale"], row["answer"]) for row in kept] == [
        ("capital", "France.", "Paris"),
        ("vote", "a", "x"),
        ("vote", "b", "x"),
    ]


def test_a_voted_answer_keeps_its_spelling_and_an_answer_alone_is_no_chain(
    server,  # noqa: F811
    tmp_path,
):
    texts = {
        "big": ["n\n#### 12345678901234", "m\n#### 12345678901234"],
        "root": [r"a####\frac{1}{3}", r"b#### \frac{1}{3}"],
        "bare": ["#### 5", "#### 5"],
        "time": ["a\n#### 12:30", "b\n#### 12:30"],
    }
    kept, teacher = collected(
        server,
        tmp_path,
        [({"question": name}, "question") for name in texts],
        texts,
        num_rationales=2,
    )
    assert {(row["question"], row["answer"]) for row in kept if row["question"] != "time"} == {
        ("big", "12345678901234"),
        ("root", r"\frac{1}{3}"),
    }


def test_a_hanging_check_is_no_answer(tmp_path, monkeypatch, caplog):
    path = tmp_path / "slow.py"
    path.write_text(
        "import time\n"
        "def check(prompts, completions, answer):\n"
        "    time.sleep(60 * ('9^9' in completions[0]))\n"
        "    return [1.0]\n"
    )
    monkeypatch.setitem(rationales.ANSWER_CHECKS, "numeric", f"{path}:check")
    monkeypatch.setattr(rationales, "AnswerChecker", lambda spec: AnswerChecker(spec, 1.0))
    assert rationales.check_answers(config(tmp_path), ["9^9^9", "4"], ["4", "4"]) == [None, 1.0]
    assert "no verdict on '9^9^9' within 1 s (1 so far)" in caplog.text


def test_new_questions_repeat_nothing(server, tmp_path, caplog):  # noqa: F811
    caplog.set_level("INFO", "recipes")
    settings = config(
        tmp_path,
        teacher_model_type="api",
        teacher_base_url=server.url,
        teacher_model_path="big",
        concurrency=1,
        generate_synthetic_data=True,
        num_synthetic_examples=3,
    )
    (tmp_path / "out").mkdir()
    replies = iter(
        [
            "Tom has four red apples and eats one",
            "tom has four red apples and eats two",
            "A held out question of the test",
            "Anna runs nine miles on Monday",
            "A train leaves at noon from London",
        ]
    )
    server.reply = lambda question, body: next(replies)
    new = rationales.write_questions(
        settings,
        core.llm_client.LLMClient(settings, "teacher", "big", "api", server.url),
        ["How much is it?"],
        ["A held out question of the set"],
    )
    assert [row["question"][:4] for row in new] == [
        "Tom ",
        "Anna",
        "A tr",
    ] and "3 new questions from 5 requests: 0 missing, 2 too similar" in caplog.text


# -- mathematics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_divergence_is_its_formula(beta):
    torch.manual_seed(0)
    student, teacher = (torch.randn(5, 7, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    q, p = student.exp().tolist(), teacher.exp().tolist()

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    for row, found in enumerate(cot.jsd(student, teacher, beta).tolist()):
        m = [beta * x + (1 - beta) * y for x, y in zip(p[row], q[row], strict=True)]
        wanted = {0.0: kl(p[row], q[row]), 1.0: kl(q[row], p[row])}.get(
            beta, beta * kl(p[row], m) + (1 - beta) * kl(q[row], m)
        )
        assert found == pytest.approx(wanted, abs=1e-12) and found > 0
    assert cot.jsd(student, student, beta).abs().max() < 1e-12


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_is_that_of_stock_trl(beta, temperature):
    """Loss and gradient; our factor T^2 is not in TRL's."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    torch.manual_seed(0)
    hidden, other = torch.randn(1, 6, 8, requires_grad=True), torch.randn(1, 6, 8)
    head, teacher_head = torch.randn(20, 8), torch.randn(20, 8)
    stock, _, _ = _chunked_divergence_loss(
        hidden, other, head, teacher_head, torch.ones(1, 6), beta, temperature=temperature
    )
    (wanted,) = torch.autograd.grad(stock, hidden)
    logits, teacher_logits = (hidden @ head.T)[0], (other @ teacher_head.T)[0]
    losses, *_ = cot.distillation_loss(
        logits, teacher_logits, torch.zeros(6, dtype=torch.long), temperature, 1.0, beta
    )
    loss = losses.mean()
    (found,) = torch.autograd.grad(loss, hidden)
    assert float(loss) == pytest.approx(temperature**2 * float(stock), rel=1e-6, abs=1e-6)
    assert torch.allclose(found, temperature**2 * wanted, rtol=1e-4, atol=1e-6)


def test_alpha_weighs_divergence_and_likelihood():
    torch.manual_seed(0)
    logits, teacher_logits, targets = torch.randn(6, 9), torch.randn(6, 9), torch.randint(9, (6,))
    losses, *_ = cot.distillation_loss(logits, teacher_logits, targets, 1.0, 0.3, 0.5)
    loss = losses.mean()
    nll = -logits.log_softmax(-1)[torch.arange(6), targets].mean()
    kd = cot.jsd(logits.log_softmax(-1), teacher_logits.log_softmax(-1), 0.5).mean()
    assert float(loss) == pytest.approx(0.3 * float(kd) + 0.7 * float(nll), abs=1e-6)


# -- training --------------------------------------------------------------------------------------

READY = [
    {"question": f"{n} and {n}?", "rationale": f"{n} + {n} = {2 * n}.", "answer": str(2 * n)}
    for n in range(12)
]


def run(tmp_path, model_dir, rows, **options):
    settings = dict(
        model_name_or_path=model_dir,
        reasoning_dataset_path=write(tmp_path / "rows.jsonl", rows),
        output_dir=str(tmp_path / "out"),
        validation_split=0.25,
        max_new_tokens=8,
        max_steps=2,
        save_steps=0,
    )
    return cot.CoTDistillationStage(cot.CoTConfig(**settings | options)).execute()


def test_ready_rationales_are_learnt_without_a_teacher(tmp_path, model_dir, caplog):
    result = run(tmp_path, model_dir, READY, cot_template=r"<think>{rationale}</think>\n{answer}")
    assert (
        result.success and result.metrics["rationales"] == 9 and result.metrics["accuracy_n"] == 3
    )
    assert {
        "eval_loss",
        "eval_loss_before",
        "accuracy",
        "accuracy_before",
        "accuracy_low",
        "accuracy_high",
    } <= set(result.metrics)
    samples = [
        json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()
    ]
    assert [row["when"] for row in samples] == ["before"] * 3 + ["after"] * 3 and {
        "question",
        "expected",
        "answer",
        "right",
    } <= set(samples[0])


def test_the_student_sees_its_template_and_learns_to_stop(tokenizer, tmp_path):
    settings = config(tmp_path, cot_template=r"<think>{rationale}</think>\n{answer}")
    row = cot.convert(READY[3], "question-rationale-answer")
    (sequence,), _ = cot.sft.encode(cot.to_conversation(settings, row), tokenizer, 256)
    learnt = tokenizer.decode(sequence["labels"][sequence["labels"] != -100])
    assert (
        learnt == "<think>3 + 3 = 6.</think>\n6<|im_end|>" and settings.answer_marker == "</think>"
    )
    assert rationales.final_answer("<think>3</think>\n 6 ", settings.answer_marker) == "6"


@pytest.mark.parametrize(
    "options",
    [
        dict(distillation_type="logits"),
        dict(distillation_type="both", beta=0.5, temperature=2.0),
        dict(distillation_type="logits", on_policy_share=1.0, beta=1.0),
    ],
)
def test_a_student_comes_nearer_to_its_teacher(tokenizer, tmp_path, model_dir, options):
    """The loss on held-out rows falls, also where the student learns from its own answers."""
    teacher = tmp_path / "teacher"
    make_model(tokenizer, seed=5).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    result = run(
        tmp_path,
        model_dir,
        READY,
        teacher_model_path=str(teacher),
        max_steps=12,
        learning_rate=5e-3,
        lora_r=0,
        num_eval_samples=0,
        **options,
    )
    assert result.success and result.metrics["eval_loss"] < 0.9 * result.metrics["eval_loss_before"]


def test_own_answers_are_the_student_s(tokenizer, tmp_path, model):
    settings = config(
        tmp_path, distillation_type="logits", on_policy_share=1.0, teacher_model_path="x"
    )
    rows = [
        cot.sft.encode(
            cot.to_conversation(settings, cot.convert(row, "question-rationale-answer")),
            tokenizer,
            256,
        )[0][0]
        for row in READY[:3]
    ]
    batch = cot.sft.collate(rows)
    own = cot.sample_student_answers(settings, model, tokenizer, batch)
    for n in range(3):
        old, new = (
            b["input_ids"][n][: int((b["labels"][n] != -100).int().argmax())].tolist()
            for b in (batch, own)
        )
        assert old == new  # the prompt
        answer = own["labels"][n][own["labels"][n] != -100]
        assert (
            0 < len(answer) <= 8
            and own["input_ids"][n][len(new) : len(new) + len(answer)].tolist() == answer.tolist()
        )
    assert model.training and not torch.equal(batch["labels"], own["labels"])


def test_own_answers_are_for_training_alone(tokenizer, tmp_path, model, monkeypatch):
    """Evaluation is on the rationales, the same ones each time."""
    settings = config(
        tmp_path, distillation_type="logits", on_policy_share=1.0, teacher_model_path="x"
    )
    row = cot.convert(READY[3], "question-rationale-answer")
    (sequence,), _ = cot.sft.encode(cot.to_conversation(settings, row), tokenizer, 256)
    batch = cot.sft.collate([sequence])
    asked = []
    monkeypatch.setattr(cot, "sample_student_answers", lambda *args: asked.append(args) or batch)
    loss = cot.make_distillation_loss(settings, make_model(tokenizer, seed=5).eval(), tokenizer)
    loss(model.eval(), batch)
    assert not asked
    loss(model.train(), batch)
    assert len(asked) == 1


def test_the_loss_of_own_answers_is_the_mean_over_their_tokens(
    tokenizer, tmp_path, model, monkeypatch
):
    """However many tokens the rationales have that they take the place of."""
    settings = config(
        tmp_path, distillation_type="logits", on_policy_share=1.0, teacher_model_path="x"
    )
    loss = cot.make_distillation_loss(settings, make_model(tokenizer, seed=5).eval(), tokenizer)
    row = cot.convert(READY[3], "question-rationale-answer")
    (sequence,), _ = cot.sft.encode(cot.to_conversation(settings, row), tokenizer, 256)
    rationales, own = cot.sft.collate([sequence]), cot.sft.collate([sequence, sequence])
    monkeypatch.setattr(cot, "sample_student_answers", lambda *args: dict(own))
    sampled, _ = loss(model.train(), rationales)
    alone, _ = loss(model.eval(), own)
    assert torch.allclose(sampled, alone, rtol=1e-4)


@pytest.mark.parametrize(
    "options, temperature, alpha, beta",
    [
        ({"temperature": 3.0}, 3.0, 1.0, 0.0),
        ({"beta": 0.5}, 2.0, 1.0, 0.5),
        ({"distillation_type": "both", "alpha": 0.25}, 2.0, 0.25, 0.0),
    ],
)
def test_the_loss_is_that_of_its_options(
    tokenizer, tmp_path, model, options, temperature, alpha, beta
):
    defaults = dict(distillation_type="logits", teacher_model_path="x", temperature=2.0)
    settings = config(tmp_path, **defaults | options)
    teacher = make_model(tokenizer, seed=5).eval()
    row = cot.convert(READY[3], "question-rationale-answer")
    (sequence,), _ = cot.sft.encode(cot.to_conversation(settings, row), tokenizer, 256)
    batch = cot.sft.collate([sequence])
    found, _ = cot.make_distillation_loss(settings, teacher, tokenizer)(model.eval(), batch)
    is_target = batch["labels"][0, 1:] != -100
    targets = batch["labels"][0, 1:][is_target]
    logits, teacher_logits = (
        each(batch["input_ids"]).logits[0, :-1][is_target] for each in (model, teacher)
    )
    wanted, _, _ = cot.distillation_loss(logits, teacher_logits, targets, temperature, alpha, beta)
    assert torch.allclose(found, wanted.mean(), rtol=1e-4)


def test_another_tokenizer_is_refused_for_logits(tokenizer, tmp_path, model_dir):
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<extra>"])
    make_model(other).save_pretrained(tmp_path / "teacher")
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ConfigError, match="the tokenizer of .* is not the student's"):
        run(
            tmp_path,
            model_dir,
            READY,
            distillation_type="logits",
            teacher_model_path=str(tmp_path / "teacher"),
        )


@pytest.mark.parametrize(
    "rows, options, words",
    [
        ([{"question": f"{n}?"} for n in range(4)], dict(), "teacher_model_path is missing"),
        (
            [{"question": f"{n}?"} for n in range(4)],
            dict(teacher_model_path="x", num_rationales=1),
            "nothing to vote on",
        ),
        ([{"question": "q?"}] * 4, dict(), "leaves no row to train on"),
        (
            READY[:3] + [{"question": "a", "rationale": "b", "answer": "Paris"}] * 4,
            dict(),
            "'Paris' is not a number or formula; set answer_check=exact",
        ),
    ],
)
def test_data_that_cannot_be_used_is_refused_before_a_model_is_loaded(
    tmp_path, rows, options, words
):
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, "no/model/here", rows, **options)


def test_a_teacher_who_is_never_right_teaches_nothing(server, tmp_path, model_dir):  # noqa: F811
    server.reply = lambda question, body: "I think so.\n#### -1"
    rows = [{"question": row["question"], "answer": row["answer"]} for row in READY]
    result = run(
        tmp_path,
        model_dir,
        rows,
        teacher_model_type="api",
        teacher_base_url=server.url,
        teacher_model_path="big",
    )
    assert (
        not result.success
        and "nothing to learn from: no chain of the teacher" in result.error_message
    )


def test_a_killed_run_asks_nothing_again(server, tmp_path, model_dir, monkeypatch):  # noqa: F811
    """The second run trains on what the first one gathered; the key is in no file."""
    monkeypatch.setenv("MY_KEY", CANARY)
    server.reply = lambda question, body: (
        f"The key is {CANARY}.\n#### {2 * int(question.split()[0])}"
    )
    rows = [{"question": row["question"], "answer": row["answer"]} for row in READY]
    options = dict(
        teacher_model_type="api",
        teacher_base_url=server.url,
        teacher_model_path="big",
        num_rationales=2,
        teacher_api_key="MY_KEY",
    )
    monkeypatch.setattr(cot, "fit", lambda *_: 1 / 0)
    assert not run(tmp_path, model_dir, rows, **options).success
    asked = server.asked.total()
    monkeypatch.undo()
    monkeypatch.setenv("MY_KEY", CANARY)
    result = run(tmp_path, model_dir, rows, **options)
    assert (
        result.success and asked == server.asked.total() == 18 and result.metrics["rationales"] == 9
    )
    assert result.metrics["teacher_calls_cached"] == 18
    assert not any(
        CANARY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )


def test_files_of_questions_are_evaluated_beside(tmp_path, model_dir):
    task = write(tmp_path / "sums.jsonl", [{"question": "1 + 1?", "answer": "2"}] * 3)
    result = run(tmp_path, model_dir, READY, eval_reasoning_tasks=[task])
    assert result.metrics["sums_accuracy_n"] == 3 and "sums_accuracy_before" in result.metrics


def test_questions_of_a_file_are_not_learnt(tmp_path, model_dir, monkeypatch):
    task = write(
        tmp_path / "sums.jsonl",
        [{"question": "1 + 1?", "answer": "2"}, {"question": READY[0]["question"], "answer": "1"}],
    )
    with pytest.raises(ConfigError, match="1 questions of sums are in the training data"):
        run(tmp_path, "no/model/here", READY * 4, eval_reasoning_tasks=[task])
    task, seen = write(tmp_path / "sums.jsonl", [{"question": "1 + 1?", "answer": "2"}]), []
    monkeypatch.setattr(
        cot, "write_questions", lambda config, teacher, seeds, held_out: seen.extend(held_out) or []
    )
    options = dict(generate_synthetic_data=True, teacher_model_path=model_dir)
    assert (
        run(tmp_path, model_dir, READY, eval_reasoning_tasks=[task], **options).success
        and "1 + 1?" in seen
    )


def test_an_answer_that_cannot_be_compared_is_not_right(tmp_path, monkeypatch):
    monkeypatch.setattr(cot, "check_answers", lambda *_: [None, 1.0])
    monkeypatch.setattr(cot, "generate", lambda *_: [("#### a", True), ("#### 2", True)])
    (tmp_path / "out").mkdir()
    settings = cot.CoTConfig(
        model_name_or_path="tiny", reasoning_dataset_path="data", output_dir=str(tmp_path / "out")
    )
    found = cot.evaluate_answers(
        settings, None, None, {"": [{"question": q, "answer": "2"} for q in "ab"]}, "before"
    )
    assert found["accuracy"] == 0.5 and found["accuracy_n"] == 2


def test_own_answers_are_refused_where_the_processes_hold_the_model_in_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="launch with ddp.yaml"):
        config(
            tmp_path,
            distillation_type="logits",
            teacher_model_type="local",
            teacher_model_path="tiny",
            on_policy_share=0.5,
        ).validate()
