"""Does this model work on this machine?  A list of lines that passed, and of lines that failed with their cure.

Left out: what a check does (`checks`), faults of the data (`check`), how well the model counts (`evaluate`), and speed.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data import Sample, make_dataset, open_split
from ..model.device import free_models
from ..options import Precision, need, need_report
from . import checks
from .timing import machine, write_report

TRIED = {"torch": ("2.11", "2.13"), "transformers": ("5.23",)}  # what the tests, or this command, were run with
_VERSIONS = "install the versions of requirements.lock: transformers may compute something else by now"
CHECKS = (  # a check, and what to do where it fails
    (checks.files_as_written, "copy the folder anew, or go on from another checkpoint: its bytes have changed on disk"),
    (checks.special_tokens, "take all files of one model's folder: tokenizer and weights are of different models"),
    (checks.rendered_prompt, "take the tokenizer and the chat template that lie beside a Qwen3-VL's weights"),
    (checks.answer_tokens, "take the tokenizer of a Qwen3-VL: each digit must be a token of its own"),
    (checks.attention_heatmap, f"train with --attention-weight 0, or {_VERSIONS}"),
    (checks.greedy_answers, _VERSIONS),
    (checks.raw_answers, "look at the prompt above: the model, perhaps no Instruct model, says nothing at all"),
    (
        checks.training_step,
        "out of memory: --lora 16, --gradient-checkpointing; no compiler: train with --no-compile; a loss that is "
        "not finite, or weights that stand still: --precision fp32",
    ),
    (
        checks.saved_model,
        "lm_head: set tie_word_embeddings in config.json to whether it is the embedding's own matrix; no room: let "
        f"TMPDIR name a disk that holds the model once more; else {_VERSIONS}",
    ),
)


@dataclass(frozen=True)
class VerifyConfig:
    """See whether a model works here: its tokens, forward pass, maps, answers, a training step, a checkpoint."""

    model: str = "tiny"
    """"tiny", a folder, a hub id, or qwen3-vl-2b, -4b, -8b: random weights at the true shapes."""
    data: Path | None = None
    """A data root, of which eight training images are used; None: eight drawn ones."""
    precision: Precision = "auto"
    """Of training; auto: bf16 autocast on a GPU (fp16 on one that has no bf16), fp32 elsewhere."""
    lora: int | None = None
    """Make the training step with adapters of this rank, as `train --lora` does."""
    gradient_checkpointing: bool = False
    """Make the training step in less memory, as `train --gradient-checkpointing` does."""
    json: Path | None = None
    """Write the lines here, and to the same name with .csv."""

    def __post_init__(self):
        need(self, "lora", self.lora is None or self.lora >= 1, "at least 1")
        need_report(self, "lines")


def verify_model(config: VerifyConfig) -> list[dict]:
    """Run all checks on a model, and print a line for each; `fsc147lib verify` calls this.

    Returns:
        Of each check `name`, `passed`, `sentence`, `cure` ("" where it passed), `seconds`.

    Raises:
        ConfigError, DataError, ModelError: there is nothing to check.
    """
    about, tried, rows = machine(), {}, []
    for name, known in TRIED.items():
        tried[name] = any(about[name].startswith(f"{version}.") for version in known)
        print(f"{name} {about[name]}: {'tried' if tried[name] else 'NOT tried; tried were ' + ', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        samples = eight_samples(config.data or make_dataset(Path(folder) / "root", 8, 1, 1))
        subject = checks.Subject(config, samples)
        for check, cure in CHECKS:
            name, started = check.__name__.replace("_", " "), time.perf_counter()
            try:
                outcome = check(subject)
            except Exception as error:  # is what this line has to say; the other lines are wanted all the same
                outcome = False, f"{type(error).__name__}: {error}"
            if outcome is not None:
                row = {"name": name, "passed": outcome[0], "sentence": outcome[1], "cure": "" if outcome[0] else cure}
                rows.append({**row, "seconds": time.perf_counter() - started})
                print("passed" if row["passed"] else "FAILED", f" {name}: {row['sentence']}", flush=True)
                if row["cure"]:
                    print(f"        cure: {cure}", flush=True)
            free_models()
    failed = sum(not row["passed"] for row in rows)
    print(f"{failed} of {len(rows)} failed: begin with the first" if failed else f"all {len(rows)} passed")
    if config.json is not None:
        write_report(config.json, {"tried": tried, "rows": rows}, config)
    return rows


def eight_samples(root: Path) -> list[Sample]:
    """Eight training images (or all, of a root with fewer), the first four of sizes as different as there are."""
    samples = open_split(root, "train", 64)
    of_size = {sample.size: sample for sample in samples}
    by_shape = sorted(of_size.values(), key=lambda sample: sample.size[0] / sample.size[1])
    places = np.linspace(0, len(by_shape) - 1, 4).round().astype(int)
    chosen = {by_shape[place].name: by_shape[place] for place in places}
    return list((chosen | {sample.name: sample for sample in samples}).values())[:8]
