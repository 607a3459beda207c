/* The schedule of flash-decoding: every position lies in one piece, whatever the batch, and no two partial
 * results share a byte of the scratch. */
#include "qk_attention_split.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { LONGEST = 5 * QK_ATTENTION_SPLIT + 3 };

static void test_positions_once(void **state)
{
    (void)state;
    unsigned char seen[LONGEST];
    for (int64_t length = 1; length <= LONGEST; length++) {
        memset(seen, 0, sizeof seen);
        int64_t splits = qk_attention_splits(length);
        for (int64_t s = 0; s < splits; s++) {
            int64_t count = qk_attention_count(length, s);
            assert_true(count >= 1 && count <= QK_ATTENTION_SPLIT);
            for (int64_t i = 0; i < count; i++) seen[s * QK_ATTENTION_SPLIT + i]++;
        }
        for (int64_t i = 0; i < length; i++) assert_int_equal(seen[i], 1);
        for (int64_t s = splits; s < splits + 9; s++) assert_true(qk_attention_count(length, s) <= 0);
    }
}

/* The grid of any `longest` at or above a length holds all its pieces. */
static void test_grid_holds_every_piece(void **state)
{
    (void)state;
    for (int64_t longest = 1; longest <= LONGEST; longest++) {
        for (int64_t tokens = 1; tokens <= 130; tokens += 43) {
            qk_attention_plan p = qk_attention_plan_for(tokens, 8, 64, longest);
            assert_true(p.splits >= qk_attention_splits(longest));
            assert_true((p.splits - 1) * QK_ATTENTION_SPLIT < longest);
            assert_true(p.tokens >= 1 && p.tokens <= tokens);
        }
    }
}

/* Each byte up to the end belongs to one counter, pair of statistics or row of values. */
static void check_places(int64_t tokens, int heads, int d, int64_t longest)
{
    qk_attention_plan p = qk_attention_plan_for(tokens, heads, d, longest);
    unsigned char *used = calloc((size_t)p.bytes, 1);
    assert_non_null(used);
    assert_int_equal(p.stats % 16, 0);
    assert_int_equal(p.partial % 16, 0);
    assert_true(p.tokens * heads <= QK_ATTENTION_COUNTERS);
    for (int64_t i = 0; i < QK_ATTENTION_COUNTERS * 4; i++) used[i]++;
    for (int64_t t = 0; t < p.tokens; t++)
        for (int h = 0; h < heads; h++)
            for (int64_t s = 0; s < p.splits; s++) {
                int64_t record = qk_attention_record(t, heads, h, p.splits, s);
                int64_t row = p.partial + record * d * 4;
                assert_true(row + d * 4 <= p.bytes);
                for (int64_t i = 0; i < 8; i++) used[p.stats + record * 8 + i]++;
                for (int64_t i = 0; i < d * 4; i++) used[row + i]++;
            }
    for (int64_t i = 0; i < p.bytes; i++) assert_true(used[i] <= 1);
    free(used);
}

static void test_places_are_disjoint(void **state)
{
    (void)state;
    const int64_t tokens[] = {1, 2, 7, 64, 65, 300}, longest[] = {1, 128, 129, 700, 4096};
    const int shapes[][2] = {{1, 8}, {3, 24}, {9, 64}, {32, 128}, {71, 64}, {129, 8}};
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++)
        for (size_t j = 0; j < sizeof longest / sizeof *longest; j++)
            for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
                if (tokens[i] > 64 && shapes[s][0] < 71) continue; /* the same launch as 64 tokens */
                check_places(tokens[i], shapes[s][0], shapes[s][1], longest[j]);
            }
}

/* Scratch for the largest call serves smaller ones, and stays bounded. */
static void test_bytes_grow(void **state)
{
    (void)state;
    const int64_t tokens[] = {1, 2, 31, 64, 65, 4096};
    int64_t before[6] = {0};
    for (int64_t longest = 1; longest <= 300000; longest += longest < 2000 ? 37 : 4099) {
        for (int i = 0; i < 6; i++) {
            qk_attention_plan p = qk_attention_plan_for(tokens[i], 32, 128, longest);
            assert_true(p.bytes >= before[i]);
            assert_true(i == 0 || p.bytes >= before[i - 1]);
            assert_true(p.tokens >= 1);
            assert_true(p.partial + p.tokens * 32 * p.splits * 512 <= p.bytes);
            int64_t one = 32 * p.splits * 520;
            int64_t bound = one > QK_ATTENTION_BUDGET ? one : QK_ATTENTION_BUDGET;
            assert_true(p.bytes <= QK_ATTENTION_COUNTERS * 4 + bound + 16);
            before[i] = p.bytes;
        }
    }
    for (int heads = 1; heads <= QK_ATTENTION_COUNTERS; heads *= 2) {
        assert_true(qk_attention_plan_for(64, heads, 64, 1).tokens >= 1);
    }
    assert_int_equal(qk_attention_plan_for(64, QK_ATTENTION_COUNTERS + 1, 64, 1).tokens, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_positions_once),
        cmocka_unit_test(test_grid_holds_every_piece),
        cmocka_unit_test(test_places_are_disjoint),
        cmocka_unit_test(test_bytes_grow),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
