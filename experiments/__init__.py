"""The experiments: one package a task, each run as ``python -m experiments.<task>``."""
