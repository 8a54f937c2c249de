"""Many ranks, one video: how the work is laid out, who talks to whom, and what happens when one falls silent."""
