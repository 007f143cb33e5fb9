"""Text generation as an honest Gymnasium environment: `gym.make("TextGen-v0")` after `import textenv`."""

from gymnasium.envs.registration import register

from textenv.config import TextGenConfig
from textenv.models.language_model import LanguageModel
from textenv.models.loading import shared
from textenv.rewards.base import Episodes, Reward, Scores
from textenv.rewards.functions import per_response, reads_episodes
from textenv.rewards.per_token import per_token
from textenv.task import Task, build_task

__version__ = "0.1.0"
__all__ = [
    "Episodes",
    "LanguageModel",
    "Reward",
    "Scores",
    "Task",
    "TextGenConfig",
    "build_task",
    "per_response",
    "per_token",
    "reads_episodes",
    "shared",
]

register(
    id="TextGen-v0",
    entry_point="textenv.env:TextGenEnv",
    vector_entry_point="textenv.vector_env:TextGenVectorEnv",
)
