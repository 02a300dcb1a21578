"""Solver steps, noise schedules and previews of any diffusers pipeline."""
