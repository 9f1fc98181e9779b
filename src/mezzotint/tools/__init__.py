"""Tools that look: counts, memory, plans, benchmarks, the doctor, downloads, reproduction."""
