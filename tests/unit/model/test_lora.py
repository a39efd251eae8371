"""LoRA lands where it should on every family, and computes what PEFT's own layers compute."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from conftest import SHAPES, tiny_model
from formtune.errors import UserError
from formtune.model.lora import (
    Lora,
    LoraLinear,
    add_lora,
    decoder_layers,
    load_base,
    raise_recompile_limit,
    target_names,
)

CPU = torch.device("cpu")
ATTENTION = {
    "llama": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "qwen3": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "mistral": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "phi3": ["o_proj", "qkv_proj"],
    "gemma3_text": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "gpt2": ["attn.c_proj", "c_attn"],
    "gpt_neox": ["dense", "query_key_value"],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_targets_are_all_projections_of_attention_and_nothing_else(shape):
    model = tiny_model(shape)
    assert target_names(model, "attention") == ATTENTION[shape]
    tuned = add_lora(model, Lora(r=4))
    touched = {name for name, module in tuned.named_modules() if hasattr(module, "lora_A")}
    assert touched and all("attn" in name or "attention" in name for name in touched)
    assert len(touched) == 2 * len(ATTENTION[shape])


@pytest.mark.parametrize("targets", ["attention", "all-linear", ["k_proj", "down_proj"]])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_adapters_that_share_their_input_compute_and_learn_what_those_of_peft_do(targets, precision, monkeypatch):
    monkeypatch.setattr("peft.LoraConfig._register_custom_module", lambda *_: None)
    plain = add_lora(tiny_model(), Lora(r=4, dropout=0.0, targets=targets))
    monkeypatch.undo()
    model = add_lora(tiny_model(), Lora(r=4, dropout=0.0, targets=targets))
    assert not any(isinstance(m, LoraLinear) for m in plain.modules())
    assert any(isinstance(m, LoraLinear) for m in model.modules())
    for name, p in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    model.load_state_dict(plain.state_dict())  # the same names
    ids = torch.randint(0, 259, (2, 17))
    results = []
    for network in (plain, model):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = network(ids, labels=ids).loss
        loss.backward()
        results.append([loss, *(p.grad for p in network.parameters() if p.requires_grad)])
    exact = precision == torch.float32
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= (1e-5 if exact else 0.05) * want.norm() + (0 if exact else 1e-3)


def test_dropout_drops_its_share_scales_up_the_rest_and_is_off_in_evaluation():
    torch.manual_seed(0)
    model = add_lora(tiny_model(), Lora(r=4, dropout=0.05))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A["default"].weight.copy_(torch.eye(4, 32))
        layer.lora_B["default"].weight.copy_(torch.eye(32, 4))
    x = torch.ones(20_000, 32)
    out = layer.train()(x)[:, :4] / layer.scaling["default"]
    remaining = out[out != 0]
    assert abs(1 - remaining.numel() / out.numel() - 0.05) < 0.004  # five standard deviations
    torch.testing.assert_close(remaining, torch.full_like(remaining, 1 / 0.95), rtol=1e-4, atol=0)
    assert (layer.eval()(x)[:, :4] == layer.scaling["default"]).all()


def test_dropping_everything_leaves_the_base_alone():
    layer = add_lora(tiny_model(), Lora(r=4, dropout=1.0)).get_base_model().model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_query_key_and_value_drop_the_same_elements_and_each_step_others():
    torch.manual_seed(0)
    attention = add_lora(tiny_model(), Lora(r=4, dropout=0.5)).get_base_model().model.layers[0].self_attn
    x = torch.randn(3, 32)
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    with torch.no_grad():
        for layer in layers:
            layer.lora_A["default"].weight.copy_(layers[0].lora_A["default"].weight)
    first = [layer.shared.down(layer.index, x) for layer in layers]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    assert not torch.equal(first[0], layers[0].shared.down(0, x))


def test_a_layer_with_another_input_is_computed_on_its_own():
    attention = add_lora(tiny_model(), Lora(r=4, dropout=0.0)).get_base_model().model.layers[0].self_attn
    q, k = attention.q_proj, attention.k_proj
    for _ in range(2):
        x, y = torch.randn(3, 32), torch.randn(3, 32)
        torch.testing.assert_close(q.shared.down(q.index, x), x @ q.lora_A["default"].weight.T)
        torch.testing.assert_close(k.shared.down(k.index, y), y @ k.lora_A["default"].weight.T)
    assert q.shared.sharing == [q.index]


def test_a_frozen_bases_own_dropout_is_off(tmp_path):
    tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).save_pretrained(tmp_path / "gpt2")
    tiny_model("llama", attention_dropout=0.5).save_pretrained(tmp_path / "llama")
    for shape in ("gpt2", "llama"):
        model = load_base(str(tmp_path / shape), torch.float32, None, CPU).train()
        ids = torch.randint(0, 259, (1, 9))
        assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(targets=["q_proj", "nope"]), "no layer is called 'nope'; the linear ones are down_proj"),
        (Lora(targets=[]), "the list is empty"),
    ],
)
def test_a_target_that_names_no_layer_is_refused(lora, message):
    with pytest.raises(UserError, match=message):
        add_lora(tiny_model(), lora)


@pytest.mark.parametrize("lora", [Lora(rslora=True), Lora(dora=True)])
def test_lora_options_reach_peft(lora):
    config = add_lora(tiny_model(), lora).peft_config["default"]
    assert (config.use_rslora, config.use_dora) == (lora.rslora, lora.dora)
    assert config.lora_alpha == 32


@pytest.mark.slow
def test_compiled_code_serves_all_layers():
    def kernels(layers):
        torch._dynamo.reset()
        counter, model = CompileCounter(), add_lora(tiny_model(num_hidden_layers=layers), Lora(r=4))
        for layer in decoder_layers(model):
            layer.compile(dynamic=True, backend=counter)
        for _ in range(3):
            model(torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits.sum().backward()
        return counter.frame_count

    raise_recompile_limit()
    assert kernels(4) == kernels(9)
