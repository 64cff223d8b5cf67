"""Prepare ARKitScenes: python -m data.arkitscenes --raw=DIR."""

import sys

from h2a2_jax.prepare.prepare import raw_command
from h2a2_jax.scans.raw.arkitscenes import ArkitScenes

if __name__ == "__main__":
    sys.exit(raw_command("arkitscenes", lambda options: ArkitScenes(options.raw)))
