"""The page of a run: its numbers, its safety, its size, and the command that shows it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import struct
import threading
import urllib.error
import urllib.request
from base64 import b64encode
from functools import partial
from hashlib import sha256
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from agents.__main__ import main
from agents.commands.view import HOST, PageHandler
from agents.reporting.alarms import COLLAPSES
from agents.reporting.record_file import HELD_OUT, ROLLOUT, RecordFile, read_records
from agents.reporting.viewer import FILE, OUTLINE, as_script_data, read_report, render_page
from agents.text.experiment import TextExperiment
from tests.support import tiny
from tests.support.runs import inside, record, report, resume, train

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt;&#0;",
    "\u202e\u2066abc\u200f",
    "\x00\x07\x1b[31m\x7f\x9b",
    "\u2028\u2029",
    "👩‍👩‍👧‍👦",
    "שלום عليكم",
    "e\u0301" + "\u0300" * 50,
    "\ud800",
    "';alert(1);'\"`${alert(1)}",
    "{{ 7 * 7 }}{% raw %}",
]


@pytest.fixture(scope="module", autouse=True)
def without_pictures():
    """Pictures take most of the time of a small run, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.reporting.plots.draw_curves", lambda *_: None)
        patch.setattr("agents.reporting.plots.draw_credit", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def settings(folders) -> dict:
    """Arguments of `gym.make` for a small task."""
    models = dict(reference=folders["gpt2"], reward=folders["gpt2_reward"], prompts=tiny.PROMPTS)
    return models | dict(max_prompt_tokens=16, max_new_tokens=4, device="cpu")


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> tuple[Path, list]:
    """A finished run of two iterations, and its rollouts as the learner had them."""
    folder, rollouts = tmp_path_factory.mktemp("runs") / "whole", []
    original = TextExperiment.records

    def records(self, number, rollout):
        rollouts.append(rollout.data.clone())
        return original(self, number, rollout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextExperiment, "records", records)
        train(folder, settings, iterations=2, schedule="constant")
    return folder, rollouts


def test_the_pages_numbers_are_the_rollouts(whole):
    """Read out of the page: every number of every kept token is the float32 of the rollout."""
    folder, rollouts = whole
    data = inside((folder / FILE).read_bytes())
    of_rollouts = [each for each in data["records"] if each["source"] == ROLLOUT]
    assert [(each["iteration"], each["row"]) for each in of_rollouts] == [(n, row) for n in (1, 2) for row in range(8)]
    keys = dict(advantage="raw_advantage", log_prob="action_log_prob", entropy="entropy", value="state_value")
    keys |= dict(td_error="td_error", reward="reward", score="step_score", reference_log_prob="reference_log_prob")
    for each in of_rollouts:
        rollout, row = rollouts[each["iteration"] - 1], each["row"]
        mask = rollout["mask"][row]
        for name, key in keys.items():
            assert np.array_equal(np.float32(each["numbers"][name]), rollout[key][row][mask].numpy()), name
        assert np.float32(each["score"]) == rollout["score"][row].numpy()
        own = [token for token, written in zip(each["ids"], each["generated"], strict=True) if written]
        assert own == rollout["action"][row][mask].tolist()
    assert {each["iteration"] for each in data["records"] if each["source"] == HELD_OUT} == {0, 2}


def test_the_run_has_its_page(whole):
    """With metrics of every iteration, the title, the numbers before and after, and credit.json beside it."""
    folder, _ = whole
    page, data = (folder / FILE).read_bytes(), inside((folder / FILE).read_bytes())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert data["metrics"] == metrics and data["refresh"] == 0
    assert "ppo on TextGen-v0" in page.decode() and "finished, 2 iterations" in page.decode()
    credit = json.loads((folder / "credit.json").read_text(encoding="utf-8"))
    assert {"log_prob", "reference_log_prob", "score", "penalty", "reward", "value", "advantage"} <= set(
        credit["numbers"]
    )
    assert credit in [{k: v for k, v in each.items() if k in credit} for each in read_records(folder)]


def test_a_resumed_run_has_the_same_page(whole, settings, tmp_path):
    """Whatever a kill has left behind the last checkpoint: the records are those of a run that was never stopped."""
    folder = tmp_path / "run"
    train(folder, settings, iterations=1, schedule="constant")
    with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record(2, ROLLOUT, 0, ["later"])) + '\n{"iteration": 1, "sour')
    resume(folder, "--iterations", "2")
    timed = ("seconds", "rollout_seconds", "tokens_per_second")
    first, second = (inside((each / FILE).read_bytes()) for each in (whole[0], folder))
    for data in (first, second):
        for row in data["metrics"]:
            for name in timed:
                del row[name]
    assert first == second


def test_hostile_texts_stay_inside():
    """No text ends the element that holds the data, and all come back out of it; nothing else of the page changes."""
    page = render_page(report([record(1, ROLLOUT, 0, HOSTILE)]))
    vocabulary = inside(page)["vocabulary"]
    assert [text for text, _ in vocabulary.values()] == ["prompt", *HOSTILE]
    harmless = render_page(report([record(1, ROLLOUT, 0, ["a"])]))
    assert [len(re.findall(tag, page)) for tag in (b"<script", b"</script", b"<!--", b"<img")] == [
        len(re.findall(tag, harmless)) for tag in (b"<script", b"</script", b"<!--", b"<img")
    ]
    assert as_script_data({"a": ["<&>\u2028", float("nan")]}) == '{"a":["\\u003c\\u0026\\u003e\\u2028",null]}'


def test_hostile_names_are_escaped():
    """The names of environments and folders are text, even if they are no UTF-8."""
    page = render_page(report([], title="<script>alert(1)</script>", folder="a\udcffb<b>", metrics=[])).decode("utf-8")
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page and "a\\udcffb&lt;b&gt;" in page


def test_only_the_pages_own_code_may_run():
    """The policy allows one script and one style, by the hashes of what is in the page."""
    page = render_page(report([record(1, ROLLOUT, 0, ["a"])])).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#39;", "'")
    code, style = (
        re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1],
        re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1],
    )
    hashes = ["'sha256-" + b64encode(sha256(each.encode()).digest()).decode() + "'" for each in (code, style)]
    assert policy.startswith(f"default-src 'none'; script-src {hashes[0]}; style-src {hashes[1]};")
    assert (
        not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page) and " style=" not in page and " onclick" not in page
    )


def test_a_large_run_has_a_small_page():
    """The kept responses of a run like the main job's, three times as long, take less than 5 MB."""
    words = [f" w{at}" for at in range(60)]
    records = [record(n, ROLLOUT, row, words) for n in range(1, 13) for row in range(16)]
    records += [record(n, HELD_OUT, row, words) for n in (0, 12) for row in range(16)]
    for each in records:
        each["numbers"] = {name: [-1.2345678e-05] * 60 for name in each["numbers"]}
    assert 500_000 < len(render_page(report(records))) < 5_000_000


def test_alarms_stand_on_the_page():
    """In words; and where there is none, what was looked for."""
    rows = [dict(iteration=at, score=1.0, length=50.0 / at**2, entropy=1.0) for at in range(1, 13)]
    page = render_page(report([], metrics=rows)).decode()
    assert "<li>The responses collapse: their length fell from" in page and "No alarm" not in page
    calm = render_page(report([], metrics=[row | dict(length=9.0) for row in rows])).decode()
    assert "No alarm: length, diversity and entropy have not collapsed. There is no gold rater" in calm


def test_alarms_stand_at_the_end_of_a_run(settings, tmp_path, monkeypatch, capsys):
    """As lines in the terminal."""
    monkeypatch.setattr("agents.reporting.alarms.FEWEST", 1)
    monkeypatch.setitem(COLLAPSES, "entropy", (2.0, "The entropy collapses: it fell", "nats a token", ""))
    train(tmp_path / "run", settings, iterations=1)
    assert "look: The entropy collapses: it fell from" in capsys.readouterr().out


def test_lost_metrics_leave_a_gap():
    """Iterations whose metrics are lost are there, empty, so that no line bridges them."""
    metrics = [{"iteration": 1, "score": 1.0}, {"iteration": 4, "score": float("inf")}]
    found = inside(render_page(report([], metrics=metrics)))["metrics"]
    assert found == [
        {"iteration": 1, "score": 1.0},
        {"iteration": 2},
        {"iteration": 3},
        {"iteration": 4, "score": None},
    ]


# ---- damage

RECORDS = {
    "no ids": {"ids": None},
    "a number for ids": {"ids": 5},
    "ids in lists": {"ids": [[1], [2]]},
    "fewer tokens": {"tokens": []},
    "numbers for tokens": {"tokens": [1, 2]},
    "other flags": {"special": [0, {}]},
    "fewer flags": {"generated": [1]},
    "a number for numbers": {"numbers": 5},
    "fewer numbers": {"numbers": {"score": []}},
    "texts for numbers": {"numbers": {"score": ["x"]}},
    "a text for a score": {"gold": "x"},
    "a list for a reason": {"finish": []},
    "no row": {"row": None},
    "no iteration": {"iteration": True},
}


def damage(folder: Path, name: str, change) -> None:
    """Change what a JSON file holds, or the first line of several."""
    first, *others = (folder / name).read_text(encoding="utf-8").splitlines(True) if name.endswith("l") else [""]
    value = json.loads(first or (folder / name).read_bytes())
    change(value)
    (folder / name).write_text(json.dumps(value) + "\n" + "".join(others), encoding="utf-8")


def test_the_records_before_training_are_whole_again(tmp_path):
    """Of a full disk's part of them nothing is left when a run goes on, and the rollouts' records stay."""
    before = [record(0, HELD_OUT, row, ["a"]) for row in range(3)]
    rollout = record(1, ROLLOUT, 0, ["b"])
    lines = [json.dumps(before[1]), json.dumps(rollout), json.dumps(before[2])[:20]]
    (tmp_path / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    kept = RecordFile(tmp_path, 1)
    kept.begin(before)
    kept.write(2, ROLLOUT, [record(2, ROLLOUT, 0, ["c"])])
    assert read_records(tmp_path) == [*before, rollout, record(2, ROLLOUT, 0, ["c"])]


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_left_out(tmp_path, name):
    """Whatever is wrong with it, the others are kept, and a run goes on."""
    good = record(1, ROLLOUT, 1, ["a"])
    (tmp_path / "records.jsonl").write_text(
        json.dumps(record(1, ROLLOUT, 0, ["a"]) | RECORDS[name]) + "\n" + json.dumps(good), encoding="utf-8"
    )
    RecordFile(tmp_path, 1)
    assert read_records(tmp_path) == [good]
    assert len(inside(render_page(report(read_records(tmp_path))))["records"]) == 1


def test_damaged_metrics_are_left_out(whole, tmp_path):
    """Values that are no finite numbers, and iterations that the run does not have, which would be rows of the page."""
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    wrong = dict(score="x", length=None, entropy=[], kl_per_response={}, score_std=True, approx_kl=10**400)
    damage(folder, "metrics.jsonl", lambda row: row.update(wrong))
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"iteration": 30000000, "score": 1.0}\n{"iteration": -1}\n')
    found = inside(render_page(read_report(folder, running=False)))["metrics"]
    assert [row["iteration"] for row in found] == [1, 2] and found[1] == inside((folder / FILE).read_bytes())[
        "metrics"
    ][1]
    assert not wrong.keys() & found[0].keys() and "value_loss" in found[0]


def test_a_damaged_summary_has_fewer_numbers(whole, tmp_path):
    """A number that is missing or none is not shown; a summary that cannot be read is that of no finished run."""
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    damage(folder, "summary.json", lambda summary: summary.update(score_after="x", length_before=None))
    page = render_page(read_report(folder, running=False)).decode()
    assert "<dt>score" not in page and "<dt>length" in page
    (folder / "summary.json").write_text("[" * 100_000, encoding="utf-8")
    assert read_report(folder, running=False).summary is None


@pytest.mark.parametrize("wrong", [{"unit": 5}, {"panels": 5}, {"panels": [5]}, {"before": 5}, {"iterations": "x"}])
def test_a_damaged_outline_is_one_sentence(whole, tmp_path, wrong):
    """A field of another kind than the page needs is named."""
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    damage(folder, OUTLINE, lambda outline: outline.update(wrong))
    with pytest.raises(ValueError, match=rf"page.json' is damaged \(wrong {next(iter(wrong))}\)"):
        read_report(folder, running=False)
    (folder / OUTLINE).write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged"):
        read_report(folder, running=False)


# ---- the command


@pytest.fixture
def going_on(whole, tmp_path):
    """A copy of the run as it was before its end, locked as while a process trains in it."""
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    (folder / "summary.json").unlink()
    (folder / FILE).unlink()
    with FileLock(folder / ".lock"):
        yield folder


def test_view_writes_the_page_of_a_finished_run(whole, tmp_path, monkeypatch, capsys):
    """It says where the page is, and opens it unless told not to."""
    folder, opened = Path(shutil.copytree(whole[0], tmp_path / "run")), []
    before = (folder / FILE).read_bytes()
    (folder / FILE).unlink()
    monkeypatch.setattr("webbrowser.open", opened.append)
    main(["view", "--run", str(folder), "--no-browser"])
    assert str(folder / FILE) in capsys.readouterr().out and not opened
    assert inside((folder / FILE).read_bytes()) == inside(before)
    main(["view", "--run", str(folder)])
    assert opened == [(folder / FILE).as_uri()]


def test_a_run_that_stopped_says_how_to_go_on(whole, tmp_path, capsys):
    """A killed run is neither finished nor going on, and its page does not refresh."""
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    (folder / "summary.json").unlink()
    main(["view", "--run", str(folder), "--no-browser"])
    page = (folder / FILE).read_bytes()
    assert b"stopped after 2 of 2 iterations; train --resume" in page and inside(page)["refresh"] == 0


def test_the_page_of_a_run_that_goes_on_is_served(going_on):
    """On this machine, by this machine's names, the page alone; what it shows is what is in the folder now."""
    server = ThreadingHTTPServer((HOST, 0), partial(PageHandler, going_on))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://{HOST}:{server.server_port}"
        page = urllib.request.urlopen(f"{address}/").read()
        assert b"running, 2 of 2 iterations" in page and inside(page)["refresh"] > 0
        RecordFile(going_on, 1)  # drops what is of the second iteration
        assert len(inside(urllib.request.urlopen(f"{address}/").read())["records"]) < len(inside(page)["records"])
        requests = [
            urllib.request.Request(f"{address}/config.json"),
            urllib.request.Request(f"{address}/../config.json"),
        ]
        requests.append(urllib.request.Request(f"{address}/", headers={"Host": "evil.example:80"}))
        for request in requests:
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(request)
    finally:
        server.shutdown()
        server.server_close()


def test_a_browser_that_goes_away_is_no_error(going_on, capsys):
    """Nothing is printed, and the next request is answered."""
    server = ThreadingHTTPServer((HOST, 0), partial(PageHandler, going_on))
    server.daemon_threads = False  # closing the server waits for their ends
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for request in (b"GET / HTTP/1.1\r\nHost: localhost:1\r\n\r\n", b"GET /"):
        browser = socket.create_connection((HOST, server.server_port))
        browser.sendall(request)
        browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
        browser.close()
    assert b"running, 2 of" in urllib.request.urlopen(f"http://{HOST}:{server.server_port}/").read()
    server.shutdown()
    server.server_close()
    assert capsys.readouterr().err == ""


def refused(capsys, *arguments: str) -> str:
    """The sentence with which the command ends."""
    with pytest.raises(SystemExit) as end:
        main(["view", *arguments])
    capsys.readouterr()
    return str(end.value.code)


def test_bad_input_is_one_sentence(whole, going_on, tmp_path, capsys):
    """A folder without a run, a damaged run, a port that is taken or no port."""
    assert "no run in" in refused(capsys, "--run", str(tmp_path / "nothing"))
    assert "no run in" in refused(capsys, "--run", str(tmp_path))
    assert "no run in" in refused(capsys, "--run", "x" * 300)
    server = ThreadingHTTPServer((HOST, 0), PageHandler)
    taken = str(server.server_port)
    assert f"port {taken} cannot be used" in refused(capsys, "--run", str(going_on), "--port", taken, "--no-browser")
    server.server_close()
    with pytest.raises(SystemExit, match=r"port must lie in \[0, 65535\], got 70000"):
        main(["view", "--run", str(going_on), "--port", "70000"])
    (going_on / OUTLINE).write_text("{", encoding="utf-8")
    assert "is damaged" in refused(capsys, "--run", str(going_on))


def test_other_environments_have_a_page(tmp_path):
    """Curves alone: there are no tokens."""
    sizes = ["--num-envs", "2", "--steps", "16", "--minibatch-size", "16", "--evaluation-episodes", "1"]
    main(["train", "--env", "CartPole-v1", "--run", str(tmp_path / "run"), "--iterations", "1", *sizes])
    data = inside((tmp_path / "run" / FILE).read_bytes())
    assert data["records"] == [] and data["panels"][0]["title"] == "Return"
    assert read_report(tmp_path / "run", running=False).summary is not None
