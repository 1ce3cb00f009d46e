"""The shared document survives a file, and nothing else is taken for one."""

import json

import pytest

from afd.bench.document import FORMAT, VERSION, DocumentError, read


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
