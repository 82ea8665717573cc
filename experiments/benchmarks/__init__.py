"""Benchmarks: each script tests one claim and writes one JSON file."""
