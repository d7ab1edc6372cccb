"""The tiny model is a whole Qwen3-VL, batches are what transformers itself would compute, and errors help."""

import json
import shutil

import pytest
import torch
from plain import plain_inputs, plain_network
from transformers import Qwen3VLForConditionalGeneration

from fsc147lib.model.collate import Collate, to_device
from fsc147lib.model.forward import answer_logits, read_prompts
from fsc147lib.model.load import count_parameters, load_model
from fsc147lib.model.network import ModelError, freeze_vision
from fsc147lib.model.prompt import answer, question


def test_tiny_leaves_nothing_out(tiny):
    config = tiny.network.config
    assert type(tiny.network) is Qwen3VLForConditionalGeneration
    assert config.text_config.rope_parameters["mrope_interleaved"] is True
    assert (
        len(tiny.network.model.visual.deepstack_merger_list) == len(config.vision_config.deepstack_visual_indexes) > 0
    )
    assert config.vision_config.spatial_merge_size == 2
    assert tiny.network.lm_head.weight is tiny.network.model.language_model.embed_tokens.weight
    assert config.text_config.num_key_value_heads < config.text_config.num_attention_heads


@pytest.mark.medium
@pytest.mark.parametrize("name", ["tiny", "tiny-random"])
def test_parameters_are_counted_without_loading_them(name):
    assert count_parameters(name) == sum(weight.numel() for weight in load_model(name).network.parameters())


@pytest.mark.medium
def test_tiny_weights_depend_on_the_seed_alone():
    torch.manual_seed(3)
    a = load_model("tiny-random", seed=1).network.state_dict()
    torch.manual_seed(4)
    b, c = load_model("tiny-random", seed=1).network.state_dict(), load_model("tiny", seed=2).network.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


@torch.no_grad()
def test_positions_and_logits_are_transformers_own(tiny, plain, batch):
    """transformers gets ids, mask and pixels alone, and walks the images itself."""
    positions, _ = plain.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )
    assert torch.equal(positions, batch["position_ids"])
    expected = plain(**plain_inputs(batch)).logits
    got, _ = answer_logits(tiny.network, batch)
    used = batch["answer_labels"] != -100
    for i in range(len(got)):
        torch.testing.assert_close(
            got[i, used[i]], expected[i, batch["answer_positions"][i, used[i]]], atol=1e-5, rtol=1e-5
        )


def test_ids_are_the_chat_template_with_the_image_spelled_out(tiny, mixed_samples, batch):
    for i, sample in enumerate(mixed_samples):
        content = [{"type": "image"}, {"type": "text", "text": question(sample.category)}]
        text = tiny.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        visual = int(batch["image_grid_thw"][i].prod()) // 4
        text = text.replace("<|image_pad|>", "<|image_pad|>" * visual) + answer(sample.count) + "<|im_end|>"
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        assert tiny.tokenizer.decode(ids) == text


def test_labels_are_the_answer_alone(tiny, mixed_samples, batch):
    for i, sample in enumerate(mixed_samples):
        labels = batch["labels"][i]
        assert tiny.tokenizer.decode(labels[labels != -100]) == answer(sample.count) + "<|im_end|>"
        place = (labels != -100).nonzero()[:, 0]
        assert torch.equal(batch["input_ids"][i, place], labels[place])
        used = batch["answer_labels"][i] != -100
        assert torch.equal(batch["answer_positions"][i, used] + 1, place)
        on_digits = batch["digit_weights"][i] > 0
        assert tiny.tokenizer.decode(batch["answer_labels"][i, on_digits]) == str(sample.count)
        assert batch["digit_weights"][i].sum() == pytest.approx(1)


def test_saved_folder_is_plain_transformers(tiny, batch, tmp_path):
    torch.nn.init.normal_(tiny.network.lm_head.weight, std=0.1)  # not what a seed could give again
    tiny.save(tmp_path / "model")
    network, inputs = plain_network(tmp_path / "model"), plain_inputs(batch)
    with torch.no_grad():
        torch.testing.assert_close(network(**inputs).logits, tiny.network(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert not list((tmp_path / "model").glob("*.bin")) and (tmp_path / "model" / "model.safetensors").is_file()


def test_saved_folder_loads_as_it_was(tiny, mixed_samples, tmp_path):
    tiny.save(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert type(again) is type(tiny)
    first, second = (Collate(m.tokenizer, m.image_processor)(mixed_samples) for m in (tiny, again))
    for key, value in first.items():
        assert torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
    assert all(torch.equal(a, b) for a, b in zip(tiny.network.parameters(), again.network.parameters(), strict=True))


@pytest.mark.medium
def test_a_chat_template_kept_with_the_processor_is_found(tiny, tmp_path):
    tiny.save(tmp_path / "model")
    template = (tmp_path / "model" / "chat_template.jinja").read_text()
    (tmp_path / "model" / "chat_template.jinja").unlink()
    (tmp_path / "model" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_model(tmp_path / "model").tokenizer.chat_template == template


def test_frozen_vision_has_no_gradient(tiny, batch):
    freeze_vision(tiny.network, True)
    answer_logits(tiny.network, batch)[0].sum().backward()
    assert all(p.grad is None for p in tiny.network.model.visual.parameters())
    assert tiny.network.model.language_model.layers[0].mlp.up_proj.weight.grad is not None
    freeze_vision(tiny.network, False)
    answer_logits(tiny.network, batch)[0].sum().backward()
    assert all(p.grad is not None for p in tiny.network.model.visual.parameters())


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (None, "no model folder.*give 'tiny', an existing folder, or a hub id"),
        ({}, "has no config.json"),
        ({"config.json": "{}", "best/config.json": "{}"}, "folder of a run: give one of its checkpoints, .*/best"),
        (
            {"config.json": '{"model_type": "bert"}'},
            r"'bert' model.*Qwen3-VL \(model_type 'qwen3_vl' or 'qwen3_vl_moe'\)",
        ),
    ],
)
@pytest.mark.parametrize("use", [load_model, count_parameters])
def test_a_folder_that_holds_no_such_model_is_refused(tmp_path, files, sentence, use):
    for name, content in (files or {}).items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(content)
    if files == {}:
        (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match=sentence):
        use(tmp_path / "model")


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "Nobody").mkdir()  # a folder of that name must not make a path of a hub id
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="(?s)no folder Nobody/No-Model.*hub does not answer.*no network.*tiny"):
        load_model("Nobody/No-Model")


def test_a_gpu_without_room_is_no_damaged_folder(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Qwen3VLForConditionalGeneration, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_model("tiny")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_are_read_to_the_gpu(tiny):
    there = load_model("tiny", device="cuda").network.state_dict()
    assert all(
        there[name].is_cuda and torch.equal(there[name].cpu(), w) for name, w in tiny.network.state_dict().items()
    )


def test_a_failed_save_keeps_the_old_folder(tiny, tmp_path, monkeypatch):
    tiny.save(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(tiny.tokenizer, "save_pretrained", fail)
    torch.nn.init.zeros_(tiny.network.lm_head.weight)
    with pytest.raises(OSError, match="disk full"):
        tiny.save(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    shutil.rmtree(tmp_path / "model")


def test_a_batch_padded_on_the_left_is_refused(tiny, mixed_samples):
    batch = Collate(tiny.tokenizer, tiny.image_processor)(mixed_samples)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        batch[name] = batch[name].flip(1)
    network = tiny.network
    for use in (
        lambda: answer_logits(network, batch),
        lambda: read_prompts(network, batch),
        lambda: to_device(batch, "cpu"),
    ):
        with pytest.raises(ValueError, match="padded on the left: pad on the right"):
            use()
