"""Answers are those of plain greedy decoding, however little of it is done."""

import random

import pytest
import torch
from test_packing import random_rows, row

from conftest import SHAPES, tiny_model
from formtune.model.length_buckets import LengthBuckets
from formtune.model.shared_prefixes import SharedPrefixes, choose_micro_batches

STOP = (7, 11)
ROOM = 12


def naive(model, prompt, limit=ROOM):
    """One token at a time, the whole row computed again for each."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and (ids == prompt or ids[-1] not in STOP):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def rows_of_every_kind(model, count=12):
    """Targets that the model says itself, that differ at the first, a middle or the last token, and none."""
    rng, rows = random.Random(5), []
    for i, one in enumerate(random_rows(5, count)):
        said = naive(model, one.prompt_ids)
        at = (None, 0, len(said) // 2, len(said) - 1, len(said))[i % 5]
        target = list(said)
        if at == len(said):
            target = []
        elif at is not None:
            target[at] = rng.choice([t for t in range(12, 259) if t != target[at]])
            target += [20, 7] if i % 2 else []
        rows.append(row(one.prompt_ids, target))
    return rows


def answered(way, rows, limits, tokens=300):
    return way.decode(rows, way.split(rows, tokens, ROOM), STOP, limits)


def both(shape):
    model = tiny_model(shape).eval()
    # Sharpened, so that random weights repeat themselves less and no two logits are near one another.
    model.get_output_embeddings().weight.data *= 30
    rows = rows_of_every_kind(model)
    wanted = [naive(model, r.prompt_ids) for r in rows]
    return model, rows, wanted


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_equal_those_of_a_naive_loop(shape):
    model, rows, wanted = both(shape)
    limits = [ROOM] * len(rows)
    shared = choose_micro_batches(model)
    assert isinstance(shared, SharedPrefixes)
    assert answered(shared, rows, limits) == wanted
    assert answered(shared, rows, limits, tokens=1) == wanted
    model.set_attn_implementation("sdpa")
    assert answered(LengthBuckets(model), rows, limits) == wanted


def test_a_row_that_says_its_target_is_never_decoded_and_others_only_from_the_first_mismatch(monkeypatch):
    model, rows, wanted = both("llama")
    way = choose_micro_batches(model)
    fed = []
    feed = SharedPrefixes._next
    monkeypatch.setattr(SharedPrefixes, "_next", lambda *a: fed.append(a[1].numel()) or feed(*a))
    exact = [row(r.prompt_ids, said) for r, said in zip(rows, wanted, strict=True)]
    assert answered(way, exact, [ROOM] * len(rows)) == wanted and not fed
    half = [row(r.prompt_ids, [*said[: len(said) // 2], 13]) for r, said in zip(rows, wanted, strict=True)]
    assert answered(way, half, [ROOM] * len(rows)) == wanted
    assert 0 < sum(fed) <= sum(len(said) - len(said) // 2 for said in wanted)


def test_rows_with_less_room_are_cut_there_and_cut_no_others():
    model, rows, wanted = both("gpt2")
    limits = [ROOM if i % 3 else 2 for i in range(len(rows))]
    cut = [said[:most] for said, most in zip(wanted, limits, strict=True)]
    assert answered(choose_micro_batches(model), rows, limits) == cut
    model.set_attn_implementation("sdpa")
    assert answered(LengthBuckets(model), rows, limits) == cut


def test_a_prompt_that_fills_the_context_gets_as_many_tokens_as_fit():
    model = tiny_model("gpt2", n_positions=40, max_position_embeddings=40).eval()
    model.get_output_embeddings().weight.data *= 30
    rows = [row(list(range(20, 20 + n))) for n in (38, 5)]
    limits = [40 - len(r.prompt_ids) for r in rows[:1]] + [ROOM]
    wanted = [naive(model, r.prompt_ids, most) for r, most in zip(rows, limits, strict=True)]
    model.set_attn_implementation("sdpa")
    assert answered(LengthBuckets(model), rows, limits, 10**6) == wanted
    assert answered(choose_micro_batches(model), rows, limits, 10**6) == wanted


def test_sampling_and_penalties_that_a_base_ships_change_no_answer(tmp_path):
    from formtune.model.lora import load_base

    model, rows, wanted = both("llama")
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, min_new_tokens=9)
    model.save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path), torch.float32, None, torch.device("cpu")).eval()
    limits = [ROOM] * len(rows)
    assert answered(LengthBuckets(loaded), rows, limits) == wanted
    assert answered(choose_micro_batches(loaded), rows, limits) == wanted
