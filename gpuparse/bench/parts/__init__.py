"""The parts of the benchmark, one module each: `measure(context)` returns what `results.json` keeps of it."""
