"""transducer_loss with little memory, in which the logits of hardly any batch are kept for the gradient."""

from transducer_loss.benchmarks.implementations import fused

NAME = "transducer_loss, workspace=32MiB"
NEEDS: tuple[str, ...] = ()
TASKS = {"joint": fused.tasks(workspace="32MiB")["joint"]}
