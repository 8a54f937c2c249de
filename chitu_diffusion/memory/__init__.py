"""Where weights lie, what a video needs, and what running out of memory looks like."""
