"""The parts of bench_device.py: `floor` counts bytes, the others measure."""
