"""`formtune promote`, `rollback` and `deployments`: production changes on evidence, and back with a reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from formtune.commands import COMMANDS
from formtune.configuration.parsing import CommandParser
from formtune.deploy import registry
from formtune.errors import UserError
from formtune.evaluation.comparison import IN_WORDS, compare, figures, read_runs
from formtune.evaluation.outcomes import read_outcomes, write_outcomes
from formtune.training.manifest import read_manifest


def run(command: str, args: list[str]) -> int:
    """Run `promote`, `rollback` or `deployments`."""
    functions = {"promote": _promote, "rollback": _rollback, "deployments": _deployments}
    functions[command](CommandParser(command, COMMANDS[command].description), args)
    return 0


def _promote(parser: CommandParser, args: list[str]) -> None:
    """Compare with what is current, copy, verify, and point to it."""
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of a run")
    parser.add_argument("--to", metavar="NAME", required=True, help="Name that points to it, such as production")
    parser.add_argument("--as", dest="kind", metavar="KIND", default="adapter", help="Which of the run's exported "
                        "folders (default: adapter)")  # fmt: skip
    parser.add_argument("--reason", help="Why, for the history")
    parser.add_argument("--force", action="store_true", help="Whatever the evidence says; needs --reason")
    config = parser.parse_args(args)
    if config.force and not config.reason:
        raise UserError("--force: say why with --reason; the history keeps both")
    exported = config.run / config.kind
    if not exported.is_dir():
        raise UserError(f"{exported}: no such folder; a finished run has adapter/, formtune export makes the others")
    manifest, task = read_manifest(exported), registry.task_of(exported)
    outcomes = config.run / "outcomes" / ("after.jsonl" if config.kind == "adapter" else f"{config.kind}.jsonl")
    for name in (task, config.to):
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"{name!r}: a name has letters, digits, '.', '_' and '-' and begins with no '.' or '-'")
    with registry.locked(task):
        pointer = registry.read_pointer(registry.DEPLOYMENTS / task / f"{config.to}.json")
        version, before = f"{config.run.resolve().name}-{config.kind}", pointer.current
        if version == before:
            raise UserError(f"{pointer.name}: points to {version} already")
        evidence, objections = weigh(pointer, manifest, outcomes)
        if objections and not config.force:
            more = f" (and {len(objections) - 1} more)" if len(objections) > 1 else ""
            raise UserError(f"not promoted: {objections[0]}{more}; or --force --reason '...'")
        registry.store(exported, pointer.version_folder(version))
        if outcomes.is_file():
            write_outcomes(pointer.outcomes(version), read_outcomes(outcomes))
        pointer.move("promote", version, config.reason, evidence=evidence, overruled=objections)
    print(f"{pointer.name}: {version}" + (f" (before: {before})" if before else ""))
    for name in IN_WORDS if "figures" in evidence else ():
        figure, (low, high) = evidence["figures"][name], evidence["figures"][name]["interval"]
        against = f"; against {before}: {evidence['differences'][name]['verdict']}" if "differences" in evidence else ""
        print(f"{name} {figure['value']:.1%} ({low:.1%} to {high:.1%}) on {evidence['rows']:,} test rows{against}")
    for objection in objections:
        print(f"overruled: {objection}")
    print(f"serve it: formtune serve {pointer.name}")


def _rollback(parser: CommandParser, args: list[str]) -> None:
    """Point to an earlier version again, once it is verified."""
    parser.add_argument("name", metavar="NAME", help="Such as production, or demo/production")
    parser.add_argument("--to", metavar="VERSION", help="Which version (default: the one before the current)")
    parser.add_argument("--reason", required=True, help="Why, for the history")
    config = parser.parse_args(args)
    pointer = registry.find_pointer(config.name)
    with registry.locked(pointer.task):
        pointer = registry.read_pointer(pointer.file)  # nobody else moves it now
        before, versions = pointer.current, {move["version"] for move in pointer.history}
        version = config.to or next(iter(pointer.stack[-2:-1]), None)
        names = ", ".join(sorted(versions))
        if version is None:
            raise UserError(f"{pointer.name}: no version before {before}; --to names one of {names}")
        if version not in versions:
            raise UserError(f"--to: {version} was never {pointer.name}; the versions are {names}")
        if version == before:
            raise UserError(f"{pointer.name}: points to {version} already")
        pointer.verified(version)
        pointer.move("rollback", version, config.reason)
    print(f"{pointer.name}: {version} (before: {before})")
    print(f"serve it: formtune serve {pointer.name}")


def _deployments(parser: CommandParser, args: list[str]) -> None:
    """Print what every name points to, and its history."""
    parser.parse_args(args)
    pointers = registry.all_pointers()
    if not pointers:
        print("nothing is deployed yet; formtune promote RUN --to production deploys a run")
    for pointer in pointers:
        print(f"{pointer.name}: {pointer.current}")
        for move in reversed(pointer.history):
            forced = " (forced)" if move.get("overruled") else ""
            reason = f": {move['reason']}" if move["reason"] else ""
            when = move["at"][:16].replace("T", " ")
            print(f"  {when} UTC  {move['action']:8}  {move['version']}{forced} by {move['by']}{reason}")


def weigh(pointer: registry.Pointer, manifest: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """What the outcomes in a file say of an export with this manifest, and the objections to promoting it."""
    objections: list[str] = []
    evidence: dict[str, Any] = {"outcomes": str(path), "against": pointer.current}
    try:
        evidence["rows"] = len(rows := read_outcomes(path))
        if not rows:
            raise UserError(f"{path}: no test rows")
        evidence["figures"] = figures(rows)
        if pointer.current:
            before = read_manifest(pointer.version_folder(pointer.current))
            if before["format"] != manifest["format"]:
                objections.append(f"the format is not that of {pointer.current}, for which the answers are parsed")
            runs = read_runs([str(pointer.outcomes(pointer.current)), str(path)])
            evidence["differences"] = compare(runs)["comparisons"][0]["differences"]
            for name in IN_WORDS:
                difference = evidence["differences"][name]
                if difference["verdict"] == "worse":
                    objections.append(
                        f"{name} is worse than {pointer.current}'s by {100 * abs(difference['value']):.1f} points "
                        f"(p = {difference['p']:.2g}, {difference['rows']:,} test rows)"
                    )
    except UserError as error:
        objections.append(str(error))
    return evidence, objections
