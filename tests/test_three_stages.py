"""examples/three_stages.md: its commands run, one after the other, each on what the one before wrote."""

import contextlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from agents.__main__ import main
from textenv.reviews.weights import SUPERVISED

EXAMPLES = Path(__file__).parent.parent / "examples"
SHRUNK = {  # flags that make a command short; a later flag counts
    "supervised": ["--epochs", "12"],
    "reward-model": ["--epochs", "4"],
    "train": ["--iterations", "6"],
    "evaluate": [],
    "generate": ["--samples", "1"],
}


def commands():
    """The arguments of every `python -m agents` in the page."""
    (block,) = re.findall(r"^```bash\n(.*?)^```", (EXAMPLES / "three_stages.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for line in block.splitlines() if line.startswith("python -m agents ")]
    return [[str(SUPERVISED) if word == "$BASE" else word for word in line[3:]] for line in lines]


@pytest.mark.slow
def test_five_commands(tmp_path, capsys):
    """From labeled sentences to a policy that writes good ones: the page's commands, shrunk."""
    for data in EXAMPLES.glob("outings*.jsonl"):
        shutil.copy(data, tmp_path)
    names = [command[0] for command in commands()]
    assert names == list(SHRUNK)
    with contextlib.chdir(tmp_path):
        for command in commands():
            main([*command, *SHRUNK[command[0]]])
    printed = capsys.readouterr().out
    assert "held-out loss" in printed and "held-out accuracy" in printed and "The picnic" in printed
    policy = tmp_path / "three" / "policy"
    assert (policy / "actor" / "model.safetensors").exists()
    summary = json.loads((policy / "summary.json").read_bytes())
    assert summary["score_after"] > summary["score_before"] + 0.2  # of one response to each of 16 prompts


def test_the_page_tells_its_data():
    """The numbers of the page are those of its files, and every label is there."""
    rows = [json.loads(line) for line in (EXAMPLES / "outings.jsonl").read_text().splitlines()]
    assert f"holds {len(rows)} sentences" in (EXAMPLES / "three_stages.md").read_text()
    assert len({row["text"] for row in rows}) == len(rows) and {row["label"] for row in rows} == {0, 1}
    prompts = [json.loads(line)["prompt"] for line in (EXAMPLES / "outings_prompts.jsonl").read_text().splitlines()]
    assert f"holds {len(prompts)} ways to begin one" in (EXAMPLES / "three_stages.md").read_text()
    for prompt in prompts:  # both a good and a bad sentence begin so
        assert {row["label"] for row in rows if row["text"].startswith(prompt)} == {0, 1}
