"""Lets the tests import the flat modules of the repo, from wherever pytest is started."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
