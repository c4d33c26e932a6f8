"""What a layer of a recorded decode step launches, where kernels serve: each launch of a graph takes its time."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from tests.contract.recorded import recording, steps
from tests.contract.runs import tokens
from tests.contract.subjects import CASES, applied, model
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.attention import decoding
from foveate.engine.step import StepCall

NOTHING = frozenset({
    "alias", "as_strided", "detach", "empty", "expand", "permute", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias",
})  # fmt: skip
"""Operations that launch nothing on a GPU."""


class Launches(TorchDispatchMode):
    """Notes by layer what is asked of the device, each kernel of Foveate's as one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, list[str]] = {}
        self.layer: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        layer = self.layer
        if layer is not None and name not in NOTHING:
            self.found.setdefault(layer, []).append(name)
        self.layer = layer if space == "aten" else None
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.layer = layer


def launches(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the second layer of a recorded step of a method launches."""
    pytest.importorskip("triton")
    if not decoding._interpreted():
        pytest.skip("kernels run here in Triton's interpreter")
    mode, attention = Launches(), StepCall.attention

    def within(call: StepCall, module: Any, *args: Any, **kwargs: Any) -> Any:
        mode.layer = module.layer_idx
        out = attention(call, module, *args, **kwargs)
        mode.layer = None
        return out

    def noted(owner: Any, of: str) -> Any:
        launch = getattr(owner, of)

        def launched(*args: Any, **kwargs: Any) -> Any:
            if mode.layer is not None:
                mode.found.setdefault(mode.layer, []).append(of)
            layer, mode.layer = mode.layer, None
            out = launch(*args, **kwargs)
            mode.layer = layer
            return out

        return launched

    def record(run: Any, counters: Any, device: torch.device) -> Any:
        def replay() -> torch.Tensor:
            mode.found.clear()
            with mode:
                return run()

        return replay

    # On a CPU the numbers of listed blocks are looked at, on a GPU they are not.
    monkeypatch.setattr(import_module("foveate.attention.attend"), "_check_lists", lambda *args: None)
    monkeypatch.setattr(decoding, "serves", lambda q, forced=False: (True, ""))
    monkeypatch.setattr(StepCall, "attention", within)
    for made in ("arrive", "weigh", "evict", "scored", "listed", "token_weights", "replace_least"):
        monkeypatch.setattr(decoding.Held, made, noted(decoding.Held, made))
    for made in ("window", "arrive_packed"):
        monkeypatch.setattr(decoding, made, noted(decoding, made))
    net, case = model("llama", 2), CASES[name]
    ids, new = tokens(seed, 61).unsqueeze(0), tokens(seed + 2, 6).unsqueeze(0)
    with applied(net, case) as handle, recording(net, handle, by=record):
        cache, _ = steps(net, handle, ids, None, new)
    assert cache.step is not None
    return mode.found[1]


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("dense", ["arrive", "decode_ragged"]),
        ("quest", ["arrive", "page_bounds", "select_best", "decode_lists"]),
        ("h2o", ["arrive", "weigh", "evict"]),
        ("delta-attention", ["arrive", "decode_lists"]),
        ("kvtc", ["arrive_packed", "decode_coded"]),
        ("lycheedecode", ["arrive", "listed"]),
        ("actqkv", ["arrive", "block_cosines", "recall_blocks", "decode_recalled", "settle_recall"]),
        ("recycled-attention", ["arrive", "listed", "replace_least"]),
        ("tokenselect", ["arrive", "newest_voter", "turned_votes", "select_best", "tally_votes", "decode_framed"]),
        ("longheads", ["arrive", "feature_scores", "select_best", "decode_framed", "scatter_"]),
        (
            "landmark-means",
            ["arrive", "newest_mean", "feature_scores", "select_best", "line_up", "decode_framed"],
        ),
        ("hip", ["arrive", "decode_lists"]),  # a step that an earlier search serves
    ],
)
def test_a_layer_launches_no_more_than_it_must(
    name: str, want: list[str], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launches(name, seed, monkeypatch) == want


def test_a_full_window_and_the_first_tokens_are_read_by_their_slots(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel meets keys with queries at both angles, which it turns itself."""
    found = launches("streaming-llm", seed, monkeypatch)
    assert found == ["arrive", "window"]
