"""`gpuparse check`: what is wrong with a folder of volumes or with a store, case by case, and what to do about it.

`rules` is the catalogue; `findings` what is handed back; `image`, `labels`, `pieces` and `prompts` look at contents;
`source`, `chunks`, `store` and `presence` at files; `case` puts them together for one case; `targets`, `across` and
`run` for many; `repair` converts broken cases again.
"""

from __future__ import annotations

from gpuparse.check.findings import CheckedDataset, CheckReport, Finding
from gpuparse.check.repair import RepairReport, repair
from gpuparse.check.rules import RULES, Rule, Severity
from gpuparse.check.run import check

__all__ = ["RULES", "CheckReport", "CheckedDataset", "Finding", "RepairReport", "Rule", "Severity", "check", "repair"]
