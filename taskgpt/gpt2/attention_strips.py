"""Attention of one head in one pass over strips of scores, which never leave the first caches: for products of our own.

Forward, for each block of queries, strips of keys go by (Milakov and Gimelshein 2018; Dao et al. 2022):

    scores.T = K @ Q.T                          a row for each key, so that the lanes of a vector are queries
    largest, total, scores -> probabilities     a largest score that grows makes what was summed before it smaller
    out += probabilities @ V

Backward, for each block of keys, strips of queries go by, from the block's own on:

    scores = Q @ K.T, slopes = dOut @ V.T       the lanes of a vector are keys
    scores -> probabilities, slopes -> gradients of the scores
    dV += probabilities.T @ dOut, dK += slopes.T @ Q, dQ += slopes @ K

What the products read is packed once: K and V of the head forward, Q and dOut backward, the other two block by block. On the diagonal,
only groups of GRAIN queries by GRAIN keys of which some are seen are computed.

Strips of keys begin at multiples of STRIP, and every sum of a strip, or of a whole gradient, is one chain in the order of positions: the
bits of a row of the output depend neither on the block that it is in nor on which rows are computed with it.
"""

import math

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.lib.stride_tricks import as_strided

from taskgpt.gpt2.vector_math import power_of_2, row_sum
from taskgpt.products import OWN_FP32
from taskgpt.products.packed import GRAIN, elements, even_part, multiply, pack_columns, pack_rows
from taskgpt.products.vectors import constant, fma, spread
from taskgpt.tasks import dense

COLUMNS = 64  # of a strip, at most
STRIP = 128  # rows of a strip: its scores are 32 KiB; 64 and 256 are slower
_f = np.float32
_ZERO, _ONE, _MASKED = _f(0), _f(1), _f(-np.inf)


@numba.njit(nogil=True, error_model="numpy")
def forward(way, atty, att_max, att_rsum, q, k, v, scale, packed, blocks, turned, strips, statistics):
    """Compute one head: atty (T, head size) and statistics (T) of q (T, head size), k and v (S, head size), the queries being the last T.

    The head size is a multiple of GRAIN. Working memory: packed (2, S, head size or more), blocks (COLUMNS, the same), turned (the same,
    COLUMNS), strips (2 * STRIP * COLUMNS), statistics (3 * COLUMNS).
    """
    queries, keys, size = q.shape[0], k.shape[0], q.shape[1]
    depth = elements(way, size)
    k_rows, v_columns = _matrix(packed[0], keys, depth), _matrix(packed[1], elements(way, keys), size)
    sums, scores, pairs = _matrix(blocks, COLUMNS, size), _strip(strips, 0, COLUMNS), _strip(strips, 1, COLUMNS)
    largest, total, factors = statistics[:COLUMNS], statistics[COLUMNS : 2 * COLUMNS], statistics[2 * COLUMNS :]
    pack_rows(way, k_rows, k)
    pack_columns(way, v_columns, v, 0)
    grains = -(-queries // GRAIN)
    parts = -(-grains * GRAIN // COLUMNS)
    for part in range(parts):
        start, width = even_part(part, parts, grains, GRAIN)
        count = min(width, queries - start)
        first = keys - queries + start  # position of the block's first query
        seen = first + count
        q_columns = _matrix(turned, depth, width)
        pack_columns(way, q_columns, q[start : start + count], 1)
        for j in range(width):
            largest[j], total[j] = _MASKED, _ZERO
        for s in range(0, seen, STRIP):
            rows = min(STRIP, seen - s)
            for group in range(0, width, GRAIN):  # of queries, with the keys that they see and no group before them does
                low, high = _keys_from(group, first, s, rows, width), _keys_from(group + GRAIN, first, s, rows, width)
                multiply(way, scores[low:high, group:width], k_rows[s + low :], 0, q_columns[:, group:], 0)
                for t in range(low, high):
                    for j in range(group, min(s + t - first, width)):
                        scores[t, j] = _MASKED
                here = slice(group, group + GRAIN)
                at = scores.ctypes.data + 4 * group
                _online_softmax(at, high, scale, largest[here].ctypes.data, total[here].ctypes.data, factors[here].ctypes.data)
            if s > 0:
                for j in range(count):
                    row, factor = dense(sums[j]), factors[j]
                    for c in range(size):
                        row[c] *= factor
            p = scores
            if way != OWN_FP32:
                p = pairs
                pack_columns(way, pairs[:, :width], scores[:rows, :width], 0)
            for group in range(0, width, GRAIN):
                low, high = _keys_from(group, first, s, rows, width), _keys_from(group + GRAIN, first, s, rows, width)
                if low < high:
                    of_v = v_columns[elements(way, s + low) : elements(way, s + high)]
                    multiply(way, sums[group:count], p[elements(way, low) :, group:], 1, of_v, 1 if s + low > 0 else 0)
        for j in range(count):
            att_max[start + j], att_rsum[start + j] = largest[j], _ONE / total[j]
            row, out, factor = dense(sums[j]), dense(atty[start + j]), att_rsum[start + j]
            for c in range(size):
                out[c] = row[c] * factor


@numba.njit(nogil=True, error_model="numpy")
def _keys_from(group, first, s, rows, width):
    """Return where, in a strip of so many keys from s, those begin that the block's queries from `group` on see and no query before does.

    `first`: the position of the block's first query. Even, for pairs of bfloat16: a key more may be among those of the group before.
    """
    if group == 0:
        return 0
    return rows if group >= width else max(0, min(rows, (first + group + 1) // 2 * 2 - s))


@numba.njit(nogil=True, error_model="numpy")
def backward(way, dq, dk, dv, datty, atty, q, k, v, att_max, att_rsum, scale, pairs, packed, blocks, turned, strips, statistics):
    """Compute the gradients of one head, all tiles (T, head size), from what `forward` wrote.

    The head size is a multiple of GRAIN. Working memory: pairs (head size or more), packed (5, T, the same), blocks (3, COLUMNS, the same),
    turned (2, the same, COLUMNS), strips (5 * STRIP * COLUMNS), statistics (T, 3).
    """
    length, size = q.shape
    depth = elements(way, size)
    q_rows, d_rows = _matrix(packed[0], length, depth), _matrix(packed[1], length, depth)
    pack_rows(way, q_rows, q)
    pack_rows(way, d_rows, datty)
    q_columns, d_columns = q_rows, d_rows
    if way != OWN_FP32:
        q_columns, d_columns = _matrix(packed[2], elements(way, length), size), _matrix(packed[3], elements(way, length), size)
        pack_columns(way, q_columns, q, 0)
        pack_columns(way, d_columns, datty, 0)
    for r in range(length):
        d_row, y_row = dense(datty[r]), dense(atty[r])
        for c in range(size):
            pairs[c] = d_row[c] * y_row[c]
        statistics[r, 0], statistics[r, 1], statistics[r, 2] = att_max[r], att_rsum[r], row_sum(pairs[:size])
    dq_sums, dk_sums, dv_sums = _matrix(packed[4], length, size), _matrix(blocks[0], COLUMNS, size), _matrix(blocks[1], COLUMNS, size)
    scores, slopes = _strip(strips, 0, COLUMNS), _strip(strips, 1, COLUMNS)
    p_pairs, ds_pairs, ds_row_pairs = _strip(strips, 2, COLUMNS), _strip(strips, 3, COLUMNS), _strip(strips, 4, COLUMNS // 2)
    grains = -(-length // GRAIN)
    parts = -(-grains * GRAIN // COLUMNS)
    for part in range(parts):
        start, width = even_part(part, parts, grains, GRAIN)
        count = min(width, length - start)
        k_columns, v_columns = _matrix(turned[0], depth, width), _matrix(turned[1], depth, width)
        k_steps = _matrix(blocks[2], elements(way, count), size)
        pack_columns(way, k_columns, k[start : start + count], 1)
        pack_columns(way, v_columns, v[start : start + count], 1)
        pack_columns(way, k_steps, k[start : start + count], 0)
        dk_sums[...] = _ZERO
        dv_sums[...] = _ZERO
        s = start
        while s < length:
            # The first strips are GRAIN rows each, up to where all rows see the whole block.
            wide = min(width, s - start + GRAIN)
            rows, reach = min(STRIP if wide == width else GRAIN, length - s), min(count, wide)
            multiply(way, scores[:rows, :wide], q_rows[s:], 0, k_columns, 0)
            multiply(way, slopes[:rows, :wide], d_rows[s:], 0, v_columns, 0)
            for r in range(s, min(s + rows, start + width)):
                for j in range(r - start + 1, wide):
                    scores[r - s, j] = _MASKED
            of_rows = statistics[s:]
            _gradients(scores.ctypes.data, slopes.ctypes.data, rows, wide, scale, of_rows.ctypes.data, of_rows.strides[0] // 4)
            p, ds, ds_rows = scores, slopes, slopes
            if way != OWN_FP32:
                p, ds, ds_rows = p_pairs, ds_pairs, ds_row_pairs
                pack_columns(way, p[:, :wide], scores[:rows, :wide], 0)
                pack_columns(way, ds[:, :wide], slopes[:rows, :wide], 0)
                # As one row: two of them are a whole number of vectors.
                together = -(-rows // 2) * 2 * COLUMNS
                pack_rows(way, strips[4 * STRIP * COLUMNS :].reshape(1, -1), slopes.reshape(1, -1)[:, :together])
            here = slice(elements(way, s), elements(way, s + rows))
            multiply(way, dv_sums[:reach], p, 1, d_columns[here], 1)
            multiply(way, dk_sums[:reach], ds, 1, q_columns[here], 1)
            multiply(way, dq_sums[s : s + rows], ds_rows, 0, k_steps[: elements(way, reach)], 1 if start > 0 else 0)
            s += rows
        _copy(dk[start : start + count], dk_sums)
        _copy(dv[start : start + count], dv_sums)
    _copy(dq, dq_sums)


@numba.njit(nogil=True, error_model="numpy")
def _matrix(memory, rows, columns):
    """Return the beginning of working memory as a matrix, whose rows touch each other if those of the memory do."""
    apart = 4 * columns if memory.strides[0] == 4 * memory.shape[1] else memory.strides[0]
    return as_strided(memory, (rows, columns), (apart, 4))


@numba.njit(nogil=True, error_model="numpy")
def _strip(strips, number, columns):
    """Return one of several strips."""
    return strips[number * STRIP * COLUMNS :][: STRIP * columns].reshape(STRIP, columns)


@numba.njit(nogil=True, error_model="numpy")
def _copy(tile, rows):
    """Fill a tile with as many of the rows."""
    for r in range(tile.shape[0]):
        to, row = dense(tile[r]), dense(rows[r])
        for c in range(to.shape[0]):
            to[c] = row[c]


# On registers --------------------------------------------------------------------------------------------------------------------------
#
# Vectors of GRAIN float32; where registers are narrower, LLVM takes several.

_SIZE, _VECTOR = ir.IntType(64), ir.VectorType(ir.FloatType(), GRAIN)


@intrinsic
def _online_softmax(typing_context, scores, rows, scale, largest, total, factor):
    """GRAIN columns of scores = exp(scores * scale - the largest of them in the column); addresses, rows are COLUMNS apart.

    `largest` and `total` of what came before become those of all; `factor` is what the sums that were before are to be multiplied by.
    """

    def codegen(context, build, signature, args):
        scores, rows, scale, *statistics = args
        scale, log2_e = spread(build, scale, GRAIN), _constant(math.log2(math.e))
        largest, total, factor = (_at(build, address) for address in statistics)
        highest, sums = cgutils.alloca_once(build, _VECTOR), cgutils.alloca_once(build, _VECTOR)

        def of_row(row):
            return _at(build, scores, build.mul(row, _SIZE(COLUMNS)))

        build.store(_constant(-np.inf), highest)
        done = _SIZE(0)
        for times in (4, 1):  # rows at a time: one after another, each would wait for the one before
            stop = build.and_(rows, _SIZE(-times))
            with cgutils.for_range_slice(build, done, stop, _SIZE(times), _SIZE) as (row, _):
                found = [_load(build, of_row(build.add(row, _SIZE(ahead)))) for ahead in range(times)]
                while len(found) > 1:
                    found = [_larger(build, a, b) for a, b in zip(found[::2], found[1::2], strict=True)]
                build.store(_larger(build, found[0], build.load(highest)), highest)
            done = stop
        before = _load(build, largest)
        now = _larger(build, build.fmul(build.load(highest), scale), before)
        shrunk = power_of_2(build, build.fmul(build.fsub(before, now), log2_e))
        scale_of_2, minus_now = build.fmul(scale, log2_e), build.fneg(build.fmul(now, log2_e))
        build.store(_constant(0), sums)
        with cgutils.for_range(build, rows) as loop:
            place = of_row(loop.index)
            p = power_of_2(build, fma(build, _load(build, place), scale_of_2, minus_now))
            build.store(p, place, align=4)
            build.store(build.fadd(build.load(sums), p), sums)
        build.store(fma(build, _load(build, total), shrunk, build.load(sums)), total, align=4)
        build.store(now, largest, align=4)
        build.store(shrunk, factor, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2, types.float32, *[types.int64] * 3), codegen


@intrinsic
def _gradients(typing_context, scores, slopes, rows, width, scale, statistics, apart):
    """Make of scores probabilities, and of the gradients of those the ones of the scores; both (rows, width), rows COLUMNS apart.

    `statistics`: for each row, `apart` floats from the one before, its largest score, 1 / the sum, and the mean slope.
    """

    def codegen(context, build, signature, args):
        scores, slopes, rows, width, scale, statistics, apart = args
        scale, log2_e = spread(build, scale, GRAIN), _constant(math.log2(math.e))
        scale_of_2 = build.fmul(scale, log2_e)
        with cgutils.for_range(build, rows) as loop:
            places = [_at(build, statistics, build.mul(apart, loop.index), _SIZE(i), kind=ir.FloatType()) for i in range(3)]
            largest, factor, mean = (spread(build, _load(build, place), GRAIN) for place in places)
            minus_largest, first = build.fneg(build.fmul(largest, log2_e)), build.mul(loop.index, _SIZE(COLUMNS))
            with cgutils.for_range_slice(build, _SIZE(0), width, _SIZE(GRAIN), _SIZE) as (column, _):
                score, slope = (_at(build, address, first, column) for address in (scores, slopes))
                p = build.fmul(power_of_2(build, fma(build, _load(build, score), scale_of_2, minus_largest)), factor)
                build.store(p, score, align=4)
                build.store(build.fmul(build.fmul(p, build.fsub(_load(build, slope), mean)), scale), slope, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.float32, *[types.int64] * 2), codegen


def _at(build: ir.IRBuilder, address: ir.Value, *floats: ir.Value, kind: ir.Type = _VECTOR) -> ir.Value:
    """Return a pointer to what begins so many float32 behind an address."""
    for count in floats:
        address = build.add(address, build.mul(count, _SIZE(4)))
    return build.inttoptr(address, kind.as_pointer())


def _load(build: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    return build.load(pointer, align=4)


def _constant(x: float) -> ir.Constant:
    return constant(_VECTOR, float(_f(x)))


def _larger(build: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return build.select(build.fcmp_ordered(">", a, b), a, b)
