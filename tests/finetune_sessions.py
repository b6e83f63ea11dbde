"""Fine-tunings in processes of their own, which may be killed at any point."""

from collections.abc import Sequence

import torch
from train_helpers import PROCESSES, Hook

import leangpt.finetune.checkpoint
import leangpt.training.checkpoint
import leangpt.training.loop
from leangpt.finetune import FinetuneConfig, finetune, trainer

PROCESSES.set_forkserver_preload(["leangpt.finetune", "leangpt.training", "torch._dynamo"])


def run_session(config: FinetuneConfig, hooks: Sequence[Hook] = ()) -> int:
    """Fine-tune in a child; its exit code (negative: the signal). What was raised is in `out` with the suffix .error."""
    child = PROCESSES.Process(target=_session, args=(config, hooks))
    child.start()
    child.join(60)
    code = child.exitcode
    child.kill()
    assert code is not None, "the process hangs"
    return code


def _session(config: FinetuneConfig, hooks: Sequence[Hook]) -> None:
    torch.set_num_threads(1)
    for hook in hooks:
        hook(0)
    # hooks of the training loop are for this one too
    trainer.seed_step = leangpt.training.loop.seed_step
    leangpt.finetune.checkpoint.save_file = leangpt.training.checkpoint.save_file
    try:
        outcome = finetune(config)
    except (RuntimeError, OSError, ValueError) as error:
        config.out.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None
    raise SystemExit(130 if outcome.is_interrupted else 0)
