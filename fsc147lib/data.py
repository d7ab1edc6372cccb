"""Read and check an official FSC147 root: annotations, splits and images as `Sample`s; collate them to a `Batch`.

One scan finds the faults of a root, both when `FSC147` opens a split and when `check` reports on all
of them.  Opening reads the annotations and the images' headers; `check` also decodes every image.
`Collate` makes tensors of samples with the tokenizer and the image processor that it is given.

Left out: downloading, augmentation beyond the mirror image, and the model itself.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from .faults import (
    ANNOTATIONS,
    CLASSES,
    DENSITIES,
    FALLBACK_CATEGORY,
    IMAGES,
    SPLITS,
    DataError,
    Faults,
    is_plain,
    parse_classes,
    parse_json,
    read_numbers,
    read_text,
    split_names,
)
from .prompt import IMAGE_TOKEN, tokenize
from .targets import GRID, area_weights, density_map, target_heatmap


def _read(kind: str, path: Path, read):
    """`read(path)`, with whatever it raises as a DataError: Pillow and numpy raise many types on damaged files."""
    try:
        return read(path)
    except Exception as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise DataError(str(Faults().add(kind, path, path.name, problem))) from error


def _header_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.height, image.width


def _decode(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


@dataclass(frozen=True, eq=False)
class Sample:
    """One annotated image, in pixels of the stored 384-pixel image; what lies on disk is read when asked for.

    A missing or damaged file raises DataError from `image`, `size`, `density`, `target` and `flipped`.
    """

    name: str
    category: str
    points: np.ndarray  # [N, 2] float32 x, y
    boxes: np.ndarray  # [K, 4] float32 x1, y1, x2, y2 of the exemplars; K is 3 to 6 in FSC147
    image_path: Path
    density_path: Path | None = None
    mirror_of: "Sample | None" = None  # where a mirror image takes its pixels and maps from

    @property
    def count(self) -> int:
        return len(self.points)

    @property
    def image(self) -> Image.Image:
        """RGB, decoded at each access (thousands would not fit in memory).

        EXIF orientation is ignored, because the annotations refer to the stored pixels.
        """
        if self.mirror_of is not None:
            return self.mirror_of.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _read("unreadable-image", self.image_path, _decode)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, from the image's header."""
        return self.mirror_of.size if self.mirror_of else _read("unreadable-image", self.image_path, _header_size)

    @property
    def density(self) -> np.ndarray:
        """[H, W] float32, objects per pixel: the official .npy where present, else made from the dots."""
        if self.mirror_of is not None:
            return self.mirror_of.density[:, ::-1].copy()
        size = self.size  # first, so that a damaged image is not reported as a damaged density
        if self.density_path is None:
            return density_map(self.points, size)
        return _read("bad-density", self.density_path, self._load_density)

    def _load_density(self, path: Path) -> np.ndarray:
        density = np.load(path, allow_pickle=False).astype(np.float32)
        if density.shape != self.size:
            raise ValueError(f"its shape is {density.shape}, the image is {self.size} (height, width)")
        return density

    @cached_property
    def target(self) -> np.ndarray:
        """[14, 14] float32 summing to 1: the target heatmap, computed once."""
        if self.mirror_of is not None:
            return self.mirror_of.target[:, ::-1].copy()
        return target_heatmap(self.points, self.size)

    def flipped(self) -> "Sample":
        """The left-right mirror image; flipping twice gives the very same sample."""
        if self.mirror_of is not None:
            return self.mirror_of
        width = np.float32(self.size[1])
        points, boxes = self.points.copy(), self.boxes[:, [2, 1, 0, 3]]  # x1 and x2 change places
        points[:, 0] = width - points[:, 0]
        boxes[:, [0, 2]] = width - boxes[:, [0, 2]]
        return Sample(self.name, self.category, points, boxes, self.image_path, self.density_path, mirror_of=self)


class FSC147(Sequence):
    """The samples of one split, in the split file's order; an index gives a `Sample`, a slice a list.

    Args:
        root: folder in the official layout.
        split: any split of the split file: train, val, test, val_coco, test_coco.
        require_images: False reads annotations with no image on disk (what needs one then raises).
        allow_missing: leave out names of the split that have no annotation, instead of raising.

    Raises:
        DataError: on the fatal faults of this split (see `Fault`), all of them in one message.
    """

    def __init__(self, root: str | Path, split="train", require_images=True, allow_missing=False):
        self.root, self.split = Path(root).expanduser(), split
        samples, faults = _scan(self.root, split, require_images)
        fatal = Faults(f for f in faults if f.fatal and not (allow_missing and f.kind == "no-annotation"))
        if fatal:
            raise DataError(f"{self.root} cannot be opened for split {split!r}:\n{fatal}")
        self._samples = samples[split]
        self.categories = sorted({sample.category for sample in self._samples})

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index):
        return self._samples[index]


def open_split(root: str | Path, split: str, limit: int | None = None) -> list[Sample]:
    """The first `limit` samples of a split, to train on or to evaluate.

    Raises:
        DataError: as `FSC147`, and for a split without images.
    """
    samples = FSC147(root, split)[:limit]
    if not samples:
        raise DataError(f"{root}: split {split!r} in {SPLITS} is empty: name another split, or add images to it")
    return samples


@dataclass
class Report:
    """What `check` found: per split the numbers of usable images and categories, and the spread of counts."""

    root: str
    splits: dict[str, dict[str, float]]  # images, categories, min, median, mean, max (none of the last four if empty)
    faults: Faults

    @property
    def clean(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        faults = [asdict(fault) for fault in self.faults]
        return {"root": self.root, "clean": self.clean, "splits": self.splits, "faults": faults}

    def __str__(self) -> str:
        rows = [f"  {name}: " + ", ".join(f"{k} {v:g}" for k, v in row.items()) for name, row in self.splits.items()]
        total = f"{len(self.faults)} faults, {sum(fault.fatal for fault in self.faults)} of them fatal"
        return "\n".join([f"FSC147 at {self.root}", *rows, total, str(self.faults)]).rstrip()


def check(root: str | Path) -> Report:
    """Look for every fault of a root, in all splits, decoding every image.  Bad data never raises."""
    samples, faults = _scan(Path(root).expanduser())
    unique = {sample.name: sample for listed in samples.values() for sample in listed}.values()
    present = [sample for sample in unique if sample.image_path.exists()]
    with ThreadPoolExecutor() as pool:  # decoding lets go of the interpreter lock
        for found in pool.map(_pixel_faults, present):
            faults.extend(found)
    splits = {}
    for split, listed in samples.items():
        n = [sample.count for sample in listed]
        splits[split] = {"images": len(n), "categories": len({sample.category for sample in listed})}
        if n:
            splits[split] |= {"min": min(n), "median": float(np.median(n)), "mean": float(np.mean(n)), "max": max(n)}
    return Report(str(root), splits, faults)


def _pixel_faults(sample: Sample) -> Faults:
    """The faults of one sample that show only with its pixels, or that are not fatal."""
    name, faults = sample.name, Faults()
    try:
        height, width = sample.size
    except DataError:
        return faults  # the scan has said so
    try:
        _ = sample.image  # decoded for its errors alone
    except DataError as error:
        return faults.add("unreadable-image", f"{IMAGES}/{name}", name, f"cannot be decoded ({error.__cause__})")
    limits = np.array([width, height, width, height])
    dots = sample.points[((sample.points < 0) | (sample.points > limits[:2])).any(axis=1)]
    if len(dots):
        problem = f"{len(dots)} of {sample.count} dots outside the {width} x {height} image, first {dots[0].tolist()}"
        faults.add("dot-outside", ANNOTATIONS, name, problem)
    boxes = sample.boxes[((sample.boxes < 0) | (sample.boxes > limits)).any(axis=1)]
    if len(boxes):
        faults.add("bad-box", ANNOTATIONS, name, f"box {boxes[0].tolist()} leaves the {width} x {height} image")
    try:
        if sample.density_path:
            _ = sample.density  # loaded for its errors alone
    except DataError as error:
        faults.add("bad-density", f"{DENSITIES}/{sample.density_path.name}", name, str(error.__cause__))
    return faults


def _scan(root: Path, wanted: str | None = None, images: bool = True) -> tuple[dict[str, list[Sample]], Faults]:
    """Read a root, of an image no more than its header: of one split, or (None) of all.

    Returns:
        Per split the samples with a readable annotation; all faults found.
    """
    faults = Faults()
    if not root.is_dir():
        return {}, faults.add("missing-file", root, "ROOT", "there is no such folder")
    splits = read_text(root, SPLITS, parse_json, faults)
    annotations = read_text(root, ANNOTATIONS, parse_json, faults)
    classes = read_text(root, CLASSES, lambda text: parse_classes(text, faults), faults)
    if images and not (root / IMAGES).is_dir():
        faults.add("missing-file", f"{IMAGES}/", IMAGES, "there is no such folder")
        images = False  # said once, not for every image
    if splits is None or annotations is None:
        return {}, faults
    if wanted not in (None, *splits):
        problem = f"there is no such split, only {', '.join(map(repr, splits))}"
        return {}, faults.add("bad-split", SPLITS, wanted, problem)
    names = {split: split_names(splits, split, faults) for split in (splits if wanted is None else [wanted])}
    pictures, maps = ({path.name for path in (root / folder).glob("*")} for folder in (IMAGES, DENSITIES))
    samples = {}
    for name in dict.fromkeys(chain.from_iterable(names.values())):
        samples[name] = _read_entry(root, name, annotations, classes, maps, faults)
        if images and samples[name] and name not in pictures:
            faults.add("missing-image", f"{IMAGES}/{name}", name, "there is no such file")
        elif images and samples[name]:
            _check_size(samples[name], annotations[name], faults)
    if wanted is None:
        for name in sorted(annotations.keys() - samples.keys()):
            kind = "unlisted" if is_plain(name) else "unsafe-name"
            faults.add(kind, ANNOTATIONS, name, "annotated, but in no split")
        for name in sorted(pictures - samples.keys()):
            faults.add("unlisted", f"{IMAGES}/{name}", name, "on disk, but in no split")
    faults = Faults(dict.fromkeys(faults))  # an image in two splits is at fault once
    return {split: [samples[n] for n in listed if samples[n]] for split, listed in names.items()}, faults


def _check_size(sample: Sample, entry: dict, faults: Faults) -> None:
    """Hold the image's header against the original size and the ratios that FSC147's entries carry."""
    file = f"{IMAGES}/{sample.name}"
    try:
        height, width = sample.size
    except DataError as error:
        faults.add("unreadable-image", file, sample.name, f"cannot be read ({error.__cause__})")
        return
    for side, ratio, size in (("H", "ratio_h", height), ("W", "ratio_w", width)):
        factors = entry.get(side), entry.get(ratio)
        numbers = all(type(factor) in (int, float) and abs(factor) < 1e9 for factor in factors)
        if side in entry and ratio in entry and not (numbers and abs(factors[0] * factors[1] - size) <= 1):
            problem = f"{side} x {ratio} is {factors[0]!r} x {factors[1]!r} in the annotation, {size} in the image"
            faults.add("size-mismatch", file, sample.name, problem)


def _read_entry(root: Path, name: str, annotations, classes, maps: set[str], faults: Faults) -> Sample | None:
    """The sample of one name, or None with a fault added; `maps` are the density files that exist."""
    if not is_plain(name):
        faults.add("unsafe-name", SPLITS, name, "the name is no plain file name")
        return None
    if name not in annotations:
        faults.add("no-annotation", ANNOTATIONS, name, "in a split, but not annotated")
        return None
    entry = annotations[name]
    if name in annotations.repeated or getattr(entry, "repeated", None):
        faults.add("duplicate-key", ANNOTATIONS, name, "the entry, or a key in it, is there twice")
    try:
        points, corners = read_numbers(entry, "points", 2), read_numbers(entry, "box_examples_coordinates", 4, 2)
    except ValueError as error:
        faults.add("bad-annotation", ANNOTATIONS, name, str(error))
        return None
    if len(points) == 0:
        faults.add("no-dots", ANNOTATIONS, name, "'points' is empty")
        return None
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    flat = boxes[(boxes[:, 2:] <= boxes[:, :2]).any(axis=1)]
    if len(flat):
        faults.add("bad-box", ANNOTATIONS, name, f"box {flat[0].tolist()} has no area")
    if classes is not None and name not in classes:  # None: the whole file is at fault already
        faults.add("no-category", CLASSES, name, "no line gives its category")
    density = Path(name).stem + ".npy"
    density_path = root / DENSITIES / density if density in maps else None
    category = (classes or {}).get(name, FALLBACK_CATEGORY)
    return Sample(name, category, points, boxes, root / IMAGES / name, density_path)


# --- Samples to tensors


class Batch(TypedDict, total=False):
    """A plain dict of tensors; B images, T positions, A answer tokens at the most, P patches in all.

    Training batches end with the answer and are padded on the right; there the causal mask alone keeps
    padding out of sight.  Prompts (`Collate.assemble(answers=False)`) are padded on the left, as `generate`
    wants them, and end with `image_grid_thw`.
    """

    names: list[str]
    count: torch.Tensor  # [B] the true counts
    input_ids: torch.Tensor  # [B, T]
    attention_mask: torch.Tensor  # [B, T] 1 on tokens, 0 on padding
    mm_token_type_ids: torch.Tensor  # [B, T] 1 on visual tokens
    pixel_values: torch.Tensor  # [P, 3 * 2 * 16 * 16] normalised patches of all images, one after the other
    image_grid_thw: torch.Tensor  # [B, 3] 1, rows and columns of each image's patches
    position_ids: torch.Tensor  # [3, B, T] M-RoPE: time, height, width; 0 on padding
    labels: torch.Tensor  # [B, T] the token at each answer position, -100 elsewhere
    answer_positions: torch.Tensor  # [B, A] positions whose next token belongs to the answer (0 where unused)
    answer_labels: torch.Tensor  # [B, A] those next tokens, -100 where unused
    digit_weights: torch.Tensor  # [B, A] 1 / digits where the next token is a digit, else 0
    row_weights: torch.Tensor  # [B, 14, T] how much of a visual token's height lies in each heatmap row
    column_weights: torch.Tensor  # [B, 14, T] and of its width in each column; 0 on all other tokens
    target: torch.Tensor  # [B, 14, 14] target heatmaps


class Collate:
    """Makes a `Batch` of samples: `DataLoader(samples, collate_fn=Collate(tokenizer, image_processor))`.

    Args:
        tokenizer, image_processor: of a `CountingModel`.
        keep: hold each image in memory as resized bytes once it is read (0.3 MB for the tiny model,
            0.7 MB for the real one), so that later epochs do not decode it again.
    """

    def __init__(self, tokenizer, image_processor, keep: bool = False):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self._kept = {} if keep else None

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        return self.assemble(samples, self.pixels(samples))

    def pixels(self, samples: Sequence[Sample]) -> Batch:
        """The image processor's part: `pixel_values` and `image_grid_thw`."""
        try:
            return self.image_processor(images=[self._image(sample) for sample in samples], return_tensors="pt")
        except DataError:
            raise
        except ValueError as error:  # for example an image 200 times as wide as high
            names = ", ".join(sample.name for sample in samples)
            raise DataError(f"the image processor refuses one of {names}: {error}") from error

    def assemble(self, samples: Sequence[Sample], pixels: Batch, answers: bool = True) -> Batch:
        """All the rest: with the right answers, to train on; or prompts alone, to be answered."""
        grids = pixels["image_grid_thw"] // self.image_processor.merge_size  # of tokens: only h and w count
        tokens = [tokenize(self.tokenizer, sample.category, sample.count) for sample in samples]
        lengths = [
            len(t.head) + int(h * w) + len(t.tail) + answers * len(t.answer)
            for t, (_, h, w) in zip(tokens, grids, strict=True)
        ]
        rows, length = len(samples), max(lengths)
        width = max(len(t.answer) for t in tokens)
        batch = Batch(
            names=[sample.name for sample in samples],
            count=torch.tensor([sample.count for sample in samples]),
            input_ids=torch.full((rows, length), self.tokenizer.pad_token_id),
            attention_mask=torch.zeros(rows, length, dtype=torch.long),
            mm_token_type_ids=torch.zeros(rows, length, dtype=torch.int),
            **pixels,
        )
        if answers:
            batch |= Batch(
                position_ids=torch.zeros(3, rows, length, dtype=torch.long),
                labels=torch.full((rows, length), -100),
                answer_positions=torch.zeros(rows, width, dtype=torch.long),
                answer_labels=torch.full((rows, width), -100),
                digit_weights=torch.zeros(rows, width),
                row_weights=torch.zeros(rows, GRID, length),
                column_weights=torch.zeros(rows, GRID, length),
                target=torch.from_numpy(np.stack([sample.target for sample in samples])),
            )
        for i, (parts, (_, height, breadth)) in enumerate(zip(tokens, grids.tolist(), strict=True)):
            self._write_row(batch, i, parts, height, breadth, lengths[i], answers)
        return batch

    def _write_row(self, batch: Batch, i: int, parts, height: int, width: int, length: int, answers: bool):
        """Fill row i: head, height x width visual tokens, tail, and the answer if it is wanted."""
        image = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        head, visual = len(parts.head), height * width
        ids = [*parts.head, *[image] * visual, *parts.tail, *(parts.answer if answers else [])]
        place = slice(0, length) if answers else slice(-length, None)
        batch["input_ids"][i, place] = torch.tensor(ids)
        batch["attention_mask"][i, place] = 1
        batch["mm_token_type_ids"][i, place] = (torch.tensor(ids) == image).int()
        if not answers:
            return
        on_image = slice(head, head + visual)
        y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
        batch["position_ids"][:, i, :length] = _mrope(head, y, x, length - head - visual)
        start, n = length - len(parts.answer), len(parts.answer)
        batch["labels"][i, start:length] = torch.tensor(parts.answer)
        batch["answer_positions"][i, :n] = torch.arange(start - 1, length - 1)
        batch["answer_labels"][i, :n] = torch.tensor(parts.answer)
        batch["digit_weights"][i, :n] = torch.tensor(parts.is_digit) / sum(parts.is_digit)
        batch["row_weights"][i, :, on_image] = torch.from_numpy(area_weights(height, GRID))[:, y]
        batch["column_weights"][i, :, on_image] = torch.from_numpy(area_weights(width, GRID))[:, x]

    def _image(self, sample: Sample) -> Image.Image:
        """The image, already at the size that the processor would give it if images are kept."""
        if self._kept is None:
            return sample.image
        original = sample.mirror_of or sample
        if original.image_path not in self._kept:
            image, processor = original.image, self.image_processor
            factor = processor.patch_size * processor.merge_size
            height, width = smart_resize(
                image.height, image.width, factor, processor.size["shortest_edge"], processor.size["longest_edge"]
            )
            self._kept[original.image_path] = image.resize((width, height), Image.Resampling(processor.resample))
        image = self._kept[original.image_path]
        return image if original is sample else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _mrope(head: int, y: torch.Tensor, x: torch.Tensor, tail: int) -> torch.Tensor:
    """Qwen3-VL's positions [3, T]: text counts on, an image stands at one time and spreads over height and width."""
    image = torch.stack([torch.zeros_like(y), y, x]) + head
    after = head + max(int(y[-1]), int(x[-1])) + 1
    return torch.cat([torch.arange(head).expand(3, -1), image, torch.arange(after, after + tail).expand(3, -1)], dim=1)


def to_device(batch: Batch, device) -> Batch:
    """The batch with its tensors on a device; names stay as they are."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
