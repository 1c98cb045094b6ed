"""core/final_answers.py: where a text gives its final answer, as `numeric` reads it."""

import itertools
import time

import pytest

from core.final_answers import (
    find_final_answer,
    find_marked_answer,
    opens_thinking,
    without_thinking,
)
from core.judge import parse_score, parse_verdict
from core.rationales import steps_in
from core.verifiers import numeric

# (expected answer, text, score)
TABLE = [
    ("18", "<answer>18</answer>", 1),
    ("18", "<think>maybe 18</think>\n<answer>17</answer>", 0),
    ("18", "<think>20 - 2 = 17</think>\n<answer>18</answer>", 1),
    ("18", "<think>\nadd 9 and 9\n</think>\n<answer>18</answer>", 1),
    ("18", "<think>17</think>18", 1),
    ("18", "<think>18</think>17", 0),
    ("18", "20 - 2 is 18, no, 17</think>The result is 18.", 1),
    ("18", "so \\boxed{17}</think>#### 18", 1),
    ("18", "<think>The answer is \\boxed{18}", 0),
    ("18", "<think>#### 18\n<answer>18</answer>", 0),
    ("18", "#### 18\n<think>Check: 9 + 8 = 17", 1),
    ("18", "<think>a: 1</think>\n17\n<think>no, 18</think>\n<answer>18</answer> in 2 steps", 1),
    ("18", "<Think>17</Think><ANSWER> 18 </ANSWER>", 1),
    ("18", "<thinking>\\boxed{17}</thinking>Answer: 18", 1),
    ("18", "<reasoning>9 + 8 = 17</reasoning>\n<answer>\n18\n</answer>", 1),
    ("18", "[THINK]17[/THINK]18", 1),
    ("18", "◁think▷17◁/think▷\\boxed{18}", 1),
    (
        "18",
        "<|channel|>analysis<|message|>17<|end|><|start|>assistant<|channel|>final<|message|>18",
        1,
    ),
    ("18", "analysisWe get 17.assistantfinalIt is **18**.", 1),
    ("18", "analysisWe get 18", 0),
    ("18", "<think>1</think><answer>\\boxed{18}</answer>", 1),
    ("18", "<answer>#### 18</answer>", 1),
    ("18", "<answer>The answer is $18$.</answer>", 1),
    ("18", "<answer>17</answer> no: <answer>18</answer>", 1),
    ("18", "I write <answer></answer> tags. <answer>18</answer> <answer></answer>", 1),
    ("18", "<answer>18", 1),
    ("18", "<SOLUTION>18</SOLUTION>", 1),
    ("1/2", "<answer>1/2</answer>", 1),
    ("0.5", "<answer>1/2</answer>", 1),
    ("1/2", "<answer>2</answer>", 0),
    ("18", "answer:18", 1),
    ("18", "Answer: 18", 1),
    ("18", "**Answer:** 18", 1),
    ("18", "**Final Answer**: 18 apples for 2 people", 1),
    ("18", "### Final Answer\n\n18", 1),
    ("18", "Answer:\n**18**\nThis took 3 steps.", 1),
    ("18", "The answer is 18 because 20 - 2 = 18 and 2 are left.", 1),
    ("18", "The answer to 20 - 2 is $18$, since 2 go.", 1),
    ("18", "The answer is found by adding 9 and 9.\n9 + 9 = 18", 1),
    ("18", "Answer: 17\nWait, that is wrong.\nAnswer: 18", 1),
    ("18", "the answer is: (B) 18", 1),
    ("18", "Answer: $18, since $9 + $9", 1),
    ("18", "Answer: x = 18", 1),
    ("18", "The answer is 18!", 1),
    ("-18", "The answer is −18.", 1),
    ("1800", "ANSWER = 1,800", 1),
    ("18", "Answer：18", 1),
    ("18", "答案是18", 1),
    ("18", "The final answer is: $\\boxed{18}$. I hope it is correct.", 1),
    ("18", "\\boxed{17} is wrong, so \\boxed{18}, in 2 steps", 1),
    ("18", "\\boxed{18\\text{ apples}}", 1),
    ("18", "$$\\boxed{\\text{18}}$$", 1),
    ("18", "\\boxed{x = 18}", 1),
    ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}} of 3 cakes", 1),
    ("18", "\\boxed{\\boxed{18}}", 1),
    ("18", "the final answer to question 2 is about adding 9 and 9 which gives 18", 1),
    ("{1,2}", "\\boxed{\\{1, 2\\}}", 1),
    ("1, 2", "x is \\boxed{1} or \\boxed{2}.", 1),
    ("18", "\\boxed{17}\n#### 18", 1),
    ("18", "#### 17\nNo: \\boxed{18}", 1),
    ("18", "#### \\boxed{18}", 1),
    ("18", "#### 18\nDone in 3 steps", 1),
    ("18", "####\n18", 1),
    ("18", "#### $18 per 2 hours", 1),
    ("18", "#### Step 2\n9 + 9 = 18", 1),
    ("18", "#### 2. Add them\n9 + 9 = 18", 1),
    ("18", "#### 18\n#### Why\n20 - 2", 1),
    ("18", "#### The answer is 18", 1),
    ("18", "9 + 9 = 18", 1),
    ("18", "", 0),
    ("18", "#### none, of 18", 1),
    ("We add. So $\\boxed{18}$ in 2 steps.", "18", 1),
    ("<think>3</think><answer>18</answer>", "18.0", 1),
    ("50%", "\\boxed{50\\%}", 1),
    ("18", "\\boxed{\\$18}", 1),
    ("18", "\\boxed{18\\text{ cm}^2}", 1),
    ("18", "\\text{Answer: } 18", 1),
    ("18", "\\textbf{Answer:} 18", 1),
    ("18", "Answer: \\(18\\)", 1),
    ("18", "Answer: \\[ 18 \\]", 1),
    ("2x+1", "Answer: 1 + 2x", 1),
    ("x+1", "Answer: x + 1", 1),
    ("18", "Answer: 9 + 9 = 18 dollars", 1),
    ("18", "The correct answer is option C: 18", 1),
    ("18", "Final Answer: 18 kg", 1),
    ("18", "Answer: approximately 18", 1),
    ("18", "Answer: 18 (eighteen)", 1),
    ("(1, 2)", "The answer is (1, 2).", 1),
    ("(1, 2)", "Answer: $(1, 2)$", 1),
    ("1e6", "Answer: 1000000", 1),
    ("3.5", "Answer: 3 1/2", 1),
    ("18", "So the answer is not 17, it is 18.", 1),
    ("5", "2 + 3 = \\boxed{5}", 1),
    ("\\sqrt{2}", "Answer: \\sqrt{2} cm", 1),
    ("\\pi", "<answer>\\pi</answer>", 1),
    ("18", "<answer>18 apples</answer>", 1),
    ("18", "<answer>$18</answer>", 1),
    ("7", "<answer>3 + 4</answer>", 1),
    ("18", "</think>\n\n18", 1),
    ("18", "<think></think>18", 1),
    ("18", "The answer:18.", 1),
    ("18", "**Answer: 18**", 1),
    ("18", "Answer: **18**", 1),
    ("18", "*Answer*: `18`", 1),
    ("18", "My answer is 18 and my friend's answer is 17?", 0),
    ("18", "A: 18", 1),
    ("18", "= 18", 1),
    ("18", "Result: 18", 1),
    ("18", "Therefore, Tom has 18 apples.", 1),
    ("18", "The answer is \\boxed{18", 1),
    ("18", "The answer is 18.\n\nLet me know if you have 2 more questions!", 1),
    ("18", "Answer: 18\n</answer>", 1),
]


@pytest.mark.parametrize("gold, text, score", TABLE)
def test_the_final_answer_is_read_wherever_models_put_it(gold, text, score):
    assert numeric([None], [text], [gold]) == [score]


THOUGHTS = {
    "none": "",
    "a block": "<think>9 + 8 = 17</think>\n",
    "a block whose start is in the prompt": "9 + 8 = 17, so Answer: 17</think>\n\n",
    "every marker in a block": "<think>\\boxed{17} <answer>17</answer>\n#### 17\n</think>",
    "two blocks": "<think>17</think>Well,<thinking>\\boxed{17}</thinking>",
    "text before": "I add them. The answer is 17.\nWait.\n",
}
ANSWERS = ("<answer>{}</answer>", "$\\boxed{{{}}}$.", "#### {}", "**Answer:** {}", "It is {}.")


def test_every_way_to_answer_is_read_behind_every_way_to_think():
    pairs = list(itertools.product(THOUGHTS.values(), ANSWERS))
    # A text without a mark is not told from what is said before it.
    pairs.remove((THOUGHTS["text before"], "It is {}."))
    right = [thought + answer.format(18) for thought, answer in pairs]
    wrong = [thought + answer.format(17) for thought, answer in pairs]
    golds = ["18"] * len(pairs)
    assert numeric([None] * len(pairs), right, golds) == [1.0] * len(pairs)
    assert numeric([None] * len(pairs), wrong, golds) == [0.0] * len(pairs)


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_is_cut_while_thinking_has_none(answer):
    assert numeric([None], ["<think>So " + answer.format(18)], ["18"]) == [0.0]


def test_what_is_outside_of_thinking_stays():
    assert without_thinking("a <think>b</think> c <think>d") == "a \n c"
    assert without_thinking("a</think>b</think>c") == "c"
    assert without_thinking("17 <think>a</think>b</think>c") == "c"
    assert without_thinking("1 < 2 and [x] > y") == "1 < 2 and [x] > y"


def test_a_text_without_a_mark_has_no_marked_answer():
    assert find_marked_answer("9 + 9 = 18") == ""
    assert find_marked_answer("9 + 9 = 17\n#### 18 apples") == "18"


def test_a_prompt_may_end_inside_a_thinking_block():
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_thinking("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "character", ["\n", " ", "$", "*", "{", "\\boxed{", "\\boxed{1}", "<", "#"]
)
def test_long_runs_of_a_character_cost_no_time(character):
    """A pattern that tries each of their places anew would take a minute."""
    run = character * 100_000 + "x"
    began = time.process_time()
    find_final_answer(run)
    find_final_answer("\\boxed{1}" + run + "\\boxed{2}")
    steps_in(run + "\n#### 7", "7")
    parse_verdict(run, "mark")
    parse_score(run, "mark")
    assert time.process_time() - began < 5


def test_a_line_of_stars_before_the_marker_is_no_step():
    assert steps_in("3 + 4 = 7\n  \n **#### 7**", "7") == "3 + 4 = 7"
    assert steps_in("** #### 7", "7") == "" and steps_in("a **b** #### 7", "7") == "a **b**"
