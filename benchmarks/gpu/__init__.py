"""What one GPU does: correctness and speed of the training, in minutes (python -m benchmarks.gpu)."""
