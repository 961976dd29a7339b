"""Measurements that scripts/benchmark.py prints. Always several things in one run, told as ratios."""
