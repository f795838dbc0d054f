"""The block of int64 through which a call reaches its tasks: the names of its words. No computation.

A task receives the address of one such block. Sizes and steps are in elements, addresses in bytes, numbers that are not
integers as the bits of a float64. The words named S_… repeat for each source, SOURCE_WORDS apart, from SOURCES on.
"""

from __future__ import annotations

# What is being computed
N, H, W, C = 0, 1, 2, 3
K, R, S = 4, 5, 6
P, Q = 7, 8
STRIDE_H, STRIDE_W = 9, 10
PAD_TOP, PAD_LEFT = 11, 12
DILATION_H, DILATION_W = 13, 14
GROUPS = 15
IS_ADD = 16
SOURCE_COUNT = 17

# How it is cut up
TILE_P, TILE_Q = 18, 19  # output rows and columns of a task
TILES_P, TILES_Q = 20, 21
DEPTH = 22  # merged channels of one group that are loaded and summed at a time
BLOCKS = 23  # filter blocks of nv vectors in one group
TASK_BLOCKS = 24  # of which one task computes this many
ROWS, COLS = 25, 26  # of the merged map that a tile's taps span, in the map and beyond it

# Where things are
SCRATCH = 27  # the slots, one after the other
SCRATCH_BYTES = 28  # of one slot
AT_SUMS, AT_PIXELS, AT_OUT, AT_RESIDUAL, AT_GROUPS, AT_COPY = 29, 30, 31, 32, 33, 34  # bytes from the slot's start
FILTERS = 35  # packed, or as the caller has them
OUT = 36
OUT_N, OUT_P, OUT_Q, OUT_K = 37, 38, 39, 40

# Epilogue
BIAS = 41  # 0 = none
RESIDUAL = 42  # 0 = none
RESIDUAL_N, RESIDUAL_P, RESIDUAL_Q, RESIDUAL_K = 43, 44, 45, 46
RESIDUAL_UP_H, RESIDUAL_UP_W = 47, 48
RESIDUAL_WEIGHT = 49  # WEIGHT_…
RESIDUAL_FACTOR = 50  # float64 bits of a scalar, or the address of a vector
ACTIVATION = 51
SLOPE = 52  # float64 bits
WIDTH = 53  # elements of a row of sums; a word, so that the epilogue is compiled once for all register tiles
PITCH = 54  # columns of a loaded tile, or pixels of planes at a time
SUMS_STEP = 55  # bytes from the sums of a filter to those of the next, where filters have rows of their own
STORE_AROUND = 56  # procedure of Winograd

# Winograd, beside TILES_P and TILES_Q
TILES, TASK_TILES, ROW_TILES = 57, 58, 59  # of all images; of a task; loaded at a time
POINT_VALUES, POINT_SUMS = 60, 61  # elements from one point to the next, of transformed patches and of sums
AT_VALUES, AT_FINISHED = 62, 63
AROUND = 64  # 1: outputs of all filters of a task are gathered and then stored around the caches

# Products of matrices
ROWS_FIRST = 65  # 1: all filter blocks of a task with one register tile of pixels after the other
READS_SOURCES = 66  # 1: pixels are read where the sources have them
FILTER_ROW, FILTER_BLOCK, FILTER_GROUP = 67, 68, 69  # elements from one channel, block, group to the next
COPIES_FILTERS = 70  # 1: filters are copied, those of a task a chunk at a time
AT_SEGMENTS, AT_PANEL = 71, 72

# Procedures
LOAD_TILE, FINISH_TILE, SCATTER_TILE = 73, 74, 75
STORED_BYTES = 76  # of an element of sources, output and residual

# Tiles of bfloat16
IS_FLAT = 77  # 1: all rows of an output tile make one line
ROW_SUMS, BLOCK_SUMS = 78, 79  # pixels from one row of sums to the next, where each is a line; of a block

# More of Winograd
TAPS, OUTPUTS = 80, 81  # extents of a section's filters and of a tile
TRANSFORM_INPUTS, TRANSFORM_OUTPUTS = 82, 83  # procedures
PATCHES = 84  # of each tile: one for every section of the filters
OUTPUTS_P, OUTPUTS_Q = 85, 86  # that a tile keeps; one fewer behind the first WHOLE_P rows and WHOLE_Q columns of tiles
WHOLE_P, WHOLE_Q = 87, 88

SOURCES = 89
SOURCE_WORDS = 12  # the last one is free
S_BASE, S_N, S_H, S_W, S_C = 0, 1, 2, 3, 4
S_UP_H, S_UP_W = 5, 6
S_CHANNELS, S_FIRST = 7, 8  # its channels, and where they start in the merged map
S_WEIGHT, S_FACTOR = 9, 10  # as those of the residual

WEIGHT_NONE, WEIGHT_SCALAR, WEIGHT_VECTOR = 0, 1, 2
