"""Qwen's real vocabulary over a small network: ids, prompt, labels, answers, and plain transformers on the same."""

from dataclasses import replace

import pytest
import torch
from plain import plain_network
from teaching import teach
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fsc147lib.evaluation.answering import evaluate_samples
from fsc147lib.evaluation.metrics import parse_count_leniently
from fsc147lib.model.collate import Collate
from fsc147lib.model.forward import answer_logits
from fsc147lib.model.prompt import parse_count, question, tokenize

pytestmark = pytest.mark.slow  # half a minute to write the vocabulary

CATEGORIES = [
    "apples",
    "hot air balloons",
    "crème brûlée",
    "cre\u0301me",
    "sea-shells №5",
    "苹果",
    "яблоки",
    "سيب",
    "🍎",
]


@pytest.fixture(scope="module")
def parts(qwen_folder):
    """Tokenizer and image processor."""
    return tuple(kind.from_pretrained(qwen_folder) for kind in (AutoTokenizer, Qwen2VLImageProcessorPil))


@pytest.fixture(scope="module")
def tokenizer(parts):
    return parts[0]


def as_one_string(tokenizer, processor, sample, answer=""):
    """The inputs of plain transformers: the chat as text, its image token repeated, encoded in one piece."""
    content = [{"type": "image"}, {"type": "text", "text": question(sample.category)}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    images = processor(images=[sample.image], return_tensors="pt")
    tokens = int(images["image_grid_thw"].prod()) // processor.merge_size**2
    text = text.replace("<|image_pad|>", "<|image_pad|>" * tokens) + answer
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "mm_token_type_ids": (ids == 151655).int(), **images}


@pytest.mark.parametrize("category", CATEGORIES)
def test_ids_are_those_of_the_whole_chat_encoded_at_once(parts, mixed_samples, category):
    sample = replace(mixed_samples[0], category=category)
    expected = as_one_string(*parts, sample, f"COUNT: {sample.count}<|im_end|>")["input_ids"]
    made = Collate(*parts)([sample])
    assert made["input_ids"].tolist() == expected.tolist()


def test_special_tokens_have_their_real_ids(tokenizer):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<think>"]
    assert tokenizer.convert_tokens_to_ids(names) == [151643, 151644, 151645, 151652, 151655, 151667]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (151643, 151645)


@pytest.mark.parametrize("count", [0, 7, 37, 3701])
def test_labels_and_digit_weights(parts, mixed_samples, count):
    sample = replace(mixed_samples[0], points=mixed_samples[0].points[:1].repeat(count, axis=0))
    made = Collate(*parts)([sample])
    digits = list(str(count))
    spelled = [parts[0].decode([token]) for token in made["answer_labels"][0]]
    assert spelled == ["COUNT", ":", " ", *digits, "<|im_end|>"]
    weights = [0, 0, 0, *[1 / len(digits)] * len(digits), 0]
    assert made["digit_weights"][0].tolist() == pytest.approx(weights)
    at = made["answer_positions"][0] + 1
    assert made["input_ids"][0, at].tolist() == made["labels"][0, at].tolist() == made["answer_labels"][0].tolist()
    assert (made["labels"] >= 0).sum() == len(spelled)


@pytest.mark.parametrize("category", ["<think>", "a <tool_call> b", "</think>", "<|im_end|>", "<|image_pad|>"])
def test_a_category_cannot_smuggle_in_a_control_token(tokenizer, category):
    with pytest.raises(ValueError, match="control token"):
        tokenize(tokenizer, category, 3)


@torch.no_grad()
def test_logits_are_plain_transformers(qwen_folder, parts, qwen, mixed_samples):
    plain = plain_network(qwen_folder)
    logits, _ = answer_logits(qwen.network, Collate(qwen.tokenizer, qwen.image_processor)(mixed_samples))
    for sample, ours in zip(mixed_samples, logits, strict=True):
        answer = f"COUNT: {sample.count}<|im_end|>"
        length = len(str(sample.count)) + 4
        expected = plain(**as_one_string(*parts, sample, answer)).logits[0, -length - 1 : -1]
        torch.testing.assert_close(ours[:length], expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_answers_are_generated_ones_and_parse(parts, qwen, mixed_samples, tmp_path):
    qwen.network.lm_head.weight.requires_grad_(False)  # the vocabulary's matrix, most of the time of a step
    with torch.enable_grad():
        teach(qwen, mixed_samples, 40)
    images = evaluate_samples(qwen, mixed_samples).images
    qwen.save(tmp_path / "taught")
    plain = plain_network(tmp_path / "taught")
    for sample, image in zip(mixed_samples, images, strict=True):
        inputs = as_one_string(*parts, sample)
        said = plain.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert image.answer == qwen.tokenizer.decode(said, skip_special_tokens=True)
    assert [image.predicted for image in images] == [sample.count for sample in mixed_samples]


@pytest.mark.parametrize(
    ("said", "strict", "lenient"),
    [("COUNT: 37", 37, 37), ("There are 37 apples.", None, 37), ("COUNT: 37.", None, 37),
     ("<think>\nTwo rows of 5, so 10?\n</think>\n\nCOUNT: 37", None, 37), ("<think>\nTwo rows of 5", None, None)],
)  # fmt: skip
def test_what_is_said_comes_back_as_text(tokenizer, said, strict, lenient):
    """Thinking is no special token: it stays in the text, and only the lenient parse knows what to do with it."""
    ids = tokenizer.encode(said, add_special_tokens=False) + [tokenizer.eos_token_id] * 2
    text = tokenizer.batch_decode([ids], skip_special_tokens=True)[0]
    assert text == said and (parse_count(text), parse_count_leniently(text)) == (strict, lenient)
