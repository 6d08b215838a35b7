/* The programs of `taskgpt bench programs` as tasks of OpenMP. openmp.py compiles and calls them, with BLAS by pointers.

   Matrices lie by rows. To BLAS, which counts by columns, a tile is its transpose, and what was lower is upper. */

#include <omp.h>
#include <stdint.h>

typedef void gemm_t(char *, char *, int *, int *, int *, double *, double *, int *, double *, int *, double *, double *, int *);
typedef void syrk_t(char *, char *, int *, int *, double *, double *, int *, double *, double *, int *);
typedef void trsm_t(char *, char *, char *, char *, int *, int *, double *, double *, int *, double *, int *);
typedef void potrf_t(char *, int *, double *, int *, int *);

static double one = 1.0, minus_one = -1.0;

static int least(int a, int b) { return a < b ? a : b; }

/* a (n, n) becomes its Cholesky factor, in its lower triangle. Returns 0, or what potrf says of a tile. */
int cholesky(double *a, int n, int tile, int threads, gemm_t *gemm, syrk_t *syrk, trsm_t *trsm, potrf_t *potrf)
{
    int tiles = (n + tile - 1) / tile, failed = 0;
#define TILE(i, j) (a + (int64_t)(i) * tile * n + (int64_t)(j) * tile)
#define ROWS(i) least(tile, n - (i) * tile)
#pragma omp parallel num_threads(threads)
#pragma omp single
    for (int k = 0; k < tiles; k++) {
        double *akk = TILE(k, k);
        int depth = ROWS(k);
#pragma omp task depend(inout : akk[0]) firstprivate(akk, depth)
        {
            int info;
            potrf("U", &depth, akk, &n, &info);
            if (info) {
#pragma omp atomic write
                failed = info;
            }
        }
        for (int i = k + 1; i < tiles; i++) {
            double *aik = TILE(i, k);
            int rows = ROWS(i);
#pragma omp task depend(in : akk[0]) depend(inout : aik[0]) firstprivate(akk, aik, depth, rows)
            trsm("L", "U", "T", "N", &depth, &rows, &one, akk, &n, aik, &n);
        }
        for (int i = k + 1; i < tiles; i++) {
            double *aik = TILE(i, k), *aii = TILE(i, i);
            int rows = ROWS(i);
#pragma omp task depend(in : aik[0]) depend(inout : aii[0]) firstprivate(aik, aii, depth, rows)
            syrk("U", "T", &rows, &depth, &minus_one, aik, &n, &one, aii, &n);
            for (int j = k + 1; j < i; j++) {
                double *ajk = TILE(j, k), *aij = TILE(i, j);
                int columns = ROWS(j);
#pragma omp task depend(in : aik[0], ajk[0]) depend(inout : aij[0]) firstprivate(aik, ajk, aij, depth, rows, columns)
                gemm("T", "N", &columns, &rows, &depth, &minus_one, ajk, &n, aik, &n, &one, aij, &n);
            }
        }
    }
    return failed;
}

static void relax(double *u, int64_t distance, int rows, int columns)
{
    for (int r = 0; r < rows; r++, u += distance) {
        double before = u[-1];
        for (int c = 0; c < columns; c++)
            u[c] = before = (u[c - distance] + u[c + distance] + u[c + 1] + before) * 0.25;
    }
}

/* Sweeps of Gauss-Seidel over what is inside the edge of u (n + 2, n + 2), in blocks. */
void heat(double *u, int n, int block, int sweeps, int threads)
{
    int blocks = (n + block - 1) / block;
    int64_t distance = n + 2;
#define BLOCK(i, j) (u + ((int64_t)(i) * block + 1) * distance + (int64_t)(j) * block + 1)
#pragma omp parallel num_threads(threads)
#pragma omp single
    for (int s = 0; s < sweeps; s++)
        for (int i = 0; i < blocks; i++)
            for (int j = 0; j < blocks; j++) {
                double *here = BLOCK(i, j), *up = BLOCK(i - (i > 0), j), *down = BLOCK(i + (i + 1 < blocks), j);
                double *left = BLOCK(i, j - (j > 0)), *right = BLOCK(i, j + (j + 1 < blocks));
                int rows = least(block, n - i * block), columns = least(block, n - j * block);
                /* At the edge a neighbour is the block itself, which the inout covers. */
#pragma omp task depend(in : up[0], down[0], left[0], right[0]) depend(inout : here[0]) firstprivate(here, rows, columns)
                relax(here, distance, rows, columns);
            }
}

static int64_t fib_alone(int64_t n) { return n < 2 ? n : fib_alone(n - 1) + fib_alone(n - 2); }

static int64_t fib_task(int64_t n, int64_t cut_off)
{
    if (n <= cut_off)
        return fib_alone(n);
    int64_t a, b;
#pragma omp task shared(a)
    a = fib_task(n - 1, cut_off);
#pragma omp task shared(b)
    b = fib_task(n - 2, cut_off);
#pragma omp taskwait
    return a + b;
}

/* Returns the n-th Fibonacci number; numbers up to the cut-off are computed without tasks. */
int64_t fib(int n, int cut_off, int threads)
{
    int64_t found;
#pragma omp parallel num_threads(threads)
#pragma omp single
    found = fib_task(n, cut_off);
    return found;
}

static int64_t queens_alone(int64_t full, int64_t columns, int64_t left, int64_t right)
{
    if (columns == full)
        return 1;
    int64_t found = 0;
    for (int64_t bit, open = full & ~(columns | left | right); open; open ^= bit) {
        bit = open & -open;
        found += queens_alone(full, columns | bit, (left | bit) << 1, (right | bit) >> 1);
    }
    return found;
}

static int64_t queens_task(int64_t full, int64_t columns, int64_t left, int64_t right, int rows)
{
    if (rows == 0)
        return queens_alone(full, columns, left, right);
    int64_t counts[64], found = 0;
    int children = 0;
    for (int64_t bit, open = full & ~(columns | left | right); open; open ^= bit) {
        bit = open & -open;
        int64_t *count = &counts[children++];
#pragma omp task firstprivate(count, bit)
        *count = queens_task(full, columns | bit, (left | bit) << 1, (right | bit) >> 1, rows - 1);
    }
#pragma omp taskwait
    for (int i = 0; i < children; i++)
        found += counts[i];
    return found;
}

/* Returns in how many ways n queens stand on a board; each place in the first `rows` rows, up to the cut-off, is a task. */
int64_t queens(int n, int rows, int threads)
{
    int64_t found;
#pragma omp parallel num_threads(threads)
#pragma omp single
    found = queens_task(((int64_t)1 << n) - 1, 0, 0, 0, rows);
    return found;
}
