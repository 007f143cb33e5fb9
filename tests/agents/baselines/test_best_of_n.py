"""`python -m agents best-of-n` on tiny models: its numbers, its files, going on after a stop, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents.__main__ import main
from agents.baselines import best_of_n
from agents.baselines.best_of_n import BestOfNConfig, best_of, sizes
from agents.baselines.frontier import check_same_task
from agents.baselines.order import kl_bound
from tests.support import tiny
from tests.support.by_hand import perturb
from textenv.training.files import locked

NAME = "tests.agents.baselines.test_best_of_n"


def letters(prompts, responses):
    """A score that needs no model."""
    return [float(sum(response.encode())) for response in responses]


def fewer(prompts, responses):
    """A gold score that falls where `letters` rises."""
    return [-each for each in letters(prompts, responses)]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Best of 4 on three prompts of the tiny model."""
    base = tiny.save(tiny.language_model(), tmp_path / "base")
    items = (f"reference={base}", f"reward={NAME}:letters", f"prompts={json.dumps([*'abcdefghijklmno'])}")
    where = [word for item in (*items, "max_new_tokens=4") for word in ("--env-arg", item)]
    small = ["--samples", "4", "--evaluation-prompts", "3", "--batch-size", "4"]
    return ["best-of-n", *where, *small, "--gold", f"{NAME}:fewer", "--output"]


def read(folder: Path) -> tuple[dict, list[dict]]:
    """The results and the responses."""
    lines = (folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "best_of_n.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def test_numbers_by_hand() -> None:
    """Of two prompts and three samples: means over all draws, the gold of the best by score, errors over prompts."""
    samples = [
        {"score": [1.0, 2.0, 4.0], "gold": [5.0, 0.0, 1.0], "log_ratio": [0.0, 0.3, 0.6]},
        {"score": [0.0, 0.0, 3.0], "gold": [1.0, 3.0, 2.0], "log_ratio": [0.0, 0.0, 0.0]},
    ]
    one, two, three = best_of(samples, 3)
    assert [row["n"] for row in (one, two, three)] == sizes(3) == [1, 2, 3]
    assert one["score"] == pytest.approx((7 / 3 + 1) / 2) and one["gold"] == pytest.approx(2.0)
    assert two["score"] == pytest.approx(((2 + 4 + 4) / 3 + (0 + 3 + 3) / 3) / 2)
    assert two["gold"] == pytest.approx(((0 + 1 + 1) / 3 + (2 + 2 + 2) / 3) / 2)  # a tie of 1 and 3 is their mean
    assert two["kl"] == pytest.approx(kl_bound(2) + (0.3 + 0.6 + 0.6) / 3 / 2)
    assert three["score"] == 3.5 and three["score_error"] == pytest.approx(0.5) and three["gold"] == 1.5
    assert sizes(64) == [1, 2, 4, 8, 16, 32, 64] and sizes(1) == [1]


def test_of_the_reference(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The score rises with n and the gold score falls; the KL is the bound; table, picture and responses are there."""
    main([*command, str(tmp_path / "out")])
    results, responses = read(tmp_path / "out")
    rows = results["rows"]
    assert [row["n"] for row in rows] == [1, 2, 4] and [row["kl"] for row in rows] == [kl_bound(n) for n in (1, 2, 4)]
    assert rows[0]["score"] < rows[1]["score"] < rows[2]["score"]
    for row in rows:
        assert row["gold"] == pytest.approx(-row["score"])
    assert len(responses) == 3 and all(len(row["responses"]) == 4 for row in responses)
    mean = sum(max(row["score"]) for row in responses) / 3
    assert rows[2]["score"] == pytest.approx(mean)
    for row in responses:
        assert row["score"] == letters(None, row["responses"])
    assert "KL at most" in capsys.readouterr().out
    assert (tmp_path / "out" / "best_of_n.png").stat().st_size > 10_000


def test_a_stopped_job_goes_on(tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after a prompt, in the middle of a line, and resumed: the same responses; other settings are refused."""
    main([*command, str(tmp_path / "whole")])
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr("agents.baselines.best_of_n.best_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            main([*command, str(cut)])
    lines = (cut / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    (cut / "responses.jsonl").write_text(lines[0] + "\n" + lines[1][:20], encoding="utf-8")
    with pytest.raises(SystemExit, match="exists already and is not empty"):
        main([*command, str(cut)])
    with pytest.raises(SystemExit, match="another content of: hashes, seed; resume with"):
        main([*command, str(cut), "--resume", "--seed", "1"])
    main([*command, str(cut), "--resume"])
    assert read(cut)[1] == read(tmp_path / "whole")[1] and read(cut)[0]["rows"] == read(tmp_path / "whole")[0]["rows"]


@pytest.fixture
def stopped(tmp_path: Path, command: list[str]) -> tuple[list[str], Path, list[str]]:
    """A command of two prompts a batch, the folder of its job, stopped at its end, and the lines of its responses."""
    command[command.index("--batch-size") + 1] = "8"
    main([*command, str(tmp_path / "out")])
    (tmp_path / "out" / "best_of_n.json").unlink()
    lines = (tmp_path / "out" / "responses.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [*command, str(tmp_path / "out"), "--resume"], tmp_path / "out", lines


def test_batches_are_whole(stopped: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sampled beside a prompt rounds its numbers: an unfinished batch is sampled again, as large as before."""
    command, out, lines = stopped
    sampled, original = [], best_of_n.sample_prompts

    def noted(setting, model, prompts, *rest):
        sampled.append(len(prompts))
        return original(setting, model, prompts, *rest)

    monkeypatch.setattr(best_of_n, "sample_prompts", noted)
    for kept, batches in ((0, [2, 1]), (1, [2, 1]), (2, [1]), (3, [])):
        sampled.clear()
        (out / "responses.jsonl").write_text("".join(lines[:kept]) + '{"prom', encoding="utf-8")
        main(command)
        assert sampled == batches
        assert (out / "responses.jsonl").read_text(encoding="utf-8") == "".join(lines)
    with pytest.raises(SystemExit, match="another content of: batch_size; resume with"):
        main([*command, "--batch-size", "4"])


def test_a_kill_loses_no_responses(stopped: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of responses is replaced as a whole: what fails while it is cut leaves all of it."""
    command, out, lines = stopped
    (out / "responses.jsonl").write_text("".join(lines) + '{"prom', encoding="utf-8")

    def fails(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("textenv.training.files.os.fsync", fails)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            main(command)
    assert (out / "responses.jsonl").read_text(encoding="utf-8") == "".join(lines) + '{"prom'


def test_rows_of_another_job(stopped: tuple) -> None:
    """Rows that are doubled, of other prompts, or without their numbers are refused, and so is a damaged start."""
    command, out, lines = stopped
    row = json.loads(lines[0])
    for text in (
        "".join(lines * 2),
        "5\n" * 3,
        "".join([lines[0], lines[0], lines[2]]),
        "".join([json.dumps(row | {"score": [1.0]}) + "\n", *lines[1:]]),
        "".join([json.dumps(row | {"log_ratio": "abcd"}) + "\n", *lines[1:]]),
        "".join([json.dumps(row | {"gold": [None] * 4}) + "\n", *lines[1:]]),
    ):
        (out / "responses.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit, match=r"line \d: not what this job writes there.* remove this line"):
            main(command)
    for text in ("{", "[1]", "5"):
        (out / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit, match=r"config.json' is damaged, so this job cannot be resumed; choose another"):
            main(command)


def test_a_folder_is_of_one_process(stopped: tuple) -> None:
    """While one process samples into a folder, no other does."""
    command, out, _ = stopped
    with locked(out), pytest.raises(SystemExit, match="another process is training in"):
        main(command)
    main(command)


def test_killed_before_it_began(tmp_path: Path, command: list[str]) -> None:
    """What a process leaves that is killed before its job has begun does not stand in the way of the next one."""
    out = tmp_path / "out"
    out.mkdir()
    for name in (".lock", "config.json.new"):
        (out / name).write_text("", encoding="utf-8")
    with pytest.raises(SystemExit, match="holds no job to resume; leave --resume out"):
        main([*command, str(out), "--resume"])
    main([*command, str(out)])
    assert len(read(out)[1]) == 3


def test_of_another_model(tmp_path: Path, command: list[str]) -> None:
    """Of a model that is not the reference, the KL to the reference is measured and the bound added to it."""
    model = tiny.language_model()
    perturb(model)
    other = tiny.save(model, tmp_path / "other")
    main([*command, str(tmp_path / "out"), "--model", other])
    results, responses = read(tmp_path / "out")
    mean = sum(sum(row["log_ratio"]) / 4 for row in responses) / 3
    assert results["rows"][0]["kl"] == pytest.approx(mean) and mean > 0


@pytest.fixture
def trained(tmp_path: Path, command: list[str]) -> tuple[Path, Path]:
    """The folder of a short run in the command's environment, and that of a training from pairs in it."""
    where = command[1 : command.index("--samples")]
    run, pairs = tmp_path / "run", tmp_path / "pairs"
    small = ["--iterations", "1", "--rollout-size", "4", "--minibatch-size", "4", "--tracker", "none"]
    main(["train", *where, *small, "--evaluation-prompts", "3", "--run", str(run)])
    main(["dpo", *where, "--evaluation-prompts", "3", "--batch-size", "4", "--pairs", "8", "--output", str(pairs)])
    return run, pairs


def test_beside_runs(
    tmp_path: Path, command: list[str], trained: tuple, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """Runs of the same task are drawn beside; of another reference or reward they are refused before any sampling."""
    run, pairs = trained
    beside = ["--run", str(run), "--run", str(pairs)]
    capsys.readouterr()
    main([*command, str(tmp_path / "same"), *beside])
    assert "held-out prompts than" not in capsys.readouterr().out
    main([*command, str(tmp_path / "seed"), *beside, "--seed", "1"])
    assert capsys.readouterr().out.count("is of other held-out prompts than these samples") == 2
    model = tiny.language_model()
    perturb(model)
    other = tiny.save(model, tmp_path / "other")
    monkeypatch.setattr(best_of_n, "_sample_all", None)
    for folder in (run, pairs):
        for item, says in ((f"reference={other}", "reference"), (f"reward={NAME}:fewer", "reward")):
            words = [item if word.startswith(item.partition("=")[0]) else word for word in command]
            with pytest.raises(SystemExit, match=f"{folder.name}', whose {says} is another than these samples'; give"):
                main([*words, str(tmp_path / "out"), "--run", str(folder)])
            assert not (tmp_path / "out").exists()


def test_rewards_that_are_models(tmp_path: Path) -> None:
    """Reward models are told apart by their weights, whatever their names; functions in a sum by name and weight."""
    (tmp_path / "run").mkdir()
    summary = {"env": "TextGen-v0", "settings": {"env_arg": ['reward={"a": 1.0, "m:f": 0.5}']}}
    summary |= {"fingerprints": {"reference": "r", "reward model 1": "m", "evaluation prompts": "e"}}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    same = summary["fingerprints"]
    assert not check_same_task(tmp_path / "run", same, {"b": 1.0, "m:f": 0.5})
    assert check_same_task(tmp_path / "run", same | {"evaluation prompts": "o"}, {"b": 1.0, "m:f": 0.5})
    for found, reward in (
        (same | {"reward model 1": "o"}, {"a": 1.0, "m:f": 0.5}),
        (same | {"reward model 2": "m"}, {"a": 1.0, "m:f": 0.5}),
        (same, {"a": 1.0, "m:g": 0.5}),
        (same, {"a": 1.0, "m:f": 0.6}),
        (same, "a"),
    ):
        with pytest.raises(ValueError, match="whose reward is another"):
            check_same_task(tmp_path / "run", found, reward)


def test_damaged_runs(tmp_path: Path, command: list[str], trained: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose files are damaged ends in a sentence before any sampling."""
    run, pairs = trained
    monkeypatch.setattr(best_of_n, "_sample_all", None)
    summary = json.loads((pairs / "summary.json").read_text(encoding="utf-8"))
    without = {name: value for name, value in summary.items() if name != "fingerprints"}
    for file, text, says in (
        (run / "summary.json", "{", "whose files do not say what this version writes"),
        (run / "summary.json", "5", "whose files do not say what this version writes"),
        (run / "summary.json", "[]", "whose files do not say what this version writes"),
        (run / "summary.json", json.dumps(summary | {"kl_per_response": None}), "where kl is not always a number"),
        (run / "summary.json", json.dumps(summary | {"score_before": "x"}), "where score is not always a number"),
        (run / "config.json", "{", "is not a configuration that this version can read"),
        (pairs / "summary.json", json.dumps(without), "whose files do not say what this version writes"),
        (pairs / "summary.json", json.dumps(summary | {"fingerprints": 5}), "whose files do not say"),
        (pairs / "summary.json", json.dumps(summary | {"settings": None}), "whose files do not say"),
    ):
        whole = file.read_bytes()
        file.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit, match=says):
            main([*command, str(tmp_path / "out"), "--run", str(file.parent)])
        assert not (tmp_path / "out").exists()
        file.write_bytes(whole)


def test_refusals(tmp_path: Path, command: list[str]) -> None:
    """What cannot be measured or drawn ends in a sentence before any work."""
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        BestOfNConfig(output=tmp_path, samples=0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "summary.json").write_text('{"return_after": 1.0}', encoding="utf-8")
    for flags, says in [
        (["--run", str(tmp_path / "empty")], "has no summary.json; give the folder of a finished run"),
        (["--run", str(tmp_path / "control")], "summary has no score and no KL"),
        (["--resume"], "holds no job to resume; leave --resume out"),
        (["--model", str(tmp_path / "nothing")], "no model configuration in"),
    ]:
        with pytest.raises(SystemExit, match=says):
            main([*command, str(tmp_path / "out"), *flags])
        assert not (tmp_path / "out").exists()
