"""What a front leaves for its worker's main process: what it holds, and how it is."""
