"""How good a video is: drawn worlds, judges that were trained on them, and scores. Knows frames and prompts;
no engine life.
"""
