"""Every Python that is started with this folder on its path lets SGLang import what is not there (missing.py)."""

from sglang_cpu_stand_in import missing

missing.stand_in()
