"""Compare quality against time with TRL, on a task that quality.py has prepared.

    python quality_trl.py rows OUT CONFIG --steps 40 --seed 0     token ids of the first steps, in formtune's order
    python quality_trl.py time OUT BASE                           seconds of a step, both tools in turn, on these rows
    python quality_trl.py train OUT BASE                          TRL's adapter after these steps, in OUT/trl
    python quality_trl.py plot OUT RUN --measured trl:16:24.6     docs/benchmarks/quality.svg: field F1 against minutes

CONFIG is the task's YAML that quality.py wrote; the recipe is quality.py's. Needs the environment of `make bench`.
Judge the adapter with `formtune validate -c CONFIG --model.adapter OUT/trl`; `plot` takes its field F1 in percent. RUN
is quality.py's run. Minutes are steps times the seconds of a step that `time` measured.
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


def plot(out: Path, run: Path, measured: list[str]) -> None:
    """Field F1 on validation rows against minutes of training."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    minutes, points = {}, {}
    for tool in ("formtune", "trl"):
        files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob(f"time-{tool}-*.json"))]
        timed = list(chain.from_iterable(file["seconds"][1:] for file in files))
        minutes[tool] = sum(timed) / len(timed) / 60
        points[tool] = {0: 0.0}
    history = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["training"]["history"]
    points["formtune"] |= {entry["step"]: 100 * entry["field_f1"] for entry in history}
    for text in measured:
        tool, step, value = text.split(":")
        points[tool][int(step)] = float(value)
    plt.rcParams["svg.hashsalt"] = "formtune"  # the same file from the same figures
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for tool, color in (("formtune", "C0"), ("trl", "C1")):
        steps = sorted(points[tool])
        values = [points[tool][step] for step in steps]
        axes.plot([step * minutes[tool] for step in steps], values, "o-", color=color, label=f"{tool}, measured")
        for step, value in zip(steps[1:], values[1:], strict=True):
            axes.annotate(f"step {step}", (step * minutes[tool], value), (5, -12), textcoords="offset points", size=8)
    axes.set(xlabel="minutes of training", ylabel="field F1 in % (150 validation rows)", ylim=(0, 100))
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(HERE.parent / "docs" / "benchmarks" / "quality.svg", metadata={"Date": None})


def main() -> None:
    """Run one of the four commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("rows", "time", "train", "plot"))
    parser.add_argument("out", type=Path)
    parser.add_argument("source", help="CONFIG, BASE or RUN")
    parser.add_argument("--measured", nargs="+", default=[], metavar="TOOL:STEP:F1", help="more points for the plot")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, steps = arguments.out, ["--steps", str(arguments.steps)]
    if arguments.command == "rows":
        write_rows(out, Path(arguments.source), arguments.steps, arguments.seed)
    elif arguments.command == "plot":
        plot(out, Path(arguments.source), arguments.measured)
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
