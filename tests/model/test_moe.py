"""A mixture of experts, of the class of Qwen3-VL-30B-A3B: small, with random weights."""

import pytest
import torch
from plain import generated, plain_inputs, plain_network
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from fsc147lib.model.answers import own_answers
from fsc147lib.model.collate import Collate
from fsc147lib.model.forward import answer_logits
from fsc147lib.model.load import count_parameters, load_model
from fsc147lib.model.network import CountingModel
from fsc147lib.training.losses import DualLoss


@pytest.fixture(scope="module")
def folder(untouched_tiny, tmp_path_factory):
    """The tiny model with 8 experts in each layer, of which each token uses 2."""
    config = untouched_tiny.network.config.to_dict()
    for part in (config, config["text_config"], config["vision_config"]):
        del part["model_type"]
    config["text_config"] |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config))
    folder = tmp_path_factory.mktemp("moe") / "model"
    CountingModel(network, untouched_tiny.tokenizer, untouched_tiny.image_processor).save(folder)
    return folder


@pytest.fixture
def experts(folder):
    return load_model(folder)


@pytest.fixture
def batch(experts, mixed_samples):
    return Collate(experts.tokenizer, experts.image_processor)(mixed_samples)


def test_it_loads_as_what_it_is(folder, experts):
    assert type(experts.network) is Qwen3VLMoeForConditionalGeneration
    assert count_parameters(folder) == sum(weight.numel() for weight in experts.network.parameters())


@pytest.mark.medium
def test_logits_rows_and_gradients_are_plain_transformers(folder, experts, batch):
    plain = plain_network(folder, "eager")
    expected = plain(**plain_inputs(batch), labels=batch["labels"], output_attentions=True)
    logits, rows = answer_logits(experts.network, batch, rows_of=(2,))
    used = batch["answer_labels"] != -100
    for i in range(len(logits)):
        places = batch["answer_positions"][i, used[i]]
        torch.testing.assert_close(logits[i, used[i]], expected.logits[i, places], atol=1e-5, rtol=1e-5)
        wanted = expected.attentions[2][i][:, places]
        torch.testing.assert_close(rows[2][i][:, used[i]], wanted, atol=1e-6, rtol=1e-5)
    expected.loss.backward()
    DualLoss(experts.network)(batch, 0).total.backward()
    for (name, ours), theirs in zip(experts.network.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-2, msg=name)


def test_greedy_answers_are_generate_s(folder, experts, batch):
    said, _ = own_answers(experts, batch, 8)
    assert said == generated(plain_network(folder), batch, experts.tokenizer, 8)
