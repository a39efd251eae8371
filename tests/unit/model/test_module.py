"""A step is the same step however it is split; what is saved is the adapter, and only a fitting one is loaded."""

import functools
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch

from conftest import byte_tokenizer, pair, tiny_model
from formtune.data.datamodule import FormatDataModule
from formtune.errors import UserError
from formtune.formats import JsonSchema
from formtune.model import FormatModule, Lora
from formtune.model.optimization import CosineWithWarmup, build_optimizer


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def run(base, folder, write, steps=3, rows_per_step=7, lora=None, rows=40, precision="32-true", **options):
    format = JsonSchema(schema=str(folder / "schema.json"))
    # Answers of many lengths, so that a mean of means would differ from a mean over tokens.
    train = write(
        "train.jsonl",
        [pair(n, "q" * (n % 9) + str(n)) | {"completion": f'{{"n":{n},"s":"{"y" * (n % 13)}"}}'} for n in range(rows)],
    )
    data = FormatDataModule(format=format, train=train, tokenizer=base, rows_per_step=rows_per_step)
    L.seed_everything(0, verbose=False)
    module = FormatModule(
        base=base,
        format=format,
        lora=lora or Lora(r=4, dropout=0.0),
        **({"optimizer": sgd, "max_new_tokens": 24} | options),
    )
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, limit_val_batches=0, default_root_dir=folder, precision=precision,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer, module, data


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad]).double()


@pytest.fixture
def train(base, task):
    folder, write = task
    return lambda **options: run(base, folder, write, **options)


def test_load_from_checkpoint_says_how_to_load_a_checkpoint():
    with pytest.raises(UserError, match="give ckpt_path to the trainer"):
        FormatModule.load_from_checkpoint("step-1.ckpt")


def test_a_step_does_not_depend_on_how_it_is_split_into_micro_batches(train):
    whole, split = (flat(train(tokens_per_micro_batch=n)[1]) for n in (16384, 50))
    start = flat(train(steps=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))[1])
    assert (whole - split).abs().max() < 1e-6 < (whole - start).abs().max()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_prefixes_are_shared_in_every_precision(train, precision):
    shared_prefixes = pytest.importorskip("formtune.packing.shared_prefixes")
    assert isinstance(train(steps=1, precision=precision)[1].micro_batches, shared_prefixes.SharedPrefixes)


def test_the_loss_is_weighted_by_tokens_over_the_whole_step(train):
    _, module, data = train(steps=1, rows_per_step=1000, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    rows = data.splits.rows["train"]
    nats, tokens = 0.0, 0
    for row in rows:
        logits = module.model(torch.tensor([row.prompt_ids + row.target_ids])).logits[0, len(row.prompt_ids) - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row.target_ids), reduction="sum"))
        tokens += len(row.target_ids)
    assert abs(float(module.trainer.callback_metrics["train/loss"]) - nats / tokens) < 1e-4


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_gradient_checkpointing_and_clipping_work_and_checkpointing_changes_nothing(train, clip):
    plain, checkpointed = (flat(train(max_grad_norm=clip, gradient_checkpointing=g)[1]) for g in (False, True))
    torch.testing.assert_close(plain, checkpointed, rtol=0, atol=1e-7)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_adapters_stay_in_32_bits_under_mixed_precision_and_learn(train, precision):
    _, module, _ = train(precision=precision, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True), steps=8)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in trained.values())
    assert any(p.abs().max() > 0 for name, p in trained.items() if "lora_B" in name)


@pytest.mark.slow
def test_a_compiled_step_is_the_same_step(tmp_path, task, monkeypatch):
    # Traced, but not compiled to C++, which takes a minute.
    traced = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "base")  # each layer is compiled anew
    byte_tokenizer().save_pretrained(tmp_path / "base")
    folder, write = task
    plain, compiled = (flat(run(str(tmp_path / "base"), folder, write, steps=2, compile=c)[1]) for c in (False, True))
    torch.testing.assert_close(plain, compiled, rtol=0, atol=1e-5)


def test_a_base_in_four_bits_is_trained_through(task, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the extra `qlora`")
    folder, write = task
    base = str(tmp_path / "base")
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(base)  # bitsandbytes takes blocks of 64 weights
    byte_tokenizer().save_pretrained(base)
    _, module, _ = run(base, folder, write, steps=2, quantize="4bit")
    assert any("4bit" in type(m).__name__ for m in module.modules())
    assert any(p.abs().max() > 0 for name, p in module.named_parameters() if "lora_B" in name)


def test_a_batch_is_one_optimizer_step_and_the_rate_ends_at_zero(train):
    trainer, module, _data = train(steps=6, scheduler=lambda o: CosineWithWarmup(o, warmup=0.5))
    assert trainer.global_step == 6
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_a_checkpoint_holds_the_adapter_alone_and_loads_without_pickle(train, tmp_path):
    trainer, module, _ = train()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    assert "hyper_parameters" not in saved


@pytest.mark.parametrize("other", [Lora(r=8), Lora(r=4, targets=["q_proj", "v_proj"]), Lora(r=4, targets="all-linear")])
def test_a_checkpoint_of_another_adapter_is_refused(train, other):
    state = train()[1].state_dict()
    module = train(steps=1, lora=other)[1]
    with pytest.raises(UserError, match="has a different model.lora"):
        module.load_state_dict(state)


def test_a_checkpoint_that_is_not_finite_is_refused(train):
    _, module, _ = train(steps=1)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    next(iter(state.values()))[0, 0] = float("nan")
    with pytest.raises(UserError, match="non-finite weights"):
        module.load_state_dict(state)


def test_a_schedule_with_fewer_steps_than_the_run_is_refused():
    def one_cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5)

    parameters = [torch.nn.Parameter(torch.zeros(1))]
    for steps in (5, 3, float("inf")):
        build_optimizer(torch.optim.AdamW, one_cycle, parameters, SimpleNamespace(estimated_stepping_batches=steps))
    with pytest.raises(UserError, match="^model.scheduler: total_steps is 5, but the run has 6 steps"):
        build_optimizer(torch.optim.AdamW, one_cycle, parameters, SimpleNamespace(estimated_stepping_batches=6))
