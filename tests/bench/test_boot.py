"""Tests of the benchmark's arithmetic and of what it says when it cannot run. They boot nothing and time nothing."""

import argparse
import importlib.machinery
import importlib.util
import pathlib
import platform
import socket
import subprocess
import tempfile
import unittest

PROGRAM = pathlib.Path(__file__).resolve().parent / "boot"


def load():
    loader = importlib.machinery.SourceFileLoader("boot", str(PROGRAM))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("boot", loader))
    loader.exec_module(module)
    return module


class Boot(unittest.TestCase):
    def setUp(self):
        self.boot = load()

    def case(self, seconds, instructions):
        case = self.boot.Case("c", "image", None)
        case.seconds, case.busy, case.instructions = seconds, [s / 2 for s in seconds], instructions
        return case

    def test_summary(self):
        self.assertEqual(self.boot.summary([3.0, 1.0, 2.0])["median"], 2.0)
        self.assertEqual(self.boot.summary([1.0])["q3"], 1.0)
        self.assertIsNone(self.boot.summary([]))

    def test_what_the_agent_adds_is_relative_to_the_floor(self):
        added = self.boot.added([self.case([1.0], [100]), self.case([1.5], [110])])
        self.assertAlmostEqual(added["seconds"], 50.0)
        self.assertAlmostEqual(added["instructions"], 10.0)

    def test_table_without_instructions(self):
        self.assertIn("| - | - |", self.boot.table([self.case([1.0, 2.0], [])]))

    def test_line_of_a_guest_is_bounded(self):
        ours, guest = socket.socketpair()
        with ours, guest:
            guest.sendall(b"x" * 8192)
            self.assertEqual(len(self.boot.read_line(ours)), 4096)

    def test_guest_that_closes_early(self):
        ours, guest = socket.socketpair()
        with ours:
            guest.sendall(b'{"ready":')
            guest.close()
            self.assertEqual(self.boot.read_line(ours), b"")

    def test_machines_of_both_architectures(self):
        self.boot.tool = lambda name: name
        for arch, program, root, device in (
            ("x86_64", "qemu-system-x86_64", "root=/dev/pmem0p1 rootflags=dax ro", "virtio-pmem-pci,memdev=img,id=root"),
            ("aarch64", "qemu-system-aarch64", "root=/dev/vda1 ro", "virtio-blk-pci,drive=img"),
        ):
            with tempfile.NamedTemporaryFile() as image:
                case = self.boot.Case("c", image.name, None)
                options = argparse.Namespace(arch=arch, accel="tcg", vcpus=1, memory=128, kernel="K", append="word")
                command = [str(part) for part in self.boot.qemu_command(options, case, "/pod", ["-S"])]
            words = command[command.index("-append") + 1]
            self.assertEqual(command[0], program)
            self.assertTrue(words.startswith(root) and words.endswith(" word"), words)
            self.assertEqual("tsc=reliable" in words, arch == "x86_64", words)
            self.assertIn(device, command)
            self.assertEqual(command[-1], "-S")

    def test_an_image_with_an_empty_init_for_others(self):
        with tempfile.TemporaryDirectory() as folder:
            # Stands for kuasar-image: its image is what it was told.
            maker, image = pathlib.Path(folder) / "maker", pathlib.Path(folder) / "floor.img"
            maker.write_text('#!/bin/sh\ntest -x "$3/sbin/init" && echo "$1 $6 $7 $8 $9" >"$5"\n')
            maker.chmod(0o755)
            subprocess.run([PROGRAM, "--make-floor-image", image, "--kuasar-image", maker, "--arch", platform.machine()], timeout=60, check=True)
            self.assertEqual(image.read_text(), f"build --fs ext4 --arch {platform.machine()}\n")

    def test_missing_artefacts_are_named(self):
        with tempfile.TemporaryDirectory() as folder:
            result = subprocess.run([PROGRAM, "--artefacts", folder], capture_output=True, text=True, timeout=30, check=False)
        self.assertEqual(result.returncode, 2)
        self.assertIn(f"{folder}/vmlinux is not there", result.stderr)


if __name__ == "__main__":
    unittest.main()
