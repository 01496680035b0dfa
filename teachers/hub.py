"""No network unless it was asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

# what a message asks of a user who named a hub id
ASK = "pass --allow-download (in a recipe, teacher.allow_download: true)"


@contextlib.contextmanager
def network(allowed: bool) -> Iterator[None]:
    """Inside, Hugging Face's libraries read only files on this machine, unless `allowed`.

    They read their offline switch once, at import, into module constants; those are set here and restored.
    """
    if allowed:
        yield
        return
    import huggingface_hub.constants

    modules: list[tuple[ModuleType, str]] = [(huggingface_hub.constants, "HF_HUB_OFFLINE")]
    with contextlib.suppress(ImportError):
        import transformers.utils.hub

        modules.append((transformers.utils.hub, "_is_offline_mode"))
    before = [getattr(module, name, False) for module, name in modules]
    variables = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    try:
        for module, name in modules:
            setattr(module, name, True)
        os.environ.update(dict.fromkeys(variables, "1"))
        yield
    finally:
        for (module, name), value in zip(modules, before):
            setattr(module, name, value)
        for name, text in variables.items():
            if text is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text
