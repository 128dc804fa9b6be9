"""The kernels' sources: they compile for GPUs without a GPU, round as stated, and belong to the library in use."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from gpuparse import cgroup, kernels
from gpuparse.errors import KernelError
from gpuparse.read import COMPRESSED_BLOCK_DTYPE
from gpuparse.sampling import PARAMS_DTYPE
from gpuparse.views import PLANE_DTYPE

SOURCES = sorted(p.name for p in kernels.kernel_sources().glob("*.cu"))
MOVES_ONLY = {"place.cu"}
ARITHMETIC = {"add", "sub", "mul", "div", "fma", "mad", "sqrt", "rcp"}
WHOLE_NUMBERS = {"prepare.cu"}  # no float in them at all
ALWAYS_APPROXIMATE = {"sin", "cos", "ex2", "lg2", "tanh", "rsqrt"}


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """NVIDIA's run-time compiler from its wheel; it needs neither a GPU nor a driver."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in spec.submodule_search_locations] if spec is not None else []
    found = sorted(p for root in roots for p in root.glob("*/lib/libnvrtc.so.*"))
    if not found:
        pytest.fail("NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12", pytrace=False)
    return ctypes.CDLL(str(found[0]))


def compile_kernel(code: str, architecture: str, options: tuple[str, ...] | None = None) -> bytes:
    """Cubin for an architecture `sm_NN`, PTX for `compute_NN`."""
    library, program = nvrtc(), ctypes.c_void_p()
    every = [o.encode() for o in (kernels.nvrtc_options() if options is None else options)]
    every.append(f"--gpu-architecture={architecture}".encode())
    assert library.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"test.cu", 0, None, None) == 0
    try:
        status = library.nvrtcCompileProgram(program, len(every), (ctypes.c_char_p * len(every))(*every))
        log = fetch(program, "ProgramLog").rstrip(b"\0").decode()
        assert status == 0, log
        assert "warning" not in log, log
        return fetch(program, "CUBIN" if architecture.startswith("sm_") else "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def fetch(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    assert getattr(nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    buffer = ctypes.create_string_buffer(size.value)
    assert getattr(nvrtc(), f"nvrtcGet{what}")(program, buffer) == 0
    return buffer.raw


def kernel_names(source: str) -> list[str]:
    text = (kernels.kernel_sources() / source).read_text(encoding="utf-8")
    return re.findall(r"^GP_(?:BLOCK_)?KERNEL\((\w+),", text, re.MULTILINE)


def imprecise_instructions(ptx: str) -> list[str]:
    """Float instructions whose result the PTX leaves open: unrounded (they may be fused), approximate or flushed."""
    found = []
    for line in ptx.splitlines():
        match = re.match(r"\s*(?:@!?%\w+\s+)?([a-z][\w.]*)\s.*;", line)
        if match is None:
            continue
        operation, *modifiers = match[1].split(".")
        is_float = any(re.fullmatch(r"b?f(16|32|64)(x2)?", m) for m in modifiers)
        if not is_float:
            continue
        unrounded = operation in ARITHMETIC and "rn" not in modifiers
        if unrounded or operation in ALWAYS_APPROXIMATE or {"approx", "ftz"} & set(modifiers):
            found.append(line.strip())
    return found


def test_there_are_kernels_to_test():
    assert "encode.cu" in SOURCES
    assert kernel_names("encode.cu") == ["encode", "encode_mask"]
    assert kernel_names("augment_tiles.cu") == ["augment_tiles"]


def newest_architecture() -> str:
    """The last that this compiler knows."""
    count = ctypes.c_int()
    assert nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count)) == 0
    numbers = (ctypes.c_int * count.value)()
    assert nvrtc().nvrtcGetSupportedArchs(numbers) == 0
    return f"sm_{max(numbers)}"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90", "newest"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_kernel_compiles_for_the_gpu(source, architecture):
    architecture = newest_architecture() if architecture == "newest" else architecture
    cubin = compile_kernel(f'#include "{source}"\n', architecture)
    assert cubin[:4] == b"\x7fELF"
    for name in kernel_names(source):
        assert f".text.{name}\0".encode() in cubin


@pytest.mark.parametrize("source", SOURCES)
def test_kernels_take_no_more_shared_memory_than_any_gpu_has(source):
    ptx = compile_kernel(f'#include "{source}"\n', "compute_80").decode()
    shared = [int(number) for number in re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\]", ptx)]
    assert (sum(shared) > 0) == ("GP_BLOCK_KERNEL" in (kernels.kernel_sources() / source).read_text())
    assert sum(shared) <= 48 << 10  # of what need not be asked for when a kernel is launched


@pytest.mark.parametrize("fused", ["--fmad=false", "--fmad=true"])  # the sources name every rounding themselves
@pytest.mark.parametrize("source", SOURCES)
def test_device_code_rounds_every_float_operation_to_nearest(source, fused):
    options = tuple(o for o in kernels.nvrtc_options() if "fmad" not in o)
    ptx = compile_kernel(f'#include "{source}"\n', "compute_80", (*options, fused)).decode()
    for name in kernel_names(source):
        assert f".visible .entry {name}(" in ptx
    assert imprecise_instructions(ptx) == []
    if source in WHOLE_NUMBERS:
        assert re.search(r"\bmad\.lo\.s32\b", ptx)
        assert not re.search(r"\.f(16|32|64)\b", ptx)
    elif source not in MOVES_ONLY:
        assert re.search(r"\b(fma|add|mul)\.rn\.f32\b", ptx)  # the lint has seen arithmetic


@pytest.mark.parametrize("shift", [0, 1, 2, 3, 4])
def test_words_are_read_from_where_words_begin(shift):
    memory = np.zeros(80, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :][: 48 + shift]
    memory[:] = np.arange(len(memory))
    part = memory[shift:]
    found = kernels.in_words(part, 4)
    assert (found is part) == (shift % 4 == 0)
    assert found.ctypes.data % 4 == 0
    np.testing.assert_array_equal(found, part)
    columns = memory[:48].reshape(6, 8)[:, ::2]
    assert kernels.in_words(columns, 1).flags.c_contiguous
    np.testing.assert_array_equal(kernels.in_words(columns, 1), columns)


def test_short_calls_keep_the_interpreter():
    library = kernels.library_for(1024)
    assert type(library) is ctypes.PyDLL
    assert library._name == kernels.host_library()._name
    assert kernels.library_for(1025) is kernels.host_library()


@pytest.mark.parametrize("source", SOURCES)
def test_no_arithmetic_flushes_the_smallest_numbers_with_what_cupy_adds(source):
    # CuPy adds this behind everyone's options. Where it reaches, such numbers and 0 give the same.
    options = (*kernels.nvrtc_options(), "-ftz=true")
    ptx = compile_kernel(f'#include "{source}"\n', "compute_80", options).decode()
    flushing = {line.split(".ftz")[0] for line in imprecise_instructions(ptx)}
    assert flushing <= {"cvt.rzi", "neg", "max", "min"}


@pytest.mark.parametrize(
    ("expression", "instruction"),
    [
        ("a * b", "mul.f32"),
        ("a - b", "sub.f32"),
        ("(float)((double)a * a * b)", "mul.f64"),
        ("__sinf(a)", "sin.approx.f32"),
        ("__fdividef(a, b)", "div.approx.f32"),
        ("rsqrtf(a)", "rsqrt.approx.f32"),
    ],
)
def test_the_lint_finds_what_it_is_there_for(expression, instruction):
    code = f'extern "C" __global__ void k(float a, float b, float *out) {{ *out = {expression}; }}'
    found = imprecise_instructions(compile_kernel(code, "compute_80", ()).decode())
    assert [line for line in found if instruction in line]
    exact = code.replace(expression, "__fadd_rn(__fmul_rn(a, b), __fdiv_rn(a, __fsqrt_rn(b)))")
    assert imprecise_instructions(compile_kernel(exact, "compute_80", ()).decode()) == []


def test_the_lint_sees_flushes_and_predicates():
    assert imprecise_instructions("\tadd.rn.ftz.f32 %f1, %f2, %f3;\n@%p1 mul.f32 %f1, %f2, %f3;") == [
        "add.rn.ftz.f32 %f1, %f2, %f3;",
        "@%p1 mul.f32 %f1, %f2, %f3;",
    ]
    harmless = "add.s32 %r1, %r2, 1;\nmul.wide.u32 %rd1, %r1, 4;\nfma.rn.f32 %f1, %f2, %f3, %f4;"
    assert imprecise_instructions(harmless) == []


@pytest.mark.parametrize(
    ("source", "struct", "dtype"),
    [
        ("planes.h", "Plane", PLANE_DTYPE),
        ("augment.h", "AugmentParams", PARAMS_DTYPE),
        ("compressed.h", "CompressedBlock", COMPRESSED_BLOCK_DTYPE),
    ],
)
def test_structs_lie_in_memory_as_their_numpy_mirrors(source, struct, dtype):
    text = re.sub(r"//[^\n]*", "", (kernels.kernel_sources() / source).read_text(encoding="utf-8"))
    body = re.search(rf"struct {struct} {{(.*?)}};", text, re.DOTALL)[1]
    offset, largest, fields = 0, 1, []
    for c_type, names in re.findall(r"(\w+)\s+([^;]+);", body):
        kind = {"int64_t": "<i8", "int32_t": "<i4", "uint32_t": "<u4", "float": "<f4"}[c_type]
        for name in names.split(","):
            plain, count = re.fullmatch(r"\s*(\w+)(?:\[(\d+)\])?\s*", name).groups()
            size = int(kind[2])
            offset = -(-offset // size) * size  # C's alignment
            largest = max(largest, size)
            fields.append((plain, offset, np.dtype(kind) if count is None else np.dtype((kind, (int(count),)))))
            offset += size * int(count or 1)
    assert [(name, dtype.fields[name][1], dtype.fields[name][0]) for name in dtype.names] == fields
    assert dtype.itemsize == -(-offset // largest) * largest


def test_the_library_has_every_kernels_body_and_was_built_from_these_sources():
    for variant in ("baseline", "avx2") if platform.machine() == "x86_64" else ("baseline",):
        library = kernels._load(f"libgpuparse_kernels{'' if variant == 'baseline' else '_avx2'}.so")
        assert library.gpuparse_source_digest().decode() == kernels.source_digest()
        for source in SOURCES:
            for name in kernel_names(source):
                assert hasattr(library, f"{name}_elements"), (variant, name)


def test_the_digest_follows_every_source(tmp_path, monkeypatch):
    copy = Path(shutil.copytree(kernels.kernel_sources(), tmp_path / "kernels"))
    monkeypatch.setattr(kernels, "kernel_sources", lambda: copy)
    digest = kernels.source_digest.__wrapped__
    assert digest() == kernels.source_digest()
    for path in sorted(copy.iterdir()):
        text = path.read_text(encoding="utf-8")
        path.write_text(text + "\n")
        assert (digest() == kernels.source_digest()) == (path.suffix == ".txt"), path.name
        path.write_text(text)
    assert digest() == kernels.source_digest()


def test_compile_options_carry_the_digest_and_forbid_loose_arithmetic():
    options = kernels.nvrtc_options()
    assert f"-DGPUPARSE_SOURCE_DIGEST={kernels.source_digest()[:16]}" in options
    assert f"-I{kernels.kernel_sources()}" in options
    assert {"--fmad=false", "--prec-div=true", "--prec-sqrt=true"} <= set(options)


def test_a_library_built_from_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "source_digest", lambda: "f" * 64)
    with pytest.raises(
        KernelError,
        match=r"libgpuparse_kernels\.so was built from sources with digest [0-9a-f]{12}; those in .*kernels have "
        r"ffffffffffff\. Install gpuparse again with `pip install -e \.`",
    ):
        kernels.host_library.__wrapped__("baseline")


def test_a_missing_library_and_missing_sources_are_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_package_roots", lambda: [str(tmp_path)])
    with pytest.raises(
        KernelError, match=r"the CPU kernels libgpuparse_kernels\.so are in none of .*_native.*Install gpuparse again"
    ):
        kernels.host_library.__wrapped__()
    monkeypatch.setattr(kernels, "_PACKAGE", tmp_path / "gpuparse")
    with pytest.raises(KernelError, match=rf"no kernel sources in {tmp_path}/kernels, {tmp_path}/_kernels\. Install"):
        kernels.kernel_sources.__wrapped__()
    (tmp_path / "_kernels").mkdir()
    (tmp_path / "_kernels/encode.cu").write_text("")
    assert kernels.kernel_sources.__wrapped__() == tmp_path / "_kernels"


def test_the_variant_can_be_forced_and_others_are_refused(monkeypatch):
    baseline = kernels.host_library("baseline")
    monkeypatch.setenv("GPUPARSE_CPU_KERNELS", "baseline")
    assert kernels.host_library.__wrapped__()._name == baseline._name
    monkeypatch.setenv("GPUPARSE_CPU_KERNELS", "sse9")
    with pytest.raises(KernelError, match=r"CPU kernel variant is 'sse9'; expected 'baseline' or 'avx2'"):
        kernels.host_library.__wrapped__()
    monkeypatch.delenv("GPUPARSE_CPU_KERNELS")
    best = "avx2" if baseline.gpuparse_supports_avx2() else "baseline"
    assert kernels.host_library.__wrapped__()._name == kernels.host_library(best)._name


def test_a_build_that_the_processor_does_not_run_is_refused(monkeypatch):
    old = SimpleNamespace(gpuparse_supports_avx2=lambda: 0)
    monkeypatch.setattr(kernels, "_load", {"libgpuparse_kernels.so": old}.__getitem__)
    assert kernels.host_library.__wrapped__() is old
    message = r"CPU kernel variant is 'avx2'; this processor \(\w+\) runs 'baseline' only\. Leave GPUPARSE_CPU_KERNELS"
    with pytest.raises(KernelError, match=message):
        kernels.host_library.__wrapped__("avx2")
    monkeypatch.setenv("GPUPARSE_CPU_KERNELS", "avx2")
    with pytest.raises(KernelError, match=message):
        kernels.host_library.__wrapped__()


def test_pointers_are_taken_of_contiguous_arrays_only():
    array = np.arange(12).reshape(3, 4)
    assert kernels.pointer(array).value == array.ctypes.data
    with pytest.raises(KernelError, match=r"an array of shape \(4, 3\) and strides \(8, 32\) is not C-contiguous"):
        kernels.pointer(array.T)


def test_threads_are_the_cores_this_process_may_use(monkeypatch):
    monkeypatch.setattr(cgroup, "cpu_quota", lambda: None)  # a machine that has one gives fewer
    assert cgroup.num_usable_cpus() == len(os.sched_getaffinity(0))


def test_numpy_arrays_are_not_taken_for_device_arrays():
    assert not kernels.is_device_array(np.zeros(1))
    assert kernels.is_device_array(type("ndarray", (), {"__module__": "cupy"})())


def test_nothing_is_launched_for_nothing(monkeypatch):
    """An empty batch has no rows whose length could be told by their bytes, and no blocks."""
    cupy = ModuleType("cupy")
    cupy.asarray = lambda array: array
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    table = np.zeros(0, [("offset", "<i8"), ("side", "<i4")])
    assert kernels.on_device(table).shape == (0, 12)
    kernels.launch_on_device("encode.cu", "encode", 0, ())  # would ask CuPy for its device
