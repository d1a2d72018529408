"""The toy tasks: answers by other means than the solver's own, splits apart, rows reproducible."""

import re

import pytest

from maxllm.data import tasks

MEANING = {
    "What is the largest digit?": "largest",
    "何者最大？": "largest",
    "What is the smallest digit?": "smallest",
    "何者最小？": "smallest",
    "What is the last digit?": "last",
    "末位为何？": "last",
    "How many digits are there?": "count",
    "共有几位？": "count",
}


def answer_by_other_means(prompt):
    """By arithmetic and a loop over the ten digits, where the solver uses max, min and len."""
    instruction, digits = prompt.split("\n")
    present = [digit for digit in "0123456789" if digit in digits]
    count = sum(digits.count(digit) for digit in "0123456789")
    answers = {"largest": present[-1], "smallest": present[0]}
    answers |= {"last": str(int(digits) % 10), "count": f"{count}"}
    return answers[MEANING[instruction]]


def prompt_of(row):
    return row["prompt"] if "prompt" in row else f"{row['instruction']}\n{row['input']}"


def digits_of(rows):
    return {prompt_of(row).split("\n")[1] for row in rows}


KINDS = {
    "instruction": tasks.instruction_rows,
    "preference": tasks.preference_rows,
    "prompt": tasks.prompt_rows,
}


def test_known_answers():
    assert tasks.solve("末位为何？\n31910") == "0"
    assert tasks.solve("How many digits are there?\n2024") == "4"
    assert tasks.solve("What is the largest digit?\n4051") == "5"
    assert tasks.solve("何者最小？\n4051") == "0"


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_solver_is_right_about_every_prompt(split):
    for row in tasks.prompt_rows(split, 500, 3):
        assert row["answer"] == answer_by_other_means(row["prompt"])
    for row in tasks.instruction_rows(split, 500, 3):
        assert tasks.solve(prompt_of(row)) == answer_by_other_means(prompt_of(row))


def test_demonstrations():
    """Held-out outputs are all right, exact match is measured on them; of the others most are, all digits."""

    def right(split):
        rows = list(tasks.instruction_rows(split, 1000, 3))
        assert all(re.fullmatch(r"\d+", row["output"]) for row in rows)
        return sum(row["output"] == answer_by_other_means(prompt_of(row)) for row in rows) / len(rows)

    assert right("heldout") == 1
    assert right("train") > 0.6


def test_chosen_is_right_and_rejected_is_wrong():
    for row in tasks.preference_rows("train", 1000, 3):
        assert row["chosen"] == answer_by_other_means(row["prompt"])
        assert row["answer"] == row["chosen"]
        assert row["rejected"] != row["chosen"] and re.fullmatch(r"\d+", row["rejected"])
        assert tasks.check(row["prompt"], row["chosen"])
        assert not tasks.check(row["prompt"], row["rejected"])


def test_wrong_answers_are_not_told_apart_by_their_length():
    """Most have the right length, so length alone does not solve the reward model's task; a few have another,
    so that the reward model knows such replies too."""
    rows = list(tasks.preference_rows("train", 1000, 0))
    same = sum(len(row["chosen"]) == len(row["rejected"]) for row in rows)
    assert 300 < same <= 990


def test_all_wordings_and_all_lengths_occur():
    rows = list(tasks.instruction_rows("train", 600, 0))
    assert {row["instruction"] for row in rows} == set(MEANING)
    assert {len(row["input"]) for row in rows} == set(range(tasks.DIGITS_MIN, tasks.DIGITS_MAX + 1))
    assert all(re.fullmatch(r"\d+", row["input"]) for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_splits_are_disjoint(kind):
    """In digits, not just in prompts: a held-out number is never seen under another instruction either."""
    train = digits_of(tasks.instruction_rows("train", 3000, 0)) | digits_of(KINDS[kind]("train", 3000, 1))
    heldout = digits_of(KINDS[kind]("heldout", 300, 0)) | digits_of(KINDS[kind]("heldout", 300, 7))
    assert not train & heldout and len(heldout) > 100


def test_an_eighth_is_held_out():
    """Of all inputs; five standard deviations of the binomial."""
    every = [
        f"{n:0{places}d}"
        for places in range(tasks.DIGITS_MIN, tasks.DIGITS_MAX + 1)
        for n in range(10**places)
    ]
    held = sum(tasks.split_of(digits) == "heldout" for digits in every)
    assert abs(held - len(every) / 8) < 5 * (len(every) * 7 / 64) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_a_function_of_split_and_seed(kind):
    rows = KINDS[kind]
    assert list(rows("train", 50, 4)) == list(rows("train", 50, 4))
    assert list(rows("train", 20, 4)) == list(rows("train", 50, 4))[:20]
    assert list(rows("train", 50, 4)) != list(rows("train", 50, 5))
    assert len(list(rows("heldout", 0, 0))) == 0


def test_rows_have_the_users_fields():
    (instruction,), (preference,), (prompt,) = (list(rows("train", 1, 0)) for rows in KINDS.values())
    assert set(instruction) == {"instruction", "input", "output"}
    assert set(preference) == {"prompt", "chosen", "rejected", "answer"}
    assert set(prompt) == {"prompt", "answer"}


def test_stages_draw_different_rows():
    """SFT, reward model and PPO of one seed do not see the same questions in the same order."""
    drawn = [[prompt_of(row) for row in rows("train", 50, 0)] for rows in KINDS.values()]
    assert drawn[0] != drawn[1] and drawn[1] != drawn[2] and drawn[0] != drawn[2]


@pytest.mark.parametrize("reply", ["3", " 3\n", "3 "])
def test_check_ignores_white_space_around(reply):
    assert tasks.check("What is the largest digit?\n312", reply)


@pytest.mark.parametrize("reply", ["", "1", "33", "3.", "3 3", "three"])
def test_check_refuses_everything_else(reply):
    assert not tasks.check("What is the largest digit?\n312", reply)


@pytest.mark.parametrize(
    "prompt", ["", "What is the last digit?", "Add.\n12", "What is the last digit?\n1a2"]
)
def test_solve_refuses_what_is_no_task(prompt):
    with pytest.raises(ValueError, match="is not a prompt of these tasks"):
        tasks.solve(prompt)
