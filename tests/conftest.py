"""Lets the tests import the modules of the repo, from wherever pytest is started, and know the
fixtures of tests/runs.py."""
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
pytest.register_assert_rewrite("runs")

from runs import copied, files, one_thread, run, short, short_dir  # noqa: E402, F401

# vLLM's own environment runs these: see tests/vllm_cpu.sh and .ci/run.
collect_ignore = [] if find_spec("vllm") else ["test_vllm.py"]


def pytest_configure(config):
    config.addinivalue_line("markers", "method: the equalities of the method's files, in about a "
                                       "minute: python -m pytest -q -m method")
