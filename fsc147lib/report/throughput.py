"""How many images a second `train` trains, and `evaluate` answers, and what each part of the fast step bought.

The first way is a plain transformers loop; each further way adds one thing, the last are what `train`
does.  All ways take turns in one process, on the same weights and the same images, in blocks of some
steps, so that a machine whose speed drifts slows all of them alike.  Steps are those of `train.Run`.

Left out: the cost of each heatmap (`benchmark`).
"""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..data.fsc147 import Sample
from ..evaluation.answering import answering_batch_size, evaluate_samples
from ..model.adapt import freeze_vision
from ..model.collate import Batch, Collate, to_device
from ..model.network import CountingModel
from ..model.pixels import PixelStore
from ..model.vision_cache import VisionCache
from ..training.batches import training_loader
from ..training.loop import Run, TrainConfig
from .overhead import BenchmarkConfig, load_or_shape, peak_memory, write_report


@dataclass(frozen=True)
class Way:
    """One way to train; the switches are those of `TrainConfig`."""

    name: str
    plain: bool = False
    by_size: bool = True
    compiled: bool = False
    cached: bool = False


def ways(on_gpu: bool, frozen: bool) -> list[Way]:
    """The way from a plain loop to what `train` does: compiled layers on a GPU, a cache if the encoder is frozen."""
    steps = [
        Way("plain transformers loop", plain=True, by_size=False),
        Way("layers called directly", by_size=False),
        Way("+ batches by size"),
    ]
    if on_gpu:
        steps.append(Way("+ compiled layers", compiled=True))
    if frozen:
        steps.append(Way("+ vision cache", compiled=on_gpu, cached=True))
    return steps


class PlainCollate:
    """What a plain loop feeds to transformers: pixels from the library's processor, anew for each batch."""

    def __init__(self, model: CountingModel):
        self.collate = Collate(model.tokenizer, model.image_processor, pixels=False)

    def __call__(self, samples: list[Sample]) -> Batch:
        keys = ("names", "input_ids", "attention_mask", "mm_token_type_ids", "labels", "image_sizes")
        batch = self.collate(samples)
        pixels = self.collate.image_processor(images=[sample.image for sample in samples], return_tensors="pt")
        return {**{key: batch[key] for key in keys}, **pixels}


def plain_step(run: Run, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Forward with all logits, backward, clip, update: the count loss alone."""
    keys = ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "pixel_values", "image_grid_thw")
    with run.accelerator.autocast():
        loss = run.model.network(**{key: batch[key] for key in keys}, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.network.parameters(), run.config.clip)
    optimizer.step()
    optimizer.zero_grad()


class Lane:
    """A way with its loader, which goes on from block to block; call `close` at the end."""

    def __init__(self, way: Way, run: Run, cache: VisionCache | None, store: PixelStore, batch_size: int):
        self.way, self.run, self.batch_size = way, run, batch_size
        self.cache = cache if way.cached else None
        store = None if self.cache else store
        self.loader = training_loader(
            run.samples["train"], run.model, store, batch_size, run.config.seed, run.config.flip, way.by_size,
            run.workers,
        )  # fmt: skip
        if way.plain:
            self.loader = DataLoader(
                self.loader.dataset, batch_sampler=self.loader.batch_sampler, collate_fn=PlainCollate(run.model),
                num_workers=run.workers, pin_memory=self.loader.pin_memory, persistent_workers=run.workers > 0,
            )  # fmt: skip
            self.optimizer = torch.optim.AdamW(run.model.network.parameters(), lr=1e-6)
        self.padding = self.loader.batch_sampler.padding()
        self.batches = self._forever()

    def _forever(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            self.loader.batch_sampler.shuffle(epoch)
            yield from self.loader
            epoch += 1

    def close(self) -> None:
        """End the worker processes."""
        self.batches.close()
        self.loader = None

    def fits(self) -> bool:
        """Whether a step on the longest images has room; notes the memory at its peak, and leaves nothing behind."""
        lengths = self.loader.batch_sampler.lengths
        longest = sorted(range(len(lengths)), key=lambda i: lengths[i][2])[-self.batch_size :]
        batch = self.loader.collate_fn([self.loader.dataset[i, False] for i in longest])
        self.run.heatmap.compiled = self.way.compiled
        self.run.cache = self.cache
        try:
            batch = to_device(batch, self.run.accelerator.device)
            self.step(batch)  # the first step allocates what stays
            self.peak = peak_memory(partial(self.step, batch), self.run.accelerator.device.type)
            return True
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            self.release()

    def block(self, steps: int) -> dict:
        """Take some steps; returns seconds, images, tokens, patches and seconds of waiting for the loader."""
        counts = {"images": 0, "tokens": 0, "patches": 0, "waited": 0.0}
        self.run.heatmap.compiled = self.way.compiled
        self.run.cache = self.cache
        started = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(self.batches)
            counts["waited"] += time.perf_counter() - asked
            counts["images"] += len(batch["names"])
            counts["tokens"] += int(batch["attention_mask"].sum())
            counts["patches"] += sum(h * w for h, w in batch["image_sizes"])
            self.step(to_device(batch, self.run.accelerator.device))
        self.run.check()
        if self.run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return {**counts, "seconds": time.perf_counter() - started}

    def step(self, batch: Batch) -> None:
        if self.way.plain:
            plain_step(self.run, self.optimizer, batch)
        else:
            self.run.train_step([batch])

    def release(self) -> None:
        """Give back the gradients' memory, and that of the plain loop's own optimizer."""
        self.run.model.network.zero_grad()
        if self.way.plain:
            self.optimizer.state.clear()
        if self.run.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


def open_lane(way: Way, run: Run, cache: VisionCache | None, store: PixelStore, batch_size: int) -> Lane:
    """A way at the batch size asked for, or at the half, the quarter ... that has room."""
    while True:
        lane = Lane(way, run, cache, store, batch_size)
        if lane.fits():
            return lane
        lane.close()
        if batch_size == 1:
            raise ValueError(f"not even one image has room in a step of '{way.name}'")
        batch_size //= 2


def step_flops(config, images: int, tokens: int, patches: int, encoder: bool) -> float:
    """Multiplications and additions that a training step needs, padding left out; the language model trains.

    Linear layers: 2 a weight and position forward, 4 backward; causal attention: half of all pairs; of the
    last layer the keys and values at all positions, the rest and the output head at 7 an image; the vision
    encoder (a frozen one) forward only.
    """
    text, vision = config.text_config, config.vision_config
    width, inner = text.hidden_size, text.num_attention_heads * text.head_dim
    grouped = text.num_key_value_heads * text.head_dim
    layer = width * (2 * inner + 2 * grouped + 3 * text.intermediate_size)
    length = tokens / images
    flops = 6 * tokens * ((text.num_hidden_layers - 1) * (layer + inner * length) + 2 * grouped * width)
    flops += 6 * 7 * images * (layer + text.vocab_size * width)
    if encoder:
        block = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
        flops += 2 * vision.depth * patches * (block + 2 * vision.hidden_size * patches / images)
    return flops


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product of random numbers: median of five."""
    n = 8192 if device.type == "cuda" else 512  # a CPU without bfloat16 takes minutes for more
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / float(np.median(seconds[2:]))


def measure(run: Run, cache: VisionCache | None, config: BenchmarkConfig) -> list[dict]:
    """Time all ways of training in turn; a row for each.

    Returns:
        Rows with `name`, `batch_size` (the largest that fits, up to the one asked for), `images_per_second`,
        `tokens_per_second`, `peak_share` (of a matrix product's speed), `peak_memory` (MiB, on the longest
        images), `padding` and `waiting` (shares of tokens and of time), and `speedup` over the first way:
        medians over rounds.
    """
    device, network = run.accelerator.device, run.model.network
    store = run.pixel_store()
    if not run.workers:  # as from the second epoch on
        for sample in run.samples["train"]:
            store.patches(sample)
    lanes = [open_lane(way, run, cache, store, config.batch_size) for way in ways(device.type == "cuda", bool(cache))]
    for lane in lanes:
        lane.block(2)  # compiles, starts the workers
        lane.release()
    blocks = {lane.way: [] for lane in lanes}
    for _ in range(config.rounds):
        for lane in lanes:
            lane.block(1)  # allocates what stays
            blocks[lane.way].append(lane.block(config.steps))
            lane.release()
    for lane in lanes:
        lane.close()
    speed = measured_peak(device, torch.bfloat16 if run.accelerator.mixed_precision == "bf16" else torch.float32)
    rows = []
    for lane in lanes:
        part = {key: np.array([block[key] for block in blocks[lane.way]]) for key in blocks[lane.way][0]}
        flops = [step_flops(network.config, *counts, encoder=lane.cache is None)
                 for counts in zip(part["images"], part["tokens"], part["patches"], strict=True)]  # fmt: skip
        rows.append({
            "name": lane.way.name,
            "batch_size": lane.batch_size,
            "images_per_second": float(np.median(part["images"] / part["seconds"])),
            "tokens_per_second": float(np.median(part["tokens"] / part["seconds"])),
            "peak_share": float(np.median(flops / part["seconds"]) / speed),
            "peak_memory": lane.peak,
            "padding": lane.padding,
            "waiting": float(np.median(part["waited"] / part["seconds"])),
            "rates": (part["images"] / part["seconds"]).tolist(),
        })  # fmt: skip
    for row in rows:
        row["speedup"] = float(np.median(np.array(row["rates"]) / rows[0]["rates"]))
    return rows


def measure_validation(run: Run, cache: VisionCache | None, config: BenchmarkConfig) -> list[dict]:
    """Images a second of validation: losses, maps, greedy answers; without the first pass: it compiles and decodes."""
    rows, samples, store = [], run.samples["val"], run.pixel_store()
    batch_size = answering_batch_size(config.batch_size, run.heatmap)
    run.heatmap.compiled = run.accelerator.device.type == "cuda"
    for name, kept in (("validation, encoder in the loop", None), ("validation, vision cache", cache)):
        if name.endswith("cache") and kept is None:
            continue
        speeds = []
        for _ in range(1 + min(2, config.rounds)):
            started = time.perf_counter()
            evaluate_samples(run.model, samples, batch_size, run.heatmap, run.accelerator, run.workers, kept, store)
            speeds.append(len(samples) / (time.perf_counter() - started))
        rows.append({"name": name, "images_per_second": float(np.median(speeds[1:])), "rates": speeds[1:]})
    return rows


def measure_masters(run: Run, cache: VisionCache | None, config: BenchmarkConfig) -> dict:
    """What float32 weights and optimizer cost: the last way's steps against the same with all of it in bfloat16.

    The network is left in bfloat16.
    """
    on_gpu = run.accelerator.device.type == "cuda"
    lane = open_lane(ways(on_gpu, bool(cache))[-1], run, cache, run.pixel_store(), config.batch_size)
    batches = [to_device(next(lane.batches), run.accelerator.device) for _ in range(config.steps)]
    seconds = {}
    for name in ("float32", "bfloat16"):
        if name == "bfloat16":
            lane.release()
            run.model.network.to(torch.bfloat16)
            run.optimizer.state.clear()
            torch._dynamo.reset()  # torch before 2.12 goes on with kernels compiled for float32 (pytorch #177525)
        for repeat in range(3):  # the first warms up
            started = time.perf_counter()
            for batch in batches:
                lane.step(batch)
            run.check()
            seconds[name] = min(seconds.get(name, math.inf), time.perf_counter() - started) if repeat else math.inf
    lane.close()
    return {**seconds, "share": 1 - seconds["bfloat16"] / seconds["float32"]}


def throughput(config: BenchmarkConfig) -> dict:
    """Measure what was asked for and print it; `python -m fsc147lib benchmark --throughput ROOT` calls this."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainConfig(
            data=config.throughput, out=Path(folder) / "run", model="tiny" if config.model == "tiny" else "shape",
            batch_size=config.batch_size, precision=config.precision, lora=config.lora, learning_rate=1e-6,
            gradient_checkpointing=config.gradient_checkpointing, limit=config.limit, workers=config.workers,
            epochs=2, tracking="disabled",
        )  # fmt: skip
        device = "cuda" if torch.cuda.is_available() else "cpu"
        run = Run(settings, model=load_or_shape(config.model, device))
        freeze_vision(run.model.network, not settings.vision_trains(0))
        cache, encoding = None, None
        if settings.caches_vision:
            train, started = run.samples["train"], time.perf_counter()
            cache = VisionCache(
                run.model, [*train, *(s.flipped() for s in train), *run.samples["val"]], run.accelerator,
                config.vision_cache, Path(folder), run.workers, compiled=device == "cuda",
            )  # fmt: skip
            encoding = {"place": cache.place, "images": len(cache.places), "seconds": time.perf_counter() - started,
                        "bytes": cache.features.nbytes}  # fmt: skip
        report = {"rows": measure(run, cache, config), "validation": [], "cache": encoding, "masters": None}
        _tell(config, report, table(report["rows"]))
        if config.validation:
            report["validation"] = measure_validation(run, cache, config)
            _tell(config, report, "\n".join(validation_lines(report["validation"])))
        if run.accelerator.mixed_precision == "bf16" and not config.lora:
            report["masters"] = measure_masters(run, cache, config)
            share = report["masters"]["share"]
            _tell(config, report, f"float32 weights and optimizer take {share:.1%} of the last way's step")
    return report


def _tell(config: BenchmarkConfig, report: dict, text: str) -> None:
    """Print what a part of the benchmark found, and write all that is known so far."""
    print(text, flush=True)
    if config.json is not None:
        write_report(config.json, config, report)


def table(rows: list[dict], validation: Sequence[dict] = ()) -> str:
    """The rows of `measure` and `measure_validation` as text."""
    head = ("batch", "images/s", "speedup", "tokens/s", "of peak", "peak MiB", "padding", "waiting")
    lines = [f"{'way':<32}" + "".join(f"{name:>10}" for name in head)]
    for row in rows:
        memory = "unknown" if row["peak_memory"] is None else f"{row['peak_memory']:.0f}"
        lines.append(
            f"{row['name']:<32}{row['batch_size']:>10}{row['images_per_second']:>10.1f}{row['speedup']:>9.2f}x{row['tokens_per_second']:>10.0f}"
            f"{row['peak_share']:>10.1%}{memory:>10}{row['padding']:>10.1%}{row['waiting']:>10.1%}"
        )
    return "\n".join([*lines, *validation_lines(validation)])


def validation_lines(validation: Sequence[dict]) -> list[str]:
    return [f"{row['name']:<42}{row['images_per_second']:>10.1f}" for row in validation]
