"""Serving on four processes equals the plain transformers model (run_cases.py)."""

import pytest
from tests.cases import judge
from tests.serve.run_cases import CASES
from torch import nn

from poise.cluster import Cluster
from poise.errors import OptionError
from poise.serve import Engine


def test_all_cases(tmp_path, subtests):
    assert len(CASES) > 20
    judge("tests/serve/run_cases.py", CASES, tmp_path, subtests)


def test_without_a_process_group_it_is_refused():
    with pytest.raises(OptionError, match="2 devices, and there is no process group"):
        Engine(nn.Module(), None, Cluster.parse("1x2"))
