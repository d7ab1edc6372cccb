"""`import`: pictures of one's own, with dots from CSV or boxes from COCO JSON, as a root in FSC147's layout.

A root may as well be written by hand (docs/data.md).  Left out: labelling, and faults of the root (`checking`).
"""

import csv
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from ..files import need_file, new_folder
from ..options import need
from .faults import IMAGES, DataError, category_problem, is_plain, need_category, write_layout
from .samples import open_picture, shrunk


@dataclass(frozen=True)
class ImportConfig:
    """Make a root in FSC147's layout from pictures of your own."""

    out: Positional[Path]
    """The root to make: a new folder."""
    images: Path
    """Folder of the pictures."""
    points: Path | None = None
    """CSV with the columns image, x, y (and category), a line an object; or a folder with a CSV of x, y a picture."""
    coco: Path | None = None
    """JSON in COCO's format, instead of --points; an object's dot is the centre of its box."""
    category: str | None = None
    """What is counted; of COCO's and a CSV's categories this one alone.  None: as each picture's objects are called."""
    val: float = 0.2
    """Part of the pictures that goes to the validation split, chosen at random."""
    test: float = 0.0
    """Part of the pictures that goes to the test split."""
    seed: int = 0
    """Of that choice."""

    def __post_init__(self):
        need(self, "points", (self.points is None) != (self.coco is None), "given, or --coco, and not both")
        need(self, "val", 0 <= self.val < 1, "in 0..1")
        need(self, "test", self.test >= 0 and self.val + self.test < 1, "at least 0, and below 1 together with --val")
        need(self, "seed", self.seed >= 0, "at least 0")
        named = self.category is None or not category_problem(self.category)
        need(self, "category", named, "the name of what is counted")


@dataclass
class Labels:
    """What is known of one picture."""

    category: str
    points: list[tuple[float, float]]  # x, y in pixels of the upright picture
    size: tuple[int, int] | None = None  # (width, height) that the points refer to, where it is given


def import_pictures(config: ImportConfig) -> dict[str, int]:
    """Write the root; `fsc147lib import` calls this.  Returns the number of pictures in each split.

    Raises:
        DataError: labels or a picture that cannot be used; the message names the file and the place in it.
        FileExistsError: the root's folder holds something already.
    """
    with new_folder(config.out) as draft:
        file, read = (config.points, read_points) if config.points else (config.coco, read_coco)
        labels = read(file, config.category)
        if not labels:
            raise DataError(f"{file} names no picture to count {config.category or 'anything'} in")
        (draft / IMAGES).mkdir(parents=True)
        entries, categories = {}, {}
        sources: dict[str, Path] = {}
        for name, label in tqdm(labels.items(), desc="import", leave=False):
            source = find_picture(config.images, name)
            stored = f"{source.stem}.jpg"
            if not is_plain(stored):
                raise DataError(f"{stored!r} cannot be the name of a picture: rename {source}")
            if stored in sources:
                raise DataError(f"{source} and {sources[stored]} would both become {stored}: rename one of them")
            sources[stored] = source
            image = open_picture(source)
            _need_fitting(source, label, image.size)
            small = shrunk(image)
            small.save(draft / IMAGES / stored, quality=95)
            scale = np.array(small.size) / image.size
            entries[stored] = {"points": (np.array(label.points).reshape(-1, 2) * scale).round(3).tolist()}
            categories[stored] = label.category
        splits = choose_splits(list(entries), config.val, config.test, config.seed)
        write_layout(draft, entries, splits, categories)
    return {split: len(names) for split, names in splits.items()}


def find_picture(folder: Path, name: str) -> Path:
    """The picture of this name, or the only one with this stem."""
    if is_plain(name) and (folder / name).is_file():
        return folder / name
    found = [path for path in sorted(folder.glob("*")) if path.stem == name and path.suffix.lower() != ".csv"]
    if len(found) == 1:
        return found[0]
    which = ", ".join(path.name for path in found) or "none"
    raise DataError(f"{folder} must hold one picture called {name!r}, but has {which}")


def choose_splits(names: list[str], val: float, test: float, seed: int) -> dict[str, list[str]]:
    """Names by split, at random: a split that is wanted gets a picture at least; `test` is left out where it is 0."""
    order = iter([names[i] for i in np.random.default_rng(seed).permutation(len(names))])
    sizes = {split: max(1, round(part * len(names))) for split, part in (("val", val), ("test", test)) if part}
    if sum(sizes.values()) >= len(names):
        raise DataError(f"too few pictures for train and {' and '.join(sizes)}: there is {len(names)}, label more")
    held_out = {split: sorted(islice(order, size)) for split, size in sizes.items()}
    return {"train": sorted(order), **held_out}


def _need_fitting(path: Path, label: Labels, size: tuple[int, int]) -> None:
    """Refuse points that cannot belong to a picture of this (width, height)."""
    it_is = f"{path} is {size[0]} x {size[1]} pixels, but"
    if label.size not in (None, size):
        raise DataError(f"{it_is} its labels are of {label.size[0]} x {label.size[1]}")
    for x, y in label.points:
        if not (0 <= x <= size[0] and 0 <= y <= size[1]):
            raise DataError(f"{it_is} has a dot at ({x:g}, {y:g})")
    if len(label.points) > 1 and max(map(max, label.points)) <= 1:
        raise DataError(f"all dots of {path} lie within one pixel: give x and y in pixels, not as parts of the picture")


# --- Labels


def read_points(path: Path, category: str | None) -> dict[str, Labels]:
    """Dots from CSV, by picture.  A DataError says the file, the line and what is wrong with it.

    Args:
        path: a file with the columns `image`, `x`, `y` and perhaps `category`; or a folder of files with `x` and
            `y`, each named after its picture.  A line whose x and y are empty, or a file without lines, says that
            there is nothing to count.
        category: what is counted; needed where there is no such column.
    """
    labels: dict[str, Labels] = {}
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        if path.is_dir():
            labels[file.stem] = Labels(need_category(category, f"{file}: "), [])
        for number, row in _csv_rows(file, {"x", "y"} if path.is_dir() else {"image", "x", "y"}):
            place, kind = f"{file}, line {number}", row.get("category", "")
            name = file.stem if path.is_dir() else row["image"]
            if not name:
                raise DataError(f"{place}: no image is named")
            label = labels.setdefault(name, Labels(category or need_category(kind or None, f"{place}: "), []))
            if category is None and label.category != kind:
                raise DataError(f"{place}: {name} shows {label.category!r} and {kind!r}: choose one with --category")
            if (row["x"] or row["y"]) and category in (None, kind or category):
                label.points.append((_number(row, "x", place), _number(row, "y", place)))
    return labels


def _csv_rows(path: Path, columns: set[str]) -> list[tuple[int, dict[str, str]]]:
    """The lines of a CSV file that has some columns, with their numbers; cells are stripped, and "" if missing."""
    try:
        with need_file(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="", restval="", skipinitialspace=True)
            rows = [(reader.line_num, {k: v.strip() for k, v in row.items() if k}) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
    if columns - set(reader.fieldnames or ()):
        raise DataError(f"{path} must begin with a line that names the columns {', '.join(sorted(columns))}")
    return rows


def _number(row: dict[str, str], name: str, place: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{place}: {name} is {row[name]!r}, but must be a number of pixels")
    return value


def read_coco(path: Path, category: str | None = None) -> dict[str, Labels]:
    """The centres of a COCO file's boxes, by picture.  A DataError says in which entry what is wrong.

    Args:
        path: JSON as docs/data.md describes it.
        category: what is counted; None where each picture shows one category.  A picture without it has a count
            of 0; one with a crowd of it (`iscrowd`) is left out, for its count is not known.
    """
    names, pictures, crowds, entry = {}, {}, set(), None
    try:
        content = json.loads(need_file(path).read_text("utf-8-sig"))
        for entry in content["categories"]:
            names[entry["id"]] = str(entry["name"])
        for entry in content["images"]:
            pictures[entry["id"]] = Path(entry["file_name"]).name, (int(entry["width"]), int(entry["height"]))
        centres: dict = {number: defaultdict(list) for number in pictures}  # image's id -> category -> x, y
        for entry in content["annotations"]:
            number, kind = entry["image_id"], names[entry["category_id"]]
            x, y, width, height = map(float, entry["bbox"])
            centres[number][kind].append((x + width / 2, y + height / 2))
            if entry.get("iscrowd"):
                crowds.add((number, kind))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        place = f" in {entry!r:.200}" if entry else ""
        raise DataError(f"{path} is no COCO file ({type(error).__name__}: {error}{place}): see docs/data.md") from error
    if category not in (None, *names.values()):
        raise DataError(f"{path} has no category {category!r}, only {', '.join(sorted(names.values()))}")
    only = next(iter(names.values())) if len(names) == 1 else None
    labels: dict[str, Labels] = {}
    for number, (name, size) in pictures.items():
        kinds = centres[number]
        if name in labels:
            raise DataError(f"{path}: two images are called {name}: rename one, and its file")
        if category is None and len(kinds) > 1:
            raise DataError(f"{path}: {name} shows {', '.join(sorted(kinds))}: choose one with --category")
        kind = category or next(iter(kinds), only)
        if kind is not None and (number, kind) not in crowds:
            labels[name] = Labels(need_category(kind, f"{path}: "), kinds[kind], size)
    return labels
