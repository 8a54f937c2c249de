"""How good a video is: held-out prompts, the judge, and scores. Knows frames and prompts, no engine."""
