"""Tools: counts of presets, memory, plans, benchmarks, checks, downloads, reproduction."""
