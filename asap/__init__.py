"ASAP: vision-language pre-training on chest CT and radiology reports"

from typing import TYPE_CHECKING, Any

from .processes import end_with_them

__version__ = "0.1.0"
end_with_them()
_LAZY = ["Model", "Source", "embed", "ground", "organs", "view", "zero_shot"]

if TYPE_CHECKING:
    from .data.volumes import Source as Source
    from .inference.api import (
        Model as Model,
        embed as embed,
        ground as ground,
        organs as organs,
        view as view,
        zero_shot as zero_shot,
    )


def __getattr__(name: str) -> Any:
    "The functions on one scan are loaded at their first use: `import asap` loads no library"
    if name not in _LAZY:
        raise AttributeError(f"module 'asap' has no attribute {name!r}")
    from importlib import import_module

    module = "asap.data.volumes" if name == "Source" else "asap.inference.api"
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
