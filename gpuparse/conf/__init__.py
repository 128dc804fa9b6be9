"""Hydra configuration for finetuning BiomedParse with gpuparse: the files that replace its own, and a whole example.

The folders are named as in BiomedParse's `configs`. Hydra finds them as `pkg://gpuparse.conf`; `docs/biomedparse.md`
says how they are used.
"""

from __future__ import annotations
