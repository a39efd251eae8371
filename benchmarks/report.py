"""Make docs/benchmarks/README.md and its plots from results.json; run.py calls this at its end.

    python report.py [FOLDER]

A ratio compares two tools within one round, on the steps that both timed, so on the very same rows. Given are its
median and its range over the rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

Record = dict[str, Any]
NAMES = {
    "formtune": "formtune",
    "trl": "TRL as shipped",
    "trl-targets": "TRL, logits of targets only",
    "litgpt": "LitGPT",
    "unshared": "formtune, nothing shared",
    "generate-16": "transformers `generate`, batch 16",
    "generate-32": "transformers `generate`, batch 32",
    "generate-64": "transformers `generate`, batch 64",
}
COLOURS = {"trl": "#7a5195", "trl-targets": "#bc5090", "litgpt": "#ef8a35", "formtune": "#2f6f8f"}
INTRODUCTION = """\
# Benchmarks

Written by `python benchmarks/run.py`, which `make bench` runs after installing what it needs; everything measured, step
by step, is in [results.json](results.json). `make bench ARGS="--only train"` measures one part again.

All tools train LoRA adapters of rank 16 on the four attention projections, in float32, 16 rows to an optimizer step,
from the same token ids in the same order, with a constant learning rate. Models have the shapes named here and random
weights: they take as long as trained ones. Every measurement runs in a separate process, and the tools being
compared take turns. The workloads are

* `shared`: one system prompt of about 285 tokens (instructions and a schema) before every row; with the chat template's
  own tokens, the rows share 287;
* `plain`: no system prompt;
* `mixed`: one of four system prompts, of about 100, 300, 600 and 1,000 tokens, drawn for each row.

"TRL as shipped" is its `SFTTrainer` with PEFT in the fastest settings that a user can choose on a CPU: 4 rows at
once, chunked loss, fused AdamW, no gradient checkpointing. "TRL, logits of targets only" skips the output layer at
positions without a target, as TRL does on GPUs; a user cannot set this on a CPU. LitGPT is its LoRA recipe, 4 rows at
once.
"""


def ok(results: dict[str, Any], part: str, **about: Any) -> list[Record]:
    """The records of a part that did not fail and have these attributes."""
    records = (record for record in results["measurements"].values() if record["part"] == part)
    return [r for r in records if "result" in r and all(r.get(name) == value for name, value in about.items())]


def timed(record: Record) -> range:
    """The steps that count."""
    result = record["result"]
    return range(min(result["warm"], len(result["seconds"]) - 1), len(result["seconds"]))


def step_seconds(record: Record) -> float:
    """Mean seconds of the steps that count."""
    return statistics.fmean(record["result"]["seconds"][i] for i in timed(record))


def rounds(records: list[Record], peer: str, own: str = "formtune") -> list[tuple[Record, Record]]:
    """Pairs of a peer's and our record of the same round."""
    own_records = {record.get("round"): record for record in records if record["tool"] == own}
    return [(r, own_records[r.get("round")]) for r in records if r["tool"] == peer and r.get("round") in own_records]


def step_ratio(pair: tuple[Record, Record]) -> float:
    """How many times the first takes the second's seconds, on the steps that both timed."""
    peer, own = pair
    both = sorted(set(timed(peer)) & set(timed(own))) or None
    if both is None:
        return step_seconds(peer) / step_seconds(own)
    return sum(peer["result"]["seconds"][i] for i in both) / sum(own["result"]["seconds"][i] for i in both)


def spread(values: list[float], digits: str = ".2f") -> str:
    """Median and range."""
    if not values:
        return "–"
    middle = format(statistics.median(values), digits)
    return f"{middle} ({min(values):{digits}} to {max(values):{digits}})" if len(values) > 1 else middle


def loss_gap(pairs: list[tuple[Record, Record]]) -> str:
    """The largest difference of the losses of the steps that both made."""
    gaps = [
        abs(a - b) for peer, own in pairs for a, b in zip(peer["result"]["loss"], own["result"]["loss"], strict=False)
    ]
    return f"{max(gaps):.1e}" if gaps else "–"


def mebibytes(records: list[Record], above: bool = False) -> str:
    """The median peak, or what it is above the bytes in memory before the first step."""
    peaks = [r["result"]["peak_rss_bytes"] - (r["result"]["baseline_rss_bytes"] if above else 0) for r in records]
    return f"{statistics.median(peaks) / 2**20:,.0f}" if peaks else "–"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column's words on the left and the figures on the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def about_machine(results: dict[str, Any]) -> str:
    """Machine, versions and dates."""
    records = list(results["measurements"].values())
    text = "## Machine and versions\n\n"
    if results["quick"]:
        text = f"**A test of the benchmark (`--quick`), on the tiniest model: these figures say nothing.**\n\n{text}"
    dates = sorted(record["date"] for record in records)
    text += f"Measured from {dates[0]} to {dates[-1]}."
    for record in ok(results, "peak"):
        machine = record["result"]["machine"]
        text += (
            f" {machine['cpu']}, {machine['cores']} cores ({machine['instructions']}), "
            f"{machine['memory_bytes'] / 2**30:.0f} GiB of memory, {machine['system']}."
        )
    busiest = max(record["others_cores"] for record in records)
    text += f" Other processes took {busiest} cores at most, averaged over one measurement.\n\n"
    versions: dict[str, set[str]] = {}
    for record in records:
        for name, version in record.get("result", {}).get("versions", {}).items():
            versions.setdefault(name, set()).add(version)
    text += ", ".join(f"{name} {' and '.join(sorted(numbers))}" for name, numbers in versions.items()) + ".\n"
    for record in ok(results, "peak"):
        gflops = record["result"]["gflops"]
        rows = [
            [shape.replace("x", " × "), *(f"{gflops[kind][shape]:,.1f}" for kind in gflops)]
            for shape in gflops["float32"]
        ]
        text += "\nPyTorch's fastest matrix products on this machine, in GFLOP/s, best of several tries:\n\n"
        text += table(["rows × inner × columns", *gflops], rows)
    return text


def training(results: dict[str, Any]) -> str:
    """Time, memory and losses of the tools."""
    text = "## Training\n\n"
    text += (
        "Seconds per optimizer step (mean of the steps that count, median of the rounds), and the ratio to "
        "formtune's for the same rows: median, and range over the rounds. The last column is the largest difference of "
        "the losses of steps that both made; LitGPT draws other initial adapters, does not clip "
        "gradients and weights micro-batches equally. Memory is the process's peak while training, in MiB, and how "
        "much more that is than before the first step.\n"
    )
    for workload in ("shared", "plain", "mixed"):
        records = ok(results, "train", workload=workload, dropout=0.0)
        rows = []
        for tool in ("formtune", "trl", "trl-targets", "litgpt"):
            of_tool = [record for record in records if record["tool"] == tool]
            if not of_tool:
                continue
            pairs = rounds(records, tool) if tool != "formtune" else []
            rows.append(
                [
                    NAMES[tool],
                    spread([step_seconds(record) for record in of_tool]).split(" ")[0],
                    spread([step_ratio(pair) for pair in pairs]) if pairs else "",
                    mebibytes(of_tool),
                    mebibytes(of_tool, above=True),
                    loss_gap(pairs) if pairs else "",
                ]
            )
        if rows:
            head = [f"`{workload}`", "s per step", "times formtune", "peak MiB", "above start", "largest loss gap"]
            text += "\n" + table(head, rows)
    text += "\n![Ratios of training times](ratios.svg)\n"
    rows = []
    for tool in ("formtune", "trl-targets"):
        without = ok(results, "train", tool=tool, workload="shared", dropout=0.0)
        with_ = ok(results, "train", tool=tool, workload="shared", dropout=0.05)
        if without and with_:
            ratio = step_ratio((with_[0], without[0]))
            rows.append([NAMES[tool], f"{step_seconds(with_[0]):.2f}", f"{ratio:.2f}"])
    if rows:
        text += "\nWith a dropout of 0.05, on `shared` (one run each):\n\n"
        text += table(["", "s per step", "times the same without dropout"], rows)
    records = ok(results, "lossless", workload="shared")
    pairs = rounds(records, "unshared")
    if pairs:
        text += (
            f"\nThe effect of sharing alone, on `shared`: without it, formtune takes "
            f"{spread([step_ratio(pair) for pair in pairs])} times as long; the largest difference of the two losses "
            f"in any step is {loss_gap(pairs)}.\n"
        )
    return text


def validation(results: dict[str, Any]) -> str:
    """Time, answers and losses of validation."""
    text = (
        "## Validation\n\nLoss and greedy answers of the demo's test rows with the demo's base, untuned and tuned by "
        "the demo's run, and of the first 128 rows of `shared` with a 135M model whose targets are its own answers: "
        "formtune against transformers (a pass for the loss, then `generate`). formtune's time includes the "
        "rows that it decodes a second time in full. At most 256 new tokens. Answers are compared token by "
        "token with formtune's of the same round.\n"
    )
    titles = {"none": "demo, untuned", "tuned": "demo, tuned"}
    for adapter in dict.fromkeys(record["adapter"] for record in ok(results, "validate")):
        records = ok(results, "validate", adapter=adapter)
        rows = []
        for tool in dict.fromkeys(record["tool"] for record in records):
            of_tool = [record for record in records if record["tool"] == tool]
            if not of_tool:
                continue
            pairs = rounds(records, tool) if tool != "formtune" else []
            equal = [
                sum(x == y for x, y in zip(a["result"]["answers"], b["result"]["answers"], strict=True))
                for a, b in pairs
            ]
            rows.append(
                [
                    NAMES[tool],
                    spread([record["result"]["seconds"] for record in of_tool]),
                    spread([a["result"]["seconds"] / b["result"]["seconds"] for a, b in pairs]) if pairs else "",
                    f"{min(equal)} of {len(of_tool[0]['result']['answers'])}" if equal else "",
                    f"{of_tool[0]['result']['loss']:.6f}",
                    mebibytes(of_tool),
                ]
            )
        if rows:
            text += "\n" + table(
                [titles.get(adapter, adapter), "seconds", "times formtune", "equal answers", "loss", "peak MiB"], rows
            )
    return text


def figures(results: dict[str, Any], record: Record) -> dict[str, float]:
    """Tokens per second, GFLOP/s and memory of a run of formtune."""
    result, steps = record["result"], timed(record)
    seconds = sum(result["seconds"][i] for i in steps)
    computed = sum(sum(result["computed_tokens"][i]) for i in steps)
    weights = result["weights"]
    head = weights["width"] * weights["vocabulary"] * sum(result["targets"][i] for i in steps)
    work = 4 * (weights["inner"] * computed + head)
    speed = {
        "real": sum(result["tokens"][i] for i in steps) / seconds,
        "computed": computed / seconds,
        "gflops": work / seconds / 1e9,
        "peak": result["peak_rss_bytes"] / 2**20,
        "above": (result["peak_rss_bytes"] - result["baseline_rss_bytes"]) / 2**20,
        "seconds": seconds / len(steps),
    }
    for machine in ok(results, "peak"):
        speed["share"] = speed["gflops"] / max(machine["result"]["gflops"]["float32"].values())
    return speed


def row_of(first: str, speed: dict[str, float]) -> list[str]:
    """One row of the growth tables."""
    share = f"{speed['share']:.0%}" if "share" in speed else "–"
    numbers = [f"{speed[name]:,.0f}" for name in ("real", "computed", "gflops")]
    return [first, f"{speed['seconds']:.2f}", *numbers, share, f"{speed['peak']:,.0f}", f"{speed['above']:,.0f}"]


HEAD = ["s per step", "tokens/s", "computed tokens/s", "GFLOP/s", "of the peak", "peak MiB", "above start"]
GROWN = {
    "prefix": ("shared prefix, tokens", "30M, 16 rows to a step"),
    "rows": ("rows to a step", "30M, shared prefix of 512 tokens"),
    "size": ("model", "shared prefix of 285 tokens, 16 rows to a step"),
}


def growth(results: dict[str, Any]) -> str:
    """How formtune grows, and the memory of its budgets."""
    if not (ok(results, "memory") or ok(results, "growth")):
        return ""
    text = (
        "## Memory and growth\n\nformtune at several token budgets (`model.tokens_per_micro_batch`), on `mixed` with "
        "the 135M shape. Tokens per second count every row in full, prefix included; computed tokens are those that "
        "the model processed. GFLOP/s: 4 operations per computed token and non-embedding weight, plus 4 per target "
        "token and output-layer weight; attention, adapters and optimizer are not counted. The share "
        "is of the fastest float32 product above.\n\n"
    )
    records = ok(results, "memory")
    text += table(["budget", *HEAD], [row_of(f"{r['budget']:,}", figures(results, r)) for r in records])
    text += (
        "\nThe next tables use random ids: after the shared prefix, 15 tokens of each prompt and 33 of each answer "
        "differ by row; budget 4,096:\n"
    )
    for what, (name, settings) in GROWN.items():
        rows = [row_of(str(r["to"]), figures(results, r)) for r in ok(results, "growth", grows=what)]
        text += f"\n{settings[0].upper()}{settings[1:]}:\n\n" + table([name, *HEAD], rows)
    return text + "\n![Growth](growth.svg)\n"


def failures(results: dict[str, Any]) -> str:
    """What could not be measured."""
    failed = {key: record["failed"] for key, record in results["measurements"].items() if "failed" in record}
    if not failed:
        return ""
    return "## Not measured\n\n" + "".join(f"* {key}: {reason}\n" for key, reason in failed.items())


def plot_ratios(results: dict[str, Any], path: Path) -> None:
    """Bars of the peers' times over formtune's, with their range over the rounds."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    workloads, peers = ("shared", "plain", "mixed"), ("trl-targets", "trl", "litgpt")
    for n, peer in enumerate(peers):
        for i, workload in enumerate(workloads):
            pairs = rounds(ok(results, "train", workload=workload, dropout=0.0), peer)
            ratios = [step_ratio(pair) for pair in pairs]
            if not ratios:
                continue
            middle, place = statistics.median(ratios), i + (n - 1) * 0.27
            reach = [[middle - min(ratios)], [max(ratios) - middle]]
            axes.bar(place, middle, 0.25, color=COLOURS[peer], label=NAMES[peer] if i == 0 else None)
            axes.errorbar(place, middle, reach, color="black", capsize=3)
            axes.annotate(f"{middle:.1f}", (place, max(ratios)), (0, 4), textcoords="offset points", ha="center")
    axes.axhline(1, color=COLOURS["formtune"], label="formtune")
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel("times formtune's seconds")
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_growth(results: dict[str, Any], path: Path) -> None:
    """Lines of throughput over prefix, rows and model, and of memory over the budget."""
    figure, all_axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
    for axes, (what, (name, _)) in zip(all_axes, GROWN.items(), strict=False):
        records = ok(results, "growth", grows=what)
        values = [figures(results, record) for record in records]
        ticks = [str(record["to"]) for record in records]
        axes.plot(ticks, [f["real"] for f in values], "o-", color=COLOURS["formtune"], label="all tokens")
        axes.plot(ticks, [f["computed"] for f in values], "s--", color="#888888", label="computed")
        axes.set(xlabel=name, ylabel="tokens per second")
        if what == "size":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    records = ok(results, "memory")
    peaks = [figures(results, record)["above"] for record in records]
    all_axes[3].plot([str(r["budget"]) for r in records], peaks, "o-", color=COLOURS["formtune"])
    all_axes[3].set(xlabel="token budget (mixed, 135M)", ylabel="MiB above start", ylim=(0, None))
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    # Without date and random ids, so that the same results give the same file.
    with plt.rc_context({"svg.hashsalt": "formtune"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write(results: dict[str, Any], folder: Path) -> None:
    """Write README.md and the plots beside results.json."""
    sections: list[Callable[[dict[str, Any]], str]] = [about_machine, training, validation, growth, failures]
    text = "\n".join([INTRODUCTION, *filter(None, (section(results) for section in sections))])
    (folder / "README.md").write_text(text, encoding="utf-8")
    plot_ratios(results, folder / "ratios.svg")
    if ok(results, "growth"):
        plot_growth(results, folder / "growth.svg")


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "docs/benchmarks"
    write(json.loads((place / "results.json").read_text(encoding="utf-8")), place)
