"""Speed and memory, beside dense attention and the floor that bytes and operations set."""
