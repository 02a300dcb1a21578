"""Trainers: the finetuning methods, their configuration and their data."""
