"""Recorded steps of methods whose lists grow, come in blocks, or serve several steps: what they launch, and how often
they are recorded."""

from __future__ import annotations

from typing import Any

import pytest
from tests.closeness import assert_close
from tests.contract.recorded import recording, steps
from tests.contract.runs import EXACT, tokens
from tests.contract.subjects import CASES, applied, model
from tests.contract.tape import record
from tests.contract.test_launches import launches


def recordings(name: str, seed: int, count: int = 40, **changes: Any) -> int:
    """How many steps of an answer of `count` tokens are recorded; they give what ordinary steps give."""
    net, case = model("llama", 2), CASES[name]
    ids, new = tokens(seed, 61).unsqueeze(0), tokens(seed + 2, count).unsqueeze(0)
    made: list[Any] = []
    with applied(net, case, case.method(**changes)) as handle:
        _, want = steps(net, handle, ids, None, new)
        with recording(net, handle, by=lambda *args: made.append(args) or record(*args)):
            cache, got = steps(net, handle, ids, None, new)
        assert cache.step is not None, cache.unrecorded
    assert_close(got, want, EXACT)
    return len(made)


def test_layers_share_what_only_lengths_decide(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer takes its token in and reads."""
    assert launches("s2-attention", seed, monkeypatch) == ["arrive", "decode_lists"]


@pytest.mark.parametrize("changes", [{"stride": 4}, {"stride": 3, "dense_heads": 1}, {"block": 8, "local": 1}])
def test_borders_of_blocks_need_no_other_recording(changes: dict[str, Any], seed: int) -> None:
    assert recordings("s2-attention", seed, **changes) == 1
