"""One of several processes that run train_prior.py under the shipped FSDP2 config, on CPUs.

accelerate shards on accelerators only: with `cpu=True` it keeps whole copies, whatever the config says. Everything behind that
one decision works on CPUs with gloo, so this script takes the decision for it and leaves the rest to accelerate and torch.

    torchrun --nproc_per_node 2 fsdp_worker.py FLAGS_OF_TRAIN_PRIOR
    CRASH_AT=4 torchrun ...            # raises before that step
"""

import os
import sys
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "accelerate" / "fsdp2.yaml"
CRASH_AT = int(os.environ.get("CRASH_AT", "0"))


def environment() -> dict[str, str]:
    """What `accelerate launch --config_file fsdp2.yaml` gives to its processes about FSDP."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIG), "examples/train_prior.py"])
    args = _validate_launch_command(args)[0]
    return {k: v for k, v in prepare_multi_gpu_env(args).items() if k.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}


def main() -> None:
    os.environ.update(environment())
    from examples import train_prior

    class Step(train_prior.PriorStep):
        calls = 0

        def __call__(self, batches, rate):
            self.calls += 1
            if self.calls == CRASH_AT:
                raise RuntimeError("crash")
            return super().__call__(batches, rate)

    def make_accelerator(args, made=train_prior.make_accelerator):
        accelerator = made(args)
        assert accelerator.num_processes > 1 and not accelerator.is_fsdp2
        plugin = FullyShardedDataParallelPlugin()
        if args.mixed_precision != "no":
            plugin.set_mixed_precision(args.mixed_precision)
        accelerator.state.fsdp_plugin = plugin
        PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
        assert accelerator.is_fsdp2
        return accelerator

    train_prior.make_accelerator, train_prior.PriorStep = make_accelerator, Step
    train_prior.main(sys.argv[1:])


if __name__ == "__main__":
    main()
