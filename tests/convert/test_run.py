"""The driver of conversions: it measures each stage, holds exact ones to their word, and leaves the model alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from foveate.convert.base import Calibration, Conversion, Stage
from foveate.convert.run import NotExact, convert
from foveate.convert.subject import Questions
from foveate.errors import BadArgument
from foveate.models.converted import decoder_layers, is_converted
from foveate.models.shape import ModelShape
from foveate.models.tiny import tiny
from foveate.models.weights import read_heads, write_heads


@dataclass(frozen=True)
class Louder(Conversion):
    """Scales values up by a factor and outputs down, which is exact, then values alone, which is not."""

    factor: float = 2.0
    claim: bool = False
    id = "louder"
    what = "for the test"

    def check(self, model: Any, shape: ModelShape) -> None:
        if self.factor <= 0:
            raise BadArgument("factor", self.factor, "give more than 0")

    def stages(self, model: Any, calibration: Calibration) -> Iterator[Stage]:
        assert torch.is_grad_enabled() and len(calibration.inputs(model)) == len(decoder_layers(model))
        for layer in decoder_layers(model):
            heads = read_heads(layer.self_attn)
            heads.v *= self.factor
            heads.o /= self.factor
            write_heads(layer.self_attn, heads)
        yield Stage("both", exact=True, facts={"factor": self.factor})
        for layer in decoder_layers(model):
            heads = read_heads(layer.self_attn)
            heads.v *= self.factor
            write_heads(layer.self_attn, heads)
        yield Stage("values alone", exact=self.claim)


def _texts() -> tuple[Calibration, torch.Tensor]:
    return Calibration(torch.randint(3, 250, (3, 11))), torch.randint(3, 250, (5, 13))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_stage_is_measured(dtype):
    model = tiny("llama", kv_heads=2, dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibration, probe = _texts()
    seen = []
    done = convert(model, Louder(factor=3.0), calibration, probe, measured=seen.append)
    assert seen == done.ladder and [rung.stage for rung in seen] == ["original", "both", "values alone"]
    original, both, alone = seen
    assert original.error == 0 and original.kl == 0 and original.share == 1
    assert both.error < (1e-10 if dtype is torch.float64 else 1e-5) and both.facts == {"factor": 3.0}
    assert alone.error > 0.05 and alone.kl > 0
    logits = model(probe).logits.double()
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), probe[:, 1:].flatten())
    assert original.perplexity == pytest.approx(nll.exp().item(), rel=1e-6)
    assert is_converted(done.model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_is_asked_after_each_stage():
    calibration, probe = _texts()
    seen = []

    def ask(made: Any) -> float:
        seen.append(made)
        return len(seen) / 10

    asked = Questions("needles", {}, ask)
    done = convert(tiny("llama", kv_heads=2), Louder(), calibration, probe, questions=asked)
    assert [rung.needles for rung in done.ladder] == [0.1, 0.2, 0.3]
    assert all(made is done.model for made in seen)


def test_a_stage_that_breaks_its_word_is_found():
    calibration, probe = _texts()
    with pytest.raises(NotExact, match="values alone"):
        convert(tiny("qwen3"), Louder(claim=True), calibration, probe)


def test_numbers_are_checked_before_anything_is_read():
    calibration, probe = _texts()
    with pytest.raises(BadArgument, match="factor"):
        convert(tiny("llama"), Louder(factor=-1.0), calibration, probe)
    with pytest.raises(BadArgument, match="probe"):
        convert(tiny("llama"), Louder(), calibration, probe[0])
