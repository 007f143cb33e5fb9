"""Text generation as a Gymnasium environment: `import textenv`, then `gym.make("TextGen-v0")`."""

from gymnasium.envs.registration import register

from textenv.config import TextGenConfig
from textenv.masks.masks import TokenMask
from textenv.models.language_model import LanguageModel, shared
from textenv.rewards.base import ResponseBatch, Reward, Scores
from textenv.rewards.functions import per_batch, per_response
from textenv.rewards.per_token import per_token
from textenv.rewards.ray_pool import ray_actors
from textenv.task import Task, build_task

__version__ = "0.1.0"
__all__ = [
    "LanguageModel",
    "ResponseBatch",
    "Reward",
    "Scores",
    "Task",
    "TextGenConfig",
    "TokenMask",
    "build_task",
    "per_batch",
    "per_response",
    "per_token",
    "ray_actors",
    "shared",
]

register(
    id="TextGen-v0",
    entry_point="textenv.env:TextGenEnv",
    vector_entry_point="textenv.vector_env:TextGenVectorEnv",
)
