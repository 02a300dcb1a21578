"""Evaluation of models, adapters and methods side by side: runs, statistics, report."""
