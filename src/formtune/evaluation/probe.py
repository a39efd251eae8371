"""Check that the format stays valid on longer inputs: test rows preceded by text of other inputs."""

from collections.abc import Mapping, Sequence

from formtune.base.renderer import Renderer
from formtune.base.row import Row, quantile

# Only the format is checked: a model trained on short inputs often answers long ones in prose.
ROWS = 48  # for each length
MAX_RATIO = 1.1  # maximum length of a prompt, as a multiple of the length to try


def probe_lengths(train: Sequence[int], production: Sequence[int], context: int) -> dict[str, int]:
    """Prompt lengths to try within the context: P50, P95, P99 of production's prompts (else of train's) and beyond."""
    measured, whose = (production, "production") if production else (train, "train")
    lengths = {f"{whose} P{p}": quantile(measured, p) for p in (50, 95, 99)}
    lengths["twice the longest training row"] = 2 * max(train)
    return {name: tokens for name, tokens in lengths.items() if tokens <= context}


def probe_rows(
    test: Sequence[Row], texts: Sequence[str], lengths: Mapping[str, int], renderer: Renderer
) -> dict[str, list[Row]]:
    """Up to `ROWS` test rows for each length, extended to about that length with `texts`."""
    padding = "\n\n".join(texts)
    longer: dict[str, list[Row]] = {}
    for name, tokens in lengths.items():
        conversations = []
        for number, row in enumerate(test[:: max(len(test) // ROWS, 1)][:ROWS]):
            input_tokens = len(renderer.tokenizer(row.input, add_special_tokens=False)["input_ids"])
            characters = round((tokens - len(row.prompt_ids)) * len(row.input) / max(input_tokens, 1))
            start = (number * 997) % max(len(padding) - characters, 1)
            before = " ".join(padding[start : start + max(characters, 0)].split(" ")[1:-1])
            *rest, question, answer = row.messages
            content = f"{before}\n\n{question['content']}" if before else question["content"]
            turns = [*rest, question | {"content": content}, answer]
            conversations.append((turns, row.where, row.schema, row.tools))
        encoded = renderer.encode(conversations)
        longer[name] = [row for row in encoded if isinstance(row, Row) and len(row.prompt_ids) <= MAX_RATIO * tokens]
    return {name: rows for name, rows in longer.items() if rows}
