"""A manifest finds every file that is missing, changed or led elsewhere, and says so in one line."""

import json

import pytest

from formtune.base.folder import identity
from formtune.errors import UserError
from formtune.export.exported import read_manifest, verify
from formtune.export.manifest import base_files, file_hash, write_manifest


@pytest.fixture
def folder(tmp_path, base):
    folder = tmp_path / "adapter"
    (folder / "inner").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "format.json", "config.yaml", "chat_template.jinja", "inner/a.json"):
        (folder / name).write_text(name)
    write_manifest(folder, "adapter", base, "abc")
    return folder


def test_a_manifest_names_every_file_the_base_and_what_it_was_made_from(folder, base):
    manifest = verify(folder)
    assert manifest == read_manifest(folder)
    assert set(manifest["files"]) == {
        "adapter_model.safetensors", "format.json", "config.yaml", "chat_template.jinja", "inner/a.json",
    }  # fmt: skip
    assert manifest["base"] == {"path": base, "files": base_files(base), "identity": identity(base)}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(manifest["base"]["files"])
    assert manifest["format"] == file_hash(folder / "format.json") and manifest["data"] == "abc"
    assert manifest["template"] == file_hash(folder / "chat_template.jinja")
    assert {"torch", "peft", "python"} <= set(manifest["versions"]) and manifest["verification"] is None


def test_a_card_written_later_and_a_link_to_the_folder_change_nothing(folder, tmp_path):
    (folder / "README.md").write_text("card")
    (tmp_path / "current").symlink_to(folder)
    assert verify(tmp_path / "current")["kind"] == "adapter"


def _changed(folder):
    (folder / "format.json").write_text("other")


def _missing(folder):
    (folder / "config.yaml").unlink()


def _link(folder):
    (folder / "format.json").unlink()
    (folder.parent / "outside").write_text("format.json")
    (folder / "format.json").symlink_to(folder.parent / "outside")


def _renamed(name):
    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = manifest["files"].pop("format.json")
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def _text(text):
    return lambda folder: (folder / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed, "format.json: changed since it was exported"),
        (_missing, "config.yaml: changed since it was exported, missing"),
        (_link, "format.json: changed since it was exported, missing, or outside the folder"),
        (_renamed("../outside"), "outside: changed since it was exported, missing, or outside"),
        (_renamed("inner/../format.json"), "inner/../format.json: changed"),
        (_renamed("/etc/hostname"), "/etc/hostname: changed"),
        (_renamed("a\0b"), ": changed since"),
        (_text("{"), "manifest.json: not a manifest"),
        (_text("[]"), "manifest.json: not a manifest"),
        (_text('{"kind": "adapter", "files": {}, "base": {"path": 3, "files": {}}}'), "not a manifest"),
        (_text('{"kind": "adapter", "files": {"a": 3}, "base": {"path": "x", "files": {}}}'), "not a manifest"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: No such file"),
    ],
)
def test_a_folder_that_is_not_as_it_was_is_refused_in_one_line_that_names_the_file(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message) as refused:
        verify(folder)
    assert len(str(refused.value).splitlines()) == 1


def test_a_base_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        base_files(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="neither a folder nor in the local"):
        base_files("nobody/nothing")
