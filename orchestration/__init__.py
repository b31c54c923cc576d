"""Drives the stages: one run's configuration, the engine on Ray or in one process, jobs, and what a person sees."""
