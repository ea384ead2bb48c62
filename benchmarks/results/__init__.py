"""The evidence: every figure of docs/results.md, by one resumable command (`python -m benchmarks.results`, `make results`)."""
