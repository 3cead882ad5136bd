"""The table of long rollouts: what is carried after more and more frames; not how fast anything is."""

from chronotope.bench.lines import line
from chronotope.bench.rollouts import rollouts
from chronotope.bench.run import TABLES
from chronotope.bench.timing import Settings

SETTINGS = Settings(threads=1, rounds=1, quick=True, compiled="none")


def test_states_of_spaces_stay_and_caches_of_attention_grow_by_a_frame():
    assert TABLES["rollouts"] is rollouts
    parts = list(rollouts(SETTINGS))
    found = {rows[0].row: rows for rows in parts if not isinstance(rows, str)}
    sizes = {name: [round((row.peak_mb or 0) * 2**20) for row in rows] for name, rows in found.items()}
    frame, keys = 4, 2 * 64 * 4  # places; bytes of a key and a value
    assert sizes == {
        "convolutional state space": [frame * 16 * 8] * 2,
        "ConvLSTM": [frame * keys] * 2,
        "attention: t so far, then h, w": [4 * frame * keys, 8 * frame * keys],
        "attention: all frames so far": [4 * frame * keys, 8 * frame * keys],
    }
    assert all(
        row.seconds_median and row.rounds == 4 + 4 * (i == 1) for rows in found.values() for i, row in enumerate(rows)
    )
    assert " 4: " in line(found["ConvLSTM"]) and " 8: " in line(found["ConvLSTM"])
    assert sum(isinstance(part, str) and "1.00 of state" in part for part in parts) == 2
