"""Steering pipelines and trainers. Users import them from `steer`."""
