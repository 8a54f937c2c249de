"""One sentence, one video, with the progress of every work unit.

python examples/text_to_video.py "a red car driving in the city" car.mp4
"""

from __future__ import annotations

import sys

from chitu_diffusion import Engine

prompt = sys.argv[1] if len(sys.argv) > 1 else "A cat walking on grass"
path = sys.argv[2] if len(sys.argv) > 2 else "cat.mp4"


def main() -> None:
    """Makes it."""
    with Engine() as engine:
        task = engine.submit(prompt, seed=1, num_inference_steps=20, num_frames=17, save_path=path)
        for event in task.events():
            print(f"{event.stage}: step {event.step} of {event.total_steps}, {event.seconds:.2f} s")
    if task.error is not None:
        raise SystemExit(task.error_message)
    print(task.buffer.save_path)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; the same command starts again", file=sys.stderr)
        raise SystemExit(130) from None
