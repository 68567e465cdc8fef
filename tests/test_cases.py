"""A case that fails, hangs or ends a rank is that case's failure alone, and names what every rank left undone."""

from tests.broken_cases import CASES
from tests.cases import verdicts


def test_one_bad_case_does_not_take_the_others_with_it(tmp_path):
    found = verdicts("tests/broken_cases.py", CASES, tmp_path, world=2, limit_s=10.0, grace_s=1.0)
    assert list(found) == list(CASES)
    assert {case for case, wrong in found.items() if not wrong} == {"first", "second", "third", "last"}, found
    assert found["fails_alike"].count("ArithmeticError: on every rank") == 2
    one = found["fails_on_one"]
    assert "ArithmeticError: on one rank" in one and "did not end, did not end" in one
    undone = one.partition("-- rank 1, left undone:\n")[2].partition("-- rank 1")[0]
    assert "waiting  fails_on_one: recv 0 peer 0 tag 77 12 B" in undone
    assert ", in fails_on_one" in one or "in fails_on_one" in one.partition("-- rank 1, stacks")[2]
    silent = found["hangs_in_c"]
    assert "in hangs_in_c" in silent.partition("-- rank 0, stacks")[2].partition("-- rank 1")[0]
    assert "waiting  hangs_in_c: allgather" in silent or "hangs_in_c: all_gather" in silent
    assert "exit code 0, did not end" in found["goes_away"]
    assert "exit code -9, " in found["is_killed"]


def test_what_was_not_begun_in_time_has_not_passed(tmp_path):
    assert verdicts("tests/broken_cases.py", ["first"], tmp_path, world=2, timeout=0.0) == {"first": "did not run"}
