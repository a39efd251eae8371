"""`formtune promote`, `rollback` and `deployments`: deploy on evidence, roll back with a reason."""

import json
import re
from pathlib import Path

from formtune.commands import COMMANDS
from formtune.errors import UserError
from formtune.evaluation.outcomes import COMPARED, rate, read_outcomes, write_outcomes
from formtune.export.exported import Exported, read_manifest, verify
from formtune.report.comparison import compare, print_comparison, read_runs
from formtune.tasks.parsers import CommandParser
from formtune_contrib import registry


def run(command: str, args: list[str]) -> None:
    functions = {"promote": _promote, "rollback": _rollback, "deployments": _deployments}
    functions[command](CommandParser(command, COMMANDS[command].description), args)


def _promote(parser: CommandParser, args: list[str]) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of a run")
    parser.add_argument("--to", metavar="NAME", required=True, help="Deployment name, such as production")
    parser.add_argument(
        "--as",
        dest="kind",
        default="adapter",
        help="Folder of the export, such as merged or gguf-q8_0 (default: adapter)",
    )
    parser.add_argument("--reason", help="Why, for the history")
    parser.add_argument("--force", action="store_true", help="Promote despite objections; needs --reason")
    config = parser.parse_args(args)
    if config.force and not config.reason:
        raise UserError("--force: say why with --reason; the history records both")
    exported = Exported(config.run / config.kind)
    version, name = f"{config.run.resolve().name}-{config.kind}", f"{exported.task}/{config.to}"
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(
            f"{name!r}: a task and --to have letters, digits, '.', '_' and '-', and begin with a letter or digit"
        )
    with registry.locked(name) as deployment:
        if version == deployment.current:
            raise UserError(f"{name}: already points to {version}")
        objections = objections_to(deployment, exported)
        if objections and not config.force:
            raise UserError(f"not promoted: {', and '.join(objections)}; or --force --reason '...'")
        registry.store(exported.folder, deployment.version_folder(version))
        if exported.outcomes.is_file():
            write_outcomes(deployment.outcomes(version), read_outcomes(exported.outcomes))
        deployment.move("promote", version, config.reason, objections)
    _print(deployment, moves=0)


def _rollback(parser: CommandParser, args: list[str]) -> None:
    parser.add_argument("name", metavar="NAME", help="Such as demo/production, or production if one task has it")
    parser.add_argument("--to", metavar="VERSION", help="Version (default: the one before the current)")
    parser.add_argument("--reason", required=True, help="Why, for the history")
    config = parser.parse_args(args)
    name = registry.full_name(config.name)
    with registry.locked(name) as deployment:
        version = config.to or deployment.previous or "none"
        others = {move["version"] for move in deployment.history} - {deployment.current}
        if version not in others:
            choice = f"choose --to from {', '.join(sorted(others))}" if others else "there is no earlier version"
            raise UserError(f"{name}: {version} is not an earlier version; {choice}")
        verify(deployment.version_folder(version))
        deployment.move("rollback", version, config.reason)
    _print(deployment, moves=0)


def _deployments(parser: CommandParser, args: list[str]) -> None:
    parser.parse_args(args)
    for name in registry.names():
        _print(registry.Deployment(name))
    if not registry.names():
        print("nothing is deployed yet; formtune promote RUN --to production deploys a run")


def _print(deployment: registry.Deployment, moves: int | None = None) -> None:
    """Print the current version and its last moves, by default all."""
    replaced = deployment.history[-1]["replaced"]
    print(f"{deployment.name}: {deployment.current}" + (f" (before: {replaced})" if replaced else ""))
    for move in deployment.history[::-1][:moves]:
        reasons = [move["reason"] or "no reason given", *(f"overruled: {objection}" for objection in move["overruled"])]
        print(f"  {move['at']}  {move['action']:8}  {move['version']} by {move['by']}: {'; '.join(reasons)}")
    back = f", or formtune rollback {deployment.name} --reason '...'" if deployment.previous else ""
    print(f"next: formtune serve {deployment.name}{back}")


def objections_to(deployment: registry.Deployment, exported: Exported) -> list[str]:
    """The objections to promoting an export; prints its comparison with the current version."""
    current, objections = deployment.current, list[str]()
    try:
        if not exported.outcomes.is_file() and exported.config["model"].get("constrained"):
            remedy = f"run formtune export {exported.folder.parent} first, to evaluate it unconstrained"
            raise UserError(f"the run was evaluated with constrained decoding; {remedy}")
        [(_, outcomes)] = read_runs([str(exported.outcomes)])
        if not rate(outcomes, "exact")[0]:
            objections.append("none of its answers to the test rows has a valid format")
        metrics = exported.outcomes.with_name(f"{exported.folder.name}.json")
        if metrics.is_file() and (reason := json.loads(metrics.read_text(encoding="utf-8"))["refused"]):
            objections.append(f"its export was refused: {reason}")
        if current is None:
            return objections
        if read_manifest(deployment.version_folder(current))["format"] != exported.manifest["format"]:
            objections.append(f"the format differs from that of {current}, which downstream code parses")
        comparison = compare(read_runs([str(deployment.outcomes(current)), str(exported.outcomes)]))
        print_comparison(comparison)
        for name in COMPARED:
            difference = comparison["runs"][1]["metrics"][name]["difference"]
            if difference["verdict"] == "worse":
                objections.append(f"{name} is worse than {current}'s (p = {difference['p']:.2g})")
    except UserError as error:
        objections.append(str(error))
    return objections
