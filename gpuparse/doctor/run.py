"""All checks, in their order: cheap ones side by side, those that measure one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from gpuparse.doctor.checks import Check, Diagnosis, without_private
from gpuparse.doctor.fit import check_fit
from gpuparse.doctor.isolated import Isolation, Probe, run_all

__all__ = ["diagnose"]

_SELF_TEST_SECONDS = 2.0
_READ_SECONDS = 1.0
_HERE = "gpuparse.doctor"
# torch, CuPy and DALI may come from a slow network drive, and be read for the first time.
_IMPORT_SECONDS = 120.0


def diagnose(store: str | None = None, on_check: Callable[[Check], None] = lambda _: None) -> Diagnosis:
    """Looks at everything that gpuparse needs.

    Args:
        store: A store, or a dataset's folder, whose storage is measured; None for the folder for temporary files.
        on_check: Called with each line as soon as it is known.

    Returns:
        All lines. No check can end this by failing, crashing or hanging.
    """
    found: list[Check] = []

    def take(checks: Iterable[Check]) -> None:
        for check in without_private(checks, store):
            found.append(check)
            on_check(check)

    with Isolation() as isolation:
        for checks in _look(isolation, store):
            take(checks)
    return Diagnosis(tuple(found))


def _look(isolation: Isolation, store: str | None) -> Iterator[list[Check]]:
    yield isolation.run(Probe("system", f"{_HERE}.system:check_system", seconds=30))
    imports = [
        Probe("numpy", f"{_HERE}.packages:check_numpy", seconds=_IMPORT_SECONDS),
        Probe("packages", f"{_HERE}.packages:check_required", seconds=30),
        _importing("torch", "torch", "pip install --force-reinstall torch"),
        _importing("CuPy", "cupy", "pip uninstall and install CuPy again"),
        _importing("DALI", "dali", "pip uninstall and install DALI again"),
        Probe("driver", f"{_HERE}.gpus:check_driver", seconds=60, remedy="Look at nvidia-smi; restart the machine."),
    ]
    results = run_all(isolation, imports)
    yield from results
    everything = {check.name: check.values for checks in results for check in checks}
    gpus = [values for name, values in everything.items() if name.startswith("GPU ")]
    yield check_fit(everything, gpus)
    others = [
        Probe("CPU kernels", f"{_HERE}.compiling:check_cpu_kernels", seconds=30, remedy="Install gpuparse again."),
        Probe("kernel compiler", f"{_HERE}.compiling:check_compiler", seconds=_IMPORT_SECONDS),
        Probe("GPUDirect Storage", f"{_HERE}.gpus:check_gds", seconds=30),
        Probe("extras", f"{_HERE}.packages:check_extras", seconds=30),
    ]
    if "cuda_major" not in everything.get("CuPy", {}):  # it is not there, or cannot be imported: that line is enough
        del others[1]
    yield from run_all(isolation, others)
    for device in ("cpu", *(f"cuda:{number}" for number in range(len(gpus)))):
        yield isolation.run(
            Probe(
                f"self-test {device}",
                f"{_HERE}.selftest:check_pipeline",
                (device, _SELF_TEST_SECONDS),
                seconds=180,
                remedy="See the lines above; where they are all ok, please report this.",
            )
        )
    remedy = "Storage does not answer. Look at its mount, server or network."
    yield isolation.run(Probe("storage", f"{_HERE}.storage:check_storage", (store, _READ_SECONDS), 60, remedy))


def _importing(name: str, check: str, again: str) -> Probe:
    remedy = f"Importing it fails in a way that Python cannot report: {again}."
    return Probe(name, f"{_HERE}.packages:check_{check}", seconds=_IMPORT_SECONDS, remedy=remedy)
