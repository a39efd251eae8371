"""The walls between the folders of the package, and the size of its files."""

import ast
import collections
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src/formtune"
OPTIONAL = {  # folder: what is deleted with it
    "audit": ["commands/audit.py"],
    "sweep": ["commands/sweep.py"],
    "deploy": ["commands/promote.py", "commands/serve.py", "commands/check_endpoint.py"],
    "export": ["deploy", "commands/export.py", "commands/preflight.py", "commands/promote.py", "commands/serve.py",
               "commands/check_endpoint.py"],
    "commands/synthesize.py": [],
}  # fmt: skip
CORE = ("base", "configuration", "data", "evaluation", "formats", "model", "training")


def modules() -> dict[str, Path]:
    return {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}


def imports() -> dict[str, set[str]]:
    """For each module those of the package that it imports, anywhere in its text."""
    files = modules()
    edges = collections.defaultdict(set)
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            edges[name] |= {one for one in found if one in files and one != name}
    return edges


def folder(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def test_there_are_no_import_circles():
    edges, done = imports(), set()

    def visit(module, above):
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in sorted(edges[module]):
                visit(other, [*above, module])
            done.add(module)

    for module in sorted(edges):
        visit(module, [])


def test_nothing_imports_the_entry_point():
    users = [name for name, found in imports().items() if "formtune.cli" in found]
    assert users == ["formtune.__main__"]


def test_the_core_imports_neither_an_optional_folder_nor_a_command():
    beyond = {"audit", "sweep", "export", "deploy", "demo", "commands"}
    for name, found in imports().items():
        if folder(name) in CORE:
            assert not [one for one in found if folder(one) in beyond], name


def test_formats_know_no_torch_and_data_and_model_do_not_know_each_other():
    for name, path in modules().items():
        text = path.read_text()
        if folder(name) == "formats":
            assert not any(
                f"import {one}" in text or f"from {one}" in text for one in ("torch", "lightning", "transformers")
            )
    walls = {
        "data": {"model", "evaluation", "training"},
        "model": {"data", "training"},
        "formats": {"base", "data", "model"},
    }
    for name, found in imports().items():
        assert not {folder(one) for one in found} & walls.get(folder(name), set()), name


def test_the_package_root_holds_the_entry_point_and_the_ground_alone():
    assert {p.name for p in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py", "errors.py", "files.py"}


def test_no_two_files_have_the_same_name():
    names = collections.Counter(path.name for path in PACKAGE.rglob("*.py") if not path.name.startswith("__"))
    optional = {"audit.py", "sweep.py", "export.py"}
    assert not [name for name, count in names.items() if count > 1 and name not in optional]


@pytest.mark.slow
@pytest.mark.parametrize("folder", OPTIONAL)
def test_the_core_runs_the_demo_without_an_optional_folder(folder, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "src/formtune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name in (folder, *OPTIONAL[folder]):
        path = tmp_path / "src/formtune" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    env = os.environ | {"PYTHONPATH": f"{tmp_path}/src", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m"]
    subprocess.run([*program, "formtune.demo.generator", "data/demo/"], cwd=tmp_path, env=env, check=True)
    words = [
        "--quick",
        "--trainer.max_steps",
        "2",
        "--data.max_evaluation_rows",
        "10",
        "--trainer.precision",
        "32-true",
    ]
    done = subprocess.run(
        [*program, "formtune", "train", "-c", "configs/demo.yaml", *words], cwd=tmp_path, env=env, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.glob("logs/demo/*/adapter/adapter_model.safetensors"))
    listed = subprocess.run(
        [*program, "formtune", "--help"], cwd=tmp_path, env=env, capture_output=True, text=True
    ).stdout
    gone = [Path(name).stem for name in (folder, *OPTIONAL[folder]) if name.endswith(".py")]
    assert not [name for name in gone if f"\n  {name.replace('_', '-')} " in listed]


def test_no_file_has_more_than_300_lines():
    long = {path.name: count for path in PACKAGE.rglob("*.py") if (count := len(path.read_text().splitlines())) > 300}
    assert not long
