/* Where the code of row n, column k lies in a packed weight.
 *
 * Rows come in panels of 16, columns in units of 32. A step is 4 columns of a panel: 64 bytes, row
 * by row 4 bytes, which is what one vpdpbusd (or two on 256 bits, four on 128) multiplies with 4
 * activations, its result being 16 neighbouring outputs. A unit is 8 steps of 64 * bits / 8 bytes
 * each, cut into planes of 4, 2 and 1 bits (6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1):
 *
 *     8 bits  8 vectors of 64 bytes, one per step
 *     4 bits  4 vectors; step s is the (s % 2)-th nibble of vector s / 2
 *     2 bits  2 vectors; step s is the (s % 4)-th bit pair of vector s / 4
 *     1 bit   1 vector;  step s is bit s
 *
 * so that unpacking needs only shifts, ands and ors, on any instruction set. Rows and columns are
 * padded with code 0; padded activations are 0. Float weights lie column by column: 16 values.
 */
#ifndef POSTTRAIN_LAYOUT_H
#define POSTTRAIN_LAYOUT_H

#include <stdint.h>

static const int64_t kPanel = 16, kStep = 4, kUnit = 32, kVector = 64;

/* The widest product exact in int32 is 2^31 / (255 * 128) columns; longer rows get more segments. */
static const int64_t kLongestSegment = 32768;

/* Runs of this many channels at most are rotated together. */
static const int64_t kLargestRotation = 512;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t panels_of(int64_t rows) { return ceil_div(rows, kPanel); }
static inline int64_t units_of(int64_t cols) { return ceil_div(cols, kUnit); }
static inline int64_t padded(int64_t cols) { return units_of(cols) * kUnit; }
static inline int64_t unit_bytes(int bits) { return (int64_t)kVector * bits; }
static inline int64_t panel_bytes(int64_t cols, int bits) { return units_of(cols) * unit_bytes(bits); }

#endif
