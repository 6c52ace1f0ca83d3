"""What an answer is worth, and what it can't earn by."""

import pytest

from shoal.errors import ConfigError
from shoal.post.rewards import RewardConfig, consistent, language_of, language_share, reward, well_formed

ALL = RewardConfig(accuracy=1.0, format=0.25, language=0.5)
GOOD = "Add the two.\n3+4=7</think><answer>7</answer>"


def test_the_parts_add_up_by_their_weights():
    assert reward(ALL, "What is 3 + 4?", GOOD, "right") == 1.75
    assert reward(ALL, "What is 3 + 4?", GOOD, "wrong") == 0.25
    assert reward(RewardConfig(), "What is 3 + 4?", GOOD, "wrong") == 0


@pytest.mark.parametrize(
    "text",
    ["7", "<answer>7</answer>", "x</think>7", "x</think><answer>7", "x</think><answer>7</answer> more",
     "<answer>7</answer></think><answer>7</answer>", "x</think><answer>7</answer><answer>7</answer>", ""],
)  # fmt: skip
def test_another_form_earns_no_format(text):
    assert well_formed(text) == 0


def test_language_is_told_by_script_and_pays_only_for_right_answers():
    korean = "두 수를 더하자.\n3+4=7</think><answer>7</answer>"
    mixed = "두 수를 add them.\n3+4=7</think><answer>7</answer>"
    assert reward(ALL, "What is 3 + 4?", korean, "right") == 1.25
    assert reward(ALL, "3 더하기 4는 얼마인가?", korean, "right") == 1.75
    assert 1.25 < reward(ALL, "What is 3 + 4?", mixed, "right") < 1.75
    assert reward(ALL, "What is 3 + 4?", korean.replace("두 수를 더하자.", "add"), "wrong") == 0.25


def test_languages():
    assert [language_of(t) for t in ("Sort 3, 1.", "다음을 정렬하라: 3, 1", "把数字排序：3, 1", "3 + 4 = ?")] == [
        "en",
        "ko",
        "zh",
        "en",
    ]
    assert language_share("3+4=7", "en") == 1 and language_share("一步 add", "en") == pytest.approx(1 / 3)
    assert language_share("x + y = z, 2x", "ko") == 1  # single letters are variables
    assert [consistent("Add 3 and 4.", f"{said}</think>") for said in ("add", "더하자", "3+4")] == [True, False, True]


def test_weights_are_numbers_from_zero():
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="rewards.format"):
            RewardConfig(format=bad)
