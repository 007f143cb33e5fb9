"""The benchmark for GPUs runs at small sizes where there is none, so that it works the first time one is there."""

import json

import pytest

from benchmarks.cuda.__main__ import SECTIONS, Settings, main


@pytest.mark.slow
def test_every_section_runs_without_a_gpu(tmp_path):
    """No section stops, and the file holds the rows of all of them."""
    main(Settings(output=tmp_path))
    rows = json.loads((tmp_path / "cuda.json").read_text())["rows"]
    assert [row for row in rows if "error" in row] == []
    assert {row["section"] for row in rows if row["case"] != "left out"} == set(SECTIONS)
