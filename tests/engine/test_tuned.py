"""A tuned file stands for its methods, and says clearly when it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.runs import logits, prompt

import foveate
from foveate.engine.tuned import Tuned, read_tuned
from foveate.errors import BadArgument
from foveate.methods import METHODS, Profile
from foveate.methods.profile import fingerprint
from foveate.models import tiny
from foveate.models.shape import ModelShape


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", kv_heads=2)


def written(folder: Path, tuned: Tuned, **changes: Any) -> Path:
    path = folder / "tuned.json"
    path.write_text(json.dumps({**tuned.to_json(), **changes}))
    return path


def of(model: Any, *methods: Any, profiles: Any = ()) -> Tuned:
    return Tuned(foveate.compose(methods[0] if len(methods) == 1 else methods[0] | methods[1]), mark(model), profiles)


def mark(model: Any) -> str:
    return fingerprint(ModelShape.of(model))


def test_apply_takes_the_file_for_what_it_holds(model: Any, tmp_path: Path) -> None:
    made = of(model, METHODS["snapkv"](window=8, budget=0.4), METHODS["kivi"](bits=2, group=16, residual=16))
    path = written(tmp_path, made)
    ids = prompt(1, 61)
    with foveate.apply(model, made.composition):
        expected, _ = logits(model, ids)
    for given in (path, str(path)):
        with foveate.apply(model, given) as handle:
            assert handle.binding.composition == made.composition
            found, _ = logits(model, ids)
        assert torch.equal(found, expected)
    assert foveate.compose(str(path)) == made.composition
    with foveate.apply(model, "dense") as handle:
        assert handle.bind(path).composition == made.composition


def test_reading_gives_back_what_was_written(model: Any, tmp_path: Path) -> None:
    made = of(model, METHODS["delta-attention"](full_layers=(0, 2), budget=1 / 3))
    made = Tuned(made.composition, made.model, (), {"loss": 0.5})
    assert read_tuned(written(tmp_path, made)) == made


def test_profiles_travel_in_the_file(model: Any, tmp_path: Path) -> None:
    gates = [[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]
    profile = Profile("duo-attention", mark(model), {"gates": gates})
    made = of(model, METHODS["duo-attention"](sink=2, recent=4, sparsity=0.5), profiles=(profile,))
    with foveate.apply(model, written(tmp_path, made)) as handle:
        assert handle.binding.profiles["duo-attention"].data["gates"] == gates


def test_another_model(model: Any, tmp_path: Path) -> None:
    path = written(tmp_path, of(model, METHODS["snapkv"](window=8)))
    other = tiny("llama", kv_heads=4)
    with pytest.raises(BadArgument, match=f"tuned on {mark(model)}, this model is {mark(other)}; run `foveate tune`"):
        foveate.apply(other, path)
    with foveate.apply(other, "dense") as handle, pytest.raises(BadArgument, match="tuned on"):
        handle.bind(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": [{"id": "nosuch", "settings": {}}]}, "unknown method 'nosuch'"),
        ({"methods": [{"id": "snapkv", "settings": {"windows": 8}}]}, "settings that snapkv does not take"),
        ({"methods": [{"id": "snapkv", "settings": {"kernel": 4}}]}, "settings that snapkv does not take .*odd"),
        ({"methods": [{"id": "snapkv", "settings": {"budget": 7.5}}]}, "settings that snapkv does not take"),
        ({"methods": [{"settings": {}}]}, "damaged"),
        ({"methods": []}, "damaged"),
        ({"profiles": [3]}, "damaged"),
        ({"kind": "other"}, "not a tuned file"),
        ({"format": 9}, "has format 9"),
        ({"methods": [{"id": "snapkv", "settings": {}}, {"id": "h2o", "settings": {}}]}, "keep"),
    ],
)
def test_bad_files(model: Any, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = written(tmp_path, of(model, METHODS["snapkv"](window=8)), **changes)
    with pytest.raises(BadArgument, match=words):
        foveate.apply(model, path)


def test_files_that_are_none(model: Any, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="cannot be read"):
        foveate.apply(model, tmp_path / "absent.json")
    (tmp_path / "words.json").write_text("not json")
    with pytest.raises(BadArgument, match="not JSON"):
        foveate.apply(model, tmp_path / "words.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(BadArgument, match="not a tuned file"):
        foveate.apply(model, str(tmp_path / "list.json"))


def test_the_file_is_the_whole_setting(model: Any, tmp_path: Path) -> None:
    path = written(tmp_path, of(model, METHODS["snapkv"](window=8)))
    with pytest.raises(BadArgument, match=r"budget=0\.5.*holds them already"):
        foveate.apply(model, path, budget=0.5)
    with pytest.raises(BadArgument, match="holds them already"):
        foveate.apply(model, path, window=4)
