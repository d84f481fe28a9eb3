"""Self-contained HTML pages: data as JSON, drawn by the scripts and styles beside this file.

A page fetches nothing, and no text in its data can become markup or script.
"""

import base64
import hashlib
import html
import json
import math
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src {style_hash}; script-src {script_hash}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript>This page is drawn by the script it contains; please allow scripts.</noscript>
<div id="page"></div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def write(
    target: Path, title: str, data: Any, scripts: Sequence[str], styles: Sequence[str]
) -> Path:
    """Writes the page of `data`, any JSON with finite floats, and returns its path.

    `scripts` and `styles` are files beside this one; `page.js` and `page.css` come before them.
    The file is replaced atomically.

    Raises:
      OSError: the file cannot be written.
    """
    partial = target.with_name(f".{target.stem}.{os.getpid()}.html")
    try:
        partial.write_text(_render(title, data, scripts, styles), encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def finite(value: Any, spec: str = ".6g") -> Any:
    """The same structure, floats cut to the digits of `spec` and non-finite ones as None."""
    if isinstance(value, float):
        return float(format(value, spec)) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item, spec) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item, spec) for item in value]
    return value


def _render(title: str, data: Any, scripts: Sequence[str], styles: Sequence[str]) -> str:
    script = "\n".join(map(_read, ("page.js", *scripts)))
    style = "\n".join(map(_read, ("page.css", *styles)))
    # ASCII alone, and without these three no text of a model can close or open an element; the
    # hashes stop any script but ours.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return _PAGE.format(
        title=html.escape(title.encode("utf-8", "replace").decode()),
        style=style,
        style_hash=_sha256(style),
        script=script,
        script_hash=_sha256(script),
        data=text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    )


def _read(name: str) -> str:
    return resources.files("dmrl").joinpath(name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
