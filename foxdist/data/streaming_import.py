"""The one door to mosaicml-streaming: every import of it goes through `import_streaming`.

It imports torchvision for its image datasets. Beside a CPU build of torch, torchvision's wheel cannot load its compiled
operators, and registering fake versions of two of them fails. Declaring those two is all it takes to import.
"""

import logging
from typing import Any

import torch

_library: torch.library.Library | None = None  # the declarations live as long as this object


def import_streaming() -> Any:
    """The `streaming` module."""
    global _library
    if torch.version.cuda is None and _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import streaming

    # It warns at every start that `replication` needs care when resuming; loader.py takes it, and a test shows it.
    logging.getLogger("streaming").setLevel(logging.ERROR)
    return streaming
