"""The catalogue: every finding that `check` knows, under a code that never changes its meaning.

docs/check.md lists the same codes with their causes; a test keeps the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["RULES", "SEVERITIES", "Rule", "Severity"]

Severity = Literal["error", "warning", "info"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""From the gravest down."""


@dataclass(frozen=True)
class Rule:
    """One kind of finding.

    Attributes:
        code: Stable id: GP1xx source files, GP2xx stores, GP3xx voxels, GP4xx prompts, GP5xx datasets, GP9xx the check
            itself.
        severity: `error`: cannot be used, or trains on wrong data; `warning`: likely a mistake; `info`: good to know.
        title: What is found, in a few words.
        remedy: What to do about it.
    """

    code: str
    severity: Severity
    title: str
    remedy: str


_COPY_AGAIN = "Copy or export the file again."
_REPAIR = (
    "Convert the case again: `gpuparse check STORE --repair`, with --source where the source has moved; one from NIfTI "
    "or DICOM by removing its folder and running its conversion again."
)

_CATALOGUE = (
    # Source files: what conversion would refuse, and two things that it leaves out.
    Rule("GP101", "error", "file cannot be read", _COPY_AGAIN),
    Rule("GP102", "error", "arrays are missing", "Save imgs (z,y,x), gts (z,y,x) and spacing (x,y,z) in the file."),
    Rule("GP103", "error", "pickled objects in place of numbers", "Save the array as a plain numeric array."),
    Rule("GP104", "error", "shape is not a volume's", "Save imgs and gts with three axes (z,y,x) and equal shapes."),
    Rule("GP105", "error", "data type is not numeric", "Save the array as uint8, or another numeric type."),
    Rule("GP106", "error", "volume is too large", "Raise --max-volume-gib if the size is right, or split the volume."),
    Rule("GP107", "error", "grey levels outside 0..255", "Apply the intensity window and scale to 0..255."),
    Rule("GP108", "error", "label ids are not usable", "Save whole numbers: 0 for background, ids from 1 to 2^32-1."),
    Rule("GP109", "error", "spacing is not usable", "Take three positive millimetre values (x,y,z) from the header."),
    Rule("GP110", "error", "name is not usable", "Rename it: no '..', '\\', control characters, nor Zarr's own names."),
    Rule("GP111", "info", "image is stored as floating point", "Nothing to do if it holds whole grey levels."),
    Rule("GP112", "info", "pickled extras in the file", "Nothing to do: they are never read. Do not unpickle them."),
    # Stores: every byte that can be verified.
    Rule("GP201", "error", "store cannot be opened", "Convert the dataset again with --overwrite."),
    Rule("GP202", "error", "slice index is damaged", "Convert the dataset again with --overwrite."),
    Rule("GP203", "error", "case metadata is damaged", _REPAIR),
    Rule("GP204", "error", "shard is missing or has another size", _REPAIR),
    Rule("GP205", "error", "shard index does not match its checksum", _REPAIR),
    Rule("GP206", "error", "chunk is damaged", _REPAIR),
    Rule("GP207", "error", "slice index and voxels disagree", _REPAIR),
    # Voxels, of files and of stores.
    Rule("GP301", "warning", "image is blank", "Export the case again, or leave it out."),
    Rule("GP302", "warning", "image has few grey levels", "Check the intensity window; scale to 0..255 before saving."),
    Rule("GP303", "warning", "no foreground", "Check the mask's export; leave the case out if it is to have labels."),
    Rule("GP304", "warning", "foreground is coded 255", "Set the voxels to the class id, most often 1."),
    Rule("GP305", "info", "slices with ids 0 and 255 only", "Nothing to do, unless you train with recipe='reference'."),
    Rule("GP306", "error", "instance ids have wrapped", "Export the labels again as uint16 or uint32."),
    Rule("GP307", "warning", "one instance id in distant pieces", "Give every object of the volume its own id."),
    Rule("GP308", "warning", "blank slices between others", "Restore the lost slices: their neighbours show them too."),
    Rule("GP309", "info", "a single slice, no neighbours", "Nothing to do for 2D data: all channels are the slice."),
    Rule("GP310", "info", "neighbouring slices are identical", "Nothing to do if the volume was upsampled or padded."),
    Rule("GP311", "warning", "spacing looks reversed", "Save spacing in the order x, y, z; arrays are (z,y,x)."),
    Rule("GP312", "warning", "last axis looks like colour", "Save grey volumes (z,y,x), a single image as (1,y,x)."),
    # Prompts.
    Rule("GP401", "error", "prompts cannot be read", "Put a valid class_prompts.json into the data folder."),
    Rule("GP402", "error", "dataset without prompts", "Add an entry for the dataset to class_prompts.json."),
    Rule("GP403", "error", "prompt entry is malformed", "Write class ids '1', '2', ..., prompts, and instance_label."),
    Rule("GP404", "error", "prompt holds [SEP]", "Make it two entries of the list: [SEP] separates prompts."),
    Rule("GP405", "warning", "two classes share a prompt", "Word the prompts so that each names one class only."),
    Rule("GP406", "info", "prompts name a side", "Nothing to do: mirror='auto' draws no flip that swaps the sides."),
    Rule("GP407", "warning", "prompts name a side, mirroring is on", "Train with mirror='auto' or mirror=False."),
    Rule(
        "GP408",
        "error",
        "label id without a prompt",
        "Add prompts, set the voxels to 0, or set instance_label to 1 if the ids number instances.",
    ),
    # Datasets as a whole.
    Rule("GP501", "warning", "class is never present", "Check the class ids of the masks, or remove the class."),
    Rule("GP502", "warning", "same image twice", "Keep one of them, unless repeats are meant."),
    Rule("GP503", "error", "same image in training and validation", "Keep it in one part: use --group-regex."),
    Rule("GP901", "error", "check could not finish", "Try again with fewer --jobs; report it if it stays."),
    Rule("GP902", "error", "remote storage does not answer", "Check network, URL and credentials, and try again."),
    Rule("GP903", "error", "no permission to read", "Look at it with ls -l, and give your user the right to read it."),
)

RULES: dict[str, Rule] = {rule.code: rule for rule in _CATALOGUE}
"""Code -> rule, in the order of the documents."""
