"""Reward hacking in three minutes: without a penalty the reward model's score rises, and what it stands for falls.

`python examples/reward_hacking.py` trains PPO with `kl_coef` 0 on the embedded task, where a gold rater knows the true
quality. It prints both scores on held-out prompts along the run, then the responses that they disagree on most, and
draws reward_hacking.png.
"""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from agents.algorithms.ppo import PPOConfig
from agents.config import TrainConfig
from agents.run import build
from agents.text.config import TextConfig

EVERY = 4  # iterations between measurements
SCORES = {"score": "score, of the reward model", "gold": "gold score, the true quality"}
LINE = "iteration {iteration:2}  score {score:+.2f}  gold {gold:+.2f}  KL {kl_per_response:4.1f}"
ACROSS = {"iteration": "iteration", "kl_per_response": "KL to the reference, nats a response"}


def main(iterations: int = 40, rollout: int = 128, prompts: int = 256) -> list[dict[str, float]]:
    """Train, print and draw. Returns the measurements: means over held-out prompts."""
    config = TrainConfig(
        env_arg=("kl_coef=0", "device=cpu"), learning_rate=3e-4, schedule="constant", iterations=iterations
    )
    settings = TextConfig(rollout_size=rollout, evaluation_prompts=prompts)
    experiment, trainer = build(config, settings, PPOConfig())
    steps, measured = trainer.iterate(), []
    for number in range(0, iterations + 1, EVERY):
        while trainer.iteration < number:
            next(steps)
        evaluation = experiment.evaluate(trainer.algorithm.networks.policy)
        measured.append({"iteration": number} | experiment.summarize(evaluation))
        print(LINE.format_map(measured[-1]), flush=True)
    rows = zip(evaluation.score, evaluation.gold, evaluation.prompts, evaluation.responses, strict=True)
    for score, gold, prompt, response in sorted(rows, key=lambda row: row[1] - row[0])[:6]:
        print(f"score {score:+.2f}, gold {gold:+.2f}  {prompt.strip()!r}\n    {response.strip()!r}")
    draw(measured)
    return measured


def draw(measured: list[dict[str, float]]) -> None:
    """Both scores over iterations, and against the KL to the reference."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, across in zip(axes, ACROSS, strict=True):
        for (name, label), color in zip(SCORES.items(), ("#1f6fb4", "#e08a1e"), strict=True):
            x, y = ([row[key] for row in measured] for key in (across, name))
            axis.plot(x, y, ".-", color=color, label=label)
        axis.set_xlabel(ACROSS[across])
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    figure.suptitle("PPO without a KL penalty, means over held-out prompts")
    figure.savefig("reward_hacking.png", dpi=110)


if __name__ == "__main__":
    main()
