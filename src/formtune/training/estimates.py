"""What `--dry_run` estimated, kept to be compared with what a run of the same configuration and rows took."""

import hashlib
import json
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
import yaml

from formtune.training.run_folder import FREE, leaves

FOLDER = Path(".cache/plan")
KEPT = 24  # estimates in it
OTHER = (*FREE, "data.date", "trainer.logger", "trainer.callbacks", "trainer.enable_checkpointing")


def estimates_entry(config: str, data: str) -> Path:
    """The cache entry of a configuration's estimates on the rows with this content hash."""
    keys = [(key, value) for key, value in leaves(yaml.safe_load(config)) if not key.startswith(OTHER)]
    return FOLDER / f"{hashlib.sha256(json.dumps([keys, data], default=str).encode()).hexdigest()[:32]}.json"


def peak_memory() -> float:
    """The most memory that this process held so far, of its GPU if it has one, in GiB."""
    on_gpu = torch.cuda.is_available()
    return (torch.cuda.max_memory_allocated() if on_gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss) / 2**30
