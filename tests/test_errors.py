"""What a user can cause is told in one form, with the nearest known name."""

import pytest

from laddpo.errors import Damaged, RunFault, Stopped, UserError, choose, nearest

TABLE = {"sigmoid": 1, "ipo": 2, "hinge": 3}


def test_a_known_name_is_looked_up():
    assert choose(TABLE, "ipo", "dpo.loss", "losses.py") == 2


def test_an_unknown_name_is_answered_with_the_known_ones_and_the_nearest():
    with pytest.raises(UserError) as caught:
        choose(TABLE, "sigmod", "dpo.loss", "laddpo/core/losses.py")
    assert str(caught.value) == (
        "dpo.loss is 'sigmod'; known: hinge, ipo, sigmoid; did you mean sigmoid? "
        "fix the name or add a row to the table in laddpo/core/losses.py."
    )


@pytest.mark.parametrize("name", ["zzz", None, 7])
def test_a_name_near_to_nothing_gets_no_guess(name):
    assert nearest(name, TABLE) is None
    with pytest.raises(UserError, match="known: hinge, ipo, sigmoid; fix the name"):
        choose(TABLE, name, "dpo.loss", "losses.py")


def test_mistakes_found_together_travel_as_one_error_a_paragraph_each():
    error = UserError("a is wrong; fix a.", "b is wrong; fix b.")
    assert error.problems == ("a is wrong; fix a.", "b is wrong; fix b.")
    assert str(error) == "a is wrong; fix a.\nb is wrong; fix b."


def test_exit_codes_tell_a_mistake_from_a_fault_from_a_stop():
    assert [kind.exit_code for kind in (UserError, Damaged, RunFault, Stopped)] == [2, 2, 1, 75]


def test_what_was_found_can_be_told_with_another_cure():
    for kind in (Damaged, Stopped):
        error = kind("a: is gone.", "Make it anew.")
        assert str(error) == "a: is gone. Make it anew." and error.found == "a: is gone."
