"""How fast, beside diffusers, in one run: forwards, a whole video, and where the time goes. One command, any
GPU.

    # everything: about 315 s on one H200, 85 s of it compiling
    python -m benchmarks.latency
    python -m benchmarks.latency --sections ceilings small-exact --rounds 5
    # the most important first; what does not fit is left out
    python -m benchmarks.latency --budget 270
    python -m benchmarks.latency --sections cpu                 # wan-tiny beside diffusers' pipeline, CPU
    python -m benchmarks.latency --small --device cpu           # does it work?

Both sides run the same random weights at the same shapes in the same process, and their timed calls take
turns. The first call of each (compiling, choosing kernels) is timed apart as `warm_up_s`. For diffusers a
call is one forward, for ours a guided step's two, of which the half is shown: the two share work. Results go
to `benchmarks/results/` after every section. FlashAttention-3 wants the wheel `fa3-fwd`, 8-bit diffusers
`torchao`; what is missing is noted as absent. Where there is no GPU, the section `cpu` alone is run unless
others are asked for: full-size networks take hours there.
"""
