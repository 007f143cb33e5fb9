"""`python -m agents train` on a Ray cluster: `python examples/ray_train.py --workers 2 -- --run /shared/run ...`.

The flags after `--` are those of `python -m agents train`. Ray Train starts a process for each worker and connects
them; they learn together as the processes of torchrun do. All must see the run's folder. With RAY_ADDRESS the workers
run on that cluster, otherwise on this machine. Where one fails, all start again, and go on from the checkpoint.
Needs `pip install 'textenv[ray]'`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch


def train(config: dict) -> None:
    """What every worker does."""
    from agents.__main__ import main

    arguments, folder = config["arguments"], Path(config["run"])
    resume = ["--resume"] if (folder / "checkpoint.pt").is_file() else []
    try:
        main(["train", "--run", str(folder), *arguments, *resume])
    except SystemExit as end:  # of the command line, which Ray would take for the end of the worker
        if end.code:
            raise RuntimeError(str(end.code)) from end


def launch() -> None:
    """Read the flags, and run the workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes that learn together")
    gpus, see = torch.cuda.is_available(), argparse.BooleanOptionalAction
    parser.add_argument("--gpus", action=see, default=gpus, help="a GPU for each worker; default: if there is one here")
    parser.add_argument("--failures", type=int, default=1, help="how often failed workers are started again")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, which all workers see")
    parser.add_argument("arguments", nargs="*", metavar="-- FLAGS", help="flags of `python -m agents train`")
    options = parser.parse_args()

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cuda, folder = options.gpus, options.run.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as storage:  # Ray's own records, where all workers see them
        TorchTrainer(
            train,
            train_loop_config={"arguments": options.arguments, "run": str(folder)},
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cuda else "gloo"),
            scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=cuda),
            run_config=RunConfig(storage_path=storage, failure_config=FailureConfig(max_failures=options.failures)),
        ).fit()


if __name__ == "__main__":
    launch()
