"""Where the items of a batch stand beyond the chip: padded, all of one size, or packed, each from its first token on.

A launch for packed items has as many programs as their blocks could be, by the tokens that there are and the longest
item, which is all that the host knows. A table of what each of them does, made on the device, says the rest.

Letters: B batch, N rows and M columns of an item, P strips of an item; *lines* are rows and columns, one after the
other.
"""

import triton
import triton.language as tl

from .constants import TABLE

# The TABLE numbers of a row of the table of packed items: the item (below zero: none), which block of it; first row and
# number of rows, first column and number of columns; first strip and number of strips.


@triton.jit
def span(cu_seqlens_ptr, item, tokens):
    """An item's first token and its length. Offsets that are out of order do not lead out of the tokens."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + item), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + item + 1), start), tokens)
    return start.to(tl.int64), end - start


@triton.jit
def wide(number):
    """As 64 bits: what it is multiplied by may take it beyond 32."""
    return tl.full((), number, tl.int64)


@triton.jit
def is_idle(table_ptr):
    """Whether a program of packed items has nothing to do: there are as many as the items could need."""
    return tl.load(table_ptr + tl.program_id(0) * TABLE) < 0


@triton.jit
def block_of(table_ptr, blocks):
    """The program's item, of ``blocks`` programs if padded, and which block of it."""
    if table_ptr is None:
        item, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    else:
        row = table_ptr + tl.program_id(0) * TABLE
        item, block = tl.load(row).to(tl.int64), tl.load(row + 1)
    return item, block


@triton.jit
def place(table_ptr, item, N, M):
    """Where an item's rows, and its columns, begin among those of all; and how many it has."""
    if table_ptr is None:
        start_x, start_y = item * N, item * M
    else:
        row = table_ptr + tl.program_id(0) * TABLE
        start_x, N = tl.load(row + 2).to(tl.int64), tl.load(row + 3)
        start_y, M = tl.load(row + 4).to(tl.int64), tl.load(row + 5)
    return start_x, start_y, N, M


@triton.jit
def strips(table_ptr, item, P):
    """Where an item's strips begin among those of all, and how many it has: P if padded."""
    if table_ptr is None:
        first_strip = item * P
    else:
        row = table_ptr + tl.program_id(0) * TABLE
        first_strip, P = tl.load(row + 6).to(tl.int64), tl.load(row + 7)
    return first_strip, P


@triton.jit
def row_block(N, BLOCK_N: tl.constexpr, table_ptr=None):
    """Of programs that each take BLOCK_N rows of an item: the item, and its first row."""
    item, block = block_of(table_ptr, tl.cdiv(N, BLOCK_N))
    return item, block.to(tl.int64) * BLOCK_N


@triton.jit
def line_block(N, M, BLOCK: tl.constexpr, table_ptr=None):
    """Of programs that each take BLOCK rows of an item, or BLOCK columns: the item, which block of it, whether these
    are rows, which of them, and where they stand among its lines."""
    row_blocks = tl.cdiv(N, BLOCK)
    item, block = block_of(table_ptr, row_blocks + tl.cdiv(M, BLOCK))
    if table_ptr is not None:
        _, _, N, M = place(table_ptr, item, N, M)
        row_blocks = tl.cdiv(N, BLOCK)
    is_rows = block < row_blocks
    index = (block - tl.where(is_rows, 0, row_blocks)) * BLOCK + tl.arange(0, BLOCK)
    return item, block, is_rows, index, tl.where(is_rows, 0, N) + index


@triton.jit(do_not_specialize=[
    "B", "tokens_x", "tokens_y", "longest_x", "longest_y", "less_x", "less_y", "programs"
])  # fmt: skip
def _table_kernel(
    cu_seqlens_x_ptr, cu_seqlens_y_ptr, table_ptr,
    B, tokens_x, tokens_y, longest_x, longest_y, less_x, less_y, programs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr, PLACES: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Programs (PLACES rows of the table [programs, TABLE]): one for every block of ROWS rows, then of COLUMNS columns,
    of items longer than ``less`` on either side and as announced; zero of both is one for an item.

    Which item a place is of: as many as have ended before it.
    """
    places = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    item, first = tl.zeros((PLACES,), tl.int32), tl.zeros((PLACES,), tl.int32)
    first_strip = tl.zeros((PLACES,), tl.int32)
    ended = 0
    for start in range(0, B, ITEMS):
        items = start + tl.arange(0, ITEMS)
        known = tl.minimum(items, B - 1)
        _, N = span(cu_seqlens_x_ptr, known, tokens_x)
        _, M = span(cu_seqlens_y_ptr, known, tokens_y)
        is_long = (N <= longest_x) & (M <= longest_y) & ((N > less_x) | (M > less_y)) & (items < B)
        blocks = tl.where(is_long, num_blocks(N, M, ROWS, COLUMNS), 0)
        before = (ended + tl.cumsum(blocks, 0))[None, :] <= places[:, None]
        item += tl.sum(tl.where(before, 1, 0), 1)
        first += tl.sum(tl.where(before, blocks[None, :], 0), 1)
        first_strip += tl.sum(tl.where(before & is_long[None, :], tl.cdiv(N, STRIP)[None, :], 0), 1)
        ended += tl.sum(blocks)
    known = tl.minimum(item, B - 1)
    start_x, N = span(cu_seqlens_x_ptr, known, tokens_x)
    start_y, M = span(cu_seqlens_y_ptr, known, tokens_y)
    inside = places < programs
    row = table_ptr + places * TABLE
    tl.store(row, tl.where(item < B, item, -1), mask=inside)
    tl.store(row + 1, places - first, mask=inside)
    tl.store(row + 2, start_x.to(tl.int32), mask=inside)
    tl.store(row + 3, N, mask=inside)
    tl.store(row + 4, start_y.to(tl.int32), mask=inside)
    tl.store(row + 5, M, mask=inside)
    tl.store(row + 6, first_strip, mask=inside)
    tl.store(row + 7, tl.cdiv(N, STRIP), mask=inside)


@triton.jit
def num_blocks(N, M, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    count = tl.zeros_like(N)
    if ROWS:
        count += tl.cdiv(N, ROWS)
    if COLUMNS:
        count += tl.cdiv(M, COLUMNS)
    if ROWS + COLUMNS == 0:
        count += 1
    return count
