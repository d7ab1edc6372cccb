"""A Qwen3-VL with what it needs to read a question about an image, and how it is written to disk.

Left out: where its weights come from (`load`, `tiny`), which of them train (`adapt`).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..files import new_draft, replace_folder
from .adapt import merged_weights


class ModelError(ValueError):
    """A model that cannot be loaded; the message says which and what to do."""


@dataclass(frozen=True)
class Recipe:
    """What a model trains with unless told otherwise; a file beside its weights."""

    learning_rate: float = 1e-5
    train_vision: bool = False

    FILE = "recipe.json"

    @classmethod
    def read(cls, folder: str | Path) -> "Recipe":
        """The recipe in a model's folder, or a ModelError; without the file, that of a large trained model."""
        path = Path(folder) / cls.FILE
        if not path.is_file():
            return cls()
        try:
            recipe = cls(**json.loads(path.read_text()))
            if not (0 < recipe.learning_rate < 1 and isinstance(recipe.train_vision, bool)):
                raise ValueError(f"{recipe} is out of range")
            return recipe
        except (ValueError, TypeError) as error:
            raise ModelError(f"{path} is damaged ({error}): restore it, or remove it") from error


@dataclass
class CountingModel:
    """A Qwen3-VL network with what it needs to read a question about an image."""

    network: Qwen3VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    image_processor: Qwen2VLImageProcessorPil
    recipe: Recipe = field(default_factory=Recipe)

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors), config, tokenizer and image processor, all or nothing.

        The folder loads again with `load_model`, and in plain transformers.
        """
        draft = new_draft(Path(folder))
        self.write_into(draft)
        replace_folder(draft, Path(folder))

    def write_into(self, folder: Path) -> None:
        """Write the parts into a folder that nobody reads yet (`checkpoint` puts more beside them)."""
        self.network.save_pretrained(folder, state_dict=merged_weights(self.network))
        for part in (self.tokenizer, self.image_processor):
            part.save_pretrained(folder)
        (folder / Recipe.FILE).write_text(json.dumps(asdict(self.recipe)))


def random_network(config: Qwen3VLConfig, dtype: torch.dtype = torch.float32) -> Qwen3VLForConditionalGeneration:
    """A network of random weights."""
    return Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)
