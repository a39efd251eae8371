"""Does the format hold on longer inputs than the tests have? Test rows with other inputs' text put before their own.

The wanted answer stays the same and only the format is judged: a model that was trained on short inputs often answers
long ones in prose, and production's are longer than one thinks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from formtune.base.renderer import Renderer
from formtune.base.row import Row, quantile
from formtune.formats import Format

ROWS = 48  # for each length


def probe_lengths(train: Sequence[int], production: Sequence[int], context: int) -> dict[str, int]:
    """Prompt lengths to try, by name: P50, P95 and P99 of production (of train where it is not known), and beyond.

    Args:
        train: Tokens of the prompts that were trained on.
        production: Tokens of production's prompts, empty where they are not known.
        context: Tokens that a prompt may have.
    """
    known = production or train
    whose = "production" if production else "train"
    found = {f"{whose} P{p}": quantile(known, p) for p in (50, 95, 99)}
    found["twice the longest training row"] = 2 * max(train)
    return {name: tokens for name, tokens in found.items() if tokens <= context}


def probe_rows(
    test: Sequence[Row], texts: Sequence[str], lengths: Mapping[str, int], renderer: Renderer, contract: Format
) -> dict[str, list[Row]]:
    """For each length up to `ROWS` test rows whose prompts are lengthened to it, or nearly.

    Args:
        test: Rows with their turns.
        texts: Inputs to put in front, as production sends them.
        lengths: Tokens that prompts shall have, by name.
        renderer: Turns conversations into ids.
        contract: Marks the values of answers.
    """
    chosen = test[:: max(len(test) // ROWS, 1)][:ROWS]
    padding = "\n\n".join(texts)
    found: dict[str, list[Row]] = {}
    for name, tokens in lengths.items():
        conversations = []
        for number, row in enumerate(chosen):
            characters = round((tokens - len(row.prompt)) * len(row.source) / max(_own_tokens(row, renderer), 1))
            start = (number * 997) % max(len(padding) - characters, 1)
            before = " ".join(padding[start : start + max(characters, 0)].split(" ")[1:-1])
            *rest, asked, answer = row.messages
            longer = {"role": asked["role"], "content": f"{before}\n\n{asked['content']}" if before else row.source}
            conversations.append(([*rest, longer, answer], row.where))
        coded = renderer.encode(conversations, contract.value_spans)
        found[name] = [row for row in coded if isinstance(row, Row) and len(row.prompt) <= 1.1 * tokens]
    return {name: rows for name, rows in found.items() if rows}


def _own_tokens(row: Row, renderer: Renderer) -> int:
    return len(renderer.tokenizer(row.source, add_special_tokens=False)["input_ids"])
