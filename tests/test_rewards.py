"""Rewards read any text without failing, and find the number that was written."""

from __future__ import annotations

import json
import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.rewards import (
    FORMAT_REWARD,
    answer_reward,
    completion_text,
    extract_lines,
    extract_number,
    format_reward,
    is_safe_to_evaluate,
    math_reward,
    score_answer,
)

COUNTDOWN = {"question": "", "answer": "(4 + 1)*2", "metadata": {"numbers": [1, 2, 4], "target": 10}}
WORDS = st.text(alphabet=string.ascii_letters + " ,.\n", max_size=60)
MARKERS = st.sampled_from(["The answer is ", "Answer: ", "**Answer:** ", "#### ", "\\boxed{", "x = ", "answer is: $"])


def _entry(answer: str) -> str:
    return json.dumps({"question": "?", "answer": answer, "metadata": {}})


def _answer_rewards(*completions, answer="7", task="chain_sum"):
    count = len(completions)
    return answer_reward([""] * count, list(completions), None, task=[task] * count, entry=[_entry(answer)] * count)


@settings(deadline=None)
@given(before=WORDS, noise=st.integers(0, 99), marker=MARKERS, number=st.integers(-(10**9), 10**9), after=WORDS)
def test_the_number_behind_the_last_marker_is_found(before, noise, marker, number, after):
    after = after.replace("answer", "")
    assert extract_number(f"{before} = {noise} {before}\n{marker}{number} {after} {noise}") == str(number)


@settings(deadline=None)
@given(before=WORDS, number=st.integers(-(10**9), 10**9), after=WORDS)
def test_without_a_marker_the_last_number_is_found(before, number, after):
    before, after = (text.replace("answer", "") for text in (before, after))
    assert extract_number(f"3 then {before} {number} {after}") == str(number)


@settings(deadline=None)
@given(number=st.integers(0, 10**9), plus=st.booleans(), places=st.integers(0, 3))
def test_spellings_of_one_number_are_one(number, plus, places):
    spelled = f"{'+' if plus else ''}{number:,}" + ("." + "0" * places if places else "")
    assert extract_number(f"Answer: {spelled}.") == str(number)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8-5", "5"),
        ("0 - 4 - 8 = -12", "-12"),
        ("The answer is wrong.\nIt is 8", "8"),
        ("The answer is\n\n12\n3", "12"),
        ("It costs $1,050.50 today", "1050.5"),
        ("Answer: .50", "0.5"),
        ("-0.0", "0"),
        ("x2 and nothing else", None),
        ("", None),
    ],
)
def test_numbers_in_the_wild(text, number):
    assert extract_number(text) == number


@settings(deadline=None)
@given(text=st.text(max_size=300))
def test_no_text_is_too_strange(text):
    for answer, task in (("7", "chain_sum"), ("north", "gsm_symbolic"), ("1 2\n3 4", "spiral_matrix")):
        assert _answer_rewards(text, answer=answer, task=task)[0] in (0.0, 1.0)
    assert format_reward([""], [text])[0] in (0.0, FORMAT_REWARD)
    assert extract_lines(text, 2).count("\n") <= 1


@settings(max_examples=25, deadline=None)
@given(text=st.text(alphabet=string.printable, max_size=60))
def test_math_reward_reads_anything(text):
    assert math_reward([""], [text], None, answer=["7"])[0] in (0.0, 1.0)


@pytest.mark.parametrize(
    "text", ["=" * 200_000, "#" * 200_000, "answer is " * 20_000, "1," * 100_000, "\\boxed{" * 30_000]
)
def test_long_repetitive_text_is_read_in_linear_time(text):
    started = time.process_time()
    rewards = [*_answer_rewards(text), *_answer_rewards(text, answer="north"), *format_reward([""], [text])]
    assert all(0 <= reward <= 1 for reward in rewards)
    assert time.process_time() - started < 20, "a quadratic reading takes minutes"


def test_answer_reward_is_all_or_nothing():
    texts = ["3 + 4 = 7", "The answer is 7.", "7", "17", "The answer is 77", "I do not know", ""]
    assert _answer_rewards(*texts) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_an_answer_in_other_decimals_is_right():
    assert _answer_rewards("it is 3.2", "it is 3.20", "it is 3.21", answer="3.20", task="basic_arithmetic") == [1, 1, 0]


def test_answers_of_several_lines():
    assert _answer_rewards("Answer:\n1 2\n3 4\nDone.", "1 2", answer="1 2\n3 4", task="spiral_matrix") == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("The answer is (4+1)*2.", 1.0),
        ("\\boxed{2*(1 + 4)}", 1.0),
        ("2*(4+1) = 10", 1.0),
        ("Answer: `2*4 + 2*1`", 0.0),  # takes the 2 twice
        ("Answer: 10", 0.0),
    ],
)
def test_countdown_takes_any_right_expression(text, reward):
    assert answer_reward([""], [text], None, task=["countdown"], entry=[json.dumps(COUNTDOWN)]) == [reward]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "exit()", "9**9**9", "(9**9)**9", "99999!", "[1]*99999999*9999",
        "'a'*9999999", "1e999999999", "'%9999999d' % 1", "lambda: 0", "x.real", "2**99", "1" * 5000,
    ],
)  # fmt: skip
def test_dangerous_text_is_never_evaluated(text):
    assert not is_safe_to_evaluate(text)
    assert score_answer("countdown", text, COUNTDOWN) == 0.0


@pytest.mark.parametrize("text", ["(4 + 1)*2", "x**2 + 3*x", "sin(x)/2 + C", "[[0, 1], [1, 0]]", "north by west", "-3"])
def test_plain_answers_reach_the_scorer(text):
    assert is_safe_to_evaluate(text)


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("so \\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("the answer is 7", "7", 1.0),
        ("the answer is 8", "7", 0.0),
        ("no idea", "7", 0.0),
        ("$x = 3$", "$3$", 1.0),
    ],
)
def test_math_reward(text, answer, reward):
    assert math_reward([""], [text], None, answer=[answer]) == [reward]


@pytest.mark.parametrize(
    ("text", "is_formed"),
    [
        ("4 + 3 = 7.\nThe answer is 7.", True),
        ("The final answer is: **7**\n", True),
        ("#### 7", True),
        ("\\boxed{7}", True),
        ("4 + 3 = 7", False),
        ("The answer is 7.\nBut wait", False),
        ("The answer is", False),
        ("", False),
    ],
)
def test_format_reward(text, is_formed):
    assert format_reward([""], [text]) == [FORMAT_REWARD if is_formed else 0.0]


def test_chats_and_strings_are_read_alike():
    chat = [
        {"role": "assistant", "content": "hm"},
        {"role": "tool", "content": "8"},
        {"role": "assistant", "content": "7"},
    ]
    assert _answer_rewards("7", chat) == [1.0, 1.0]
    assert completion_text([{"role": "assistant", "content": [{"type": "text", "text": "7"}]}]) == "7"
    assert completion_text([{"role": "assistant", "content": None}]) == ""
    assert completion_text([]) == ""


@pytest.mark.parametrize(("reward", "column"), [(answer_reward, "entry"), (math_reward, "answer")])
def test_a_missing_column_is_named(reward, column):
    with pytest.raises(ValueError, match=f"column '{column}'.*got task"):
        reward([""], ["7"], None, task=["chain_sum"])
