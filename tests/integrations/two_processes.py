"""Five steps under DDP by TRL's trainer and by the packed one; process 0 writes what came out as JSON.

torchrun --nproc-per-node 2 two_processes.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from trl import DPOTrainer

from cpo_kernels.integrations.trl import PackedDPOTrainer
from tests.integrations.trainers import adapted_model, largest_difference, make_trainer, trained


def main(folder: Path) -> None:
    """`folder` holds the saved model and adapter; the result goes to `folder`/result.json."""
    ends, start = [], {}
    for trainer_class in (DPOTrainer, PackedDPOTrainer):
        options = {"max_steps": 5, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
        trainer = make_trainer(trainer_class, adapted_model(folder), folder, **options)
        start = trained(trainer.model)
        trainer.train()
        ends.append(trained(trainer.model))
    if trainer.args.process_index == 0:
        result = {
            "wrapper": type(trainer.model_wrapped).__name__,
            "movement": largest_difference(start, ends[0]),
            "difference": largest_difference(*ends),
            "logs": [row for row in trainer.state.log_history if "packing/tokens" in row],
        }
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # threads of a group that is still open can abort the process at exit
