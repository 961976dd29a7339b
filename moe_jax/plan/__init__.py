"""What a program costs, read or computed without running it."""
