"""What `throughput` compares with: what a user would write otherwise, by transformers' own forward pass and `Trainer`.

Left out: who times it (`trials`).
"""

import tempfile
import time

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..data import Sample
from ..model.collate import Batch, Collate
from ..model.device import wait_for
from ..model.network import CountingModel
from ..training.losses import LossParts

INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "pixel_values", "image_grid_thw")
"""What transformers' own forward pass is given."""


class PlainCollate:
    """What a plain loop feeds to transformers: pixels from the library's processor, anew for each batch."""

    def __init__(self, model: CountingModel):
        self.collate = Collate(model.tokenizer, model.image_processor, pixels=False)

    def __call__(self, samples: list[Sample]) -> Batch:
        pixels = self.collate.image_processor(images=[sample.image for sample in samples], return_tensors="pt")
        batch = {**self.collate(samples), **pixels}
        return {key: batch[key] for key in (*INPUTS, "names", "count", "image_sizes", "answer_tokens")}


class PlainLoss(nn.Module):
    """The count loss as transformers computes it: a forward pass with all logits."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, batch: Batch, tokens=None, images=None, weight=None) -> LossParts:
        loss = self.network(**{key: batch[key] for key in INPUTS}, use_cache=False).loss
        return LossParts(loss, loss, torch.zeros_like(loss))


class TimedTrainer(Trainer):
    """transformers' `Trainer`, which notes the batches of its steps and when each begins."""

    def training_step(self, network, inputs, *args, **kwargs):
        wait_for(self.args.device.type)  # Trainer itself waits after each step, to look at the loss
        self.begins.append(time.perf_counter())
        self.seen.append({key: inputs[key] for key in ("attention_mask", "image_sizes")})
        return super().training_step(network, {key: inputs[key] for key in INPUTS}, *args, **kwargs)


def trainer_steps(
    model: CountingModel, samples: list[Sample], batch_size: int, steps: int, bf16: bool, workers: int
) -> tuple[list[Batch], float]:
    """Some steps of `Trainer` as Qwen's fine-tuning calls it, after one that allocates what stays.

    Returns:
        Masks and image sizes of these steps' batches, and their seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=batch_size, max_steps=2 + steps, learning_rate=1e-6, bf16=bf16,
            use_cpu=not torch.cuda.is_available(), dataloader_num_workers=workers, remove_unused_columns=False,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = TimedTrainer(model.network, arguments, PlainCollate(model), samples)
        trainer.begins, trainer.seen = [], []
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.accelerator.unwrap_model(model.network, keep_fp32_wrapper=False)  # or the next one wraps it again
    return trainer.seen[1:-1], trainer.begins[-1] - trainer.begins[1]
