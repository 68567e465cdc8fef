"""Ranks are killed amid serving; the others go on by placements made beforehand, and no token is wrong."""

import json
import signal
from contextlib import ExitStack

from tests.files_written.support import wait_for
from tests.helpers import few_or
from tests.launch import Ranks

CASES = [
    ("home", "1", "between steps", "device"),
    *few_or([("home_device_dedup", "3", "amid a step", "device")], []),
    ("stay", "2", "amid a step", "device"),
    ("home_node_dedup", "2,3", "amid a step", "node"),
    ("home", "2", "ranks a step apart", "device"),
]


WRONG_READ = ("home", "1", "a wrong read", "device")


def test_no_token_is_wrong_and_what_is_read_wrong_is_refused_by_all(tmp_path, subtests):
    """A launch begins once the one before has lost a rank and for the rest waits for its time-outs."""
    with ExitStack() as stack:
        begun = {}
        for number, case in enumerate((CASES[0], WRONG_READ, *CASES[1:])):
            folder = tmp_path / str(number)
            folder.mkdir()
            begun[case] = stack.enter_context(Ranks(4, "tests/serve/losing.py", *case, folder=folder))
            wait_for(lambda ranks=begun[case]: None not in ranks.codes() or any(map(has_lost, range(4), [ranks] * 4)))
        for case, ranks in begun.items():
            with subtests.test(", ".join(case)):
                for process in ranks.running:
                    process.wait(120)
                codes, said = ranks.codes(), [ranks.said(rank) for rank in range(4)]
                if case == WRONG_READ:
                    all_refuse(codes, said)
                else:
                    goes_on(case, codes, said)


def has_lost(rank, ranks):
    """Whether a rank has said that an operation failed."""
    return ranks.said(rank).startswith("after ")


def all_refuse(codes, said):
    """An expert that is read anew as another, in part, or not at all, for whatever reason: all ranks raise, none waits."""
    said = [said[rank] for rank in (0, 2, 3)]
    assert [codes[rank] for rank in (0, 2, 3)] == [0, 0, 0], said
    told = [json.loads(one.splitlines()[-1])["refused"] for one in said]
    words = {"wrong": "was read anew and is not what was served", "half": "is not what was served", "lacks a weight": "KeyError",
             "OSError": "the disk is gone", "RuntimeError": "no memory"}  # fmt: skip
    for kind, text in words.items():
        every = [one[kind] for one in told]
        assert all(text in one for one in every), every
        mine = [one for one in every if "CommunicationError: rank " not in one]
        assert 0 < len(mine) < len(every), "the case needs a rank that reads, and one that reads nothing"
        assert kind not in ("OSError", "RuntimeError") or all(one.startswith(kind) for one in mine), "its own error"


def goes_on(case, codes, said):
    """The others have the dead rank's requests, experts and tokens."""
    traffic, gone, _, _ = case
    dead = [int(rank) for rank in gone.split(",")]
    told = {}
    for rank in range(4):
        if rank in dead:
            assert codes[rank] == -signal.SIGKILL
            continue
        assert codes[rank] == 0, said[rank][-3000:]
        told[rank] = json.loads(said[rank].splitlines()[-1])
    for one in told.values():
        assert one["right"] and one["more"] and one["ranks"] == 4 - len(dead)
        assert one["reads"] > 0 and one["copies"] > 0, "the case asks for both"
        assert one["timeline"][-1][1] == 5 * 8
    assert len({json.dumps(one["cached"]) for one in told.values()}) == 1, "one book"
    again = {number for one in told.values() for number in one["again"]}
    if traffic == "stay":
        assert all(one["cached"][0] for one in told.values()), "every rank has every cache: nothing runs again"
    else:
        assert {number % 4 for number in again} <= set(dead) and again
