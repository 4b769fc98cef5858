"""python -m pytest tests/test_sharding.py -q

Whether the heads of a model can be shared out. FSDP is tested in tests/test_fsdp.py.
"""
import pytest
from small import text_config

from flow import Ranks
from plumbing.sharding import check_heads


@pytest.mark.parametrize("heads, kv, sp, fits", [
    (4, 2, 2, True), (4, 2, 4, True), (28, 4, 4, True), (16, 2, 8, True), (4, 2, 8, False),
    (28, 4, 8, False), (12, 2, 3, False), (12, 2, 12, True), (4, 2, 1, True)])
def test_heads_that_cannot_be_shared_out_are_named(heads, kv, sp, fits):
    """The design's rule: heads a multiple of sp, kv heads a multiple or a divisor of it; else a
    line, not a hang."""
    if fits:
        return check_heads(text_config(heads, kv), Ranks(sp=sp))
    text = f"sp = {sp}: {heads} attention heads and {kv} key-value heads.*sp can be 1"
    with pytest.raises(ValueError, match=text):
        check_heads(text_config(heads, kv), Ranks(sp=sp))
