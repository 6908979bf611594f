"""Tests of `cost`: its table, on a stub of a kernel that is as long as its configuration, and where NEEDS does not arrive
without GOOD.
"""

import os
import pathlib
import shutil
import subprocess
import unittest

from . import stub

CONFIGS = pathlib.Path(__file__).resolve().parent.parent
MAKEFILE = """\
allnoconfig:
\t@if grep -qx CONFIG_GOOD=y $(KCONFIG_ALLCONFIG); then cat $(KCONFIG_ALLCONFIG); else grep -v CONFIG_NEEDS= $(KCONFIG_ALLCONFIG) || true; fi >$(O)/.config
olddefconfig:
\t@true
vmlinux bzImage:
\t@$(BROKEN)
\t@mkdir -p $(O)/arch/x86/boot; echo $@ >>$(O)/built; touch $(O)/System.map
\t@cat $(O)/.config >$(O)/arch/x86/boot/bzImage; cat $(O)/.config $(O)/.config >$(O)/vmlinux
"""
FRAGMENTS = {
    "good": "CONFIG_GOOD=y\n",
    "needs": "CONFIG_NEEDS=y\n",
    "long": "CONFIG_A=y\nCONFIG_LONG_NAME=y\n",
}


class Cost(stub.InFolder):
    def cost(self, *options):
        command = [self.configs / "cost", "-s", self.tree, "-o", self.build, *options, self.configs / "a.list"]
        environment = os.environ | {"CROSS_COMPILE": f"{self.configs}/"}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)

    def setUp(self):
        super().setUp()
        self.tree = stub.tree(self.folder / "linux", MAKEFILE)
        self.configs, self.build = self.folder / "configs", self.folder / "build"
        (self.configs / "fragments").mkdir(parents=True)
        for name in "cost", "configure", "build", "requests.awk", "missing.awk", "explain.awk":
            shutil.copy(CONFIGS / name, self.configs)
        # A stub has nothing to strip, and nothing to lay out.
        (self.configs / "strip").write_text("#!/bin/sh\ncp \"$4\" \"$3\"\n")
        (self.configs / "strip").chmod(0o755)
        (self.configs / "flat").write_text("#!/bin/sh\n")
        self.fragments(FRAGMENTS)

    def fragments(self, fragments):
        for name, text in fragments.items():
            (self.configs / f"fragments/{name}.config").write_text(text)
        (self.configs / "a.list").write_text("\n".join(fragments) + "\n")

    def test_table(self):
        rows = [
            "whole: 59 bytes packed, 118 bytes vmlinux",
            "",
            "| fragment | packed | vmlinux | boot |",
            "|---|---|---|---|",
            "| `good` | needed by CONFIG_NEEDS of needs | | |",
            "| `needs` | +15 | +30 | - |",
            "| `long` | +30 | +60 | - |",
        ]
        for _ in range(2):
            done = self.cost()
            self.assertEqual(done.stdout.splitlines(), rows, done.stderr)
        # Each was built from a copy of the whole, and the second run began with what the first had kept.
        built = [(folder / "built").read_text().count("vmlinux") for folder in (self.build.with_name("build.whole"), self.build)]
        self.assertEqual(built, [2, 3])

    def test_only_some(self):
        done = self.cost("--only", "needs")
        self.assertEqual([line for line in done.stdout.splitlines() if line.startswith("| `")], ["| `needs` | +15 | +30 | - |"], done.stderr)

    def test_only_what_there_is(self):
        done = self.cost("--only", "neds")
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("--only neds: the lists have no such fragment", done.stderr)

    def test_fragment_without_which_nothing_compiles(self):
        self.fragments({"fix": "CONFIG_BROKEN=y\n", "other": "CONFIG_A=y\n"})
        makefile = MAKEFILE.replace("$(BROKEN)", "grep -qx CONFIG_BROKEN=y $(O)/.config")
        (self.tree / "Makefile").write_text(makefile)
        done = self.cost()
        self.assertIn("| `fix` | needed by the kernel's own build | | |", done.stdout, done.stderr)
        self.assertIn("| `other` | +11 | +22 | - |", done.stdout, done.stderr)

    def test_lists_that_cannot_be_configured(self):
        self.fragments({"needs": "CONFIG_NEEDS=y\n"})
        done = self.cost()
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("cost: the lists cannot be configured: CONFIG_NEEDS of needs", done.stderr)


if __name__ == "__main__":
    unittest.main()
