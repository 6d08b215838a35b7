"""The innermost loops of a matrix product, as LLVM IR: made for an instruction set, compiled when the program starts.

An element is 32 bits wide: a float32, or a pair of bfloat16 that follow each other along the inner dimension K. So both precisions share
all that follows, and a step is one element of K.

Every sum is one chain of fused multiply-adds in the order of K, from what C held or from 0. In float32, the bits of a product therefore
depend on nothing else: neither on the register tile, nor on blocks, nor on how wide the vectors are. NaN and infinity spread as in NumPy:
of what pads an edge, nothing is added to a sum that is stored but 0 * 0.
"""

from llvmlite import ir
from numba.core import cgutils

from taskgpt.products.instruction_sets import InstructionSet
from taskgpt.products.vectors import constant, fma, shuffle, spread

FLOAT32, BFLOAT16 = "f32", "bf16"
NUMBERS = {FLOAT32: 1, BFLOAT16: 2}  # in an element
UNROLL = 2  # steps in one turn of the loop
_FLOAT, _HALF, _INT, _SIZE = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTES = 4  # of an element


def micro_kernel(module: ir.Module, name: str, instructions: InstructionSet, vectors: int, precision: str) -> ir.Function:
    """Add to a module: C (rows, vectors * lanes) = A @ B, or C += A @ B.

    Takes int64: address of A, distance of its rows, distance of its steps; address of B, distance of its steps, each of which is
    vectors * lanes elements side by side; address of C, distance of its rows; steps; rows; whether to add. Distances are in elements. With
    fewer rows than the register tile has, the last one is computed and stored again in the others' place.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_SIZE] * 10), name)
    a, a_row, a_step, b, b_step, c, c_row, steps, rows, adds = function.args
    count, vector = instructions.rows, ir.VectorType(_FLOAT, instructions.lanes)
    tile = [(i, j) for i in range(count) for j in range(vectors)]
    entry, load, begin, body, rest, tail, end = (
        function.append_basic_block(label) for label in ("entry", "load", "begin", "body", "rest", "tail", "end")
    )

    build = ir.IRBuilder(entry)
    last = build.sub(rows, _SIZE(1))
    row = [build.select(build.icmp_unsigned("<", _SIZE(i), rows), _SIZE(i), last) for i in range(count)]
    a_at = [_pointer(build, a, build.mul(r, a_row), _FLOAT) for r in row]
    c_at = {(i, j): _pointer(build, c, build.add(build.mul(row[i], c_row), _SIZE(j * instructions.lanes)), vector) for i, j in tile}
    b_at = build.inttoptr(b, _FLOAT.as_pointer())
    in_body = build.and_(steps, _SIZE(-UNROLL))
    build.cbranch(build.icmp_signed("!=", adds, _SIZE(0)), load, begin)

    build = ir.IRBuilder(load)
    held = {at: build.load(c_at[at], align=_BYTES) for at in tile}
    build.branch(begin)

    build = ir.IRBuilder(begin)
    start = {at: _phi(build, vector, (held[at], load), (constant(vector, 0.0), entry)) for at in tile}
    build.cbranch(build.icmp_signed(">", in_body, _SIZE(0)), body, rest)

    def turn(block: ir.Block, before: ir.Block, first: ir.Value, sums: dict, times: int, stop: ir.Value, after: ir.Block) -> dict:
        """Fill a loop of so many steps at a time from `first` to `stop`; return the sums."""
        build = ir.IRBuilder(block)
        step = _phi(build, _SIZE, (first, before))
        sofar = phis = {at: _phi(build, vector, (sums[at], before)) for at in tile}
        for ahead in range(times):
            k = build.add(step, _SIZE(ahead))
            b_of_k = build.gep(b_at, [build.mul(k, b_step)])
            row_b = [_vector_at(build, b_of_k, j * instructions.lanes, vector) for j in range(vectors)]
            a_of_k = build.mul(k, a_step)
            sofar = dict(sofar)
            for i in range(count):
                own = spread(build, build.load(build.gep(a_at[i], [a_of_k]), align=_BYTES), instructions.lanes)
                for j in range(vectors):
                    sofar[i, j] = _multiply_add(build, instructions, precision, own, row_b[j], sofar[i, j])
        following = build.add(step, _SIZE(times))
        step.add_incoming(following, block)
        for at in tile:
            phis[at].add_incoming(sofar[at], block)
        build.cbranch(build.icmp_signed("<", following, stop), block, after)
        return sofar

    most = turn(body, begin, _SIZE(0), start, UNROLL, in_body, rest)
    build = ir.IRBuilder(rest)
    left = {at: _phi(build, vector, (start[at], begin), (most[at], body)) for at in tile}
    build.cbranch(build.icmp_signed("<", in_body, steps), tail, end)
    done = turn(tail, rest, in_body, left, 1, steps, end)
    build = ir.IRBuilder(end)
    whole = {at: _phi(build, vector, (left[at], rest), (done[at], tail)) for at in tile}
    for at in tile:
        build.store(whole[at], c_at[at], align=_BYTES)
    build.ret_void()
    return function


def _multiply_add(build: ir.IRBuilder, instructions: InstructionSet, precision: str, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Return c + a * b, lane by lane; of pairs of bfloat16, c + the product of their first + that of their second."""
    if precision == FLOAT32:
        return fma(build, a, b, c)
    pairs = ir.VectorType(_INT, instructions.lanes)
    a, b = build.bitcast(a, pairs), build.bitcast(b, pairs)
    if instructions.has_bf16:
        # The signature of LLVM 15, which later ones translate.
        name, kind = "llvm.x86.avx512bf16.dpbf16ps.512", ir.FunctionType(c.type, [c.type, pairs, pairs])
        return build.call(cgutils.get_or_insert_function(build.module, kind, name), [c, a, b])
    # A bfloat16 is the upper half of a float32.
    sixteen, upper = (constant(pairs, value) for value in (16, 0xFFFF0000))
    for half in (lambda x: build.shl(x, sixteen), lambda x: build.and_(x, upper)):
        c = fma(build, build.bitcast(half(a), c.type), build.bitcast(half(b), c.type), c)
    return c


# Packing -------------------------------------------------------------------------------------------------------------------------------
#
# What is read is float32. Written as bfloat16, it is rounded to the nearest, of two equally near to the even one. Distances are in bytes.


def transpose(module: ir.Module, name: str, instructions: InstructionSet, precision: str) -> ir.Function:
    """Add to a module: lanes rows become columns, lanes elements of each at a time.

    Takes int64: address and distance of rows of the source; address and distance of rows of what is written; how many times.
    """
    lanes = instructions.lanes
    function, build = _function(module, name, 5)
    here, distance, there, apart, times = function.args
    wide = _SIZE(lanes * _BYTES * NUMBERS[precision])
    with cgutils.for_range(build, times) as loop:
        first = build.add(here, build.mul(loop.index, wide))
        rows = [_elements(build, instructions, build.add(first, build.mul(distance, _SIZE(i))), precision) for i in range(lanes)]
        size = 1
        while size < lanes:  # blocks of 1, 2, 4, ... elements change places across the diagonal
            swapped = list(rows)
            for i in range(lanes):
                if not i & size:
                    upper = [at if not at & size else at - size + lanes for at in range(lanes)]
                    lower = [at + size if not at & size else at + lanes for at in range(lanes)]
                    swapped[i] = shuffle(build, rows[i], rows[i + size], upper)
                    swapped[i + size] = shuffle(build, rows[i], rows[i + size], lower)
            rows, size = swapped, 2 * size
        for i, each in enumerate(rows):
            row = build.add(build.mul(loop.index, _SIZE(lanes)), _SIZE(i))
            _store(build, each, build.add(there, build.mul(apart, row)))
    build.ret_void()
    return function


def copy_rows(module: ir.Module, name: str, instructions: InstructionSet, vectors: int, precision: str) -> ir.Function:
    """Add to a module: of each step vectors * lanes elements, side by side; as bfloat16 a step is two rows, whose numbers become pairs.

    Takes int64: address and distance of rows of the source; address and distance of steps of what is written; steps.
    """
    lanes = instructions.lanes
    function, build = _function(module, name, 5)
    here, distance, there, apart, steps = function.args
    with cgutils.for_range(build, steps) as loop:
        first = build.add(here, build.mul(distance, build.mul(loop.index, _SIZE(NUMBERS[precision]))))
        to = build.add(there, build.mul(apart, loop.index))
        for j in range(vectors):
            at = build.add(first, _SIZE(j * lanes * _BYTES))
            if precision == FLOAT32:
                each = _elements(build, instructions, at, precision)
            else:
                pair = _halves(build, instructions, (at, build.add(at, distance)))
                each = shuffle(build, pair, pair, [k for i in range(lanes) for k in (i, i + lanes)])
            _store(build, each, build.add(to, _SIZE(j * lanes * _BYTES)))
    build.ret_void()
    return function


def copy_row(module: ir.Module, name: str, instructions: InstructionSet, precision: str) -> ir.Function:
    """Add to a module: elements side by side, lanes at a time. Takes int64: address, address of what is written, how many times."""
    function, build = _function(module, name, 3)
    here, there, times = function.args
    wide = _SIZE(instructions.lanes * _BYTES * NUMBERS[precision])
    with cgutils.for_range(build, times) as loop:
        each = _elements(build, instructions, build.add(here, build.mul(loop.index, wide)), precision)
        _store(build, each, build.add(there, build.mul(loop.index, _SIZE(instructions.lanes * _BYTES))))
    build.ret_void()
    return function


def _elements(build: ir.IRBuilder, instructions: InstructionSet, at: ir.Value, precision: str) -> ir.Value:
    """Read lanes elements, side by side at an address."""
    pairs = ir.VectorType(_INT, instructions.lanes)
    if precision == BFLOAT16:
        return build.bitcast(_halves(build, instructions, (at, build.add(at, _SIZE(instructions.lanes * _BYTES)))), pairs)
    return build.load(build.inttoptr(at, pairs.as_pointer()), align=_BYTES)


def _halves(build: ir.IRBuilder, instructions: InstructionSet, places: tuple[ir.Value, ir.Value]) -> ir.Value:
    """Read lanes numbers at each of two addresses as bfloat16; return the first ones and behind them the second."""
    lanes, numbers = instructions.lanes, ir.VectorType(_FLOAT, instructions.lanes)
    read = [build.load(build.inttoptr(at, numbers.as_pointer()), align=_BYTES) for at in places]
    if instructions.has_bf16:
        name, kind = "llvm.x86.avx512bf16.cvtne2ps2bf16.512", ir.FunctionType(ir.VectorType(_HALF, 2 * lanes), [numbers] * 2)
        return build.call(cgutils.get_or_insert_function(build.module, kind, name), read[::-1])
    return shuffle(build, *(_rounded(build, each) for each in read), list(range(2 * lanes)))


def _rounded(build: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Return float32 as bfloat16, to the nearest, of two equally near to the even one, where there is no instruction for it."""
    halves, words = ir.VectorType(_HALF, x.type.count), ir.VectorType(_INT, x.type.count)
    bits = build.bitcast(x, words)
    is_odd = build.and_(build.lshr(bits, constant(words, 16)), constant(words, 1))
    nearest = build.add(bits, build.add(is_odd, constant(words, 0x7FFF)))
    quiet = build.or_(bits, constant(words, 0x400000))  # NaN stays NaN, whatever the half that goes held
    return build.trunc(build.lshr(build.select(build.fcmp_unordered("uno", x, x), quiet, nearest), constant(words, 16)), halves)


# What LLVM's builder says in more words --------------------------------------------------------------------------------------------------


def _function(module: ir.Module, name: str, arguments: int) -> tuple[ir.Function, ir.IRBuilder]:
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_SIZE] * arguments), name)
    return function, ir.IRBuilder(function.append_basic_block("entry"))


def _store(build: ir.IRBuilder, vector: ir.Value, at: ir.Value) -> None:
    build.store(vector, build.inttoptr(at, vector.type.as_pointer()), align=2)


def _pointer(build: ir.IRBuilder, base: ir.Value, elements: ir.Value, kind: ir.Type) -> ir.Value:
    return build.inttoptr(build.add(base, build.mul(elements, _SIZE(_BYTES))), kind.as_pointer())


def _vector_at(build: ir.IRBuilder, row: ir.Value, first: int, vector: ir.VectorType) -> ir.Value:
    return build.load(build.bitcast(build.gep(row, [_SIZE(first)]), vector.as_pointer()), align=_BYTES)


def _phi(build: ir.IRBuilder, kind: ir.Type, *incoming: tuple[ir.Value, ir.Block]) -> ir.PhiInstr:
    phi = build.phi(kind)
    for value, block in incoming:
        phi.add_incoming(value, block)
    return phi
