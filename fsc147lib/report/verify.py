"""`verify`: does a model work on this machine?  Each check compares the library with plain transformers.

A check returns whether it passed, and a sentence.
"""

import tempfile
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

from ..data import GRID, Sample, make_dataset, open_split, resample_map
from ..files import DamagedFolder, read_manifest
from ..model import Batch, Collate, choose_compute, make_heatmap, to_device
from ..model.answers import own_answers
from ..model.attention import IMPLEMENTATIONS
from ..model.device import free_models
from ..model.load import RANDOM
from ..model.network import ADAPTERS, adapter_weights, compile_layers, freeze_vision, save_memory
from ..model.prompt import IMAGE_TOKEN, answer, chat_text
from ..options import Precision, need, need_report
from ..training import DualLoss, TrainConfig
from ..training.memory import peak_memory
from ..training.step import TrainingStep, make_accelerator, make_optimizer
from .shapes import load_or_shape
from .timing import machine, seconds_of, write_report

VERSIONS = "install the versions of requirements.lock: these ones may compute other numbers"


@dataclass(frozen=True)
class VerifyConfig:
    """Check that a model works here: its tokens, prompt, attention, answers, a training step, a checkpoint."""

    model: str = "tiny"
    """"tiny", a folder, a hub id, or qwen3-vl-2b, -4b, -8b: random weights at the true shapes."""
    data: Path | None = None
    """A data root, of which four training images are used; None: four drawn ones."""
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
    """Run all checks on a model and print a line for each; `fsc147lib verify` calls this.

    Returns:
        For each check `name`, `passed`, `sentence`, `cure` ("" if it passed), `seconds`.

    Raises:
        ConfigError, DataError, ModelError: data or model cannot be opened.
    """
    rows: list[dict] = []
    print("torch {torch}, transformers {transformers}".format(**machine()))
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(config, config.data or make_dataset(Path(folder) / "root", 4, 1, 1))
        for check, cure in CHECKS.items():
            name, started = check.__name__.replace("_", " "), time.perf_counter()
            try:
                passed, sentence = check(subject)
            except Exception as error:  # a failed check; the others still run
                passed, sentence = False, f"{type(error).__name__}: {error}"
            row = {"name": name, "passed": passed, "sentence": sentence, "cure": "" if passed else cure}
            rows.append({**row, "seconds": time.perf_counter() - started})
            print("passed" if passed else "FAILED", f" {name}: {sentence}", flush=True)
            if not passed:
                print(f"        cure: {cure}", flush=True)
            free_models()
    failed = sum(not row["passed"] for row in rows)
    print(f"{failed} of {len(rows)} failed: begin with the first" if failed else f"all {len(rows)} passed")
    if config.json is not None:
        write_report(config.json, {"rows": rows}, config)
    return rows


class Subject:
    """A model to check, and four training images of a root, from tall to wide."""

    def __init__(self, config: VerifyConfig, root: Path):
        self.config, self.compute = config, choose_compute(config.precision)
        self.device = self.compute.device
        self.model = load_or_shape(config.model, self.device.type)
        self.network, self.tokenizer = self.model.network.to(self.device).eval(), self.model.tokenizer
        by_shape = sorted(open_split(root, "train", 64), key=lambda sample: sample.size[0] / sample.size[1])
        places = np.unique(np.linspace(0, len(by_shape) - 1, 4).round().astype(int))
        self.samples: list[Sample] = [by_shape[place] for place in places]

    @cached_property
    def batch(self) -> Batch:
        """The images as the library's batch."""
        collate = Collate(self.tokenizer, self.model.image_processor)
        return to_device(collate(self.samples), self.device)

    @cached_property
    def plain(self) -> list[tuple[dict[str, torch.Tensor], int]]:
        """The images as inputs of plain transformers, with the true answer, and the prompt's length in tokens."""
        processor, found = self.model.image_processor, []
        for sample in self.samples:
            images = processor(images=[sample.image], return_tensors="pt")
            visual = int(images["image_grid_thw"].prod()) // processor.merge_size**2
            prompt = chat_text(self.tokenizer, sample.category).replace(IMAGE_TOKEN, IMAGE_TOKEN * visual)
            texts = prompt, prompt + answer(sample.count) + self.tokenizer.eos_token
            start, ids = (self.tokenizer(x, add_special_tokens=False, return_tensors="pt")["input_ids"] for x in texts)
            on_image = ids == self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
            inputs = {"input_ids": ids, "mm_token_type_ids": on_image.int(), **images}
            found.append(({key: value.to(self.device) for key, value in inputs.items()}, start.shape[1]))
        return found


def files_as_written(subject: Subject):
    try:
        manifest = read_manifest(subject.config.model, whole=True)  # loading compares the start of each file alone
    except DamagedFolder as error:
        return False, str(error)
    if manifest is None:
        return True, "the model has no manifest to compare its files with"
    return True, f"{len(manifest['files'])} files have the SHA-256 that they were written with"


def vocabulary(subject: Subject):
    tokenizer, config = subject.tokenizer, subject.network.config
    image, start = (tokenizer.encode(x, add_special_tokens=False) for x in (IMAGE_TOKEN, "<|vision_start|>"))
    end, pad, rows = (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        subject.network.get_input_embeddings().weight.shape[0],
    )
    ends = np.atleast_1d(subject.network.generation_config.eos_token_id).tolist()
    tokens = [tokenizer.decode([token]) for token in tokenizer.encode(answer(37), add_special_tokens=False)]
    digits = tokenizer.encode("1234567890", add_special_tokens=False)
    passed = image == [config.image_token_id] and start == [config.vision_start_token_id] and end in ends
    passed &= pad not in (None, config.image_token_id) and len(tokenizer) <= rows
    passed &= len(set(digits)) == 10 and tokens[-2:] == ["3", "7"]
    return passed, (
        f"tokenizer: image {image}, end {end} {tokenizer.eos_token}, pad {pad} {tokenizer.pad_token}, "
        f"{len(tokenizer)} tokens; model: image [{config.image_token_id}], ends {ends}, {rows} rows; "
        f"{answer(37)!r} is {tokens}"
    )


def rendered_prompt(subject: Subject):
    text = chat_text(subject.tokenizer, subject.samples[0].category)
    rows = zip(subject.batch["input_ids"], subject.batch["attention_mask"], subject.plain, strict=True)
    same = [torch.equal(ids[mask > 0], inputs["input_ids"][0]) for ids, mask, (inputs, _) in rows]
    return all(same), f"{text!r}: {sum(same)} of {len(same)} images have the ids of the whole text, encoded at once"


@torch.backends.cudnn.flags(enabled=False)  # cuDNN's convolutions keep 11 bits of 24
@torch.no_grad()
def attention_heatmap(subject: Subject, allowed: float = 1e-3):
    network, merge, errors = subject.network, subject.model.image_processor.merge_size, []
    heatmap = make_heatmap(network)
    for ours, (inputs, start) in zip(heatmap(subject.batch).cpu().numpy(), subject.plain, strict=True):
        network.set_attn_implementation("eager")
        try:
            attentions = network(**inputs, logits_to_keep=1, output_attentions=True).attentions
        finally:
            network.set_attn_implementation(IMPLEMENTATIONS)
        rows = torch.stack([attentions[layer][0, :, start - 1 : -1] for layer in heatmap.layers])  # [L, H, A, T]
        digits = [subject.tokenizer.decode([token]).isdigit() for token in inputs["input_ids"][0, start:]]
        mass = rows[:, :, digits].mean(dim=(0, 1, 2))[inputs["mm_token_type_ids"][0] == 1].cpu().numpy()
        height, width = (inputs["image_grid_thw"][0, 1:] // merge).tolist()
        expected = resample_map(mass.reshape(height, width), (GRID, GRID)) / mass.sum()
        errors.append(float(np.abs(ours - expected).max() / expected.max()))
    return max(errors) <= allowed, (
        f"largest difference to eager attention {max(errors):.1e} of the map's largest cell, layers {heatmap.layers}; "
        f"{allowed:.0e} is allowed"
    )


@torch.backends.cudnn.flags(enabled=False)
@torch.no_grad()
def greedy_answers(subject: Subject, longest: int = 12):
    tokenizer, lines = subject.tokenizer, []
    how = GenerationConfig(
        max_new_tokens=longest, do_sample=False, repetition_penalty=1.0,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    ours, _ = own_answers(subject.model, subject.batch, longest)
    passed = True
    for sample, row, (inputs, start) in zip(subject.samples, ours, subject.plain, strict=True):
        prompts = inputs | {key: inputs[key][:, :start] for key in ("input_ids", "mm_token_type_ids")}
        generated = subject.network.generate(**prompts, generation_config=how)[0, start:].tolist()
        passed &= row == generated and row[0] != tokenizer.eos_token_id
        other = "" if row == generated else f", but `generate` gives {tokenizer.decode(generated)!r}"
        lines.append(f"\n        {sample.count} {sample.category}: {tokenizer.decode(row)!r}{other}")
    return passed, f"as `generate` has them, token by token, at most {longest} tokens" + "".join(lines)


def training_step(subject: Subject):
    network, config, device = subject.network, subject.config, subject.device.type
    freeze_vision(network, config.model != RANDOM)
    save_memory(network, config.lora, config.gradient_checkpointing, subject.compute.precision)
    loss = DualLoss(network)
    if device == "cuda":
        compile_layers(network, loss.heatmap.layers)
    step = TrainingStep(loss, make_optimizer(network, 1e-5), make_accelerator(subject.compute), subject.compute)
    before, run = norms(network), partial(step, [subject.batch], TrainConfig.attention_weight)
    network.train()
    (_, count, attention), _ = run()  # compiles
    peak, seconds = peak_memory(run, device), seconds_of(run, device)
    step.check()  # raises where a loss is not finite
    network.eval()
    moved = sum(norm != before[name] for name, norm in norms(network).items())
    memory = "unknown" if peak is None else f"{peak / 1024:.1f} GiB"
    return moved == len(before), (
        f"count loss {float(count):.3f}, attention loss {float(attention):.3f}, both finite; {moved} of {len(before)} "
        f"tensors moved at learning rate 1e-5; peak memory {memory}; {seconds:.2f} s for {len(subject.samples)} images"
    )


def norms(network) -> dict[str, float]:
    """Norm of each tensor that trains."""
    trained = {name: weight.detach() for name, weight in network.named_parameters() if weight.requires_grad}
    return {name: float(torch.linalg.vector_norm(x, dtype=torch.float64)) for name, x in trained.items()}


def saved_model(subject: Subject):
    adapters = adapter_weights(subject.network)
    expected = adapters or subject.network.state_dict()
    with tempfile.TemporaryDirectory() as parent:
        folder, how = f"{parent}/model", {"dtype": subject.network.dtype, "trust_remote_code": False}
        subject.model.save(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if adapters:
            found, wrong = load_file(f"{folder}/{ADAPTERS}"), set()
        else:
            plain, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **how)
            found, wrong = plain.state_dict(), {str(name) for names in report.values() for name in names}
            tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
            if plain.config.tie_word_embeddings != tied:  # transformers only warns of another matrix than it says
                wrong.add("lm_head.weight, tied or not")
    wrong |= expected.keys() ^ found.keys()
    for name in expected.keys() & found.keys():
        if not torch.equal(expected[name].cpu(), found[name].to(expected[name].dtype)):
            wrong.add(name)
    if tokenizer.get_vocab() != subject.tokenizer.get_vocab():
        wrong.add("the tokenizer")
    told = f"differ: {', '.join(sorted(wrong)[:5])}" if wrong else "differ"
    return (
        not wrong,
        f"{len(wrong) or 'none'} of {len(expected)} tensors and the tokenizer, read from the disk, {told}",
    )


CHECKS = {  # in their order, each with its cure
    files_as_written: "copy the folder anew, or go on from another checkpoint: its bytes have changed on disk",
    vocabulary: "take all files of a Qwen3-VL's folder: tokenizer and weights must belong together, a digit be a token",
    rendered_prompt: "take the tokenizer and the chat template that lie beside a Qwen3-VL's weights",
    attention_heatmap: f"train with --attention-weight 0, or {VERSIONS}",
    greedy_answers: f"take an Instruct model if the answers are empty; otherwise {VERSIONS}",
    training_step: (
        "out of memory: --lora 16, --gradient-checkpointing; no compiler: train with --no-compile; a loss that is "
        "not finite, or weights that stand still: --precision fp32"
    ),
    saved_model: (
        "lm_head: set tie_word_embeddings in config.json to whether it is the embedding's own matrix; no room: let "
        f"TMPDIR name a disk that holds the model once more; otherwise {VERSIONS}"
    ),
}
