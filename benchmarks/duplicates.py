"""Near-duplicates at scale: formtune against datasketch and text-dedup's method, against every pair, and as rows grow.

    python duplicates.py UTTERANCES.jsonl.gz [--out ../docs/benchmarks]

Input: JSON Lines (gzip or not) with a `text` each. Parts, each measurement a process of its own:

* `all`: cleaning, exact and near-duplicates of all rows, as training does it (`repair`, `Example.key`, `select`);
* `peers`: clusters of the different inputs among 60,000 rows at a Jaccard index of 0.8 over the same runs of five
  characters, with the same number of permutations and bands: formtune, datasketch as its documentation shows it (a
  MinHash for each text, an LSH index, candidates then verified with Python's sets), and text-dedup's published method
  (signatures by numpy in as many processes as there are cores, tables of bands, edges to the first text of a bucket,
  connected components), verified likewise;
* `exact`: pairs of a sample of 20,000 rows against the comparison of every pair with every other;
* `growth`: `all` over 50,000 to 1,000,000 rows; beyond what the file has, rows are its rows with a word changed.

Writes duplicates.json and duplicates.md.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from formtune.data.cleaning import Example, repair
from formtune.data.selection import components, select
from formtune.quality.duplicates import PERMUTATIONS, SHINGLE, band_size, near_pairs

THRESHOLD = 0.8
STEPS = ("encoding", "unicode", "control", "edges")
BAND = band_size(THRESHOLD)
PEERS = ("formtune", "datasketch", "text-dedup")
PEER_ROWS, EXACT_ROWS, ROUNDS = 60_000, 20_000, 2
GROWTH = (50_000, 100_000, 200_000, 312_250, 1_000_000)
SEED = 20260701


def texts_of(path: Path, number: int | None) -> list[str]:
    """The first texts of the shuffled file, made more by changing words where it has too few."""
    content = path.read_bytes()
    lines = (gzip.decompress(content) if path.suffix == ".gz" else content).decode().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    dice = random.Random(SEED)
    dice.shuffle(texts)
    original = len(texts)
    while number is not None and len(texts) < number:
        words, others = (texts[dice.randrange(original)].split() for _ in range(2))
        if words and others:
            words[dice.randrange(len(words))] = dice.choice(others)
            texts.append(" ".join(words))
    return texts[:number]


def keys_of(texts: Sequence[str]) -> list[str]:
    """What is compared of the texts, each once."""
    return list(dict.fromkeys(example(text, n).key for n, text in enumerate(texts)))


def example(text: str, number: int) -> Example:
    """A cleaned row without an answer."""
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
    return Example(repair(turns, STEPS), str(number))


def grams(text: str) -> set[str]:
    """The runs of five characters."""
    return {text[i : i + SHINGLE] for i in range(max(len(text) - SHINGLE + 1, 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    """Share of the union that both have."""
    both = len(a & b)
    return both / (len(a) + len(b) - both)


def with_formtune(keys: list[str]) -> Any:
    """Clusters as training finds them."""
    left, right, _ = near_pairs(keys, THRESHOLD)
    return components(len(keys), left, right)


def with_datasketch(keys: list[str]) -> Any:
    """As datasketch's documentation does it, one text after another."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=PERMUTATIONS, params=(PERMUTATIONS // BAND, BAND))
    sets, pairs = [], []
    for number, key in enumerate(keys):
        sets.append(grams(key))
        sketch = MinHash(num_perm=PERMUTATIONS)
        for gram in sets[-1]:
            sketch.update(gram.encode("utf-8", "surrogatepass"))
        for other in index.query(sketch):
            if jaccard(sets[number], sets[other]) >= THRESHOLD:
                pairs.append((other, number))
        index.insert(number, sketch)
    left, right = np.array(pairs, np.int64).reshape(-1, 2).T
    return components(len(keys), left, right)


_PRIME, _MOST = np.uint64((1 << 61) - 1), np.uint64((1 << 32) - 1)
_A, _B = np.random.default_rng(42).integers(1, int(_PRIME), (2, PERMUTATIONS), np.uint64)


def _signature(key: str) -> list[bytes]:
    digests = (hashlib.sha1(gram.encode("utf-8", "surrogatepass")).digest() for gram in grams(key))
    hashes = np.array([int.from_bytes(digest[:4], "little") for digest in digests], np.uint64)[:, None]
    least = ((hashes * _A + _B) % _PRIME & _MOST).min(axis=0)
    return [least[i : i + BAND].tobytes() for i in range(0, PERMUTATIONS, BAND)]


def with_text_dedup(keys: list[str]) -> Any:
    """As text-dedup's MinHash does it, with this benchmark's shingles, and candidates verified."""
    with multiprocessing.get_context("fork").Pool() as pool:
        signatures = pool.map(_signature, keys, chunksize=500)
    tables: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(PERMUTATIONS // BAND)]
    for number, bands in enumerate(signatures):
        for table, band in zip(tables, bands, strict=True):
            table[band].append(number)
    sets: dict[int, set[str]] = {}
    pairs = set()
    for table in tables:
        for bucket in table.values():
            for other in bucket[1:]:
                pair = bucket[0], other
                if pair not in pairs:
                    for i in pair:
                        if i not in sets:
                            sets[i] = grams(keys[i])
                    if jaccard(sets[pair[0]], sets[pair[1]]) >= THRESHOLD:
                        pairs.add(pair)
    left, right = np.array(sorted(pairs), np.int64).reshape(-1, 2).T
    return components(len(keys), left, right)


WAYS = {"formtune": with_formtune, "datasketch": with_datasketch, "text-dedup": with_text_dedup}


def every_pair(keys: list[str]) -> Iterator[tuple[int, int, float]]:
    """All pairs at or above the threshold, found by counting what each text shares with each other."""
    from scipy.sparse import csr_array

    names: dict[str, int] = {}
    rows = [[names.setdefault(g, len(names)) for g in grams(key)] for key in keys]
    sizes = np.array([len(row) for row in rows])
    offsets = np.concatenate(([0], sizes.cumsum()))
    columns = np.concatenate([np.array(row) for row in rows])
    sets = csr_array((np.ones(len(columns), np.int32), columns, offsets), shape=(len(keys), len(names)))
    other = sets.T.tocsr()
    for start in range(0, len(keys), 500):
        both = (sets[start : start + 500] @ other).tocoo()
        i, j, count = both.row + start, both.col, both.data
        index = count / (sizes[i] + sizes[j] - count)
        close = (i < j) & (index >= THRESHOLD)
        yield from zip(i[close].tolist(), j[close].tolist(), index[close].tolist(), strict=True)


def part_all(texts: list[str]) -> dict[str, Any]:
    """Clean and select all rows."""
    began = time.perf_counter()
    examples = [example(text, number) for number, text in enumerate(texts)]
    cleaned = time.perf_counter()
    kept, done = select(examples, THRESHOLD)
    reasons: dict[str, int] = defaultdict(int)
    for row in done.quarantine:
        reasons[row.reason] += 1
    return {"seconds": time.perf_counter() - began, "seconds_cleaning": cleaned - began, "rows": len(texts),
            "kept": len(kept), **reasons}  # fmt: skip


def part_peer(texts: list[str], name: str) -> dict[str, Any]:
    """Cluster the different inputs of the rows one way."""
    keys = keys_of(texts)
    began = time.perf_counter()
    labels = WAYS[name](keys)
    return {"seconds": time.perf_counter() - began, "rows": len(keys), "clusters": int(labels.max()) + 1,
            "labels": labels.tolist()}  # fmt: skip


def part_exact(texts: list[str]) -> dict[str, Any]:
    """Recall and precision of the pairs."""
    keys = keys_of(texts)
    true = {(i, j) for i, j, _ in every_pair(keys)}
    left, right, _ = near_pairs(keys, THRESHOLD)
    pairs = set(zip(left.tolist(), right.tolist(), strict=True))
    return {"rows": len(keys), "pairs": len(true), "found": len(pairs), "recall": len(pairs & true) / len(true),
            "precision": len(pairs & true) / len(pairs)}  # fmt: skip


def agreement(a: Sequence[int], b: Sequence[int]) -> float:
    """Share of texts that have the same cluster, with all its members, in both."""

    def members(labels: Sequence[int]) -> list[tuple[int, ...]]:
        groups = defaultdict(list)
        for at, label in enumerate(labels):
            groups[label].append(at)
        tuples = {label: tuple(members) for label, members in groups.items()}
        return [tuples[label] for label in labels]

    return sum(x == y for x, y in zip(members(a), members(b), strict=True)) / len(a)


def measured(path: Path, part: str, number: int | None) -> dict[str, Any]:
    """Run a part in a process of its own; its record with the peak memory of the process."""
    command = [sys.executable, __file__, str(path), "--part", part, *(["--rows", str(number)] if number else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{part} of {number} rows failed: {done.stderr.strip().splitlines()[-1]}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(part, number or "", {k: v for k, v in record.items() if k != "labels"}, flush=True)
    return record


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    whole, exact = results["all"], results["exact"]
    lines = [
        "# Near-duplicates",
        "",
        f"Written by `python benchmarks/duplicates.py UTTERANCES.jsonl.gz` on {results['cores']} CPU cores, over "
        "shuffled utterances of",
        "the Schema-Guided Dialogue dataset; Jaccard index 0.8 over character 5-grams.",
        "",
        f"All {whole['rows']:,} rows cleaned and selected: **{whole['seconds']:.1f} s**, of which cleaning "
        f"{whole['seconds_cleaning']:.1f} s, at most {whole['peak_mib']:,.0f} MiB of memory; {whole['kept']:,} kept, "
        f"{whole.get('duplicate', 0):,} duplicates, {whole.get('near_duplicate', 0):,} near-duplicates.",
        "",
        f"Against a comparison of all pairs of {exact['rows']:,} different inputs: {exact['pairs']:,} pairs, recall "
        f"**{exact['recall']:.2%}**, precision **{exact['precision']:.2%}**.",
        "",
        f"Clusters of the {results['peers'][0]['formtune']['rows']:,} different inputs among {PEER_ROWS:,} rows, "
        "candidates verified by all three:",
        "",
        "| | seconds, each round | times formtune's | clusters | texts with the same cluster | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name in PEERS:
        records = [times[name] for times in results["peers"]]
        ratios = [times[name]["seconds"] / times["formtune"]["seconds"] for times in results["peers"]]
        lines.append(
            f"| {name} | {', '.join(format(record['seconds'], '.1f') for record in records)} | "
            f"{min(ratios):.1f} to {max(ratios):.1f} | {records[0]['clusters']:,} | "
            f"{records[0]['same']:.2%} | {max(r['peak_mib'] for r in records):,.0f} |"
        )
    lines += ["", "| rows | seconds | rows/s | peak MiB | kept |", "|---|---|---|---|---|"]
    for record in results["growth"]:
        lines.append(
            f"| {record['rows']:,} | {record['seconds']:.1f} | {record['rows'] / record['seconds']:,.0f} | "
            f"{record['peak_mib']:,.0f} | {record['kept']:,} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Run one part in this process, or all of them in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs/benchmarks")
    parser.add_argument("--rows", type=int, help="rows of the part (default: all)")
    parser.add_argument("--part", choices=("all", "exact", *PEERS), help="this part alone, to standard output")
    args = parser.parse_args()
    if args.part:
        texts = texts_of(args.texts, args.rows)
        record = {"all": part_all, "exact": part_exact}.get(args.part, lambda t: part_peer(t, args.part))(texts)
        used = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cores = multiprocessing.cpu_count() if used[1] else 0
        record["peak_mib"] = (used[0] + cores * used[1]) / 1024
        print(json.dumps(record))
        return
    results: dict[str, Any] = {"cores": multiprocessing.cpu_count(), "all": measured(args.texts, "all", None)}
    results["exact"] = measured(args.texts, "exact", EXACT_ROWS)
    results["peers"] = []
    for _ in range(ROUNDS):
        records = {name: measured(args.texts, name, PEER_ROWS) for name in PEERS}
        for record in records.values():
            record["same"] = agreement(record["labels"], records["formtune"]["labels"])
        for record in records.values():
            del record["labels"]
        results["peers"].append(records)
    results["growth"] = [measured(args.texts, "all", number) for number in GROWTH]
    (args.out / "duplicates.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.out / "duplicates.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
