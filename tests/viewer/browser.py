"""A page driven in Chromium without a display."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

_OPTIONS = (
    "--headless --no-sandbox --disable-quic --no-first-run --use-angle=swiftshader --enable-unsafe-swiftshader "
    "--window-size=1280,800"
)


def dom_of(page):
    """The document of a page after three seconds, as text."""
    command = [CHROMIUM, *_OPTIONS.split(), f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=3000"]
    ran = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, timeout=60)
    return ran.stdout.decode()


def drive(page, script):
    """What a script that runs after the page's own returns; it may wait for `idle()`."""
    driver = f"""<script type="module">
    const idle = () => new Promise((done) => setTimeout(done, 50));
    const run = async () => {{ {script} }};
    const shown = await run().catch((error) => ({{ error: String(error.stack) }}));
    const out = Object.assign(document.createElement("pre"), {{ id: "driven", textContent: JSON.stringify(shown) }});
    document.body.append(out);
    </script>"""
    driven = page.with_name("driven.html")
    driven.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{driver}</body>"), encoding="utf-8")
    found = re.search(r'<pre id="driven">(.*?)</pre>', dom_of(driven), re.S)
    assert found, "the page did not run to its end"
    return json.loads(unescape(found[1]))
