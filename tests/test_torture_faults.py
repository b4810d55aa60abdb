"""A fair part of the matrix of faults, against the daemon as a process; `scripts/torture.py` runs all of it."""

from __future__ import annotations

import unittest
from collections.abc import Sequence

from portway.errors import FAILURES
from scripts.torture_rows.faults import FAULTS, contract
from scripts.torture_rows.matrix import HEARTBEAT, NO_HEARTBEAT, Matrix, Oracle, cells, waiting_cells
from scripts.torture_rows.stage import Cell


def half() -> list[Cell]:
    """Of each fault's eight cells four, so that each kind, streamed or not, with and without a chain is among them."""
    order = list(FAULTS)
    return [
        cell
        for cell in cells()
        if (order.index(cell.fault) + (cell.kind == "openai") + cell.stream + cell.chain) % 2 == 0
    ]


class MatrixTest(unittest.TestCase):
    maxDiff = None

    def run_all(self, chosen: Sequence[Cell], heartbeat: float) -> None:
        matrix = Matrix(chosen, heartbeat)
        rows = matrix.run()
        wrong = "\n".join(f"{cell.name}: {complaint}" for cell, found in matrix.wrong.items() for complaint in found)
        self.assertEqual("", wrong)
        self.assertEqual([], matrix.left)
        self.assertEqual(len(chosen) + 1, sum(row.held for row in rows))

    def test_half_of_it(self) -> None:
        """Each way to fail, in half of its cells: answers, log, cache, the next request, nothing left behind."""
        self.run_all(half(), NO_HEARTBEAT)

    def test_with_heartbeats(self) -> None:
        """Where a stream's client waits, it hears heartbeats, and the facts then stand in an event."""
        self.run_all(waiting_cells()[::2], HEARTBEAT)


class OracleTest(unittest.TestCase):
    """What is expected follows from the reference; here a few rows of it by hand, so that a misreading shows."""

    def test_the_table_is_read_whole(self) -> None:
        """Each reason there is has its row."""
        self.assertEqual(set(FAILURES), set(contract()))

    def test_every_reason_of_a_backend_is_played(self) -> None:
        """But for what is decided before any backend is asked."""
        played = {
            fault.reason(kind, stream=stream)
            for fault in FAULTS.values()
            for kind in fault.kinds
            for stream in (False, True)
        }
        ours = {"cooling", "queue_full", "no_room", "does_not_fit", "cold"}
        self.assertEqual(set(contract()) - ours, played - {""})

    def test_by_hand(self) -> None:
        """A chain falls back, or doesn't; a stream that has begun breaks; the next request is skipped, or isn't."""
        table = contract()

        def due(name: str, *, stream: bool, chain: bool) -> list[tuple[str, int, str]]:
            requests = Oracle(Cell(name, "openai", stream, chain), table).requests()
            return [(each.served_by, each.status, each.code) for each in requests]

        for name, stream, chain, first, second in (
            ("500", False, False, ("", 502, "server_error"), True),
            ("500", True, True, ("spare-ollama", 200, ""), True),
            ("400", False, True, ("", 400, "bad_request"), True),
            ("401", False, True, ("spare-ollama", 200, ""), False),
            ("404", True, False, ("", 404, "model_not_found"), True),
            ("429", True, False, ("", 429, "rate_limited"), True),
            ("400-overflow", True, True, ("", 400, "context_length_exceeded"), True),
            ("silence", True, False, ("", 504, "first_token_timeout"), True),
        ):
            cell = Cell(name, "openai", stream, chain)
            by = cell.name if second else "spare-ollama"
            with self.subTest(cell.name):
                self.assertEqual([first, (by, 200, ""), (by, 200, "")], due(name, stream=stream, chain=chain))
        name = Cell("reset-after", "openai", True, True).name
        self.assertEqual((name, 200, "stream_broken"), due("reset-after", stream=True, chain=True)[0])
        self.assertEqual(("spare-ollama", 200, ""), due("reset-after", stream=False, chain=True)[0])


if __name__ == "__main__":
    unittest.main()
