"""One episode of TextGen-v0 as a client sees it, token by token, with the reference model as the policy.

`python examples/step_by_step.py`
"""

import gymnasium as gym
import torch

import textenv  # noqa: F401  registers TextGen-v0

env = gym.make("TextGen-v0", render_mode="ansi", kl_coef=0.1)
task = env.unwrapped.task  # type: ignore[attr-defined]
reference = task.reference.model
torch.manual_seed(0)

observation, info = env.reset(seed=1)
print(env.render(), "\n")
total, terminated = 0.0, False
while not terminated:
    # Columns with mask 1 hold the context. Any policy may choose the next token.
    context = torch.from_numpy(observation["input_ids"][observation["attention_mask"] == 1])[None].to(task.device)
    logits = reference(input_ids=context).logits[0, -1] / task.config.temperature  # [V]
    action = int(torch.distributions.Categorical(logits=logits).sample())
    observation, reward, terminated, truncated, info = env.step(action)
    total += float(reward)
    print(f"{task.tokenizer.decode([action])!r:16} reward {reward:+.2f}")
print("\n" + str(env.render()))
print(f"\nended by {info['finish_reason']}, score {info['score']:+.2f}, return {total:+.2f}")
