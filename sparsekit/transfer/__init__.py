"""The transfer loops: upstream training, linear and full finetuning, evaluation. Needs the ``transfer`` extra."""

from . import imagenet, models, study, tasks, upstream
from .data import Task
from .finetune import Result, evaluate, full_finetune, linear_finetune, train

__all__ = [
    "Result",
    "Task",
    "evaluate",
    "full_finetune",
    "imagenet",
    "linear_finetune",
    "models",
    "study",
    "tasks",
    "train",
    "upstream",
]
