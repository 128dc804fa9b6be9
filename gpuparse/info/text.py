"""A `StoreInfo` in words: the lines that the text, the table on a terminal and the page have in common."""

from __future__ import annotations

from gpuparse.info.model import AXES, ClassInfo, StoreInfo, ViewInfo

__all__ = [
    "CLASS_HEADS",
    "SUMMARY_HEADS",
    "VIEW_HEADS",
    "class_row",
    "facts_of",
    "number_text",
    "size_text",
    "summary_row",
    "text_of",
    "view_row",
]

_MAX_CHUNK_SHAPES = 3


def size_text(num_bytes: float) -> str:
    """A size as people read it.

    >>> [size_text(n) for n in (12, 34_567, 8.9e6, 1.234e10)]
    ['12 B', '34.6 kB', '8.9 MB', '12.34 GB']
    """
    if num_bytes >= 1e12:
        return f"{num_bytes / 1e12:.2f} TB"
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    if num_bytes >= 1e6:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / 1e3:.1f} kB" if num_bytes >= 1e3 else f"{num_bytes:.0f} B"


def number_text(count: int, what: str) -> str:
    """A count of things: "1 case", "2,000 cases"."""
    return f"{count:,} {what}{'' if count == 1 else 'es' if what.endswith('s') else 's'}"


def facts_of(store: StoreInfo) -> list[tuple[str, str]]:
    """What there is to say of a store, as (what, value) in the order of interest."""
    about = "" if store.exact else "about "
    storage = store.storage
    parts = "; ".join(
        f"{part.name}: {number_text(part.num_cases, 'case')}, {number_text(part.num_slices, 'slice')}"
        for part in store.parts
    )
    share = store.num_foreground_slices / max(1, store.num_slices)
    facts = [
        ("cases", f"{store.num_cases:,}"),
        ("slices", f"{store.num_slices:,}, {share:.0%} with foreground"),
        ("parts", parts or "none"),
        ("labels", "instance ids" if store.instance_label else number_text(len(store.classes), "class")),
        ("shape", ", ".join(f"{axis} {spread}" for axis, spread in zip(AXES, store.shape, strict=True))),
        ("spacing", ", ".join(f"{axis} {spread}" for axis, spread in zip(AXES, store.spacing_mm, strict=True)) + " mm"),
        (
            "on disk",
            f"{about}{size_text(storage.store_bytes)} for {about}{size_text(storage.raw_bytes)} of voxels, "
            f"{storage.ratio:.1f} to 1",
        ),
        (
            "device cache",
            f"{about}{size_text(storage.cache_bytes)} hold all of it (cache_gib={_gib(storage.cache_bytes)})",
        ),
        ("codec", f"{storage.codec}{f', level {storage.level}' if storage.level else ''}"),
        ("chunks", _chunks(store)),
        (
            "label type",
            ", ".join(f"{name} in {count:,}" for name, count in storage.label_types.items()) + _of_opened(store),
        ),
        ("format", f"version {store.format_version}, case version {store.settings.get('case_version', '?')}"),
    ]
    if store.val_split is not None:
        chosen = ", ".join(f"{key} {value}" for key, value in store.val_split.items() if value is not None)
        facts.append(("validation by", chosen))
    if store.num_zeroed_slices:
        facts.append(("zeroed", f'{store.num_zeroed_slices:,} slices become zeros with recipe "reference"'))
    if store.voxels is not None:
        foreground = store.voxels.num_voxels - store.voxels.num_background_voxels
        text = f"{store.voxels.num_voxels:,}, {foreground / max(1, store.voxels.num_voxels):.2%} foreground"
        facts.append(("voxels", text))
        if store.voxels.num_instances is not None:
            facts.append(("instances", f"{store.voxels.num_instances:,}"))
    return facts


def _gib(num_bytes: int) -> str:
    """A size in GiB, rounded up to a tenth, so that it is enough."""
    return f"{-(-num_bytes * 10 // 2**30) / 10:.1f}"


def _of_opened(store: StoreInfo) -> str:
    if store.exact:
        return " case" if store.num_cases == 1 else " cases"
    return f" of {store.storage.num_cases_opened:,} cases looked at"


def _chunks(store: StoreInfo) -> str:
    shapes = [
        f"{' x '.join(map(str, shape))} in {count:,}"
        for shape, count in list(store.storage.chunk_shapes.items())[:_MAX_CHUNK_SHAPES]
    ]
    more = len(store.storage.chunk_shapes) - _MAX_CHUNK_SHAPES
    text = ", ".join(shapes) + (f", {more} other shapes" if more > 0 else "") + _of_opened(store)
    return f"{text}; {'' if store.exact else 'about '}{number_text(store.storage.num_shards, 'shard')}"


def view_row(view: ViewInfo) -> tuple[str, str, str, str, str, str]:
    """A view: axis, cases, slices, and per sample chunks, bytes read and bytes decoded."""
    read = view.read
    return (
        f"{view.axis} ({AXES[view.axis]})",
        f"{view.num_cases:,}",
        f"{view.num_slices:,}",
        f"{read.num_chunks:.1f}",
        size_text(read.read_bytes),
        size_text(read.decoded_bytes),
    )


VIEW_HEADS = ("view", "cases", "slices", "chunks/sample", "read/sample", "decoded/sample")
CLASS_HEADS = ("class", "prompt", "cases", "slices", "voxels")


def _printable(text: str) -> str:
    """A text that no terminal takes for a command: what is not printable is written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def class_row(entry: ClassInfo) -> tuple[str, str, str, str, str]:
    """A class: id, first prompt with the number of others, cases, slices, voxels."""
    more = f" (+{len(entry.prompts) - 1})" if len(entry.prompts) > 1 else ""
    voxels = "-" if entry.num_voxels is None else f"{entry.num_voxels:,}"
    return (
        str(entry.class_id),
        _printable(entry.prompts[0]) + more,
        f"{entry.num_cases:,}",
        f"{entry.num_slices:,}",
        voxels,
    )


def summary_row(store: StoreInfo) -> tuple[str, ...]:
    """A store in one line: dataset, store, cases, slices, views, classes, size, ratio."""
    return (
        store.name,
        f"{store.split}.zarr",
        f"{store.num_cases:,}",
        f"{store.num_slices:,}",
        " ".join(str(view.axis) for view in store.views),
        "instances" if store.instance_label else str(len(store.classes)),
        ("" if store.exact else "~") + size_text(store.storage.store_bytes),
        f"{store.storage.ratio:.1f}",
    )


SUMMARY_HEADS = ("dataset", "store", "cases", "slices", "views", "classes", "on disk", "ratio")


def text_of(store: StoreInfo) -> str:
    """All of it, without colours."""
    lines = [f"{store.name} ({store.path})"]
    facts = facts_of(store)
    width = max(len(what) for what, _ in facts)
    lines += [f"  {what:<{width}}  {value}" for what, value in facts]
    lines += ["", *_table(VIEW_HEADS, [view_row(view) for view in store.views])]
    lines += ["", *_table(CLASS_HEADS, [class_row(entry) for entry in store.classes], left=(1,))]
    return "\n".join(lines)


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[int, ...] = ()) -> list[str]:
    columns = [[head, *(row[i] for row in rows)] for i, head in enumerate(heads)]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  "
        + "  ".join(
            f"{cell:<{w}}" if i in left else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in zip(*columns, strict=True)
    ]
