"""Write the tuned adapter as a plain PEFT folder, with everything that is needed to use and to judge it."""

from __future__ import annotations

import shutil
from pathlib import Path

from formtune.files import write_json
from formtune.model import FormatModule
from formtune.training.manifest import write_manifest


def export_adapter(module: FormatModule, folder: Path, config: Path, data: str | None) -> None:
    """Write adapter, tokenizer with its chat template, contract, configuration and manifest into a new folder.

    PEFT alone loads it: `PeftModel.from_pretrained(base_model, folder)`. It appears under its name only when whole.

    Args:
        module: Holds the weights to write.
        folder: Folder to create.
        config: The run's configuration, copied beside the adapter.
        data: Content hash of the rows that it was trained on.
    """
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    # False: PEFT would otherwise ask a hub whether the base's vocabulary was resized.
    module.model.save_pretrained(partial, safe_serialization=True, save_embedding_layers=False)
    module.renderer.tokenizer.save_pretrained(partial)
    write_json(partial / "contract.json", module.format.to_dict())
    shutil.copyfile(config, partial / "config.yaml")
    # PEFT's own card is a form to fill in: an empty one says less than none.
    (partial / "README.md").unlink(missing_ok=True)
    write_manifest(partial, "adapter", module.base, data)
    partial.replace(folder)
