"""What `throughput` compares with: what a user would write otherwise, by transformers' own forward pass and `Trainer`.

Left out: who times it (`trials`).
"""

import tempfile
import time

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..data import Sample
from ..model.collate import Batch, Collate
from ..model.device import wait_for
from ..model.network import CountingModel
from ..training.losses import LossParts

INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "pixel_values", "image_grid_thw")
"""What transformers' own forward pass is given."""

OF_STEPS = ("names", "count", "image_sizes", "answer_tokens")
"""What `TrainingStep` reads beside it."""


class PlainCollate:
    """What a plain loop feeds to transformers: pixels from the library's processor, anew for each batch."""

    def __init__(
        self, model: CountingModel, more: tuple[str, ...] = ("names", "count", "image_sizes", "answer_tokens")
    ):
        self.collate = Collate(model.tokenizer, model.image_processor, pixels=False)
        self.keys = (*INPUTS, *more)

    def __call__(self, samples: list[Sample]) -> Batch:
        pixels = self.collate.image_processor(images=[sample.image for sample in samples], return_tensors="pt")
        batch = {**self.collate(samples), **pixels}
        return {key: batch[key] for key in self.keys}


class PlainLoss(nn.Module):
    """The count loss as transformers computes it: a forward pass with all logits."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, batch: Batch, tokens=None, images=None, weight=None) -> LossParts:
        loss = self.network(**{key: batch[key] for key in INPUTS}, use_cache=False).loss
        return LossParts(loss, loss, torch.zeros_like(loss))


def trainer_trial(model: CountingModel, samples: list[Sample], batch_size: int, steps: int, bf16: bool, workers: int):
    """Some steps of transformers' `Trainer`, after one that allocates what stays; as Qwen's fine-tuning calls it.

    Returns:
        Images, tokens, patches and places in the sequences of these steps, and their seconds.
    """
    seen: list[tuple] = []
    times: list[float] = []
    device = next(model.network.parameters()).device.type

    class WatchedTrainer(Trainer):
        def training_step(self, network, inputs, *args, **kwargs):
            mask = inputs["attention_mask"]
            seen.append((len(mask), mask.sum(), len(inputs["pixel_values"]), mask.numel()))
            return super().training_step(network, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step in (1, 1 + steps):
                wait_for(device)
                times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=batch_size, max_steps=1 + steps, learning_rate=1e-6, bf16=bf16,
            use_cpu=device == "cpu", dataloader_num_workers=workers, remove_unused_columns=False, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = WatchedTrainer(model.network, arguments, PlainCollate(model, INPUTS), samples, callbacks=[Clock()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.accelerator.unwrap_model(model.network, keep_fp32_wrapper=False)  # or the next one wraps it again
    counts = (sum(int(step[i]) for step in seen[1:]) for i in range(4))
    return dict(zip(("images", "tokens", "patches", "places"), counts, strict=True)) | {"seconds": times[1] - times[0]}
