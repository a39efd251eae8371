"""`formtune export`: help and mistakes on the command line do not import torch."""

from __future__ import annotations

import warnings
from pathlib import Path

from rich.console import Console
from rich.table import Table

from formtune.commands import COMMANDS
from formtune.configuration.parsing import CommandParser
from formtune.errors import UserError
from formtune.export.quantize import lacking
from formtune.training.manifest import KINDS

HELP = """\
Every export is loaded in a fresh process by plain transformers and PEFT, compared with the adapter logit by logit, and
answers the run's test rows. It is refused if it is another model, or if more test rows than --max_loss lost their valid
format or their content. RUN/exports.json holds the figures, RUN/outcomes/KIND.jsonl the answers for `formtune compare`.

  adapter   what the training wrote: verified, and measured as it will be loaded
  merged    the base with the adapter in its weights, in the base's own precision
  int8      merged, weights in 8 bits by torchao
  nf4       merged, weights in 4 bits by bitsandbytes
  gptq awq  merged, weights in 4 bits by GPTQModel, which looks at training rows
"""


def run(command: str, args: list[str]) -> int:
    """Export, and print the figures of all exports of the run."""
    warnings.simplefilter("ignore")  # libraries warn of what is tried here and judged by its result
    parser = CommandParser(
        command, COMMANDS[command].description, "formtune export RUN [--as KIND] [--max_loss SHARE]", HELP
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of a finished run")
    parser.add_argument("--as", metavar="KIND", dest="kind", choices=KINDS, default="adapter",
                        help=f"{', '.join(KINDS)} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max_loss", metavar="SHARE", type=float, default=0.01, help="Share of the test rows that "
                        "format/exact and joint/exact may lose against the adapter (default: %(default)s)")  # fmt: skip
    config = parser.parse_args(args)
    if missing := lacking(config.kind):
        raise UserError(f"--as {config.kind}: {missing}")
    target = config.run / config.kind
    if config.kind != "adapter" and target.exists():
        raise UserError(f"{target}: already there; remove it to export again")
    # Several seconds: torch, transformers.
    from formtune.export.exporter import COLUMNS, cells, export, read_exports, read_run

    export(read_run(config.run), config.kind, config.max_loss)
    table = Table(*COLUMNS, title="Exports", title_justify="left")
    for kind, row in sorted(read_exports(config.run).items(), key=lambda item: KINDS.index(item[0])):
        table.add_row(*cells(kind, row))
    Console().print(table)
    print(f"{config.kind}: {target}")
    return 0
