r"""Recurrence over a sequence: Elman (tanh, relu), GRU and LSTM, forward and backward, one or two directions.

    tanh, relu   h_t = act(x_t + W h_{t-1})
    gru          r = sigmoid(x_r + W_r h), z = sigmoid(x_z + W_z h), n = tanh(x_n + r (W_n h + b_n)),
                 h_t = (1 - z) n + z h
    lstm         i, f, o = sigmoid(x_ifo + W_ifo h), g = tanh(x_g + W_g h), c_t = f c + i g, h_t = o tanh(c_t)

x_t = W_ih input_t + b; one matrix product outside these kernels computes it for all steps at once. W is W_hh, h is
h_{t-1}, and the gates are in torch's order. The letters: T steps, B sequences, H hidden units, D directions (the second
one runs from the last step to the first), G gates (1 for tanh and relu, 3 for GRU, 4 for LSTM), S slots of the
gradients (1 for tanh and relu, 4 for GRU and LSTM).

Bytes (e: bytes an element; P = D * ceil(B / BLOCK_B) programs). No load is repeated within a program, so the load and
store instructions move what must come from memory once, except that each program loads the weights for itself:

    forward     e T B D H (G + 1)   loads x, stores h; e T B D H more where the LSTM keeps its cells    + P G H^2 e
    backward    e T B D H * 3       tanh and relu: loads dout and h, stores the gradient                + P G H^2 e
                e T B D H * 10      GRU and LSTM: loads 4 slots, dout, and h or c; stores 4 slots       + P G H^2 e

P G H^2 e are the weights. Both also move the first and the last state: 2 e D B H, twice that for LSTM, which has c.

One program computes BLOCK_B sequences of one direction from the first step to the last. It keeps all of W_hh in shared
memory or registers, and h (and c) in registers, so that no step needs a launch or a barrier between programs. W_hh must
therefore fit one multiprocessor, which limits H: :func:`fits` says to how much. H is padded to a power of two with zero
weights, and the padded part of h is 0. SWAP computes W h^T instead of h W^T, because the tensor-core instruction of
sm_90 (WGMMA) takes a first operand of at least 64 rows, which the weights have and a few sequences do not.

The backward does not keep the gates. Two matrix products for all steps at once recompute what the gates' functions are
applied to, since every h_{t-1} is known from the output; the buffer ``gates`` holds these inputs, and the kernel
overwrites each with the gradient at it. The gradients of the weights are then one product each. For tanh and relu h_t
is enough. The GRU's four slots are the inputs n, r, z and W_n h + b_n: the gradient of x comes from the first three,
that of h from the last three.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..autotune import cost
from ..autotune.config import Config, Estimate, Tunable, register
from ..autotune.device import DeviceSpec
from ..autotune.schema import dtype_name
from ._launch import Launch, launch, readable
from ._math import dot, narrow, only_if, sigmoid, tanh

GATES = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}
SLOTS = {"tanh": 1, "relu": 1, "gru": 4, "lstm": 4}  # values that the backward keeps for each unit and step


@triton.jit
def _tile_offsets(b, j, SWAP: tl.constexpr):
    """Offsets [BLOCK_B, BLOCK_H] of a tile, from those of its sequences ``b`` and of its hidden units ``j``; with SWAP
    the tile is transposed, [BLOCK_H, BLOCK_B]."""
    if SWAP:
        return j[:, None] + b[None, :]
    else:
        return b[:, None] + j[None, :]


@triton.jit
def _gate_weights(w_ptr, gate: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, TRANSPOSED: tl.constexpr):
    """One gate's [H, H] matrix as a tile [BLOCK_H, BLOCK_H], padded with zeros; TRANSPOSED exchanges its two axes."""
    row = tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_H)
    mask = (row < H)[:, None] & (column < H)[None, :]
    if TRANSPOSED:
        offsets = row[:, None] + column[None, :] * H
    else:
        offsets = row[:, None] * H + column[None, :]
    return tl.load(w_ptr + gate * H * H + offsets, mask=mask, other=0.0)  # [BLOCK_H, BLOCK_H]


@triton.jit
def _sum_with_product(w, h, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """``acc`` [BLOCK_B, BLOCK_H] plus the product of ``h`` and one gate's weights ``w``; ``h``, a state or a gradient,
    is rounded to the dtype of the weights, because the product takes operands of one dtype."""
    h = narrow(h, w.dtype)
    if SWAP:
        return dot(w, h, acc, PRECISION)
    else:
        return dot(h, w, acc, PRECISION)


@triton.jit(do_not_specialize=["T", "B"])
def _rnn_kernel(
    x_ptr, w_ptr, bn_ptr, h0_ptr, c0_ptr, out_ptr, hn_ptr, cn_ptr, cells_ptr,
    T, B,
    H: tl.constexpr, D: tl.constexpr, CELL: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """x [T, B, D, G, H], w [D, G, H, H], bn [D, H] (GRU), h0, c0, hn, cn [D, B, H] to out and cells [T, B, D, H].

    The shapes in the comments are those without SWAP, which transposes every tile of states.
    """
    G: tl.constexpr = 4 if CELL == "lstm" else 3 if CELL == "gru" else 1
    d = tl.program_id(0) % D
    b = tl.program_id(0) // D * BLOCK_B + tl.arange(0, BLOCK_B)
    j = tl.arange(0, BLOCK_H)
    # A row or column outside adds 2 to the sum, so that the sum is below 2 only where both are inside.
    mask = _tile_offsets(tl.where(b < B, 0, 2), tl.where(j < H, 0, 2), SWAP) < 2
    w_ptr += d * G * H * H
    w_0 = _gate_weights(w_ptr, 0, H, BLOCK_H, not SWAP)
    if G > 1:
        w_1 = _gate_weights(w_ptr, 1, H, BLOCK_H, not SWAP)
        w_2 = _gate_weights(w_ptr, 2, H, BLOCK_H, not SWAP)
    if G > 3:
        w_3 = _gate_weights(w_ptr, 3, H, BLOCK_H, not SWAP)
    rows = b.to(tl.int64) * D + d
    state_off = _tile_offsets((d.to(tl.int64) * B + b) * H, j, SWAP)
    x_off = _tile_offsets(rows * (G * H), j, SWAP)
    out_off = _tile_offsets(rows * H, j, SWAP)
    h = tl.load(h0_ptr + state_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
    if CELL == "lstm":
        c = tl.load(c0_ptr + state_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
    if bn_ptr is not None:
        bias_off = _tile_offsets(b * 0, d * H + j, SWAP)
        # Every sequence of the tile gets the same bias, so each row of the block is a copy of it.
        b_n = tl.load(bn_ptr + bias_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
    backwards = REVERSE or d == 1
    for step in range(0, T):
        t = tl.where(backwards, T - 1 - step, step).to(tl.int64)
        x_t = x_ptr + t * B * (D * G * H)
        a_0 = _sum_with_product(
            w_0, h, tl.load(x_t + x_off, mask=mask, other=0.0).to(tl.float32), SWAP, PRECISION  # [BLOCK_B, BLOCK_H]
        )  # fmt: skip
        if G > 1:
            x_1 = tl.load(x_t + H + x_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
            x_2 = tl.load(x_t + 2 * H + x_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
            a_1 = _sum_with_product(w_1, h, x_1, SWAP, PRECISION)
        if CELL == "tanh":
            h = tanh(a_0)
        elif CELL == "relu":
            h = tl.where(a_0 <= 0.0, 0.0, a_0)
        elif CELL == "gru":
            zero = tl.zeros_like(h)
            hidden = _sum_with_product(w_2, h, b_n if bn_ptr is not None else zero, SWAP, PRECISION)
            n = tanh(x_2 + sigmoid(a_0) * hidden)
            h = n + sigmoid(a_1) * (h - n)
        else:
            x_3 = tl.load(x_t + 3 * H + x_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
            g = tanh(_sum_with_product(w_2, h, x_2, SWAP, PRECISION))
            o = sigmoid(_sum_with_product(w_3, h, x_3, SWAP, PRECISION))
            c = sigmoid(a_1) * c + sigmoid(a_0) * g
            h = o * tanh(c)
            if cells_ptr is not None:
                cells_t = cells_ptr + t * B * (D * H)
                tl.store(cells_t + out_off, narrow(c, cells_ptr.dtype.element_ty), mask=mask)
        if H < BLOCK_H:
            # The weights of the padded units are 0, and 0 times an infinite state would be NaN.
            h = tl.where(mask, h, 0.0)
        tl.store(out_ptr + t * B * (D * H) + out_off, narrow(h, out_ptr.dtype.element_ty), mask=mask)
    tl.store(hn_ptr + state_off, narrow(h, hn_ptr.dtype.element_ty), mask=mask)
    if CELL == "lstm":
        tl.store(cn_ptr + state_off, narrow(c, cn_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "B"])
def _rnn_backward_kernel(
    gates_ptr, w_ptr, h0_ptr, c0_ptr, out_ptr, cells_ptr, dout_ptr, dhn_ptr, dcn_ptr, dcells_ptr, dh0_ptr, dc0_ptr,
    T, B,
    H: tl.constexpr, D: tl.constexpr, CELL: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """gates [T, B, D, SLOTS, H] holds the inputs of the gates when the kernel starts and the gradients at them when it
    ends; dh0 and dc0 [D, B, H] are the gradients of the first state. dout and dcells are [T, B, D, H], dhn and dcn
    [D, B, H], the others as in :func:`_rnn_kernel`. A gradient that is None counts as zero.

    The shapes in the comments are those without SWAP, which transposes every tile of states.
    """
    G: tl.constexpr = 4 if CELL == "lstm" else 3 if CELL == "gru" else 1
    SLOTS: tl.constexpr = 4 if G > 1 else 1
    d = tl.program_id(0) % D
    b = tl.program_id(0) // D * BLOCK_B + tl.arange(0, BLOCK_B)
    j = tl.arange(0, BLOCK_H)
    # A row or column outside adds 2 to the sum, so that the sum is below 2 only where both are inside.
    mask = _tile_offsets(tl.where(b < B, 0, 2), tl.where(j < H, 0, 2), SWAP) < 2
    w_ptr += d * G * H * H
    w_0 = _gate_weights(w_ptr, 0, H, BLOCK_H, SWAP)
    if G > 1:
        w_1 = _gate_weights(w_ptr, 1, H, BLOCK_H, SWAP)
        w_2 = _gate_weights(w_ptr, 2, H, BLOCK_H, SWAP)
    if G > 3:
        w_3 = _gate_weights(w_ptr, 3, H, BLOCK_H, SWAP)
    rows = b.to(tl.int64) * D + d
    state_off = _tile_offsets((d.to(tl.int64) * B + b) * H, j, SWAP)
    gates_off = _tile_offsets(rows * (SLOTS * H), j, SWAP)
    out_off = _tile_offsets(rows * H, j, SWAP)
    dtype = gates_ptr.dtype.element_ty
    backwards = REVERSE or d == 1
    last = tl.where(backwards, 0, T - 1).to(tl.int64)
    dh = tl.zeros(mask.shape, dtype=tl.float32)
    if dhn_ptr is not None:
        dh = tl.load(dhn_ptr + state_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
    if CELL == "lstm":
        dc = tl.zeros(mask.shape, dtype=tl.float32)
        if dcn_ptr is not None:
            dc = tl.load(dcn_ptr + state_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
        c = tl.load(
            cells_ptr + last * B * (D * H) + out_off, mask=mask, other=0.0
        ).to(tl.float32)  # [BLOCK_B, BLOCK_H]  # fmt: skip
    for step in range(0, T):
        t = tl.where(backwards, step, T - 1 - step).to(tl.int64)
        before = tl.where(backwards, t + 1, t - 1)
        is_first = step == T - 1
        gates_t = gates_ptr + t * B * (D * SLOTS * H)
        if H < BLOCK_H:
            # The weights of the padded units are 0, and 0 times an infinite gradient would be NaN.
            dh = tl.where(_tile_offsets(b * 0, j, SWAP) < H, dh, 0.0)
        if dout_ptr is not None:
            dh += tl.load(
                dout_ptr + t * B * (D * H) + out_off, mask=mask, other=0.0
            ).to(tl.float32)  # [BLOCK_B, BLOCK_H]  # fmt: skip
        if G == 1:
            h = tl.load(out_ptr + t * B * (D * H) + out_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
            if CELL == "tanh":
                da_0 = dh * (1.0 - h * h)
            else:
                da_0 = tl.where(h <= 0.0, 0.0, dh)
            dh = _sum_with_product(w_0, da_0, tl.zeros_like(dh), SWAP, PRECISION)
        else:
            a_0 = tl.load(gates_t + gates_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
            a_1 = tl.load(gates_t + H + gates_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
            a_2 = tl.load(gates_t + 2 * H + gates_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
            a_3 = tl.load(gates_t + 3 * H + gates_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
            between = only_if(mask, is_first == 0)
            first = only_if(mask, is_first)
            if CELL == "gru":
                # Of the two loads one gives zeros: h_{t-1} is h0 at the first step, else the output of step t-1.
                h = tl.load(
                    out_ptr + before * B * (D * H) + out_off, mask=between, other=0.0
                ).to(tl.float32)  # [BLOCK_B, BLOCK_H]  # fmt: skip
                h += tl.load(h0_ptr + state_off, mask=first, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
                r, z = sigmoid(a_1), sigmoid(a_2)
                n = tanh(a_0 + r * a_3)
                da_0 = dh * (1.0 - z) * (1.0 - n * n)
                da_1 = da_0 * a_3 * r * (1.0 - r)
                da_2 = dh * (h - n) * z * (1.0 - z)
                da_3 = da_0 * r
                dh = _sum_with_product(w_0, da_1, dh * z, SWAP, PRECISION)
                dh = _sum_with_product(w_1, da_2, dh, SWAP, PRECISION)
                dh = _sum_with_product(w_2, da_3, dh, SWAP, PRECISION)
            else:
                if dcells_ptr is not None:
                    dc += tl.load(
                        dcells_ptr + t * B * (D * H) + out_off, mask=mask, other=0.0
                    ).to(tl.float32)  # [BLOCK_B, BLOCK_H]  # fmt: skip
                i, f, g, o = sigmoid(a_0), sigmoid(a_1), tanh(a_2), sigmoid(a_3)
                tanh_c = tanh(c)
                dc += dh * o * (1.0 - tanh_c * tanh_c)
                # c_{t-1}, of which one of the two loads gives zeros, as for h_{t-1} of the GRU.
                c = tl.load(
                    cells_ptr + before * B * (D * H) + out_off, mask=between, other=0.0
                ).to(tl.float32)  # [BLOCK_B, BLOCK_H]  # fmt: skip
                c += tl.load(c0_ptr + state_off, mask=first, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
                da_0 = dc * g * i * (1.0 - i)
                da_1 = dc * c * f * (1.0 - f)
                da_2 = dc * i * (1.0 - g * g)
                da_3 = dh * tanh_c * o * (1.0 - o)
                dc = dc * f
                dh = _sum_with_product(w_0, da_0, tl.zeros_like(dh), SWAP, PRECISION)
                dh = _sum_with_product(w_1, da_1, dh, SWAP, PRECISION)
                dh = _sum_with_product(w_2, da_2, dh, SWAP, PRECISION)
                dh = _sum_with_product(w_3, da_3, dh, SWAP, PRECISION)
            tl.store(gates_t + H + gates_off, narrow(da_1, dtype), mask=mask)
            tl.store(gates_t + 2 * H + gates_off, narrow(da_2, dtype), mask=mask)
            tl.store(gates_t + 3 * H + gates_off, narrow(da_3, dtype), mask=mask)
        tl.store(gates_t + gates_off, narrow(da_0, dtype), mask=mask)
    tl.store(dh0_ptr + state_off, narrow(dh, dtype), mask=mask)
    if CELL == "lstm":
        tl.store(dc0_ptr + state_off, narrow(dc, dtype), mask=mask)


# --- launchers -------------------------------------------------------------------------------------------------------


class RnnProblem(NamedTuple):
    """One recurrent layer over a batch of sequences.

    Attributes:
        cell: ``"tanh"``, ``"relu"``, ``"gru"`` or ``"lstm"``.
        T, B, H: steps, sequences, hidden units.
        directions: 1, or 2 for a bidirectional layer.
        precision: how the products multiply: ``"16"`` for fp16 and bf16, else ``"ieee"``, ``"tf32"`` or ``"tf32x3"``.
        saves: whether a backward follows, for which the LSTM's forward keeps its cells.
    """

    cell: str
    T: int
    B: int
    H: int
    directions: int
    dtype: torch.dtype
    precision: str
    saves: bool

    @property
    def block_h(self) -> int:
        return max(16, cost.next_power_of_2(self.H))

    def forward_bytes(self) -> float:
        """What a forward moves, without the weights and the first and last states."""
        cells = self.cell == "lstm" and self.saves
        return float(self.T * self.B * self.directions * self.H * (GATES[self.cell] + 1 + cells) * self.dtype.itemsize)

    def backward_bytes(self) -> float:
        """What a backward moves, without the weights and the first and last states."""
        slots = SLOTS[self.cell]
        moved = 2 * slots + 2 if slots > 1 else 3
        return float(self.T * self.B * self.directions * self.H * moved * self.dtype.itemsize)


def _program_count(p: RnnProblem, config: Config) -> int:
    """How many programs one launch has: each computes BLOCK_B sequences of one direction."""
    return p.directions * cost.cdiv(p.B, config.BLOCK_B)


def _constants(p: RnnProblem, config: Config, reverse: bool) -> dict[str, object]:
    return {
        "H": p.H, "D": p.directions, "CELL": p.cell, "REVERSE": reverse, "PRECISION": p.precision.replace("16", "ieee"),
        "BLOCK_H": p.block_h, **config.constants(),
    }  # fmt: skip


def plan_forward(
    p: RnnProblem, config: Config, x: torch.Tensor, w_hh: torch.Tensor, b_n: torch.Tensor | None, h0: torch.Tensor,
    c0: torch.Tensor | None, out: torch.Tensor, hn: torch.Tensor, cn: torch.Tensor | None, cells: torch.Tensor | None,
    *, reverse: bool = False,
) -> list[Launch]:  # fmt: skip
    """The launch of the forward. All tensors are contiguous, of the shapes in :func:`_rnn_kernel`'s docstring."""
    args = {
        "x_ptr": x, "w_ptr": w_hh, "bn_ptr": b_n, "h0_ptr": h0, "c0_ptr": c0, "out_ptr": out, "hn_ptr": hn,
        "cn_ptr": cn, "cells_ptr": cells, "T": p.T, "B": p.B,
    }  # fmt: skip
    constants = _constants(p, config, reverse)
    return [Launch(_rnn_kernel, _program_count(p, config), args, constants, config.num_warps, config.num_stages)]


def plan_backward(
    p: RnnProblem, config: Config, gates: torch.Tensor, w_hh: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor | None,
    out: torch.Tensor, cells: torch.Tensor | None, dout: torch.Tensor | None, dhn: torch.Tensor | None,
    dcn: torch.Tensor | None, dcells: torch.Tensor | None, dh0: torch.Tensor, dc0: torch.Tensor | None,
    *, reverse: bool = False,
) -> list[Launch]:  # fmt: skip
    """The launch of the backward. All tensors are contiguous, of the shapes in :func:`_rnn_backward_kernel`'s
    docstring."""
    args = {
        "gates_ptr": gates, "w_ptr": w_hh, "h0_ptr": h0, "c0_ptr": c0, "out_ptr": out, "cells_ptr": cells,
        "dout_ptr": dout, "dhn_ptr": dhn, "dcn_ptr": dcn, "dcells_ptr": dcells, "dh0_ptr": dh0, "dc0_ptr": dc0,
        "T": p.T, "B": p.B,
    }  # fmt: skip
    constants = _constants(p, config, reverse)
    return [
        Launch(_rnn_backward_kernel, _program_count(p, config), args, constants, config.num_warps, config.num_stages)
    ]


# --- configs ---------------------------------------------------------------------------------------------------------

CONFIGS = tuple(
    Config(BLOCK_B=b, SWAP=swap, num_warps=warps, num_stages=1)
    for b in (16, 32, 64)
    for swap in (0, 1)
    for warps in (1, 2, 4, 8, 16)
)
CLOCK_GHZ = 1.7  # of a multiprocessor, as the cost model assumes it for every GPU
# Clocks that a step takes however small it is: the barriers, and the latencies of a load, a product and an exponential,
# each of which waits for the one before.
STEP_CLOCKS = 500


def _features(p: RnnProblem) -> dict[str, int | str]:
    return {
        "cell": p.cell, "B": p.B, "H": p.H, "directions": str(p.directions),
        "dtype": dtype_name(p.dtype), "precision": p.precision, "saves": str(int(p.saves)),
    }  # fmt: skip


def smem_bytes(p: RnnProblem, block_b: int) -> int:
    """Shared memory of a program: the weights, and a tile of states that is exchanged between threads to become the
    operand of the next product. tf32x3 keeps each weight as a high and a low part."""
    weights = GATES[p.cell] * p.block_h**2 * p.dtype.itemsize
    return weights * (2 if p.precision == "tf32x3" else 1) + block_b * p.block_h * 4


def _accepts(p: RnnProblem, config: Config, device: DeviceSpec, untransposed: int) -> bool:
    """Whether a config fits: all weights in shared memory, at least 16 bytes a thread in each load of a tile, and a
    thread's share of the G tiles of gates in its registers. ``untransposed`` is the value of SWAP with which the kernel
    reads the weights as they lie in memory."""
    tile = config.BLOCK_B * p.block_h
    if smem_bytes(p, config.BLOCK_B) > device.smem_kb * 1024 or config.BLOCK_B > max(16, 2 * p.B):
        return False
    threads = config.num_warps * device.warp_size
    if tile < threads * 16 // p.dtype.itemsize and config.num_warps > (1 if device.is_amd else 2):
        return False
    if device.is_amd:
        # A warp multiplies tiles of 16 x 16 or 32 x 32. If there were more warps than such tiles, several warps would
        # compute the same tile, and the compiler was seen to spill registers there.
        side = 16 if config.BLOCK_B == 16 else 32
        return config.num_warps * side**2 <= max(tile, 256) and GATES[p.cell] * tile <= 64 * threads
    if p.precision == "ieee" and not device.is_amd and p.block_h >= 64:
        # Full fp32 has no tensor-core instruction: all operands are in registers. The compiler was seen to spill
        # them for larger weights, and for weights that are transposed after the load.
        most = 112**2 if device.target == "sm_100" and p.cell == "lstm" else 128**2
        return config.SWAP == untransposed and GATES[p.cell] * p.block_h**2 <= most
    return GATES[p.cell] * tile <= 80 * threads


def _forward_accepts(p: RnnProblem, config: Config, device: DeviceSpec) -> bool:
    return _accepts(p, config, device, untransposed=1)


def _backward_accepts(p: RnnProblem, config: Config, device: DeviceSpec) -> bool:
    return _accepts(p, config, device, untransposed=0)


def fits(p: RnnProblem, device: DeviceSpec) -> bool:
    """Whether one program can hold the layer's weights, so that the kernels cover this problem on this device."""
    return any(_forward_accepts(p, config, device) for config in CONFIGS)


def _estimate(p: RnnProblem, config: Config, device: DeviceSpec, elementwise: int, dram_bytes: float) -> Estimate:
    """The time of T steps of one program, times the number of waves of programs: programs beyond the number of
    multiprocessors run after the first ones. A step reads the weights from shared memory while it multiplies, and then
    computes the gates; ``elementwise`` is how many clocks of a lane an element of a gate takes."""
    gates, h, b, warps = GATES[p.cell], p.block_h, config.BLOCK_B, config.num_warps
    weights = gates * h * h * p.dtype.itemsize / 128
    products = 2 * gates * h * h * b / (device.tflops(p.precision) * 1e3 / device.sms / CLOCK_GHZ)
    has_large_units = device.target in ("sm_90", "sm_100") and h >= 64 and p.precision in ("16", "tf32")
    if has_large_units != bool(config.SWAP):
        products, weights = 2.0 * products, 1.3 * weights
    if warps < 4:
        products *= 4 / warps
    lanes = 32 * min(4, warps) * (0.4 + 0.6 * min(warps, 16) / 16)
    pointwise = gates * b * h * elementwise / lanes
    step = STEP_CLOCKS + 12 * warps + max(weights, products) + pointwise
    waves = cost.cdiv(_program_count(p, config), device.sms)
    busy = waves * p.T * step / (CLOCK_GHZ * 1e3)
    memory = dram_bytes / (device.dram_gbs * 1e3)
    return Estimate(cost.LAUNCH_US + max(busy, memory), "memory" if memory > busy else "compute")


def _forward_estimate(p: RnnProblem, config: Config, device: DeviceSpec) -> Estimate:
    return _estimate(p, config, device, 20, p.forward_bytes())


def _backward_estimate(p: RnnProblem, config: Config, device: DeviceSpec) -> Estimate:
    return _estimate(p, config, device, 30, p.backward_bytes())


def _meta(p: RnnProblem, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=p.dtype, device="meta")


def _forward_launches(p: RnnProblem, config: Config) -> list[Launch]:
    gates = GATES[p.cell]
    state, out = (p.directions, p.B, p.H), (p.T, p.B, p.directions, p.H)
    is_lstm = p.cell == "lstm"
    return plan_forward(
        p, config, _meta(p, p.T, p.B, p.directions, gates, p.H), _meta(p, p.directions, gates, p.H, p.H),
        _meta(p, p.directions, p.H) if p.cell == "gru" else None, _meta(p, *state),
        _meta(p, *state) if is_lstm else None, _meta(p, *out), _meta(p, *state), _meta(p, *state) if is_lstm else None,
        _meta(p, *out) if is_lstm and p.saves else None,
    )  # fmt: skip


def _backward_launches(p: RnnProblem, config: Config) -> list[Launch]:
    state, out = (p.directions, p.B, p.H), (p.T, p.B, p.directions, p.H)
    is_lstm = p.cell == "lstm"
    return plan_backward(
        p, config, _meta(p, p.T, p.B, p.directions, SLOTS[p.cell], p.H),
        _meta(p, p.directions, GATES[p.cell], p.H, p.H), _meta(p, *state), _meta(p, *state) if is_lstm else None,
        _meta(p, *out), _meta(p, *out) if is_lstm else None, _meta(p, *out), None, None, None, _meta(p, *state),
        _meta(p, *state) if is_lstm else None,
    )  # fmt: skip


def _forward_moved_bytes(p: RnnProblem, config: Config) -> float:
    return p.forward_bytes() + _weight_bytes(p, config) + _state_bytes(p)


def _backward_moved_bytes(p: RnnProblem, config: Config) -> float:
    return p.backward_bytes() + _weight_bytes(p, config) + _state_bytes(p)


def _weight_bytes(p: RnnProblem, config: Config) -> float:
    """Bytes of weights that all programs load together: each loads all weights of its direction."""
    return float(_program_count(p, config) * GATES[p.cell] * p.H**2 * p.dtype.itemsize)


def _state_bytes(p: RnnProblem) -> float:
    """Bytes of the first and the last h, and of the LSTM's first and last c."""
    return float(2 * p.directions * p.B * p.H * p.dtype.itemsize * (2 if p.cell == "lstm" else 1))


def _product_rows(p: RnnProblem) -> int:
    """Rows of the tiles that the matrix units multiply: 16, because a config may have as few as 16 sequences a tile.
    mma.sync serves such tiles, and the instructions of 64 rows serve larger ones; both are accepted."""
    return 16


def _due_load_bytes(p: RnnProblem) -> int:
    """How many bytes wide every load has to be: 8 for 16-bit numbers where H is a multiple of 8 and a tile has as much
    for each thread of two warps, else 0, which allows any width."""
    return 8 if p.dtype.itemsize == 2 and p.H % 8 == 0 and p.block_h >= 64 else 0


FORWARD = register(
    Tunable(
        "rnn", CONFIGS, _features, _forward_accepts, _forward_estimate, _forward_launches,
        moved_bytes=_forward_moved_bytes, product_rows=_product_rows, due_load_bytes=_due_load_bytes,
    )
)  # fmt: skip
BACKWARD = register(
    Tunable(
        "rnn_backward", CONFIGS, _features, _backward_accepts, _backward_estimate, _backward_launches,
        moved_bytes=_backward_moved_bytes, product_rows=_product_rows, due_load_bytes=_due_load_bytes,
    )
)  # fmt: skip


# --- calls -----------------------------------------------------------------------------------------------------------


def _dense_tensors(*tensors: torch.Tensor | None) -> list[Any]:
    """The tensors themselves if they are contiguous, else contiguous copies; None stays None."""
    return [None if t is None else readable(t, dense=True) for t in tensors]


def run_forward(
    p: RnnProblem, x: torch.Tensor, w_hh: torch.Tensor, b_n: torch.Tensor | None, h0: torch.Tensor,
    c0: torch.Tensor | None, *, reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """``(out [T, B, D * H], h_n [D, B, H], c_n [D, B, H], cells [T, B, D * H])``. ``c_n`` is None but for the LSTM;
    ``cells`` is None but for an LSTM whose problem ``saves``."""
    x, w_hh, b_n, h0, c0 = _dense_tensors(x, w_hh, b_n, h0, c0)
    out = x.new_empty(p.T, p.B, p.directions * p.H)
    hn = torch.empty_like(h0)
    cn = None if c0 is None else torch.empty_like(c0)
    cells = torch.empty_like(out) if c0 is not None and p.saves else None
    launch(FORWARD, plan_forward, p, x, w_hh, b_n, h0, c0, out, hn, cn, cells, reverse=reverse)
    return out, hn, cn, cells


def run_backward(
    p: RnnProblem, gates: torch.Tensor, w_hh: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor | None,
    out: torch.Tensor, cells: torch.Tensor | None, *grads: torch.Tensor | None, reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Overwrites ``gates`` [T, B, D, S, H], which is contiguous, with the gradients at its entries, and returns
    ``(dh0, dc0)``, each [D, B, H]. ``grads`` are the gradients of out, h_n, c_n and cells."""
    w_hh, h0, c0, out, cells, *grads = _dense_tensors(w_hh, h0, c0, out, cells, *grads)
    dh0 = torch.empty_like(h0)
    dc0 = None if c0 is None else torch.empty_like(c0)
    launch(BACKWARD, plan_backward, p, gates, w_hh, h0, c0, out, cells, *grads, dh0, dc0, reverse=reverse)
    return dh0, dc0
