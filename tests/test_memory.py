"""What a machine says of its memory, recorded; and how much a model takes, by arithmetic."""

from __future__ import annotations

import sys
import tempfile
import unittest
from pathlib import Path

from portway.memory import footprint
from portway.memory import machine as memory
from portway.memory.arbiter import Need

GB = 1024**3

MEMINFO = """\
MemTotal:       24551240 kB
MemFree:          613052 kB
MemAvailable:   11030412 kB
Buffers:          401234 kB
Cached:          9200112 kB
HugePages_Total:       0
"""

# macOS 15 on an M-series machine with 24 GB, as its manual's format has it
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               21343.
Pages active:                            513021.
Pages inactive:                          508430.
Pages speculative:                         3921.
Pages throttled:                              0.
Pages wired down:                        169005.
Pages purgeable:                          10233.
"Translation faults":                 823145071.
Pages copy-on-write:                   41285017.
Pages zero filled:                    421035522.
Pages reactivated:                     20170343.
Pages purged:                           9135121.
File-backed pages:                       380107.
Anonymous pages:                         645265.
Pages stored in compressor:              641870.
Pages occupied by compressor:            301111.
Decompressions:                        18111343.
Compressions:                          21340112.
Pageins:                               10345562.
Pageouts:                                 81345.
Swapins:                                      0.
Swapouts:                                     0.
"""
PRESSURE = """\
The system has 25769803776 (1572864 pages with a page size of 16384).
System-wide memory free percentage: 57%
"""


class ReadingTest(unittest.TestCase):
    def test_linux(self) -> None:
        """What is there, and what can be had of it."""
        self.assertEqual((24551240 * 1024, 11030412 * 1024), memory.parse_meminfo(MEMINFO))
        self.assertEqual((None, None), memory.parse_meminfo("nonsense"))

    def test_macos(self) -> None:
        """What programs hold is their own pages, wired ones and the compressor's, not those of files."""
        self.assertEqual((645265 - 10233 + 169005 + 301111) * 16384, memory.parse_vm_stat(VM_STAT))
        self.assertEqual(25769803776, memory.parse_memsize("25769803776\n"))
        self.assertEqual(57, memory.parse_memory_pressure(PRESSURE))

    def test_words_that_are_not_understood(self) -> None:
        """What is missing is not known, and never a number by chance."""
        self.assertIsNone(memory.parse_vm_stat(VM_STAT.replace("Pages wired down", "Pages wired up")))
        self.assertIsNone(memory.parse_vm_stat(VM_STAT.replace("(page size of 16384 bytes)", "")))
        self.assertIsNone(memory.parse_memsize("sysctl: unknown oid"))
        self.assertIsNone(memory.parse_memory_pressure(""))

    def test_a_whole_macos_reading(self) -> None:
        """The three programs' words together; with none of them nothing is known."""
        said = {"sysctl": "25769803776\n", "vm_stat": VM_STAT, "memory_pressure": PRESSURE}
        reading = memory._read_macos(lambda command: said[Path(command[0]).name])
        used = (645265 - 10233 + 169005 + 301111) * 16384
        self.assertEqual(memory.Reading(25769803776, 25769803776 - used, 57), reading)
        self.assertEqual(memory.Reading(), memory._read_macos(lambda _: ""))

    def test_programs_that_fail(self) -> None:
        """A program that is not there says nothing."""
        self.assertEqual("", memory._output(["/nowhere/vm_stat"]))
        self.assertEqual("x\n", memory._output([sys.executable, "-c", "print('x')"]))

    def test_this_machine(self) -> None:
        """It can be asked without harm, whatever it is; one of another kind is not known."""
        reading = memory.read()
        if sys.platform.startswith(("linux", "darwin")):
            self.assertGreater(reading.total or 0, reading.available or 0)
        self.assertEqual(memory.Reading(), memory.read("win32"))

    def test_cards(self) -> None:
        """A graphics card with memory of its own is seen; one that borrows a little of the machine's is none."""
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            self.assertFalse(memory.has_card_apart(folder))
            vram = root / "sys/class/drm/card0/device/mem_info_vram_total"
            vram.parent.mkdir(parents=True)
            vram.write_text("536870912\n")
            self.assertFalse(memory.has_card_apart(folder))
            vram.write_text("17163091968\n")
            self.assertTrue(memory.has_card_apart(folder))
            vram.unlink()
            driver = root / "proc/driver/nvidia/version"
            driver.parent.mkdir(parents=True)
            driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.90\n")
            self.assertTrue(memory.has_card_apart(folder))


class FootprintTest(unittest.TestCase):
    QWEN3_8B = {  # noqa: RUF012 - as /api/show has it
        "general.architecture": "qwen3",
        "qwen3.block_count": 36,
        "qwen3.attention.head_count": 32,
        "qwen3.attention.head_count_kv": 8,
        "qwen3.attention.key_length": 128,
        "qwen3.attention.value_length": 128,
        "qwen3.embedding_length": 4096,
    }

    def test_the_cache_of_a_token(self) -> None:
        """Layers x heads x (key + value) x 2 bytes; lengths may follow from the width, heads differ by layer."""
        self.assertEqual(36 * 8 * 256 * 2, footprint.per_token(self.QWEN3_8B))
        short = {key: value for key, value in self.QWEN3_8B.items() if "length" not in key or "embedding" in key}
        self.assertEqual(36 * 8 * 256 * 2, footprint.per_token(short))
        mixed = {**self.QWEN3_8B, "qwen3.attention.head_count_kv": [8, 0, 0, 8]}
        self.assertEqual(16 * 256 * 2, footprint.per_token(mixed))
        self.assertIsNone(footprint.per_token({}))
        self.assertIsNone(footprint.per_token({**self.QWEN3_8B, "qwen3.block_count": "36"}))

    def test_needs(self) -> None:
        """The configuration's word, else weights and context; only the weights are sure."""
        need = footprint.need_of(weights=5 * GB, said=None, name="x", window=8192, per_token=147456.0)
        self.assertEqual(Need(5 * GB + 8192 * 147456, 5 * GB, "5.0 GB + 1.1 GB for 8192 tokens"), need)
        said = footprint.need_of(weights=5 * GB, said=6 * GB, name="x", window=8192, per_token=None)
        self.assertEqual(Need(6 * GB, 6 * GB, "6.0 GB"), said)
        rough = footprint.need_of(weights=5 * GB, said=None, name="x", window=8192, per_token=None)
        assert rough is not None
        self.assertTrue(5.5 * GB < rough.size < 6.2 * GB, rough)
        self.assertIsNone(footprint.need_of(weights=None, said=None, name="mystery", window=8192, per_token=None))
        name = "qwen2.5-7b-instruct-q4_k_m"
        guessed = footprint.need_of(weights=None, said=None, name=name, window=0, per_token=None)
        self.assertEqual((0, int(7e9 * 4.8 / 8)), (guessed.sure, guessed.size) if guessed else None)

    def test_names(self) -> None:
        """Parameters and bits as names have them; a version or a date is no size."""
        for name, size in (
            ("llama3.2:1b", 1e9 * 4.8 / 8),
            ("gpt-oss-20b-mxfp4", 20e9 * 4.25 / 8),
            ("smollm-135m-f16", 135e6 * 2),
            ("qwen3-30b-a3b-q8_0", 30e9 * 8.5 / 8),
            ("mixtral-8x7b-iq2_xs", 8 * 0.85 * 7e9 * 2.6 / 8),
            ("Qwen2.5-0.5B-bf16", 0.5e9 * 2),
        ):
            self.assertEqual(int(size), footprint.estimated_weights(name), name)
        for name in ("nomic-embed-text", "gpt-4", "model-2024b1", "v3.1"):
            self.assertIsNone(footprint.estimated_weights(name), name)

    def test_words(self) -> None:
        """Bytes as people say them."""
        words = [footprint.shown(count) for count in (0, 1023, 2048, 320 * 1024**2, 18.6 * GB)]
        self.assertEqual(["0 B", "1023 B", "2 KB", "320 MB", "18.6 GB"], words)


if __name__ == "__main__":
    unittest.main()
