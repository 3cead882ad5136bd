"""The backends of recurrences."""

from __future__ import annotations

from chronotope.recurrences.call import Backend
from chronotope.recurrences.chunked import TORCH
from chronotope.recurrences.native import NATIVE
from chronotope.recurrences.reference import REFERENCE

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (REFERENCE, TORCH, NATIVE)}
