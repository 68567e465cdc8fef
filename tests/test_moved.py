"""Module names of 0.1 and 0.2 still give the modules."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import poise
from poise.moved import MODULES, ROOMS, now_called

OLD = {
    **MODULES, **ROOMS, "poise.observe.trace": "poise.routing.trace", "poise.policies.registry": "poise.stepwise.registry",
    "poise.evaluate.report.page": "poise.report.page", "poise.calibrate.fit": "poise.lab.calibrate.fit",
}  # fmt: skip


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_is_the_module_of_today(old):
    assert now_called(old) == OLD[old]
    module = importlib.import_module(old)
    assert module is importlib.import_module(OLD[old]) and module.__name__ == module.__spec__.name == OLD[old]


def test_no_old_name_hides_a_module():
    names = {module.name for module in pkgutil.walk_packages(poise.__path__, "poise.")}
    assert len(names) > 200 and not [name for name in names if now_called(name)]


def test_what_never_was_is_not_found():
    for name in ("poise.nothing", "poise.observed", "poise.observe.nothing", "poise.policies.nothing.more"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_classes_are_the_same_and_scripts_run():
    from poise.cluster import Cluster
    from poise.errors import PoiseError
    from poise.modelspec import ModelSpec

    assert (Cluster, ModelSpec, PoiseError) == (poise.Cluster, poise.ModelSpec, poise.PoiseError)
    done = subprocess.run([sys.executable, "-m", "poise.emulate", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--cluster" in done.stdout


def test_a_function_that_moved_is_given_by_its_old_module():
    from poise.engines.plugins import sglang_hook, sglang_plugin

    assert sglang_plugin.around is sglang_hook.around
    with pytest.raises(AttributeError, match="nothing"):
        sglang_plugin.nothing  # noqa: B018
