"""LoRA lands where it should on every family, and the loss does not depend on how rows are batched."""

import pytest
import torch

from conftest import SHAPES, tiny_model
from formtune.errors import UserError
from formtune.model.generation import greedy
from formtune.model.lora import Lora, add_lora, load_base, target_names
from formtune.model.loss import passes, target_loss
from formtune.rendering import Row

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


def rows(count=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        p, t = int(torch.randint(3, 20, (), generator=g)), int(torch.randint(2, 9, (), generator=g))
        prompt, target = torch.randint(3, 259, (p,), generator=g), torch.randint(3, 259, (t,), generator=g)
        made.append(Row(prompt.tolist(), target.tolist(), [False] * t, "", "", f"f:{i}"))
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_targets_are_all_projections_of_attention_and_nothing_else(shape):
    model = tiny_model(shape)
    assert target_names(model, "attention") == ATTENTION[shape]
    tuned = add_lora(model, Lora(r=4))
    touched = {name for name, module in tuned.named_modules() if hasattr(module, "lora_A")}
    assert touched and all("attn" in name or "attention" in name for name in touched)
    assert len(touched) == 2 * len(ATTENTION[shape])


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_of_a_padded_batch_equals_one_row_at_a_time(shape):
    model = add_lora(tiny_model(shape), Lora(r=4, dropout=0.0)).eval()
    batch = rows()
    together = target_loss(model, batch, CPU)
    assert together.mask.sum(1).tolist() == [len(r.target) for r in batch]
    for i, row in enumerate(batch):
        ids = torch.tensor([row.prompt + row.target])
        logits = model(ids).logits[0, len(row.prompt) - 1 : -1]
        alone = torch.nn.functional.cross_entropy(logits, torch.tensor(row.target), reduction="sum")
        torch.testing.assert_close(together.nats[i].sum(), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_batched_greedy_answers_equal_single_ones_and_a_naive_loop(shape):
    model = tiny_model(shape).eval()
    prompts = [r.prompt for r in rows(4)]
    stop = [7]
    batched = greedy(model, prompts, stop, 12, CPU)
    for prompt, got in zip(prompts, batched, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and (ids == prompt or ids[-1] not in stop):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert got == ids[len(prompt) :] == greedy(model, [prompt], stop, 12, CPU)[0]


def test_greedy_ignores_sampling_and_penalties_that_a_base_ships(tmp_path):
    model = tiny_model()
    plain = greedy(model.eval(), [[5, 6, 7]], [2], 10, CPU)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, min_new_tokens=9)
    model.save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path), torch.float32, None, CPU).eval()
    assert greedy(loaded, [[5, 6, 7]], [2], 10, CPU) == plain


def test_dropout_is_on_in_training():
    model = add_lora(tiny_model(), Lora(dropout=0.5))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    assert not torch.equal(target_loss(model, rows(), CPU).nats, target_loss(model, rows(), CPU).nats)


def test_passes_cover_every_row_once_within_the_budget():
    batch = rows(40)
    groups = list(passes(batch, 60))
    assert sorted(i for g in groups for i in g) == list(range(40)) and len(groups) > 5
    for group in groups:
        area = len(group) * (max(len(batch[i].prompt) for i in group) + max(len(batch[i].target) for i in group))
        assert area <= 60 or len(group) == 1


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(targets=["q_proj", "nope"]), "no layer is called 'nope'; the linear ones are down_proj"),
        (Lora(targets=[]), "the list is empty"),
        (Lora(modules_to_save=["nope"]), "modules_to_save: no layer is called 'nope'"),
    ],
)
def test_a_target_that_names_no_layer_is_refused(lora, message):
    with pytest.raises(UserError, match=message):
        add_lora(tiny_model(), lora)


@pytest.mark.parametrize(
    "lora", [Lora(rslora=True), Lora(dora=True), Lora(initialization="pissa"), Lora(modules_to_save=["lm_head"])]
)
def test_lora_options_reach_peft(lora):
    config = add_lora(tiny_model(tie_word_embeddings=False), lora).peft_config["default"]
    assert (config.use_rslora, config.use_dora) == (lora.rslora, lora.dora)
    assert config.init_lora_weights == lora.initialization and config.lora_alpha == 32
    assert (config.modules_to_save or []) == lora.modules_to_save


def test_layers_trained_in_full_are_kept_in_32_bits_and_shared_embeddings_are_not_torn_apart():
    model = add_lora(tiny_model(tie_word_embeddings=False).bfloat16(), Lora(modules_to_save=["lm_head"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with pytest.raises(UserError, match="shares its embeddings"):
        add_lora(tiny_model(tie_word_embeddings=True), Lora(modules_to_save=["lm_head"]))


def test_an_incomplete_base_is_refused_instead_of_filled_with_random_numbers(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.norm.weight")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match="incomplete .*model.norm.weight"):
        load_base(str(tmp_path), torch.float32, None, CPU)


def test_a_pickled_base_is_never_read(tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(str(tmp_path), torch.float32, None, CPU)
