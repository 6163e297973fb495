"""What a trial learned, in a folder of its own: to classify new images, without store or sweep.

    from air_core.bundle import load_bundle
    bundle = load_bundle("bundle")
    results = bundle.classify(["new/*.png"])

`manifest` is the folder, `checks` what must be in it, `files` the images that are asked for,
`classifier` the rest. Importing this is cheap: torch is loaded with the bundle.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from air_core.bundle.files import image_files
from air_core.bundle.manifest import read_bundle

if TYPE_CHECKING:
    from air_core.bundle.classifier import Bundle

__all__ = ["image_files", "load_bundle", "read_bundle"]


def load_bundle(folder: str | Path, weights: str | None = None, device: str = "cpu") -> Bundle:
    """A bundle with the frozen CLIP that it was learned on. Nothing is fetched.

    Args:
        folder: what `airsweep export` has written.
        weights: name of the backbone or where it lies, as a sweep file has it; None: the published
            weights that the bundle names. A bundle's own paths are never followed.
        device: where CLIP runs, such as cuda.

    Raises:
        ValueError: no bundle, a file of it that was changed, another backbone, no published one
            and no `weights`, or no such device.
    """
    manifest = read_bundle(folder)
    found = manifest.backbone(weights)  # before torch is imported or a weight is read
    from air_core.backbone.loading import load_backbone  # seconds
    from air_core.bundle.classifier import Bundle, check_device

    check_device(device)
    return Bundle(manifest, load_backbone(found, device, manifest.precision))
