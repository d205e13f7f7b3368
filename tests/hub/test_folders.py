"""Folders: found by name, fetched, replaced whole."""

import errno
import os

import pytest

from vqtok.hub import folders


def test_configurations_are_found_by_name(tmp_path):
    names = folders.config_names()
    assert "image/vqvae2-digits" in names
    for name in names:
        assert any(folders.config_folder(name).glob("*.json"))
    assert folders.config_folder(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="did you mean 'image/vqvae2-digits'"):
        folders.config_folder("image/vqvae2-digit")
    with pytest.raises(ValueError, match=r"no configuration 'zzz': The configurations are .*image/vqvae2-digits"):
        folders.config_folder("zzz")


def test_the_wheel_comes_first(tmp_path, monkeypatch):
    inside = tmp_path / "image" / "only-here"
    inside.mkdir(parents=True)
    (inside / "config.json").write_text("{}")
    monkeypatch.setattr(folders, "_CONFIG_ROOTS", (tmp_path, tmp_path / "absent"))
    assert folders.config_folder("image/only-here") == inside
    assert folders.config_names() == ["image/only-here"]


def test_replace_files_keeps_what_it_does_not_write(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.json").write_text("kept")
    (tmp_path / "config.json").write_text("old")
    with folders.replace_files(tmp_path, last="config.json") as staging:
        (staging / "config.json").write_text("new")
        (staging / "sub").mkdir()
        (staging / "sub" / "a.txt").write_text("a")
        assert (tmp_path / "config.json").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "config.json", "metrics.json", "sub"]
    assert (tmp_path / "config.json").read_text() == "new" and (tmp_path / "sub" / "a.txt").read_text() == "a"


def test_the_last_file_is_renamed_last(tmp_path, monkeypatch):
    renamed = []
    replace = os.replace
    monkeypatch.setattr(folders.os, "replace", lambda a, b: (renamed.append(b.name), replace(a, b)))
    with folders.replace_files(tmp_path, last="config.json") as staging:
        for name in ("config.json", "model.safetensors", "a.json"):
            (staging / name).write_text("")
    assert renamed[-1] == "config.json" and len(renamed) == 3


def test_a_failure_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    for folder in (tmp_path, tmp_path / "new" / "folder"):
        with (
            pytest.raises(OSError, match="No space left on device. What was there is unchanged") as caught,
            folders.replace_files(folder, last="a") as staging,
        ):
            (staging / "a").write_text("new")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert caught.value.errno == errno.ENOSPC and str(folder) in str(caught.value)
    assert (tmp_path / "a").read_text() == "old"
    assert not (tmp_path / "new" / "folder").exists()
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []
    with pytest.raises(OSError, match="is a file"), folders.replace_files(tmp_path / "a", last="a"):
        pass


def test_fetching_from_the_hub_is_one_snapshot(tmp_path, monkeypatch):
    commit = tmp_path / "0123abcd"
    (commit / "vq_tokenizer").mkdir(parents=True)
    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(commit)

    monkeypatch.setattr(folders, "snapshot_download", snapshot_download)
    found = folders.fetch_folder("me/vq", ["config.json", "*.safetensors"], revision="v1", subfolder="vq_tokenizer")
    assert found == (commit / "vq_tokenizer", "0123abcd")
    assert asked["repo"] == "me/vq" and asked["revision"] == "v1"
    assert asked["allow_patterns"] == ["vq_tokenizer/config.json", "vq_tokenizer/*.safetensors"]
    with pytest.raises(FileNotFoundError, match="no subfolder 'other'"):
        folders.fetch_folder("me/vq", ["*"], subfolder="other")


def test_what_is_no_folder_and_no_repository(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file"):
        folders.fetch_folder(tmp_path / "file", ["*"])
    for path in (tmp_path / "none", str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            folders.fetch_folder(path, ["*"])
    with pytest.raises(OSError, match="no folder 'me/none' here, and the Hub repository of that name cannot be read"):
        folders.fetch_folder("me/none", ["*"])
