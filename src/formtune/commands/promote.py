"""`formtune promote`, `rollback` and `deployments`: production changes on evidence, and back with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formtune.commands import COMMANDS
from formtune.configuration.parsing import CommandParser
from formtune.deploy.registry import (
    DEPLOYMENTS,
    Pointer,
    check_names,
    find_pointer,
    locked,
    pointers,
    read_pointer,
    store,
    task_of,
)
from formtune.errors import UserError
from formtune.evaluation.comparison import IN_WORDS, compare, figures, read_runs
from formtune.evaluation.outcomes import read_outcomes, write_outcomes
from formtune.training.manifest import read_manifest


def run(command: str, args: list[str]) -> int:
    """Run `promote`, `rollback` or `deployments`.

    Raises:
        UserError: There is nothing to promote or to go back to, or the evidence speaks against it.
    """
    functions = {"promote": _promote, "rollback": _rollback, "deployments": _deployments}
    return functions[command](CommandParser(command, COMMANDS[command].description), args)


def _promote(parser: CommandParser, args: list[str]) -> int:
    """Copy, verify, compare with what is current, and point to it.

    Raises:
        UserError: There is nothing to promote, or the evidence speaks against it.
    """
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of a run")
    parser.add_argument("--to", metavar="NAME", required=True, help="Name that points to it, such as production")
    parser.add_argument("--as", dest="kind", metavar="KIND", default="adapter", help="Which of the run's exported "
                        "folders (default: adapter)")  # fmt: skip
    parser.add_argument("--reason", help="Why, for the history")
    parser.add_argument("--force", action="store_true", help="Whatever the evidence says; needs --reason")
    config = parser.parse_args(args)
    if config.force and not config.reason:
        raise UserError("--force: say why with --reason; both stand in the history")
    exported = config.run / config.kind
    if not exported.is_dir():
        raise UserError(f"{exported}: no such folder; formtune fit leaves the adapter of a run, formtune export others")
    manifest, task = read_manifest(exported), task_of(exported)
    outcomes = config.run / "outcomes" / ("after.jsonl" if config.kind == "adapter" else f"{config.kind}.jsonl")
    check_names(task, config.to)
    with locked(task):
        pointer = read_pointer(DEPLOYMENTS / task / f"{config.to}.json")
        version, before = f"{config.run.resolve().name}-{config.kind}", pointer.current
        if version == before:
            raise UserError(f"{pointer.name}: points to {version} already")
        evidence, objections = weigh(pointer, manifest, outcomes)
        if objections and not config.force:
            more = f" (and {len(objections) - 1} more)" if len(objections) > 1 else ""
            raise UserError(f"not promoted: {objections[0]}{more}; or --force --reason '...'")
        store(exported, pointer.version_folder(version))
        if outcomes.is_file():
            write_outcomes(pointer.outcomes(version), read_outcomes(outcomes))
        pointer.move("promote", version, config.reason, evidence=evidence, overruled=objections)
    print(f"{pointer.name}: {version}" + (f" (before: {before})" if before else ""))
    for line in (*_in_words(evidence), *(f"overruled: {objection}" for objection in objections)):
        print(line)
    print(f"serve it: formtune serve {pointer.name}")
    return 0


def _rollback(parser: CommandParser, args: list[str]) -> int:
    """Point to an earlier version again, once it is verified.

    Raises:
        UserError: There is none, or it is not as it was.
    """
    parser.add_argument("name", metavar="NAME", help="Such as production, or demo/production")
    parser.add_argument("--to", metavar="VERSION", help="Which version (default: the one before the current)")
    parser.add_argument("--reason", required=True, help="Why, for the history")
    config = parser.parse_args(args)
    found = find_pointer(config.name)
    with locked(found.task):
        pointer = read_pointer(found.folder / f"{found.alias}.json")  # nobody moves it any more
        stack, known = pointer.stack, {move["version"] for move in pointer.history}
        version = config.to or next(iter(stack[-2:-1]), None)
        if version is None:
            raise UserError(f"{pointer.name}: no version before {pointer.current}; --to names one of {_list(known)}")
        if version not in known:
            raise UserError(f"--to: {version} was never {pointer.name}; the versions are {_list(known)}")
        if version == pointer.current:
            raise UserError(f"{pointer.name}: points to {version} already")
        pointer.verified(version)
        pointer.move("rollback", version, config.reason)
    print(f"{pointer.name}: {version} (before: {stack[-1]})")
    print(f"serve it: formtune serve {pointer.name}")
    return 0


def _deployments(parser: CommandParser, args: list[str]) -> int:
    """Print what every name points to, and its history.

    Raises:
        UserError: A pointer cannot be read.
    """
    parser.parse_args(args)
    found = pointers()
    if not found:
        print("nothing is deployed yet; formtune promote RUN --to production deploys a run")
        return 0
    for pointer in found:
        print(f"{pointer.name}: {pointer.current}")
        for move in reversed(pointer.history):
            forced = " (forced)" if move.get("overruled") else ""
            reason = f": {move['reason']}" if move["reason"] else ""
            when = move["at"][:16].replace("T", " ")
            print(f"  {when} UTC  {move['action']:8}  {move['version']}{forced} by {move['by']}{reason}")
    return 0


def weigh(pointer: Pointer, manifest: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """What the test rows say of a version, and what speaks against promoting it.

    Args:
        pointer: Says what is current.
        manifest: Of the exported folder.
        path: Its outcomes.
    """
    objections: list[str] = []
    evidence: dict[str, Any] = {"outcomes": str(path), "against": pointer.current}
    try:
        evidence |= {"rows": len(rows := read_outcomes(path))}
        if not rows:
            raise UserError(f"{path}: no test rows")
        evidence["figures"] = figures(rows)
        if pointer.current:
            before = read_manifest(pointer.version_folder(pointer.current))
            if before["contract"] != manifest["contract"]:
                objections.append(
                    f"the contract is not that of {pointer.current}: what parses the answers must change with it"
                )
            runs = read_runs([str(pointer.outcomes(pointer.current)), str(path)])
            evidence["differences"] = compare(runs)["comparisons"][0]["differences"]
            for name in IN_WORDS:
                one = evidence["differences"][name]
                if one["verdict"] == "worse":
                    points = f"{100 * abs(one['value']):.1f} points (p = {one['p']:.2g}, {one['rows']:,} test rows)"
                    objections.append(f"{name} is worse than {pointer.current}'s by {points}")
    except UserError as error:
        objections.append(str(error))
    return evidence, objections


def _in_words(evidence: dict[str, Any]) -> list[str]:
    lines = []
    for name in IN_WORDS if "figures" in evidence else ():
        one = evidence["figures"][name]
        low, high = one["interval"]
        line = f"{name} {one['value']:.1%} ({low:.1%} to {high:.1%}) on {evidence['rows']:,} test rows"
        if "differences" in evidence:
            line += f"; against {evidence['against']}: {evidence['differences'][name]['verdict']}"
        lines.append(line)
    return lines


def _list(versions: set[str]) -> str:
    return ", ".join(sorted(versions))
