"""Open a language model by whatever name the user has for it."""

from __future__ import annotations

import difflib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from foveate import compat
from foveate.errors import BadArgument, FoveateError, Refused
from foveate.models import builtin, converted, encoders, gguf_weights
from foveate.models.placement import SPREAD, one_device, resolve_device, resolve_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
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
        device: "auto" (CUDA where there is one), "cpu", "cuda:1", a torch.device; or "spread": the layers evenly over
            all GPUs, for models that do not fit into one.

    Raises:
        BadArgument: there is no such model, dtype or device, or it is not a decoder-only language model.
        Refused: the model exists but cannot be had here (no network, no access, no room in the cache directory, more
            weights than fit into all GPUs).
    """
    spread = device == SPREAD
    if spread and not torch.cuda.device_count():
        raise BadArgument("device", SPREAD, "this machine has no CUDA devices")
    place = resolve_device("cuda" if spread else device)
    if spread and find_spec("accelerate") is None:
        raise Refused("accelerate spreads a model over GPUs; it is not installed: pip install accelerate")
    precision = resolve_dtype(dtype, place)
    path, local = _locate(str(source))
    _register_type(path)
    config = _open_config(str(source), path, local)
    _check_decoder(str(source), config)
    tokenizer = _open_tokenizer(str(source), path, local)
    if spread:
        model = _open_model(str(source), path, local, config, precision, device_map="balanced")
        if any(where.type != place.type for where in compat.devices(model)):
            raise Refused(f"{source} does not fit into the {torch.cuda.device_count()} GPUs of this machine")
        return Loaded(model.eval(), tokenizer)
    model = _open_model(str(source), path, local, config, precision).to(place).eval()
    return Loaded(model, tokenizer)


def load_encoder(
    source: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
) -> Loaded:
    """Open an encoder of BERT's build, without a task's head, and its tokenizer.

    Args:
        source: a local folder in transformers' layout, with all heads or some, or a model id of the Hugging Face hub.
        dtype, device: as `load` takes them.

    Raises:
        BadArgument: there is no such model, dtype or device.
        Refused: a model of another build, or one that cannot be had here.
    """
    place = resolve_device(one_device(device, "an encoder"))
    precision = resolve_dtype(dtype, place)
    path, local = _locate(str(source))
    _register_type(path)
    config = _open_config(str(source), path, local)
    encoders.check_config(config)
    tokenizer = _open_tokenizer(str(source), path, local)
    model = _open_model(str(source), path, local, config, precision, "AutoModel").to(place).eval()
    return Loaded(model, tokenizer)


def _locate(source: str) -> tuple[str, bool]:
    """What to hand to transformers, and whether all of it is on this machine."""
    if source in builtin.BUILTIN:
        return str(builtin.folder_of(source)), True
    path = Path(source).expanduser()
    if source and path.is_dir():
        _check_folder(source, path)
        return str(path), True
    if path.is_file():
        return str(gguf_weights.folder_of(path)), True
    elsewhere = path.suffix == ".gguf" or path.is_absolute() or source.startswith((".", "~"))
    if elsewhere or not _HUB_ID.fullmatch(source) or _close(source):
        raise BadArgument("source", source, f"no such file or folder; {_choices(source)}")
    return source, not _reach_hub(source)


def _register_type(path: str) -> None:
    """Models of a converted type are of classes that transformers learns of only when one is opened."""
    try:
        family = json.loads((Path(path) / "config.json").read_text()).get("model_type", "")
    except (OSError, ValueError, AttributeError):
        return  # not a folder, or one that transformers will find fault with
    if str(family).startswith(converted.PREFIX):
        encoder = family.removeprefix(encoders.PREFIX) in encoders.FAMILIES
        (encoders if encoder else converted).registered(family)


def _close(source: str) -> str | None:
    return next(iter(difflib.get_close_matches(source.lower(), builtin.BUILTIN, n=1, cutoff=0.75)), None)


def _choices(source: str) -> str:
    close = _close(source)
    guess = f"did you mean {close!r}? " if close else ""
    names = ", ".join(builtin.BUILTIN)
    return f"{guess}give a built-in model ({names}), a folder, a .gguf file or a model id of the Hugging Face hub"


def _check_folder(source: str, path: Path) -> None:
    if not (path / "config.json").is_file():
        raise BadArgument("source", source, "the folder holds no config.json; give one that save_pretrained wrote")
    if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        raise BadArgument("source", source, "the folder holds no weights (*.safetensors or *.bin)")


def _reach_hub(source: str) -> bool:
    """Ask the hub once whether it has the model. Out of reach, what an earlier download left will have to do."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(source, timeout=10)
    except (RepositoryNotFoundError, HFValidationError) as error:
        mend = f"the Hugging Face hub shows no such model (a private one needs `hf auth login`); {_choices(source)}"
        raise BadArgument("source", source, mend) from error
    except Exception:
        return False
    return True


def _open_config(source: str, path: str, local: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        raise _explained(source, path, "config", error) from error


def _open_tokenizer(source: str, path: str, local: bool) -> Any:
    from transformers import AutoTokenizer

    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in _TOKENIZERS):
        raise BadArgument("source", source, "the folder holds no tokenizer (tokenizer.json or the like); save it too")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        raise _explained(source, path, "tokenizer", error) from error


def _open_model(
    source: str,
    path: str,
    local: bool,
    config: Any,
    dtype: torch.dtype,
    auto: str = "AutoModelForCausalLM",
    device_map: str | None = None,
) -> Any:
    import transformers
    from transformers.utils import logging

    # Reading weights takes a second or two: a bar for it would only stand between the user and the answer.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return getattr(transformers, auto).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            local_files_only=local,
            trust_remote_code=False,
            device_map=device_map,
        )
    except Exception as error:
        raise _explained(source, path, "weights", error) from error
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_decoder(source: str, config: Any) -> None:
    names = getattr(config, "architectures", None) or []
    known = not names or any(name.endswith(_LANGUAGE_MODEL) for name in names)
    if getattr(config, "is_encoder_decoder", False) or not known:
        what = ", ".join(names) or config.model_type
        raise BadArgument("source", source, f"{what} is not a decoder-only language model, which Foveate works on")


def _explained(source: str, path: str, what: str, error: Exception) -> FoveateError:
    """One of the many exceptions of transformers and the hub as one line."""
    line = _line(error)
    if isinstance(error, MemoryError):
        return Refused(f"{source} does not fit into memory: {line}")
    if Path(path).is_dir():
        return BadArgument("source", source, f"its {what} cannot be read ({line})")
    if "gated repo" in line:
        return Refused(f"{source} is a gated model: accept its terms on its page at the hub, then `hf auth login`")
    if isinstance(error, OSError) and "connect" in line:
        return Refused(
            f"{source!r} is not on this machine and the Hugging Face hub cannot be reached; {_choices(source)}"
        )
    return BadArgument("source", source, f"its {what} cannot be read ({line})")


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
