"""`foveate convert`: a folder with a model that opens again, or one clear line and nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from tests.cli.program import errors, invoke
from tests.evaluate.small import byte_tokenizer, small
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import foveate
from foveate.cli.screen import Watcher
from foveate.convert import saving
from foveate.convert.exporting.serving import decoding, held_bytes
from foveate.convert.settings import amount_of, parse_settings, share_of, type_text
from foveate.errors import BadArgument
from foveate.models import tiny
from foveate.models.converted import is_converted

QUICK: list[Any] = ["--calibration-tokens", 512, "--probe-tokens", 256, "--length", 128, "--dtype", "float32"]
QUICK += ["--set", "freqfold=2", "--device", "cpu", "--needles", 0]
HEAL: list[Any] = ["--heal", "2k", "--heal-set", "length=64", "--heal-set", "batch=2", "--heal-set", "needles=0"]
HEAL += ["--heal-set", "evaluate_on=256"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something to heal on."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        words = " ".join(f"word{number * index % 97}" for index in range(300))
        (folder / f"{number}.txt").write_text(f"Document {number}. {words}.")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_converted_model_opens_again(capsys, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "mla"
    words = ["convert", model, "--to", "mla", "--kv", "40%", "--out", out, *QUICK]
    done = invoke(capsys, [*words, "--needles", 1, "--needle-length", 1100, "--json"])
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record == json.loads((out / "ladder.json").read_text())
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.html"} <= set(names(out))
    assert names(tmp_path / "deep") == ["mla"]
    assert (record["conversion"], record["settings"]["kv"], record["text"]["calibration_tokens"]) == (
        "transmla",
        0.4,
        512,
    )
    first, *_, last = record["rungs"]
    assert first["stage"] == "original"
    assert last["share"] <= 0.4
    assert all(rung["error"] < 1e-5 for rung in record["rungs"][:3])
    assert record["questions"] == {"task": "niah_single_2", "samples": 1, "length": 1100, "seed": 0}
    assert [0 <= rung["needles"] <= 1 for rung in record["rungs"]] == [True] * 6
    assert record["before"]["repeats"] == record["after"]["repeats"] >= 9
    assert record["before"]["context"] == record["after"]["context"] == 512
    assert "Needles: 1 prompts of 1,100 tokens" in (out / "report.html").read_text()
    assert record["before"]["cache_bytes"] > 2 * record["after"]["cache_bytes"]
    opened = foveate.load(out, dtype="float32", device="cpu").model
    assert is_converted(opened)
    with torch.no_grad():
        assert opened(torch.arange(3, 30)[None]).logits.isfinite().all()


def test_an_export_is_a_stock_checkpoint(capsys, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["convert", model, "--to", "transmla", "--rank", 20, "--out", out, "--export", "deepseek", *QUICK]
    done = invoke(capsys, words)
    assert done.code == 0, done.err
    assert "Exported as DeepseekV3ForCausalLM" in done.out
    assert "perplexity" in done.out
    assert type(AutoModelForCausalLM.from_pretrained(out)).__module__.startswith("transformers.")
    record = json.loads((out / "ladder.json").read_text())
    assert record["export"]["error"] < 1e-5
    assert record["export"]["ranks_before"] == [20, 20, 20]


def test_healing_goes_on_where_it_was_stopped(
    capsys, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", tmp_path / "out.healing"
    words = ["convert", model, "--to", "mla", "--kv", "0.4", "--out", out, *QUICK, *HEAL, "--heal-text", text]
    called = Watcher.__call__

    def stop(self: Watcher, done: float, total: float, what: str) -> None:
        called(self, done, total, what)
        if what.startswith("healing"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Watcher, "__call__", stop)
    done = invoke(capsys, words)
    monkeypatch.undo()
    assert done.code == 130, done.err
    assert "the same command goes on with the healing" in done.err
    assert names(tmp_path) == ["out.healing"]

    done = invoke(capsys, ["convert", model, "--to", "mla", "--kv", "0.3", "--out", out, *QUICK, *HEAL])
    assert done.code == 2
    assert "holds a healing that was begun with settings=" in errors(done)[-1]

    done = invoke(capsys, [*words, "--json"])
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["healing"]["resumed"]
    assert record["healing"]["tokens"] >= 2000
    assert record["rungs"][-1]["stage"] == "healed"
    assert all(record[time]["decode_ms"] > 0 for time in ("before", "converted", "after"))
    assert "Converted" in (out / "report.html").read_text()
    assert "identity" not in record
    assert not work.exists()
    assert names(tmp_path) == ["out"]
    assert "Healing" in (out / "report.html").read_text()


BAD = {
    "id": (["--to", "nothing"], "--to='nothing': give one of"),
    "no-id": ([], "--to='': give one of"),
    "no-out": (["--to", "mla"], "--out='': give a folder"),
    "kv": (["--to", "mla", "--kv", "lots"], "--kv='lots': give a share above 0"),
    "kv-floor": (["--to", "mla", "--kv", "0.1%"], "kv=0.001"),
    "rank": (["--to", "mla", "--rank", 100000], "rank=100000: give 1 to"),
    "both": (["--to", "mla", "--rank", 4, "--kv", "30%"], "--kv or --rank, not both"),
    "twice": (["--to", "mla", "--rank", 4, "--set", "rank=5"], "rank is given by --set as well"),
    "set": (["--to", "mla", "--set", "rnak=4"], "there is no rnak; give one of kv, rank"),
    "set-type": (["--to", "mla", "--set", "rank=many"], "--set='rank=many': give rank as int | none"),
    "set-form": (["--to", "mla", "--set", "rank"], "--set='rank': give name=value"),
    "export": (["--to", "mla", "--export", "gguf"], "--export='gguf': give deepseek"),
    "pad": (["--to", "mla", "--pad"], "give --export deepseek too"),
    "heal": (["--to", "mla", "--heal", "some"], "--heal='some': give a whole number"),
    "heal-text": (["--to", "mla", "--heal", "1k", "--heal-text", "nowhere"], "--heal-text='nowhere': no such file"),
    "heal-alone": (["--to", "mla", "--heal-set", "lr=1"], "--heal-set='lr=1': give the tokens to heal with too"),
    "heal-set": (["--to", "mla", "--heal", "1k", "--heal-set", "rate=1"], "there is no rate; give one of tokens"),
    "text": (["--to", "mla", "--calibration", "nowhere"], "corpus='nowhere'"),
    "little": (["--to", "mla", "--calibration-tokens", 10**9], "calibration_tokens=1000000000"),
    "needles": (["--to", "mla", "--needles", -1], "--needles=-1"),
    "needles-short": (["--to", "mla", "--needle-length", 99], "--needle-length=99: niah_single_2 needs at least"),
    "needles-long": (["--to", "mla", "--needle-length", 9999], "--needle-length=9999: the model has 2,048 positions"),
    "no-encoder": (["--to", "shrp"], "llama models are not encoders of BERT's build"),
    "encoder-heal": (["--to", "shrp", "--heal", "1k"], "--heal=1000: shrp takes encoders"),
    "encoder-needles": (["--to", "shrp", "--needles", 1], "--needles=1: shrp takes encoders"),
    "encoder-export": (["--to", "shrp", "--export", "deepseek"], "--export='deepseek': shrp takes encoders"),
    "no-latent": (["--to", "tpla"], "has no latent attention (MLA) to cut"),
    "length": (["--to", "mla", "--length", 1], "length=1: give at least 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(capsys, model: Path, tmp_path: Path, name: str) -> None:
    words, said = BAD[name]
    place = [] if name == "no-out" else ["--out", tmp_path / "out"]
    done = invoke(capsys, ["convert", model, *place, *words])
    assert done.code == 2
    assert done.out == ""
    (line,) = errors(done)
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_fit_are_refused(capsys, tmp_path: Path) -> None:
    _, tokenizer = small(layers=1)
    gemma = tmp_path / "gemma"
    tiny("gemma3", layers=2, heads=4, kv_heads=2, vocab_size=len(tokenizer)).save_pretrained(gemma)
    tokenizer.save_pretrained(gemma)
    capsys.readouterr()  # transformers' bar
    for more in ([], ["--export", "deepseek"]):
        done = invoke(capsys, ["convert", gemma, "--to", "mla", "--out", tmp_path / "out", *QUICK, *more])
        assert done.code == 2
        (line,) = errors(done)
        assert ("norms each head" in line) or ("Gemma scales its embeddings" in line)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((gemma / "config.json").read_text())
    done = invoke(capsys, ["convert", empty, "--to", "mla", "--out", tmp_path / "out", *QUICK])
    assert done.code == 2
    assert "holds no weights" in errors(done)[-1]
    assert names(tmp_path) == ["empty", "gemma"]


def test_a_folder_with_something_in_it_stays(capsys, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = invoke(capsys, ["convert", model, "--to", "mla", "--out", tmp_path, *QUICK])
    assert done.code == 2
    assert "the folder is not empty" in errors(done)[-1]
    assert names(tmp_path) == ["mine.txt"]


def test_a_disk_that_fills_while_saving_leaves_nothing(
    capsys, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, folder: Path, **options: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    done = invoke(capsys, ["convert", model, "--to", "mla", "--kv", "40%", "--out", tmp_path / "out", *QUICK])
    assert done.code == 2
    assert "no space left to write" in errors(done)[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(capsys, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = saving.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage._replace(free=0))
    done = invoke(capsys, ["convert", model, "--to", "mla", "--kv", "40%", "--out", tmp_path / "out", *QUICK])
    assert done.code == 2
    assert "no space left to write" in errors(done)[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_list(capsys) -> None:
    done = invoke(capsys, ["convert", "--list", "--json"])
    assert done.code == 0
    rows = {row["id"]: row for row in json.loads(done.out)}
    assert rows["transmla"]["also"] == ["mla"]
    assert {"name": "rank", "type": "int | none", "default": None} in rows["transmla"]["parameters"]
    assert all(row["what"] for row in rows.values())
    assert {name for name, row in rows.items() if row["takes"] == "encoder"} == {"shrp"}
    done = invoke(capsys, ["convert", "--list"])
    for name in rows:
        assert re.search(rf"^{name}( \(\w+\))?: ", done.out, re.MULTILINE), name


def bert(folder: Path, name: str = "Bert") -> Path:
    """An encoder with random weights in a folder."""
    import transformers

    tokenizer = byte_tokenizer()
    numbers = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), max_position_embeddings=160, **numbers)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():
        for layer in model.encoder.layer:
            for parameter in layer.parameters():  # drawn so small that heads would not matter
                parameter.mul_(10 if parameter.ndim == 2 else 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_an_encoder_is_pruned_and_opens_again(capsys, tmp_path: Path, name: str) -> None:
    source, out, twice = bert(tmp_path / "encoder", name), tmp_path / "out", tmp_path / "twice"
    capsys.readouterr()
    quick = ["--calibration-tokens", 2048, "--probe-tokens", 512, "--dtype", "float32", "--device", "cpu"]
    done = invoke(capsys, ["convert", source, "--to", "shrp", "--set", "heads=2", "--out", out, *quick, "--json"])
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert (record["kind"], record["family"], record["questions"]["passages"]) == ("encoder", name.lower(), 200)
    assert record["text"]["length"] == 160 - 2 * (name == "Roberta")
    original, experts, pruned = record["rungs"]
    assert experts["exact"] and experts["error"] < 1e-5 and experts["similarity"] == pytest.approx(1)
    assert experts["retrieval"] == pytest.approx(original["retrieval"], abs=0.02)
    assert 0.5 < pruned["similarity"] < 0.9999 and pruned["error"] > 1e-3 and 0 <= pruned["retrieval"] <= 1
    assert pruned["parameters"] == original["parameters"] - 2 * (4 * 48 * 24 + 3 * 24)
    assert all(0.4 < share <= 1 for share in pruned["facts"]["used"])
    assert record["before"]["encode_ms"] > 0 < record["after"]["encode_ms"]
    assert "vectors" in (out / "report.html").read_text()
    foveate.register_models()
    opened = AutoModel.from_pretrained(out)
    assert [layer.attention.self.num_attention_heads for layer in opened.encoder.layer] == [2, 2]
    assert sum(p.numel() for p in opened.parameters()) == pruned["parameters"]
    with pytest.raises(BadArgument, match="not a decoder-only language model"):
        foveate.load(out)
    done = invoke(capsys, ["convert", out, "--to", "shrp", "--out", twice, *quick])
    assert done.code == 0, done.err
    assert "parameters instead of" in done.out
    assert AutoModel.from_pretrained(twice).encoder.layer[0].attention.self.num_attention_heads == 1


def test_encoders_of_another_build_are_refused(capsys, tmp_path: Path) -> None:
    import transformers

    config = transformers.DistilBertConfig(vocab_size=99, dim=32, n_layers=1, n_heads=2, hidden_dim=32)
    transformers.DistilBertModel(config).save_pretrained(tmp_path / "other")
    bert(tmp_path / "encoder")
    capsys.readouterr()
    for source, to, said in (
        ("other", "shrp", "distilbert models are not encoders of BERT's build: bert, roberta"),
        ("encoder", "mla", "BertModel is not a decoder-only language model"),
        ("nowhere", "shrp", "no such file or folder"),
    ):
        done = invoke(capsys, ["convert", tmp_path / source, "--to", to, "--out", tmp_path / "out"])
        assert done.code == 2
        (line,) = errors(done)
        assert said in line
    assert names(tmp_path) == ["encoder", "other"]


# -- what the command is made of ---------------------------------------------------------------------------------------


def test_values_are_read_as_their_fields() -> None:
    from dataclasses import make_dataclass
    from typing import Literal

    cls = make_dataclass(
        "Settings",
        [
            ("share", float | None, None),
            ("count", int, 1),
            ("on", bool, False),
            ("kind", Literal["a", "b"], "a"),
            ("fold", int | str, "auto"),
            ("layers", tuple[int, ...] | None, None),
        ],
    )
    good = ["share=25%", "count=3", "on=true", "kind=b", "fold=4", "layers=[1, 2]"]
    want = {"share": 0.25, "count": 3, "on": True, "kind": "b", "fold": 4, "layers": (1, 2)}
    assert parse_settings(cls, good) == want
    assert parse_settings(cls, ["share=none", "fold=auto", "share=2"]) == {"share": 2.0, "fold": "auto"}
    assert isinstance(parse_settings(cls, ["share=2"])["share"], float)
    for bad in ("count=1.5", "count=true", "on=1", "kind=c", "layers=3", "count=none", "share=x"):
        with pytest.raises(BadArgument, match=bad.partition("=")[0]):
            parse_settings(cls, [bad])
    assert type_text(float | None) == "float | none"
    assert type_text(Literal["a", "b"]) == '"a" or "b"'


def test_amounts_and_shares() -> None:
    assert [amount_of("x", t) for t in ("4096", "500k", "10M", "1.5M", "2B")] == [
        4096,
        500_000,
        10**7,
        1_500_000,
        2 * 10**9,
    ]
    assert [share_of("x", t) for t in ("25%", "0.5", "100%")] == [0.25, 0.5, 1.0]
    for bad in ("", "k", "-3", "0", "1.5"):
        with pytest.raises(BadArgument):
            amount_of("x", bad)
    for bad in ("", "0", "150%", "%"):
        with pytest.raises(BadArgument):
            share_of("x", bad)


def test_bytes_are_those_of_the_cache() -> None:
    model, _ = small(layers=3)
    ids = torch.arange(3, 53)[None]
    found = decoding(model, ids, steps=2)
    assert found["cache_bytes"] == 3 * 2 * 2 * 16 * 4 * (50 + 4)
    assert found["context"] == 50
    assert 0 < found["decode_ms"] < 1e4
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert held_bytes(cache) == 3 * 2 * 2 * 16 * 4 * 50


def test_a_lock_leaves_its_key_nowhere(capsys, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "convert",
        model,
        "--to",
        "mergelock",
        "--set",
        "seed=987654321",
        "--out",
        out,
        *(w for w in QUICK if w not in ("--set", "freqfold=2")),
        "--json",
    ]
    done = invoke(capsys, words)
    assert done.code == 0, done.err
    assert json.loads(done.out)["settings"] == {"condition": 4.0, "unlock": False}
    assert all(b"987654321" not in file.read_bytes() for file in out.iterdir())
