"""A bare NCCL broadcast: ``torchrun -m gpu_bench.bare_broadcast BYTES FILE GPU...``, a GPU for each rank."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path


def main(argv: list[str]) -> int:
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(argv[2 + rank]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timedelta(seconds=60), device_id=device)
    data = torch.randint(0, 255, (int(argv[0]),), dtype=torch.uint8, device=device)
    times = []
    for _ in range(25):
        torch.cuda.synchronize()
        dist.barrier()
        began = time.perf_counter()
        dist.broadcast(data, 0)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    if rank == 0:
        Path(argv[1]).write_text(str(sorted(times[5:])[10]))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
