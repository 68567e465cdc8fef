"""Contiguous expert parallelism: the layout every engine starts from."""

from __future__ import annotations
