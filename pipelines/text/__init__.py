"""Pipelines over tokens. Users import them from `steer`."""
