"""A policy's life has one driver: what drives it on ranks and in replays gets the same plans, and nobody else calls it."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from benchmarks.grids import grid_of
from tests.cases import judge
from tests.helpers import few_or
from tests.stepwise.driver_cases import CASES

from poise.routing.predict import mean_share
from poise.stepwise.protocol import StepPolicy
from poise.stepwise.registry import POLICIES

ROOT = Path(__file__).parents[2]
CALLS = {"before_gate", "leaves_alone", "after_gate", "in_background", "training_plan_seconds", "plans_beside"}
FILES = [path for part in ("src/poise", "benchmarks") for path in sorted((ROOT / part).rglob("*.py"))
         if "stepwise" not in path.parts]  # fmt: skip


ALIKE = {"training hecate", "training hecate-calibrated", "training smart-moe:interval=1,threshold=0.0"}
"""Cases of ``make test-all`` alone: of policies that train, three are left, one of which moves weights as these do."""


def test_one_trace_gets_the_same_plans_everywhere(tmp_path, subtests):
    chosen = few_or(list(CASES), [case for case in CASES if case not in ALIKE])
    judge("tests/stepwise/driver_cases.py", chosen, tmp_path, subtests, world=2)
    assert ALIKE < set(CASES)


def around_the_protocol(source: str) -> list[str]:
    """Calls of a policy outside the driver, and attributes of policies that are read by name.

    A policy that is made of another may call it: methods of a class that has ``before_gate`` itself.
    """
    tree, found = ast.parse(source), []
    wrappers = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
                and any(isinstance(part, ast.FunctionDef) and part.name == "before_gate" for part in node.body)]  # fmt: skip
    allowed = {id(node) for wrapper in wrappers for node in ast.walk(wrapper)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in CALLS and id(node) not in allowed:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            of, name = node.args[0], node.args[1]
            member = isinstance(name, ast.Constant) and name.value in dir(StepPolicy) and str(name.value)[:1] != "_"
            policy = re.search("(?<!mp_)policy", ast.unparse(of).lower())  # mp_policy is PyTorch's
            if policy or (member and name.value != "name"):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_policies_are_used_through_their_driver_alone():
    found = {path.name: around_the_protocol(path.read_text(encoding="utf-8")) for path in FILES}
    assert len(found) > 100 and not any(found.values()), {name: lines for name, lines in found.items() if lines}


def test_a_way_around_the_protocol_is_seen():
    for line in ("held = policy.before_gate(view)", "early = map(self.loop.policy.after_gate, views)",
                 "getattr(loop.policy, 'keeps_in_training', False)", "getattr(method, 'unbounded', False)",
                 "hasattr(x, 'leaves_alone')"):  # fmt: skip
        assert around_the_protocol(line), line
    wrapper = "class Timed:\n    def before_gate(self, view):\n        return self.policy.before_gate(view)\n"
    assert not around_the_protocol(wrapper) and not around_the_protocol("driver.choose(view)")


@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: policy.name)
def test_policies_follow_the_whole_protocol(policy):
    """They derive from it, so that every member is there."""
    assert StepPolicy in type(policy).__mro__
    assert policy.name and policy.summary and isinstance(policy.exact, bool)
    assert policy.keeps or not policy.keeps_in_training
    assert grid_of(policy)[0] == {} or policy.name == "flex-moe"


def test_the_sliding_mean_by_hand():
    load = np.array([[8.0, 0, 0], [1, 1, 2], [3, 0, 1]])
    np.testing.assert_array_equal(mean_share(load, 2, np.ones(3)), [0.5, 0.125, 0.375])
    np.testing.assert_array_equal(mean_share(load[:0], 2, np.array([2.0, 1, 1])), [0.5, 0.25, 0.25])
    np.testing.assert_allclose(mean_share(np.zeros((4, 3)), 2, np.ones(3)), [1 / 3] * 3)
