"""What this machine has, what does not fit, and what to do about it: `gpuparse doctor`.

Each check runs in a process of its own with a limit of time, so that a broken driver or package is a line and not the
end.
"""

from __future__ import annotations

from gpuparse.doctor.checks import Check, Diagnosis
from gpuparse.doctor.run import diagnose

__all__ = ["Check", "Diagnosis", "diagnose"]
