"""laddpo: Direct Preference Optimization for masked-diffusion language models (LLaDA).

From Python: `laddpo.fit(pairs, **settings)` trains, `laddpo.load(...)` gives a model that scores pairs and answers
prompts. Both are in laddpo/api.py, which is imported when one of them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laddpo.api import fit, load

__version__ = "0.1.0"
__all__ = ["__version__", "fit", "load"]


def __getattr__(name: str) -> Any:
    if name in ("fit", "load"):
        from laddpo import api

        return getattr(api, name)
    raise AttributeError(f"module 'laddpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
