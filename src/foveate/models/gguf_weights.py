"""A GGUF file as a transformers folder: config, weights and tokenizer, without a quantiser left on the model.

transformers can open GGUF files too, but how it names, packs and tokenises them changes between its versions, and it
does not split digits as SmolLM2's tokenizer must. A folder converted here loads the same way in all of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from foveate.errors import BadArgument, Refused
from foveate.models.artifacts import Report, artifact, sha256
from foveate.models.gguf_tokenizer import tokenizer_of

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""`general.architecture` of the files that can be opened. "llama" covers Llama, Mistral, SmolLM2 and their kin."""

_FORMAT = 1  # raised whenever the same file would convert to something else

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_FREE = re.compile(r"(\w+)\.(weight|bias)")


def folder_of(path: Path) -> Path:
    """The converted folder of a GGUF file, made on first use and kept under the file's content hash.

    Raises:
        BadArgument: not a GGUF file, or of an architecture that cannot be opened.
        Refused: the file says something that these architectures do not have.
    """
    _check_magic(path)
    return artifact(
        key(sha256(path)),
        re.sub(r"[^\w.-]+", "-", path.stem),
        lambda folder, scratch, report: convert(path, folder, report),
        space=path.stat().st_size,
    )


def key(digest: str) -> str:
    """The cache key of the conversion of a GGUF file with this SHA-256."""
    return f"gguf{_FORMAT}-{digest[:16]}"


def convert(path: Path, folder: Path, report: Report) -> None:
    """Write `path` as config.json, generation_config.json, model.safetensors and tokenizer files into `folder`."""
    from safetensors.torch import save_file

    report("converting", 0.0)
    reader = _reader(path)
    metadata = _Metadata(reader)
    if metadata.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        mend = f"its architecture {metadata.architecture!r} cannot be opened; {known} can"
        raise BadArgument("source", str(path), mend)
    config = _config(metadata, reader)
    weights: dict[str, Tensor] = {}
    total = sum(int(tensor.n_elements) for tensor in reader.tensors)
    done = 0
    for tensor in reader.tensors:
        if tensor.name != "rope_freqs.weight":
            weights[_name(tensor.name, metadata.architecture)] = _weight(tensor, config)
        done += int(tensor.n_elements)
        report("converting", 0.9 * done / total)
    _check_complete(weights, config)
    config.dtype = max(weights.values(), key=Tensor.numel).dtype
    config.save_pretrained(folder)
    _generation_config(metadata).save_pretrained(folder)
    tokenizer_of(metadata.values, config.max_position_embeddings).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report("converting", 1.0)


class _Metadata:
    """The key-value part of a GGUF file; keys of the architecture are named without its prefix."""

    def __init__(self, reader: GGUFReader) -> None:
        self.values: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.architecture = str(self.values.get("general.architecture"))

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(f"{self.architecture}.{name}", default)

    def number(self, name: str) -> int:
        value = self.get(name)
        if not isinstance(value, int):
            raise Refused(f"the GGUF file gives {name} = {value!r}; one whole number for all layers is needed")
        return value


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise BadArgument("source", str(path), "this is not a GGUF file: its first four bytes are not GGUF")


def _reader(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    _check_magic(path)
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise BadArgument("source", str(path), f"the GGUF file is damaged or cut short ({error})") from error


def _config(metadata: _Metadata, reader: GGUFReader) -> Any:
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise Refused("the GGUF file holds no token_embd.weight; give the file of a whole model")
    if metadata.get("attention.sliding_window"):
        raise Refused("the GGUF file asks for sliding attention, which is not read from GGUF; give the hub checkpoint")
    heads = metadata.number("attention.head_count")
    kv_heads = metadata.number("attention.head_count_kv") if metadata.get("attention.head_count_kv") else heads
    hidden = metadata.number("embedding_length")
    common = {
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": metadata.number("feed_forward_length"),
        "num_hidden_layers": metadata.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": metadata.get("attention.key_length") or hidden // heads,
        "max_position_embeddings": metadata.number("context_length"),
        # written as a 32-bit float: 1e-5 comes back as 9.9999997e-06
        "rms_norm_eps": float(f"{metadata.get('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": _rope_parameters(metadata, tensors.get("rope_freqs.weight")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.values.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.values.get("tokenizer.ggml.padding_token_id"),
    }
    if metadata.architecture == "llama":
        return LlamaConfig(**common, attention_bias="blk.0.attn_q.bias" in tensors, architectures=["LlamaForCausalLM"])
    if metadata.architecture == "qwen2":
        return Qwen2Config(**common, use_sliding_window=False, architectures=["Qwen2ForCausalLM"])
    return Qwen3Config(
        **common,
        attention_bias="blk.0.attn_q.bias" in tensors,
        use_sliding_window=False,
        architectures=["Qwen3ForCausalLM"],
    )


def _rope_parameters(metadata: _Metadata, factors: ReaderTensor | None) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(metadata.get("rope.freq_base", 10000.0))}
    kind = metadata.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(metadata.get("rope.scaling.factor"))}
        if original := metadata.get("rope.scaling.original_context_length"):
            rope["original_max_position_embeddings"] = original
    elif kind != "none":
        raise Refused(f"the GGUF file scales its positions by {kind!r}, which is not read from GGUF")
    if factors is not None:
        rope |= _llama3_scaling(np.asarray(factors.data, dtype=np.float64).ravel(), rope["rope_theta"])
    return rope


def _llama3_scaling(factors: np.ndarray, theta: float) -> dict[str, Any]:
    """Llama 3.1's scaling from the divisors of each frequency, which is all that a GGUF file keeps of it.

    The largest divisor is the factor. The other three numbers are those of every published Llama 3.x (1, 4, 8192);
    they are taken only if they give the file's divisors back.
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    dim = 2 * len(factors)
    config = LlamaConfig(
        hidden_size=dim, num_attention_heads=1, head_dim=dim, rope_parameters=scaling | {"rope_theta": theta}
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if not np.allclose(plain / scaled.double().numpy(), factors, rtol=1e-3):
        raise Refused("the GGUF file scales its frequencies in a way that is not Llama 3's; give the hub checkpoint")
    return scaling


def _generation_config(metadata: _Metadata) -> Any:
    from transformers import GenerationConfig

    # Some chat models end a turn with another token than a text; generation has to stop at either.
    ends = [metadata.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(end for end in ends if end is not None))
    return GenerationConfig(
        bos_token_id=metadata.values.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=stops[0] if len(stops) == 1 else stops or None,
        pad_token_id=metadata.values.get("tokenizer.ggml.padding_token_id", stops[0] if stops else None),
    )


def _name(name: str, architecture: str) -> str:
    if match := _BLOCK.fullmatch(name):
        layer, part, kind = match.groups()
        if part in _NAMES:
            return f"model.layers.{layer}.{_NAMES[part]}.{kind}"
    elif (match := _FREE.fullmatch(name)) and match[1] in _NAMES:
        return f"{_NAMES[match[1]]}.{match[2]}"
    raise Refused(f"the GGUF file holds {name}, which a dense {architecture} model has no place for")


def _weight(tensor: ReaderTensor, config: Any) -> Tensor:
    """One de-quantised tensor, [out, in], in the smallest dtype that loses nothing that matters.

    Blocks go to float16: 11 significant bits against a quantisation step of one part in 15 (Q4) to 255 (Q8), at half
    the bytes of float32; bfloat16 has 8 bits, which Q8 would feel. Plain tensors keep their own dtype.
    """
    from gguf import GGMLQuantizationType, dequantize

    plain = {
        GGMLQuantizationType.F32: torch.float32,
        GGMLQuantizationType.F16: torch.float16,
        GGMLQuantizationType.BF16: torch.bfloat16,
    }
    values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    dtype = plain.get(tensor.tensor_type, torch.float16)
    if config.model_type == "llama":
        if ".attn_q." in tensor.name:
            values = _rotate_halves(values, config.num_attention_heads)
        elif ".attn_k." in tensor.name:
            values = _rotate_halves(values, config.num_key_value_heads)
    low, high = torch.aminmax(values)
    if dtype is torch.float16 and max(-low.item(), high.item()) > torch.finfo(dtype).max:
        return values.contiguous()  # a block's scale can lift a weight above the range of its own float16
    return values.to(dtype).contiguous()


def _check_complete(weights: dict[str, Tensor], config: Any) -> None:
    """transformers would draw a missing weight at random and drop one too many, with a warning at most."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise Refused(
            f"the GGUF file does not make a whole {config.model_type} model: {name} is {found.get(name, 'missing')} "
            f"in the file and {expected.get(name, 'unknown')} in the model"
        )


def _rotate_halves(weight: Tensor, heads: int) -> Tensor:
    """From pairs of neighbours (x0, x1), as llama files rotate them, to pairs (x0, xD/2) as transformers does."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
