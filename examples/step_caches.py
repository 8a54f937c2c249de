"""The same video with and without step caches: how much faster, and how near.

    python examples/step_caches.py

A step cache leaves out forwards, so it changes the video; it is off unless a request asks for one.
`chitu eval cache` measures all of them over many prompts.
"""

from __future__ import annotations

import sys

import numpy as np

from chitu_diffusion import DiffusionUserParams, Engine, EngineConfig

CACHES = {
    "no cache": None,
    "a calibrated plan, half of the steps": {"strategy": "plan", "fresh": 10},
    "teacache": {"strategy": "teacache", "threshold": 0.2},
    "taylorseer": {"strategy": "taylorseer"},
}


def main() -> None:
    """Compares them."""
    frames = {}
    with Engine(EngineConfig()) as engine:
        for name, cache in CACHES.items():
            task = engine.submit(
                DiffusionUserParams(
                    prompt="A cat walking on grass",
                    seed=1,
                    num_inference_steps=20,
                    num_frames=17,
                    flexcache=cache,
                    save_path="cache.npy",
                )
            )
            engine.run_until_idle()
            if task.error is not None:
                raise SystemExit(task.error_message)
            frames[name] = np.load("cache.npy").astype(float)  # [T, H, W, 3], 0 to 255
            error = np.mean((frames[name] - frames["no cache"]) ** 2)
            psnr = 10 * np.log10(255**2 / error) if error else float("inf")
            print(f"{name}: {task.get_elapsed_time():.1f} s, {psnr:.1f} dB from no cache")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; the same command starts again", file=sys.stderr)
        raise SystemExit(130) from None
