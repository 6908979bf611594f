"""Tests of `configure`: it must refuse, by name, whatever did not arrive.

Most run on a stub of a kernel tree whose make keeps and drops what the test says. The last class runs on real kernel
sources: KERNEL_SOURCE (an unpacked tree), or the tarball in the tools cache (KUASAR_CACHE), else it is skipped.
"""

import glob
import os
import pathlib
import platform
import shutil
import subprocess
import tarfile
import tempfile
import unittest

from . import stub

CONFIGS = pathlib.Path(__file__).resolve().parent.parent
HYPERVISORS = ["qemu", "cloud-hypervisor", "stratovirt"]


def lists(flavour, hypervisor="qemu", cpu="x86_64"):
    """As pkgs/kernels.nix takes them: mini has what any hypervisor wants, and to micro not every one adds something."""
    of_hypervisor = CONFIGS / f"{hypervisor}-{cpu}.list"
    more = [of_hypervisor] if flavour == "micro" and of_hypervisor.exists() else []
    return [CONFIGS / f"{flavour}-{cpu}.list", *more]


QEMU_LISTS = lists("micro")
MINI_LISTS = lists("mini")

# What the guest cannot do without, whoever edits the fragments (Kconfig name: why).
REQUIRED = {
    "PVH": "entry without firmware tables",
    "SMP": "pods with more than one processor",
    "KVM_GUEST": "clock and wake-ups under KVM",
    "VIRTIO_PCI": "QEMU q35",
    "VIRTIO_MMIO_CMDLINE_DEVICES": "QEMU and StratoVirt microvm",
    "VIRTIO_BLK": "root without pmem, block volumes",
    "VIRTIO_NET": "pod network",
    "VIRTIO_FS": "shared folder",
    "9P_FS": "shared folder without a daemon",
    "VIRTIO_PMEM": "root image",
    "NVDIMM_PFN": "superblock of the DAX header",
    "FS_DAX": "root image without a page cache of its own",
    "MSDOS_PARTITION": "root image",
    "EXT4_FS": "root image",
    "OVERLAY_FS": "layers",
    "VIRTIO_VSOCKETS": "READY, ttrpc, stdio",
    "VIRTIO_CONSOLE": "console",
    "HW_RANDOM_VIRTIO": "entropy",
    "VIRTIO_BALLOON": "memory given back, free pages by themselves (it selects PAGE_REPORTING)",
    "BLK_DEV_INITRD": "initrd boot path",
    "DEVTMPFS_MOUNT": "console of PID 1",
    "CGROUP_PIDS": "limits",
    "MEMCG": "limits",
    "CFS_BANDWIDTH": "limits",
    "CPUSETS": "limits",
    "BLK_CGROUP": "limits",
    "CGROUP_HUGETLB": "limits",
    "CGROUP_BPF": "device rules",
    "SECCOMP_FILTER": "enforced profiles",
    "SECURITY_LANDLOCK": "a security module is on",
    "SECURITY_YAMA": "a security module is on",
    "KEYS": "runc's session keyring",
    "POSIX_MQUEUE": "/dev/mqueue",
    "SYSVIPC": "databases",
    "UNIX98_PTYS": "terminals",
    "IPV6": "pod network",
    "PACKET": "ping and capture tools",
    "USER_NS": "namespaces",
    "EROFS_FS": "root image, layers that are images",
    "DM_VERITY": "checked root images",
    "NF_TABLES": "port mapping inside pods",
    "RD_ZSTD": "initrd boot path",
    "BRIDGE": "privileged containers",
    "DM_INIT": "checked root images: dm-mod.create=",
    "CRYPTO_SHA256": "checked root images",
    "HOTPLUG_PCI_PCIE": "disks of a running pod",
    "NFT_NAT": "port mapping inside pods",
    "NFT_MASQ": "port mapping inside pods",
    "NFT_REDIR": "port mapping inside pods",
    "BPF_SYSCALL": "device rules",
    "HUGETLBFS": "huge pages",
    "BLK_DEV_THROTTLING": "limits",
    "PID_NS": "namespaces",
    "NET_NS": "namespaces",
    "IPC_NS": "namespaces",
    "UTS_NS": "namespaces",
    "RD_GZIP": "initrd boot path",
    "TMPFS": "volumes in memory, /dev/shm",
    "CRYPTO_MANAGER_DISABLE_TESTS": "no self tests of ciphers in every boot",
}

# What mini is for.
REQUIRED_OF_MINI = {
    "ACPI_HOTPLUG_CPU": "pods that grow",
    "ACPI_HOTPLUG_MEMORY": "pods that grow",
    "VIRTIO_MEM": "pods that grow",
    "HOTPLUG_PCI_ACPI": "devices without ports of their own",
    "SCSI_VIRTIO": "SCSI storages",
    "BLK_DEV_SD": "SCSI storages",
    "XFS_FS": "block volumes",
    "NFS_V4_2": "file servers",
    "MODULES": "drivers that pods bring",
    "IP_NF_NAT": "iptables",
    "IP6_NF_NAT": "iptables",
    "IP_VS": "load balancers",
    "VLAN_8021Q": "VLANs",
    "IPV6_MROUTE": "routers of IPv6",
    "IPV6_TUNNEL": "tunnels of IPv6",
    "IPV6_SIT": "tunnels of IPv6",
    "IPV6_GRE": "tunnels of IPv6",
    "IPV6_MIP6": "mobility of IPv6",
    "INET6_ESP": "IPsec",
    "XFRM_USER": "IPsec that somebody can set up",
    "IPV6_SEG6_LWTUNNEL": "segment routing",
    "CMDLINE_BOOL": "no start-up test of jitterentropy in every boot",
    "MEMCG_V1": "task.cgroup=v1",
    "CGROUP_DEVICE": "task.cgroup=v1",
    "CGROUP_FREEZER": "task.cgroup=v1",
    "IA32_EMULATION": "programs of i386",
    "USERFAULTFD": "collectors of garbage",
    "SECRETMEM": "key stores",
    "KCMP": "debuggers",
    "MPTCP": "multipath clients",
    "NFT_COMPAT": "iptables-nft",
    "NETFILTER_XT_TARGET_TPROXY": "service meshes",
}

# What a hypervisor's guests do without: it has no such device, or the architecture no such thing ("": any hypervisor).
QEMU_ONLY = {"9P_FS", "HOTPLUG_PCI_PCIE"}
NOT_OF = {
    "x86_64": {
        "cloud-hypervisor": QEMU_ONLY | {"VIRTIO_MMIO_CMDLINE_DEVICES"},
        "stratovirt": QEMU_ONLY,
    },
    "aarch64": {
        "": {"PVH", "SMP", "KVM_GUEST", "VIRTIO_MMIO_CMDLINE_DEVICES", "ACPI_HOTPLUG_CPU", "ACPI_HOTPLUG_MEMORY", "HOTPLUG_PCI_ACPI", "CMDLINE_BOOL", "IA32_EMULATION", "USERFAULTFD", "SECRETMEM", "KCMP", "MPTCP"},
    },
}

MAKEFILE = """\
allnoconfig:
\t@grep -v -w -f drop $(KCONFIG_ALLCONFIG) > $(O)/.config; cat extra >> $(O)/.config
olddefconfig:
\t@true
"""
KCONFIG = """\
config GOOD
\tbool "Good"

config NEEDS
\tbool "Needs something that is off"
\tdepends on GOOD && \\
\t\tABSENT
\thelp
\t  Text that names things in passing:
\t  depends on NONSENSE

menu "Block"
\tdepends on OUTER

config INSIDE
\tbool "Inside a menu"

endmenu

config CHOSEN_BY_OTHERS
\tbool

config PARENT
\tbool "Parent"
\tselect CHOSEN_BY_OTHERS
"""


def run(source, out, *lists, **variables):
    command = [CONFIGS / "configure", "-s", source, "-o", out, *lists]
    environment = os.environ | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


class StubTree(stub.InFolder):
    def setUp(self):
        super().setUp()
        self.tree = stub.tree(self.folder / "linux", MAKEFILE, KCONFIG)
        self.dropped()
        self.extra("")
        (self.folder / "fragments").mkdir()

    def dropped(self, *symbols):
        (self.tree / "drop").write_text("".join(f"CONFIG_{s}\n" for s in symbols) or "no-such-line\n")

    def extra(self, text):
        (self.tree / "extra").write_text(text)

    def configure(self, names=None, **fragments):
        for name, text in fragments.items():
            (self.folder / f"fragments/{name}.config").write_text(text)
        (self.folder / "a.list").write_text("# a list\n" + "\n".join(names or fragments) + "\n")
        return run(self.tree, self.folder / "out", self.folder / "a.list")

    def assert_refused(self, result, *words):
        self.assertNotEqual(result.returncode, 0, result.stdout)
        for word in words:
            self.assertIn(word, result.stderr)

    def test_everything_arrived(self):
        result = self.configure(one="# why\nCONFIG_GOOD=y\n", two="CONFIG_ABSENT=n\n")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("2 symbols requested, all arrived", result.stdout)

    def test_bogus_symbol_is_named(self):
        self.dropped("BOGUS")
        result = self.configure(one="CONFIG_GOOD=y\nCONFIG_BOGUS=y\n")
        self.assert_refused(result, "CONFIG_BOGUS", "fragment one", "no such symbol", "1 requested symbol(s)")
        self.assertNotIn("CONFIG_GOOD", result.stderr)

    def test_unmet_dependency_is_named(self):
        self.dropped("NEEDS")
        result = self.configure(one="CONFIG_GOOD=y\nCONFIG_NEEDS=y\n")
        self.assert_refused(result, "CONFIG_NEEDS", "ABSENT=n", "GOOD=y")
        self.assertNotIn("NONSENSE", result.stderr)

    def test_dependency_of_the_menu_around_it_is_named(self):
        self.dropped("INSIDE")
        self.assert_refused(self.configure(one="CONFIG_INSIDE=y\n"), "CONFIG_INSIDE", "depends on OUTER  (OUTER=n)")

    def test_symbol_without_a_prompt_names_who_selects_it(self):
        self.dropped("CHOSEN_BY_OTHERS")
        result = self.configure(one="CONFIG_CHOSEN_BY_OTHERS=y\n")
        self.assert_refused(result, "cannot be chosen by itself; selected by: PARENT")

    def test_symbol_that_should_be_off_and_is_on(self):
        self.dropped("GOOD")
        self.extra("CONFIG_GOOD=y\n")
        self.assert_refused(self.configure(one="CONFIG_GOOD=n\n"), "fragment one wants n, the configuration has y")

    def test_fragments_that_disagree(self):
        result = self.configure(one="CONFIG_GOOD=y\n", two="CONFIG_GOOD=n\n")
        self.assert_refused(result, "GOOD: fragment one wants y, fragment two wants n")

    def test_fragment_that_does_not_exist(self):
        self.assert_refused(self.configure(["none"]), 'names fragment "none"')

    def test_line_that_is_not_understood(self):
        self.assert_refused(self.configure(one="CONFIG_GOOD y\n"), "fragment one, line 1: not understood")

    def test_not_a_kernel_tree(self):
        result = run(self.folder, self.folder / "out", QEMU_LISTS[0])
        self.assert_refused(result, "is no kernel source tree")


class Lists(unittest.TestCase):
    def fragments(self, *lists):
        for path in lists:
            for line in path.read_text().splitlines():
                name = line.split("#")[0].strip()
                if name:
                    yield CONFIGS / f"fragments/{name}.config"

    def missing(self, names, required):
        asked = set()
        for fragment in self.fragments(*names):
            lines = fragment.read_text().splitlines()
            asked |= {line[7:-2] for line in lines if line.startswith("CONFIG_") and line.endswith("=y")}
        return {s: why for s, why in required.items() if s not in asked}

    def test_required_symbols_are_asked_for(self):
        for flavour, required in [("micro", REQUIRED), ("mini", REQUIRED | REQUIRED_OF_MINI)]:
            for hypervisor in HYPERVISORS:
                for cpu, others in NOT_OF.items():
                    left_out = others.get("", set()) | (others.get(hypervisor, set()) if flavour == "micro" else set())
                    needed = {s: why for s, why in required.items() if s not in left_out}
                    with self.subTest(flavour=flavour, hypervisor=hypervisor, cpu=cpu):
                        self.assertEqual(self.missing(lists(flavour, hypervisor, cpu), needed), {})

    def test_every_fragment_says_who_needs_it_and_is_in_a_list(self):
        listed = set(self.fragments(*CONFIGS.glob("*.list")))
        for fragment in sorted(CONFIGS.glob("fragments/*.config")):
            with self.subTest(fragment.name):
                self.assertIn("# Who needs it:", fragment.read_text())
                self.assertIn(fragment, listed)


def skipped(why):
    """A skip that tests/lab/check names, too."""
    print(f"skipped: kernel lists: {why}", flush=True)
    return unittest.SkipTest(why)


def kernel_source(folder):
    """The kernel's Kconfig and what it takes to evaluate it, or None where there are no kernel sources."""
    given = os.environ.get("KERNEL_SOURCE")
    if given:
        return pathlib.Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = os.environ.get("KUASAR_CACHE") or f"{home}/kuasar-nix"
    tarballs = sorted(glob.glob(f"{cache}/src/linux-6.12*.tar.xz"))
    if not tarballs:
        return None

    def wanted(name):
        path = name.partition("/")[2]
        return path.startswith(("scripts/", "arch/x86/", "arch/arm64/")) or path == "Makefile" or "Kconfig" in path or path.endswith("/Kbuild")

    with tarfile.open(tarballs[-1]) as tarball:
        tarball.extractall(folder, members=(m for m in tarball if wanted(m.name)))
    (top,) = pathlib.Path(folder).iterdir()
    return top


class RealTree(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.source = kernel_source(folder.name)
        if cls.source is None:
            raise skipped("no kernel sources: KERNEL_SOURCE not given, no tarball in the tools cache")

    def configure(self, fragment=None, shipped=QEMU_LISTS):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            names = list(shipped)
            if fragment:
                (folder / "fragments").mkdir()
                (folder / "fragments/extra.config").write_text(fragment)
                (folder / "extra.list").write_text("extra\n")
                names.append(folder / "extra.list")
            return run(self.source, folder / "out", *names)

    def test_the_shipped_lists_of_aarch64_arrive(self):
        cross = "" if platform.machine() == "aarch64" else "aarch64-linux-gnu-"
        if not shutil.which(f"{cross}gcc"):
            raise skipped("no compiler for aarch64 (tests/lab/setup --check --aarch64)")
        with tempfile.TemporaryDirectory() as out:
            for flavour in ("micro", "mini"):
                with self.subTest(flavour=flavour):
                    result = run(self.source, out, "-a", "arm64", *lists(flavour, cpu="aarch64"), CROSS_COMPILE=cross)
                    self.assertEqual(result.returncode, 0, result.stderr)

    def test_the_shipped_lists_arrive(self):
        # One folder: what configures is built once.
        with tempfile.TemporaryDirectory() as out:
            for shipped in {tuple(lists(flavour, hypervisor)) for flavour in ("micro", "mini") for hypervisor in HYPERVISORS}:
                with self.subTest(lists=[path.name for path in shipped]):
                    result = run(self.source, out, *shipped)
                    self.assertEqual(result.returncode, 0, result.stderr)

    def test_what_cannot_arrive_is_named(self):
        result = self.configure("CONFIG_NO_SUCH_THING=y\nCONFIG_DRM_VIRTIO_GPU=y\n")
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("CONFIG_NO_SUCH_THING", result.stderr)
        self.assertIn("no such symbol", result.stderr)
        self.assertIn("CONFIG_DRM_VIRTIO_GPU", result.stderr)
        self.assertIn("DRM=n", result.stderr)
        self.assertIn("2 requested symbol(s)", result.stderr)


if __name__ == "__main__":
    unittest.main()
