"""The checks of `verify`: what this library computes in ways of its own, held against plain transformers.

Inputs of plain transformers are built without the library's collate.  A check returns whether it passed, and a
sentence; None where there is nothing to check.  Left out: what cures what, and where pictures come from (`verify`).
"""

import tempfile
from functools import cached_property, partial

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

from ..data import GRID, Sample, resample_map
from ..files import DamagedFolder, read_manifest
from ..model import Batch, Collate, choose_compute, make_heatmap, to_device
from ..model.answers import own_answers
from ..model.attention import IMPLEMENTATIONS
from ..model.device import peak_memory, seconds_of
from ..model.load import RANDOM
from ..model.network import compile_layers, freeze_vision, merged_weights, save_memory
from ..model.prompt import IMAGE_TOKEN, answer, chat_text, parse_count, parse_count_leniently
from ..training import DualLoss, TrainConfig
from ..training.step import TrainingStep, make_accelerator, make_optimizer
from .shapes import load_or_shape

full_float32 = partial(torch.backends.cudnn.flags, enabled=False)  # cuDNN's convolutions keep 11 bits of 24


class Subject:
    """A model that is checked by a `VerifyConfig`, and the samples it is given, the first four of different sizes."""

    def __init__(self, config, samples: list[Sample]):
        self.config, self.samples = config, samples
        self.compute = choose_compute(config.precision)
        self.device = self.compute.device
        self.model = load_or_shape(config.model, self.device.type)
        self.network, self.tokenizer = self.model.network.to(self.device).eval(), self.model.tokenizer

    def batch_of(self, samples: list[Sample]) -> Batch:
        return to_device(Collate(self.tokenizer, self.model.image_processor)(samples), self.device)

    @cached_property
    def batch(self) -> Batch:
        """The first four samples, as the library takes them."""
        return self.batch_of(self.samples[:4])

    @cached_property
    def plain(self) -> list[tuple[dict[str, torch.Tensor], int]]:
        """The same as transformers takes them, one by one: inputs with the right answer, and the prompt's length.

        The chat as one string, its image token repeated, and the image processor's own call.
        """
        processor, found = self.model.image_processor, []
        for sample in self.samples[:4]:
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
    """All bytes of a checkpoint, of which a start alone is compared when it is loaded."""
    try:
        manifest = read_manifest(subject.config.model, whole=True)
    except DamagedFolder as error:
        return False, str(error)
    return manifest and (True, f"{len(manifest['files'])} files have the SHA-256 that they were written with")


def special_tokens(subject: Subject):
    tokenizer, config = subject.tokenizer, subject.network.config
    ends = np.atleast_1d(subject.network.generation_config.eos_token_id).tolist()
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    image, start = (tokenizer.encode(x, add_special_tokens=False) for x in (IMAGE_TOKEN, "<|vision_start|>"))
    rows = subject.network.get_input_embeddings().num_embeddings
    passed = image == [config.image_token_id] and start == [config.vision_start_token_id] and end in ends
    return passed and pad not in (None, config.image_token_id) and len(tokenizer) <= rows, (
        f"tokenizer: image {image}, end {end} {tokenizer.eos_token}, pad {pad} {tokenizer.pad_token}, "
        f"{len(tokenizer)} tokens; model: image [{config.image_token_id}], ends {ends}, {rows} rows"
    )


def rendered_prompt(subject: Subject):
    text = chat_text(subject.tokenizer, subject.samples[0].category)
    rows = zip(subject.batch["input_ids"], subject.batch["attention_mask"], subject.plain, strict=True)
    same = [torch.equal(ids[mask > 0], inputs["input_ids"][0]) for ids, mask, (inputs, _) in rows]
    return all(same), f"{text!r}: ids are those of the text encoded in one piece on {sum(same)} of {len(same)} pictures"


def answer_tokens(subject: Subject):
    passed = True
    for count in (1234567890, 37):
        ids = subject.tokenizer.encode(answer(count), add_special_tokens=False)
        tokens, digits = [subject.tokenizer.decode([token]) for token in ids], list(str(count))
        passed &= tokens[-len(digits) :] == digits and "".join(tokens) == answer(count)
    return passed, f"{answer(count)!r} is {tokens}"


def eager_rows(network, layers: tuple[int, ...], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Attention probabilities [L, H, T, T] of one picture, from transformers' eager attention."""
    network.set_attn_implementation("eager")
    try:
        rows = network(**inputs, logits_to_keep=1, output_attentions=True).attentions
    finally:
        network.set_attn_implementation(IMPLEMENTATIONS)
    return torch.stack([rows[i][0] for i in layers])


@full_float32()
@torch.no_grad()
def attention_heatmap(subject: Subject, allowed: float = 1e-3):
    heatmap, merge, errors = make_heatmap(subject.network), subject.model.image_processor.merge_size, []
    for ours, (inputs, start) in zip(heatmap(subject.batch).cpu().numpy(), subject.plain, strict=True):
        eager = eager_rows(subject.network, heatmap.layers, inputs)[:, :, start - 1 : -1]  # [L, H, A, T]
        digits = [subject.tokenizer.decode([token]).isdigit() for token in inputs["input_ids"][0, start:]]
        mass = eager[:, :, digits].mean(dim=(0, 1, 2))[inputs["mm_token_type_ids"][0] == 1].cpu().numpy()
        height, width = (inputs["image_grid_thw"][0, 1:] // merge).tolist()
        expected = resample_map(mass.reshape(height, width), (GRID, GRID)) / mass.sum()
        errors.append(float(np.abs(ours - expected).max() / expected.max()))
    return max(errors) <= allowed, (
        f"largest difference to eager attention {max(errors):.1e} of the map's largest cell, layers {heatmap.layers}; "
        f"{allowed:.0e} is allowed"
    )


@full_float32()
@torch.no_grad()
def greedy_answers(subject: Subject, longest: int = 12):
    how = GenerationConfig(
        max_new_tokens=longest, do_sample=False, repetition_penalty=1.0,
        eos_token_id=subject.tokenizer.eos_token_id, pad_token_id=subject.tokenizer.pad_token_id,
    )  # fmt: skip
    (ours, _), different = own_answers(subject.model, subject.batch, longest=longest), []
    for row, (inputs, start) in zip(ours, subject.plain, strict=True):
        prompts = inputs | {key: inputs[key][:, :start] for key in ("input_ids", "mm_token_type_ids")}
        generated = subject.network.generate(**prompts, generation_config=how)[0, start:].tolist()
        if row != generated:
            different.append(f"{subject.tokenizer.decode(row)!r} is {subject.tokenizer.decode(generated)!r} there")
    return not different, "; ".join(different) or f"{len(ours)} answers as `generate` has them, token by token"


@torch.no_grad()
def raw_answers(subject: Subject, longest: int = 64):
    with subject.compute.autocast():
        rows, _ = own_answers(subject.model, subject.batch_of(subject.samples), longest=longest)
    texts = subject.tokenizer.batch_decode(rows, skip_special_tokens=True)
    end, strict, lenient, lines = subject.tokenizer.eos_token_id, 0, 0, []
    for sample, text, row in zip(subject.samples, texts, rows, strict=True):
        number = parse_count_leniently(text, complete=end in row)
        strict, lenient = strict + (parse_count(text) is not None), lenient + (number is not None)
        lines.append(f"\n        {sample.count} {sample.category}: {text!r:.160}, read leniently as {number}")
    return any(row[0] != end for row in rows), (
        f"{strict} of {len(rows)} parse, {lenient} leniently, in at most {longest} tokens{''.join(lines)}"
    )


def training_step(subject: Subject):
    network, config = subject.network, subject.config
    freeze_vision(network, config.model != RANDOM)
    save_memory(network, config.lora, config.gradient_checkpointing, subject.compute.precision)
    loss, accelerator = DualLoss(network), make_accelerator(subject.compute)
    if subject.device.type == "cuda":
        compile_layers(network, loss.heatmap.layers)
    step = TrainingStep(loss, make_optimizer(network, 1e-5), accelerator, subject.compute)
    before, losses, seconds = _norms(network), [], []
    network.train()

    def run() -> None:
        seconds.append(
            seconds_of(
                lambda: losses.append(step([subject.batch], TrainConfig.attention_weight)[0]), subject.device.type
            )
        )

    run()  # compiles
    peak = peak_memory(run, subject.device.type)
    step.check()  # raises where a loss is not finite
    network.eval()
    moved = sum(norm != before[name] for name, norm in _norms(network).items())
    memory = "unknown" if peak is None else f"{peak / 1024:.1f} GiB"
    return moved == len(before), (
        f"count loss {float(losses[0].count):.3f}, attention loss {float(losses[0].attention):.3f}, both finite; "
        f"{moved} of {len(before)} tensors moved at learning rate 1e-5; peak memory {memory}; "
        f"{seconds[-1]:.2f} s for {len(subject.batch['names'])} pictures, {seconds[0]:.1f} s the first time"
    )


def _norms(network) -> dict[str, float]:
    """Of all tensors that train; any step changes them."""
    trained = {name: weight.detach() for name, weight in network.named_parameters() if weight.requires_grad}
    return {name: float(torch.linalg.vector_norm(x, dtype=torch.float64)) for name, x in trained.items()}


def saved_model(subject: Subject):
    expected = merged_weights(subject.network) or subject.network.state_dict()
    with tempfile.TemporaryDirectory() as parent:
        folder, how = f"{parent}/model", {"dtype": subject.network.dtype, "trust_remote_code": False}
        subject.model.save(folder)
        plain, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **how)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    found, head, first = plain.state_dict(), plain.get_output_embeddings(), plain.get_input_embeddings()
    wrong = expected.keys() ^ found.keys() | {str(name) for names in report.values() for name in names}
    for name in expected.keys() & found.keys():
        if not torch.equal(expected[name].cpu(), found[name].to(expected[name].dtype)):
            wrong.add(name)
    if tokenizer.get_vocab() != subject.tokenizer.get_vocab():
        wrong.add("the tokenizer")
    if plain.config.tie_word_embeddings != (head.weight is first.weight):
        wrong.add("lm_head.weight, tied or not")
    return not wrong, (
        f"of {len(expected)} tensors and the tokenizer, plain transformers reads {len(wrong) or 'none'} otherwise than "
        f"they were written {', '.join(sorted(wrong)[:5])}".rstrip()
    )
