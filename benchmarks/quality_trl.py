"""Compare quality against time with TRL, on a task that quality.py has prepared.

    python quality_trl.py rows OUT CONFIG --steps 40 --seed 0     token ids of the first steps, in formtune's order
    python quality_trl.py time OUT BASE                           seconds of a step, both tools in turn, on these rows
    python quality_trl.py train OUT BASE                          TRL's adapter after these steps, in OUT/trl

CONFIG is the task's YAML that quality.py wrote; the recipe is quality.py's. Needs the environment of `make bench`.
Judge the adapter with `formtune validate -c CONFIG --model.adapter OUT/trl`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from itertools import chain, islice
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
RECIPE = ["--precision=bf16", "--dropout=0.05", "--lr=2e-3", "--targets=all-linear"]


def write_rows(out: Path, config: Path, steps: int, seed: int) -> None:
    """Token ids of the rows that `formtune train` would take in its first `steps` steps."""
    from formtune.data.datamodule import FormatDataModule
    from formtune.formats import JsonSchema

    task = yaml.safe_load(config.read_text(encoding="utf-8"))
    data: dict[str, Any] = task["data"]
    format = JsonSchema(**data.pop("format")["init_args"])
    settings = {"tokenizer": task["model"]["base"], "max_new_tokens": task["model"]["max_new_tokens"]}
    datamodule = FormatDataModule(format=format, **data, **settings)
    datamodule.setup("fit")
    os.environ["PL_GLOBAL_SEED"] = str(seed)  # the loader's order depends on it
    rows = chain(*islice(datamodule.train_dataloader(), steps))
    workload = {"rows": [{"prompt": list(row.prompt_ids), "target": list(row.target_ids)} for row in rows]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.json").write_text(json.dumps(workload), encoding="utf-8")


def run(script: str, out: Path, base: str, name: str, options: list[str]) -> dict[str, Any]:
    """One training in a process of its own; returns what it measured."""
    result = out / f"{name}.json"
    command = [sys.executable, str(HERE / script), base, str(out / "rows.json"), str(result), *RECIPE, *options]
    subprocess.run(command, check=True)
    return json.loads(result.read_text(encoding="utf-8"))


def main() -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("rows", "time", "train"))
    parser.add_argument("out", type=Path)
    parser.add_argument("source", help="CONFIG, or BASE")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, steps = arguments.out, ["--steps", str(arguments.steps)]
    if arguments.command == "rows":
        write_rows(out, Path(arguments.source), arguments.steps, arguments.seed)
    elif arguments.command == "train":
        run("train_trl.py", out, arguments.source, "trl", ["--micro=4", "--save", str(out / "trl"), *steps])
    else:
        for number in range(2):
            seconds = {}
            for tool, options in {"formtune": [], "trl": ["--micro=4"]}.items():
                measured = run(f"train_{tool}.py", out, arguments.source, f"time-{tool}-{number}", [*options, *steps])
                timed = measured["seconds"][1:]
                seconds[tool] = sum(timed) / len(timed)
            print(f"seconds a step: {seconds}; TRL / formtune = {seconds['trl'] / seconds['formtune']:.2f}")


if __name__ == "__main__":
    main()
