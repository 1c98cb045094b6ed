"""core/columns.py: what columns mean, and which may not be left out."""

import json

import cot_distillation
import dpo
import evaluate
import grpo
import pytest
import reward
import sft

from core.columns import detect_format, rename_columns
from core.errors import ConfigError, RowError
from core.messages import with_context
from core.preferences import to_pair, to_single
from core.rollout import to_prompt

USER = {"role": "user", "content": "3 pm?"}
GOOD = {"role": "assistant", "content": "15:00"}
SYSTEM = {"role": "system", "content": "24-hour clock."}


def written(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tmp_path, rows, stage_class=sft.SFTStage, **options):
    """All rows that a stage reads of these."""
    alias = stage_class.config_class.aliases["data"]
    config = stage_class.config_class(
        **{"model_name_or_path": "m", alias: written(tmp_path, rows), "validation_split": 0}
        | options
    )
    config.validate()
    return stage_class(config).load_data()[0]


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns",
    [
        "{prompt: customer_message, response: agent_reply}",
        "prompt=customer_message,response=agent_reply",
        {"prompt": " Customer_Message", "response": "agent_reply"},
    ],
)
def test_columns_are_named_by_an_option(tmp_path, columns):
    row = {"customer_message": "3 pm?", "agent_reply": "15:00", "text": "x", "id": 3}
    assert load(tmp_path, [row], columns=columns) == [[USER, GOOD]]


def test_names_match_without_case_and_outer_blanks(tmp_path, caplog):
    assert load(tmp_path, [{"Prompt ": "3 pm?", "RESPONSE": "15:00", "Id": 1}]) == [[USER, GOOD]]
    assert "(not used: Id)" in caplog.text
    with pytest.raises(
        ConfigError, match="'prompt' and 'Prompt' both stand for prompt; choose with"
    ):
        load(tmp_path, [{"prompt": "a", "Prompt": "b", "response": "c"}])
    rows = load(
        tmp_path, [{"prompt": "a", "Prompt": "3 pm?", "response": "15:00"}], columns="prompt=Prompt"
    )
    assert rows == [[USER, GOOD]]


@pytest.mark.parametrize(
    "columns, words",
    [
        ("{promt: a, response: b}", "unknown name 'promt'; did you mean 'prompt'"),
        ("{prompt: aa, response: c}", "unknown column of the data 'aa'"),
        ("{prompt: question_txt, response: b}", "did you mean 'question_text'"),
        ("{prompt: a, response: a}", "names the column a twice"),
        ("{a: prompt, b: response}", "the name of a format comes first; write {prompt: a}"),
        ("{contxt: null}", "unknown column of the data 'contxt'"),
        ("{prompt: a, response: b", "columns.*not valid YAML"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(tmp_path, columns, words):
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, [{"a": "x", "b": "y", "question_text": "z"}], columns=columns)


def test_the_names_of_a_mapping_decide_between_formats():
    formats = {"question": ["question"], "prompt-response": ["prompt", "response"]}
    columns = ["question", "prompt", "response"]
    with pytest.raises(ConfigError, match="choose with dataset_format"):
        detect_format(columns, formats)
    assert detect_format(columns, formats, mapped=["prompt", "response"]) == "prompt-response"
    names = rename_columns(["question", "q"], {"question": "q"}, {"question"}, any_name=False)
    assert names == {"q": "question", "question": None}


@pytest.mark.parametrize(
    "columns, formats, mapping",
    [
        (
            ["Ticket ID", "Subject", "Description", "Agent Reply", "Created at"],
            sft.FORMATS,
            "{prompt: Description, response: Agent Reply}",
        ),
        (
            ["answerText", "userQuestion"],
            sft.FORMATS,
            "{prompt: userQuestion, response: answerText}",
        ),
        (["left", "right"], sft.FORMATS, "{prompt: left, response: right}"),
        (["prompt", "agent: reply"], sft.FORMATS, '{response: "agent: reply"}'),
        (["chat", "lang"], sft.FORMATS, "{messages: chat}"),
        (["url", "content"], sft.FORMATS, "{text: content}"),
        (
            ["worse", "better", "ask"],
            dpo.FORMATS,
            "{prompt: ask, chosen: better, rejected: worse}",
        ),
        (
            ["Input.q", "response_a", "response_b", "winner"],
            dpo.FORMATS,
            "{question: Input.q, answer_a: response_a, answer_b: response_b, preference: winner}",
        ),
        (["enquiry", "n"], grpo.GRPOConfig.formats, "{prompt: enquiry}"),
    ],
)
def test_an_unknown_format_is_answered_with_a_mapping_to_paste(columns, formats, mapping):
    with pytest.raises(ConfigError) as error:
        detect_format(columns, formats)
    assert f"--columns='{mapping}'. Known:" in str(error.value)
    names = rename_columns(columns, sft.SFTConfig(columns=mapping).columns, {*mapping}, True)
    detect_format([name for name in names.values() if name], formats)


def test_the_order_of_columns_does_not_say_which_answer_is_better():
    with pytest.raises(ConfigError, match="the columns are ask, x, y. Known"):
        detect_format(["ask", "x", "y"], dpo.FORMATS)


def test_a_table_without_a_header_shows_it():
    with pytest.raises(ConfigError, match="the columns are Hello, I would like to know when my"):
        detect_format(
            ["Hello, I would like to know when my order arrives", "On Monday"], sft.FORMATS
        )
    for first_line in (["Where is order 0?", "It ships."], ["Export of 2024-01-01", "column 2"]):
        with pytest.raises(ConfigError, match="first line of the file is not a header, add one"):
            detect_format(first_line, sft.FORMATS)
    with pytest.raises(ConfigError, match="the columns are ask, n. Known"):
        detect_format(["ask", "n"], dpo.FORMATS)
    with pytest.raises(ConfigError, match="the columns are c0, .*, c24 and 75 more"):
        detect_format([f"c{n}" for n in range(100)], dpo.FORMATS)


# -- columns that join the prompt ------------------------------------------------------------------


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, GOOD]},
        {"conversations": [{"from": "human", "value": "3 pm?"}, {"from": "gpt", "value": "15:00"}]},
        {"instruction": "3 pm?", "output": "15:00"},
        {"query": "3 pm?", "response": "15:00"},
        {"problem": "3 pm?", "solution": "15:00"},
        {"input": "3 pm?", "output": "15:00"},
        {"messages": [SYSTEM, USER, GOOD]},
    ],
)
def test_a_system_column_becomes_the_system_message(tmp_path, column, row):
    rows = [row | {column: SYSTEM["content"]}, row | {column: ""}, row | {column: None}]
    with_system, *others = load(tmp_path, rows)
    assert with_system == [SYSTEM, USER, GOOD]
    assert all(other[-2:] == [USER, GOOD] for other in others)


def test_a_system_column_is_read_by_every_recipe(tmp_path):
    pair = {"system": "24-hour clock.", "question": "3 pm?", "chosen": "15:00", "rejected": "3"}
    for stage_class in (dpo.DPOStage, reward.RewardStage):
        assert load(tmp_path, [pair], stage_class)[0]["prompt"] == [SYSTEM, USER]
    conversations = {"chosen": [USER, GOOD], "rejected": [USER, GOOD | {"content": "3"}]}
    assert to_pair({**conversations, "system": SYSTEM["content"]}, "chosen-rejected")["prompt"] == [
        SYSTEM,
        USER,
    ]
    single = {"prompt": "3 pm?", "completion": "15:00", "label": True, "system": "24-hour clock."}
    assert to_single(single)["prompt"] == [SYSTEM, USER]
    row = {"question": "3 pm?", "answer": "15:00", "system_prompt": "24-hour clock."}
    assert to_prompt(row, "question")["prompt"] == [SYSTEM, USER]
    assert evaluate.convert(row, "question-answer")["prompt"] == [SYSTEM, USER]
    row |= {"rationale": "12 + 3"}
    (row,) = load(tmp_path, [row], cot_distillation.CoTDistillationStage, answer_check="exact")
    prompt = cot_distillation.to_conversation(cot_distillation.CoTConfig(), row)[:-1]
    assert prompt == [SYSTEM, USER]


def test_another_system_message_is_refused():
    with pytest.raises(RowError, match="column system differs from its system message"):
        with_context([SYSTEM, USER], {"system": "12-hour clock."})
    with pytest.raises(RowError, match="columns system and system_prompt differ"):
        with_context([USER], {"system": "a", "system_prompt": "b"})
    assert with_context([SYSTEM, USER], {"system": " 24-hour clock.\n"}) == [SYSTEM, USER]
    with pytest.raises(RowError, match="column system is not text"):
        with_context([USER], {"system": ["a"]})


def test_tools_stay_in_the_first_message():
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = with_context([{**USER, "tools": tools}], {"system": SYSTEM["content"]})
    assert messages == [{**SYSTEM, "tools": tools}, USER]
    messages = with_context([USER], {"tools": json.dumps(tools), "history": [["a", "b"]]})
    assert messages[0] == {"role": "user", "content": "a", "tools": tools}


@pytest.mark.parametrize(
    "history",
    [
        [["2 pm?", "14:00"]],
        '[["2 pm?", "14:00"]]',
        [{"role": "user", "content": "2 pm?"}, {"role": "assistant", "content": "14:00"}],
    ],
)
def test_a_history_becomes_earlier_turns(tmp_path, history):
    row = {"instruction": "3 pm?", "input": "", "output": "15:00", "history": history}
    (chat,) = load(tmp_path, [row | {"system": SYSTEM["content"]}])
    assert chat[0] == SYSTEM and chat[-2:] == [USER, GOOD]
    assert [turn["content"] for turn in chat[1:3]] == ["2 pm?", "14:00"]
    for empty in ([], None, "", "[]"):
        assert load(tmp_path, [row | {"history": empty}]) == [[USER, GOOD]]


def test_a_history_that_cannot_be_read_leaves_the_row_out():
    for history in ([["a"]], ["a", "b"], "a", [["a", None]]):
        with pytest.raises(RowError, match="with a history that is not "):
            with_context([USER], {"history": history})


def test_the_context_of_an_instruction_follows_it(tmp_path):
    row = {"instruction": "3 pm?", "context": "24-hour clock.", "response": "15:00"}
    ((user, answer),) = load(tmp_path, [row])
    assert user["content"] == "3 pm?\n\n24-hour clock." and answer == GOOD
    template = {"instruction_template": "{instruction} {input}\n{response}"}
    ((user, _),) = load(tmp_path, [row], **template)
    assert user == {**USER, "input": "24-hour clock."}


# -- columns that are not used ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["context", "Passage", "documents", "images", "search_context", "Instructions"]
)
def test_a_column_that_changes_what_a_row_means_is_refused(tmp_path, name):
    row = {"prompt": "3 pm?", "response": "15:00", name: "24-hour clock."}
    with pytest.raises(ConfigError, match=f"the column {name} may change what a row means") as e:
        load(tmp_path, [row])
    assert f"say that it is not needed: --columns='{{{name}: null}}'" in str(e.value)
    assert load(tmp_path, [row], columns={name: None}) == [[USER, GOOD]]
    for empty in ("", None, [], "[]", 7):
        assert load(tmp_path, [row | {name: empty}]) == [[USER, GOOD]]


def test_a_row_for_each_message_is_no_text_to_train_on(tmp_path):
    row = {"conversation_id": 1, "role": "user", "text": "3 pm?"}
    with pytest.raises(ConfigError, match="each row seems to be one message.* column role; write"):
        load(tmp_path, [row])
    load(tmp_path, [row], columns={"role": None})


def test_the_refusal_names_the_mapping_that_joins_the_column(tmp_path):
    row = {"question": "3 pm?", "answer": "15:00", "passage": "24-hour clock."}
    with pytest.raises(ConfigError, match="--columns='{context: passage}'"):
        load(tmp_path, [row])
    ((user, _),) = load(tmp_path, [row], columns="context=passage")
    assert user["content"] == "24-hour clock.\n\n3 pm?"


def test_what_only_rewards_get_is_said(tmp_path, caplog):
    row = {"question": "3 pm?", "answer": "15", "context": "24-hour clock."}
    (prompt,) = load(tmp_path, [row], grpo.GRPOStage, reward="numeric")
    assert prompt["columns"] == {"answer": "15", "context": "24-hour clock."}
    assert "the column context is passed to the reward functions but is not part" in caplog.text
    row = {"q": "3 pm?", "gold": "15"}
    columns = "{question: q, answer: gold}"
    (prompt,) = load(tmp_path, [row], grpo.GRPOStage, reward="numeric", columns=columns)
    assert prompt == {"prompt": [USER], "columns": {"answer": "15"}}


def test_columns_of_plain_text_are_no_context(tmp_path):
    assert load(tmp_path, [{"text": "a", "document": "b", "system": "c"}]) == ["a"]


# -- messages as text ------------------------------------------------------------------------------


def test_messages_in_a_cell_are_json(tmp_path):
    row = {"messages": json.dumps([USER, GOOD])}
    assert load(tmp_path, [row]) == [[USER, GOOD]]
    pair = {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, SYSTEM | GOOD])}
    pair["rejected"] = pair["rejected"].replace("15:00", "3")
    assert to_pair(pair, "chosen-rejected")["prompt"] == [USER]
    # Any other JSON is a text.
    text = '[{"time": "15:00"}]'
    ((_, answer),) = load(tmp_path, [{"prompt": "3 pm?", "response": text}])
    assert answer["content"] == text
    with pytest.raises(RowError, match="as Python prints them; write them with json.dumps"):
        sft.to_messages({"messages": str([USER, GOOD])}, "messages")
    with pytest.raises(RowError, match="messages that are broken JSON"):
        sft.to_messages({"messages": json.dumps([USER, GOOD])[:-9]}, "messages")
