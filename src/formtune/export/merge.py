"""Put an adapter into its base's weights, and show that the model stays the one that it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from formtune.errors import UserError, first_line
from formtune.export.closeness import Closeness, compare, last_logits


def merge(model: Any, rows: Sequence[Sequence[int]]) -> tuple[Any, Closeness]:
    """The base with the adapter in its weights, and how close it is to the two apart.

    PEFT's own `safe_merge` looks only for numbers that are not finite; a merge into shared embeddings passes it.

    Args:
        model: A `PeftModel` whose base is whole, in float32 and in evaluation mode; it is used up.
        rows: Token ids to compare on.

    Raises:
        UserError: PEFT cannot merge it.
    """
    apart = last_logits(model, rows)
    try:
        whole = model.merge_and_unload(safe_merge=True)
    except Exception as error:  # ValueError, NotImplementedError, RuntimeError, AttributeError: by kind of layer
        raise UserError(f"the adapter cannot be merged: {first_line(error)}") from error
    return whole, compare(apart, last_logits(whole, rows))
