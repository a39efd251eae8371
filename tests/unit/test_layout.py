"""Which folder of the package may import which, and the size of its files."""

import ast
import collections
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from formtune import files
from formtune.errors import UserError
from formtune.files import optional

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, CONTRIB = ROOT / "src/formtune", ROOT / "contrib/formtune_contrib"
OPTIONAL = {  # folder: what is deleted with it
    PACKAGE / "audit": [PACKAGE / "commands/audit.py"],
    PACKAGE / "sweep": [PACKAGE / "commands/sweep.py"],
    PACKAGE / "start": [PACKAGE / "commands/init.py"],
    PACKAGE / "report": [PACKAGE / "commands/compare.py", CONTRIB],
    PACKAGE / "export": [PACKAGE / "commands/export.py", CONTRIB],
    PACKAGE / "packing": [],
    PACKAGE / "constrained": [],
    PACKAGE / "quality": [],
    PACKAGE / "warm_start": [],
    CONTRIB: [],
}
OPTIONAL = {
    folder: files for folder, files in OPTIONAL.items() if folder.exists()
}  # a template's own copy may lack some
SHARED = (PACKAGE / "pages", PACKAGE / "tasks")  # by optional folders and their commands; deleted with the last of them
CORE = ("base", "configuration", "data", "evaluation", "formats", "model", "training")


def modules() -> dict[str, Path]:
    packages = (PACKAGE, CONTRIB)
    return {".".join(p.relative_to(one.parent).with_suffix("").parts): p for one in packages for p in one.rglob("*.py")}


@functools.cache
def imports() -> dict[str, set[str]]:
    """For each module those of both packages that it imports, anywhere in its text."""
    files = modules()
    edges = collections.defaultdict(set)
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            edges[name] |= {one for one in names if one in files and one != name}
    return edges


def folder(module: str) -> str:
    package, *parts = module.split(".")
    return package if package != "formtune" else parts[0] if parts else ""


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
    users = [name for name, imported in imports().items() if "formtune.cli" in imported]
    assert users == ["formtune.__main__"]


def test_the_core_imports_neither_an_optional_folder_nor_a_command():
    beyond = {path.name for path in (*OPTIONAL, *SHARED)} | {"demo", "commands"}
    for name, imported in imports().items():
        if folder(name) in CORE:
            assert not [one for one in imported if folder(one) in beyond], name


def test_formats_import_no_torch_and_data_and_model_do_not_import_each_other():
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
    for name, imported in imports().items():
        assert not {folder(one) for one in imported} & walls.get(folder(name), set()), name


def test_the_package_root_holds_the_entry_point_errors_and_files_alone():
    assert {p.name for p in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py", "errors.py", "files.py"}


def test_no_two_files_have_the_same_name():
    names = collections.Counter(path.name for path in modules().values() if not path.name.startswith("__"))
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize("folder", OPTIONAL, ids=lambda folder: folder.name)
def test_nothing_imports_an_optional_folder_that_can_be_deleted(folder):
    deleted = [folder, *OPTIONAL[folder]]
    files = modules()
    gone = {name for name, path in files.items() if any(path.is_relative_to(one) for one in deleted)}
    for name, imported in imports().items():
        assert name in gone or not imported & gone, name


def test_what_is_asked_of_an_optional_folder_exists_and_its_folder_can_be_deleted(monkeypatch):
    calls = {
        call for path in modules().values() for call in re.findall(r'optional\("(.*?)", "(.*?)"', path.read_text())
    }
    assert calls
    for module, name in calls:
        folder = PACKAGE / module.partition(".")[0]
        assert (folder in OPTIONAL and callable(optional(module, name))) or not folder.exists()
    monkeypatch.setattr(files, "__file__", "/nowhere/files.py")
    assert optional("packing.shared_prefixes", "share_prefixes") is None
    with pytest.raises(
        UserError, match="model.constrained: needs the optional folder `constrained`, which was deleted"
    ):
        optional("constrained.decoder", "Grammar", "model.constrained")


@pytest.mark.slow
def test_the_core_runs_the_demo_without_the_optional_folders(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "src/formtune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    deleted = {path for folder, files in OPTIONAL.items() for path in (folder, *files)} - {CONTRIB} | {*SHARED}
    for original in deleted:
        path = tmp_path / original.relative_to(ROOT)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}/src", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, ROOT / "tools/demo_rows.py", "data/demo/"], cwd=tmp_path, env=env, check=True)
    # None: as if the package, which is installed, were not.
    program = [sys.executable, "-c", "import sys; sys.modules['formtune_contrib'] = None; import formtune.__main__"]
    flags = ["--quick", "--trainer.max_steps", "2", "--data.max_evaluation_rows", "10", "--trainer.precision",
             "32-true"]  # fmt: skip
    done = subprocess.run(
        [*program, "train", "-c", "configs/demo.yaml", *flags], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "near-duplicates are not compared" in done.stdout
    assert list(tmp_path.glob("logs/demo/*/adapter/adapter_model.safetensors"))
    help_text = subprocess.run([*program, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    gone = ["serve", *(path.stem for path in deleted if path.is_file())]
    assert "\n  train " in help_text and not [name for name in gone if f"\n  {name} " in help_text]


def test_the_core_can_be_read_in_an_afternoon():
    lines = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {path.name for path in CONTRIB.glob("*.py") if len(path.read_text().splitlines()) > 300}
    assert not {path.name for path, count in lines.items() if count > 300}
    deleted = {path for folder, files in OPTIONAL.items() for path in (folder, *files)} | {*SHARED}
    core = [path for path in lines if not any(path.is_relative_to(one) for one in deleted)]
    assert sum(lines[path] for path in core) <= 7500 and sum(lines.values()) <= 12_000
