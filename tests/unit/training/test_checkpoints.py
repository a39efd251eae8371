"""The best checkpoint is the one that keeps the format, and only the files that can still win are kept."""

import itertools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import byte_tokenizer, tiny_model
from formtune.cli import main
from formtune.formats import JsonSchema
from formtune.model import FormatModule
from formtune.training.callbacks import OverfittingWatch
from formtune.training.checkpoint import steps
from formtune.training.validations import Validation, best, can_still_win, reason

ROWS = 119


def rows(*spans):
    """One bit for each row of the spans, given by their first row and the one behind their last."""
    return sum(1 << row for span in spans for row in range(*span))


def measured(step, valid, right=0, f1=0.5, loss=1.0, rows=ROWS):
    """What a validation measured, by the bits of its valid rows and the number of its right ones."""
    return Validation(step, loss, loss, f1, rows, valid, (1 << right) - 1)


def first(count):
    return rows((0, count))


# 115 and 113 valid rows of 119: 5 in the first alone, 3 in the second alone.
EARLY, LATE = measured(125, rows((0, 115)), 22, 0.625), measured(248, rows((5, 118)), 43, 0.749)


def test_two_rows_less_that_are_noise_do_not_beat_21_more_right_answers():
    assert (EARLY.exact, LATE.exact) == (115, 113)
    assert best([EARLY, LATE]) == LATE and can_still_win([EARLY, LATE]) >= {248}
    assert reason([EARLY, LATE]) == (
        "best checkpoint: step 248 (43 of 119 right, 113 valid); most valid: step 125 (22 right, 115 valid); "
        "most right: the same; lowest loss: step 125 (22 right, 115 valid); last: the same"
    )


def test_two_rows_less_that_are_not_noise_lose_whatever_is_right():
    lost = measured(248, rows((2, 115)), 43, 0.749)  # none in its place: 2 > sqrt(2 + 0)
    assert best([EARLY, lost]) == EARLY
    assert reason([EARLY, lost]) == (
        "best checkpoint: step 125 (22 of 119 right, 115 valid); most valid: the same; "
        "most right: step 248 (43 right, 113 valid); lowest loss: the same; last: step 248 (43 right, 113 valid)"
    )
    assert best([EARLY, measured(248, rows((3, 116)), 43)]).step == 248  # 2 = sqrt(3 + 1)
    assert best([EARLY, measured(248, rows((9, 119)), 43)]).step == 125  # 5 > sqrt(9 + 4)
    assert best([measured(1, first(90)), measured(2, first(95), loss=9.0)]).step == 2


def test_among_candidates_right_answers_decide_then_field_f1_then_loss_then_the_earlier_step():
    reference = measured(1, first(100), 9, 0.8, 0.4)
    for other in (
        measured(2, first(99), 10, 0.1, 9.0),
        measured(2, first(99), 9, 0.9, 9.0),
        measured(2, first(99), 9, 0.8, 0.3),
    ):
        assert best([reference, other]) == best([other, reference]) == other
    later = measured(2, first(100), 9, 0.8, 0.4)
    assert best([later, reference]) == reference


def test_the_candidates_are_a_set_and_not_a_chain():
    # 98 and 99 rows are equal, and so are 99 and 100, but not 98 and 100.
    assert best([measured(1, first(98), 30), measured(2, first(99), 20), measured(3, first(100), 10)]).step == 2


def test_a_later_reference_brings_back_what_was_behind():
    right = measured(1, rows((0, 100)), 50)
    behind = measured(2, rows((4, 105)), 40)  # more valid rows, less right
    assert best([right, behind]) == right and can_still_win([right, behind]) == {1, 2}
    later = measured(3, rows((0, 103)), 30)  # 100 rows of it are those of the first: 3 > sqrt(3), and 2 < sqrt(6)
    assert best([right, behind, later]) == behind
    assert can_still_win([right, behind, later]) >= {2}


def test_nan_is_never_best_and_without_finite_metrics_there_is_no_best():
    nan = measured(1, first(119), 99, loss=math.nan)
    assert best([nan]) is None and can_still_win([nan]) == set() and best([]) is None
    assert reason([nan]) == "no best checkpoint: no validation had a finite loss"
    good = measured(2, first(1), 0, 0.0, 3.0)
    assert best([nan, good]) == best([good, nan]) == good and can_still_win([nan, good]) == {2}
    assert best([measured(1, 1, f1=math.nan), good]) == good


def test_the_base_is_neither_a_checkpoint_nor_a_reference():
    base = measured(0, first(119), 119, 1.0, 0.0)
    assert best([base]) is None and best([base, EARLY, LATE]) == LATE
    assert "lowest loss: step 125" in reason([base, EARLY, LATE])


def test_every_order_of_arrival_gives_the_same_best():
    rng = random.Random(0)
    for _ in range(50):
        history = history_of(rng, 8, 5)
        assert {best(order) for order in itertools.permutations(history)} == {best(history)}


def history_of(rng, size, validations):
    """Validations whose rows are alike, as those of a run are, or have nothing to do with each other."""
    alike, common, share = rng.random() < 0.7, rng.getrandbits(size), rng.choice([0.1, 0.2, 0.3])
    history = []
    for step in range(1, validations + 1):
        changed = sum(1 << row for row in range(size) if rng.random() < share)
        valid = common ^ changed if alike else rng.getrandbits(size)
        loss = rng.choice([0.0, 1.0, 2.0, math.nan])
        history.append(measured(step, valid, rng.randrange(4), rng.randrange(3) / 2, loss, size))
    return history


def test_the_best_of_all_is_always_among_the_kept_and_what_was_removed_is_never_needed():
    """`can_still_win` leaves out none that can win.

    Let the reference have t valid rows now; a later one has r >= t. A checkpoint A with a valid rows cannot be the best,
    now or later, if another checkpoint B, with b valid rows, comes before A in the order and is a candidate whenever A
    is. A is a candidate if (r - a)² is at most the number of rows in which it differs from the reference. One row less
    is never too few, so this needs proof for r >= b + 2 only. Let h rows differ between A and B, let both lack n rows,
    and let the reference have s <= n of these and lack j of those that only B has. It differs from A in
    h - (r - b) + 2 (s - j) rows, and from B in at most h less. So if A is a candidate, (r - a)² <= h + 2 n - (r - b),
    and B differs from the reference in at least (r - a)² - h rows. B is a candidate too if that is at least (r - b)².
    Where one of the two settles it for the lowest r, it does for every r: the difference of both sides does not fall as
    r rises. It does not matter whether B's own file is kept.

    It is sufficient and cheap, so a few that cannot win may be kept. A fixed limit would give a best one away, since
    there are verdicts for which each of many may still win.
    """
    rng = random.Random(1)
    removed = 0
    for _ in range(1500):
        history, kept = history_of(rng, rng.choice([5, 8, 20, 119]), 12), set()
        for seen in range(1, len(history) + 1):
            needed = can_still_win(history[:seen])
            assert needed <= kept | {seen}
            kept, winner = needed, best(history[:seen])
            assert winner is None or winner.step in kept
        removed += len(history) - len(kept)
    assert removed > 1500 * 4  # not everything is kept


def test_no_reference_that_can_be_measured_later_makes_a_removed_checkpoint_the_best():
    rng = random.Random(2)
    wins = 0
    for _ in range(150):
        history = history_of(rng, 7, 5)
        kept, now = can_still_win(history), best(history)
        for valid in range(2**7):
            winner = best([*history, measured(99, valid, 0, 0.0, 9.0, 7)])
            assert winner.step in kept | {99}
            wins += winner not in (now, history[-1]) and winner.step != 99
    assert wins > 100  # one that was behind does win


def test_few_are_kept_of_a_long_run_that_has_nothing_left_to_learn():
    rng = random.Random(3)
    for _ in range(5):
        hard = [rng.gauss(-2, 1) for _ in range(ROWS)]  # some rows are valid nearly always, some now and then
        history, most = [], 0
        for step in range(1, 61):
            valid = sum(1 << row for row in range(ROWS) if rng.gauss(0, 0.5) > hard[row])
            history.append(measured(step, valid, rng.randrange(60, 70), rng.random()))
            most = max(most, len(can_still_win(history)))
        assert most <= 10


def test_files_that_other_callbacks_write_are_not_among_the_steps(tmp_path):
    for name in ("step-20.ckpt", "step-3.ckpt", "step-3-v1.ckpt", "step-step=4.ckpt", "step-5.ckpt.partial"):
        (tmp_path / name).touch()
    assert list(steps(tmp_path).items()) == [(3, tmp_path / "step-3.ckpt"), (20, tmp_path / "step-20.ckpt")]


def test_the_verdicts_of_the_rows_survive_safe_loading(tmp_path):
    record, again = OverfittingWatch(), OverfittingWatch()
    record.history = [EARLY, LATE, measured(300, rows((1, 5000)), 3, rows=5000)]
    torch.save(record.state_dict(), tmp_path / "state")
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert again.history == record.history


def test_the_rows_are_in_the_order_of_the_file_whichever_process_has_them(monkeypatch):
    verdicts = {n: SimpleNamespace(exact=n % 3 > 0, joint=n % 3 > 1) for n in range(1, 8)}
    trainer = SimpleNamespace(
        sanity_checking=False, global_step=5, callback_metrics={"val/loss": torch.tensor(0.5), "content/field_f1": 0.25},
        state=SimpleNamespace(fn="validate"), is_global_zero=False,
    )  # fmt: skip
    for numbers, others in (([1, 2, 3, 4, 5, 6, 7], []), ([7, 3, 1, 5], [6, 4, 2]), ([], [2, 1, 3, 7, 6, 5, 4])):
        module = SimpleNamespace(trainer=trainer, _checked=[(n, verdicts[n]) for n in numbers])
        monkeypatch.setattr(
            "formtune.model.module.all_gather", lambda _, part, others=others: [(n, verdicts[n]) for n in others] + part
        )
        FormatModule.on_predict_epoch_end(module)
        record = OverfittingWatch()
        record.on_validation_end(trainer, module)
        [one] = record.history
        assert (one.rows, one.valid, one.right) == (7, 0b1101101, 0b0100100)
        assert (one.val_loss, one.field_f1) == (0.5, 0.25)


@pytest.mark.slow
def test_the_adapter_that_keeps_the_format_is_exported_and_not_the_one_of_the_lowest_loss(task, monkeypatch):
    """Every training answer is the same and no validation answer is like it. The longer the model learns it by heart,
    the less likely it answers right, and the more often its answers have a valid format.
    """
    folder, write = task
    monkeypatch.chdir(folder)
    model = tiny_model()
    model.get_output_embeddings().weight.data *= 30  # random weights that are sure of something
    model.save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    for name, text, count in (
        ("train", lambda k: (1, "a"), 48),
        ("validation", right_answer, 24),
        ("test", right_answer, 24),
    ):
        answers = [json.dumps(dict(zip("ns", text(k), strict=True)), separators=(",", ":")) for k in range(count)]
        write(f"{name}.jsonl", [{"prompt": f"{name}{k * 7919}", "completion": a} for k, a in enumerate(answers)])
    words = ["train", "--model.base", "base", "--data.train", "train.jsonl", "--data.validation", "validation.jsonl"]
    words += ["--data.test", "test.jsonl", "--data.format", "JsonSchema", "--data.format.schema", "schema.json"]
    words += ["--model.lora.targets", "all-linear", "--model.optimizer.lr", "0.01", "--model.max_new_tokens", "32"]
    words += ["--trainer.max_steps", "120", "--trainer.max_epochs", "-1", "--trainer.val_check_interval", "10"]
    words += [
        "--trainer.accelerator",
        "cpu",
        "--trainer.precision",
        "32-true",
        "--baselines",
        "[]",
        "--task",
        "t",
        "--seed_everything",
        "1",
    ]
    assert main([*words, "--run", "r", "--trainer.enable_progress_bar", "false"]) == 0

    run = Path("logs/t/r")
    training = json.loads((run / "metrics.json").read_text())["training"]
    by_step = {one["step"]: one for one in training["history"]}
    chosen, lowest = (
        by_step[training["best_step"]],
        min(by_step.values(), key=lambda one: (not one["step"], one["val_loss"])),
    )
    assert chosen["exact"] == max(one["exact"] for one in by_step.values()) > lowest["exact"]
    assert chosen["val_loss"] > lowest["val_loss"] and lowest["step"] < chosen["step"] < 120

    # The exported adapter answers as that validation counted, by PEFT and plain `generate`.
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), run / "adapter")
    tokenizer, format = AutoTokenizer.from_pretrained(run / "adapter"), JsonSchema(schema="schema.json")
    checkpoint = torch.load(run / f"checkpoints/step-{chosen['step']}.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    for name, weight in tuned.state_dict().items():
        assert "lora" not in name or torch.equal(weight, state[f"model.{name}"])
    verdicts = ""
    for line in Path("validation.jsonl").read_text().splitlines():
        turn = [{"role": "user", "content": json.loads(line)["prompt"]}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        output = tuned.generate(**ids, max_new_tokens=32, do_sample=False, pad_token_id=0)[
            0, ids["input_ids"].size(1) :
        ]
        *answer, last = output.tolist()
        verdicts += str(int(format.check(tokenizer.decode(answer), finished=last == tokenizer.eos_token_id).exact))
    [kept] = [v for v in checkpoint["callbacks"]["OverfittingWatch"]["history"] if v["step"] == chosen["step"]]
    assert verdicts.count("1") == chosen["exact"] and int(verdicts, 2) == int(kept["valid"], 16)


def right_answer(k):
    return k * 37 % 100, "bcdefgh"[k % 7] * (k % 5)
