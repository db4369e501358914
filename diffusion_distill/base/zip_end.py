"""How long an archive's list of entries is, known before anything reads the list.

A zip ends with a record that says how long its list of entries is, followed by a comment of up to 65535 bytes:

    22 bytes       the record: PK 5 6, ..., the list's length at byte 12, the comment's length at byte 20
    ZIP64          56 bytes PK 6 6 with the length at byte 40, and 20 bytes PK 6 7, both before the record

The signature may stand inside the record or the comment again. Which of them zipfile takes differs between versions, so
the largest length that any of them says is what counts.
"""

from __future__ import annotations

import struct
from typing import Any

END, END64, LOCATOR = b"PK\5\6", b"PK\6\6", b"PK\6\7"
ZIP64 = 2**32 - 1  # stands for a length that the ZIP64 record says
RECORD, RECORD64, LOCATOR_SIZE, MAX_COMMENT = 22, 56, 20, 2**16


def directory_size(file: Any, size: int) -> int:
    """The bytes of the list of entries of an archive of so many bytes; 0 if it has no end."""
    begin = max(0, size - RECORD - MAX_COMMENT - RECORD64 - LOCATOR_SIZE)
    file.seek(begin)
    tail, found, at = file.read(size - begin), [0], -1
    while (at := tail.find(END, at + 1)) >= 0:
        if at + RECORD <= len(tail):
            found.append(struct.unpack_from("<I", tail, at + 12)[0])
    while (at := tail.find(END64, at + 1)) >= 0:
        if at + RECORD64 <= len(tail) and tail[at + RECORD64 : at + RECORD64 + 4] == LOCATOR:
            found.append(min(struct.unpack_from("<Q", tail, at + 40)[0], ZIP64 - 1))
    return max((length for length in found if length < ZIP64), default=0)
