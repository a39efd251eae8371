"""What a checkpoint holds of the model: the adapters, and what they belong to."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch

from formtune.base.identity import check_identity
from formtune.errors import UserError


class AdapterState(L.LightningModule):
    """Saves the trained parameters alone, and loads exactly these; whoever derives from it sets what is declared."""

    _identity: dict[str, Any]  # base and contract, as `identity` names them
    _trained: frozenset[str]  # names of the trained parameters
    skipped: int  # steps that were left out
    _skipped_in_a_row: int

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the state belongs to."""
        skipped = {"skipped": [self.skipped, self._skipped_in_a_row]}
        checkpoint["formtune"] = self._identity | {"processes": self.trainer.world_size} | skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a state that belongs to something else, though it has the same shapes.

        Raises:
            UserError: Names what is another.
        """
        known, goes_on = checkpoint.get("formtune"), self.trainer.state.fn == "fit"
        check_identity(known, self._identity | {"processes": self.trainer.world_size}, goes_on)
        if goes_on:
            self.skipped, self._skipped_in_a_row = known["skipped"]  # type: ignore[index]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The adapters alone: the frozen base is never written again."""
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in self._trained}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load adapters, and nothing but exactly these adapters.

        Raises:
            UserError: The state belongs to other targets or another rank, or holds numbers that are not finite.
        """
        own = super().state_dict()
        odd = sorted(self._trained ^ set(state_dict)) or sorted(
            name for name in self._trained if state_dict[name].shape != own[name].shape
        )
        if odd:
            raise UserError(f"ckpt_path: the checkpoint fits another model.lora (targets or rank); first {odd[0]}")
        if not all(torch.isfinite(value).all() for value in state_dict.values()):
            raise UserError("ckpt_path: the checkpoint holds weights that are not finite numbers")
        return super().load_state_dict(state_dict, strict=False, assign=assign)
