"""Record what a run of the demo yields, and compare it with an earlier record.

Runs are reproducible to the last bit on one machine. Record before you change code or upgrade a package, compare after:

    python tools/reproduce.py record before.json
    python tools/reproduce.py compare before.json          # exit code 1 and one line per difference

Further words go to `formtune train`, such as `--trainer.max_steps 40` for a shorter run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file

RUN = Path("logs/demo/reproduce")
# They change from run to run, or with every change of the code.
VOLATILE = {"metrics.data", "metrics.estimates", "metrics.training.seconds"}


def record(words: list[str], command: str = "train") -> dict[str, Any]:
    """Train the demo, and return the adapter's hash, the metrics and the parsed configuration."""
    shutil.rmtree(RUN, ignore_errors=True)
    program = [sys.executable, "-m", "formtune", command, "-c", "configs/demo.yaml", "--run", RUN.name, *words]
    subprocess.run(program, check=True, stdout=sys.stderr)
    hashed = hashlib.sha256()
    for name, tensor in sorted(load_file(RUN / "adapter/adapter_model.safetensors").items()):
        hashed.update(f"{name} {tensor.shape} {tensor.dtype}".encode() + tensor.tobytes())
    return {
        "adapter": hashed.hexdigest(),
        "metrics": json.loads((RUN / "metrics.json").read_text(encoding="utf-8")),
        "config": yaml.safe_load((RUN / "config.yaml").read_text(encoding="utf-8")),
    }


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """One line per value that differs, volatile ones left out."""
    if isinstance(before, dict) and isinstance(after, dict):
        paths = {key: f"{path}.{key}" if path else key for key in {**before, **after}}
        return [
            line
            for key, inner in paths.items()
            if inner not in VOLATILE
            for line in differences(before.get(key, "absent"), after.get(key, "absent"), inner)
        ]
    return [] if before == after else [f"{path}: {before} -> {after}"]


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("record", "compare"):
        sys.exit(__doc__)
    action, file, *words = sys.argv[1:]
    if action == "record":
        Path(file).write_text(json.dumps(record(words), indent=1) + "\n", encoding="utf-8")
    else:
        changes = differences(json.loads(Path(file).read_text(encoding="utf-8")), record(words))
        print("\n".join(changes) or "the same adapter, metrics and configuration")
        sys.exit(bool(changes))
