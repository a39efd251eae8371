"""Compare formtune with TRL on one GPU, in bfloat16: the shapes of Qwen3-0.6B and of an 8B Llama, nothing downloaded.

    python gpu.py OUT_DIR                           both shapes, all workloads
    python gpu.py OUT_DIR --size 0.6B --profile     one shape, and torch.profiler's table of formtune's steps
    python gpu.py OUT_DIR --size 5M --device cpu    only to see that it runs

Weights are random and made on the device. The workloads are those of run.py, with ids of the tokenizer that is at hand
(the demo's, if no other is); the model's vocabulary is larger, as its output layer is to have its real size. The
training scripts of this folder run as processes of their own, wait for the GPU at every step's ends and report the peak
of the memory that tensors had. TRL runs in its own settings for a GPU, with Liger's kernels where they are installed
(`--no-liger` without). Written are OUT_DIR/gpu.json and OUT_DIR/gpu.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "src/formtune/demo/base"
WORKLOADS = ("shared", "plain", "mixed")
# Numbers of the published configurations.
SHAPES: dict[str, dict[str, Any]] = {
    "5M": {
        "kind": "llama",
        "vocab_size": 49152,
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 256,
        "tie_word_embeddings": True,
    },
    "0.6B": {
        "kind": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
    "8B": {
        "kind": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
}


def make(size: str, folder: Path, device: str) -> None:
    """Write the model, in bfloat16, with a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

    shape = dict(SHAPES[size])
    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[shape.pop("kind")]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    config = kind(
        **shape,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(1)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # last: its file shows that all is there


def tokenizer_folder() -> Path:
    """The tokenizer that workloads.py takes by itself."""
    smollm2, snips = (
        HERE.parent / "../shared" / name for name in ("tokenizers/smollm2-instruct", "data/snips/train.jsonl")
    )
    return smollm2 if smollm2.is_dir() and snips.is_file() else TOKENIZER


def padded(rows: list[dict[str, list[int]]], micro: int) -> int:
    """Tokens that batches of `micro` rows hold, padding included."""
    sizes = [len(row["prompt"]) + len(row["target"]) for row in rows]
    return sum(max(sizes[i : i + micro]) * len(sizes[i : i + micro]) for i in range(0, len(sizes), micro))


def figures(result: dict[str, Any], rows: list[Any], micro: int | None, weights: dict[str, int]) -> dict[str, Any]:
    """Speed of the steps that count; `micro` where every row is computed in full."""
    warm, per = result["warm"], int(result["settings"]["rows_per_step"])
    steps = range(warm, len(result["seconds"]))
    seconds = sum(result["seconds"][i] for i in steps)
    part = rows[warm * per : len(result["seconds"]) * per]
    computed = padded(part, micro) if micro else sum(sum(result["computed_tokens"][i]) for i in steps)
    # Adapters, attention and recomputation are not counted, and of the output layer only targets.
    head = weights["width"] * weights["vocabulary"] * sum(len(row["target"]) for row in part)
    return {
        "seconds_per_step": seconds / len(steps),
        "tokens_per_second": sum(result["tokens"][i] for i in steps) / seconds,
        "computed_tokens_per_second": computed / seconds,
        "tflops": 4 * (weights["inner"] * computed + head) / seconds / 1e12,
        "peak_gib": (result["peak_gpu_bytes"] or result["peak_rss_bytes"]) / 2**30,
    }


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=["0.6B", "8B"])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=4, help="steps at the start that do not count: kernels compile")
    parser.add_argument("--micro", type=int, default=4, help="rows of one micro-batch of TRL's")
    parser.add_argument("--tokens", type=int, default=16384, help="formtune's token budget of one micro-batch")
    parser.add_argument("--liger", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import measure  # after the line above: torch looks once
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --size 5M shows that this script runs")
    liger = importlib.util.find_spec("liger_kernel") is not None if args.liger is None else args.liger
    out = args.out.resolve()
    (out / "raw").mkdir(parents=True, exist_ok=True)
    if not (out / "workloads/mixed.json").is_file():
        steps = str(max(12, args.steps))
        command = [str(HERE / "workloads.py"), str(out / "workloads"), "--steps", steps]
        subprocess.run([sys.executable, *command], env=environment, check=True)
    shape = (8192, 8192, 8192) if args.device == "cuda" else (1024, 1024, 1024)
    peak = measure.matmul_gflops(shape, torch.bfloat16, args.device) / 1e3
    results: dict[str, Any] = {"machine": measure.machine(), "matmul_tflops": peak, "liger": liger, "runs": []}
    for size in args.size:
        model = out / "models" / size
        if not (model / "tokenizer.json").is_file():
            make(size, model, args.device)
            torch.cuda.empty_cache()
        common = ["--precision", "bf16", "--steps", str(args.steps), "--warm", str(args.warm), "--constant"]
        trl = ["train_trl.py", *common, "--micro", str(args.micro), *(["--liger"] if liger else [])]
        own = ["train_formtune.py", *common, "--tokens", str(args.tokens)]
        weights: dict[str, int] = {}
        for workload in args.workload:
            file = out / "workloads" / f"{workload}.json"
            rows = measure.read_workload(file)["rows"]
            jobs = [
                (number, tool, words)
                for number in range(args.rounds)
                for tool, words in (("formtune", own), ("trl", trl))
            ]
            if args.profile:
                jobs.append((0, "profile", [*own, "--profile", str(out / f"profile-{size}-{workload}.txt")]))
            for number, tool, (script, *options) in jobs:
                raw = out / "raw" / f"{size}-{workload}-{tool}-{number}.json"
                raw.unlink(missing_ok=True)
                run: dict[str, Any] = {"size": size, "workload": workload, "tool": tool, "round": number}
                command = [sys.executable, str(HERE / script), str(model), str(file), str(raw), *options]
                with raw.with_suffix(".log").open("w") as log:
                    code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
                if code or not raw.is_file():
                    run["failed"] = f"exit code {code}, see {raw.with_suffix('.log').name}"
                else:
                    result = json.loads(raw.read_text())
                    weights = weights or result.get("weights", {})
                    if tool != "profile" and weights:
                        run |= figures(result, rows, args.micro if tool == "trl" else None, weights)
                        run |= {"share": run["tflops"] / peak, "loss": result["loss"], "versions": result["versions"]}
                results["runs"].append(run)
                print({name: value for name, value in run.items() if name not in ("loss", "versions")}, flush=True)
                (out / "gpu.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    names = ("seconds_per_step", "tokens_per_second", "computed_tokens_per_second", "tflops", "share", "peak_gib")
    about = results["machine"]["gpu"] or results["machine"]["cpu"]
    lines = [
        f"{about}; fastest product of matrices in bfloat16: {peak:,.1f} TFLOP/s; Liger's kernels for TRL: {liger}.\n",
        f"| size | workload | tool | round | {' | '.join(name.replace('_', ' ') for name in names)} |",
        f"| --- | --- | --- |{' ---: |' * (len(names) + 1)}",
    ]
    for run in results["runs"]:
        if run["tool"] != "profile":
            cells = [f"{run[name]:,.3f}" if name in run else run.get("failed", "–") for name in names]
            lines.append(
                f"| {run['size']} | {run['workload']} | {run['tool']} | {run['round']} | {' | '.join(cells)} |"
            )
    (out / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
