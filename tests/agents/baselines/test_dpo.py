"""`python -m agents dpo` on tiny models: what it learns, measures, writes, resumes and refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents.__main__ import main
from agents.baselines.dpo import DPOConfig
from agents.baselines.frontier import read_run
from agents.baselines.pairs import sample_pairs, tokenize
from agents.baselines.setting import SettingConfig, open_setting
from agents.seeds import evaluation_seed
from agents.text.evaluation import evaluate
from tests.support import tiny
from tests.support.runs import ELEMENT
from textenv.models.loading import load_model
from textenv.training.files import locked

QUICK = ["--batch-size", "8", "--learning-rate", "3e-3", "--evaluation-prompts", "6", "--max-length", "40"]
SHORT = ["--env-arg", "max_new_tokens=6", "--env-arg", "max_prompt_tokens=12"]


def letters(prompts, responses):
    """A reward, or a gold rater, that needs no model: the share of letters a."""
    return [response.count("a") / max(len(response), 1) for response in responses]


def pairs_file(path: Path, rows: int = 40) -> Path:
    """Pairs in which the chosen response is made of the letter a."""
    rng = random.Random(0)
    lines = [
        {"prompt": f"item {number % 20}", "chosen": "a" * rng.randint(1, 6), "rejected": "b" * rng.randint(1, 6)}
        for number in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def base(tmp_path: Path) -> str:
    return tiny.save(tiny.language_model(), tmp_path / "base")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_own_pairs_alone(tmp_path: Path, base: str) -> None:
    """A model and pairs are enough: the policy learns them, and is measured without a reward on held-out prompts."""
    out, data = tmp_path / "out", pairs_file(tmp_path / "pairs.jsonl")
    main(["dpo", "--base", base, "--data", str(data), "--output", str(out), "--epochs", "4", *QUICK, *SHORT])
    summary = read_json(out / "summary.json")
    assert summary["algorithm"] == "dpo" and summary["held_out_accuracy"] > 0.9
    assert summary["held_out_loss"] < 0.5 and summary["held_out_margin"] > 1 and summary["kl_per_response"] > 0
    assert not [name for name in summary if name.startswith(("score", "gold"))]
    assert summary["data"]["training pairs"] == 36 and summary["data"]["held-out pairs"] == 4
    prompts = {json.loads(line)["prompt"] for line in (out / "held_out.jsonl").read_text().splitlines()}
    assert len(prompts) == 2  # those of the held-out pairs
    samples = (out / "samples.md").read_text(encoding="utf-8")
    assert all(f"> {prompt}" in samples for prompt in prompts) and "score" not in samples and "KL" in samples
    written = {path.name for path in out.iterdir()}
    page = {"page.json", "records.jsonl", "report.html"}
    assert written - {".lock"} == {
        "actor",
        "curves.png",
        "held_out.jsonl",
        "metrics.jsonl",
        "samples.md",
        "summary.json",
        *page,
    }
    card = (out / "actor" / "README.md").read_text(encoding="utf-8")
    assert "margin h of held-out pairs" in card and str(data) in card
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["held_out_loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2: the policy is the reference
    assert [row["iteration"] for row in rows] == [*range(summary["iterations"] + 1)]
    with pytest.raises(SystemExit, match=r"pass a run folder written by train.* a model .*best-of-n --model"):
        main(["generate", "--run", str(out), "--prompt", "item"])


def test_all_held_out_pairs_stay_out(tmp_path: Path, base: str) -> None:
    """A part of their prompts is evaluated on, and none of their pairs is trained on."""
    out, data = tmp_path / "out", pairs_file(tmp_path / "pairs.jsonl")
    main(["dpo", "--base", base, "--data", str(data), "--output", str(out), "--held-out-pairs", "0.5", *QUICK, *SHORT])
    summary = read_json(out / "summary.json")
    assert (summary["data"]["training pairs"], summary["data"]["held-out pairs"]) == (20, 20)
    assert len((out / "held_out.jsonl").read_text().splitlines()) == 6  # of ten prompts, as QUICK says


def test_held_out_prompts_of_a_file(tmp_path: Path, base: str) -> None:
    """They are evaluated on, none of their pairs is trained on, and as many pairs are held out as was asked for."""
    out, data = tmp_path / "out", pairs_file(tmp_path / "pairs.jsonl")
    (tmp_path / "own.jsonl").write_text('{"prompt": "item 3"}\n{"prompt": "another"}\n')
    names, train = "tests.agents.baselines.test_dpo:letters", json.dumps([f"item {at}" for at in range(20)])
    for place, more in (("a", []), ("b", ["--env.reward", names, "--env.prompts", train])):
        flags = ["--data", str(data), "--held-out", str(tmp_path / "own.jsonl"), "--held-out-pairs", "0.25", *more]
        main(["dpo", "--base", base, "--output", str(out / place), *flags, *QUICK, *SHORT])
        evaluated = (out / place / "held_out.jsonl").read_text()
        assert [json.loads(line)["prompt"] for line in evaluated.splitlines()] == ["item 3", "another"]
        counts = read_json(out / place / "summary.json")["data"]
        assert counts["training pairs"] + counts["held-out pairs"] == 40 and 10 <= counts["held-out pairs"] <= 12


def test_repeated_pairs_are_no_more_certain(tmp_path: Path, base: str) -> None:
    """Pairs of one prompt are not independent: the card's standard error is that of the prompts."""
    rows, errors = pairs_file(tmp_path / "single.jsonl", 20).read_text(), {}
    (tmp_path / "repeated.jsonl").write_text(rows * 10)
    for name in ("single", "repeated"):
        data = ["--data", str(tmp_path / f"{name}.jsonl"), "--held-out-pairs", "0.4", "--learning-rate", "1e-6"]
        main(["dpo", "--base", base, "--output", str(tmp_path / name), *data, *QUICK[:2], *QUICK[4:], *SHORT])
        card = read_json(tmp_path / name / "actor" / "training.json")
        margin = card["numbers"]["held_out_margin"]
        errors[name] = margin["standard_error"] / margin["value"]  # more steps, and a larger margin
    assert errors["repeated"] == pytest.approx(errors["single"], rel=0.2)


def test_what_is_not_read_is_said(tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Margins, and a length for sampled responses. The card's command has what the environment needs."""
    data = tmp_path / "pairs.jsonl"
    lines = pairs_file(data).read_text().splitlines()
    data.write_text("".join(json.dumps(json.loads(line) | {"margin": 1}) + "\n" for line in lines))
    main(["dpo", "--base", base, "--data", str(data), "--output", str(tmp_path / "out"), *QUICK, *SHORT])
    assert "the pairs have margins, which these losses do not read" in capsys.readouterr().out
    card = (tmp_path / "out" / "actor" / "README.md").read_text(encoding="utf-8")
    assert f"--env.reference {base} --env.reward MODULE:FUNCTION --env.prompts FILE.jsonl" in card
    assert "--env-arg max_new_tokens=6" in card
    with pytest.raises(SystemExit, match="max_length is for pairs of a file"):
        main(["dpo", "--output", str(tmp_path / "other"), "--pairs", "8", "--max-length", "9"])


def test_missing_pairs_are_named(tmp_path: Path, base: str) -> None:
    """A file that is not there ends in a sentence, and leaves no folder."""
    with pytest.raises(SystemExit, match=r"nowhere\.jsonl"):
        main(["dpo", "--base", base, "--data", "nowhere.jsonl", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_page(tmp_path: Path, base: str) -> None:
    """It is a run's: held-out responses token by token, before and after, whose KL and log-probs are the evaluation's.

    Where there is no reward, there is no score, and the penalty has the β that was learned with.
    """
    out, data = tmp_path / "out", pairs_file(tmp_path / "pairs.jsonl")
    main(["dpo", "--base", base, "--data", str(data), "--output", str(out), "--beta", "0.3", *QUICK, *SHORT])
    main(["view", "--run", str(out), "--no-browser"])
    text, summary = (out / "report.html").read_text(encoding="utf-8"), read_json(out / "summary.json")
    page = json.loads(ELEMENT.search(text)[1])  # type: ignore[index]
    before, after = ([row for row in page["records"] if (row["iteration"] > 0) == late] for late in (False, True))
    assert len(before) == len(after) == 2 and page["unit"] == "optimizer step"
    assert f"finished, {summary['iterations']} optimizer steps" in text and "Alarms are for rollouts" in text
    assert sum(row["kl"] for row in after) / 2 == pytest.approx(summary["kl_per_response"], abs=1e-4)
    for row in [*before, *after]:
        numbers = row["numbers"]
        assert row["score"] is None and set(numbers) == {"penalty", "log_prob", "reference_log_prob", "entropy"}
        paid = [
            0.3 * (own - other) for own, other in zip(numbers["log_prob"], numbers["reference_log_prob"], strict=True)
        ]
        assert numbers["penalty"] == pytest.approx(paid, abs=1e-5)
        assert all(entropy > 0 for entropy in numbers["entropy"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "actor"), AutoTokenizer.from_pretrained(base)
    row = after[0]
    with torch.no_grad():
        log_probs = (model(torch.tensor([row["ids"]])).logits[0] / 0.7).log_softmax(-1)  # at the task's temperature
    own = [at for at, written in enumerate(row["generated"]) if written]
    by_hand = [float(log_probs[at - 1, row["ids"][at]]) for at in own]
    assert row["numbers"]["log_prob"] == pytest.approx(by_hand, abs=1e-4)
    spread = [float(-(log_probs[at - 1].exp() * log_probs[at - 1]).sum()) for at in own]
    assert row["numbers"]["entropy"] == pytest.approx(spread, abs=1e-4)
    assert tokenizer.decode(row["ids"]).startswith("item ")


def test_the_evaluation_is_a_runs(tmp_path: Path, base: str) -> None:
    """Score, gold and KL are those that a run with the same environment, prompts and seed would report."""
    out, names = tmp_path / "out", "tests.agents.baselines.test_dpo:letters"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"item {number}"}) + "\n" for number in range(30)))
    where = [*SHORT, *[word for item in (f"reward={names}", f"prompts={prompts}") for word in ("--env-arg", item)]]
    data = pairs_file(tmp_path / "pairs.jsonl")
    main(["dpo", "--base", base, "--data", str(data), "--output", str(out), *QUICK, *where, "--gold", names])
    summary = read_json(out / "summary.json")
    items = (*where[1::2], f"reference={base}")
    setting = open_setting(SettingConfig(env_arg=items, evaluation_prompts=6, gold=names), seed=0)
    model = load_model(AutoModelForCausalLM, str(out / "actor"), setting.task.device, torch.float32)
    expected = evaluate(setting.task, model, setting.held_out, letters, evaluation_seed()).summary()
    for name in ("score", "gold", "length"):
        assert summary[f"{name}_after"] == pytest.approx(expected[name], abs=1e-6), name
    assert summary["kl_per_response"] == pytest.approx(expected["kl_per_response"], abs=1e-4)
    assert summary["score_after"] == pytest.approx(summary["gold_after"])  # the same function
    seen = {json.loads(line)["prompt"] for line in (out / "held_out.jsonl").read_text().splitlines()}
    held_out = sum(json.loads(line)["prompt"] in seen for line in data.read_text().splitlines())
    assert summary["data"]["held-out pairs"] == held_out > 0  # no pair to train on has a prompt of the evaluation
    assert [point["kl"] for point in read_run(out).points] == [0.0, summary["kl_per_response"]]


def test_sampled_pairs(base: str) -> None:
    """Without data the reward chooses between two samples of the reference, with the odds of its scores."""
    items = (f"reference={base}", "reward=tests.agents.baselines.test_dpo:far_apart", 'prompts=["a", "b", "c", "d"]')
    setting = open_setting(SettingConfig(env_arg=(*items, "max_new_tokens=5"), evaluation_prompts=1), seed=0)
    quiet = Console(quiet=True)
    rows = sample_pairs(setting, 12, 3, quiet)
    assert 0 < len(rows.pairs) <= 12 and all(row["chosen_score"] >= row["rejected_score"] for row in rows.rows)
    assert {row["prompt"] for row in rows.rows} <= set(setting.training.texts)
    assert sample_pairs(setting, 12, 3, quiet).hash() == rows.hash() != sample_pairs(setting, 12, 4, quiet).hash()
    text = setting.task.tokenizer.decode(rows.pairs[0].chosen, skip_special_tokens=True)
    assert text.removeprefix(" ") == rows.rows[0]["chosen"]


def far_apart(prompts, responses):
    """Scores so far apart that chance decides nothing."""
    return [1000.0 * sum(response.encode()) for response in responses]


def test_a_stopped_training_is_resumed(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the training and before the results, and resumed, the weights are those of an unbroken one."""
    data = pairs_file(tmp_path / "pairs.jsonl")
    command = ["dpo", "--base", base, "--data", str(data), *QUICK, *SHORT, "--save-every", "2", "--output"]
    main([*command, str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        patch.setattr("agents.baselines.dpo.write_results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            main([*command, str(tmp_path / "cut")])
    with pytest.raises(SystemExit, match="holds a training that was stopped; give --resume"):
        main([*command, str(tmp_path / "cut")])
    with pytest.raises(SystemExit, match=r"was started with settings\.learning_rate"):
        main([*command, str(tmp_path / "cut"), "--resume", "--learning-rate", "1e-4"])
    weights = (Path(base) / "model.safetensors").read_bytes()
    tiny.save(tiny.language_model(seed=1), base)
    with pytest.raises(SystemExit, match=r"was started with content of\.reference"):
        main([*command, str(tmp_path / "cut"), "--resume"])
    (Path(base) / "model.safetensors").write_bytes(weights)
    main([*command, str(tmp_path / "cut"), "--resume"])
    whole, cut = ((tmp_path / name / "actor" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


SAMPLED = ["--evaluation-prompts", "3", "--batch-size", "4", "--pairs", "8", "--env.max-new-tokens", "4"]


def sampled(base: str, output: Path, *more: str) -> list[str]:
    """The command that trains from pairs which the reference writes."""
    prompts = json.dumps([*"abcdefghijklmno"])
    reward = "tests.agents.baselines.test_dpo:letters"
    where = ["--env.reference", base, "--env.reward", reward, "--env.prompts", prompts]
    return ["dpo", *where, *SAMPLED, "--output", str(output), *more]


def test_killed_with_its_first_file(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while it writes its pairs can be resumed: what it was started with is there before."""

    def killed(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("agents.baselines.dpo.write_text", killed)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            main(sampled(base, out))
    with pytest.raises(SystemExit, match="holds a training that was stopped; give --resume"):
        main(sampled(base, out))
    with locked(out / "training"), pytest.raises(SystemExit, match="another process is training in"):
        main(sampled(base, out, "--resume"))
    main(sampled(base, out, "--resume"))
    assert (out / "summary.json").exists() and (out / "pairs.jsonl").stat().st_size > 0


def test_two_processes_begin(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that another process has begun in the meantime is left alone."""
    out, original = tmp_path / "out", sample_pairs

    def meanwhile(*arguments):
        (out / "training").mkdir(parents=True)
        (out / "training" / "started_with.json").write_text("theirs", encoding="utf-8")
        return original(*arguments)

    monkeypatch.setattr("agents.baselines.dpo.sample_pairs", meanwhile)
    with pytest.raises(SystemExit, match="holds a training that was stopped"):
        main(sampled(base, out))
    assert (out / "training" / "started_with.json").read_text(encoding="utf-8") == "theirs"


def test_equal_responses(tmp_path: Path, base: str) -> None:
    """Where the reference writes the same response twice each time, that is the cause, and it is said."""
    with pytest.raises(SystemExit, match=r"wrote both responses of every pair alike, 8 times.*raise --env.temperature"):
        main(sampled(base, tmp_path / "out", "--env.temperature", "0.0001"))
    assert not (tmp_path / "out").exists()


def test_tokens_of_pairs(base: str) -> None:
    """A response follows its prompt by a space and ends with the stop token once; what is too long loses its end."""
    items = (f"reference={base}", "reward=tests.agents.baselines.test_dpo:letters", 'prompts=["a", "b"]', SHORT[1])
    task = open_setting(SettingConfig(env_arg=items, evaluation_prompts=1), seed=0).task
    rows = [{"prompt": "ab", "chosen": "c", "rejected": "defghijkl"}]
    pair = tokenize(rows, task, 8).pairs[0]
    space = task.tokenizer.encode(" ")[0]
    letter = {each: task.tokenizer.encode(each)[0] for each in "abcdefgh"}
    assert pair.prompt == [letter["a"], letter["b"]] and pair.chosen == [space, letter["c"], tiny.END]
    assert pair.rejected == [space, *(letter[each] for each in "defgh")]
    with pytest.raises(ValueError, match="no room for a response in max_length=2; raise max_length"):
        tokenize(rows, task, 2)


@pytest.mark.parametrize(
    ("line", "flags", "says"),
    [
        ('{"chosen": "a", "rejected": "b"}', [], "row 1: needs prompt, chosen and rejected, got chosen, rejected"),
        ('{"text": "a", "label": 1}', [], "row 1: needs prompt, chosen and rejected, got label, text"),
        ('{"prompt": "a", "chosen": "b"}', [], "line 1: needs chosen and rejected"),
        (None, ["--env-arg", "kl_coef=0"], "kl_coef is 0, and without a KL to the reference there is no DPO"),
        (None, ["--beta", "0.1", "--env-arg", "kl_coef=0.2"], "are the same β"),
        (None, ["--env-arg", "reference=other"], "name the same model"),
    ],
)
def test_refusals(tmp_path: Path, base: str, line: str | None, flags: list[str], says: str) -> None:
    """Bad data and settings end in a sentence, and leave no folder."""
    data = pairs_file(tmp_path / "pairs.jsonl")
    if line is not None:
        data.write_text(line + "\n", encoding="utf-8")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=says):
        main(["dpo", "--base", base, "--data", str(data), "--output", str(out), *SHORT, *flags])
    assert not out.exists()


def test_refused_settings(tmp_path: Path) -> None:
    """Settings that are out of range, or would do nothing, are refused in a sentence."""
    with pytest.raises(ValueError, match=r"beta must be above 0, got 0\.0"):
        DPOConfig(output=tmp_path, beta=0.0)
    with pytest.raises(ValueError, match="pairs to sample where there is no data; leave one of them out"):
        DPOConfig(output=tmp_path, data=tmp_path / "pairs.jsonl", pairs=7)
    with pytest.raises(ValueError, match="must be an environment of text, such as TextGen-v0, got 'CartPole-v1'"):
        SettingConfig(env="CartPole-v1")
