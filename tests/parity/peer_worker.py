"""Two processes for tests/parity/test_differences_in_processes.py: `python peer_worker.py FOLDER`.

They are forked after the imports, which take most of the time. Results go to FOLDER/RANK.safetensors.
"""

import datetime
import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import vector_quantize_pytorch as peer
from safetensors.torch import save_file
from torch import Tensor

from vqtok.quantizers import LFQ, VectorQuantizer

DIM, SIZE, BITS, WORLD = 8, 32, 4, 2
TAU = 0.25


def latents(dim: int) -> Tensor:
    """Of both processes; the second half is of another kind."""
    z = torch.randn(WORLD, 64, dim, generator=torch.Generator().manual_seed(0))
    return z + torch.tensor([0.5, -0.5])[:, None, None]


def build_theirs(**options) -> peer.VectorQuantize:
    torch.manual_seed(1)
    return peer.VectorQuantize(DIM, codebook_size=SIZE, rotation_trick=False, **options)


def build_ours() -> VectorQuantizer:
    torch.manual_seed(1)
    return VectorQuantizer(DIM, codebook_size=SIZE, revival_threshold=0.0)


def their_entropies(z: Tensor) -> dict[str, Tensor]:
    """Of use, with its gradient."""
    z = z.clone().requires_grad_()
    parts = peer.LFQ(dim=BITS).train()(z, inv_temperature=TAU, return_loss_breakdown=True)[1]
    (gradient,) = torch.autograd.grad(parts.batch_entropy, z)
    return {"entropy": parts.batch_entropy.detach(), "gradient": gradient}


def our_entropies(z: Tensor) -> dict[str, Tensor]:
    """The entropy loss, with its gradient."""
    quantizer = LFQ(BITS, bits=BITS, entropy_temperature=1 / TAU, commitment_weight=0.0, entropy_weight=1.0).train()
    z = z.clone().requires_grad_()
    loss = quantizer(z).loss
    (gradient,) = torch.autograd.grad(loss, z)
    return {"loss": loss.detach(), "gradient": gradient}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    theirs, ours = build_theirs(), build_ours()  # before there is a process group
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=30),
    )
    after, told = build_theirs(), build_theirs(sync_codebook=True)
    z = latents(DIM)[rank : rank + 1]
    for quantizer in (theirs, after, told, ours):
        quantizer.train()(z)
    ours.update()
    results = {
        "table/theirs": theirs.codebook,
        "table/theirs after": after.codebook,
        "table/theirs told": told.codebook,
        "table/ours": ours.codebook.embedding,
    }
    z = latents(BITS)[rank : rank + 1]
    results.update({f"theirs/{name}": value for name, value in their_entropies(z).items()})
    results.update({f"ours/{name}": value for name, value in our_entropies(z).items()})
    save_file({name: value.contiguous().clone() for name, value in results.items()}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=main, args=(rank, Path(sys.argv[1])), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
