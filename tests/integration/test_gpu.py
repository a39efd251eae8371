"""On a CUDA device: the same losses as on the CPU, exact resume, valid answers. Run by `make test-gpu`."""

import json
import os
import signal

import pytest
import torch

from conftest import SHAPES, byte_tokenizer, tiny_model
from formtune.base.row import Row
from formtune.cli import main
from formtune.model.lora import Lora, add_lora
from formtune.model.micro_batches import MicroBatches, choose_micro_batches
from formtune.training.checkpoint import BestCheckpoint

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make test-gpu"),
    pytest.mark.filterwarnings("error:flex_attention called without torch.compile"),
]

# FlexAttention has no kernel for heads of fewer than 16 numbers.
WIDE = {"hidden_size": 64, "intermediate_size": 96}
DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # `load_base` switches the base's own off
WIDER = {"gpt2": {"n_embd": 64} | DROPOUT, "qwen3": WIDE | {"head_dim": 16}, "gemma3_text": WIDE | {"head_dim": 16}}
FIT = ("train", "-c", "small.yaml", "--baselines", "[]", "--seed_everything", "3")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    tiny_model(**WIDE).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def losses_and_gradients(shape, device, micro_batches_of, rows):
    model = add_lora(tiny_model(shape, **WIDER.get(shape, WIDE)), Lora(r=4, dropout=0.0)).to(device)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape) * 0.1).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    micro_batches = micro_batches_of(model)
    loss, gradients = 0.0, [torch.zeros_like(p) for p in trained]
    for group in micro_batches.split(rows, 400):
        part = micro_batches.loss(group)
        loss += float(part.detach())
        for total, gradient in zip(gradients, torch.autograd.grad(part, trained), strict=True):
            total += gradient
    return micro_batches, loss, torch.cat([gradient.flatten().cpu() for gradient in gradients])


@pytest.mark.parametrize("shape", SHAPES)
def test_shared_prefixes_give_the_losses_and_gradients_of_the_cpu(shape):
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(3, 259, (count,), generator=generator).tolist()

    prefixes = [ids(40), ids(170)]  # the longer one fills a block of the mask
    rows = [Row(prefixes[n % 2] + ids(5 + n), ids(7), "", "", "f:1") for n in range(24)]

    def usual(model):
        model.get_base_model().set_attn_implementation("sdpa")
        return MicroBatches(model)

    _, loss, expected = losses_and_gradients(shape, "cpu", usual, rows)
    for micro_batches_of in (choose_micro_batches, usual):
        kind, on_gpu, gradients = losses_and_gradients(shape, "cuda", micro_batches_of, rows)
        assert type(kind) is not MicroBatches or micro_batches_of is usual
        assert abs(on_gpu - loss) <= 1e-4 * loss
        assert (gradients - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_interrupted_run_resumes_bit_for_bit(write_project, monkeypatch, precision):
    folder = write_project({"accelerator": "gpu", "devices": 1, "precision": precision, "max_epochs": 4})
    assert main([*FIT, "--run", "whole"]) == 0

    after_batch = BestCheckpoint.on_train_batch_end

    def stop(self, trainer, *args):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return after_batch(self, trainer, *args)

    with monkeypatch.context() as patched:
        patched.setattr(BestCheckpoint, "on_train_batch_end", stop)
        assert main([*FIT, "--run", "stopped"]) == 143
    assert main([*FIT, "--run", "stopped", "--resume"]) == 0
    one, other = ((folder / f"logs/small/{run}/adapter/adapter_model.safetensors").read_bytes()
                  for run in ("whole", "stopped"))  # fmt: skip
    assert one == other


def test_constrained_decoding_gives_valid_answers(write_project):
    folder = write_project({"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "max_steps": 2})
    assert main([*FIT, "--run", "one", "--model.constrained", "true", "--model.max_new_tokens", "64"]) == 0
    kinds = [
        json.loads(line)["kind"] for line in (folder / "logs/small/one/outcomes/after.jsonl").read_text().splitlines()
    ]
    assert kinds and set(kinds) <= {"ok", "content", "truncated"}


def test_a_base_in_four_bits_is_trained_and_compiled_layers_are(write_project):
    pytest.importorskip("bitsandbytes", reason="needs the extra `qlora`")
    folder = write_project({"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "max_steps": 4})
    for run, flag in (("four", ["--model.quantize", "4bit"]), ("compiled", ["--model.compile", "true"])):
        assert main([*FIT, "--run", run, *flag]) == 0
        assert (folder / f"logs/small/{run}/adapter/adapter_model.safetensors").is_file()
