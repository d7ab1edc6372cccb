"""`verify` passes on a sound model, and a planted fault fails the line that it belongs to."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken
from transformers.models.qwen3_vl import modeling_qwen3_vl

from fsc147lib.__main__ import main
from fsc147lib.files import write_manifest
from fsc147lib.model import answers
from fsc147lib.report import verify
from fsc147lib.report.verify import VerifyConfig, verify_model

pytestmark = pytest.mark.medium


def failed(model, monkeypatch, root, **options):
    """The names of the lines that fail for a model; all others pass."""
    monkeypatch.setattr(verify, "load_or_shape", lambda name, device: model)
    return [row["name"] for row in verify_model(VerifyConfig(data=root, **options)) if not row["passed"]]


def test_all_lines_pass_on_tiny(tmp_path, capsys):
    """On drawn pictures; the lines are printed and recorded."""
    assert main(["verify", "--json", str(tmp_path / "verify.json")]) == 0
    printed = capsys.readouterr().out
    assert "all 7 passed" in printed and "FAILED" not in printed and f"torch {torch.__version__}" in printed
    for shown in ("['COUNT', ':', ' ', '3', '7']", "<|vision_start|><|image_pad|><|vision_end|>How many", "GiB"):
        assert shown in printed
    recorded = json.loads((tmp_path / "verify.json").read_text())
    assert [row["passed"] for row in recorded["rows"]] == [True] * 7


@pytest.mark.slow
def test_all_lines_pass_over_qwen_s_vocabulary(qwen_folder, root, capsys):
    assert main(["verify", "--model", str(qwen_folder), "--data", str(root)]) == 0
    assert "end 151645 <|im_end|>, pad 151643 <|endoftext|>, 151669 tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_training_in_bfloat16_with_adapters(tiny, monkeypatch, root):
    """The narrow weights, adapters added in, are read as they were written."""
    assert not failed(tiny, monkeypatch, root, precision="bf16", lora=4, gradient_checkpointing=True)


def test_a_wrong_image_token(tiny, monkeypatch, root, capsys):
    tiny.network.config.image_token_id += 1
    monkeypatch.setattr(verify, "load_or_shape", lambda name, device: tiny)
    assert main(["verify", "--data", str(root)]) == 1
    printed = capsys.readouterr().out
    assert printed.split("FAILED")[1].startswith("  vocabulary: tokenizer: image [5]")
    assert "model: image [6]" in printed and "cure: take all files" in printed


@pytest.mark.slow
def test_digits_that_are_no_single_tokens(tiny, monkeypatch, root, capsys):
    tiny.tokenizer.add_tokens([AddedToken("37", special=False)])
    tiny.network.resize_token_embeddings(len(tiny.tokenizer))
    assert failed(tiny, monkeypatch, root) == ["vocabulary"]
    assert "is ['COUNT', ':', ' ', '37']" in capsys.readouterr().out


@pytest.mark.slow
def test_an_eager_mask_that_is_off_by_one(tiny, monkeypatch, root):
    """Each query sees its next token too."""
    plain = modeling_qwen3_vl.eager_attention_forward

    def shifted(module, query, key, value, attention_mask, **kwargs):
        mask = torch.cat([attention_mask[..., 1:, :], torch.zeros_like(attention_mask[..., :1, :])], dim=2)
        return plain(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(modeling_qwen3_vl, "eager_attention_forward", shifted)
    assert failed(tiny, monkeypatch, root) == ["attention heatmap"]


@pytest.mark.slow
def test_a_head_that_is_not_tied_as_the_config_says(tiny, monkeypatch, root, capsys):
    tiny.network.lm_head.weight = torch.nn.Parameter(tiny.network.lm_head.weight.detach() * 1.5)
    assert failed(tiny, monkeypatch, root) == ["saved model"]
    assert "differ: lm_head.weight" in capsys.readouterr().out


@pytest.mark.slow
def test_answers_that_begin_at_another_place(tiny, monkeypatch, root):
    read = answers.read_prompts

    def shifted(network, batch):
        prompts = read(network, batch)
        return replace(prompts, last_position=prompts.last_position + 40)

    monkeypatch.setattr(answers, "read_prompts", shifted)
    assert failed(tiny, monkeypatch, root) == ["greedy answers"]


@pytest.mark.slow
def test_a_flipped_byte_of_the_weights(tiny, tmp_path, root, capsys):
    """Loading looks at the start of a large file alone, and safetensors sees no flipped byte."""
    tiny.save(tmp_path / "model")
    write_manifest(tmp_path / "model")  # as a checkpoint of `train` has
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weights.stat().st_size > 2**20
    assert main(["verify", "--model", str(tmp_path / "model"), "--data", str(root)]) == 1
    assert "FAILED  files as written" in capsys.readouterr().out
