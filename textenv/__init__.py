"""Text generation as an honest Gymnasium environment: `gym.make("TextGen-v0")` after `import textenv`."""

from gymnasium.envs.registration import register

from textenv.config import TextGenConfig
from textenv.language_model import LanguageModel
from textenv.loading import shared
from textenv.task import Task, build_task

__version__ = "0.1.0"
__all__ = ["LanguageModel", "Task", "TextGenConfig", "build_task", "shared"]

register(
    id="TextGen-v0",
    entry_point="textenv.env:TextGenEnv",
    vector_entry_point="textenv.vector_env:TextGenVectorEnv",
)
