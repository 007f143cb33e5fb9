"""The GPU benchmark also runs without a GPU at small sizes, so that it works the first time on one."""

import json

import pytest

from benchmarks.cuda.__main__ import SECTIONS, Settings, main


@pytest.mark.slow
def test_every_section_runs_without_a_gpu(tmp_path):
    """No section fails, and cuda.json holds rows of every section."""
    main(Settings(output=tmp_path))
    rows = json.loads((tmp_path / "cuda.json").read_text())["rows"]
    assert [row for row in rows if "error" in row] == []
    assert {row["section"] for row in rows if row["case"] != "skipped"} == set(SECTIONS)
