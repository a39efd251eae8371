"""`formtune preflight`: check before training whether the result can go to production."""

import signal
import tempfile
import warnings
from collections import namedtuple
from pathlib import Path

from formtune.base.folder import context_length, meta_model
from formtune.base.row import quantile
from formtune.commands import COMMANDS
from formtune.configuration.terminal import echo
from formtune.data.preparation import encode_inputs, production_rows
from formtune.errors import UserError, first_line
from formtune.export.quantize import missing_package
from formtune.export.rules import MERGED, TARGETS, check
from formtune.files import LOGS, optional, write_json
from formtune.model.lora import Lora, lora_config
from formtune.tasks.parsers import read_task, task_parser
from formtune_contrib import task_file
from formtune_contrib.trial import ANSWER, attempt

RENDERED_PROMPTS = 16  # prompts that llama.cpp must render as training does
Check = namedtuple("Check", ["target", "check", "verdict", "detail"])


def run(command: str, args: list[str]) -> int:
    """Check, print, write `logs/<task>/preflight.json`; 1 if a target would fail."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that no file or process is left
    warnings.simplefilter("ignore")  # libraries warn of what the trial measures
    parser = task_parser(command, COMMANDS[command].description, {"model.lora", "model.adapter"})
    parser.add_class_arguments(Lora, "model.lora")
    parser.add_argument("--model.adapter", type=str | None, help="As in training")
    uses = f"Planned uses of the adapter, of {', '.join(TARGETS)}"
    parser.add_argument("--for", type=str, default="merge,vllm", dest="targets", help=uses)
    config, settings = read_task(parser, args)
    if config.model.adapter:
        optional("warm_start.adapter", "take_settings", "model.adapter")(config.model)
    targets, base = [name.strip() for name in config.targets.split(",")], config.model.base
    if unknown := [name for name in targets if name not in TARGETS]:
        raise UserError(f"--for: no target {unknown[0]!r}; choose from {', '.join(TARGETS)}")
    lora, model = Lora(**vars(config.model.lora)), meta_model(base)
    adapter = lora_config(model, lora)
    if settings.production is None and settings.sources["train"] is None:
        raise UserError("data.train: name a file to train on")
    prompts = production_rows(settings) or encode_inputs(settings, settings.sources["train"], "train")
    length = min(quantile([len(row) for row in prompts], 95), (context_length(base) or 10**9) - ANSWER)
    rendered = sorted((row for row in prompts if len(row) <= length), key=len, reverse=True)[:RENDERED_PROMPTS]
    checks = []
    for target in targets:
        broken = [Check(target, name, "fails", line) for name, line in check(model, adapter, target)]
        checks += broken or [Check(target, "rules", "ok", "no rule broken")]
        if missing := missing_package(target):
            checks.append(Check(target, "trial", "not tried", f"{missing}; only the rules were checked"))
        elif target in MERGED:
            try:
                with tempfile.TemporaryDirectory(prefix="formtune-preflight-") as folder:
                    detail = attempt(target, base, lora, length, settings.renderer, rendered, Path(folder))
                checks.append(Check(target, "trial", "ok", detail))
            except Exception as error:  # it would fail after training too
                checks.append(Check(target, "trial", "fails", first_line(error)))
    if settings.renderer.note and "vllm" in targets:
        checks.append(Check("vllm", "chat template", "warning", settings.renderer.note))
    failed = [name for name in targets if any(c.target == name and c.verdict == "fails" for c in checks)]
    path = LOGS / config.task / "preflight.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    summary = {"targets": targets, "failed": failed, "input_tokens": length}
    write_json(path, summary | {"checks": [c._asdict() for c in checks]})
    for c in checks:
        echo(f"{c.target}, {c.check}, {c.verdict}: {c.detail}", "green" if c.verdict == "ok" else "yellow")
    print(f"checks: {path}")
    untried = [c.target for c in checks if c.verdict == "not tried"]
    note = f"; not tried: {', '.join(untried)}" if untried else ""
    echo(f"verdict: {'failed' if failed else 'passed'} for {', '.join(failed or targets)}{note}", "bold")
    print(f"next: {'change what fails' if failed else f'formtune train -c {task_file(args)}'}")
    return int(bool(failed))
