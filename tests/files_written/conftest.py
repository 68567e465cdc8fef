"""Fixtures of the tests of written files."""

import os

import pytest


@pytest.fixture(params=["nameless", "named"])
def way(request, monkeypatch):
    """Files without a name where the system has them, and the way of one that has none."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return request.param


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)
