"""Samples as training sees them, to look at: contact sheets, and a page with everything that was drawn for them."""

from __future__ import annotations

from gpuparse.preview.choose import SliceChoice
from gpuparse.preview.page import ImageFormat
from gpuparse.preview.run import Preview, PreviewOptions, preview
from gpuparse.preview.samples import DrawOptions, Picture, Sample
from gpuparse.preview.words import describe_params

__all__ = [
    "DrawOptions",
    "ImageFormat",
    "Picture",
    "Preview",
    "PreviewOptions",
    "Sample",
    "SliceChoice",
    "describe_params",
    "preview",
]
