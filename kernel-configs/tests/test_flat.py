"""Tests of `flat`, on programs laid out as a kernel is."""

import pathlib
import platform
import subprocess
import unittest

from . import stub

FLAT = pathlib.Path(__file__).resolve().parent.parent / "flat"
START = 0x1000000
DATA = 0x200000  # from the start


@unittest.skipIf(platform.machine() != "x86_64", "the programs are assembled for x86-64")
class Flat(stub.InFolder):
    def flat(self, before):
        """What is made of a kernel with so many bytes before its entry."""
        source, kernel, result = (self.folder / name for name in ("kernel.S", "vmlinux", "vmlinux.bin"))
        source.write_text(
            f".text\n.fill {before}, 1, 0x90\n.globl _start\n_start: .fill 9, 1, 0xf4\n"
            '.data\n.quad 0x1122334455667788\n.section .comment\n.string "not loaded"\n'
        )
        subprocess.run(
            ["cc", "-nostdlib", "-static", "-Wl,--build-id=none", f"-Wl,-Ttext={START:#x},-Tdata={START + DATA:#x}", "-o", kernel, source],
            check=True, capture_output=True,
        )  # fmt: skip
        done = subprocess.run([FLAT, kernel, result], capture_output=True, text=True, timeout=60, check=False)
        return done, result.read_bytes() if done.returncode == 0 else None

    def test_entry_behind_something_else(self):
        for before in 5, 0x123, 0x112233:
            done, kernel = self.flat(before)
            self.assertEqual(done.returncode, 0, done.stderr)
            jump, distance = kernel[0], int.from_bytes(kernel[1:5], "little")
            self.assertEqual((jump, 5 + distance), (0xE9, before))
            self.assertEqual(kernel[5:before], b"\x90" * (before - 5))
            self.assertEqual(kernel[before : before + 9], b"\xf4" * 9)

    def test_what_is_loaded_lies_where_it_belongs(self):
        _, kernel = self.flat(16)
        self.assertEqual(kernel[DATA:], (0x1122334455667788).to_bytes(8, "little"))

    def test_entry_at_the_first_byte(self):
        _, kernel = self.flat(0)
        self.assertEqual(kernel[:9], b"\xf4" * 9)

    def test_no_room_for_a_jump(self):
        done, _ = self.flat(4)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("vmlinux has its entry at byte 4: no jump of 5 bytes has room before it", done.stderr)
        self.assertFalse((self.folder / "vmlinux.bin").exists())

    def test_no_kernel(self):
        text = self.folder / "text"
        text.write_text("no kernel\n")
        done = subprocess.run([FLAT, text, self.folder / "result"], capture_output=True, text=True, timeout=60, check=False)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("text is no ELF file with an entry and something to load", done.stderr)
        self.assertFalse((self.folder / "result").exists())


if __name__ == "__main__":
    unittest.main()
