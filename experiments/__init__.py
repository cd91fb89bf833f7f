"""The commands of this framework, and the files that ship with them."""

from pathlib import Path

from lightning_modules.files import add_packaged_root

add_packaged_root(Path(__file__).parent)
