"""Converted checkpoints as rows of a comparison: another model behind the same tokenizer and the same samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.engine.apply import Handle, apply
from foveate.errors import BadArgument
from foveate.evaluate.record import DENSE
from foveate.models import load


@dataclass(frozen=True)
class Checkpoint:
    """A folder with another model of the same vocabulary, such as `foveate convert` writes.

    Its row is named like the folder. Bytes, pairs and times are given as shares of the compared model's dense ones, so
    that a conversion stands beside the methods that hold as much.

    Args:
        folder: as the user gave it.
    """

    folder: str

    @property
    def id(self) -> str:
        """The folder's name, which its row goes by."""
        return Path(self.folder).expanduser().resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        """What tells two folders of one name apart in records."""
        return {"checkpoint": self.folder}

    def open(self, model: Any) -> Handle:
        """Dense attention applied to this model, in the dtype and on the device of the compared one.

        Raises:
            BadArgument: no model is there, or one with another vocabulary.
            Refused: Foveate cannot manage it.
        """
        opened = load(self.folder, dtype=model.dtype, device=model.device).model
        size, wanted = opened.get_input_embeddings().num_embeddings, model.get_input_embeddings().num_embeddings  # type: ignore[union-attr]
        if size != wanted:
            mend = f"its vocabulary has {size} entries, that of the compared model {wanted}; give a conversion of it"
            raise BadArgument("methods", self.folder, mend)
        return apply(opened, DENSE)


def is_checkpoint(text: str) -> bool:
    """Whether a word in a list of methods is a folder with a model."""
    return ("/" in text or Path(text).is_dir()) and (Path(text).expanduser() / "config.json").is_file()
