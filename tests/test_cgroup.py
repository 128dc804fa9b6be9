"""What a control group lets the process use, by trees of files as the kernel has them."""

import os

import pytest

from gpuparse import cgroup
from gpuparse.memory import default_memory_bytes


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Writes files of a tree, and the process's own line in it."""
    monkeypatch.setattr(cgroup, "_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroup, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))

    def write(membership, files):
        if membership is not None:
            (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    cgroup.cpu_quota.cache_clear()
    yield write
    cgroup.cpu_quota.cache_clear()


STEP = "system.slice/slurmstepd.scope/job_7/step_0"
SLURM = f"0::/{STEP}\n"
V1 = "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n1:name=systemd:/docker/ab\n"


@pytest.mark.parametrize(
    ("membership", "files", "limit", "quota", "num_cpus"),
    [
        (None, {}, None, None, 16),
        ("0::/\n", {"memory.max": "max\n", "cpu.max": "max 100000\n"}, None, None, 16),
        ("0::/\n", {"memory.max": "4096\n", "cpu.max": "350000 100000\n"}, 4096, 3.5, 4),
        (SLURM, {"system.slice/slurmstepd.scope/job_7/memory.max": "8192\n"}, 8192, None, 16),
        (SLURM, {"system.slice/memory.max": "9000\n", f"{STEP}/memory.max": "9001"}, 9000, None, 16),
        (SLURM, {"system.slice/cpu.max": "200000 100000", "cpu.max": "150000 100000"}, None, 1.5, 2),
        (V1, {"memory/memory.limit_in_bytes": "5000\n", "cpu/cpu.cfs_quota_us": "-1\n",
              "cpu/cpu.cfs_period_us": "100000\n"}, 5000, None, 16),
        (V1, {"memory/docker/ab/memory.limit_in_bytes": "6000\n",
              "memory/memory.limit_in_bytes": "9223372036854771712",
              "cpu/docker/ab/cpu.cfs_quota_us": "50000\n",
              "cpu/docker/ab/cpu.cfs_period_us": "100000\n"}, 6000, 0.5, 1),
        ("0::/../../other\n", {"memory.max": "7000"}, 7000, None, 16),
        ("0::/not/there\n", {"memory.max": "7000"}, 7000, None, 16),
        ("no such line\n", {"memory.max": "many", "cpu.max": "few"}, None, None, 16),
        ("0::/\n", {"cpu.max": "3200000 100000\n"}, None, 32.0, 16),
    ],
)  # fmt: skip
def test_the_least_limit_from_the_own_group_up_holds(tree, membership, files, limit, quota, num_cpus):
    tree(membership, files)
    assert (cgroup.memory_limit_bytes(), cgroup.cpu_quota(), cgroup.num_usable_cpus()) == (limit, quota, num_cpus)
    assert limit is None or default_memory_bytes() == limit // 2
