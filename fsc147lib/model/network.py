"""A Qwen3-VL with what it needs to read a question about an image, and how it is written to disk.

Left out: where its weights come from (`load`, `tiny`), which of them train (`adapt`).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..files import new_draft, replace_folder
from .adapt import merged_weights


class ModelError(ValueError):
    """A model that cannot be loaded; the message says which and what to do."""


@dataclass
class CountingModel:
    """A Qwen3-VL network with what it needs to read a question about an image."""

    network: Qwen3VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    image_processor: Qwen2VLImageProcessorPil

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors), config, tokenizer and image processor, all or nothing.

        The folder loads again with `load_model`, and in plain transformers with
        `AutoModelForImageTextToText.from_pretrained`.
        """
        draft = new_draft(Path(folder))
        self.write_into(draft)
        replace_folder(draft, Path(folder))

    def write_into(self, folder: Path) -> None:
        """Write the parts into a folder that nobody reads yet (`checkpoint` puts more beside them)."""
        self.network.save_pretrained(folder, state_dict=merged_weights(self.network))
        for part in (self.tokenizer, self.image_processor):
            part.save_pretrained(folder)


def random_network(config: Qwen3VLConfig, dtype: torch.dtype = torch.float32) -> Qwen3VLForConditionalGeneration:
    """A network of random weights."""
    return Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)
