"""PPO on a reward of your own: reviews that say "because", on the embedded language model.

`python examples/own_reward.py` (about a minute on two cores)
"""

from agents.algorithms.ppo import PPO, PPOConfig
from agents.config import TrainConfig
from agents.text.config import TextConfig
from agents.text.experiment import TextExperiment
from agents.trainer import Trainer
from textenv import TextGenConfig, build_task


def says_because(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for a response that contains the word, else 0."""
    return [float("because" in response) for response in responses]


embedded = {"reference": "reviews", "prompts": "reviews"}  # the language model and the prompts of the embedded task
task = build_task(TextGenConfig(**embedded, reward=says_because, kl_coef=0.02, max_new_tokens=32))
config = TrainConfig(iterations=15)
experiment = TextExperiment(config, TextConfig(rollout_size=64), task)
trainer = Trainer(config, PPO(PPOConfig(), experiment.network_factory), experiment.collector)
for iteration in trainer.iterate():
    numbers = iteration.metrics
    print(
        f"{iteration.number:3}  said it {numbers['score']:4.0%}  KL {numbers['kl_per_response']:5.2f}  "
        f"{iteration.rollout.scored.responses[0][:80]!r}"
    )
