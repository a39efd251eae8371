"""The best checkpoint is the one that keeps the format, and only the files that can still win are kept."""

import itertools
import json
import math
import random
from pathlib import Path

import torch

from conftest import byte_tokenizer, tiny_model
from formtune.callbacks.checkpoints import Score, best, contenders
from formtune.cli import main
from formtune.formats import JsonSchema


def test_format_beats_loss():
    assert best([Score(1, 90, 0.9, 0.1), Score(2, 95, 0.5, 0.9)]).step == 2


def test_within_one_row_field_f1_decides_then_loss_then_the_earlier_step():
    assert best([Score(1, 100, 0.8, 0.1), Score(2, 99, 0.9, 0.5)]).step == 2
    assert best([Score(1, 100, 0.9, 0.5), Score(2, 99, 0.9, 0.4)]).step == 2
    assert best([Score(2, 100, 0.9, 0.4), Score(1, 99, 0.9, 0.4)]).step == 1


def test_within_one_row_is_a_set_and_not_a_chain():
    assert best([Score(1, 98, 1.0, 0.1), Score(2, 99, 0.9, 0.1), Score(3, 100, 0.8, 0.1)]).step == 2


def test_nan_is_never_best():
    assert best([Score(1, 9, 0.5, math.nan)]) is None
    assert best([Score(1, 9, 0.5, math.nan), Score(2, 1, 0.0, 3.0)]).step == 2


def test_keeping_only_contenders_never_loses_a_later_best():
    rng = random.Random(0)
    for _ in range(2000):
        scores = [
            Score(i, rng.randrange(4), rng.randrange(3) / 2, rng.choice([0.0, 1.0, 2.0, math.nan])) for i in range(6)
        ]
        kept: set[Score] = set()
        for seen, score in enumerate(scores, 1):
            kept = contenders(kept | {score})
            assert len(kept) <= 2 and best(kept) == best(scores[:seen])


def test_every_order_of_arrival_gives_the_same_best():
    scores = [Score(1, 5, 0.2, 1.0), Score(2, 6, 0.1, 1.0), Score(3, 4, 0.9, 0.1), Score(4, 5, 0.3, 0.5)]
    assert {best(order) for order in itertools.permutations(scores)} == {best(scores)}


def test_the_adapter_that_keeps_the_format_is_exported_and_not_the_one_of_the_lowest_loss(task, monkeypatch):
    """Every training answer is the same and no validation answer is like it. The longer the model learns it by heart,
    the less likely it finds what is wanted, and the surer its answers are in format.
    """
    folder, write = task
    monkeypatch.chdir(folder)
    model = tiny_model()
    model.get_output_embeddings().weight.data *= 30  # random weights that are sure of something
    model.save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    for name, text, count in (("train", lambda k: (1, "a"), 48), ("validation", wanted, 24), ("test", wanted, 24)):
        answers = [json.dumps(dict(zip("ns", text(k), strict=True)), separators=(",", ":")) for k in range(count)]
        write(f"{name}.jsonl", [{"prompt": f"{name}{k * 7919}", "completion": a} for k, a in enumerate(answers)])
    words = ["fit", "--model.base", "base", "--data.train", "train.jsonl", "--data.validation", "validation.jsonl"]
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
    chosen, lowest = by_step[training["best_step"]], by_step[training["lowest_loss_step"]]
    assert chosen["exact"] == max(one["exact"] for one in by_step.values()) > lowest["exact"]
    assert chosen["val_loss"] > lowest["val_loss"] and lowest["step"] < chosen["step"] < 120

    # What stands in the folder says in format what that validation counted, by PEFT and plain `generate`.
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), run / "adapter")
    tokenizer, contract = AutoTokenizer.from_pretrained(run / "adapter"), JsonSchema(schema="schema.json")
    state = torch.load(run / f"checkpoints/step-{chosen['step']}.ckpt", weights_only=True)["state_dict"]
    for name, weight in tuned.state_dict().items():
        assert "lora" not in name or torch.equal(weight, state[f"model.{name}"])
    exact = 0
    for line in Path("validation.jsonl").read_text().splitlines():
        turn = [{"role": "user", "content": json.loads(line)["prompt"]}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        said = tuned.generate(**ids, max_new_tokens=32, do_sample=False, pad_token_id=0)[0, ids["input_ids"].size(1) :]
        *answer, last = said.tolist()
        exact += contract.check(tokenizer.decode(answer), finished=last == tokenizer.eos_token_id).exact
    assert exact == chosen["exact"]


def wanted(k):
    return k * 37 % 100, "bcdefgh"[k % 7] * (k % 5)
