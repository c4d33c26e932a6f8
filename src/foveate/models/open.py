"""Open a language model by whatever name the user has for it."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from foveate.errors import BadArgument, FoveateError, Refused
from foveate.models import builtin, gguf_weights
from foveate.models.placement import resolve_device, resolve_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
_LANGUAGE_MODEL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class Loaded(NamedTuple):
    """A model in eval mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(
    source: str | Path = "smollm2", *, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
) -> Loaded:
    """Open a decoder-only language model and its tokenizer.

    Args:
        source: the name of a built-in model ("smollm2"), a local folder in transformers' layout, a `.gguf` file, or a
            model id on the Hugging Face hub. Built-in models and GGUF files are converted once and then kept in the
            cache directory (`FOVEATE_CACHE` or the platform's).
        dtype: of the weights and of the cache: "bfloat16", "float32", "float16", a torch.dtype, or "auto": bfloat16
            where the processor multiplies it natively (AVX512-BF16, AMX, CUDA from Ampere on), else float32.
        device: "auto" (CUDA where there is one), "cpu", "cuda:1", a torch.device.

    Raises:
        BadArgument: there is no such model, dtype or device, or it is not a decoder-only language model.
        Refused: the model exists but cannot be had here (no network, no access, no room in the cache directory).
    """
    place = resolve_device(device)
    precision = resolve_dtype(dtype, place)
    path, local = _locate(str(source))
    model = _open_model(str(source), path, local, precision).to(place).eval()
    tokenizer = _open_tokenizer(str(source), path, local)
    return Loaded(model, tokenizer)


def _locate(source: str) -> tuple[str, bool]:
    """What to hand to transformers, and whether it is a folder on this machine."""
    if source in builtin.BUILTIN:
        return str(builtin.folder_of(source)), True
    path = Path(source).expanduser()
    if path.is_dir():
        _check_folder(source, path)
        return str(path), True
    if path.is_file():
        return str(gguf_weights.folder_of(path)), True
    if path.suffix == ".gguf" or path.is_absolute() or source.startswith((".", "~")) or not _HUB_ID.fullmatch(source):
        raise BadArgument("source", source, f"no such file or folder; {_choices(source)}")
    return source, False


def _choices(source: str) -> str:
    close = difflib.get_close_matches(source, builtin.BUILTIN, n=1, cutoff=0.6)
    guess = f"did you mean {close[0]!r}? " if close else ""
    names = ", ".join(builtin.BUILTIN)
    return f"{guess}give a built-in model ({names}), a folder, a .gguf file or a model id of the Hugging Face hub"


def _check_folder(source: str, path: Path) -> None:
    if not (path / "config.json").is_file():
        raise BadArgument("source", source, "the folder holds no config.json; give one that save_pretrained wrote")
    if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        raise BadArgument("source", source, "the folder holds no weights (*.safetensors or *.bin)")


def _open_model(source: str, path: str, local: bool, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=local, trust_remote_code=False)
        _check_decoder(source, config)
        return AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, local_files_only=local, trust_remote_code=False
        )
    except FoveateError:
        raise
    except Exception as error:
        raise _explained(source, local, error) from error


def _open_tokenizer(source: str, path: str, local: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        if local:
            raise BadArgument("source", source, f"its tokenizer cannot be read ({_line(error)})") from error
        raise _explained(source, local, error) from error


def _check_decoder(source: str, config: Any) -> None:
    names = getattr(config, "architectures", None) or []
    known = not names or any(name.endswith(_LANGUAGE_MODEL) for name in names)
    if getattr(config, "is_encoder_decoder", False) or not known:
        what = ", ".join(names) or config.model_type
        raise BadArgument("source", source, f"{what} is not a decoder-only language model, which Foveate works on")


def _explained(source: str, local: bool, error: Exception) -> FoveateError:
    """transformers' failures as one line. It wraps every hub failure in an OSError whose text tells them apart."""
    line = _line(error)
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return Refused(f"{source} does not fit into memory: {line}")
    if local:
        return BadArgument("source", source, f"the model cannot be opened ({line})")
    if "gated repo" in line or "401" in line or "403" in line:
        return Refused(f"{source} is a gated or private model of the Hugging Face hub: log in with `hf auth login`")
    if not isinstance(error, OSError) or "is not a valid model identifier" in str(error):
        return BadArgument("source", source, f"{line}; {_choices(source)}")
    return Refused(f"{source!r} is neither here nor to be had from the Hugging Face hub ({line}); {_choices(source)}")


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
