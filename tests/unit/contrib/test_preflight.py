"""What would silently make another model is refused before training, by a rule and by a trial."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from command import fork_fresh_processes
from conftest import byte_tokenizer, tiny_model
from formtune.base.renderer import Renderer
from formtune.cli import main
from formtune.errors import UserError
from formtune.export.measure import merge
from formtune.export.quantize import EXTRAS, group_size
from formtune.export.rules import MERGED, TARGETS, check, vllm_rank
from formtune.model.lora import Lora, lora_config
from formtune_contrib.trial import attempt, shrink

WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 259}
ROWS = [[(7 * i + 13 * j) % 250 for j in range(20)] for i in range(2)]


def findings(adapter, shape="llama", targets=TARGETS, **changes):
    """Names of the rules that an adapter on a model of the shape breaks."""
    model = tiny_model(shape, **({"tie_word_embeddings": False} | (WIDE if shape == "llama" else {}) | changes))
    findings = dict(found for target in targets for found in check(model, adapter, target))
    assert all(re.fullmatch(r".*\(\w+ [\d.]+\)", line) for line in findings.values())
    return [*findings]


def test_a_plain_adapter_on_a_plain_base_breaks_no_rule():
    assert findings(LoraConfig(r=16, target_modules=["q_proj", "v_proj"])) == []
    assert findings(LoraConfig(r=16, target_modules="all-linear"), tie_word_embeddings=True) == []


@pytest.mark.parametrize(
    ("adapter", "changes", "name", "targets"),
    [
        ({"target_modules": ["lm_head"]}, {"tie_word_embeddings": True}, "tied embeddings", "merge"),
        ({"target_modules": ["embed_tokens"]}, {"tie_word_embeddings": True}, "tied embeddings", "int8"),
        ({"r": 1024}, {}, "rank", "vllm"),
        ({"use_dora": True}, {}, "DoRA", "vllm"),
    ],
)
def test_a_rule_finds_what_fails(adapter, changes, name, targets):
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"]} | adapter)
    assert name in findings(config, targets=[targets], **changes)
    others = {"vllm": MERGED, "gptq": ("merge", "int8", "vllm"), "awq": ("merge", "int8", "vllm")}.get(
        targets, ["vllm"]
    )
    assert name not in findings(config, targets=others, **changes)


@pytest.mark.parametrize(("width", "group"), [(256, 128), (64, 64), (96, 32), (48, None)])
def test_a_group_divides_the_inputs_of_every_layer(width, group):
    assert group_size(tiny_model(hidden_size=width, intermediate_size=256, num_attention_heads=4)) == group


def test_a_rank_gets_the_lowest_one_that_vllm_takes():
    assert [vllm_rank(rank) for rank in (1, 4, 16, 33, 512, 513)] == [1, 8, 16, 64, 512, None]


def test_a_base_that_is_quantized_on_disk_cannot_be_merged_into():
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    [(_, line)] = check(model, LoraConfig(target_modules=["q_proj"]), "merge")
    assert "quantized by gptq cannot be merged into" in line


def perturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize(
    ("adapter", "wrong"),
    [
        ({"target_modules": ["lm_head"]}, True),
        ({"target_modules": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 2)]}, True),
        ({"target_modules": "all-linear"}, False),
        ({"target_modules": ["q_proj"], "use_dora": True}, False),
        ({"target_modules": ["q_proj"], "use_rslora": True, "r": 64}, False),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    ],
)
def test_the_comparison_finds_a_wrong_merge_and_passes_a_right_one(adapter, wrong):
    model = perturbed(get_peft_model(tiny_model(tie_word_embeddings=True), LoraConfig(**adapter)))
    with pytest.raises(UserError, match="is not the same model as the adapter") if wrong else nullcontext():
        merge(model, ROWS)


def test_a_merge_that_peft_refuses_is_one_line():
    model = perturbed(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], lora_bias=True)))
    with pytest.raises(UserError, match="cannot be merged: Impossible to merge"):
        merge(model, ROWS)


@pytest.mark.parametrize("shape", ["llama", "qwen3", "phi3", "gemma3_text", "gpt2", "gpt_neox"])
def test_the_trial_goes_through_on_every_family_with_two_layers_and_a_small_vocabulary(shape, tmp_path):
    layers = {"n_layer": 5} if shape == "gpt2" else {"num_hidden_layers": 5}
    tiny_model(shape, **layers, vocab_size=10_003, tie_word_embeddings=True).config.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    text = shrink(AutoConfig.from_pretrained(tmp_path / "base")).get_text_config()
    assert (text.num_hidden_layers, text.vocab_size) == (2, 4096 + 10_003 % 4096) and text.tie_word_embeddings
    base = str(tmp_path / "base")
    detail = attempt("merge", base, Lora(r=4), 40, Renderer.load(base), [], tmp_path / "trial")
    assert re.fullmatch("logits .* after saving, loading and merging in float32", detail)


def test_a_small_vocabulary_is_kept_and_a_wide_one_keeps_what_does_not_divide_evenly():
    assert shrink(tiny_model().config).vocab_size == 259
    assert shrink(tiny_model(vocab_size=9001).config).vocab_size % 4096 == 9001 % 4096


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "nf4", "gptq", "awq"])
def test_the_trial_quantizes_and_loads_again_in_a_fresh_process(scheme, tmp_path, monkeypatch):
    pytest.importorskip(EXTRAS[scheme][1][0], reason="an optional package")
    if scheme != "int8":
        fork_fresh_processes(monkeypatch)
    tiny_model(**WIDE).config.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    (tmp_path / "trial").mkdir()
    detail = attempt(scheme, base, Lora(r=4), 40, Renderer.load(base), [], tmp_path / "trial")
    assert "in a fresh process, at 40 tokens" in detail


@pytest.fixture
def project(write_project, base):
    folder = write_project({}, lora={"r": 4})
    tiny_model(tie_word_embeddings=True).save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    Path("small.yaml").write_text(Path("small.yaml").read_text().replace(base, "base"))
    return folder


def preflight(*words):
    code = main(["preflight", "-c", "small.yaml", *words])
    return code, json.loads(Path("logs/small/preflight.json").read_text())


def test_preflight_says_what_fails_in_its_exit_code_and_in_json(project, capsys):
    code, result = preflight()
    assert code == 0 and result["failed"] == [] and result["targets"] == ["merge", "vllm"]
    assert [it["verdict"] for it in result["checks"]] == ["ok"] * 3
    assert "verdict: passed for merge, vllm" in capsys.readouterr().out
    code, result = preflight("--model.lora.targets", '["lm_head"]', "--model.lora.dora", "true")
    assert code == 1 and result["failed"] == ["merge", "vllm"]
    fails = {(it["target"], it["check"]) for it in result["checks"] if it["verdict"] == "fails"}
    assert fails == {("merge", "tied embeddings"), ("merge", "trial"), ("vllm", "DoRA")}
    assert preflight("--for", "vllm", "--model.lora.targets", '["lm_head"]')[0] == 0


def test_a_package_that_is_not_there_is_a_line_and_no_failure(project, monkeypatch, capsys):
    from formtune.export import quantize

    monkeypatch.setitem(quantize.EXTRAS, "int8", ("quantize", ("no-such-package",)))
    code, result = preflight("--for", "int8")
    assert code == 0 and quantize.missing_package("int8") == "needs no-such-package; pip install -e '.[quantize]'"
    assert [it["verdict"] for it in result["checks"]] == ["ok", "not tried"]
    assert "only the rules were checked" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--for", "onnx"], "--for: no target 'onnx'"),
        (["--for", ","], "--for: no target ''; choose from"),
        (["--model.lora.targets", '["nope"]'], "no layer is called 'nope'"),
        (["--model.lora.layer_replication", "x"], "layer_replication"),
        (["--model.base", "gone"], "no folder gone"),
    ],
)
def test_mistakes_are_one_line(project, capsys, words, message):
    assert main(["preflight", "-c", "small.yaml", *words]) == 2
    output = capsys.readouterr().err
    assert message in output and len(output.splitlines()) == 1


@pytest.mark.slow
def test_fit_refuses_what_would_merge_into_another_model_and_warns_of_what_vllm_refuses(project, capsys):
    assert main(["train", "-c", "small.yaml", "--model.lora.targets", '["lm_head"]']) == 2
    assert "shares between input and output" in capsys.readouterr().err
    assert not list(Path("logs").glob("small/*/metrics.json"))
    words = ["--model.lora.dora", "true", "--trainer.max_steps", "1", "--baselines", "[]"]
    assert main(["train", "-c", "small.yaml", *words]) == 0
    assert "preflight: model.lora.dora is not supported by vLLM" in capsys.readouterr().out


def test_the_configuration_that_rules_see_is_the_one_that_is_trained():
    config = lora_config(tiny_model(), Lora(r=8, rslora=True, targets=["q_proj"]))
    assert (config.r, config.lora_alpha, config.use_rslora, config.target_modules) == (8, 16, True, {"q_proj"})


def test_preflight_says_how_a_prompt_looks_that_chat_servers_cannot_render(project):
    Path("base/chat_template.jinja").unlink()
    Renderer.load.cache_clear()
    code, result = preflight("--for", "vllm")
    [check] = [it for it in result["checks"] if it["check"] == "chat template"]
    assert code == 0 and check["verdict"] == "warning"
    assert check["detail"].startswith("the base has no chat template, which chat servers need; a prompt is the")
