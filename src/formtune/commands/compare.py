"""`formtune compare`: whether one run is better than another on the same test rows."""

from pathlib import Path

from formtune.commands import COMMANDS
from formtune.errors import UserError
from formtune.evaluation.outcomes import EVALUATIONS
from formtune.files import write_json
from formtune.report.comparison import compare, print_comparison, read_runs
from formtune.tasks.parsers import CommandParser

HELP = """\
Each further RUN is compared with the first one, row by row, so all must have been tested on the same rows.

  97.3% (94.9 to 98.6)   the value and its 95 % interval: Wilson's for a rate, a bootstrap over rows for field F1
  better, p = 0.002      equal runs differ this much or more in 2 of 1,000 cases; below 0.05: better or worse
                         (exact McNemar test for rates, randomization test for field F1)
  cannot tell            chance alone can explain the difference; about this many test rows would decide
"""


def run(command: str, args: list[str]) -> None:
    usage = "formtune compare RUN RUN [RUN ...] [--out FILE.json]"
    parser = CommandParser(command, COMMANDS[command].description, usage, HELP)
    parser.add_argument("runs", metavar="RUN", nargs="*", help="Folder of a run, for its tuned model; FOLDER:NAME for "
                        f"another evaluation ({', '.join(EVALUATIONS)}); or a file of outcomes")  # fmt: skip
    parser.add_argument("--out", metavar="FILE.json", type=Path, help="Also save as JSON")
    config = parser.parse_intermixed_args(args)
    if len(config.runs) < 2:
        raise UserError("name two runs or more, such as logs/demo/r16 logs/demo/r32")
    comparison = compare(read_runs(config.runs))
    print_comparison(comparison)
    print("next: formtune export RUN, for the run that you keep")
    if config.out:
        try:
            config.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(config.out, comparison)
        except OSError as error:
            raise UserError(f"--out: {config.out}: {error.strerror}") from None
