"""Fine-tuning for tasks: from plain data files to an evaluated, saved model that predicts.

outcome = finetune(FinetuneConfig(task=Classify(), model="gpt2", data=(Path("train.csv"),)))
tuned = load_tuned(outcome.out)
predict(tuned, [{"text": "…"}])
"""

from .config import FinetuneConfig
from .predictor import predict
from .storage import load_tuned
from .tasks import TASKS
from .trainer import Outcome, finetune
from .tuned import Tuned

__all__ = ["TASKS", "FinetuneConfig", "Outcome", "Tuned", "finetune", "load_tuned", "predict"]
