"""Several videos on one engine: tasks take turns, a bad request is refused at once, a failure stays one
task's.

    python examples/batch.py FOLDER

Run it again and it goes on where it was cut short: each task keeps a checkpoint until its video stands.
`chitu batch prompts.txt` does the same from a file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from chitu_diffusion import DiffusionUserParams, Engine, EngineConfig
from chitu_diffusion.errors import UsageError

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "batch")
PROMPTS = {
    "rabbit": "a white rabbit jumping in the snow",
    "fish": "a yellow fish swimming to the left in the ocean",
    "robot": "a purple robot standing under the stars",
}


def main() -> None:
    """Makes what is missing."""
    config = EngineConfig()
    config.scheduler.policy = "fair"  # a step of each task in turn; "fifo" finishes one after the other
    with Engine(config) as engine:
        tasks = {}
        for name, prompt in PROMPTS.items():
            path = folder / f"{name}.mp4"
            if path.exists():
                print(f"{name}: is there already")
                continue
            request = DiffusionUserParams(
                prompt=prompt, seed=7, num_inference_steps=12, num_frames=17, save_path=str(path)
            )
            tasks[name] = engine.submit(request, checkpoints=folder / f".{name}.checkpoint")
        try:
            engine.submit(DiffusionUserParams(prompt="a cat", num_frames=32))
        except UsageError as error:
            print(f"refused: {error}")
        engine.run_until_idle(raise_on_failure=False)  # each is told below
    for name, task in tasks.items():
        print(f"{name}: {task.status} {task.error_message or task.buffer.save_path}")
    raise SystemExit(any(task.error is not None for task in tasks.values()))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from None
