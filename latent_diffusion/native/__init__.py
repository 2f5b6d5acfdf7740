"""Kernels in C for what Paddle does slowly on a CPU: built where there is a compiler, left out where there is none."""
