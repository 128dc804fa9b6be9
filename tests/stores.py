"""What is in a store, for comparison."""

from __future__ import annotations

from gpuparse.store import open_store


def content(store_path):
    """Everything in a store but the names that are drawn at random: case -> file -> bytes, columns, attributes."""
    store = open_store(store_path)
    cases = {}
    for i, case in enumerate(store.cases):
        folder = store.case_path(i)
        cases[case.name] = {
            p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
        }
    columns = {name: values.tolist() for name, values in vars(store.slices).items()}
    return cases, columns, {key: value for key, value in store.attributes.items() if key != "index"}
