"""The shared document survives a file, and nothing else is taken for one."""

import json

import pytest
from full_disk import REASONS

from afd.bench.document import FORMAT, VERSION, DocumentError, read
from afd.bench.show import chart
from afd.files import FileError, FolderError


def test_what_is_written_is_what_is_read(document, tmp_path):
    made = document({"PGD": {"afd": (1.0, 2.0, 3.0), "floor": (0.5, 0.6, 0.7)}})
    made.write(tmp_path / "new" / "a.json")
    assert read(tmp_path / "new" / "a.json") == made
    assert read(tmp_path / "new" / "a.json", "attacks") == made
    kept = json.loads((tmp_path / "new" / "a.json").read_text())
    assert (kept["format"], kept["version"]) == (FORMAT, VERSION)
    assert {"afd", "python", "torch"} <= set(kept["versions"])
    assert kept["cases"]["PGD"]["candidates"]["afd"]["seconds"] == {"p20": 1.0, "p50": 2.0, "p80": 3.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has format None, version None; afd bench reads format 'afd-bench', version 1"),
        ('{"benchmark": "attacks", "seconds": {}}', "has format None, version None"),
        ('{"format": "afd-bench", "version": 2}', "has format 'afd-bench', version 2; afd bench reads"),
        ('{"format": "afd-bench", "version": 1, "benchmark": "attacks"}', "damaged: 'cases'"),
        ('{"format": "afd-bench", "version": 1, "benchmark": "attacks", "cases": {}}', "damaged: .*missing"),
        (
            '{"format": "afd-bench", "version": 1, "benchmark": "kernels"}',
            "is of benchmark 'kernels'; it must be of",
        ),
    ],
)
def test_other_files_are_named(text, message, tmp_path):
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(DocumentError, match=message) as raised:
        read(path, "attacks")
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DocumentError, match=r"none.json cannot be read: No such file"):
        read(tmp_path / "none.json")


def test_a_full_disk_leaves_the_earlier_document_and_no_picture(document, disk):
    path = disk.folder / "out" / "bench.json"
    made = document({"PGD": {"afd": (1.0, 2.0, 3.0)}})
    made.write(path)
    with disk.full():
        for write, at in ((made.write, path), (lambda at: chart(at, made), path.with_suffix(".png"))):
            with pytest.raises(FileError, match=f"cannot write {at}: {REASONS}"):
                write(at)
    assert read(path) == made
    assert disk.files() == ["out/bench.json"]


def test_a_folder_that_is_a_file_is_named(document, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="file is a file; it must be a folder"):
        document({}).write(tmp_path / "file" / "bench.json")
