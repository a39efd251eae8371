"""Padded rows, for any model: neither the loss nor the gradients depend on the micro-batches."""

import pytest
import torch
import torch.nn.functional as F

from conftest import FAMILIES, random_rows, tiny_model
from formtune.model.lora import Lora, add_lora
from formtune.model.micro_batches import MicroBatches, choose_micro_batches


def tuned(model, **options):
    """Adapters whose B is not zero, so that all of them matter."""
    model = add_lora(model, Lora(r=4, dropout=0.0, **options)).eval()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def one_by_one(model, rows):
    """Summed loss and its gradients, each row alone through the model's usual forward pass."""
    trained = [p for p in model.parameters() if p.requires_grad]
    attention = model.get_base_model().config._attn_implementation
    model.get_base_model().set_attn_implementation("sdpa")
    total = torch.zeros(())
    for example in rows:
        logits = model(torch.tensor([example.prompt_ids + example.target_ids])).logits[
            0, len(example.prompt_ids) - 1 : -1
        ]
        total = total + F.cross_entropy(logits.float(), torch.tensor(example.target_ids), reduction="sum")
    grads = torch.autograd.grad(total, trained)
    model.get_base_model().set_attn_implementation(attention)
    return float(total.detach()), grads


def in_micro_batches(model, micro_batches, rows, tokens):
    trained = [p for p in model.parameters() if p.requires_grad]
    total, grads = 0.0, [torch.zeros_like(p) for p in trained]
    for group in micro_batches.split(rows, tokens):
        loss = micro_batches.loss(group)
        for whole, part in zip(grads, torch.autograd.grad(loss, trained), strict=True):
            whole += part
        total += float(loss.detach())
    return total, grads


def assert_same(actual, expected):
    assert abs(actual[0] - expected[0]) <= 1e-5 * expected[0]
    for got, want in zip(actual[1], expected[1], strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


def usual(model):
    model.get_base_model().set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("shape", FAMILIES)
def test_padded_rows_have_the_loss_and_gradients_of_one_row_at_a_time(shape):
    model, rows = tuned(tiny_model(shape)), random_rows(1)
    expected = one_by_one(model, rows)
    for tokens in (10**6, 150, 1):
        assert_same(in_micro_batches(model, MicroBatches(usual(model)), rows, tokens), expected)


def test_the_model_is_left_in_the_mode_it_was_in():
    model = add_lora(tiny_model(), Lora(r=4))
    before = [module.training for module in model.modules()]
    choose_micro_batches(model)
    assert [module.training for module in model.modules()] == before and model.training


@pytest.mark.parametrize("shape", ["bloom", "mamba"])
def test_other_architectures_are_trained_in_padded_rows(shape):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "vocab_size": 259, "n_head": 4, "n_layer": 2, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape, **sizes)).eval()
    assert type(choose_micro_batches(model)) is MicroBatches


def test_rows_of_a_model_that_ignores_the_attention_mask_are_computed_alone(monkeypatch):
    model = tuned(tiny_model())
    decoder = type(model.get_base_model().get_decoder())
    forward = decoder.forward

    def without_mask(self, *args, attention_mask=None, position_ids=None, attend=None, **options):
        return forward(self, *args, **options)

    monkeypatch.setattr(decoder, "forward", without_mask)
    with pytest.warns(UserWarning, match="each row is computed alone"):
        micro_batches = choose_micro_batches(model)
    assert [len(part.rows) for part in micro_batches.split(random_rows(1), 10**6)] == [1] * 12
