"""The CPU kernels beside what they replace: `gpuparse.bench.kernels`, by itself.

Example: python bench/bench_kernels.py --json bench/results/kernels-cpu.json
"""

from gpuparse.bench.kernels import main

if __name__ == "__main__":
    main()
