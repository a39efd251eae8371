"""Is the format still valid on longer inputs? Test rows with text of other inputs before their own.

Only the format is checked: a model trained on short inputs often answers long ones in prose, and production's inputs
are often longer than expected.
"""

from collections.abc import Mapping, Sequence

from formtune.base.renderer import Renderer
from formtune.base.row import Row, quantile

ROWS = 48  # for each length
LONGER = 1.1  # times its length that a prompt may have


def probe_lengths(train: Sequence[int], production: Sequence[int], context: int) -> dict[str, int]:
    """Prompt lengths to try within the context: P50, P95, P99 of production's prompts (else of train's) and beyond."""
    measured, whose = (production, "production") if production else (train, "train")
    lengths = {f"{whose} P{p}": quantile(measured, p) for p in (50, 95, 99)}
    lengths["twice the longest training row"] = 2 * max(train)
    return {name: tokens for name, tokens in lengths.items() if tokens <= context}


def probe_rows(
    test: Sequence[Row], texts: Sequence[str], lengths: Mapping[str, int], renderer: Renderer
) -> dict[str, list[Row]]:
    """For each length up to `ROWS` test rows, lengthened to about it with `texts`."""
    padding = "\n\n".join(texts)
    longer: dict[str, list[Row]] = {}
    for name, tokens in lengths.items():
        conversations = []
        for number, row in enumerate(test[:: max(len(test) // ROWS, 1)][:ROWS]):
            own_tokens = len(renderer.tokenizer(row.input, add_special_tokens=False)["input_ids"])
            characters = round((tokens - len(row.prompt_ids)) * len(row.input) / max(own_tokens, 1))
            start = (number * 997) % max(len(padding) - characters, 1)
            before = " ".join(padding[start : start + max(characters, 0)].split(" ")[1:-1])
            *rest, question, answer = row.messages
            content = f"{before}\n\n{question['content']}" if before else question["content"]
            turns = [*rest, question | {"content": content}, answer]
            conversations.append((turns, row.where, row.schema, row.tools))
        encoded = renderer.encode(conversations)
        longer[name] = [row for row in encoded if isinstance(row, Row) and len(row.prompt_ids) <= LONGER * tokens]
    return {name: rows for name, rows in longer.items() if rows}
