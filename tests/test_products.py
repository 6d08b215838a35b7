"""Products of our own are right for every shape, and their bits depend on the operands alone."""

import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from llvmlite import binding
from numpy.lib.stride_tricks import as_strided

from taskgpt.errors import UserError
from taskgpt.products import BLAS, OWN_BF16, OWN_FP32, WORK, described, operand, product, verify_callers, way_for
from taskgpt.products.blocks import multiplier
from taskgpt.products.instruction_sets import AVX2, AVX512, AVX512_BF16, NEON, instruction_set_for, of_this_machine
from taskgpt.products.machine_code import MachineCode, features_for, module_for
from taskgpt.products.micro_kernels import BFLOAT16, FLOAT32
from taskgpt.products.packed import GRAIN, packed_products
from taskgpt.tasks.sources import Sources

pytestmark = pytest.mark.skipif(of_this_machine() is None, reason="no vector instructions that products of our own are written for")
WAYS = {"fp32": OWN_FP32, "bf16": OWN_BF16}
# What this machine can run: LLVM makes vectors of any length out of those that it has.
SETS = {each.name: each for each in (AVX512, AVX2, NEON)}
SOME = [(1, 1, 1), (8, 48, 384), (9, 49, 385), (64, 64, 64), (600, 50, 7), (33, 100, 900), (5, 16, 1000), (513, 17, 33)]


@cache
def code_for(instructions) -> MachineCode:
    return MachineCode(instructions)


@cache
def multiply_with(instructions, precision):
    """Compiling takes seconds: once for all tests."""
    return multiplier(code_for(instructions), precision)


def case(shape, transpose_a, transpose_b, seed=0, gap=3):
    """Return (c, a, b): tiles inside larger arrays, whose other elements are NaN."""
    M, N, K = shape
    rng = np.random.default_rng([seed, *shape, transpose_a, transpose_b])
    tiles = []
    for rows, columns in ((M, N), (K, M) if transpose_a else (M, K), (N, K) if transpose_b else (K, N)):
        whole = np.full((rows + 2, columns + gap), np.nan, np.float32)
        tile = whole[1 : 1 + rows, 1 : 1 + columns] if gap else whole[1 : 1 + rows]
        tile[...] = rng.standard_normal((rows, columns))
        tiles.append(tile)
    return tiles


def work() -> np.ndarray:
    return np.full(WORK, np.nan, np.float32)


def op(x, is_transposed):
    return x.T if is_transposed else x


def is_right(way, shape, transpose_a, transpose_b, adds, gap=3) -> bool:
    """Compare a product with float64, the operands rounded as it rounds them; what lies around C must be as it was."""
    c, a, b = case(shape, transpose_a, transpose_b, gap=gap)
    a64, b64 = (op(operand(way, x).astype(np.float64), t) for x, t in ((a, transpose_a), (b, transpose_b)))
    wanted = a64 @ b64 + (c if adds else 0)
    product(way, c, a, b, transpose_a, transpose_b, adds, work())
    around = c.base.copy()
    around[1 : 1 + c.shape[0], bool(gap) : bool(gap) + c.shape[1]] = np.nan
    rounding = 2.0**-23 * (shape[2] + 2) * (abs(a64) @ abs(b64) + abs(wanted))
    return bool((abs(c - wanted) <= rounding).all()) and bool(np.isnan(around).all())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("adds", [0, 1])
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_products_are_right(way, adds, transposed):
    """All four transpositions, 60 of all shapes from 1 to 100, and shapes of more than one block."""
    rng = np.random.default_rng([way, adds, *transposed])
    for shape in [*rng.integers(1, 101, (60, 3)).tolist(), *SOME]:
        assert is_right(way, shape, *transposed, adds), shape


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_rows_that_fall_on_one_another_are_right(way):
    """Distances that are multiples of a page are read another way."""
    assert is_right(way, (20, 50, 1024), 0, 1, 0, gap=0)
    assert is_right(way, (20, 1024, 50), 0, 0, 1, gap=0)
    assert is_right(way, (1024, 20, 50), 1, 0, 0, gap=0)


@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_bits_do_not_depend_on_tiles_nor_on_instructions(transposed):
    """In float32, a sum is one chain in the order of K, however the product is cut, and whatever the vectors hold."""
    ta, tb = transposed
    c, a, b = case((70, 110, 900), ta, tb)
    product(OWN_FP32, c, a, b, ta, tb, 0, work())
    again = np.zeros_like(c)
    for k in range(0, 900, 130):
        for m in range(0, 70, 13):
            for n in range(0, 110, 37):
                part_a = a[k : k + 130, m : m + 13] if ta else a[m : m + 13, k : k + 130]
                part_b = b[n : n + 37, k : k + 130] if tb else b[k : k + 130, n : n + 37]
                product(OWN_FP32, again[m : m + 13, n : n + 37], part_a, part_b, ta, tb, int(k > 0), work())
    assert np.array_equal(again, c)
    for instructions in SETS.values():
        again[...] = np.nan
        multiply_with(instructions, FLOAT32)(again, a, b, ta, tb, 0, work())
        assert np.array_equal(again, c), instructions


def test_a_chain_is_what_numpy_adds_one_by_one():
    """c = fma(a[k], b[k], c) for k = 0, 1, 2...: with exact products, the same as rounding after each sum."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-999, 999, (3, 500)).astype(np.float32), rng.integers(-999, 999, (500, 4)).astype(np.float32) / 7
    b = operand(OWN_BF16, b)  # 8 bits times 10 bits are exact in 24
    wanted, c = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    for k in range(500):
        wanted += a[:, k, None] * b[k]
    product(OWN_FP32, c, a, b, 0, 0, 0, work())
    assert np.array_equal(c, wanted)


@pytest.mark.parametrize("instructions", SETS.values(), ids=SETS)
def test_bfloat16_without_its_instruction_is_right(instructions):
    """Two multiply-adds take its place."""
    multiply = multiply_with(instructions, BFLOAT16)
    for transposed in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for shape in SOME:
            c, a, b = case(shape, *transposed)
            wanted = op(operand(OWN_BF16, a), transposed[0]).astype(np.float64) @ op(operand(OWN_BF16, b), transposed[1])
            multiply(c, a, b, *transposed, 0, work())
            assert np.allclose(c, wanted, atol=1e-6 * shape[2], rtol=1e-5), (transposed, shape)


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("instructions", SETS.values(), ids=SETS)
def test_packed_operands_are_multiplied_as_those_that_are_not(instructions, precision):
    """Rows by columns and columns by columns, with whatever is left over of tiles, of pairs, and of the GRAIN of columns."""
    rows_of, columns_of, multiply_packed = packed_products(code_for(instructions), precision)
    for M, N, K in [(1, 1, 1), (8, 48, 64), (13, 50, 33), (64, 64, 129), (40, 100, 48)]:
        c, a, b = case((M, N, K), 0, 0)
        multiply_with(instructions, precision)(c, a, b, 0, 0, 0, work())
        steps, columns, rows = K if precision == FLOAT32 else -(-K // 2), -(-N // GRAIN) * GRAIN, -(-M // GRAIN) * GRAIN
        a_rows, a_columns, b_columns, again = (
            np.full((n, m + 5), np.nan, np.float32)[:, :m] for n, m in ((M, steps), (steps, rows), (steps, columns), (M, columns))
        )
        rows_of(a_rows, a)
        columns_of(a_columns, a, 1)
        columns_of(b_columns, np.ascontiguousarray(b.T), 1)
        for packed, is_transposed in ((a_rows, 0), (a_columns, 1)):
            multiply_packed(again, packed, is_transposed, b_columns, 0)
            assert np.array_equal(again[:, :N], c)
            assert not again[:, N:].any()
            multiply_packed(again, packed, is_transposed, b_columns, 1)
            assert np.allclose(again[:, :N], 2 * c, rtol=1e-4, atol=1e-4)
        columns_of(b_columns, b, 0)
        multiply_packed(again, a_rows, 0, b_columns, 0)
        assert np.array_equal(again[:, :N], c)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_nan_and_infinity_go_where_numpy_has_them(way, transposed):
    """And nowhere else, in rows and columns at edges that are padded, with an odd K too."""
    for shape in ((13, 53, 67), (8, 48, 64)):
        for bad in (np.nan, np.inf, -np.inf):
            c, a, b = case(shape, *transposed)
            op(a, transposed[0])[shape[0] - 1, shape[2] - 1] = bad
            op(b, transposed[1])[0, shape[1] - 1] = bad
            with np.errstate(invalid="ignore"):
                wanted = op(a, transposed[0]) @ op(b, transposed[1])
            product(way, c, a, b, *transposed, 0, work())
            for kind in (np.isnan, np.isposinf, np.isneginf):
                assert np.array_equal(kind(c), kind(wanted))


def test_subnormal_numbers_are_numbers():
    """In float32 they are neither taken for 0 nor made 0."""
    tiny = np.float32(1e-40)
    c, a, b = np.zeros((9, 50), np.float32), np.full((9, 3), tiny), np.full((3, 50), 0.5, np.float32)
    product(OWN_FP32, c, a, b, 0, 0, 0, work())
    assert np.array_equal(c, np.full((9, 50), np.float32(tiny * 0.5) * 3))


def test_rounding_is_to_the_nearest_then_to_the_even():
    """A product with 1 shows what becomes of an operand: what bodies round it to."""
    bits = np.random.default_rng(0).integers(0x00800000, 0x7F000000, 4000, dtype=np.uint32)
    halves = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF808000, 0xBF818000], np.uint32)  # ties and their neighbours
    x = np.concatenate([bits, bits | np.uint32(0x80000000), halves]).view(np.float32)[None, :]
    assert [hex(b) for b in operand(OWN_BF16, halves.view(np.float32)).view(np.uint32)] == [
        "0x3f800000", "0x3f820000", "0x3f810000", "0x3f800000", "0xbf800000", "0xbf820000",
    ]  # fmt: skip
    for transposed in (0, 1):
        c, b = np.empty(x.shape, np.float32), np.ascontiguousarray(op(x, transposed))
        product(OWN_BF16, c, np.ones((1, 1), np.float32), b, 0, transposed, 0, work())
        assert np.array_equal(c, operand(OWN_BF16, x))
        d = np.empty(x.T.shape, np.float32)
        product(OWN_BF16, d, np.ascontiguousarray(op(x.T, transposed)), np.ones((1, 1), np.float32), transposed, 0, 0, work())
        assert np.array_equal(d.T, operand(OWN_BF16, x))


# What is refused, and what it is made from ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [BLAS, *WAYS.values()], ids=["blas", *WAYS])
def test_without_elements_there_is_a_product_all_the_same(way):
    """Nothing where C has none; where K is 0 the sum of nothing, as NumPy has it, or what was there."""
    for M, N, K in ((0, 5, 7), (5, 0, 7), (0, 0, 0)):
        product(way, np.empty((M, N), np.float32), np.ones((M, K), np.float32), np.ones((K, N), np.float32), 0, 0, 0, work())
    for transposed in (0, 1):
        a, b = np.empty((0, 9), np.float32), np.empty((0, 50), np.float32)
        c = np.full((9, 50), np.nan, np.float32)
        product(way, c, op(a, not transposed), op(b, transposed), transposed, transposed, 0, work())
        assert not c.any()
        c[...] = 3
        product(way, c, op(a, not transposed), op(b, transposed), transposed, transposed, 1, work())
        assert (c == 3).all()


@pytest.mark.parametrize("way", [BLAS, *WAYS.values()], ids=["blas", *WAYS])
@pytest.mark.parametrize("far", [0, 4, -4, 2048, 1 << 40])
def test_where_the_next_row_would_be_does_not_matter_if_there_is_none(way, far):
    """Of an operand, or of C, of one row."""
    for shape, transposed in (((1, 50, 70), (0, 0)), ((1, 50, 70), (0, 1)), ((50, 70, 1), (1, 0)), ((50, 1, 70), (0, 1))):
        c, a, b = case(shape, *transposed, gap=0)
        wanted = op(operand(way, a), transposed[0]).astype(np.float64) @ op(operand(way, b), transposed[1])
        c, a, b = (as_strided(x, x.shape, (far, 4)) if len(x) == 1 else x for x in (c, a, b))
        product(way, c, a, b, *transposed, 0, work())
        assert np.allclose(c, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [BLAS, *WAYS.values()], ids=["blas", *WAYS])
def test_what_does_not_fit_is_refused(way):
    """Before anything is written beyond a tile: shapes, columns apart from each other, too little to work with."""
    c, a, b = np.zeros((8, 48), np.float32), np.ones((8, 64), np.float32), np.ones((64, 48), np.float32)
    for tiles in ((c[:7], a, b), (c[:, :9], a, b), (c, a[:, :9], b), (c, a, b[:, :9]), (c, a.T, b), (c, a, b.T)):
        with pytest.raises(ValueError, match=r"product\(\) wants c \(M, N\), op\(a\) \(M, K\)"):
            product(way, *tiles, 0, 0, 0, work())
    with pytest.raises(ValueError, match=r"work of Scratch\[WORK\]"):
        product(way, c, a, b, 0, 0, 0, work()[:-1])
    for tiles, transposed in (((c, a.T, b), (1, 0)), ((c, a, b.T), (0, 1)), ((c[:, ::2], a, b[:, :24]), (0, 0))):
        with pytest.raises(ValueError, match=r"elements of a row side by side; to transpose an operand, set its flag"):
            product(way, *tiles, *transposed, 0, work())
    assert not c.any()
    product(way, c[:, :1], a[:, ::99], b[::99, ::99], 0, 0, 0, work())  # one column, however far from the next
    assert c.sum() == 8


def test_another_micro_kernel_is_another_source(monkeypatch):
    """Its symbols have other names, and what calls them another digest: nothing that was kept is taken for it."""
    instructions = of_this_machine()
    before, digest = code_for(instructions), Sources(multiply_with(instructions, FLOAT32).py_func).digest()
    assert Sources(multiplier(MachineCode(instructions), FLOAT32).py_func).digest() == digest
    monkeypatch.setattr("taskgpt.products.micro_kernels.UNROLL", 4)
    after = MachineCode(instructions)
    assert not set(before.symbols.values()) & set(after.symbols.values())
    assert Sources(multiplier(after, FLOAT32).py_func).digest() != digest


def test_programs_that_multiply_nothing_do_not_wait_for_micro_kernels():
    """They are made when a kernel that multiplies is compiled or loaded, not at import."""
    program = (
        "import taskgpt.train, taskgpt.programs.plot\n"
        "from taskgpt.gpt2.kernels import gelu_forward, matmul_backward_input\n"
        "from taskgpt.products.machine_code import code_of_this_machine\n"
        "for kernel in None, gelu_forward, matmul_backward_input:\n"
        "    kernel and kernel.compile()\n"
        "    print(code_of_this_machine.cache_info().currsize)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split() == ["0", "0", "1"]


# Which way ------------------------------------------------------------------------------------------------------------------------------


def test_machines_get_the_best_that_they_have():
    """By the features of their processors, in LLVM's names."""
    x86 = "x86_64-unknown-linux-gnu"
    wide = {"avx2": True, "fma": True, "avx512f": True, "avx512bw": True}
    assert instruction_set_for(wide | {"avx512bf16": True}, x86) == AVX512_BF16
    assert instruction_set_for(wide, x86) == AVX512
    assert instruction_set_for({"avx2": True, "fma": True}, x86) == AVX2
    assert instruction_set_for({"avx2": True}, x86) is None
    assert instruction_set_for({}, "arm64-apple-darwin23") == NEON


def test_on_arm_they_are_fused_multiply_adds_of_vectors(capfd):
    """LLVM, which knows other processors too, takes all of it, has nothing to say, and calls nothing."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    triple = "aarch64-unknown-linux-gnu"
    module = module_for(NEON)
    module.triple = triple
    target = binding.Target.from_triple(triple).create_target_machine(cpu="generic", features=features_for(triple, "+neon"), opt=3)
    text = target.emit_assembly(binding.parse_assembly(str(module)))
    assert text.count("fmla") > 400
    assert not re.search(r"\bbl\b", text)
    assert capfd.readouterr().err == ""


def test_what_cannot_be_is_refused_and_what_can_has_words(monkeypatch):
    """BLAS has no bfloat16; a machine without vectors has BLAS."""
    assert (way_for("blas", "fp32"), way_for("own", "fp32"), way_for("own", "bf16")) == (BLAS, OWN_FP32, OWN_BF16)
    assert described(OWN_FP32) == f"own fp32, {of_this_machine()}"
    with pytest.raises(ValueError, match=r'precision = "bf16" needs products of our own: BLAS has none; set precision = "fp32"'):
        way_for("blas", "bf16")
    monkeypatch.setattr("taskgpt.products.ways.of_this_machine", lambda: None)
    assert way_for("own", "fp32") == BLAS
    with pytest.raises(ValueError, match="this machine has no AVX2, AVX-512 or NEON"):
        way_for("own", "bf16")


def test_blas_has_no_more_callers_than_it_can_bear():
    """OpenBLAS breaks beyond 128; our own products take no lock and have no such number."""
    assert verify_callers(OWN_FP32, 500) == verify_callers(BLAS, 8) == []
    assert verify_callers(BLAS, 112) == ["OpenBLAS takes one lock at every product, for which 112 workers wait"]
    with pytest.raises(UserError, match=r'129 workers: .* choose --workers 128 or less, or products = "own"'):
        verify_callers(BLAS, 129)
