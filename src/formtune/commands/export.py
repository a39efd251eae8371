"""`formtune export`: help and mistakes on the command line do not import torch."""

import signal
import warnings
from pathlib import Path
from typing import Any

from formtune.commands import COMMANDS
from formtune.errors import UserError
from formtune.export.exported import KINDS
from formtune.export.gguf import LORA_CONVERTER, QUANTIZATIONS, WRITTEN, converter_script, quantizer
from formtune.export.quantize import folder_name, missing_package
from formtune.tasks.parsers import CommandParser


def run(command: str, args: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that no file or process is left
    warnings.simplefilter("ignore")  # libraries warn of what is measured
    parser = CommandParser(command, COMMANDS[command].description)
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of a finished run")
    kinds = (*KINDS, "gguf-adapter")
    parser.add_argument("--as", metavar="KIND", dest="kind", choices=kinds, default="adapter", help="Kind of export "
                        f"(default: %(default)s): {', '.join(kinds)}")  # fmt: skip
    parser.add_argument("--max_loss", metavar="FRACTION", type=float, default=0.01, help="Fraction of the test rows "
                        "that format/exact and joint/exact may lose (default: %(default)s)")  # fmt: skip
    parser.add_argument("--quant", choices=QUANTIZATIONS, help="With --as gguf and gguf-adapter (default: q8_0)")
    parser.add_argument(
        "--converter", metavar="PATH", help="With --as gguf and gguf-adapter: convert_hf_to_gguf.py of llama.cpp"
    )
    config = parser.parse_args(args)
    if not 0 <= config.max_loss < 1:
        raise UserError("--max_loss: a fraction of the test rows, from 0 and below 1, such as 0.01")
    kind, _, separate = config.kind.partition("-")
    if missing := missing_package(kind):
        raise UserError(f"--as {config.kind}: {missing}")
    options: dict[str, Any] = {}
    if kind == "gguf":
        options = {"quant": config.quant or "q8_0", "converter": config.converter}
        script = converter_script(config.converter)
        if separate:
            options["adapter"] = str(config.run / "adapter")
            if not script.with_name(LORA_CONVERTER).is_file():
                remedy = "name convert_hf_to_gguf.py of a llama.cpp checkout (--converter)"
                raise UserError(f"--as gguf-adapter: no {LORA_CONVERTER} beside {script}; {remedy}")
        if options["quant"] not in WRITTEN:
            quantizer(config.converter)
    elif config.quant or config.converter:
        raise UserError("--quant and --converter need --as gguf or gguf-adapter")
    name = folder_name(kind, **options)
    target = config.run / name
    if kind != "adapter" and target.exists():
        raise UserError(f"{target}: exists; remove it to export again")
    # Several seconds: torch, transformers.
    from formtune.evaluation.outcomes import COMPARED
    from formtune.export.exporter import FinishedRun, export
    from formtune.export.measure import Closeness

    metrics = export(FinishedRun(config.run), kind, config.max_loss, **options)
    print(f"{name}: {target}, {metrics['bytes'] / 1e6:,.1f} MB of weights")
    constrained = metrics.get("constrained_tokens_per_second")
    speed = f"{metrics['tokens_per_second']:,.0f} tokens/s"
    speed += f" (constrained: {constrained:,.0f})" if constrained else ""
    print(f"speed: {speed}, one answer, input as long as production's P95")
    print(f"against the float32 adapter: {Closeness(**metrics['closeness'])}")
    for rate in COMPARED:
        right, rows, gained, lost = metrics[rate].values()
        print(f"{rate} {right / rows:.1%} of {rows:,} test rows, {gained} gained, {lost} lost against the run")
    others = "; prompts have the same tokens, so others differ by rounding" if options else ""
    print(f"{metrics['same_answers']:,} of {rows:,} answers are identical to the run's{others}")
    if "promote" in COMMANDS:  # of an optional package
        print(f"next: formtune promote {config.run} --as {name} --to production, or formtune serve {target}")
