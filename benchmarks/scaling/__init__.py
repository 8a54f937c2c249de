"""Seconds per guided step and per VAE decode on one GPU and on every layout of the ranks, in one run, on
random weights.

    python -m benchmarks.scaling --ranks 2                                    two GPUs of this machine
    torchrun --nproc-per-node 2 -m benchmarks.scaling --budget 200            the same, started by hand
    torchrun --nproc-per-node 8 -m benchmarks.scaling --layouts all --sizes 480p,720p --repeats 1
    python -m benchmarks.scaling --ranks 2 --small --device cpu               the same road without a GPU
                                                                              (gloo)

Beside them diffusers' own context parallelism, the links' bandwidth by message size, and the kernels' times,
from which `benchmarks.simulate_scaling` computes more ranks. Sections stand for themselves: one that fails
fails on all ranks, and the run goes on. Results are rewritten after each. Warm-up is reported and not
counted; a time is the slowest rank's.
"""
