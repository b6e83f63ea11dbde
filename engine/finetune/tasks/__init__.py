"""The tasks that a model can be fine-tuned for: from rows to examples, a loss, a report, and predictions."""

import dataclasses
from typing import Any

from .base import Example, Prediction, Report, Task
from .chat import Chat
from .classify import Classify
from .pairs import QA, Summarize, Translate
from .rank import Rank
from .tag import Tag
from .text import Text

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Text, Chat, QA, Translate, Summarize, Classify, Tag, Rank)
}

__all__ = [
    "QA",
    "TASKS",
    "Chat",
    "Classify",
    "Example",
    "Prediction",
    "Rank",
    "Report",
    "Summarize",
    "Tag",
    "Task",
    "Text",
    "Translate",
    "task_from_dict",
]


def task_from_dict(values: dict[str, Any]) -> Task:
    """The inverse of `Task.to_dict`.

    Raises:
        ValueError: the task or one of its options is unknown.
    """
    name = values.get("name")
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    kind = TASKS[name]
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "name"}
    unknown = options.keys() - {f.name for f in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(f"task {name}: unknown option {', '.join(sorted(unknown))}")
    return kind(**options)
