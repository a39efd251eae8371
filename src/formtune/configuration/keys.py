"""The most important keys, their names in other tools, and the short help, printed without importing torch."""

from pathlib import Path

import yaml

KEYS = yaml.safe_load(Path(__file__).with_name("keys.yaml").read_text(encoding="utf-8"))
# Key and meaning by another tool's name.
MEANT = {name: (key, entry["meaning"]) for key, entry in KEYS.items() for name in entry.get("names", "").split()}
USAGE = {
    "train": "formtune train -c TASK.yaml [--quick] [--dry_run] [--key value ...]",
    "fit": "formtune fit -c TASK.yaml [--dry_run] [--key value ...]",
    "validate": "formtune validate RUN | -c TASK.yaml [--ckpt_path best|last|base|FILE] [--key value ...]",
    "test": "formtune test RUN | -c TASK.yaml [--ckpt_path best|last|base|FILE] [--key value ...]",
    "predict": "formtune predict RUN PROMPTS | -c TASK.yaml [--answers FILE] [--key value ...]",
}


def short_help(command: str, description: str) -> str:
    lines = [f"usage: {USAGE[command]}", "", description, "", "the most important keys (default):"]
    for key, entry in KEYS.items():
        name = f"--{key}" + (f" ({entry['default']})" if "default" in entry else "")
        lines.append(f"  {name:<46} {entry['meaning']}")
    lines += ["", "--help-all lists every key, --print_config=comments prints them as YAML (configs/reference.yaml)."]
    return "\n".join(lines)
