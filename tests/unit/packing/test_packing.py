"""Rows that share a prefix are computed together, and neither the loss nor the gradients change."""

import functools
import warnings
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_micro_batches import assert_same, in_micro_batches, one_by_one, tuned

from conftest import FAMILIES, SHAPES, pair, random_rows, row, shared, tiny_model
from formtune.base.renderer import Renderer
from formtune.model.micro_batches import MicroBatches, choose_micro_batches
from formtune.packing import attention, packed, shared_prefixes
from formtune.packing.attention import PackedAttention, _block_mask
from formtune.packing.packed import pack
from formtune.packing.shared_prefixes import SharedPrefixes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", FAMILIES)
def test_loss_and_gradients_equal_those_of_one_row_at_a_time(shape, seed):
    model, rows = tuned(tiny_model(shape)), random_rows(seed)
    micro_batches = choose_micro_batches(model)
    assert isinstance(micro_batches, SharedPrefixes)
    expected = one_by_one(model, rows)
    for tokens in (10**6, 150, 1):
        assert_same(in_micro_batches(model, micro_batches, rows, tokens), expected)


TOKENIZERS = ["qwen3", "mistral-v3-instruct", "phi-3-mini-instruct", "smollm2-instruct", "gpt2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_tokenizers_and_templates_share_their_system_prompts(name):
    renderer = Renderer.load(str(shared(f"tokenizers/{name}")))
    systems = ["Answer with one JSON object. Keys: n (integer), s (string). " * k for k in (3, 5)]
    talks = [
        [
            {"role": "system", "content": systems[n % 2]},
            {"role": "user", "content": pair(n)["prompt"]},
            {"role": "assistant", "content": pair(n)["completion"]},
        ]
        for n in range(6)
    ]
    rows = list(renderer.encode([(messages, "f:1") for messages in talks]))
    model = tuned(tiny_model(vocab_size=len(renderer.tokenizer)))
    [packed] = pack(rows, 10**6)
    assert packed.ids.numel() < sum(map(len, rows)) / 1.5
    assert_same(in_micro_batches(model, choose_micro_batches(model), rows, 10**6), one_by_one(model, rows))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.lists(st.integers(3, 5), max_size=4)),
        max_size=12,
    ),
    st.integers(1, 60),
)
def test_packing_holds_every_row_once_and_each_token_sees_its_own_row(rows, tokens):
    rows = [row(*r) for r in rows]
    groups = list(pack(rows, tokens))
    assert sorted(i for group in groups for i in group.rows) == list(range(len(rows)))
    for group in groups:
        assert group.ids.size(1) <= tokens or len(group.rows) == 1
        stops, at = group.stops(), torch.arange(group.ids.size(1))
        sees = (at[None] <= at[:, None]) & (at[:, None] < stops[None])
        predicting = iter(group.predicting.split(group.sizes))
        targets = iter(group.targets.split(group.sizes))
        for i, path in zip(group.rows, group.paths(), strict=True):
            own = torch.cat([torch.arange(s.start, s.end) for s in path])
            fed = (rows[i].prompt_ids + rows[i].target_ids)[: max(len(rows[i]) - 1, len(rows[i].prompt_ids))]
            assert group.ids[0, own].tolist() == fed
            assert group.positions[0, own].tolist() == list(range(len(fed)))
            assert sees[own[-1]].nonzero().flatten().tolist() == own.tolist()
            assert next(predicting).tolist() == own[len(rows[i].prompt_ids) - 1 :].tolist()
            assert next(targets).tolist() == (rows[i].target_ids or [-1])


def test_no_gain_means_no_sharing():
    rows = [row([1, *range(10 * n, 10 * n + 30)], [5] * 20) for n in range(1, 9)]
    [packed] = pack(rows, 10**6)
    assert packed.ids.size(1) == sum(len(r) - 1 for r in rows)


@pytest.mark.parametrize("window", [None, 5])
def test_the_mask_of_a_gpu_equals_the_pieces_of_a_cpu(window):
    [packed] = pack(random_rows(4, count=8), 10**6)
    size = packed.ids.size(1)
    query, key, value = (torch.randn(1, heads, size, 8) for heads in (4, 2, 2))
    pieces = PackedAttention(packed)(0, query, key, value, None, window)
    at = torch.arange(size)
    mask = _block_mask(packed, window, query).mask_mod(0, 0, at[:, None], at[None])
    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(pieces, dense)


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("count", [1, 20, 60])
def test_the_block_mask_is_that_of_torch_without_its_memory(window, count):
    from torch.nn.attention.flex_attention import create_block_mask

    [packed] = pack(random_rows(5, count=count), 10**6)
    size = packed.ids.size(1)
    ours = _block_mask(packed, window, torch.empty(0))
    theirs = create_block_mask(ours.mask_mod, None, None, size, size, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense()) and ours.shape == theirs.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for number, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        for line in range(ours.kv_num_blocks.size(-1)):
            used = int(getattr(ours, number)[0, 0, line])
            first = [sorted(getattr(mask, indices)[0, 0, line, :used].tolist()) for mask in (ours, theirs)]
            assert first[0] == first[1]


def test_a_model_that_cannot_take_packed_rows_gets_padded_rows_and_a_warning():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = SHAPES["gemma3_text"] | {"vocab_size": 259, "final_logit_softcapping": 5.0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **sizes))
    torch.nn.init.normal_(model.lm_head.weight, std=2.0)
    model = tuned(model)
    with pytest.warns(UserWarning, match="prefix sharing is off, which is slower: the model"):
        micro_batches = choose_micro_batches(model)
    assert type(micro_batches) is MicroBatches
    rows = random_rows(1)
    assert_same(in_micro_batches(model, micro_batches, rows, 200), one_by_one(model, rows))


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_the_loss_is_the_same_in_chunks_and_with_an_adapter_on_the_output_layer(targets, monkeypatch):
    from formtune.model import loss

    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": 259 * 5})
    model = tuned(tiny_model(tie_word_embeddings=False), targets=targets)
    rows = random_rows(2)
    with pytest.warns(UserWarning, match="its output layer") if "lm_head" in targets else nullcontext():
        micro_batches = choose_micro_batches(model)
    assert isinstance(micro_batches, SharedPrefixes) == ("lm_head" not in targets)
    assert_same(in_micro_batches(model, micro_batches, rows, 10**6), one_by_one(model, rows))


def test_a_padded_forward_pass_of_a_callback_ignores_the_padding():
    model = tuned(tiny_model())
    choose_micro_batches(model)  # sets the packed attention
    ids, short = torch.tensor([[5, 6, 7, 8, 9, 10]]), torch.tensor([[5, 6, 7, 8]])
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), short], 1)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    together = model(
        torch.cat([ids, padded]), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)
    ).logits
    torch.testing.assert_close(together[1, 2:], model(short).logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_every_kind_of_packed_sequence_gets_a_kernel_of_its_own_on_a_gpu(monkeypatch):
    # Kernels are counted here without a GPU: PyTorch warns if it calls the unfused function instead.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)  # PyTorch's
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    flex = attention._flex.__wrapped__()
    sizes = [(3, 20), (12, 150)]  # one block of the mask, and several
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="flex_attention called without torch.compile")
        for (count, length), window, dtype, scale in product(
            sizes, (None, 8), (torch.float32, torch.bfloat16), (None, 0.5)
        ):
            [packed] = pack([row([*range(length), n], [1, 2]) for n in range(count)], 10**6)
            query = torch.randn(1, 4, packed.ids.size(1), 16, dtype=dtype)
            mask = _block_mask(packed, window, query)
            flex(query, query[:, :2], query[:, :2], block_mask=mask, scale=scale, enable_gqa=True)


def test_a_file_imported_in_inference_mode_has_no_tensors_that_training_would_save():
    for module in (attention, packed, shared_prefixes):
        assert not [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
