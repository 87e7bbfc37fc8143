r"""Recurrence over a sequence: Elman (tanh, relu), GRU and LSTM, forward and backward, one or two directions.

    tanh, relu   h_t = act(x_t + W h_{t-1})
    gru          r = sigmoid(x_r + W_r h), z = sigmoid(x_z + W_z h), n = tanh(x_n + r (W_n h + b_n)),
                 h_t = (1 - z) n + z h
    lstm         i, f, o = sigmoid(x_ifo + W_ifo h), g = tanh(x_g + W_g h), c_t = f c + i g, h_t = o tanh(c_t)

x_t = W_ih input_t + b is the product for all steps at once, made before; W is W_hh and h is h_{t-1}. Gates are in
torch's order. T steps, B sequences, H hidden units, D directions (the second walks the sequence backwards), G gates.

One program serves BLOCK_B sequences of one direction from the first step to the last. It holds all of W_hh on the
chip and h (and c) in registers, so a step waits for nobody: no launch, no grid barrier. That bounds H; see
``fits``. H is padded to a power of two with zero weights, and the padded h is 0. SWAP
multiplies W h^T instead of h W^T: the weights are then the operand with 64 rows and more that WGMMA wants.

Backward keeps no gates: ``gates`` holds their inputs, recomputed by two products for all steps (h_{t-1} is known), and
the kernel overwrites them with the gradients there; those of the weights are then one product each. The Elman cell
needs h_t only. The GRU's slots are n, r, z and W_n h + b_n: the input sees the first three, h the last three.

Bytes (e: bytes an element), once from memory and moved by instructions alike; P = D * ceil(B / BLOCK_B) programs:

    forward     e T B D H (G + 1)              + LSTM's cells, if asked for e T B D H     + P G H^2 e
    backward    e T B D H (2 G' + 1)           + GRU's, Elman's h, LSTM's c: e T B D H    + P G H^2 e
                G' = 4 for GRU and LSTM; the Elman cell only writes its gate
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
SLOTS = {"tanh": 1, "relu": 1, "gru": 4, "lstm": 4}  # of the gate buffer in backward


@triton.jit
def _across(b, j, SWAP: tl.constexpr):
    """Offsets of a tile: sequences ``b`` by hidden units ``j``, or the other way round."""
    if SWAP:
        return j[:, None] + b[None, :]
    else:
        return b[:, None] + j[None, :]


@triton.jit
def _gate_weights(w_ptr, gate: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, TRANSPOSED: tl.constexpr):
    """One gate's [H, H] matrix, padded with zeros; TRANSPOSED exchanges its two axes."""
    row = tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_H)
    mask = (row < H)[:, None] & (column < H)[None, :]
    if TRANSPOSED:
        offsets = row[:, None] + column[None, :] * H
    else:
        offsets = row[:, None] * H + column[None, :]
    return tl.load(w_ptr + gate * H * H + offsets, mask=mask, other=0.0)


@triton.jit
def _times(w, h, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """``acc`` plus one gate's weights times the state, which is rounded to the weights' dtype."""
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
    """x [T, B, D, G, H], w [D, G, H, H], bn [D, H] (GRU), h0, c0, hn, cn [D, B, H], out, cells [T, B, D, H]."""
    G: tl.constexpr = 4 if CELL == "lstm" else 3 if CELL == "gru" else 1
    d = tl.program_id(0) % D
    b = tl.program_id(0) // D * BLOCK_B + tl.arange(0, BLOCK_B)
    j = tl.arange(0, BLOCK_H)
    mask = _across(tl.where(b < B, 0, 2), tl.where(j < H, 0, 2), SWAP) < 2
    w_ptr += d * G * H * H
    w_0 = _gate_weights(w_ptr, 0, H, BLOCK_H, not SWAP)
    if G > 1:
        w_1 = _gate_weights(w_ptr, 1, H, BLOCK_H, not SWAP)
        w_2 = _gate_weights(w_ptr, 2, H, BLOCK_H, not SWAP)
    if G > 3:
        w_3 = _gate_weights(w_ptr, 3, H, BLOCK_H, not SWAP)
    rows = b.to(tl.int64) * D + d
    state_off = _across((d.to(tl.int64) * B + b) * H, j, SWAP)
    x_off = _across(rows * (G * H), j, SWAP)
    out_off = _across(rows * H, j, SWAP)
    h = tl.load(h0_ptr + state_off, mask=mask, other=0.0).to(tl.float32)
    if CELL == "lstm":
        c = tl.load(c0_ptr + state_off, mask=mask, other=0.0).to(tl.float32)
    if bn_ptr is not None:
        bias_off = _across(b * 0, d * H + j, SWAP)
        b_n = tl.load(bn_ptr + bias_off, mask=mask, other=0.0).to(tl.float32)
    backwards = REVERSE or d == 1
    for step in range(0, T):
        t = tl.where(backwards, T - 1 - step, step).to(tl.int64)
        x_t = x_ptr + t * B * (D * G * H)
        a_0 = _times(w_0, h, tl.load(x_t + x_off, mask=mask, other=0.0).to(tl.float32), SWAP, PRECISION)
        if G > 1:
            x_1 = tl.load(x_t + H + x_off, mask=mask, other=0.0).to(tl.float32)
            x_2 = tl.load(x_t + 2 * H + x_off, mask=mask, other=0.0).to(tl.float32)
            a_1 = _times(w_1, h, x_1, SWAP, PRECISION)
        if CELL == "tanh":
            h = tanh(a_0)
        elif CELL == "relu":
            h = tl.where(a_0 <= 0.0, 0.0, a_0)
        elif CELL == "gru":
            zero = tl.zeros_like(h)
            hidden = _times(w_2, h, b_n if bn_ptr is not None else zero, SWAP, PRECISION)
            n = tanh(x_2 + sigmoid(a_0) * hidden)
            h = n + sigmoid(a_1) * (h - n)
        else:
            x_3 = tl.load(x_t + 3 * H + x_off, mask=mask, other=0.0).to(tl.float32)
            g = tanh(_times(w_2, h, x_2, SWAP, PRECISION))
            o = sigmoid(_times(w_3, h, x_3, SWAP, PRECISION))
            c = sigmoid(a_1) * c + sigmoid(a_0) * g
            h = o * tanh(c)
            if cells_ptr is not None:
                cells_t = cells_ptr + t * B * (D * H)
                tl.store(cells_t + out_off, narrow(c, cells_ptr.dtype.element_ty), mask=mask)
        if H < BLOCK_H:
            h = tl.where(mask, h, 0.0)  # an infinite state makes NaN of the zero weights behind it
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
    """gates [T, B, D, SLOTS, H], in: inputs of the gates, out: gradients there. Gradients that are None are zero."""
    G: tl.constexpr = 4 if CELL == "lstm" else 3 if CELL == "gru" else 1
    SLOTS: tl.constexpr = 4 if G > 1 else 1
    d = tl.program_id(0) % D
    b = tl.program_id(0) // D * BLOCK_B + tl.arange(0, BLOCK_B)
    j = tl.arange(0, BLOCK_H)
    mask = _across(tl.where(b < B, 0, 2), tl.where(j < H, 0, 2), SWAP) < 2
    w_ptr += d * G * H * H
    w_0 = _gate_weights(w_ptr, 0, H, BLOCK_H, SWAP)
    if G > 1:
        w_1 = _gate_weights(w_ptr, 1, H, BLOCK_H, SWAP)
        w_2 = _gate_weights(w_ptr, 2, H, BLOCK_H, SWAP)
    if G > 3:
        w_3 = _gate_weights(w_ptr, 3, H, BLOCK_H, SWAP)
    rows = b.to(tl.int64) * D + d
    state_off = _across((d.to(tl.int64) * B + b) * H, j, SWAP)
    gates_off = _across(rows * (SLOTS * H), j, SWAP)
    out_off = _across(rows * H, j, SWAP)
    dtype = gates_ptr.dtype.element_ty
    backwards = REVERSE or d == 1
    last = tl.where(backwards, 0, T - 1).to(tl.int64)
    dh = tl.zeros(mask.shape, dtype=tl.float32)
    if dhn_ptr is not None:
        dh = tl.load(dhn_ptr + state_off, mask=mask, other=0.0).to(tl.float32)
    if CELL == "lstm":
        dc = tl.zeros(mask.shape, dtype=tl.float32)
        if dcn_ptr is not None:
            dc = tl.load(dcn_ptr + state_off, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(cells_ptr + last * B * (D * H) + out_off, mask=mask, other=0.0).to(tl.float32)
    for step in range(0, T):
        t = tl.where(backwards, step, T - 1 - step).to(tl.int64)
        before = tl.where(backwards, t + 1, t - 1)
        is_first = step == T - 1
        gates_t = gates_ptr + t * B * (D * SLOTS * H)
        if H < BLOCK_H:
            dh = tl.where(_across(b * 0, j, SWAP) < H, dh, 0.0)  # an infinite gradient makes NaN of the zero weights
        if dout_ptr is not None:
            dh += tl.load(dout_ptr + t * B * (D * H) + out_off, mask=mask, other=0.0).to(tl.float32)
        if G == 1:
            h = tl.load(out_ptr + t * B * (D * H) + out_off, mask=mask, other=0.0).to(tl.float32)
            if CELL == "tanh":
                da_0 = dh * (1.0 - h * h)
            else:
                da_0 = tl.where(h <= 0.0, 0.0, dh)
            dh = _times(w_0, da_0, tl.zeros_like(dh), SWAP, PRECISION)
        else:
            a_0 = tl.load(gates_t + gates_off, mask=mask, other=0.0).to(tl.float32)
            a_1 = tl.load(gates_t + H + gates_off, mask=mask, other=0.0).to(tl.float32)
            a_2 = tl.load(gates_t + 2 * H + gates_off, mask=mask, other=0.0).to(tl.float32)
            a_3 = tl.load(gates_t + 3 * H + gates_off, mask=mask, other=0.0).to(tl.float32)
            between = only_if(mask, is_first == 0)
            first = only_if(mask, is_first)
            if CELL == "gru":
                h = tl.load(out_ptr + before * B * (D * H) + out_off, mask=between, other=0.0).to(tl.float32)
                h += tl.load(h0_ptr + state_off, mask=first, other=0.0).to(tl.float32)
                r, z = sigmoid(a_1), sigmoid(a_2)
                n = tanh(a_0 + r * a_3)
                da_0 = dh * (1.0 - z) * (1.0 - n * n)
                da_1 = da_0 * a_3 * r * (1.0 - r)
                da_2 = dh * (h - n) * z * (1.0 - z)
                da_3 = da_0 * r
                dh = _times(w_0, da_1, dh * z, SWAP, PRECISION)
                dh = _times(w_1, da_2, dh, SWAP, PRECISION)
                dh = _times(w_2, da_3, dh, SWAP, PRECISION)
            else:
                if dcells_ptr is not None:
                    dc += tl.load(dcells_ptr + t * B * (D * H) + out_off, mask=mask, other=0.0).to(tl.float32)
                i, f, g, o = sigmoid(a_0), sigmoid(a_1), tanh(a_2), sigmoid(a_3)
                tanh_c = tanh(c)
                dc += dh * o * (1.0 - tanh_c * tanh_c)
                c = tl.load(cells_ptr + before * B * (D * H) + out_off, mask=between, other=0.0).to(tl.float32)
                c += tl.load(c0_ptr + state_off, mask=first, other=0.0).to(tl.float32)
                da_0 = dc * g * i * (1.0 - i)
                da_1 = dc * c * f * (1.0 - f)
                da_2 = dc * i * (1.0 - g * g)
                da_3 = dh * tanh_c * o * (1.0 - o)
                dc = dc * f
                dh = _times(w_0, da_0, tl.zeros_like(dh), SWAP, PRECISION)
                dh = _times(w_1, da_1, dh, SWAP, PRECISION)
                dh = _times(w_2, da_2, dh, SWAP, PRECISION)
                dh = _times(w_3, da_3, dh, SWAP, PRECISION)
            tl.store(gates_t + H + gates_off, narrow(da_1, dtype), mask=mask)
            tl.store(gates_t + 2 * H + gates_off, narrow(da_2, dtype), mask=mask)
            tl.store(gates_t + 3 * H + gates_off, narrow(da_3, dtype), mask=mask)
        tl.store(gates_t + gates_off, narrow(da_0, dtype), mask=mask)
    tl.store(dh0_ptr + state_off, narrow(dh, dtype), mask=mask)
    if CELL == "lstm":
        tl.store(dc0_ptr + state_off, narrow(dc, dtype), mask=mask)


# --- launchers -------------------------------------------------------------------------------------------------------


class RnnProblem(NamedTuple):
    """One layer over one sequence. ``cell``: "tanh", "relu", "gru" or "lstm"; ``saves``: is there a backward?"""

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
        """Once over the memory bus, but for the weights."""
        cells = self.cell == "lstm" and self.saves
        return float(self.T * self.B * self.directions * self.H * (GATES[self.cell] + 1 + cells) * self.dtype.itemsize)

    def backward_bytes(self) -> float:
        slots = SLOTS[self.cell]
        moved = 2 * slots + 2 if slots > 1 else 3
        return float(self.T * self.B * self.directions * self.H * moved * self.dtype.itemsize)


def _programs(p: RnnProblem, config: Config) -> int:
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
    """All tensors are contiguous; shapes at the head of the kernel."""
    args = {
        "x_ptr": x, "w_ptr": w_hh, "bn_ptr": b_n, "h0_ptr": h0, "c0_ptr": c0, "out_ptr": out, "hn_ptr": hn,
        "cn_ptr": cn, "cells_ptr": cells, "T": p.T, "B": p.B,
    }  # fmt: skip
    constants = _constants(p, config, reverse)
    return [Launch(_rnn_kernel, _programs(p, config), args, constants, config.num_warps, config.num_stages)]


def plan_backward(
    p: RnnProblem, config: Config, gates: torch.Tensor, w_hh: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor | None,
    out: torch.Tensor, cells: torch.Tensor | None, dout: torch.Tensor | None, dhn: torch.Tensor | None,
    dcn: torch.Tensor | None, dcells: torch.Tensor | None, dh0: torch.Tensor, dc0: torch.Tensor | None,
    *, reverse: bool = False,
) -> list[Launch]:  # fmt: skip
    args = {
        "gates_ptr": gates, "w_ptr": w_hh, "h0_ptr": h0, "c0_ptr": c0, "out_ptr": out, "cells_ptr": cells,
        "dout_ptr": dout, "dhn_ptr": dhn, "dcn_ptr": dcn, "dcells_ptr": dcells, "dh0_ptr": dh0, "dc0_ptr": dc0,
        "T": p.T, "B": p.B,
    }  # fmt: skip
    constants = _constants(p, config, reverse)
    return [Launch(_rnn_backward_kernel, _programs(p, config), args, constants, config.num_warps, config.num_stages)]


# --- configs ---------------------------------------------------------------------------------------------------------

CONFIGS = tuple(
    Config(BLOCK_B=b, SWAP=swap, num_warps=warps, num_stages=1)
    for b in (16, 32, 64)
    for swap in (0, 1)
    for warps in (1, 2, 4, 8, 16)
)
CLOCK_GHZ = 1.7
STEP_CLOCKS = 500  # of a step that does nothing: barriers, and the latencies of load, product and exponential in a row


def _features(p: RnnProblem) -> dict[str, int | str]:
    return {
        "cell": p.cell, "B": p.B, "H": p.H, "directions": str(p.directions),
        "dtype": dtype_name(p.dtype), "precision": p.precision, "saves": str(int(p.saves)),
    }  # fmt: skip


def smem_bytes(p: RnnProblem, block_b: int) -> int:
    """The weights, and the state on its way to the other operand's layout. tf32x3 keeps a high and a low part."""
    weights = GATES[p.cell] * p.block_h**2 * p.dtype.itemsize
    return weights * (2 if p.precision == "tf32x3" else 1) + block_b * p.block_h * 4


def _accepts(p: RnnProblem, config: Config, device: DeviceSpec, untransposed: int) -> bool:
    """All weights on the chip, 16 bytes a thread in each load, and a thread's share of a few tiles in its registers."""
    tile = config.BLOCK_B * p.block_h
    if smem_bytes(p, config.BLOCK_B) > device.smem_kb * 1024 or config.BLOCK_B > max(16, 2 * p.B):
        return False
    threads = config.num_warps * device.warp_size
    if tile < threads * 16 // p.dtype.itemsize and config.num_warps > (1 if device.is_amd else 2):
        return False
    if device.is_amd:
        # A warp multiplies tiles of 16 x 16 or 32 x 32: more warps than tiles repeat the work, and spill.
        side = 16 if config.BLOCK_B == 16 else 32
        return config.num_warps * side**2 <= max(tile, 256) and GATES[p.cell] * tile <= 64 * threads
    if p.precision == "ieee" and not device.is_amd and p.block_h >= 64:
        # The fp32 pipes take their operands from registers: few of them, and read as they lie, or they spill.
        most = 112**2 if device.target == "sm_100" and p.cell == "lstm" else 128**2
        return config.SWAP == untransposed and GATES[p.cell] * p.block_h**2 <= most
    return GATES[p.cell] * tile <= 80 * threads


def _forward_accepts(p: RnnProblem, config: Config, device: DeviceSpec) -> bool:
    return _accepts(p, config, device, untransposed=1)


def _backward_accepts(p: RnnProblem, config: Config, device: DeviceSpec) -> bool:
    return _accepts(p, config, device, untransposed=0)


def fits(p: RnnProblem, device: DeviceSpec) -> bool:
    """Can one program hold the layer's weights?"""
    return any(_forward_accepts(p, config, device) for config in CONFIGS)


def _estimate(p: RnnProblem, config: Config, device: DeviceSpec, elementwise: int, dram_bytes: float) -> Estimate:
    """T times one step of a program: weights out of shared memory, products, gates; all programs at once if there are
    as many multiprocessors."""
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
    waves = cost.cdiv(_programs(p, config), device.sms)
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


def _forward_moved(p: RnnProblem, config: Config) -> float:
    return p.forward_bytes() + _weight_bytes(p, config) + _state_bytes(p)


def _backward_moved(p: RnnProblem, config: Config) -> float:
    return p.backward_bytes() + _weight_bytes(p, config) + _state_bytes(p)


def _weight_bytes(p: RnnProblem, config: Config) -> float:
    """Each program loads all weights of its direction."""
    return float(_programs(p, config) * GATES[p.cell] * p.H**2 * p.dtype.itemsize)


def _state_bytes(p: RnnProblem) -> float:
    """The first and the last h, and LSTM's c."""
    return float(2 * p.directions * p.B * p.H * p.dtype.itemsize * (2 if p.cell == "lstm" else 1))


def _product_rows(p: RnnProblem) -> int:
    """A tile has 16 sequences and up, and the hidden units: mma.sync and the larger units both serve."""
    return 16


def _due_load_bytes(p: RnnProblem) -> int:
    """8 bytes a load for 16-bit states of eights, where a tile has that much for every thread of two warps."""
    return 8 if p.dtype.itemsize == 2 and p.H % 8 == 0 and p.block_h >= 64 else 0


FORWARD = register(
    Tunable(
        "rnn", CONFIGS, _features, _forward_accepts, _forward_estimate, _forward_launches,
        moved_bytes=_forward_moved, product_rows=_product_rows, due_load_bytes=_due_load_bytes,
    )
)  # fmt: skip
BACKWARD = register(
    Tunable(
        "rnn_backward", CONFIGS, _features, _backward_accepts, _backward_estimate, _backward_launches,
        moved_bytes=_backward_moved, product_rows=_product_rows, due_load_bytes=_due_load_bytes,
    )
)  # fmt: skip


# --- calls -----------------------------------------------------------------------------------------------------------


def _dense(*tensors: torch.Tensor | None) -> list[Any]:
    return [None if t is None else readable(t, dense=True) for t in tensors]


def run_forward(
    p: RnnProblem, x: torch.Tensor, w_hh: torch.Tensor, b_n: torch.Tensor | None, h0: torch.Tensor,
    c0: torch.Tensor | None, *, reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """``(out [T, B, D * H], h_n [D, B, H], c_n [D, B, H], cells [T, B, D * H])``; the last two for LSTM only."""
    x, w_hh, b_n, h0, c0 = _dense(x, w_hh, b_n, h0, c0)
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
    """Overwrites ``gates``, contiguous, with the gradients of its entries; ``(dh0, dc0)``. ``grads`` are those of out,
    h_n, c_n and cells."""
    w_hh, h0, c0, out, cells, *grads = _dense(w_hh, h0, c0, out, cells, *grads)
    dh0 = torch.empty_like(h0)
    dc0 = None if c0 is None else torch.empty_like(c0)
    launch(BACKWARD, plan_backward, p, gates, w_hh, h0, c0, out, cells, *grads, dh0, dc0, reverse=reverse)
    return dh0, dc0
