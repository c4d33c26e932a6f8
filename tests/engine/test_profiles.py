"""Profiles that carry weights: one file, bit for bit, also inside a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import foveate
from foveate.methods import Profile
from foveate.methods.profile import from_json, load_profile, save_profile, to_json


def made(**changes: torch.Tensor) -> Profile:
    tensors = {"weight": torch.randn(3, 5).half(), "codes": torch.arange(7, dtype=torch.uint8), **changes}
    return Profile("some", "model", {"window": 4}, {"seed": 0}, tensors)


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    profile = made(turned=torch.randn(4, 6).T)
    again = load_profile(save_profile(profile, tmp_path / "some.json"))
    assert again == profile
    assert [path.name for path in tmp_path.iterdir()] == ["some.json"]
    for name, tensor in profile.tensors.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert torch.equal(again.tensors[name], tensor)
    assert from_json(json.loads(json.dumps(to_json(profile)))) == profile


def test_profiles_differ_by_their_weights() -> None:
    torch.manual_seed(0)
    profile = made()
    assert profile == Profile(**{**vars(profile), "tensors": {k: x.clone() for k, x in profile.tensors.items()}})
    assert profile != made()
    assert profile != Profile("some", "model", {"window": 4}, {"seed": 0})
    wide = Profile(**{**vars(profile), "tensors": {k: x.double() for k, x in profile.tensors.items()}})
    assert profile != wide


def test_a_profile_without_weights_says_nothing_of_them() -> None:
    assert "tensors" not in to_json(Profile("some", "model", {}))


@pytest.mark.parametrize("damage", ["AAAA", "not base64!"])
def test_spoilt_weights_are_no_profile(tmp_path: Path, damage: str) -> None:
    file = save_profile(made(), tmp_path / "some.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tensors": damage}))
    with pytest.raises(foveate.BadArgument, match="calibrate"):
        load_profile(file)
