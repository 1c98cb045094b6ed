"""recipes/sft.py: which tokens are targets, the loss for any batching, and learning to stop."""

import copy
import itertools
import json
from pathlib import Path

import cot_distillation
import ppo
import pytest
import sft
import torch
import trl
from conftest import CHATML, make_model
from torch.profiler import ProfilerActivity, profile
from transformers import ByT5Tokenizer

import common
import core.chat
import core.data
import core.messages
import core.runtime
import core.sampling
import core.training
from core.chat import IGNORE, encode_conversation
from core.errors import ConfigError, RowError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Uno."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Dos, my friend."},
]


def config(tmp_path, **options):
    defaults = dict(
        model_name_or_path="tiny",
        dataset_name_or_path="data",
        output_dir=str(tmp_path / "out"),
        save_steps=0,
    )
    return sft.SFTConfig(**defaults | options)


def rows_of(tokenizer, *texts):
    """Encoded question-answer rows with answers of the given lengths."""
    chats = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts
    ]
    return [row for chat in chats for row in sft.encode(chat, tokenizer, 256)[0]]


LENGTHS = [
    ("a", "b"),
    ("why " * 9, "because " * 7),
    ("x y z", "yes"),
    ("q", "long answer " * 12),
] * 2


def targets(tokenizer, ids, labels):
    """The supervised stretches, as text."""
    text, stretches = [], []
    for label in [*labels, IGNORE]:
        if label == IGNORE and text:
            stretches.append(tokenizer.decode(text))
            text = []
        elif label != IGNORE:
            text.append(label)
    return stretches


# -- targets ---------------------------------------------------------------------------------------


def learnt_turns(tokenizer, messages):
    """[(context, target)] of a conversation, as text."""
    turns = []
    for ids, labels in encode_conversation(tokenizer, messages):
        edges = [n for n in range(1, len(ids)) if labels[n] != IGNORE == labels[n - 1]]
        for start in edges:
            target = list(itertools.takewhile(lambda label: label != IGNORE, labels[start:]))
            turns.append((tokenizer.decode(ids[:start]), tokenizer.decode(target)))
    return turns


def with_template(tokenizer, template, special=()):
    """A copy of the tokenizer with another chat template: Jinja, or the name of one of TRL's."""
    tok = copy.deepcopy(tokenizer)
    tok.add_special_tokens({"additional_special_tokens": list(special)})
    if template.endswith(".jinja"):
        template = (Path(trl.__file__).parent / "chat_templates" / template).read_text()
    tok.chat_template = template
    return tok


def test_targets_are_the_answers_and_their_stop_tokens(tokenizer):
    [(ids, labels)] = encode_conversation(tokenizer, CHAT)
    assert targets(tokenizer, ids, labels) == ["Uno.<|im_end|>", "Dos, my friend.<|im_end|>"]
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(ids) == rendered.removesuffix("\n")  # nothing added, nothing lost
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))


def test_unicode_and_special_texts_are_exact_targets(tokenizer, caplog):
    core.runtime.warn_once.cache_clear()
    answer = "Grüße 👩‍🚀 <|im_start|> \n\n  ok\t"
    [(ids, labels)] = encode_conversation(
        tokenizer, [CHAT[1], {"role": "assistant", "content": answer}]
    )
    assert targets(tokenizer, ids, labels) == [answer + "<|im_end|>"]
    assert "a text has the special token <|im_start|> inside" in caplog.text


@pytest.mark.parametrize(
    "template", [None, "Q: {instruction}\\nA: {response}", "### {instruction}\n### {input}\n"]
)
def test_templates_end_every_answer_in_a_stop_token_and_the_prompt_is_its_prefix(
    tokenizer, tmp_path, template
):
    tok = copy.deepcopy(tokenizer)
    core.chat.prepare_tokenizer(tok, config(tmp_path, instruction_template=template))
    [(ids, labels)] = encode_conversation(tok, CHAT[1:])
    stop = "<|endoftext|>" if template else "<|im_end|>"
    assert [text.strip() for text in targets(tok, ids, labels)] == [
        "Uno." + stop,
        "Dos, my friend." + stop,
    ]
    prompt = tok.apply_chat_template(CHAT[1:2], tokenize=False, add_generation_prompt=True)
    prompt_ids = tok(prompt, add_special_tokens=False).input_ids
    assert (
        ids[: len(prompt_ids)] == prompt_ids
        and labels[len(prompt_ids)] != IGNORE == labels[len(prompt_ids) - 1]
    )


PLAIN_TEXT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_template_without_a_stop_token_gets_one(tokenizer):
    """An earlier answer has none in the context, so each answer is a sequence of its own."""
    assert learnt_turns(with_template(tokenizer, PLAIN_TEXT), CHAT[1:]) == [
        ("user: One?\nassistant:", " Uno.\n<|endoftext|>"),
        (
            "user: One?\nassistant: Uno.\nuser: Two?\nassistant:",
            " Dos, my friend.\n<|endoftext|>",
        ),
    ]


def test_a_template_that_strips_earlier_thoughts_gives_each_answer_its_own_context(tokenizer):
    thoughts = copy.deepcopy(CHAT[1:])
    thoughts[1]["content"] = "<think>\nUn?\n</think>\n\nUno."
    tok = with_template(tokenizer, "qwen3.jinja")
    first = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    assert learnt_turns(tok, thoughts) == [
        (first, "<think>\nUn?\n</think>\n\nUno.<|im_end|>"),
        (
            first + "Uno.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nDos, my friend.<|im_end|>",
        ),
    ]
    # A later stage gives the same tokenizer another template.
    tok.chat_template = tokenizer.chat_template
    assert encode_conversation(tok, CHAT) == encode_conversation(tokenizer, CHAT)


MESSAGE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THOUGHT = {"role": "assistant", "content": "<think>long</think>Uno."}


@pytest.mark.parametrize(
    "template, turns, said",
    [
        (
            "{% if messages[0]['role'] == 'system' %}"
            "{{ raise_exception('System role not supported') }}{% endif %}" + MESSAGE,
            CHAT,
            "refuses: System role",
        ),
        (
            MESSAGE.replace("CONTENT", "m['content'] if m['role'] != 'system'"),
            CHAT,
            "whose system message the chat template leaves out",
        ),
        (MESSAGE, CHAT[2:3], "without an answer"),
        (
            MESSAGE.replace("CONTENT", "m['content'].split('</think>')[-1]"),
            [*CHAT[1:2], THOUGHT],
            "the chat template shortens",
        ),
        (
            MESSAGE,
            [CHAT[1], CHAT[2] | {"reasoning_content": "Un?"}],
            "whose reasoning the chat template leaves out",
        ),
        (
            MESSAGE,
            [CHAT[1], CHAT[2] | {"tool_calls": core.messages.read_tool_calls({"name": "count"})}],
            "whose tool calls the chat template leaves out",
        ),
        (MESSAGE, [CHAT[1] | {"tools": [{"name": "count"}]}, CHAT[2]], "whose tools the chat"),
        (MESSAGE, [CHAT[1], CHAT[2] | {"content": "Uno.<|im_end|>"}], "the marks of the chat"),
        (
            MESSAGE,
            [CHAT[1] | {"content": "<|im_start|>user\nOne?"}, CHAT[2]],
            "already have the marks of the chat template",
        ),
    ],
)
def test_a_row_that_the_template_would_garble_is_left_out(tokenizer, template, turns, said):
    tok = with_template(tokenizer, template.replace("CONTENT", "m['content']") + PROMPT)
    with pytest.raises(RowError, match=said):
        encode_conversation(tok, turns)
    encode_conversation(
        tok, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )


def test_an_answer_that_ends_in_eos_gets_no_second_one(tokenizer):
    with pytest.raises(RowError, match="already have the marks of the chat template"):
        encode_conversation(
            with_template(tokenizer, PLAIN_TEXT),
            [CHAT[1], CHAT[2] | {"content": "Uno.<|endoftext|>"}],
        )
    for text in ("Uno.", "Uno.<|endoftext|>"):
        [sequence] = sft.encode_text(text, tokenizer, 64)
        assert tokenizer.decode(sequence["input_ids"]) == "Uno.<|endoftext|>"


def test_earlier_turns_that_a_template_changes_are_learnt_as_they_are_shown(tokenizer):
    """The thought of the first answer is learnt, and is not in the context of the second."""
    content = "m['content'] if loop.last or m['role'] == 'user' else m['content'].split('nk>')[-1]"
    tok = with_template(tokenizer, MESSAGE.replace("CONTENT", content) + PROMPT)
    (_, first), (context, second) = learnt_turns(tok, [CHAT[1], THOUGHT, *CHAT[3:]])
    assert first == "<think>long</think>Uno.<|im_end|>" and second == "Dos, my friend.<|im_end|>"
    assert "long" not in context and "Uno." in context


def test_a_token_behind_the_last_turn_is_not_the_end_of_a_turn(tokenizer):
    """Phi-3 writes <|endoftext|> behind the last answer's <|end|>, GPT-OSS <|return|> instead."""
    tok = with_template(tokenizer, "phi3.jinja", ("<|user|>", "<|assistant|>", "<|end|>"))
    context = "<|user|>\nOne?<|end|>\n<|assistant|>\n"
    assert learnt_turns(tok, CHAT[1:]) == [
        (context, "Uno.<|end|>"),
        (context + "Uno.<|end|>\n<|user|>\nTwo?<|end|>\n<|assistant|>\n", "Dos, my friend.<|end|>"),
    ]
    assert tok.convert_tokens_to_ids("<|end|>") in core.chat.stop_tokens(tok)
    special = ("<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|channel|>", "<|call|>")
    tok = with_template(tokenizer, "gptoss.jinja", special)
    tok.eos_token = "<|return|>"
    (_, first), (context, second) = learnt_turns(tok, CHAT[1:])
    assert first == "<|channel|>final<|message|>Uno.<|return|>"
    assert context.endswith(
        "<|message|>Uno.<|end|><|start|>user<|message|>Two?<|end|><|start|>assistant"
    )
    assert second == "<|channel|>final<|message|>Dos, my friend.<|return|>"


@pytest.mark.parametrize(
    "template, answer, said",
    [
        ("qwen3_5_think.jinja", "<think>\nlong\n</think>\n\nUno.", "long\n</think>\n\nUno."),
        ("qwen3_5_nothink.jinja", "<think>\n\n</think>\n\nUno.", "Uno."),
        ("deepseek_r1_distill.jinja", "<think>\nlong\n</think>\n\nUno.", "long\n</think>\n\nUno."),
    ],
)
def test_what_the_generation_prompt_or_the_answer_itself_has_is_not_missed(
    tokenizer, template, answer, said
):
    tok = with_template(tokenizer, template)
    tok.bos_token = "<|endoftext|>"
    turns = learnt_turns(tok, [CHAT[1], {"role": "assistant", "content": answer}])
    assert len(turns) == 1 and turns[0][1].strip().startswith(said)


def test_an_answer_without_the_thought_that_its_prompt_begins_is_refused(tokenizer):
    tok = with_template(tokenizer, "deepseek_r1_distill.jinja")
    tok.bos_token = "<|endoftext|>"
    with pytest.raises(RowError, match="without its generation prompt '<｜Assistant｜><think>"):
        encode_conversation(tok, CHAT[1:3])
    assert tok.decode(core.chat.prompt_ids(tok, CHAT[1:2])).endswith(
        "<think>\n"
    )  # RL needs no more


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL_CHAT = [
    {"role": "user", "content": "Sun?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "yes"},
    {"role": "assistant", "content": "It shines."},
]


def test_tool_calls_are_learnt_and_their_results_are_context(tokenizer):
    tok = with_template(tokenizer, "qwen3.jinja")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    (context, call), (_, answer) = learnt_turns(
        tok, [TOOL_CHAT[0] | {"tools": tools}, *TOOL_CHAT[1:]]
    )
    assert '"name": "weather"' in context
    written = (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    )
    assert call.endswith(written) and answer.endswith("It shines.<|im_end|>")
    # JSON text, as OpenAI's data has it, is handed on as it is.
    as_text = copy.deepcopy(TOOL_CHAT)
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Oslo"}'
    assert learnt_turns(tok, as_text) == learnt_turns(tok, TOOL_CHAT)
    # Llama's template would quote it once more, so it gets an object.
    llama = with_template(tokenizer, "llama3_1.jinja", ("<|eot_id|>", "<|start_header_id|>"))
    llama.bos_token = "<|endoftext|>"
    assert learnt_turns(llama, as_text)[0][1] == (
        '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'
    )


def test_reasoning_is_learnt_where_the_template_has_a_place_for_it(tokenizer):
    message = CHAT[2] | {"reasoning_content": "Un?"}
    [(_, target)] = learnt_turns(with_template(tokenizer, "qwen3.jinja"), [CHAT[1], message])
    assert target == "<think>\nUn?\n</think>\n\nUno.<|im_end|>"
    tok = with_template(tokenizer, "gptoss.jinja", ("<|return|>", "<|end|>"))
    [(_, target)] = learnt_turns(tok, [CHAT[1], message])
    assert target == (
        "<|channel|>analysis<|message|>Un?<|end|><|start|>assistant"
        "<|channel|>final<|message|>Uno.<|return|>"
    )


def test_an_answer_marked_as_context_is_not_learnt(tokenizer):
    for mark in ({"weight": 0}, {"train": False}):
        chat = core.messages.as_messages([*CHAT[:2], CHAT[2] | mark, *CHAT[3:]], "user")
        [(ids, labels)] = encode_conversation(tokenizer, chat)
        assert targets(tokenizer, ids, labels) == ["Dos, my friend.<|im_end|>"]
        assert "Uno.<|im_end|>" in tokenizer.decode(ids)
    [(ids, labels)] = encode_conversation(tokenizer, [CHAT[2], *CHAT[1:3]])
    assert targets(tokenizer, ids, labels) == ["Uno.<|im_end|>"]  # what begins a chat is context


def test_messages_may_be_as_a_data_set_has_them(tokenizer):
    raw = [
        {"role": "user", "content": [{"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": "Uno.", "weight": 0},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Dos."},
    ]
    tok = with_template(tokenizer, "qwen3_5_think.jinja")
    assert [target for _, target in learnt_turns(tok, raw)] == ["\n</think>\n\nDos.<|im_end|>"]


def test_a_conversation_is_tokenized_once(tokenizer, monkeypatch):
    """Else a long one would take time that grows with the square of its length."""
    core.chat.cached_ids.cache_clear()
    called = []
    original = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, text, **more: called.append(text) or original(self, text, **more),
    )
    [(ids, labels)] = encode_conversation(tokenizer, CHAT[1:] * 20)
    assert targets(tokenizer, ids, labels)[-1] == "Dos, my friend.<|im_end|>"
    assert len(targets(tokenizer, ids, labels)) == 40
    assert len(called) == 2  # the whole, and the end of a context


def test_a_tokenizer_written_in_python_gives_the_same_targets():
    """It does not say where its tokens begin."""
    tok = ByT5Tokenizer(extra_ids=0)
    tok.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tok.chat_template = CHATML
    assert not tok.is_fast
    turns = learnt_turns(tok, [{"role": "user", "content": "Größe?"}, *CHAT[2:]])
    assert [target for _, target in turns] == ["Uno.<|im_end|>", "Dos, my friend.<|im_end|>"]
    assert all(context.endswith("<|im_start|>assistant\n") for context, _ in turns)


def test_an_answer_that_would_merge_with_its_prompt_is_learnt_as_it_is_written_in_use(tokenizer):
    tok = with_template(tokenizer, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    chat = [{"role": "user", "content": "Remind m"}, {"role": "assistant", "content": "e to"}]
    [(ids, labels)] = encode_conversation(tok, chat)
    prompt = tok("Remind m").input_ids
    assert tok("Remind me to").input_ids[: len(prompt)] != prompt
    assert ids == prompt + tok("e to<|endoftext|>").input_ids
    assert labels == [IGNORE] * len(prompt) + ids[len(prompt) :]


def test_what_does_not_fit_is_cut_at_an_answers_end_or_left_out(tokenizer):
    (whole,), shortened = sft.encode(CHAT, tokenizer, 256)
    assert not shortened
    (cut,), shortened = sft.encode(CHAT, tokenizer, len(whole["input_ids"]) - 1)
    assert shortened
    assert targets(tokenizer, cut["input_ids"], cut["labels"].tolist()) == ["Uno.<|im_end|>"]
    assert tokenizer.decode(cut["input_ids"]).endswith("Uno.<|im_end|>")
    with pytest.raises(RowError, match="no answer that ends within 8"):
        sft.encode(CHAT, tokenizer, 8)


def test_long_text_is_split_and_nothing_is_lost(tokenizer):
    text = "The quick brown fox. " * 20
    pieces, shortened = sft.encode(text, tokenizer, 32)
    assert not shortened
    assert all(len(piece["input_ids"]) <= 32 for piece in pieces) and all(
        p["labels"][0] == IGNORE for p in pieces
    )
    assert (
        tokenizer.decode(torch.cat([piece["input_ids"] for piece in pieces]))
        == text + "<|endoftext|>"
    )
    for text in (
        "abcde " * n for n in range(1, 9)
    ):  # its end is learnt too, also where it would stand alone
        with pytest.raises(RowError, match="without a target token"):
            sft.encode(text, tokenizer, 1)
        whole = tokenizer(text + "<|endoftext|>").input_ids
        for length in range(3, len(whole) + 2):
            pieces, _ = sft.encode(text, tokenizer, length)
            assert (
                torch.cat([piece["input_ids"] for piece in pieces]).tolist() == whole
                and pieces[-1]["labels"][-1] == whole[-1]
            )
            assert all(len(piece["input_ids"]) <= length for piece in pieces)


def test_text_begins_as_the_tokenizer_begins_texts(tokenizer):
    import copy

    from tokenizers.processors import TemplateProcessing

    tok = copy.deepcopy(tokenizer)
    tok.bos_token = "<|im_start|>"
    bos = tok.bos_token_id
    assert sft.encode("hello", tok, 99)[0][0]["input_ids"][0] != bos
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    for text in ("hello", "<|im_start|>hello"):
        (piece,), _ = sft.encode(text, tok, 99)
        assert piece["input_ids"].tolist() == tok("hello<|endoftext|>").input_ids and (
            piece["labels"] == IGNORE
        ).tolist() == [True] + [False] * (len(piece["labels"]) - 1)


# -- data formats ----------------------------------------------------------------------------------

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Add. 1 2"}, {"from": "gpt", "value": "3"}]
}
ROWS = {
    "messages": {
        "messages": [{"role": "user", "content": "Add. 1 2"}, {"role": "assistant", "content": "3"}]
    },
    "sharegpt": SHAREGPT,
    "alpaca": {"instruction": "Add. 1 2", "output": "3"},
    "instruction-response": {"instruction": "Add. 1 2", "response": "3"},
    "prompt-completion": {"prompt": "Add. 1 2", "completion": "3"},
    "prompt-response": {"prompt": "Add. 1 2", "response": "3"},
    "question-answer": {"question": "Add. 1 2", "answer": "3"},
}


@pytest.mark.parametrize("form", ROWS)
def test_formats_are_detected_and_say_the_same(form):
    assert core.columns.detect_format(list(ROWS[form]), sft.FORMATS) == form
    assert sft.to_messages(ROWS[form], form) == ROWS["messages"]["messages"]


def test_alpaca_input_and_context(tmp_path):
    assert sft.to_messages(ALPACA, "alpaca")[0]["content"] == "Add.\n\n1 2"
    assert sft.to_messages(ALPACA, "alpaca", True)[0] == {
        "role": "user",
        "content": "Add.",
        "input": "1 2",
    }
    assert sft.to_messages(ALPACA | {"input": ""}, "alpaca")[0]["content"] == "Add."
    row = {"context": "Numbers.", "question": "1+2?", "answer": "3"}
    assert core.columns.detect_format(list(row), sft.FORMATS) == "context-question-answer"
    assert sft.to_messages(row, "context-question-answer")[0]["content"] == "Numbers.\n\n1+2?"


def test_prompt_and_completion_may_be_messages_and_nothing_else_that_is_no_text():
    asked, answer = ROWS["messages"]["messages"]
    system = {"role": "system", "content": "Be brief."}
    assert sft.to_messages(
        {"prompt": [system, asked], "completion": [answer]}, "prompt-completion"
    ) == [system, asked, answer]
    for form, row in (
        ("question-answer", {"question": "Where?", "answer": ["Paris", "paris"]}),
        ("alpaca", ALPACA | {"output": {"text": "3"}}),
        ("alpaca", ALPACA | {"input": ["1", "2"]}),
        ("context-question-answer", {"context": {"a": 1}, "question": "b", "answer": "c"}),
    ):
        with pytest.raises(RowError):
            sft.to_messages(row, form)
    with pytest.raises(RowError):
        cot_distillation.convert({"question": [asked], "answer": "3"}, "question-answer")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_file_of_a_folder_is_read_but_hidden_ones(tmp_path, kind):
    import datasets

    def answers_in(folder):
        return sorted(row["answer"] for row in core.data.load_dataset_from_path(str(folder)))

    folder = tmp_path / "rows"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for n, name in enumerate(("train", "extra", "._train", ".ipynb_checkpoints/train")):
        rows = datasets.Dataset.from_list([{"question": f"{n}?", "answer": str(n)}])
        getattr(rows, "to_json" if kind == "jsonl" else "to_parquet")(folder / f"{name}.{kind}")
    assert answers_in(folder) == ["0", "1"]
    (folder / f"extra.{kind}").rename(folder / f"a[1].{kind}")
    assert answers_in(folder) == ["0", "1"]
    for name, later in (("train", "valid"), ("a[1]", "test")):
        (folder / f"{name}.{kind}").rename(folder / f"{later}.{kind}")
    with pytest.raises(
        ConfigError,
        match="judging by their names, none of its files is for training; give one of them",
    ):
        core.data.load_dataset_from_path(str(folder))
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "dict")
    with pytest.raises(
        ConfigError, match="holds several data sets; give the folder of one, such as .*train"
    ):
        core.data.load_dataset_from_path(str(tmp_path / "dict"))


def test_texts_and_numbers_are_as_they_stand(tmp_path):
    def read(name, text):
        path = tmp_path / name
        path.write_text(text)
        return list(core.data.load_dataset_from_path(str(path)))

    numbers = read(
        "a.jsonl",
        '{"question": "a", "answer": 7}\n{"question": "b", "answer": 7.5}\n'
        '{"question": NaN, "answer": null}\n',
    )
    assert [str(row["answer"]) for row in numbers] == ["7", "7.5", "None"] and numbers[2][
        "question"
    ] is None
    assert read("a.csv", 'question,answer\n"a, b",007\n"c\nd",NA\n') == [
        {"question": "a, b", "answer": "007"},
        {"question": "c\nd", "answer": "NA"},
    ]
    assert read("b.csv", "question,answer\nHello, world,foo\na,b\n") == [
        {"question": "a", "answer": "b"}
    ]
    assert read("d.csv", "\n\nquestion,answer\na,b\n") == [{"question": "a", "answer": "b"}]
    # It is not guessed which of two columns is meant.
    assert read("e.csv", "answer,question,answer\na,b,c\n") == [
        {"answer 1": "a", "question": "b", "answer 2": "c"}
    ]
    with pytest.raises(
        ConfigError, match="c.csv: no usable rows .1 with a quote that is not closed"
    ):
        read("c.csv", 'question,answer\n"a,b\n')


def test_dates_of_a_parquet_file_do_not_stop_a_run(tmp_path):
    import datetime

    import datasets

    rows = [
        {"question": f"{n}?", "answer": str(n), "when": datetime.datetime(2026, 1, n + 1)}
        for n in range(3)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    stage = ppo.PPOStage(
        ppo.PPOConfig(
            model_name_or_path="tiny",
            prompt_dataset_path=str(tmp_path / "rows.parquet"),
            reward="length",
            reward_length=3,
        )
    )
    stage.check()
    stage.functions["length"].stop()
    assert stage.lineage["data"]["rows"] == 3


def test_marks_on_a_message_that_are_not_read_are_said(caplog):
    core.runtime.warn_once.cache_clear()
    core.messages.as_messages(
        [{"role": "user", "content": "a", "stars": 3, "tool_calls": None, "name": ""}], "user"
    )
    assert "not used: stars" in caplog.text and "tool_calls" not in caplog.text


def test_unknown_and_ambiguous_columns_are_refused():
    with pytest.raises(ConfigError, match="frage, antwort; say which is which.* Known: messages"):
        core.columns.detect_format(["frage", "antwort"], sft.FORMATS)
    with pytest.raises(ConfigError, match="alpaca and question-answer"):
        core.columns.detect_format(["instruction", "output", "question", "answer"], sft.FORMATS)
    assert (
        core.columns.detect_format(
            ["instruction", "output", "question", "answer"], sft.FORMATS, "alpaca"
        )
        == "alpaca"
    )
    assert (
        core.columns.detect_format(
            ["instruction", "input", "output", "text"], sft.FORMATS, optional=sft.OPTIONAL_COLUMNS
        )
        == "alpaca"
    )


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "folder", "saved"])
def test_files_and_folders(tmp_path, caplog, suffix):
    import datasets

    dataset = datasets.Dataset.from_list(
        [ALPACA, ALPACA | {"input": "3 4", "output": ""}, ALPACA | {"input": "5 6"}]
    )
    path = tmp_path / f"rows.{suffix}"
    if suffix == "saved":
        dataset.save_to_disk(path)
    elif suffix == "folder":
        path.mkdir()
        dataset.to_json(path / "train.jsonl")
        dataset.to_json(path / "test.jsonl")
    else:
        getattr(dataset, "to_json" if suffix == "jsonl" else f"to_{suffix}")(
            path, **{"lines": False} if suffix == "json" else {}
        )
    stage = sft.SFTStage(config(tmp_path, dataset_name_or_path=str(path), validation_split=0.4))
    (train, held_out), found = stage.load_data(), stage.lineage["data"]
    assert found["format"] == "alpaca" and found["rows"] == 2  # the empty output is left out
    assert sorted(row[0]["content"] for row in train + held_out) == ["Add.\n\n1 2", "Add.\n\n5 6"]


def test_what_is_left_out_is_counted(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(ALPACA | {"output": answer}) + "\n" for answer in ("3", "", None, "4"))
    )
    with caplog.at_level("INFO"):
        sft.SFTStage(config(tmp_path, dataset_name_or_path=str(path))).load_data()
    assert "alpaca, 4 rows: instruction, input, output" in caplog.text
    assert "2 of 4 rows left out: 2 with an empty or missing text" in caplog.text


@pytest.mark.parametrize(
    "row",
    [
        lambda n, k: {"n": n},
        lambda n, k: f"text {n}",
        lambda n, k: {"question": n, "answer": k},
        lambda n, k: {"prompt": [{"role": "user", "content": f"{n}"}], "chosen": k},
        lambda n, k: [
            {"role": "user", "content": f"{n}"},
            {"role": "assistant", "content": f"{k}"},
        ],
    ],
)
def test_split_is_seeded_and_rows_that_ask_the_same_stay_on_one_side(row):
    rows = [row(n % 40, n) for n in range(120)]
    train, held_out = core.data.split_dataset(rows, 0.25, seed=1)
    assert len(train) + len(held_out) == 120 and len(held_out) == 30
    asked = [
        {
            json.dumps(
                one[:1]
                if isinstance(one, list)
                else one
                if isinstance(one, str)
                else [*one.values()][0]
            )
            for one in side
        }
        for side in (train, held_out)
    ]
    assert not asked[0] & asked[1]
    assert (
        core.data.split_dataset(rows, 0.25, seed=1)
        == (train, held_out)
        != core.data.split_dataset(rows, 0.25, seed=2)
    )
    asks_the_same = [row(1, n) for n in range(8)]
    assert [len(side) for side in core.data.split_dataset(asks_the_same, 0.25, seed=1)] == (
        [0, 8] if asks_the_same[0] == asks_the_same[1] else [6, 2]
    )
    assert core.data.split_dataset(rows, 0.0, seed=1)[1] == []


@pytest.mark.parametrize(
    "counts, share, wanted",
    [([95, 5], 0.05, 5), ([25] * 4, 0.05, 25), ([60, 30, 10], 0.3, 30), ([50, 1, 1, 1], 0.02, 2)],
)
def test_a_prompt_with_many_rows_is_not_held_out_in_place_of_few(counts, share, wanted):
    rows = [{"prompt": f"p{n}", "k": k} for n, count in enumerate(counts) for k in range(count)]
    for seed in range(6):
        train, held_out = core.data.split_dataset(rows, share, seed)
        assert len(train) + len(held_out) == sum(counts) and 0 < len(held_out) <= wanted


# -- mathematics -----------------------------------------------------------------------------------


def gradient(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_loss_and_gradient_are_those_of_stock_sft_trainer(tokenizer, model, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = rows_of(tokenizer, *LENGTHS)
    lists = [{name: row[name].tolist() for name in ("input_ids", "labels")} for row in rows]
    stock = SFTTrainer(
        model,
        SFTConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_length=None,
            per_device_train_batch_size=8,
        ),
        train_dataset=Dataset.from_list(lists),
        processing_class=tokenizer,
    )
    batch = stock.data_collator(lists)
    expected = stock.compute_loss(model, dict(batch))
    theirs = gradient(model, expected)
    ours, _ = sft.loss(model, sft.collate(rows))
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.norm(gradient(model, ours) - theirs) <= 1e-5 * torch.norm(theirs)


def test_left_and_right_padding_agree(tokenizer, model):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    absolute = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=2)
    ).eval()
    rows = rows_of(tokenizer, *LENGTHS)
    for candidate in (model, absolute):  # rotary positions are relative and would hide a shift
        right, left = (
            sft.loss(candidate, sft.collate(rows, side))[0] for side in ("right", "left")
        )
        assert right.item() == pytest.approx(left.item(), abs=1e-5)


def test_a_packed_document_is_the_document_alone(tokenizer, model):
    rows = rows_of(tokenizer, *LENGTHS)
    packed = sft.pack(rows, 256)
    assert len(packed) < len(rows) and sum(len(row["input_ids"]) for row in packed) == sum(
        len(r["input_ids"]) for r in rows
    )
    batch = sft.collate(packed)
    with torch.no_grad():
        together = model(
            batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        for number, row in enumerate(packed):
            start = 0
            for length in row["seq_lengths"].tolist():
                alone = model(row["input_ids"][None, start : start + length].long()).logits[0]
                places = batch["position_ids"][number, start : start + length]
                assert places.tolist() == list(range(length))
                assert torch.allclose(together[number, start : start + length], alone, atol=1e-4)
                start += length
    alone, packed_loss = sft.loss(model, sft.collate(rows))[0], sft.loss(model, batch)[0]
    assert packed_loss.item() == pytest.approx(alone.item(), abs=1e-4)
    assert batch["num_items"] == sft.collate(rows)["num_items"]


def fitted(tmp_path, tokenizer, rows, held_out=(), model=None, **options):
    model = model or make_model(tokenizer)
    settings = config(tmp_path, **{"lora_r": 0, "learning_rate": 1e-3} | options)
    metrics = core.training.fit(settings, model, rows, list(held_out), sft.collate, sft.loss)
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    return model, metrics, lines


def test_accumulation_is_exact_for_rows_of_any_length(tokenizer, tmp_path):
    rows, losses, accuracies = rows_of(tokenizer, *LENGTHS, *LENGTHS), [], []
    for size, steps, checkpointing in (
        (8, 1, False),
        (4, 2, False),
        (1, 8, False),
        (8, 1, True),
        (8, 1, 2),
    ):
        (tmp_path / "out").mkdir(exist_ok=True)
        model, _, lines = fitted(
            tmp_path,
            tokenizer,
            rows,
            rows[:3],
            num_train_epochs=3,
            per_device_eval_batch_size=size,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            gradient_checkpointing=checkpointing,
        )
        assert [layer.gradient_checkpointing for layer in model.model.layers] == [
            bool(checkpointing),
            checkpointing is True,
        ]
        losses.append([line.get("loss", line.get("eval_loss")) for line in lines])
        figures = [line.get("token_accuracy", line.get("eval_token_accuracy")) for line in lines]
        accuracies.append(figures)
    assert len(losses[0]) == 8  # six steps, and an evaluation before and after them
    for found in (losses, accuracies):
        assert all(again == pytest.approx(found[0], abs=1e-5) for again in found[1:])


def test_steps_hold_rows_of_like_length_the_longest_first_and_each_row_once_an_epoch(
    tokenizer, tmp_path
):
    rows = rows_of(tokenizer, *((f"{n}?", "so " * (n * 7 % 20 + 1)) for n in range(20)))
    settings, seen = (
        config(tmp_path, lora_r=0, num_train_epochs=2, per_device_train_batch_size=3),
        [],
    )

    def collate(rows):
        seen.append([len(row["input_ids"]) for row in rows])
        return sft.collate(rows)

    (tmp_path / "out").mkdir()
    core.training.fit(settings, make_model(tokenizer), rows, [], collate, sft.loss)
    lengths = sorted(len(row["input_ids"]) for row in rows)
    for epoch in (seen[:7], seen[7:]):
        assert sorted(sum(epoch, [])) == lengths and [len(batch) for batch in epoch] == [3] * 6 + [
            2
        ]
        assert lengths[-1] in epoch[0] and sum(
            max(batch) * len(batch) for batch in epoch
        ) < 1.15 * sum(lengths)
    assert seen[:7] != seen[7:]


def test_eight_rows_learnt_by_heart_are_said_and_stopped_after(tokenizer, tmp_path):
    chats = [
        [
            {"role": "user", "content": f"Number {n}?"},
            {"role": "assistant", "content": "so " * n + "."},
        ]
        for n in range(8)
    ]
    rows = [row for chat in chats for row in sft.encode(chat, tokenizer, 256)[0]]
    (tmp_path / "out").mkdir()
    model, _, _ = fitted(
        tmp_path,
        tokenizer,
        rows,
        num_train_epochs=150,
        lr_scheduler_type="constant",
        logging_steps=50,
    )
    answers = core.sampling.generate(model, tokenizer, [chat[:-1] for chat in chats], 40)
    assert [stopped for _, stopped in answers] == [True] * 8
    assert [text for text, _ in answers] == [chat[-1]["content"] for chat in chats]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tokenizer, tmp_path):
    model, rows = make_model(tokenizer), rows_of(tokenizer, *LENGTHS)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def broken(model, batch):
        value, metrics = sft.loss(model, batch)
        return value * float("nan"), metrics

    (tmp_path / "out").mkdir()
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        core.training.fit(config(tmp_path, lora_r=0), model, rows, [], sft.collate, broken)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(tokenizer, tmp_path):
    model, rows = make_model(tokenizer), rows_of(tokenizer, *LENGTHS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    (tmp_path / "out").mkdir()
    with pytest.raises(FloatingPointError, match="gradient's norm"):
        core.training.fit(config(tmp_path, lora_r=0), model, rows, [], sft.collate, sft.loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"lora_r": 0}])
def test_after_training_nothing_of_its_precision_stays(tokenizer, tmp_path, options):
    """accelerate puts autocast around the model, and would leave it there for later stages.

    While it is there, it alone casts the inputs of the adapter's 14 layers, and not peft before it.
    """
    from peft.helpers import disable_input_dtype_casting

    settings, rows = (
        config(tmp_path, torch_dtype="bfloat16", max_steps=1, **options),
        rows_of(tokenizer, *LENGTHS),
    )
    model = common.add_adapter(make_model(tokenizer), settings)
    sft.loss(model, sft.collate(rows))  # whether it caps its logits is known from now on
    (tmp_path / "out").mkdir()
    copies = []

    def counted(model, batch):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            found = sft.loss(model, batch)
        copies.append(
            sum(event.count for event in seen.key_averages() if event.key == "aten::_to_copy")
        )
        return found

    core.training.fit(settings, model, rows, [], sft.collate, counted)
    with torch.autocast("cpu", torch.bfloat16):
        counted(model, sft.collate(rows))
    with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(model):
        counted(model, sft.collate(rows))
    in_fit, by_both, by_autocast = copies
    assert in_fit == by_autocast
    assert by_autocast < by_both or settings.lora_r == 0
    ids = torch.as_tensor(rows[0]["input_ids"])[None]
    again = common.add_adapter(make_model(tokenizer), settings)
    again.load_state_dict(model.state_dict())
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_a_model_trained_before_trains_under_autocast_again(tokenizer, tmp_path):
    """accelerate marks the models it has prepared, and would skip them a second time."""
    model, rows, seen = make_model(tokenizer), rows_of(tokenizer, *LENGTHS), []
    sft.loss(model, sft.collate(rows))  # whether it caps its logits is known from now on
    model.model.norm.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    (tmp_path / "out").mkdir()
    for rank in (0, 0, 4):
        settings = config(tmp_path, torch_dtype="bfloat16", max_steps=1, lora_r=rank)
        core.training.fit(
            settings,
            common.add_adapter(model, settings),
            rows,
            rows[:1],
            sft.collate,
            sft.loss,
        )
    assert seen == [True] * 9  # a step, and an evaluation before and after it


def test_resuming_gives_bitwise_the_undisturbed_run(tokenizer, tmp_path):
    rows = rows_of(tokenizer, *LENGTHS, *LENGTHS)
    (tmp_path / "out").mkdir()
    options = dict(
        num_train_epochs=4, per_device_train_batch_size=3, save_steps=5, lora_dropout=0.0
    )
    whole, _, lines = fitted(
        tmp_path, tokenizer, rows, **options
    )  # six steps an epoch: step 15 is amid the third
    checkpoints = sorted((tmp_path / "out/checkpoints").iterdir())
    assert [folder.name for folder in checkpoints] == [
        "checkpoint-15",
        "checkpoint-20",
        "checkpoint-24",  # the end, which the stage removes when it is recorded
    ]
    assert not (checkpoints[0] / "training_args.bin").exists()
    options |= dict(resume_from_checkpoint=str(checkpoints[0]))
    resumed, _, again = fitted(
        tmp_path, tokenizer, rows, model=make_model(tokenizer, seed=1), **options
    )
    assert all(
        torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items()
    )
    for line in [*again, *lines]:
        line.pop("tokens_per_s", None)
    assert again == lines


def test_best_model_early_stopping_and_the_learning_rate(tokenizer, tmp_path):
    rows = rows_of(tokenizer, *LENGTHS)
    (tmp_path / "out").mkdir()
    _, metrics, lines = fitted(
        tmp_path,
        tokenizer,
        rows[:4],
        rows[4:],
        num_train_epochs=60,
        eval_steps=2,
        save_steps=2,
        warmup_ratio=0.5,
        early_stopping_patience=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_token_accuracy",
        greater_is_better=True,
    )
    evaluations = [line["eval_token_accuracy"] for line in lines if "eval_loss" in line]
    assert metrics["steps"] < 60 and metrics["eval_token_accuracy"] == max(evaluations)
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates[:3] == pytest.approx([1e-3 / 30, 2e-3 / 30, 3e-3 / 30])


def test_the_best_model_is_kept_wherever_checkpoints_fall(tokenizer, tmp_path):
    """Steps 500 apart by default, and an accuracy of which more is better without being told."""
    rows = rows_of(tokenizer, *LENGTHS)
    (tmp_path / "out").mkdir()
    options = dict(
        max_steps=6,
        eval_steps=1,
        save_steps=500,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        load_best_model_at_end=True,
    )
    _, metrics, lines = fitted(
        tmp_path, tokenizer, rows[:4], rows[4:], metric_for_best_model="eval_loss", **options
    )
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line and line["step"]][
        :-1
    ]  # the last is of what is kept
    assert metrics["eval_loss"] == pytest.approx(min(losses)) and min(losses) < losses[-1]
    _, metrics, lines = fitted(
        tmp_path,
        tokenizer,
        rows[:4],
        rows[4:],
        metric_for_best_model="eval_token_accuracy",
        resume_from_checkpoint=False,
        **options,
    )
    found = [line["eval_token_accuracy"] for line in lines if "eval_loss" in line and line["step"]]
    assert metrics["eval_token_accuracy"] == max(found) > min(found)


@pytest.mark.parametrize(
    "figure, more",
    [
        ("eval_loss", False),
        ("eval_kl", False),
        ("eval_calibration_error", False),
        ("eval_accuracy", True),
    ],
)
def test_which_figures_are_better_when_greater(tmp_path, figure, more):
    assert config(tmp_path, metric_for_best_model=figure).greater_is_better is more
    assert (
        config(tmp_path, metric_for_best_model=figure, greater_is_better=not more).greater_is_better
        is not more
    )


def test_rows_that_lose_turns_are_counted(tokenizer, model, tmp_path, caplog):
    length = len(sft.encode(CHAT, tokenizer, 256)[0][0]["input_ids"])
    (tmp_path / "out").mkdir()
    settings = config(tmp_path, max_seq_length=length - 1, lora_r=0, max_steps=1)
    long = [
        *CHAT[:3],
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "Tres. " * 40},
    ]
    with caplog.at_level("WARNING"):
        sft.train(settings, model, tokenizer, [CHAT, long, CHAT[1:3], [CHAT[1], long[-1]]], [])
    assert f"2 of 3 rows lose the turns beyond {length - 1} tokens" in caplog.text
    assert (
        f"1 of 4 rows left out: 1 with no answer that ends within {length - 1} tokens"
        in caplog.text
    )


@pytest.mark.parametrize(
    "options", [{}, {"packing": True}, {"use_8bit": True, "gradient_checkpointing": True}]
)
def test_plain_text_trains_a_base_model_without_a_template(model_dir, tmp_path, options):
    import shutil

    base, data = tmp_path / "base", tmp_path / "text.csv"
    shutil.copytree(model_dir, base)
    (base / "chat_template.jinja").unlink()
    data.write_text(
        "text\n" + "\n".join(f"The fox {n} jumps {'over ' * (n % 9)}it" for n in range(40))
    )
    settings = config(
        tmp_path,
        model_name_or_path=str(base),
        dataset_name_or_path=str(data),
        max_steps=4,
        max_seq_length=64,
        learning_rate=1e-2,
        validation_split=0.2,
        **options,
    )
    result = sft.SFTStage(settings).execute()
    assert result.success, result.error_message
    assert (
        result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
        and not result.tokenizer.chat_template
    )
    with pytest.raises(ConfigError, match="plain text has none"):
        sft.SFTStage(config(tmp_path, dataset_name_or_path=str(data), num_eval_samples=2)).execute()


# -- noise on the embeddings -----------------------------------------------------------------------


def test_documents_end_where_positions_begin_anew():
    packed = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]])
    expected = torch.tensor([[3, 3, 3, 2, 2, 1], [1, 1, 4, 4, 4, 4]])
    assert torch.equal(sft.document_lengths(packed), expected)
    padded_right = torch.tensor([[0, 1, 2, 2, 2]])
    assert torch.equal(sft.document_lengths(padded_right), torch.full((1, 5), 3))


def embeddings_of(model, batch):
    """The embeddings (B, T, D) that the layers of the model get."""
    seen = []
    layer = model.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    inputs = {name: batch[name] for name in sft.INPUT_NAMES if name in batch}
    model(**inputs, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("packed", [False, True])
def test_the_noise_of_neftune_has_its_size_and_is_there_in_training_alone(tokenizer, packed):
    model = make_model(tokenizer)
    rows = rows_of(tokenizer, *LENGTHS)
    if packed:
        rows = sft.pack(rows, 200)
    batch = sft.collate(rows)
    clean = embeddings_of(model.eval(), batch)
    with sft.noisy_embeddings(model, 5.0):
        assert torch.equal(embeddings_of(model, batch), clean)
        noise = embeddings_of(model.train(), batch) - clean  # (B, T, D)
        again = embeddings_of(model, batch) - clean
    assert torch.equal(embeddings_of(model, batch), clean)
    assert not torch.equal(noise, again)

    lengths = [row["seq_lengths"].tolist() if packed else [len(row["labels"])] for row in rows]
    for number, documents in enumerate(lengths):
        start = 0
        for length in documents:
            # Algorithm 1 of Jain et al. 2023: uniform up to alpha / sqrt(L D), D = 64 here.
            size = 5.0 / (length * 64) ** 0.5
            of_document = noise[number, start : start + length]
            assert 0.97 * size < of_document.abs().max() <= size * 1.0001
            # The standard deviation of a uniform distribution of this width, within 5 of its own.
            bound = 5 * size / (2 * of_document.numel()) ** 0.5
            assert of_document.std() == pytest.approx(size / 3**0.5, abs=bound)
            start += length


def test_no_strength_is_no_noise(tokenizer):
    model = make_model(tokenizer).train()
    batch = sft.collate(rows_of(tokenizer, *LENGTHS))
    clean = embeddings_of(model, batch)
    with sft.noisy_embeddings(model, 0.0):
        assert torch.equal(embeddings_of(model, batch), clean)


def test_training_with_noise_is_another_training_and_its_evaluation_has_none(
    model_dir, data, tmp_path
):
    losses = {}
    for alpha in (0.0, 30.0):
        options = dict(max_steps=1, validation_split=0.2, neftune_noise_alpha=alpha)
        settings = config(
            tmp_path / str(alpha),
            model_name_or_path=model_dir,
            dataset_name_or_path=data,
            **options,
        )
        losses[alpha] = sft.SFTStage(settings).execute().metrics
    assert losses[0.0]["eval_loss_before"] == losses[30.0]["eval_loss_before"]
    assert losses[0.0]["eval_loss"] != losses[30.0]["eval_loss"]
