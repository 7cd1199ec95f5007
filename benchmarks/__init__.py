"""What is claimed, measured: each module is a command, and none is installed."""
