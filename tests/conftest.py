"""Lets the tests import the flat modules of the repo, from wherever pytest is started."""
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

# vLLM's own environment runs these: see tests/vllm_cpu.sh and .ci/run.
collect_ignore = [] if find_spec("vllm") else ["test_vllm.py"]
