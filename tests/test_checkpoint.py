"""Checkpoints: plain content, whole files only, damage refused, and a failed write that costs nothing."""

import json
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch

from afd.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

STATE = {"model": {"weight": torch.arange(1000.0), "steps": torch.tensor(3)}, "optimizers": {"task": {"lr": 0.1}}}
METADATA = {"config": {"seed": 1, "name": "digits"}, "report": {"epoch": 4}}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "folder" / "last.pt"
    save_checkpoint(path, STATE, METADATA)
    return path


def assert_intact(path):
    state, metadata = load_checkpoint(path)
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert state["optimizers"] == STATE["optimizers"]
    assert {name: metadata[name] for name in METADATA} == METADATA


def test_comes_back_as_it_was(saved):
    assert_intact(saved)
    assert {"afd", "torch"} <= load_checkpoint(saved)[1].keys()


def test_loads_without_running_code(saved):
    content = torch.load(saved, weights_only=True)
    assert content["format"] == "afd-checkpoint"
    assert json.loads(content["metadata"])["report"] == {"epoch": 4}


def test_overwrites_and_leaves_nothing_beside(saved):
    save_checkpoint(saved, STATE, METADATA)
    assert [path.name for path in saved.parent.iterdir()] == ["last.pt"]
    assert_intact(saved)


def test_a_full_disk_leaves_the_previous_checkpoint(saved):
    """The file-size limit of a child process stands in for the disk: its write fails half-way."""
    script = f"""
        import resource, torch
        from pathlib import Path
        from afd.checkpoint import CheckpointError, save_checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint(Path({str(saved)!r}), {{"model": {{"weight": torch.zeros(1_000_000)}}}}, {{}})
        except CheckpointError as error:
            print(error)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert f"cannot write checkpoint {saved}: File too large; the previous checkpoint is untouched" in result.stdout
    assert [path.name for path in saved.parent.iterdir()] == ["last.pt"]
    assert_intact(saved)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*file/last.pt"):
        save_checkpoint(tmp_path / "file" / "last.pt", STATE, METADATA)


@pytest.mark.parametrize("content", [b"", b"root:x:0:0:root:/root:/bin/bash\n", b"\x80\x02}q\x00."])
def test_what_is_no_checkpoint_at_all_is_said_in_plain_words(content, tmp_path):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(CheckpointError) as told:
        load_checkpoint(tmp_path / "other")
    assert "index" not in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("tenth", range(10))
def test_truncated_files_are_refused(saved, tenth):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: len(whole) * tenth // 10])
    with pytest.raises(CheckpointError, match="is damaged or of another kind"):
        load_checkpoint(saved)


def test_one_flipped_bit_anywhere_is_refused(saved):
    """Weights, names, headers, padding and the checksum itself."""
    whole = saved.read_bytes()
    for at in [*range(0, len(whole), 61), *range(len(whole) - 40, len(whole))]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"is damaged|is not an afd checkpoint|format version"):
            load_checkpoint(saved)


def test_torch_and_zip_open_it(saved):
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
        assert len(archive.comment) == 32
    assert torch.equal(torch.load(saved, weights_only=True)["state"]["model"]["weight"], STATE["model"]["weight"])


def test_what_was_there_can_be_kept(saved):
    kept = saved.with_name("previous.pt")
    save_checkpoint(saved, {"model": {}}, {}, kept)
    assert_intact(kept)
    assert load_checkpoint(saved)[0] == {"model": {}}


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="is not an afd checkpoint"):
        load_checkpoint(tmp_path / "other.pt")
    torch.save({"format": "afd-checkpoint", "version": 99}, tmp_path / "later.pt")
    with pytest.raises(CheckpointError, match="format version 99; this afd reads 2"):
        load_checkpoint(tmp_path / "later.pt")
    torch.save({"format": "afd-checkpoint", "code": pytest.raises}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="damaged or of another kind"):
        load_checkpoint(tmp_path / "code.pt")
