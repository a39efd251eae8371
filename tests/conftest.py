"""Tiny models and tokenizers made on the spot: every test runs without a network and in seconds."""

import contextlib
import json
import os
import random
import runpy
import tempfile
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("FORMTUNE_TEST_GPU", "")  # `make test-gpu` names one
os.environ["OMP_NUM_THREADS"] = "1"  # in all processes: with models this small a second thread only waits
# Here and in every process started from here, no other machine can be reached.
os.environ["FORMTUNE_ATTEMPTS"] = tempfile.mkstemp(prefix="attempts")[1]
os.environ["PYTHONPATH"] = f"{Path(__file__).parent}/offline:{os.environ.get('PYTHONPATH', '')}".rstrip(":")

import pytest
import torch
import yaml
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from formtune.base.row import Row

settings.register_profile("untimed", deadline=None)  # other processes may slow a machine down
settings.load_profile("untimed")
runpy.run_path(f"{Path(__file__).parent}/offline/sitecustomize.py")
ATTEMPTS = Path(os.environ["FORMTUNE_ATTEMPTS"])
SHARED = Path(__file__).resolve().parents[2] / "shared"
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# One shape per family: (config's model type, its sizes).
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES = {
    "llama": SIZES,
    "qwen3": SIZES | {"head_dim": 8},
    "mistral": SIZES | {"sliding_window": 8},
    "phi3": SIZES | {"pad_token_id": 0},
    "gemma3_text": SIZES | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
}
# For `parametrize`: the quick tests take one family.
FAMILIES = ["llama", *(pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES if shape != "llama")]


def row(prompt, target=()):
    return Row(list(prompt), list(target), "", "", "f:1")


def random_rows(seed, count=12, vocabulary=259, longest=12):
    """Rows of a few system prompts, of few-shot prompts that continue them, and of none."""
    rng = random.Random(seed)

    def ids(n):
        return [rng.randrange(3, vocabulary) for _ in range(n)]

    beginnings = [ids(rng.randrange(20, 60)) for _ in range(rng.randrange(1, 4))]
    beginnings += [beginnings[0] + ids(rng.randrange(5, 20)), []]
    return [
        row(rng.choice(beginnings) + ids(rng.randrange(1, longest)), ids(rng.randrange(1, longest)))
        for _ in range(count)
    ]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(SPECIAL + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=SPECIAL[1:2]
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_model(shape: str = "llama", seed: int = 0, **changes):
    """A random two-layer model of the family, float32, context 512."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 259, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 2}
    config = AutoConfig.for_model(shape, **(sizes | SHAPES[shape] | changes))
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(autouse=True)
def record_case(request, record_property):
    """Records the number and the title that a test has in the fault matrix, for docs/benchmarks/faults.md."""
    for mark in request.node.iter_markers("case"):
        record_property("case", mark.args[0])
        record_property("title", mark.args[1])


def pytest_runtest_setup(item):
    if item.get_closest_marker("contrib") and find_spec("formtune_contrib") is None:
        pytest.skip("the package formtune_contrib was deleted")


@pytest.fixture(autouse=True)
def no_network():
    """Fails a test that tries to reach another machine, also where a library swallows the refusal."""
    ATTEMPTS.write_text("")
    yield
    assert ATTEMPTS.read_text() == "", "tests may not use the network"


def pytest_unconfigure():
    ATTEMPTS.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    """Folder of a tiny random Llama with the byte tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "s": {"type": "string"}},
    "required": ["n", "s"],
    "additionalProperties": False,
}


WORDY = [
    "amber",
    "basil",
    "candle",
    "delta",
    "ember",
    "fable",
    "garnet",
    "hazel",
    "ivory",
    "kettle",
    "lemon",
    "maple",
    "nylon",
    "ocean",
    "pencil",
    "quartz",
]


@pytest.fixture
def task(tmp_path):
    """Writes a small task (schema, rows) and returns the folder and a function that writes rows."""
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))

    def write(name: str, rows) -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return tmp_path, write


def pair(n: int, prompt: str | None = None) -> dict:
    """A row of the small task."""
    return {"prompt": prompt or f"number {n}", "completion": json.dumps({"n": n, "s": f"x{n}"}, separators=(",", ":"))}


@pytest.fixture
def write_project(task, base, monkeypatch):
    """A function that writes a task in YAML and makes its folder the working directory; it returns the folder."""
    folder, write = task

    def written(trainer: dict, lora: dict | None = None, data: dict | None = None) -> Path:
        monkeypatch.chdir(folder)
        monkeypatch.delenv("FORMTUNE_RUN", raising=False)
        write("train.jsonl", [pair(n) for n in range(60)])
        schema = {"class_path": "JsonSchema", "init_args": {"schema": "schema.json"}}
        config = {
            "model": {"base": base, "max_new_tokens": 24} | ({"lora": lora} if lora else {}),
            "data": {"train": "train.jsonl", "format": schema} | (data or {}),
            "trainer": {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False} | trainer,
        }
        Path("small.yaml").write_text(yaml.safe_dump(config))
        return folder

    return written


def train_small(folder: Path, epochs: int, **data) -> Path:
    """Train the task of numbers on the base in `folder`; returns the folder."""
    from formtune.cli import main

    with contextlib.chdir(folder):
        Path("schema.json").write_text(json.dumps(SCHEMA))
        Path("train.jsonl").write_text("".join(json.dumps(pair(n)) + "\n" for n in range(60)))
        format = {"class_path": "JsonSchema", "init_args": {"schema": "schema.json"}}
        config = {
            "model": {"base": "base", "max_new_tokens": 24, "lora": {"r": 8, "targets": "all-linear"}},
            "data": {"train": "train.jsonl", "format": format} | data,
            "trainer": {
                "max_epochs": epochs,
                "accelerator": "cpu",
                "precision": "32-true",
                "enable_progress_bar": False,
            },
        }
        Path("small.yaml").write_text(yaml.safe_dump(config))
        words = ["--run", "one", "--model.optimizer.lr", "0.02", "--baselines", "[]"]
        assert main(["train", "-c", "small.yaml", *words]) == 0
    return folder


def write_splits(base: str, max_new_tokens: int, train_rows: int = 20, test_rows: int = 12) -> None:
    """Write the task of numbers into the working directory, with a file and a name of its own for each split."""
    for name, start, rows in (("train", 0, train_rows), ("validation", 100, train_rows), ("test", 200, test_rows)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(pair(n)) + "\n" for n in range(start, start + rows)))
    Path("schema.json").write_text(json.dumps(SCHEMA))
    data = {name: f"{name}.jsonl" for name in ("train", "validation", "test")} | {
        "system": "Number it.",
        "near_duplicates": 1,
        "format": {"class_path": "JsonSchema", "init_args": {"schema": "schema.json"}},
    }
    config = {"model": {"base": base, "max_new_tokens": max_new_tokens}, "data": data}
    Path("small.yaml").write_text(yaml.safe_dump(config))


def shared(path: str) -> Path:
    """A file of the development data beside the project; skips the test where it is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs the development data ({path}), which is not part of the project")
    return SHARED / path


def write_run(folder: Path, base: str, rows: list[tuple[str, bool]], rank: int = 4) -> Path:
    """A finished run of the task `small` as far as deploying it goes: a random adapter and its test rows.

    Args:
        folder: Folder of the run.
        base: Folder of its base.
        rows: Input of each test row, and whether the answer is right.
        rank: Of the adapter.
    """
    from peft import LoraConfig, get_peft_model

    from formtune.evaluation.outcomes import Outcome, write_outcomes
    from formtune.export.manifest import write_manifest
    from formtune.formats import JsonSchema

    adapter = folder / "adapter"
    torch.manual_seed(rank)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(adapter, save_embedding_layers=False)
    byte_tokenizer().save_pretrained(adapter)
    (adapter / "README.md").unlink(missing_ok=True)
    (adapter / "format.json").write_text(json.dumps(JsonSchema(SCHEMA).to_dict()))
    config = {"task": "small", "model": {"base": base, "max_new_tokens": 8, "quantize": None}}
    config |= {"data": {"system": "Number it."}, "trainer": {"precision": "32-true"}}
    (adapter / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    write_manifest(adapter, "adapter", base, "abc")
    write_outcomes(
        folder / "outcomes/after.jsonl",
        [
            Outcome(f"t:{i}", "", 9, text, "{}", "{}" if right else "", "ok" if right else "empty", "", right, 2 * right,
                    2 * right + 2, {"n": right, "s": right})
            for i, (text, right) in enumerate(rows)
        ],
    )  # fmt: skip
    return folder


def selected(cut=True, **splits):
    """What is selected of the rows of these splits, with the rows that are used by split."""
    from formtune.data.selection import select

    for name, rows in splits.items():
        for row in rows:
            row.split = name
    chosen, selection = select([row for rows in splits.values() for row in rows], 0.8, cut=cut)
    selection.examples = {name: [row for row in chosen if row.split == name] for name in splits}
    return selection


def outcome(number, kind="ok", tokens=10, origin="", target='{"n":1,"s":"a"}', answer=None):
    """An outcome with two fields, of which `n` is right only if the whole answer is."""
    from formtune.evaluation.outcomes import Outcome

    answer = target if answer is None else answer
    return Outcome(
        f"f:{number}", origin, tokens, f"input {number}", target, answer, kind, "why", kind in ("ok", "content"),
        2 if kind == "ok" else 1, 4, {"n": kind == "ok", "s": True},
    )  # fmt: skip


def answers(rows, exact, right):
    """The first ones in a valid format, of these the first ones right, too."""
    kinds = ["ok"] * right + ["content"] * (exact - right) + ["syntax"] * (rows - exact)
    return [outcome(n, kind) for n, kind in enumerate(kinds)]
