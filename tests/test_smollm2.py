"""A real chat model of 135M weights, end to end: SmolLM2-135M-Instruct, or another, in the folder named by SMOLLM2."""

import json
import os

import gymnasium as gym
import pytest

from agents.__main__ import main
from textenv import TextGenConfig, build_task
from textenv.conformance import check_faces
from textenv.models.decoding import decodes_from_cache

FOLDER = os.environ.get("SMOLLM2", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER, reason="SMOLLM2 names no folder with the model")]
SUMS = [
    [{"role": "user", "content": f"What is {a} plus {b}? Answer with a number."}] for a, b in [(2, 3), (4, 4), (1, 6)]
]


def right(prompts, responses):
    """1 where the response holds the sum that the prompt asks for."""
    totals = [sum(int(word.rstrip("?")) for word in prompt.split() if word.rstrip("?").isdigit()) for prompt in prompts]
    return [float(str(total) in response) for total, response in zip(totals, responses, strict=True)]


SETTINGS = dict(reference=FOLDER, reward="tests.test_smollm2:right", prompts=SUMS, chat=True, device="cpu")
SETTINGS |= dict(max_prompt_tokens=48, max_new_tokens=6)


def test_conformance():
    """Every face pays what the fast path pays, and the chat template's tokens are the prompt."""
    task = build_task(TextGenConfig(**SETTINGS))
    assert decodes_from_cache(task.reference.model, task.width)
    check_faces(task, rows=2)
    env = gym.make("TextGen-v0", **SETTINGS)
    observation, _ = env.reset(options={"prompt_index": 0})
    ids = observation["input_ids"][observation["attention_mask"].astype(bool)].tolist()
    expected = task.tokenizer.apply_chat_template(SUMS[0], add_generation_prompt=True, return_dict=False)
    assert ids == expected


def test_two_iterations_and_generate(tmp_path, capsys):
    """PPO by command from the model's own numbers, and a response from the trained policy."""
    arguments = [f"--env-arg={name}={value}" for name, value in SETTINGS.items() if name not in ("prompts", "chat")]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "2 plus 3 is"}\n{"prompt": "4 plus 4 is"}\n{"prompt": "1 plus 6 is"}\n', encoding="utf-8"
    )
    run = tmp_path / "run"
    sizes = ["--iterations=2", "--rollout-size=4", "--minibatch-size=4", "--micro-batch-tokens=160"]
    main(["train", f"--run={run}", "--evaluation-prompts=1", *sizes, *arguments, f"--env-arg=prompts={prompts}"])
    assert "KL" in capsys.readouterr().out
    main(["generate", "--run", str(run), "--prompt", "2 plus 2 is"])
    assert "[score" in capsys.readouterr().out


def test_supervised_and_dpo(tmp_path, capsys):
    """A few steps of both commands on chats: the held-out loss falls, and the policy prefers what was chosen."""
    chats = [
        [*chat, {"role": "assistant", "content": f"The answer is {number}."}] for number, chat in enumerate(SUMS * 4)
    ]
    data, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    rows = [{"messages": chat} for chat in chats]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rows = [{"prompt": chat, "chosen": [say("It is 5.")], "rejected": [say("I do not know.")]} for chat in SUMS * 4]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small = ["--batch-size", "4", "--max-length", "64", "--learning-rate", "1e-5"]
    tuned = tmp_path / "tuned"
    held_out = ["--held-out", "0.3", "--epochs", "2"]
    main(["supervised", "--base", FOLDER, "--data", str(data), "--output", str(tuned), *small, *held_out])
    losses = json.loads((tuned / "training.json").read_bytes())["history"]
    measured = [row["held_out_loss"] for row in losses if "held_out_loss" in row]
    assert measured[-1] < measured[0]
    out = tmp_path / "policy"
    names = [
        "--env.max-new-tokens",
        "6",
        "--env.max-prompt-tokens",
        "48",
        "--env.device",
        "cpu",
        "--evaluation-prompts",
        "2",
        "--held-out-pairs",
        "0.3",
    ]
    main(["dpo", "--base", str(tuned), "--data", str(pairs), "--output", str(out), *small, *names, "--epochs", "2"])
    summary = json.loads((out / "summary.json").read_bytes())
    assert summary["held_out_margin"] > 0 and (out / "actor" / "model.safetensors").exists()


def say(text):
    """A turn of the assistant."""
    return {"role": "assistant", "content": text}
