"""Answers are those of plain greedy decoding, however few tokens are decoded."""

import random
import weakref

import pytest
import torch

from conftest import FAMILIES, random_rows, row, tiny_model
from formtune.model.micro_batches import MicroBatches, choose_micro_batches

STOP = (7, 11)
LIMIT = 12


def naive(model, prompt, limit=LIMIT):
    """One token at a time, the whole row computed again for each."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and (ids == prompt or ids[-1] not in STOP):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def rows_of_every_kind(model, count=12):
    """Targets that the model generates itself, that differ at the first, a middle or the last token, and none."""
    rng, rows = random.Random(5), []
    for i, example in enumerate(random_rows(5, count)):
        answer = naive(model, example.prompt_ids)
        at = (None, 0, len(answer) // 2, len(answer) - 1, len(answer))[i % 5]
        target = list(answer)
        if at == len(answer):
            target = []
        elif at is not None:
            target[at] = rng.choice([t for t in range(12, 259) if t != target[at]])
            target += [20, 7] if i % 2 else []
        rows.append(row(example.prompt_ids, target))
    return rows


def answered(micro_batches, rows, limits, tokens=300):
    answers = micro_batches.decode(rows, micro_batches.split(rows, tokens, LIMIT), STOP, limits)
    return [answer.ids for answer in answers]


def both(shape):
    model = tiny_model(shape).eval()
    # Sharpened, so that random weights repeat themselves less and no two logits are near one another.
    model.get_output_embeddings().weight.data *= 30
    rows = rows_of_every_kind(model)
    expected = [naive(model, r.prompt_ids) for r in rows]
    return model, rows, expected


@pytest.mark.parametrize("shape", FAMILIES)
def test_answers_equal_those_of_a_naive_loop(shape):
    model, rows, expected = both(shape)
    limits = [LIMIT] * len(rows)
    shared = choose_micro_batches(model)
    assert answered(shared, rows, limits) == expected
    assert answered(shared, rows, limits, tokens=1) == expected
    model.set_attn_implementation("sdpa")
    assert answered(MicroBatches(model), rows, limits) == expected


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_every_way_of_decoding_gives_the_same_log_probabilities(shape):
    model, rows, expected = both(shape)
    logprobs = []
    for one, answer in zip(rows, expected, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([one.prompt_ids + answer]), use_cache=False).logits[0].double()
        each = logits.log_softmax(-1)[len(one.prompt_ids) - 1 : -1]
        logprobs.append(each.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist())
    shared, limits = choose_micro_batches(model), [LIMIT] * len(rows)
    free = [row(one.prompt_ids, []) for one in rows]
    for implementation, way in (("formtune", shared), ("sdpa", MicroBatches(model))):
        if implementation == "sdpa":
            model.set_attn_implementation("sdpa")
        for given in (rows, free):
            for tokens in (1, 300, 10**6):  # of a micro-batch
                decoded = way.decode(given, way.split(given, tokens, LIMIT), STOP, limits)
                assert [answer.ids for answer in decoded] == expected
                for answer, right in zip(decoded, logprobs, strict=True):
                    assert answer.logprobs == pytest.approx(right, abs=2e-5)


def test_a_row_that_predicts_its_target_is_never_decoded_and_others_only_from_the_first_mismatch(monkeypatch):
    cached = pytest.importorskip("formtune.packing.attention").CachedAttention
    model, rows, expected = both("llama")
    micro_batches = choose_micro_batches(model)
    fed, append = [], cached._append
    monkeypatch.setattr(cached, "_append", lambda *a: fed.append((a[1] == 0) * len(a[0].at)) or append(*a))
    exact = [row(r.prompt_ids, answer) for r, answer in zip(rows, expected, strict=True)]
    assert answered(micro_batches, exact, [LIMIT] * len(rows)) == expected and not fed
    half = [row(r.prompt_ids, [*answer[: len(answer) // 2], 13]) for r, answer in zip(rows, expected, strict=True)]
    assert answered(micro_batches, half, [LIMIT] * len(rows)) == expected
    assert 0 < sum(fed) <= sum(len(answer) - len(answer) // 2 for answer in expected)


def test_no_two_micro_batches_have_their_kv_cache_in_memory_at_once(monkeypatch):
    shared = pytest.importorskip("formtune.packing.shared_prefixes").SharedPrefixes
    model, rows, _ = both("llama")
    micro_batches, predictions, caches = choose_micro_batches(model), shared.predictions, []

    def recorded(*arguments):
        assert not any(keys() is not None for keys in caches)
        made = predictions(*arguments)
        caches.extend(weakref.ref(keys) for keys, _ in made[1].values())
        return made

    monkeypatch.setattr(shared, "predictions", recorded)
    answered(micro_batches, rows, [LIMIT] * len(rows), tokens=60)
    assert len(caches) > 2 * model.config.num_hidden_layers


def test_rows_with_less_room_are_cut_there_and_cut_no_others():
    model, rows, expected = both("gpt2")
    limits = [LIMIT if i % 3 else 2 for i in range(len(rows))]
    cut = [answer[:most] for answer, most in zip(expected, limits, strict=True)]
    assert answered(choose_micro_batches(model), rows, limits) == cut
    model.set_attn_implementation("sdpa")
    assert answered(MicroBatches(model), rows, limits) == cut


def test_a_prompt_that_fills_the_context_gets_as_many_tokens_as_fit():
    model = tiny_model("gpt2", n_positions=40, max_position_embeddings=40).eval()
    model.get_output_embeddings().weight.data *= 30
    rows = [row(list(range(20, 20 + n))) for n in (38, 5)]
    limits = [40 - len(r.prompt_ids) for r in rows[:1]] + [LIMIT]
    expected = [naive(model, r.prompt_ids, most) for r, most in zip(rows, limits, strict=True)]
    model.set_attn_implementation("sdpa")
    assert answered(MicroBatches(model), rows, limits, 10**6) == expected
    assert answered(choose_micro_batches(model), rows, limits, 10**6) == expected


def test_sampling_and_penalties_that_a_base_ships_change_no_answer(tmp_path):
    from formtune.model.lora import load_base

    model, rows, expected = both("llama")
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, min_new_tokens=9)
    model.save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path), torch.float32, None, torch.device("cpu")).eval()
    limits = [LIMIT] * len(rows)
    assert answered(MicroBatches(loaded), rows, limits) == expected
    assert answered(choose_micro_batches(loaded), rows, limits) == expected
