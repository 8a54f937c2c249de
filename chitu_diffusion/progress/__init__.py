"""What is told of a task while it runs, and waiting for it."""
