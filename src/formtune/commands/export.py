"""`formtune export`: reads the command line; what it says and refuses costs no import of torch."""

from __future__ import annotations

import warnings
from pathlib import Path

from formtune.commands import COMMANDS
from formtune.configuration.parsing import CommandParser
from formtune.errors import UserError
from formtune.training.manifest import KINDS

HELP = """\
Whatever is written has been loaded again in a fresh process by plain transformers and PEFT, compared with the adapter
logit by logit, and has answered the run's test rows. It is refused where it is another model, or where more test rows
than --max_loss fell out of format or lost their content. RUN/exports.json holds the figures, RUN/outcomes/KIND.jsonl
each answer, for `formtune compare`.

  adapter   what fit wrote: verified, and measured as it will be loaded
  merged    the base with the adapter in its weights, in the base's own precision
  int8      merged, weights in 8 bits by torchao
  nf4       merged, weights in 4 bits by bitsandbytes
  gptq awq  merged, weights in 4 bits by GPTQModel or llm-compressor, which look at training rows

examples:
  formtune export logs/demo/RUN
  formtune export logs/demo/RUN --as merged
  formtune export logs/demo/RUN --as int8 --max_loss 0.02
  formtune export logs/demo/RUN --as gptq --interpreter ../llmcompressor/bin/python
"""


def run(command: str, args: list[str]) -> int:
    """Export, print the row of what was exported beside those of before.

    Raises:
        UserError: A mistake in the command line, a package is missing, or what would be written is another model.
    """
    warnings.simplefilter("ignore")  # libraries warn of what is tried here and judged by its result
    parser = CommandParser(
        command,
        COMMANDS[command].description,
        "formtune export RUN [--as KIND] [--max_loss SHARE] [--interpreter PATH]",
        HELP,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of a finished run")
    parser.add_argument("--as", metavar="KIND", dest="kind", choices=KINDS, default="adapter",
                        help=f"{', '.join(KINDS)} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max_loss", metavar="SHARE", type=float, default=0.01, help="Share of the test rows that "
                        "format/exact and joint/exact may lose against the adapter (default: %(default)s)")  # fmt: skip
    parser.add_argument("--interpreter", metavar="PATH", help="Python of an environment that has llm-compressor or "
                        "GPTQModel, for gptq and awq (default: this one, with GPTQModel)")  # fmt: skip
    config = parser.parse_args(args)
    # Several seconds: torch, transformers.
    from formtune.export.exporter import export, print_exports
    from formtune.export.finished import metrics, read_run
    from formtune.export.fresh_process import find_maker, lacking

    maker = find_maker(config.interpreter, [config.kind])
    if missing := lacking(config.kind, maker):
        raise UserError(f"--as {config.kind}: {missing}")
    target = config.run / config.kind
    if config.kind != "adapter" and target.exists():
        raise UserError(f"{target}: already there; remove it to export again")
    export(read_run(config.run), config.kind, config.max_loss, maker)
    print_exports(metrics(config.run))
    print(f"{config.kind}: {target}")
    return 0
