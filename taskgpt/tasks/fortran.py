"""SciPy's BLAS and LAPACK inside compiled kernels, called without the GIL on memory as it lies there.

The addresses come from `scipy.linalg.cython_blas` and `cython_lapack`, which SciPy publishes for this purpose. They are bound to symbols
rather than written into the code as numbers, so that compiled kernels can be cached on disk.

A routine is declared by a letter for each of its arguments, as Fortran has them:

    c  one letter, a code of ASCII    A  an array that is read        P  an array of int32 that is written
    i  an integer of 32 bits          W  an array that is written     I  what went wrong: no argument here, but the result
    x  a number of the arrays' type   r  the same, of a complex type its real part

Routines count by columns, tiles lie by rows: to them a tile is its transpose, and what was lower is upper. The type of its arrays says
which of four a routine is: sgemm, dgemm, cgemm or zgemm.
"""

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import get_cython_function_address, intrinsic

PREFIXES = {types.float32: "s", types.float64: "d", types.complex64: "c", types.complex128: "z"}
_BYTE_POINTER = ir.IntType(8).as_pointer()


def routine(module: str, name: str, letters: str, of_real: str = "") -> Any:
    """Return what calls a routine from compiled code. `of_real`: the name of what is called for real types, where it is another."""
    letters = letters.replace(" ", "")
    symbols = {dtype: _bind(module, prefix + (of_real if of_real and prefix in "sd" else name)) for dtype, prefix in PREFIXES.items()}

    @intrinsic
    def call(typing_context, *arguments):
        given = [letter for letter in letters if letter != "I"]
        arrays = [each for letter, each in zip(given, arguments, strict=True) if letter in "AW"]
        dtype = arrays[0].dtype
        info = types.int32 if "I" in letters else types.void
        real = getattr(dtype, "underlying_float", dtype)
        wanted = {"c": types.uint8, "i": types.int32, "x": dtype, "r": real}

        def codegen(context, builder, signature, values):
            pointers = []
            for letter, of_type, value in zip(given, signature.args[0], cgutils.unpack_tuple(builder, values[0]), strict=True):
                if letter in "AWP":
                    data = context.make_array(of_type)(context, builder, value).data
                    pointers.append(builder.bitcast(data, _BYTE_POINTER))
                else:
                    number = context.cast(builder, value, of_type, wanted[letter])
                    pointers.append(builder.bitcast(cgutils.alloca_once_value(builder, number), _BYTE_POINTER))
            if "I" in letters:
                result = cgutils.alloca_once_value(builder, ir.Constant(ir.IntType(32), 0))
                pointers.append(builder.bitcast(result, _BYTE_POINTER))
            function_type = ir.FunctionType(ir.VoidType(), [_BYTE_POINTER] * len(pointers))
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, symbols[dtype]), pointers)
            return builder.load(result) if "I" in letters else context.get_dummy_value()

        return info(types.StarArgTuple(arguments)), codegen

    return call


def verifier(name: str, **arrays: str) -> Any:
    """Return what refuses, when a kernel is compiled, arrays that a routine cannot take.

    `arrays`: of each its number of axes, and w if it is written: `c="2w"`; of pivots, which are int32, also p: "1wp".
    """
    wanted = [(argument, int(form[0]), "w" in form, "p" in form) for argument, form in arrays.items()]

    @intrinsic
    def verify(typing_context, *given):
        numbers = [each for each, (*_, is_pivots) in zip(given, wanted, strict=True) if not is_pivots]
        kinds = {getattr(each, "dtype", None) for each in numbers}
        for each, (argument, axes, is_written, is_pivots) in zip(given, wanted, strict=True):
            is_fit = isinstance(each, types.Array) and each.ndim == axes
            if not is_fit or (each.dtype != types.int32 if is_pivots else len(kinds) > 1 or each.dtype not in PREFIXES):
                of = "int32" if is_pivots else f"{', '.join(map(str, PREFIXES))}, all of one type"
                raise TypingError(f"{name} takes as {argument} a tile of {axes} dimensions of {of}; got {', '.join(map(str, given))}")
            if is_written and not each.mutable:
                raise TypingError(f"Cannot modify readonly array {argument}")  # numba's words, where an In tile is written

        def codegen(context, builder, signature, values):
            return context.get_dummy_value()

        return types.void(types.StarArgTuple(given)), codegen

    return verify


@njit
def transpose_letter(flag):
    """Return N, T or C for 0, 1 or 2."""
    return 67 if flag == 2 else 84 if flag else 78


@njit
def triangle_letter(lower):
    """Return U for the lower triangle of a row-major tile and L for the upper, as a routine sees it that counts by columns."""
    return 85 if lower else 76


@njit
def distance(tile):
    """Return how many elements lie between rows: at least a row's length, and 1. A tile of one row may say anything, and is not asked."""
    return max(1, tile.shape[1], tile.strides[0] // tile.itemsize if tile.shape[0] > 1 else 0)


def _bind(module: str, name: str) -> str:
    symbol = f"taskgpt_{name}"
    llvmlite.binding.add_symbol(symbol, get_cython_function_address(f"scipy.linalg.{module}", name))
    return symbol
