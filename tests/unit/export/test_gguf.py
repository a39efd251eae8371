"""A GGUF file answers as the adapter did, from prompts that have the tokens of training; what differs is named."""

import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest

from conftest import SCHEMA, TEMPLATE, byte_tokenizer, train_small
from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.cli import main
from formtune.errors import UserError
from formtune.evaluation.outcomes import read_outcomes
from formtune.export import gguf, quantize
from formtune.export.exported import go_template, verify
from formtune.export.llama_cpp import LlamaServer, check_prompts, prompt_fault
from formtune.export.measure import call_fresh

DEMO = Path(__file__).parents[3] / "src/formtune/demo/base"
MISSING = quantize.missing_package("gguf")
needs_llama_cpp = pytest.mark.skipif(bool(MISSING), reason=f"the extra `gguf`: {MISSING}")
CONVERSATION = [
    {"role": "system", "content": " Number it. "}, {"role": "user", "content": "number 5"},
    {"role": "assistant", "content": "x"},
]  # fmt: skip
TEMPLATES = {
    "ChatML": TEMPLATE,
    "a default system prompt": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    + TEMPLATE,
    "Llama 3": "{% for m in messages %}<h>{{ m.role }}</h>\n\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}",
    "Mistral": "{% for m in messages %}{% if m.role == 'system' %}[SYS]{{ m.content }}[/SYS]{% elif m.role == 'user' %}"
    "[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    "braces": TEMPLATE.replace("<|im_start|>", "<|im_start|>{{ '{{' }}"),
}


def renderer_of(template=TEMPLATE) -> Renderer:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Renderer(tokenizer)


def row_of(renderer: Renderer, turns=CONVERSATION) -> Row:
    return next(renderer.encode([(turns, "test.jsonl:1")]))


def read_go(template: str, messages: list[dict]) -> str:
    """What Go's text/template writes, of the few actions that a Modelfile needs."""
    tokens = re.split(r"(\{\{.*?\}\})", template)

    def walk(position, live, scope):
        """Write from a position up to the matching `end`, and return what follows it."""
        is_live, texts = live, []
        while position < len(tokens):
            token = tokens[position]
            action = token[2:-2].strip() if token.startswith("{{") else None
            if action is None:
                texts.append(token if is_live else "")
            elif action.startswith("range $i, $_ := .Messages"):
                for i, message in enumerate(messages):
                    text, after = walk(position + 1, is_live, {"i": i, **message})
                    texts.append(text)
                position = after
                continue
            elif action.startswith("if "):
                text, position = branches(position, is_live, scope)
                texts.append(text)
                continue
            elif action == "end" or action.startswith("else"):
                break
            elif action == ".Content":
                texts.append(scope["content"] if is_live else "")
            else:
                texts.append(json.loads(action) if is_live else "")
            position += 1
        closes = tokens[position][2:-2].strip() == "end" if position < len(tokens) else False
        return "".join(texts), position + 1 if closes and scope.get("in") != "if" else position

    def holds(condition, scope):
        _, left, right = condition.split()
        return (scope["role"] if left == ".Role" else scope["i"]) == json.loads(right)

    def branches(position, live, scope):
        decided, out = not live, ""
        while True:
            action = tokens[position][2:-2].strip().removeprefix("else").strip()
            if action == "end":
                return out, position + 1
            chosen = not decided and (not action or holds(action.removeprefix("if "), scope))
            text, position = walk(position + 1, chosen, scope | {"in": "if"})
            decided, out = decided or chosen, out + text

    return walk(0, True, {})[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_modelfile_renders_every_turn_as_the_chat_template(name):
    renderer = renderer_of(TEMPLATES[name])
    template = go_template(renderer, [row_of(renderer)])
    assert template
    for turns in (CONVERSATION[:2], CONVERSATION[1:2], [*CONVERSATION, CONVERSATION[1]]):
        assert read_go(template, turns) == renderer._render(turns, True)


def test_a_template_that_go_cannot_write_gives_a_modelfile_without_one():
    trimming = renderer_of(TEMPLATE.replace("m.content", "m.content | trim"))
    assert go_template(trimming, [row_of(trimming)]) is None
    assert go_template(trimming, [row_of(trimming, CONVERSATION[1:])]), "these rows have nothing to trim"


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("it has a second BOS; from token 1 on they are ['<pad>', '<', 's'", lambda text: "<pad>" + text),
        ("its BOS is missing; from token 0 on they are ['<', 's'", lambda text: text.removeprefix("<pad>")),
        ("the system turn is trimmed", lambda text: text.replace(" Number it. ", "Number it.")),
        ("the system turn is missing or altered", lambda text: text.replace("<s> Number it. </s>", "")),
        ("the switch that turns thinking on or off is lost", lambda text: text.removesuffix("<think>\n</think>\n")),
        ("a default chat template (ChatML)", lambda text: text.replace("<s>", "<|im_start|>system\n")),
        (
            "another chat template; from token 19 on they are ['y', 's', '>'",
            lambda text: text.replace("</s>", "</sys>"),
        ),
    ],
)
def test_what_a_server_does_to_a_prompt_is_named_and_shown_from_where_it_differs(fault, change):
    template = (
        "<pad>{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '</' + m.role[0] + '>' }}\n{% endfor %}"
    )
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template + "{% if add_generation_prompt %}<think>\n</think>\n{% endif %}"
    tokenizer.bos_token = "<pad>"
    renderer = Renderer.__new__(Renderer)  # the template need not be one to train on
    renderer.tokenizer, renderer.templated = tokenizer, True
    text = tokenizer.apply_chat_template(CONVERSATION[:2], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    row = Row(ids, [], "number 5", "x", "test.jsonl:1", messages=CONVERSATION)
    assert prompt_fault(row, ids, renderer) is None
    message = prompt_fault(row, tokenizer(change(text), add_special_tokens=False)["input_ids"], renderer)
    assert message and fault in message and ", and formtune's [" in message and "\n" not in message


def test_the_same_text_in_other_tokens_is_another_tokenizer():
    renderer = Renderer.load(str(DEMO))
    row = row_of(renderer)
    tokens = [renderer.tokenizer.decode([id]) for id in row.prompt_ids]
    place, letters = tokens.index("number"), renderer.tokenizer(list("number"), add_special_tokens=False)["input_ids"]
    ids = [*row.prompt_ids[:place], *(id for [id] in letters), *row.prompt_ids[place + 1 :]]
    message = prompt_fault(row, ids, renderer)
    assert message and "the same text is tokenized differently; from token" in message


def test_a_converter_that_was_not_reviewed_is_not_run(tmp_path, monkeypatch):
    (tmp_path / f"{gguf.CONVERTER}.py").write_text("raise SystemExit(7)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match="not the reviewed release of llama.cpp's .*; pip install .* or name convert_hf"
    ):
        gguf.to_gguf("a", str(tmp_path / "out"), [])


def test_what_is_missing_for_a_quantization_is_reported_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("formtune.commands.export.missing_package", lambda *_: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    script = tmp_path / "convert_hf_to_gguf.py"
    script.touch()
    words = ["export", "logs/a/b", "--as", "gguf", "--quant", "q4_k_m", "--converter"]
    assert main([*words, str(script)]) == 2
    assert "all but f16, bf16, q8_0 need llama.cpp's program llama-quantize; put it on PATH" in capsys.readouterr().err
    assert main([*words, "gone.py"]) == 2
    assert "gone.py: not the reviewed release" in capsys.readouterr().err
    assert main(["export", "logs/a/b", "--as", "gguf-adapter", "--converter", str(script)]) == 2
    assert f"no convert_lora_to_gguf.py beside {script}; name convert_hf_to_gguf.py" in capsys.readouterr().err
    built = tmp_path / "build/bin/llama-quantize"
    built.parent.mkdir(parents=True)
    built.touch(stat.S_IRWXU)
    assert gguf.quantizer(str(script)) == str(built)


@pytest.mark.slow
def test_an_adapter_is_converted_for_its_base_by_the_script_beside_the_converter(tmp_path):
    write = "import sys\nopen(sys.argv[sys.argv.index('--outfile') + 1], 'w').write(' '.join(sys.argv[1:]))\n"
    for name in ("convert_hf_to_gguf.py", gguf.LORA_CONVERTER):
        (tmp_path / name).write_text(write)
    arguments = {"source": "BASE", "target": str(tmp_path / "out"), "rows": [], "quant": "q8_0", "adapter": "ADAPTER"}
    call_fresh(gguf.to_gguf, "no file", converter=str(tmp_path / "convert_hf_to_gguf.py"), **arguments)
    model, adapter = (tmp_path / "out" / name for name in (gguf.FILE, gguf.ADAPTER))
    assert model.read_text() == f"BASE --outtype q8_0 --outfile {model}"
    assert adapter.read_text() == f"ADAPTER --base BASE --outfile {adapter}"
    assert quantize.folder_name("gguf", "q8_0", "ADAPTER") == "gguf-adapter-q8_0"


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(quantize, "distributions", lambda name: [] if name == "xllamacpp" else [name])
    assert quantize.missing_package("gguf") == "needs xllamacpp; pip install -e '.[gguf]'"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a task that was trained once, on the demo's base."""
    folder = tmp_path_factory.mktemp("task")
    shutil.copytree(DEMO, folder / "base")
    return train_small(folder, epochs=6, system="Number it.")


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.contrib
def test_an_export_answers_as_the_adapter_and_is_served_checked_and_promoted(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    run = Path("logs/small/one")
    assert main(["export", str(run), "--as", "gguf", "--quant", "f16"]) == 0
    out = capsys.readouterr().out
    rows = read_outcomes(run / "outcomes/after.jsonl")
    same = [a.answer == b.answer for a, b in zip(rows, read_outcomes(run / "outcomes/gguf-f16.jsonl"), strict=True)]
    assert " tokens/s (constrained: " in out and "), one answer, input as long as" in out
    assert f"{sum(same)} of {len(rows)} answers are identical to the run's; every prompt has the same tokens" in out
    assert all(same), "16 bits change no answer of so small a model"
    manifest = verify(run / "gguf-f16")
    assert manifest["kind"] == "gguf" and manifest["verification"]["closeness"]["kl"] < 1e-3
    assert {"model.gguf", "Modelfile", "request.json", "tokenizer.json", "format.json"} <= manifest["files"].keys()
    modelfile = (run / "gguf-f16/Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"' in modelfile and 'SYSTEM """Number it."""' in modelfile
    request = json.loads((run / "gguf-f16/request.json").read_text())
    assert request["format"] == SCHEMA and request["messages"][0] == {"role": "system", "content": "Number it."}
    server = LlamaServer(run / "gguf-f16/model.gguf", 512, name="small")
    url = f"{server.url}/v1"
    assert main(["check-endpoint", url, "-c", "small.yaml"]) == 0
    assert "prompts: same tokens as formtune's in every row" in capsys.readouterr().out
    checked = read_outcomes(Path("logs/small/endpoint/outcomes/after.jsonl"))
    assert [it.answer for it in checked] == [it.answer for it in rows]
    assert main(["check-endpoint", url, "-c", "small.yaml", "--constrained", "true", "--min_exact", "1"]) == 0
    capsys.readouterr()
    card = (run / "gguf-f16/README.md").read_text()
    snippet = card.partition("```python\n")[2].partition("```")[0].replace("http://127.0.0.1:8080/v1", url)
    monkeypatch.chdir(run / "gguf-f16")
    exec(snippet, {})
    assert json.loads(capsys.readouterr().out).keys() == {"n", "s"}
    monkeypatch.chdir(trained)
    assert main(["promote", str(run), "--as", "gguf-f16", "--to", "production"]) == 0
    assert main(["serve", "production", "--engine", "transformers"]) == 2
    assert "use llamacpp for GGUF files, and only for them" in capsys.readouterr().err


@pytest.mark.slow
@needs_llama_cpp
def test_an_adapter_beside_its_base_answers_as_in_training(trained, monkeypatch):
    converter = os.environ.get("FORMTUNE_TEST_LLAMA_CPP")
    if not converter:
        pytest.skip("FORMTUNE_TEST_LLAMA_CPP names no convert_hf_to_gguf.py of a llama.cpp checkout")
    monkeypatch.chdir(trained)
    run = Path("logs/small/one")
    assert main(["export", str(run), "--as", "gguf-adapter", "--quant", "f16", "--converter", converter]) == 0
    answers = [read_outcomes(run / f"outcomes/{name}.jsonl") for name in ("after", "gguf-adapter-f16")]
    assert [a.answer for a in answers[0]] == [b.answer for b in answers[1]]
    assert {"model.gguf", "adapter.gguf"} <= verify(run / "gguf-adapter-f16")["files"].keys()
    assert "ADAPTER ./adapter.gguf" in (run / "gguf-adapter-f16/Modelfile").read_text()
    assert "--lora adapter.gguf" in (run / "gguf-adapter-f16/README.md").read_text()


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize(
    ("fault", "template"),
    [
        # llama.cpp then writes the system prompt into the user's turn.
        (
            r"another chat template; from token 1 on they are \['user'",
            "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}",
        ),
        ("another chat template", TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")),
        (None, TEMPLATE),
    ],
)
def test_a_file_with_another_template_is_refused_by_the_prompts_it_renders(fault, template, tmp_path):
    renderer = Renderer.load(str(DEMO))
    folder = shutil.copytree(DEMO, tmp_path / "base")
    (folder / "chat_template.jinja").write_text(template if "for m in" in template else template + TEMPLATE)
    call_fresh(gguf.to_gguf, "no file", source=str(folder), target=str(tmp_path / "out"), rows=[], quant="f16")
    server = LlamaServer(tmp_path / "out/model.gguf", 512)
    rows = [row_of(renderer)]
    if fault is None:
        return check_prompts(server, rows, renderer)
    with pytest.raises(UserError, match=f"test.jsonl:1: .*{fault}"):
        check_prompts(server, rows, renderer)


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.contrib
def test_preflight_goes_the_whole_way_with_random_layers(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    assert main(["preflight", "-c", "small.yaml", "--for", "gguf"]) == 0
    [trial] = [
        it for it in json.loads(Path("logs/small/preflight.json").read_text())["checks"] if it["check"] == "trial"
    ]
    assert trial["verdict"] == "ok" and "llama.cpp renders 16 prompts as training does" in trial["detail"]
