"""Tiles in registers, for convolution without matrix products: device code that all its kernels share.

A group has so few channels that tensor cores would multiply mostly padding, so every product is one fp32 multiply-add
(FMA). What limits such a kernel is the number of its other instructions: loads, addresses, masks. The kernels save
those by keeping in registers what several sums use, as a tuple of tiles. Which tile meets which weight follows from the
constants of the window, so the functions of constants here decide it while the kernel is compiled.
"""

import triton
import triton.language as tl

# Rows, or columns, of a window that a thread holds in registers at once. Larger windows are summed in parts.
MAX_ROWS = tl.constexpr(8)


# --- tiles in registers ----------------------------------------------------------------------------------------------


@triton.constexpr_function
def log2_of(n):
    """The base-2 logarithm of n, a power of two."""
    return n.bit_length() - 1


@triton.jit
def channel_columns(x, c: tl.constexpr, C: tl.constexpr):
    """Columns c, c + C, c + 2*C, ... of a tile [M, N] as a tile [M, N/C]: channel c of every group. It takes no
    instruction where a thread holds C neighbouring columns."""
    for bit in tl.static_range(log2_of(C)):
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        if c >> bit & 1:
            x = odd
        else:
            x = even
    return x


@triton.jit
def repeated_columns(x, TIMES: tl.constexpr):
    """A tile [M, N] with each column TIMES times, side by side, [M, N*TIMES]: one for each filter of a group."""
    for _ in tl.static_range(log2_of(TIMES)):
        x = tl.reshape(tl.join(x, x), (x.shape[0], 2 * x.shape[1]))
    return x


@triton.jit
def unpacked_columns(x):
    """The columns of a tile [M, V] as a tuple of V vectors [M]. It takes no instruction where a thread holds whole
    rows."""
    columns = (x,)
    for _ in tl.static_range(log2_of(x.shape[1])):
        evens = ()
        odds = ()
        for i in tl.static_range(len(columns)):
            even, odd = tl.split(tl.reshape(columns[i], (x.shape[0], columns[i].shape[1] // 2, 2)))
            evens += (even,)
            odds += (odd,)
        columns = evens + odds
    vectors = ()
    for i in tl.static_range(len(columns)):
        vectors += (tl.reshape(columns[i], (x.shape[0],)),)
    return vectors


@triton.jit
def packed_columns(columns):
    """The tile [M, V] whose columns are V vectors [M]: the inverse of :func:`unpacked_columns`."""
    tiles = ()
    for i in tl.static_range(len(columns)):
        tiles += (tl.reshape(columns[i], (columns[i].shape[0], 1)),)
    for _ in tl.static_range(log2_of(len(columns))):
        pairs = ()
        for i in tl.static_range(len(tiles) // 2):
            pair = tl.join(tiles[i], tiles[i + len(tiles) // 2])
            pairs += (tl.reshape(pair, (pair.shape[0], 2 * pair.shape[1])),)
        tiles = pairs
    return tiles[0]


@triton.jit
def is_within(i, size):
    """The mask 0 <= i < size, by one comparison: as an unsigned number a negative i is larger than any size."""
    return i.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def zero_sums(COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """A tuple of COUNT fp32 tiles of zeros, to which a kernel adds."""
    accs = ()
    for _ in tl.static_range(COUNT):
        accs += (tl.zeros(SHAPE, dtype=tl.float32),)
    return accs


# --- what follows from the window, as constants ----------------------------------------------------------------------


@triton.constexpr_function
def equal_block(size, limit):
    """The length of the fewest equal blocks, each at most ``limit`` long, that cover ``size``."""
    blocks = -(-size // limit)
    return -(-size // blocks)


@triton.constexpr_function
def reads_row(j, rows, first, block, window, stride, dil):
    """Does one of ``rows`` rows of outputs read row j of x at one of the taps first ... first + block - 1?"""
    taps = range(first, min(first + block, window))
    return any(row * stride + tap * dil == j for row in range(rows) for tap in taps)


@triton.constexpr_function
def first_run(run, pad):
    """The number of the first run of columns of x that the windows of a run of outputs read. Run 0 starts at the column
    where the first window would start without padding."""
    return -pad // run


@triton.constexpr_function
def last_run(run, window, stride, pad, dil):
    """The number of the last run of columns of x that those windows read."""
    return ((run - 1) * stride + (window - 1) * dil - pad) // run


@triton.constexpr_function
def reads_run(i, run, window, stride, pad, dil):
    """Does run i hold a column of x that one of those windows reads?"""
    columns = (j * stride + tap * dil - pad for j in range(run) for tap in range(window))
    return any(column // run == i for column in columns)


# --- runs of columns -------------------------------------------------------------------------------------------------


@triton.jit
def load_columns(
    x_ptr, row, q, mask, W, stride_xw, S: tl.constexpr, STRIDE_W: tl.constexpr, PAD_W: tl.constexpr,
    DIL_W: tl.constexpr, X_VEC: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The columns of x that the windows of the RUN outputs from q*RUN on read, as a tuple of vectors [rows]; columns of
    runs that no window reads are 0.0. Whole runs are loaded: where the rows of x start on a multiple of RUN elements,
    each is one load."""
    FIRST: tl.constexpr = first_run(RUN, PAD_W)
    LAST: tl.constexpr = last_run(RUN, S, STRIDE_W, PAD_W, DIL_W)
    columns = ()
    for i in tl.static_range(LAST - FIRST + 1):
        if reads_run(FIRST + i, RUN, S, STRIDE_W, PAD_W, DIL_W):
            run = q * STRIDE_W + (FIRST + i)
            w = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
            if X_VEC == RUN:
                inside = is_within(run, W // RUN)[:, None]
            else:
                inside = is_within(w, W)
            if RUN == 1:
                w = w.to(tl.int64) * stride_xw
            x = tl.load(x_ptr + row[:, None] * X_VEC + w, mask=mask[:, None] & inside, other=0.0)  # [rows, RUN]
            columns += unpacked_columns(x)
        else:
            for _ in tl.static_range(RUN):
                columns += (0.0,)
    return columns
