"""timm's vision transformers, without torchvision.

timm imports torchvision, of which its vision transformers use nothing. A wheel of torchvision works with a single build
of torch, and one that does not fit breaks transformers as well, so the tests do not install it: while timm is imported,
empty modules have its names.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any
from unittest.mock import MagicMock

__all__ = ["layers", "models"]

_NAMES = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")


def _imported(module: str) -> Any:
    """Import a module of timm."""
    stand_ins = {f"torchvision{name}": MagicMock() for name in _NAMES if f"torchvision{name}" not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module(module)
    finally:
        for name in stand_ins:
            del sys.modules[name]


layers: Any = _imported("timm.layers")
models: Any = _imported("timm.models.vision_transformer")
