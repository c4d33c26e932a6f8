"""The tokenizer that a GGUF file describes, as a transformers tokenizer with its chat template."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from foveate.errors import Refused

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type

# How text is cut before merging, by `tokenizer.ggml.pre`: the patterns that these models' own tokenizers state.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
_PLAIN = ("gpt-2", "smollm")


def tokenizer_of(metadata: dict[str, Any], max_length: int) -> Any:
    """Build the tokenizer from GGUF metadata. It pads on the left, since these models generate.

    Raises:
        Refused: the vocabulary is of a kind, or is cut in a way, that cannot be rebuilt exactly.
    """
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = metadata.get("tokenizer.ggml.tokens") or []
    kind = metadata.get("tokenizer.ggml.model")
    if not tokens or kind not in ("gpt2", "llama"):
        raise Refused(f"the GGUF file has a tokenizer of kind {kind!r}; gpt2 and llama can be rebuilt")
    backend = _byte_level(metadata, tokens) if kind == "gpt2" else _sentence_piece(metadata, tokens)
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    pairs = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, n in pairs if n == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t, n in pairs if n == _USER_DEFINED])

    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {
        name: tokens[index]
        for name, word in names.items()
        if (index := metadata.get(f"tokenizer.ggml.{word}_token_id")) is not None
    }
    if "eos_token" in special:
        special.setdefault("pad_token", special["eos_token"])
    if _adds_bos(metadata, kind) and (bos := special.get("bos_token")):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokens.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **special,
    )


def _adds_bos(metadata: dict[str, Any], kind: str) -> bool:
    stated = metadata.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    return kind == "llama" or _SPLITS.get(metadata.get("tokenizer.ggml.pre", "")) == _LLAMA3


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "")
    if pre not in _SPLITS and pre not in _PLAIN:
        known = ", ".join(sorted([*_SPLITS, *_PLAIN]))
        raise Refused(f"the GGUF file cuts text the {pre!r} way (tokenizer.ggml.pre), which is not among {known}")
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(BPE(_vocabulary(metadata, tokens), merges, ignore_merges=_SPLITS.get(pre) == _LLAMA3))
    if pre in _SPLITS:
        cut = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, rest])
        if _SPLITS[pre] == _QWEN2:
            backend.normalizer = normalizers.NFC()
    elif pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None:
        raise Refused("the GGUF file has a sentencepiece vocabulary without scores; it cannot be rebuilt")
    vocabulary = _vocabulary(metadata, tokens)
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    backend = Tokenizer(
        BPE(
            vocabulary,
            _merges_by_score(tokens, scores, types),
            unk_token=tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = normalizers.Replace(" ", "▁")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space] if prefix else [space])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    return backend


def _merges_by_score(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every cut of a token into two others, best token first: sentencepiece joins the neighbours that score best."""
    normal = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL}
    cuts = [
        (score, token[:at], token[at:])
        for token, score in normal.items()
        for at in range(1, len(token))
        if token[:at] in normal and token[at:] in normal
    ]
    cuts.sort(key=lambda cut: -cut[0])
    return [(left, right) for _, left, right in cuts]


def _vocabulary(metadata: dict[str, Any], tokens: list[str]) -> dict[str, int]:
    """Token to id. Rows that only fill the embedding up to a round size are no tokens of any text."""
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    return {token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
