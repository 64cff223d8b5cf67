"""Parts that the pages of the viewer share: assets, JSON inside HTML, templates."""

import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any


def asset(name: str) -> str:
    """Return the text of a file that comes with the viewer."""
    return (resources.files("h2a2_jax.viewer") / "assets" / name).read_text(encoding="utf-8")


def script_json(document: Any) -> str:
    """Return JSON that a script element of HTML may hold, whatever its texts hold."""
    return json.dumps(document, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")


def filled(template: str, parts: Mapping[str, str]) -> str:
    """Return an asset with its placeholders, as in {{title}}, replaced: a page that UTF-8 can encode.

    Lone surrogates, as which file names that are not UTF-8 reach Python, become question marks.
    """
    # In one pass: a value may itself contain a placeholder.
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], asset(template))
    return page.encode("utf-8", errors="replace").decode()
