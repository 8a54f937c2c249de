"""What an exchange between two GPUs costs the kernel beside it: NCCL on multiprocessors, or copies by the
copy engines.

    torchrun --nproc-per-node 2 -m benchmarks.overlap

FlashAttention-3 spreads its tiles over all multiprocessors beforehand, so one that is taken when it begins
could hold up the whole; its variants with a margin or with lengths (which share tiles out as they go) stand
beside it. Milliseconds of each alone and of both at once; one line each.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

TOKENS, HEADS, DIM, ROUNDS = 32760, 6, 1536, 7
Work = Callable[[], object]


def timed(work: Work) -> float:
    """Milliseconds, after all ranks have met."""
    found = []
    for _ in range(ROUNDS):
        dist.barrier()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return round(median(found[2:]), 3)


def kernels() -> dict[str, Work]:
    """What may stand beside an exchange."""
    q, k, v = torch.randn(3, 1, TOKENS, HEADS, 128, device="cuda").bfloat16().unbind()
    x, w = (
        torch.randn(TOKENS // 2, DIM, device="cuda").bfloat16(),
        torch.randn(DIM, 8960, device="cuda").bfloat16(),
    )
    found: dict[str, Work] = {"product": lambda: x @ w}
    try:
        from fa3_fwd_interface import flash_attn_func, flash_attn_varlen_func

        ends = torch.tensor([0, TOKENS], dtype=torch.int32, device="cuda")
        found["fa3"] = lambda: flash_attn_func(q, k, v)
        found["fa3, 16 left"] = lambda: flash_attn_func(q, k, v, sm_margin=16)
        found["fa3, varlen"] = lambda: flash_attn_varlen_func(q[0], k[0], v[0], ends, ends, TOKENS, TOKENS)
        out = (
            flash_attn_func(q, k, v)[0]
            if isinstance(flash_attn_func(q, k, v), tuple)
            else flash_attn_func(q, k, v)
        )
        other = found["fa3, varlen"]()
        other = other[0] if isinstance(other, tuple) else other
        print("varlen is the same:", bool(torch.equal(out.flatten(), other.flatten())), flush=True)
    except Exception:
        traceback.print_exc()
    return {name: work for name, work in found.items() if runs(work)}


def runs(work: Work) -> bool:
    """Whether it works; its error is printed."""
    try:
        work()
        torch.cuda.synchronize()
        return True
    except Exception:
        traceback.print_exc()
        return False


def exchanges(size: int) -> dict[str, tuple[Work, Work]]:
    """(begin, wait) of an exchange of `size` bytes with the other rank."""
    rank = dist.get_rank()
    x = torch.randn(size // 2, device="cuda").bfloat16()
    y = torch.empty_like(x)
    found: dict[str, tuple[Work, Work]] = {}
    for name, most in (("nccl", None), ("nccl, 8", 8)):
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        if most:
            options.config.max_ctas = most
        group = dist.new_group([0, 1], pg_options=options)
        moves = [dist.P2POp(dist.isend, x, 1 - rank, group), dist.P2POp(dist.irecv, y, 1 - rank, group)]
        held: list[list[dist.Work]] = []

        def begin(moves: list[dist.P2POp] = moves, held: list[list[dist.Work]] = held) -> None:
            held.append(dist.batch_isend_irecv(moves))

        found[name] = begin, lambda held=held: [work.wait() for work in held.pop()]
    try:
        import torch.distributed._symmetric_memory as symmetric

        mine = symmetric.empty(size // 2, dtype=torch.bfloat16, device=torch.device("cuda", rank))
        handle = symmetric.rendezvous(mine, dist.group.WORLD)
        theirs = handle.get_buffer(1 - rank, (size // 2,), torch.bfloat16)
        side = torch.cuda.Stream(priority=-1)

        def push() -> None:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                theirs.copy_(x)
                handle.put_signal(1 - rank, 0)
                handle.wait_signal(1 - rank, 0)

        found["copies"] = push, lambda: torch.cuda.current_stream().wait_stream(side)
        push()
        torch.cuda.synchronize()
        dist.barrier()
        print(f"rank {rank}: symmetric memory works", flush=True)
    except Exception:
        traceback.print_exc()
    return found


def main() -> None:
    """The command line."""
    if torch.cuda.device_count() < 2 or os.environ.get("WORLD_SIZE") != "2":
        found = f"{torch.cuda.device_count()} GPUs, {os.environ.get('WORLD_SIZE', '1')} process(es)"
        raise SystemExit(f"{found}: it takes two of each: torchrun --nproc-per-node 2 -m benchmarks.overlap")
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    works = kernels()
    for size in (25 << 20, 75 << 20, 150 << 20):
        for exchange, (begin, wait) in exchanges(size).items():
            alone = timed(lambda begin=begin, wait=wait: (begin(), wait()))
            for name, work in works.items():
                first = timed(lambda begin=begin, wait=wait, work=work: (begin(), work(), wait()))
                row = {
                    "kernel": name,
                    "exchange": exchange,
                    "mib": size >> 20,
                    "kernel_ms": timed(work),
                    "exchange_ms": alone,
                }
                if rank == 0:
                    print(json.dumps({**row, "both_ms": first}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
