"""A folder for a test, and a stub of a kernel tree: as much of one as `configure` and `build` look at."""

import pathlib
import tempfile
import unittest

MERGE = '#!/bin/sh\n# merge_config.sh -m -O OUT INITIAL FRAGMENT...\nshift 3\ncat "$@" > .config\n'


class InFolder(unittest.TestCase):
    """`folder` is empty, and gone after the test."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)


def tree(path, makefile, kconfig=""):
    """A tree for x86 with this Makefile, whose symbols are what `kconfig` defines."""
    (path / "scripts/kconfig").mkdir(parents=True)
    (path / "arch/x86").mkdir(parents=True)
    (path / "Makefile").write_text(makefile)
    (path / "scripts/kconfig/merge_config.sh").write_text(MERGE)
    (path / "Kconfig").write_text(kconfig)
    (path / "arch/Kconfig").write_text("")
    return path
