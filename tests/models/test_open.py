"""`load`: every kind of source, the dtype and device rules, and one clear line for what cannot be opened."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from tests.devices import device
from tests.models.gguf_files import SPECIAL, byte_level_vocabulary

from foveate import compat
from foveate.errors import BadArgument, FoveateError, Refused
from foveate.models import Loaded, load, tiny
from foveate.models.gguf_tokenizer import tokenizer_of
from foveate.models.open import load_encoder
from foveate.models.placement import enter_device, has_bfloat16, one_device, resolve_device, resolve_dtype


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    """A model folder as save_pretrained leaves it."""
    path = tmp_path / "tiny-llama"
    tiny("llama", layers=1, vocab_size=320, seed=seed).save_pretrained(path)
    tokens, merges = byte_level_vocabulary()
    metadata = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": merges, "eos_token_id": 2}
    tokenizer_of({f"tokenizer.ggml.{name}": value for name, value in metadata.items()}, 64).save_pretrained(path)
    return path


def said(source: str | Path, **options) -> str:
    """The error's text, which must be one line that names the source."""
    with pytest.raises(FoveateError) as caught:
        load(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert str(source) in text
    return text


@pytest.mark.parametrize("given", [str, Path])
def test_a_folder(given: type, folder: Path, seed: int):
    loaded = load(given(folder), dtype="float32", device="cpu")
    assert isinstance(loaded, Loaded)
    model, tokenizer = loaded
    assert not model.training
    assert tokenizer.eos_token == SPECIAL[2]
    ids = torch.randint(3, 256, (1, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = tiny("llama", layers=1, vocab_size=320, seed=seed)(ids).logits
        assert torch.equal(model(ids).logits, expected)


def test_a_relative_folder_and_one_in_the_home_directory(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder.parent)
    assert load(folder.name, device="cpu").model.config.model_type == "llama"
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load("~/" + folder.name, device="cpu").model.config.model_type == "llama"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bfloat16", torch.bfloat16),
        ("float32", torch.float32),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes(dtype: str | torch.dtype, expected: torch.dtype, folder: Path):
    model = load(folder, dtype=dtype, device="cpu").model
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize(("avx", "amx"), [(False, False), (True, False), (False, True)])
def test_auto_dtype_on_a_cpu(avx: bool, amx: bool, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    expected = torch.bfloat16 if avx or amx else torch.float32
    assert load(folder, device="cpu").model.dtype is expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_dtype_on_cuda(capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", torch.device("cuda:0")) is expected


def test_other_devices_claim_no_bfloat16():
    assert not has_bfloat16(torch.device("meta"))


@pytest.mark.parametrize("available", [False, True])
def test_auto_device(available: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("auto").type == ("cuda" if available else "cpu")


def test_a_command_makes_its_gpu_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert enter_device("cuda:1") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    assert enter_device("cpu").type == "cpu"
    assert enter_device("cuda") == torch.device("cuda")
    assert len(chosen) == 1, "set_device takes no device without an index"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, r"dtype='int8': give \"auto\", bfloat16, float32, float16"),
        ({"dtype": torch.int8}, r"dtype=torch.int8: give"),
        ({"dtype": None}, r"dtype=None: give"),
        ({"device": "gpu"}, r"device='gpu': give \"auto\", \"cpu\", \"cuda\""),
        ({"device": "cuda:99"}, r"device='cuda:99': this machine has \d+ CUDA devices"),
    ],
)
def test_bad_dtype_or_device(options: dict, message: str):
    with pytest.raises(BadArgument, match=message):
        load(**options)


@pytest.mark.parametrize("typo", ["smolm2", "SmolLM2", "smollm"])
def test_a_typo_in_a_built_in_name_is_named_without_asking_the_hub(typo: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: pytest.fail("asked the hub"))
    assert "did you mean 'smollm2'?" in said(typo)


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "a b", "no//such", "x.gguf", ""])
def test_what_is_not_there(source: str):
    text = said(source)
    assert "no such file or folder" in text
    assert "smollm2" in text


def test_folders_that_hold_no_model(folder: Path):
    (folder / "model.safetensors").rename(folder / "elsewhere")
    assert "no weights" in said(folder)
    (folder / "model.safetensors").write_bytes((folder / "elsewhere").read_bytes()[:4000])
    assert "its weights cannot be read" in said(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "no tokenizer" in said(folder)
    (folder / "config.json").write_text("{")
    assert "its config cannot be read" in said(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in said(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "telepathy"}, "config cannot be read"),
        ({"model_type": "telepathy", "auto_map": {"AutoConfig": "a.B"}}, "config cannot be read"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is not a decoder-only"),
        ({"model_type": "t5"}, "t5 is not a decoder-only"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "is not a decoder-only"),
    ],
)
def test_architectures_that_are_not_for_foveate(config: dict, message: str, folder: Path):
    (folder / "config.json").write_text(json.dumps(config))
    assert message in said(folder)


def test_without_a_network_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Refused, match="hub cannot be reached"):
        load("somebody/some-model")
    assert "smollm2" in said("somebody/some-model")


@pytest.fixture
def hub_without_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), NotFound)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("hub_without_models")
def test_a_model_that_the_hub_does_not_have():
    with pytest.raises(BadArgument, match="no such model"):
        load("somebody/some-model")
    assert "`hf auth login`" in said("somebody/some-model")


def test_a_model_is_spread_over_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """By accelerate's map, which weighs the layers; what would be left to the host is refused."""
    import transformers

    asked: list[str | None] = []
    places: dict[str, torch.device | str] = {"model": device(0), "lm_head": device(1)}
    plain = transformers.AutoModelForCausalLM.from_pretrained

    def opened(*args, device_map=None, **kwargs):
        asked.append(device_map)
        model = plain(*args, **kwargs)
        model.hf_device_map = places
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", opened)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("foveate.models.open.resolve_device", lambda name: {"cuda": device(0)}[name])
    model, _ = load(folder, device="spread", dtype="float32")
    assert asked == ["balanced"]
    assert compat.devices(model) == [device(0), device(1)]
    assert not model.training
    for left in ("cpu", "disk"):
        places["lm_head"] = left
        with pytest.raises(Refused, match=r"does not fit into the \d+ GPUs"):
            load(folder, device="spread", dtype="float32")


def test_a_model_is_not_spread_where_that_cannot_be(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BadArgument, match="device='spread': this machine has no CUDA devices"):
        load(folder, device="spread")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("foveate.models.open.find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install accelerate"):
        load(folder, device="spread")


def test_what_needs_one_device_says_so():
    assert one_device("cuda:1", "a calibration") == "cuda:1"
    with pytest.raises(BadArgument, match=r"device='spread': a calibration needs the whole model on one device"):
        one_device("spread", "a calibration")
    with pytest.raises(BadArgument, match="an encoder needs the whole model on one device"):
        load_encoder("bert", device="spread")
